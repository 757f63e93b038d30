//! Every HTTP route: the first line of an input is the method and the path, the rest is the body.

use crate::scripted::api;
use crate::{KIB, MIB, TIME, fuzz, split_line};
use axum::body::Body;
use axum::http::{Method, Request};
use http_body_util::BodyExt;
use tower::ServiceExt;
use trustformers_fuzz::Bounds;

/// Parsed JSON takes up to 100 bytes for two of the body (`1,`), twice: as a value and as fields. The routes
/// themselves take less than a MiB.
const BOUNDS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 16 * MIB, time: TIME };

/// A refusal repeats at most some hundred characters of the request, whatever its size.
const MAX_REFUSAL_BYTES: usize = 4 * KIB;

const WORDS: [&str; 48] = [
    "\"prompt\":",
    "\"max_tokens\":",
    "\"temperature\":",
    "\"top_p\":",
    "\"top_k\":",
    "\"min_p\":",
    "\"typical_p\":",
    "\"repetition_penalty\":",
    "\"presence_penalty\":",
    "\"frequency_penalty\":",
    "\"logit_bias\":",
    "\"logprobs\":",
    "\"seed\":",
    "\"stop\":",
    "\"stop_token_ids\":",
    "\"response_format\":",
    "\"type\":",
    "\"json_schema\"",
    "\"regex\"",
    "\"lark\"",
    "\"schema\":",
    "\"model\":",
    "\"priority\":",
    "\"stream\":",
    "\"input\":",
    "\"encoding_format\":",
    "\"dimensions\":",
    "\"truncate\":",
    "\"user\":",
    "null",
    "true",
    "1e400",
    "-1e400",
    "18446744073709551616",
    "{",
    "[",
    "\\ud800",
    "\\u0000",
    "POST ",
    "/v1/",
    "/v2/models/",
    "\"inputs\":",
    "\"shape\":",
    "\"datatype\":",
    "\"data\":",
    "\"parameters\":",
    "\"text_input\":",
    "\"binary_data_size\":",
];

#[test]
fn http() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let router = trustformers_api::http::router(api());
    fuzz("http", &WORDS, BOUNDS, |input| {
        let (line, body) = split_line(input);
        let (method, path) = line.split_once(' ').unwrap_or(("POST", line));
        let method = Method::from_bytes(method.as_bytes()).unwrap_or(Method::POST);
        let request = Request::builder().method(method).uri(path).body(Body::from(body.to_vec()));
        let Ok(request) = request else { return "not a request".to_owned() };
        runtime.block_on(async {
            let response = router.clone().oneshot(request).await.unwrap();
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert!(status.is_success() || body.len() < MAX_REFUSAL_BYTES, "{} bytes of refusal", body.len());
            assert_ne!(status.as_u16(), 500, "{}", String::from_utf8_lossy(&body));
            format!("{} {}", status.canonical_reason().unwrap_or_default(), String::from_utf8_lossy(&body))
        })
    });
}
