//! The routes of the protocol over HTTP.
//!
//! A model's name may have slashes, as they are or as `%2F`, so that everything below `/v2/models/` is one
//! route: the words at its end say what is asked.

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde_json::{Value, json};
use trustformers_proto::inference;

use super::infer::{PreparedInfer, prepare, prepare_text};
use super::json::{self, BinaryOutputs, NamedModel};
use super::metadata;
use super::run::{AnswerParts, WholeAnswer};
use crate::error::{ApiError, ErrorShape};
use crate::inference::Models;
use crate::json_body::{object, take};
use crate::sse_frames::{Frame, SseBody};
use crate::{Api, Verdict, request_body};

/// An answer of more elements is written away from the threads that serve connections: a million floats take
/// some tens of milliseconds as JSON, and this many about one.
const ELEMENTS_AT_ONCE: usize = 32 * 1024;

/// The routes.
pub(crate) fn router() -> Router<Api> {
    Router::new()
        .route("/v2", get(server))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/models/{*rest}", get(about_model).post(ask_model))
        .route("/v2/repository/index", post(index))
}

async fn server() -> Json<Value> {
    let inference::ServerMetadataResponse { name, version, extensions } = metadata::server();
    Json(json!({"name": name, "version": version, "extensions": extensions}))
}

/// The protocol names the field `live` on both routes, and KServe's client reads `ready` on the second.
async fn live(State(api): State<Api>) -> Response {
    let verdict = api.inference.liveness();
    health(&verdict, json!({"live": verdict.ok}))
}

async fn ready(State(api): State<Api>) -> Response {
    let verdict = api.inference.readiness().borrow().clone();
    health(&verdict, json!({"live": api.inference.liveness().ok, "ready": verdict.ok}))
}

/// 200, or 503 with the cause as an error.
fn health(verdict: &Verdict, mut body: Value) -> Response {
    if verdict.ok {
        return Json(body).into_response();
    }
    body["error"] = json!(verdict.message);
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModelAction {
    Metadata,
    Ready,
    Config,
    Statistics,
    Infer,
    Generate,
    GenerateStream,
}

impl ModelAction {
    /// The words at the end of a path.
    const WORDS: &'static [(&'static str, Self)] = &[
        ("ready", Self::Ready),
        ("config", Self::Config),
        ("stats", Self::Statistics),
        ("infer", Self::Infer),
        ("generate", Self::Generate),
        ("generate_stream", Self::GenerateStream),
    ];

    fn is_post(self) -> bool {
        matches!(self, Self::Infer | Self::Generate | Self::GenerateStream)
    }
}

/// A path below `/v2/models/`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelPath {
    model: NamedModel,
    action: ModelAction,
}

impl ModelPath {
    /// Reads `NAME[/versions/VERSION][/WORD]`. None where no name is left.
    fn parse(path: &str) -> Option<Self> {
        let found = ModelAction::WORDS.iter().find_map(|(word, action)| {
            let rest = path.strip_suffix(word)?.strip_suffix('/')?;
            Some((rest, *action))
        });
        let (rest, action) = found.unwrap_or((path, ModelAction::Metadata));
        let version = rest.rsplit_once('/').and_then(|(before, version)| {
            let name = before.strip_suffix("/versions")?;
            (!name.is_empty() && !version.is_empty()).then_some((name, version))
        });
        let (name, version) = version.unwrap_or((rest, ""));
        let model = NamedModel { name: name.to_owned(), version: version.to_owned() };
        (!name.is_empty()).then_some(Self { model, action })
    }
}

fn models(api: &Api) -> Models {
    api.inference.watch_models().borrow().clone()
}

