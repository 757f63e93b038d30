//! Protobuf bodies of every gRPC method: the first line of an input is the path, the rest is the message.

use crate::scripted::api;
use crate::{KIB, MIB, TIME, fuzz, split_line};
use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use tower::ServiceExt;
use trustformers_fuzz::Bounds;

/// An empty message within a list takes two bytes of the body and up to some hundred in memory.
const BOUNDS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 16 * MIB, time: TIME };

/// A refusal repeats at most some hundred characters of the request, whatever its size.
const MAX_MESSAGE_BYTES: usize = 4 * KIB;

const WORDS: [&str; 16] = [
    "/trustformers.v1.InferenceService/Generate\n",
    "/trustformers.v1.InferenceService/GenerateStream\n",
    "/trustformers.v1.InferenceService/Embed\n",
    "/trustformers.v1.InferenceService/Classify\n",
    "/trustformers.v1.InferenceService/Rerank\n",
    "/trustformers.v1.ModelService/ListModels\n",
    "/inference.GRPCInferenceService/ModelInfer\n",
    "/inference.GRPCInferenceService/ModelStreamInfer\n",
    "/grpc.health.v1.Health/Check\n",
    "\u{a}",
    "\u{12}",
    "\u{1a}",
    "\u{22}",
    "\u{2a}",
    "\u{32}",
    "\u{3a}",
];

#[test]
fn grpc() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let router = trustformers_api::grpc::router(api()).unwrap();
    fuzz("grpc", &WORDS, BOUNDS, |input| {
        let (path, message) = split_line(input);
        // A frame: not compressed, its length in four bytes, the message.
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        let frame = [&[0][..], &length, message].concat();
        let request = Request::builder().method("POST").uri(path).header("content-type", "application/grpc");
        let Ok(request) = request.body(Body::from(frame)) else { return "not a request".to_owned() };
        runtime.block_on(async {
            let response = router.clone().oneshot(request).await.unwrap();
            let head = response.headers().clone();
            let body = response.into_body().collect().await;
            let trailers = body.as_ref().ok().and_then(|body| body.trailers().cloned()).unwrap_or_default();
            let field = |name: &str| {
                let value = head.get(name).or_else(|| trailers.get(name));
                value.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
            };
            let message = field("grpc-message");
            assert!(message.len() < MAX_MESSAGE_BYTES, "{} bytes of refusal", message.len());
            format!("status {} {message}", words(&field("grpc-status")))
        })
    });
}

/// Outcomes are compared without digits, so a code becomes letters.
fn words(code: &str) -> String {
    code.bytes().map(|digit| char::from(digit.wrapping_add(b'a' - b'0'))).collect()
}
