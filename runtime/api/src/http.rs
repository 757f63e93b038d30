//! The HTTP routes: `/v1/generate`, `/v1/generate/stream`, `/v1/models` and `/health*`; `/v1/embeddings` is joined in.
//!
//! Bodies are read as JSON objects field by field instead of by a derived type, so that each error names the field,
//! what was found and what was expected, and an unknown field is refused with the nearest known one: a setting
//! that is silently ignored costs its user more than an error does.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use trustformers_proto::v1;

use crate::error::ApiError;
use crate::fields::{Asked, Generation, HTTP_DEFAULTS};
use crate::inference::{Answer, Event, Logprobs};
use crate::options::{OPTION_FIELDS, Options};
use crate::{Api, MAX_BODY_BYTES, embed, health, nearest, priority};

/// Every field of a generate request.
fn generate_fields() -> Vec<&'static str> {
    let own = ["prompt", "max_tokens", "temperature", "top_p", "model", "stream", "seed", "priority"];
    own.into_iter().chain(OPTION_FIELDS.iter().copied()).collect()
}

/// A body that has not come in this time never will.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The routes over `api`, with JSON errors for unknown routes and wrong methods. `/metrics` is not among them: it is
/// merged by the program that owns the registry.
pub fn router(api: Api) -> Router {
    let health = health::router(api.inference.clone());
    Router::new()
        .route("/v1/generate", post(generate))
        .route("/v1/generate/stream", post(generate_stream))
        .route("/v1/embeddings", post(embed::embeddings))
        .route("/v1/models", get(models))
        .with_state(api)
        .merge(health)
        .method_not_allowed_fallback(async |method: Method, uri: Uri| ApiError::MethodNotAllowed {
            method: method.to_string(),
            path: uri.path().to_owned(),
        })
        .fallback(async |uri: Uri| ApiError::UnknownRoute { path: uri.path().to_owned() })
}

async fn generate(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (checked, stream) = read(request).await?;
    if stream { answer_in_stream(&api, checked).await } else { answer_whole(&api, checked).await }
}

async fn generate_stream(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (checked, _) = read(request).await?;
    answer_in_stream(&api, checked).await
}

async fn answer_whole(api: &Api, request: Generation) -> Result<Response, ApiError> {
    let started = Instant::now();
    let Answer { id, model, model_digest, mut events } = api.inference.generate(request).await?;
    let (mut text, mut tokens, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event? {
            Event::Token { id, text: piece, logprobs: more } => {
                tokens.push(id);
                text.push_str(&piece);
                logprobs.extend(more.as_ref().map(Logprobs::to_json));
            }
            Event::Finished { reason, stopped_by, usage } => {
                let mut body = json!({
                    "id": id,
                    "model": model,
                    "text": text,
                    "tokens": tokens,
                    "finish_reason": reason.as_str(),
                    "usage": usage_json(usage.to_proto()),
                    "latency_ms": milliseconds(started),
                    "model_digest": model_digest,
                });
                if let Some(stop) = stopped_by {
                    body["stopped_by"] = stop.to_json();
                }
                if !logprobs.is_empty() {
                    body["logprobs"] = logprobs.into();
                }
                return Ok(Json(body).into_response());
            }
        }
    }
    Err(ended_early())
}

async fn answer_in_stream(api: &Api, request: Generation) -> Result<Response, ApiError> {
    let started = Instant::now();
    let mut answer = api.inference.generate(request).await?;
    // The head goes out only once there is a token: until then this is still an ordinary, retriable failure.
    let first = answer.events.next().await.ok_or_else(ended_early)??;
    let events = std::mem::replace(&mut answer.events, futures::stream::empty().boxed());
    let rest = futures::stream::once(async { Ok(first) }).chain(events).boxed();
    let frames = frames(rest, answer, started).map(Ok::<_, Infallible>);
    let mut response = Sse::new(frames).into_response();
    // Proxies that gather small writes would turn a stream of tokens into one block at the end.
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}