/// The path of a route of a model, which takes this method.
fn model_path(rest: &str, method: &Method, uri: &Uri) -> Result<ModelPath, ApiError> {
    let path = uri.path().to_owned();
    let Some(parsed) = ModelPath::parse(rest) else { return Err(ApiError::UnknownRoute { path }) };
    let is_post = method == Method::POST;
    match (parsed.action, is_post) {
        (ModelAction::Metadata, true) => Err(ApiError::UnknownRoute { path }),
        (action, is_post) if action.is_post() != is_post => {
            Err(ApiError::MethodNotAllowed { method: method.to_string(), path })
        }
        _ => Ok(parsed),
    }
}

/// `GET` of what there is to know about a model.
async fn about_model(
    State(api): State<Api>,
    Path(rest): Path<String>,
    method: Method,
    uri: Uri,
) -> Result<Response, ApiError> {
    let ModelPath { model: named, action } = model_path(&rest, &method, &uri)?;
    let models = models(&api);
    let model = metadata::find(&models, &named.name, &named.version)?;
    Ok(match action {
        ModelAction::Ready => {
            let verdict = Verdict { ok: metadata::is_ready(model), message: metadata::describe(model) };
            health(&verdict, json!({"name": model.name, "ready": verdict.ok}))
        }
        ModelAction::Config => Json(metadata::config_json(&metadata::config(model)?)).into_response(),
        ModelAction::Statistics => {
            Json(json!({"model_stats": [api.kserve_counts.json(model)]})).into_response()
        }
        _ => Json(metadata::describe_model(model)?).into_response(),
    })
}

/// `POST` of a request to a model.
async fn ask_model(
    State(api): State<Api>,
    Path(rest): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let ModelPath { model, action } = model_path(&rest, request.method(), request.uri())?;
    match action {
        ModelAction::Generate => generate(&api, model, request).await,
        ModelAction::GenerateStream => generate_stream(&api, model, request).await,
        _ => infer(&api, model, request).await,
    }
}

async fn infer(api: &Api, model: NamedModel, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let body = request_body::read(&head, body).await?;
    let json_bytes = json::json_length(&head.headers, body.len())?;
    let (models, headers) = (models(api), head.headers);
    let whole = body.clone();
    let read = move |_: &[u8]| {
        let parsed = json::parse_infer(model, &whole, json_bytes)?;
        Ok(ReadInfer { prepared: prepare(&models, parsed.request, &headers)?, binary: parsed.binary })
    };
    let ReadInfer { prepared, binary } = api.parse(body, read).await?;
    let answer = prepared.answer(api).await?;
    write(api, answer, binary).await
}

/// A request that fits its model, with the form of its answer.
struct ReadInfer {
    prepared: PreparedInfer,
    binary: BinaryOutputs,
}

async fn write(api: &Api, whole: WholeAnswer, binary: BinaryOutputs) -> Result<Response, ApiError> {
    let WholeAnswer { headers, answer } = whole;
    let elements: usize = answer.outputs.iter().map(|output| output.data.len()).sum();
    let write = move || json::write_infer(&answer, &binary);
    let written = if elements > ELEMENTS_AT_ONCE { api.large_bodies.run(write).await? } else { write() };
    let body = written
        .map_err(|error| ApiError::Internal { message: format!("the answer cannot be written: {error}") })?;
    Ok((headers, body).into_response())
}

async fn read_text(api: &Api, model: NamedModel, request: Request) -> Result<PreparedInfer, ApiError> {
    let (head, body) = request.into_parts();
    let body = request_body::read(&head, body).await?;
    let (models, headers): (Models, HeaderMap) = (models(api), head.headers);
    api.parse(body, move |bytes| prepare_text(&models, json::parse_text(model, bytes)?, &headers)).await
}

async fn generate(api: &Api, model: NamedModel, request: Request) -> Result<Response, ApiError> {
    let prepared = read_text(api, model, request).await?;
    let WholeAnswer { headers, answer } = prepared.answer(api).await?;
    Ok((headers, Json(json::text_json(&answer))).into_response())
}

