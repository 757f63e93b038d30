//! `POST /v1/generate` and `POST /v1/generate/stream`.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use tokio::time::Instant;
use trustformers_proto::v1;

use crate::conversation::Prompt;
use crate::error::ApiError;
use crate::fields::{Asked, Generation, HTTP_DEFAULTS};
use crate::inference::{Answer, Event, Logprobs};
use crate::json_body::{float, found, object, take};
use crate::options::{OPTION_FIELDS, Options};
use crate::sse_frames::{Frame, SseBody};
use crate::{Api, priority, request_body};

/// Every field of a generate request.
pub(crate) fn generate_fields() -> Vec<&'static str> {
    let own = ["prompt", "max_tokens", "temperature", "top_p", "model", "stream", "seed", "priority"];
    own.into_iter().chain(OPTION_FIELDS.iter().copied()).collect()
}

pub(crate) async fn generate(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (checked, stream) = read(&api, request).await?;
    if stream { answer_in_stream(&api, checked).await } else { answer_whole(&api, checked).await }
}

pub(crate) async fn generate_stream(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (checked, _) = read(&api, request).await?;
    answer_in_stream(&api, checked).await
}

async fn answer_whole(api: &Api, request: Generation) -> Result<Response, ApiError> {
    let started = Instant::now();
    let answer = api.inference.generate(request).await?;
    let headers = answer.head_headers();
    let Answer { id, model, model_digest, revision, mut events, .. } = answer;
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
                if !revision.is_empty() {
                    body["revision"] = json!(revision);
                }
                if let Some(stop) = stopped_by {
                    body["stopped_by"] = stop.to_json();
                }
                if !logprobs.is_empty() {
                    body["logprobs"] = logprobs.into();
                }
                return Ok((headers, Json(body)).into_response());
            }
        }
    }
    Err(ApiError::ended_early())
}

async fn answer_in_stream(api: &Api, request: Generation) -> Result<Response, ApiError> {
    let started = Instant::now();
    let mut answer = api.inference.generate(request).await?.wait_for_first().await?;
    let headers = answer.head_headers();
    let events = std::mem::replace(&mut answer.events, futures::stream::empty().boxed());
    Ok((headers, SseBody::new(frames(events, answer, started))).into_response())
}

/// Server-sent events of one answer. After an error nothing follows, `[DONE]` included, so that a client
/// which waits for it knows that the text is not complete.
fn frames(
    events: BoxStream<'static, Result<Event, ApiError>>,
    head: Answer,
    started: Instant,
) -> impl Stream<Item = Frame> {
    events.flat_map(move |event| {
        let frames = match event {
            Ok(Event::Token { id, text, logprobs }) => {
                let mut token = json!({"text": text, "token": id});
                if let Some(logprobs) = logprobs {
                    token["logprobs"] = logprobs.to_json();
                }
                vec![Frame::json(&token)]
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
                if !head.revision.is_empty() {
                    last["revision"] = json!(head.revision);
                }
                if let Some(stop) = stopped_by {
                    last["stopped_by"] = stop.to_json();
                }
                vec![Frame::json(&last), Frame::done()]
            }
            Err(error) => vec![Frame::json(&error.to_json())],
        };
        futures::stream::iter(frames)
    })
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

/// The requested generation, and whether its answer is a stream.
async fn read(api: &Api, request: Request) -> Result<(Generation, bool), ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let (asked, stream) = api.parse(bytes, parse).await?;
    Ok((asked.with_headers(&head.headers)?.check(&HTTP_DEFAULTS)?, stream))
}