/// Server-sent events of one answer. After an error nothing follows, `[DONE]` included, so that a client which waits
/// for it knows that the text is not complete.
fn frames(
    events: BoxStream<'static, Result<Event, ApiError>>,
    head: Answer,
    started: Instant,
) -> impl Stream<Item = SseEvent> {
    let frame = |value: &Value| SseEvent::default().data(value.to_string());
    events.flat_map(move |event| {
        let frames = match event {
            Ok(Event::Token { id, text, logprobs }) => {
                let mut token = json!({"text": text, "token": id});
                if let Some(logprobs) = logprobs {
                    token["logprobs"] = logprobs.to_json();
                }
                vec![frame(&token)]
            }
            Ok(Event::Finished { reason, stopped_by, usage }) => {
                let mut last = json!({
                    "text": "",
                    "finish_reason": reason.as_str(),
                    "usage": usage_json(usage.to_proto()),
                    "id": head.id,
                    "model": head.model,
                    "latency_ms": milliseconds(started),
                    "model_digest": head.model_digest,
                });
                if let Some(stop) = stopped_by {
                    last["stopped_by"] = stop.to_json();
                }
                vec![frame(&last), SseEvent::default().data("[DONE]")]
            }
            Err(error) => vec![frame(&error.to_json())],
        };
        futures::stream::iter(frames)
    })
}

async fn models(State(api): State<Api>) -> Json<Value> {
    let models = api.inference.watch_models().borrow().clone();
    let list: Vec<Value> = models.iter().map(model_json).collect();
    Json(json!({"object": "list", "data": list}))
}

/// OpenAI's model object with what we know beyond it. `created` is the time since when the model is in its state.
fn model_json(model: &v1::ModelStatus) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.since_unix_ms / 1000,
        "owned_by": "trustformers",
        "task": model.task,
        "state": state_word(model.state()),
        "reason": model.reason,
        "message": model.message,
        "revision": model.revision,
        "digest": model.digest,
        "device": model.device,
        "context_tokens": model.context_tokens,
        "embedding_dimensions": Some(model.embedding_dimensions).filter(|count| *count > 0),
        "loaded_bytes": model.loaded_bytes,
        "total_bytes": model.total_bytes,
    })
}

/// A state as it stands in JSON and in logs.
pub fn state_word(state: v1::ModelState) -> &'static str {
    match state {
        v1::ModelState::Unspecified => "unknown",
        v1::ModelState::Pending => "pending",
        v1::ModelState::Loading => "loading",
        v1::ModelState::Warming => "warming",
        v1::ModelState::Ready => "ready",
        v1::ModelState::Draining => "draining",
        v1::ModelState::Unloaded => "unloaded",
        v1::ModelState::Failed => "failed",
    }
}

fn usage_json(usage: v1::Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    })
}

pub(crate) fn milliseconds(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

pub(crate) fn ended_early() -> ApiError {
    ApiError::Internal { message: "the engine ended the answer without a reason; its log says more".into() }
}

/// The generation that is asked for, and whether its answer is to be a stream.
async fn read(request: Request) -> Result<(Generation, bool), ApiError> {
    let (head, body) = request.into_parts();
    let (asked, stream) = parse(&read_bytes(body).await?)?;
    Ok((asked.with_headers(&head.headers)?.check(&HTTP_DEFAULTS)?, stream))
}

/// A whole body, within bounds of length and time.
pub(crate) async fn read_bytes(body: Body) -> Result<Bytes, ApiError> {
    let gathered = tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY_BYTES)).await;
    match gathered {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => {
            let message = format!("the body is longer than the {MAX_BODY_BYTES} bytes that are read at most");
            Err(ApiError::TooLong { message })
        }
        Ok(Err(error)) => Err(broken_body(format!("the body could not be read: {error}"))),
        Err(_) => Err(broken_body(format!("the body did not come within {} s", BODY_TIMEOUT.as_secs()))),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.to_string() == "length limit exceeded" {
            return true;
        }
        cause = error.source();
    }
    false
}

fn broken_body(message: String) -> ApiError {
    ApiError::InvalidRequest { field: None, message }
}