async fn generate_stream(api: &Api, model: NamedModel, request: Request) -> Result<Response, ApiError> {
    let prepared = read_text(api, model, request).await?;
    let AnswerParts { headers, parts } = prepared.parts(api, true).await?;
    let frames = parts.map(|part| match part {
        Ok(answer) => Frame::json(&json::text_json(&answer)),
        Err(error) => Frame::json(&error.to_json_in(ErrorShape::KserveHttp)),
    });
    Ok((headers, SseBody::new(frames)).into_response())
}

async fn all_statistics(State(api): State<Api>) -> Json<Value> {
    let all: Vec<Value> = models(&api).iter().map(|model| api.kserve_counts.json(model)).collect();
    Json(json!({"model_stats": all}))
}

/// The fields of a request for the index.
pub(crate) const INDEX_FIELDS: &[&str] = &["ready"];

/// `POST /v2/repository/index`, whose body may be empty.
async fn index(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let (head, body) = request.into_parts();
    let body = request_body::read(&head, body).await?;
    let only_ready = if body.is_empty() {
        false
    } else {
        let fields = object(&body, INDEX_FIELDS, r#"{"ready": true}"#)?;
        take(&fields, "ready", "true or false", Value::as_bool)?.unwrap_or(false)
    };
    Ok(Json(metadata::index_json(&models(&api), only_ready)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::{EmbedInput, Prompt};
    use axum::body::Body;
    use axum::http::Request as HttpRequest;
    use axum::http::header::CONTENT_TYPE;
    use http_body_util::BodyExt;
    use tower::ServiceExt;
    use trustformers_proto::Task;

    struct Sent {
        status: StatusCode,
        headers: HeaderMap,
        body: Vec<u8>,
    }

    impl Sent {
        fn json(&self) -> Value {
            serde_json::from_slice(&self.body).unwrap()
        }
    }

    async fn send(fake: &Fake, request: HttpRequest<Body>) -> Sent {
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.into_body().collect().await.unwrap().to_bytes().to_vec();
        Sent { status, headers, body }
    }

    async fn get(fake: &Fake, path: &str) -> Sent {
        send(fake, HttpRequest::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post(fake: &Fake, path: &str, body: impl Into<Body>) -> Sent {
        send(fake, HttpRequest::post(path).body(body.into()).unwrap()).await
    }

    fn generating(pieces: &[&str]) -> Fake {
        Fake::with(Script::tokens(pieces)).with_task(Task::Generate)
    }

    fn embedding() -> Fake {
        Fake::with(Script::tokens(&[])).with_task(Task::Embed)
    }

    const INFER: &str = "/v2/models/fake/infer";
    const HI: &str =
        r#"{"id":"7","inputs":[{"name":"text_input","shape":[1],"datatype":"BYTES","data":["Hi"]}]}"#;

    #[test]
    fn paths_name_a_model_a_version_and_what_is_asked() {
        let parse = |path: &str| {
            ModelPath::parse(path).map(|found| (found.model.name, found.model.version, found.action))
        };
        let named = |name: &str, version: &str, action| Some((name.to_owned(), version.to_owned(), action));
        for (path, expected) in [
            ("m", named("m", "", ModelAction::Metadata)),
            ("m/ready", named("m", "", ModelAction::Ready)),
            ("ns/m/versions/3/infer", named("ns/m", "3", ModelAction::Infer)),
            ("ns/m/versions/3", named("ns/m", "3", ModelAction::Metadata)),
            ("m/generate", named("m", "", ModelAction::Generate)),
            ("m/generate_stream", named("m", "", ModelAction::GenerateStream)),
            ("infer", named("infer", "", ModelAction::Metadata)),
            ("versions/3", named("versions/3", "", ModelAction::Metadata)),
            ("m/versions/", named("m/versions/", "", ModelAction::Metadata)),
            ("/infer", None),
            ("", None),
        ] {
            assert_eq!(parse(path), expected, "{path}");
        }
    }

    #[tokio::test]
    async fn the_server_and_its_health_are_described() {
        let fake = generating(&[]);
        let server = get(&fake, "/v2").await.json();
        assert_eq!(
            (&server["name"], &server["extensions"][0]),
            (&json!("trustformers-serve"), &json!("binary_tensor_data"))
        );
        assert_eq!(get(&fake, "/v2/health/live").await.json(), json!({"live": true}));
        assert_eq!(get(&fake, "/v2/health/ready").await.json(), json!({"live": true, "ready": true}));
        let verdict = health(&Verdict::no("warming"), json!({"live": true}));
        assert_eq!(verdict.status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn a_model_is_described_under_each_of_its_names_and_its_version() {
        let fake = generating(&[]);
        for name in ["fake", "ns/fake", "ns%2Ffake", "fake/versions/r1"] {
            let found = get(&fake, &format!("/v2/models/{name}")).await.json();
            assert_eq!((&found["name"], &found["versions"]), (&json!("fake"), &json!(["r1"])), "{name}");
            assert_eq!(found["inputs"][0], json!({"name": "text_input", "datatype": "BYTES", "shape": [-1]}));
            let ready = get(&fake, &format!("/v2/models/{name}/ready")).await;
            assert_eq!(
                (ready.status, ready.json()),
                (StatusCode::OK, json!({"name": "fake", "ready": true}))
            );
            let config = get(&fake, &format!("/v2/models/{name}/config")).await.json();
            assert_eq!(config["input"][0]["data_type"], "TYPE_STRING");
        }
        let unknown = get(&fake, "/v2/models/other/ready").await;
        assert_eq!(unknown.status, StatusCode::NOT_FOUND);
        assert!(unknown.json()["error"].as_str().unwrap().contains("known are: fake"));
        assert_eq!(get(&fake, "/v2/models/fake/versions/2").await.status, StatusCode::BAD_REQUEST);
        assert_eq!(get(&fake, INFER).await.status, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(post(&fake, "/v2/models/fake/ready", "").await.status, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(post(&fake, "/v2/models/fake", "").await.status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn a_prompt_in_json_is_answered_in_json_with_its_id() {
        let fake = generating(&["Hel", "lo"]);
        let answer = post(&fake, INFER, HI).await;
        assert_eq!(
            (answer.status, &answer.headers[CONTENT_TYPE]),
            (StatusCode::OK, &"application/json".parse().unwrap())
        );
        assert_eq!(answer.headers["x-trustformers-digest"], "d1");
        let body = answer.json();
        assert_eq!(
            (&body["id"], &body["model_name"], &body["model_version"]),
            (&json!("7"), &json!("fake"), &json!("r1"))
        );
        assert_eq!(
            body["outputs"],
            json!([
                {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["Hello"]},
                {"name": "finish_reason", "datatype": "BYTES", "shape": [1], "data": ["stop"]},
                {"name": "prompt_tokens", "datatype": "UINT32", "shape": [1], "data": [3]},
                {"name": "completion_tokens", "datatype": "UINT32", "shape": [1], "data": [2]},
            ])
        );
        assert_eq!(fake.last_request().prompt, Prompt::from("Hi"));
    }

    /// A body as Triton's client sends it by default.
    fn binary_body() -> HttpRequest<Body> {
        let json = json!({
            "inputs": [
                {"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 13}},
                {"name": "max_tokens", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": 4}},
            ],
            "parameters": {"binary_data_output": true},
            "outputs": [{"name": "completion_tokens"}, {"name": "text_output"}],
        })
        .to_string();
        let length = json.len();
        let tensors: &[u8] = &[2, 0, 0, 0, b'H', b'i', 3, 0, 0, 0, b'Y', b'o', b'u', 5, 0, 0, 0];
        HttpRequest::post(INFER)
            .header("Inference-Header-Content-Length", length)
            .body(Body::from([json.as_bytes(), tensors].concat()))
            .unwrap()
    }

    #[tokio::test]
    async fn binary_tensors_are_answered_in_the_order_that_was_asked() {
        let fake = generating(&["a"]);
        let answer = send(&fake, binary_body()).await;
        assert_eq!(
            (answer.status, &answer.headers[CONTENT_TYPE]),
            (StatusCode::OK, &"application/octet-stream".parse().unwrap())
        );
        let length: usize =
            answer.headers["inference-header-content-length"].to_str().unwrap().parse().unwrap();
        let (json, tensors) = answer.body.split_at(length);
        let json: Value = serde_json::from_slice(json).unwrap();
        assert_eq!(
            json["outputs"],
            json!([
                {"name": "completion_tokens", "datatype": "UINT32", "shape": [2, 1], "parameters": {"binary_data_size": 8}},
                {"name": "text_output", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": 10}},
            ])
        );
        assert_eq!(tensors, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, b'a', 1, 0, 0, 0, b'a']);
        assert_eq!(fake.last_request().max_tokens, 5);
    }

    #[tokio::test]
    async fn texts_become_vectors_and_tell_how() {
        let fake = embedding();
        let body =
            json!({"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}]});
        let answer = post(&fake, INFER, body.to_string()).await.json();
        assert_eq!(
            answer["outputs"][0],
            json!({"name": "embedding", "datatype": "FP32", "shape": [2, 2], "data": [0.0, 0.1, 1.0, 0.1]})
        );
        assert_eq!(answer["outputs"][1]["data"], json!([true, false]));
        assert_eq!(
            answer["parameters"],
            json!({"pooling": "mean", "pooling_note": "not configured", "prompt_tokens": 6})
        );
        assert_eq!(fake.last_embedding().input[1], EmbedInput::Text("b".into()));
        let wrong = post(&fake, "/v2/models/fake/generate", r#"{"text_input":"a"}"#).await;
        assert_eq!(wrong.status, StatusCode::BAD_REQUEST);
        assert!(wrong.json()["error"].as_str().unwrap().contains("turns texts into vectors"));
    }

    #[tokio::test]
    async fn the_generate_extension_answers_whole_or_in_pieces() {
        let fake = generating(&["Hel", "lo"]);
        let end = json!({"model_name": "fake", "model_version": "r1", "text_output": "Hello", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2});
        let body =
            r#"{"text_input": "Hi", "parameters": {"max_tokens": 4, "bad_words": [""]}, "stream": false}"#;
        let whole = post(&fake, "/v2/models/fake/versions/r1/generate", body).await;
        assert_eq!(whole.json(), end);
        assert_eq!(
            (fake.last_request().max_tokens, fake.last_request().revision.as_deref()),
            (4, Some("r1"))
        );
        let path = "/v2/models/fake/generate_stream";
        let stream = post(&fake, path, r#"{"id": "7", "text_input": "Hi"}"#).await;
        assert_eq!(stream.headers[CONTENT_TYPE], "text/event-stream");
        let text = String::from_utf8(stream.body).unwrap();
        let events: Vec<Value> = text
            .split_terminator("\n\n")
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect();
        let texts: Vec<_> = events.iter().map(|event| event["text_output"].as_str().unwrap()).collect();
        assert_eq!(texts, ["Hel", "lo", ""]);
        assert_eq!((&events[2]["finish_reason"], &events[2]["id"]), (&json!("stop"), &json!("7")));
        let once = post(&fake, path, r#"{"text_input": "Hi", "stream": false}"#).await;
        assert_eq!(String::from_utf8(once.body).unwrap(), format!("data: {end}\n\n"));
        let refused =
            post(&fake, "/v2/models/fake/generate", r#"{"text_input": "Hi", "stream": true}"#).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
        assert!(refused.json()["error"].as_str().unwrap().starts_with("stream: true asks for pieces"));
    }

    #[tokio::test]
    async fn a_failure_in_a_stream_is_its_last_event_and_leaving_cancels() {
        let error = ApiError::Internal { message: "device lost".into() };
        let fake = Fake::with(Script::tokens(&["a"]).then_fails(error)).with_task(Task::Generate);
        let stream = post(&fake, "/v2/models/fake/generate_stream", r#"{"text_input": "Hi"}"#).await;
        assert!(String::from_utf8(stream.body).unwrap().ends_with("data: {\"error\":\"device lost\"}\n\n"));
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs()).with_task(Task::Generate);
        let asking = fake.clone();
        let call = tokio::spawn(async move { post(&asking, INFER, HI).await.status });
        fake.until_running(1).await;
        call.abort();
        fake.until_running(0).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_timeout_ends_a_whole_answer_and_a_stream() {
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs()).with_task(Task::Generate);
        let body = r#"{"text_input": "Hi", "timeout": 2000000}"#;
        let whole = post(&fake, "/v2/models/fake/generate", body).await;
        assert_eq!(whole.status, StatusCode::REQUEST_TIMEOUT);
        let stream = post(&fake, "/v2/models/fake/generate_stream", body).await;
        let text = String::from_utf8(stream.body).unwrap();
        assert!(
            text.contains("\"text_output\":\"a\"") && text.contains("{\"error\":\"the answer was not"),
            "{text}"
        );
        fake.until_running(0).await;
    }

    #[tokio::test]
    async fn requests_are_counted_and_models_are_listed() {
        let fake = generating(&["a"]);
        let router = crate::http::router(fake.api());
        let call = async |request: HttpRequest<Body>| {
            let response = router.clone().oneshot(request).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        };
        call(binary_body()).await;
        call(
            HttpRequest::post("/v2/models/fake/generate_stream")
                .body(r#"{"text_input":"a"}"#.into())
                .unwrap(),
        )
        .await;
        for path in ["/v2/models/stats", "/v2/models/fake/stats", "/v2/models/fake/versions/r1/stats"] {
            let body = call(HttpRequest::get(path).body(Body::empty()).unwrap()).await;
            let body: Value = serde_json::from_slice(&body).unwrap();
            let counts = &body["model_stats"][0];
            assert_eq!(
                (&counts["inference_count"], &counts["execution_count"]),
                (&json!(3), &json!(2)),
                "{path}"
            );
        }
        for body in ["", "{}", r#"{"ready": true}"#] {
            let index = post(&fake, "/v2/repository/index", body).await.json();
            assert_eq!(index, json!([{"name": "fake", "version": "r1", "state": "READY", "reason": ""}]));
        }
        assert_eq!(
            post(&fake, "/v2/repository/index", r#"{"name": 1}"#).await.status,
            StatusCode::BAD_REQUEST
        );
    }

    #[tokio::test]
    async fn refusals_are_errors_with_the_name_of_the_tensor() {
        let fake = generating(&["a"]);
        for (body, text) in [
            (HI.replace("[1]", "[2]"), "text_input: its data holds 1 values, but shape [2] has 2"),
            (HI.replace("BYTES", "INT8"), "text_input: expected datatype BYTES, found INT8"),
            (HI.replace("text_input", "prompt"), "prompt: the model has no such input"),
            (HI.replace("[1]", "[4294967296,4294967296]"), "text_input: expected the shape [n] or [n, 1]"),
            (
                HI.replace("[1]", "[18446744073709551615,1]"),
                "text_input: shape [18446744073709551615, 1] has",
            ),
            ("no".to_owned(), "the body is not JSON"),
        ] {
            let refused = post(&fake, INFER, body).await;
            assert_eq!(refused.status, StatusCode::BAD_REQUEST);
            let error = refused.json();
            assert!(error["error"].as_str().unwrap().starts_with(text), "{error}");
        }
        let loading = Fake::with(Script::tokens(&[]));
        assert_eq!(post(&loading, INFER, HI).await.status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