fn parse(bytes: &[u8]) -> Result<(Asked, bool), ApiError> {
    let object = object(bytes, &generate_fields(), r#"{"prompt": "Hello", "max_tokens": 32}"#)?;
    let asked = Asked {
        prompt: prompt(object.get("prompt"))?,
        model: take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?,
        revision: None,
        max_tokens: take(&object, "max_tokens", "a whole number from 1 to 4294967295", |value| {
            value.as_u64().and_then(|count| u32::try_from(count).ok())
        })?,
        temperature: take(&object, "temperature", "a number", float)?,
        top_p: take(&object, "top_p", "a number", float)?,
        seed: take(&object, "seed", "a whole number from 0 to 18446744073709551615", Value::as_u64)?,
        priority: priority::of_json(&object)?,
        tenant: String::new(),
        options: Options::from_json(&object, bytes)?,
    };
    let stream = take(&object, "stream", "true or false", Value::as_bool)?.unwrap_or(false);
    Ok((asked, stream))
}

/// A text, or the ids of its tokens.
fn prompt(value: Option<&Value>) -> Result<Prompt, ApiError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let read = match value {
        None | Some(Value::Null) => {
            let why = "is missing: give the text that the model is to continue";
            return Err(ApiError::field("prompt", why));
        }
        Some(Value::String(text)) => Some(Prompt::Text(text.clone())),
        Some(Value::Array(ids)) => ids.iter().map(id).collect::<Option<_>>().map(Prompt::Tokens),
        Some(_) => None,
    };
    read.ok_or_else(|| {
        let found = value.map(found).unwrap_or_default();
        ApiError::field("prompt", format!("expected a string or a list of token ids, found {found}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::{MAX_BODY_BYTES, StoppedBy, tenant};
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn post(fake: &Fake, path: &str, body: impl Into<Body>) -> (StatusCode, String) {
        let request = HttpRequest::post(path).body(body.into()).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
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
    async fn options_reach_the_server_and_their_results_come_back() {
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
    async fn the_priority_field_overrides_the_header() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let ask = async |body: &'static str, class: &str| {
            let request = HttpRequest::post("/v1/generate")
                .header(priority::PRIORITY_HEADER, class)
                .header(tenant::TENANT_HEADER, "team-1")
                .body(Body::from(body))
                .unwrap();
            crate::http::router(fake.api()).oneshot(request).await.unwrap().status()
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
    async fn overload_is_429_with_retry_after_even_for_a_stream() {
        let refused = || ApiError::Overloaded { message: "full".into(), retry_after_s: 2 };
        for script in [Script::refused(refused()), Script::fails_before_a_token(refused())] {
            let request =
                HttpRequest::post("/v1/generate/stream").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
            let response = crate::http::router(Fake::with(script).api()).oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()["retry-after"], "2");
        }
    }

    #[tokio::test]
    async fn a_failure_after_the_first_token_ends_the_stream() {
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
            (r#"{"prompt":7}"#, "prompt", "expected a string or a list of token ids, found 7"),
            (r#"{"prompt":[1,-2]}"#, "prompt", "found [1,-2]"),
            (r#"{"prompt":[]}"#, "prompt", "is empty"),
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
    async fn dropping_an_answer_cancels_its_work() {
        let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
        let request = HttpRequest::post("/v1/generate/stream").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        assert_eq!(fake.running(), 1);
        drop(response);
        assert_eq!(fake.running(), 0);

        let request = HttpRequest::post("/v1/generate").body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
        let pending = tokio::spawn(crate::http::router(fake.api()).oneshot(request));
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
        let server = tokio::spawn(crate::server::serve(
            listener,
            crate::http::router(fake.api()),
            crate::server::Limits::default(),
            stop.clone(),
        ));
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

    #[tokio::test]
    async fn long_names_come_back_cut_and_cost_nothing() {
        let long = "k".repeat(3 << 20);
        for (body, status) in [
            (json!({long.as_str(): 1, "prompt": "a"}), StatusCode::BAD_REQUEST),
            (json!({"prompt": "a", "response_format": {"type": long}}), StatusCode::BAD_REQUEST),
            (
                json!({"prompt": "a", "response_format": {"type": "text", long.as_str(): 1}}),
                StatusCode::BAD_REQUEST,
            ),
            (json!({"prompt": "a", "priority": long}), StatusCode::BAD_REQUEST),
            (json!({"prompt": "a", "max_tokens": long}), StatusCode::BAD_REQUEST),
        ] {
            let began = std::time::Instant::now();
            let (found, answer) =
                post(&Fake::with(Script::tokens(&["a"])), "/v1/generate", body.to_string()).await;
            assert_eq!(found, status);
            assert!(answer.len() < 2000, "{} bytes", answer.len());
            // An edit distance over 3 MiB takes seconds.
            assert!(began.elapsed().as_millis() < 1000, "{:?}", began.elapsed());
        }
    }

    #[tokio::test]
    async fn a_schema_reaches_the_server_with_every_digit() {
        for format in [
            r#"{"type":"json_schema","schema":{"const": 123456789012345678901234567890}}"#,
            r#"{"type":"json_schema","json_schema":{"name":"x","schema":{"const": 123456789012345678901234567890}}}"#,
        ] {
            let fake = Fake::with(Script::tokens(&["a"]));
            let body = format!(r#"{{"prompt":"a","response_format":{format}}}"#);
            assert_eq!(post(&fake, "/v1/generate", body).await.0, StatusCode::OK);
            let schema = r#"{"const": 123456789012345678901234567890}"#.to_owned();
            assert_eq!(fake.last_request().options.format, Some(crate::Format::JsonSchema(schema)));
        }
    }
}
