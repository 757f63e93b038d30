//! Tests: whatever goes wrong on a surface is told in that surface's own words.

use axum::body::Body;
use axum::http::Request;
use tower::ServiceExt;
use trustformers_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use trustformers_proto::v1::inference_service_server::InferenceService;
use trustformers_proto::{Task, inference, v1};

use crate::error::tests::{Answered, assert_in_shape, every_kind};
use crate::error::{ApiError, GRPC_KIND_KEY};
use crate::fake::{Fake, Script};
use crate::surfaces::{Endpoint, HttpMethod, SURFACES};

/// A request that each surface accepts, by its name.
const REQUESTS: &[(&str, &str)] = &[
    ("generate", r#"{"prompt": "a"}"#),
    ("generate_stream", r#"{"prompt": "a"}"#),
    ("embeddings", r#"{"input": "a"}"#),
    ("classify", r#"{"input": "a"}"#),
    ("rerank", r#"{"query": "a", "documents": ["b"]}"#),
    ("chat_completions", r#"{"model": "fake", "messages": [{"role": "user", "content": "a"}]}"#),
    ("completions", r#"{"model": "fake", "prompt": "a"}"#),
    ("responses", r#"{"model": "fake", "input": "a"}"#),
    ("messages", r#"{"model": "fake", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}"#),
    ("count_tokens", r#"{"model": "fake", "messages": [{"role": "user", "content": "a"}]}"#),
    (
        "kserve_infer",
        r#"{"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}"#,
    ),
    ("kserve_generate", r#"{"text_input": "a"}"#),
    ("kserve_generate_stream", r#"{"text_input": "a"}"#),
];

/// The answer, without the id that it repeats in its body.
async fn send(script: Script, method: &str, path: &str, body: &'static str) -> Answered {
    let path = path.replace("{model}", "fake").replace("{version}", "r1");
    let request = Request::builder().method(method).uri(path).body(Body::from(body)).unwrap();
    let fake = Fake::with(script).with_task(Task::Generate);
    let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
    let mut answer = Answered::read(response).await;
    let id = answer.headers["x-request-id"].clone();
    if let Some(in_body) = answer.body.as_object_mut().unwrap().remove("request_id") {
        assert_eq!((in_body.as_str(), &answer.headers["request-id"]), (id.to_str().ok(), &id));
    }
    answer
}

#[tokio::test]
async fn every_kind_of_error_has_the_shape_of_every_route_that_asks_a_model() {
    for (error, ..) in every_kind() {
        for surface in SURFACES {
            let Endpoint::Http { method: HttpMethod::Post, path } = surface.endpoint else { continue };
            let request = REQUESTS.iter().find(|(name, _)| *name == surface.name);
            let Some((_, body)) = request else {
                assert!(surface.task.is_none(), "give {surface:?} a request in this test");
                continue;
            };
            let answer = send(Script::refused(error.clone()), "POST", path, body).await;
            assert_in_shape(&error, surface.errors, &answer);
            if !matches!(surface.name, "embeddings" | "classify" | "rerank" | "count_tokens") {
                let answer = send(Script::fails_before_a_token(error.clone()), "POST", path, body).await;
                assert_in_shape(&error, surface.errors, &answer);
            }
        }
    }
}

#[tokio::test]
async fn every_route_refuses_other_methods_in_its_own_shape() {
    for surface in SURFACES {
        let Some(path) = surface.http_path() else { continue };
        let asked = path.replace("{model}", "fake").replace("{version}", "r1");
        let error = ApiError::MethodNotAllowed { method: "DELETE".into(), path: asked };
        let answer = send(Script::default(), "DELETE", path, "").await;
        assert_in_shape(&error, surface.errors, &answer);
    }
}

/// A prompt as a tensor.
fn tensors() -> inference::ModelInferRequest {
    let contents =
        inference::InferTensorContents { bytes_contents: vec![b"a".to_vec()], ..Default::default() };
    let tensor = inference::model_infer_request::InferInputTensor {
        name: "text_input".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(contents),
        ..Default::default()
    };
    inference::ModelInferRequest { inputs: vec![tensor], ..Default::default() }
}

#[tokio::test]
async fn every_kind_of_error_is_a_status_with_its_kind_over_grpc() {
    for (error, _, code) in every_kind() {
        let api = Fake::with(Script::refused(error.clone())).with_task(Task::Generate).api();
        let asked = || tonic::Request::new(v1::GenerateRequest { prompt: "a".into(), ..Default::default() });
        let embed = v1::EmbedRequest { input: vec!["a".into()], ..Default::default() };
        let classify = v1::ClassifyRequest { input: vec!["a".into()], ..Default::default() };
        let rerank =
            v1::RerankRequest { query: "a".into(), documents: vec!["b".into()], ..Default::default() };
        let statuses = [
            InferenceService::generate(&api, asked()).await.err().unwrap(),
            InferenceService::generate_stream(&api, asked()).await.err().unwrap(),
            InferenceService::embed(&api, tonic::Request::new(embed)).await.err().unwrap(),
            InferenceService::classify(&api, tonic::Request::new(classify)).await.err().unwrap(),
            InferenceService::rerank(&api, tonic::Request::new(rerank)).await.err().unwrap(),
            GrpcInferenceService::model_infer(&api, tonic::Request::new(tensors())).await.err().unwrap(),
        ];
        for status in statuses {
            assert_eq!((status.code(), status.message()), (code, error.message().as_str()));
            assert_eq!(status.metadata().get(GRPC_KIND_KEY).unwrap(), error.kind());
        }
    }
}