fn parse(bytes: &[u8]) -> Result<(Asked, bool), ApiError> {
    let object = object(bytes, &generate_fields(), r#"{"prompt": "Hello", "max_tokens": 32}"#)?;
    let asked = Asked {
        prompt: take(&object, "prompt", "a string", |value| value.as_str().map(str::to_owned))?.ok_or_else(
            || ApiError::field("prompt", "is missing: give the text that the model is to continue"),
        )?,
        model: take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?,
        max_tokens: take(&object, "max_tokens", "a whole number from 1 to 4294967295", |value| {
            value.as_u64().and_then(|count| u32::try_from(count).ok())
        })?,
        temperature: take(&object, "temperature", "a number", float)?,
        top_p: take(&object, "top_p", "a number", float)?,
        seed: take(&object, "seed", "a whole number from 0 to 18446744073709551615", Value::as_u64)?,
        priority: priority::of_json(&object)?,
        tenant: String::new(),
        options: Options::from_json(&object)?,
    };
    let stream = take(&object, "stream", "true or false", Value::as_bool)?.unwrap_or(false);
    Ok((asked, stream))
}

/// The object in a body, which has none but the `known` fields.
pub(crate) fn object(bytes: &[u8], known: &[&str], example: &str) -> Result<Map<String, Value>, ApiError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        broken_body(format!("the body is not JSON ({error}); send an object such as {example}"))
    })?;
    let Value::Object(object) = value else {
        return Err(broken_body(format!("the body must be a JSON object such as {example}")));
    };
    if let Some(unknown) = object.keys().find(|key| !known.contains(&key.as_str())) {
        let hint = nearest::hint(unknown, known);
        return Err(ApiError::InvalidRequest {
            field: Some(unknown.clone()),
            message: format!("{unknown}: there is no such field; {hint}"),
        });
    }
    Ok(object)
}

#[allow(clippy::cast_possible_truncation, reason = "a setting needs no more digits than an f32 has")]
pub(crate) fn float(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32)
}

/// A field of the object; `null` is the same as leaving it out.
pub(crate) fn take<T>(
    object: &Map<String, Value>,
    field: &str,
    expected: &str,
    convert: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, ApiError> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(ApiError::field(field, format!("expected {expected}, found {}", brief(value)))),
        },
    }
}

/// A value short enough for an error message.
pub(crate) fn brief(value: &Value) -> String {
    const LONGEST: usize = 40;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        text
    } else {
        text.chars().take(LONGEST).chain("...".chars()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::{StoppedBy, tenant};
    use axum::http::{Request as HttpRequest, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn post(fake: &Fake, path: &str, body: impl Into<Body>) -> (StatusCode, String) {
        let request = HttpRequest::post(path).body(body.into()).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    fn data(body: &str) -> Vec<&str> {
        let frames: Vec<&str> = body.split_terminator("\n\n").collect();
        frames.into_iter().map(|frame| frame.strip_prefix("data: ").unwrap()).collect()
    }

    #[tokio::test]
    async fn a_whole_answer_has_the_promised_fields() {
        let fake = Fake::with(Script::tokens(&["Hello", " you"]));
        let (status, body) =
            post(&fake, "/v1/generate", r#"{"prompt": "Say", "seed": 4, "model": null}"#).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["text"], "Hello you");
        assert_eq!(body["tokens"], json!([0, 1]));
        assert_eq!(body["finish_reason"], "stop");
        assert_eq!(body["usage"], json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}));
        assert_eq!((body["model"].as_str(), body["id"].as_str()), (Some("fake"), Some("gen-1")));
        assert!(body["latency_ms"].is_number());
        let asked = fake.last_request();
        assert_eq!((asked.max_tokens, asked.temperature, asked.top_p, asked.seed), (100, 0.7, 0.9, Some(4)));
    }

    #[tokio::test]
    async fn a_stream_is_tokens_then_the_reason_then_done_on_both_routes() {
        let cases = [
            ("/v1/generate/stream", r#"{"prompt":"a"}"#),
            ("/v1/generate", r#"{"prompt":"a","stream":true}"#),
        ];
        for (path, body) in cases {
            let fake = Fake::with(Script::tokens(&["Hel", "lo"]));
            let (status, body) = post(&fake, path, body).await;
            assert_eq!(status, StatusCode::OK);
            let frames = data(&body);
            assert_eq!(frames[..2], [r#"{"text":"Hel","token":0}"#, r#"{"text":"lo","token":1}"#]);
            let last: Value = serde_json::from_str(frames[2]).unwrap();
            assert_eq!(
                (last["finish_reason"].as_str(), last["usage"]["total_tokens"].as_u64()),
                (Some("stop"), Some(5))
            );
            assert_eq!(frames[3..], ["[DONE]"]);
        }
    }

    #[tokio::test]
    async fn options_reach_the_server_and_logprobs_and_the_stop_come_back() {
        let script = || Script::tokens(&["a", "b"]).with_logprobs().stopped_by(StoppedBy::Text("END".into()));
        let body = r#"{"prompt":"a","top_k":5,"stop":"END","logprobs":1,
            "response_format":{"type":"json_object"}}"#;
        let fake = Fake::with(script());
        let (status, answer) = post(&fake, "/v1/generate", body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let each = json!({"logprob": -0.5, "top": [{"token": 7, "logprob": -0.25}]});
        assert_eq!((&answer["stopped_by"], &answer["logprobs"]), (&json!("END"), &json!([each, each])));
        let options = fake.last_request().options;
        assert_eq!(
            (options.top_k, options.stop, options.logprobs),
            (Some(5), vec!["END".to_owned()], Some(1))
        );
        assert_eq!(options.format, Some(crate::Format::JsonObject));

        let (_, body) = post(&Fake::with(script()), "/v1/generate/stream", body).await;
        let frames: Vec<Value> =
            data(&body)[..3].iter().map(|frame| serde_json::from_str(frame).unwrap()).collect();
        assert_eq!((&frames[0]["logprobs"], &frames[2]["stopped_by"]), (&each, &json!("END")));
        let (_, plain) = post(&Fake::with(Script::tokens(&["a"])), "/v1/generate", r#"{"prompt":"a"}"#).await;
        assert!(!plain.contains("logprobs") && !plain.contains("stopped_by"), "{plain}");
    }

    #[tokio::test]
    async fn class_and_tenant_come_from_headers_and_the_field_goes_before() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let ask = async |body: &'static str, class: &str| {
            let request = HttpRequest::post("/v1/generate")
                .header(priority::PRIORITY_HEADER, class)
                .header(tenant::TENANT_HEADER, "team-1")
                .body(Body::from(body))
                .unwrap();
            router(fake.api()).oneshot(request).await.unwrap().status()
        };
        assert_eq!(ask(r#"{"prompt":"a"}"#, "low").await, StatusCode::OK);
        let asked = fake.last_request();
        assert_eq!((asked.priority, asked.tenant.as_str()), (crate::Priority::Low, "team-1"));
        assert_eq!(ask(r#"{"prompt":"a","priority":"high"}"#, "low").await, StatusCode::OK);
        assert_eq!(fake.last_request().priority, crate::Priority::High);
        assert_eq!(ask(r#"{"prompt":"a"}"#, "urgent").await, StatusCode::BAD_REQUEST);
        post(&fake, "/v1/generate", r#"{"prompt":"a"}"#).await;
        let asked = fake.last_request();
        assert_eq!((asked.priority, asked.tenant.as_str()), (crate::Priority::Normal, ""));
    }

    #[tokio::test]
    async fn overload_is_429_even_for_a_stream_and_says_when_to_come_back() {
        let refused = || ApiError::Overloaded { message: "full".into(), retry_after_s: 2 };
        for script in [Script::refused(refused()), Script::fails_before_a_token(refused())] {
            let request =
                HttpRequest::post("/v1/generate/stream").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
            let response = router(Fake::with(script).api()).oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()["retry-after"], "2");
        }
    }

    #[tokio::test]
    async fn a_failure_after_the_first_token_is_in_the_stream_and_no_done_follows() {
        let error = ApiError::Internal { message: "device lost".into() };
        let fake = Fake::with(Script::tokens(&["a"]).then_fails(error.clone()));
        let (status, body) = post(&fake, "/v1/generate/stream", r#"{"prompt":"a"}"#).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(data(&body)[1..], [error.to_json().to_string()]);
        let fake = Fake::with(Script::tokens(&["a"]).then_fails(error));
        assert_eq!(
            post(&fake, "/v1/generate", r#"{"prompt":"a"}"#).await.0,
            StatusCode::INTERNAL_SERVER_ERROR
        );
    }

    #[tokio::test]
    async fn wrong_fields_are_400_and_named() {
        let cases = [
            (r#"{"prompt":"a","maxTokens":1}"#, "maxTokens", "max_tokens"),
            (r#"{"prompt":"a","best_of":1}"#, "best_of", "known are: prompt"),
            (r#"{"prompt":"a","stop_tokens":[1]}"#, "stop_tokens", "stop_token_ids"),
            (r#"{"prompt":"a","top_k":-1}"#, "top_k", "found -1"),
            (r#"{"prompt":"a","response_format":{"type":"xml"}}"#, "response_format.type", "json_object"),
            (r#"{"max_tokens":1}"#, "prompt", "missing"),
            (r#"{"prompt":7}"#, "prompt", "expected a string, found 7"),
            (r#"{"prompt":"a","max_tokens":1.5}"#, "max_tokens", "whole number"),
            (r#"{"prompt":"a","max_tokens":-1}"#, "max_tokens", "found -1"),
            (r#"{"prompt":"a","max_tokens":0}"#, "max_tokens", "1 or more"),
            (r#"{"prompt":"a","temperature":"hot"}"#, "temperature", "number"),
            (r#"{"prompt":"a","top_p":2}"#, "top_p", "at most 1"),
            (r#"{"prompt":"a","stream":1}"#, "stream", "true or false"),
            (r#"{"prompt":"a","priority":1}"#, "priority", "\"normal\""),
        ];
        for (body, field, text) in cases {
            let (status, answer) = post(&Fake::with(Script::tokens(&["a"])), "/v1/generate", body).await;
            let answer: Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(
                (status, &answer["error"]["field"]),
                (StatusCode::BAD_REQUEST, &json!(field)),
                "{body}"
            );
            assert!(answer["error"]["message"].as_str().unwrap().contains(text), "{answer}");
        }
        for body in ["", "[1]", "{", "\u{feff}{}"] {
            let (status, answer) = post(&Fake::with(Script::tokens(&["a"])), "/v1/generate", body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
            assert!(answer.contains("invalid_request"), "{answer}");
        }
    }

    #[tokio::test]
    async fn a_body_beyond_the_bound_is_413_and_one_at_the_bound_is_read() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let frame = r#"{"prompt":""}"#.len();
        let body = |bytes: usize| format!(r#"{{"prompt":"{}"}}"#, "x".repeat(bytes - frame));
        assert_eq!(post(&fake, "/v1/generate", body(MAX_BODY_BYTES)).await.0, StatusCode::OK);
        assert_eq!(
            post(&fake, "/v1/generate", body(MAX_BODY_BYTES + 1)).await.0,
            StatusCode::PAYLOAD_TOO_LARGE
        );
    }

    #[tokio::test]
    async fn unknown_routes_and_methods_answer_in_json() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let (status, body) = post(&fake, "/v1/generat", "{}").await;
        assert_eq!((status, body.contains("/v1/generate")), (StatusCode::NOT_FOUND, true));
        let request = HttpRequest::get("/v1/generate").body(Body::empty()).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    }

    #[tokio::test]
    async fn models_are_listed_with_state_digest_and_device() {
        let fake = Fake::with(Script::tokens(&[]));
        let request = HttpRequest::get("/v1/models").body(Body::empty()).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        let body: Value =
            serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(body["object"], "list");
        let model = &body["data"][0];
        assert_eq!((&model["id"], &model["state"]), (&json!("fake"), &json!("ready")));
        assert_eq!((&model["digest"], &model["device"]), (&json!("d1"), &json!("cpu")));
    }

    #[tokio::test]
    async fn dropping_the_answer_cancels_the_work_for_a_stream_and_for_a_whole_answer() {
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
        let request = HttpRequest::post("/v1/generate/stream").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        assert_eq!(fake.running(), 1);
        drop(response);
        assert_eq!(fake.running(), 0);

        let request = HttpRequest::post("/v1/generate").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
        let pending = tokio::spawn(router(fake.api()).oneshot(request));
        fake.until_running(1).await;
        pending.abort();
        fake.until_running(0).await;
    }

    #[tokio::test]
    async fn a_client_that_goes_away_cancels_its_request_over_http1() {
        use tokio::io::AsyncWriteExt;
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
        let listener = crate::server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let server = tokio::spawn(crate::server::serve(listener, router(fake.api()), stop.clone()));
        for path in ["/v1/generate", "/v1/generate/stream"] {
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            let body = r#"{"prompt":"a"}"#;
            let head =
                format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            client.write_all(head.as_bytes()).await.unwrap();
            fake.until_running(1).await;
            drop(client);
            fake.until_running(0).await;
        }
        stop.cancel();
        server.await.unwrap();
    }
}
