//! Every surface through the gateway, before pods with the real codecs.

use std::io::Write;
use std::net::SocketAddr;

use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use prost::Message;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::codec::CompressionEncoding;
use trustformers_api::surfaces::{Endpoint, Kind, ModelPlace, SURFACES};
use trustformers_proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use trustformers_proto::inference::{ModelMetadataRequest, ModelReadyRequest, ServerReadyRequest};
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_proto::v1::session_request::Action;
use trustformers_proto::v1::{
    ClassifyRequest, EmbedRequest, GenerateRequest, GenerateResponse, RerankRequest, SessionRequest,
};

use crate::operator::TableBuilder;
use crate::{Scene, client, json, post, scripted, soon, until};

/// A gateway before a pod that generates and one that embeds, and the first one's address.
async fn scene() -> (Scene, SocketAddr) {
    let words = scripted::start(&["default/words", "words"], "generate").await;
    let vectors = scripted::start(&["default/vectors", "vectors"], "embed").await;
    let table = TableBuilder::new(1, 1).route("words").task("generate").backend("r1", 1, &[words]);
    let table = table.route("vectors").task("embed").backend("r1", 1, &[vectors]);
    (Scene::with_table(table).await, words)
}

/// An answer without what differs from time to time.
#[derive(Debug, PartialEq)]
struct Answered {
    status: StatusCode,
    content_type: Option<HeaderValue>,
    body: Vec<u8>,
}

async fn ask(address: SocketAddr, method: Method, path: &str, body: String) -> (Answered, HeaderMap) {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{address}{path}"))
        .header(CONTENT_TYPE, "application/json")
        .body(Full::from(body))
        .unwrap();
    let response = soon("an answer", client(false).request(request)).await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    let body = soon("its end", response.into_body().collect()).await.unwrap().to_bytes().to_vec();
    let content_type = headers.get(CONTENT_TYPE).cloned();
    (Answered { status, content_type, body }, headers)
}

/// A request that each row accepts.
fn accepted(name: &str, model: &str) -> String {
    let body = match name {
        "generate" | "generate_stream" | "completions" => serde_json::json!({"model": model, "prompt": "Hi"}),
        "embeddings" | "classify" => serde_json::json!({"model": model, "input": "Hi"}),
        "rerank" => serde_json::json!({"model": model, "query": "Hi", "documents": ["a", "b"]}),
        "responses" => serde_json::json!({"model": model, "input": "Hi"}),
        "kserve_infer" => serde_json::json!({"inputs": [
            {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}
        ]}),
        "kserve_generate" | "kserve_generate_stream" => serde_json::json!({"text_input": "Hi"}),
        _ => {
            let messages = serde_json::json!([{"role": "user", "content": "Hi"}]);
            let mut body = serde_json::json!({"model": model, "messages": messages});
            if name == "messages" {
                body["max_tokens"] = 9.into();
            }
            body
        }
    };
    body.to_string()
}

/// What the gateway answers itself, or refuses because the operator decides.
fn is_local(surface: &str) -> bool {
    ["get_model", "load_model", "unload_model", "swap_model", "rollback_model"].contains(&surface)
}

#[tokio::test]
async fn every_http_row_that_a_pod_answers_passes_as_the_pod_answers_it() {
    let (scene, words) = scene().await;
    let mut asked = 0;
    for surface in SURFACES {
        let Endpoint::Http { method, path } = surface.endpoint else { continue };
        let forwarded = surface.model != ModelPlace::Nowhere && surface.kind != Kind::Upgrade;
        if !forwarded || is_local(surface.name) {
            continue;
        }
        let model = if surface.name == "embeddings" { "vectors" } else { "default/words" };
        let path = path.replace("{model}", model).replace("{version}", "r1");
        let method: Method = method.as_str().parse().unwrap();
        let body = if method == Method::POST { accepted(surface.name, model) } else { String::new() };
        let (through, headers) = ask(scene.http(), method.clone(), &path, body.clone()).await;
        assert_eq!(through.status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&through.body));
        assert!(!headers.contains_key("x-trustformers-end"), "{path}");
        if surface.name != "embeddings" {
            let (direct, _) = ask(words, method, &path, body).await;
            assert_eq!(
                (direct.status, &direct.content_type),
                (through.status, &through.content_type),
                "{path}"
            );
            assert_eq!(shape(&direct.body), shape(&through.body), "{path}");
        }
        asked += 1;
    }
    assert!(asked > 20, "{asked}");
}

/// The names of a JSON answer, or the number of lines of a stream.
fn shape(body: &[u8]) -> Result<Vec<String>, usize> {
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(object)) => Ok(object.keys().cloned().collect()),
        _ => Err(body.split(|byte| *byte == b'\n').count()),
    }
}

#[tokio::test]
async fn refusals_of_the_gateway_have_the_words_of_the_surface() {
    let (scene, _) = scene().await;
    for (path, place) in [
        ("/v1/generate", "/error/type"),
        ("/v1/chat/completions", "/error/code"),
        ("/v1/messages", "/error/type"),
        ("/v2/models/other/infer", "/error"),
    ] {
        let body = r#"{"model": "other"}"#.to_owned();
        let (answered, _) = ask(scene.http(), Method::POST, path, body).await;
        assert_eq!(answered.status, StatusCode::NOT_FOUND, "{path}");
        let body: Value = serde_json::from_slice(&answered.body).unwrap();
        assert!(body.pointer(place).unwrap().is_string(), "{path}: {body}");
    }
    let (answered, _) = ask(scene.http(), Method::GET, "/v2/models/stats", String::new()).await;
    assert_eq!(answered.status, StatusCode::NOT_FOUND);
    for path in ["/v2", "/v2/health/ready", "/v2/health/live", "/openapi.json"] {
        let (answered, _) = ask(scene.http(), Method::GET, path, String::new()).await;
        assert_eq!(answered.status, StatusCode::OK, "{path}");
    }
    let (index, _) = ask(scene.http(), Method::POST, "/v2/repository/index", "{}".to_owned()).await;
    let index: Value = serde_json::from_slice(&index.body).unwrap();
    assert_eq!(index.as_array().map(Vec::len), Some(2), "{index}");
}

#[tokio::test]
async fn a_compressed_body_is_routed_and_reaches_the_pod_as_it_is() {
    let (scene, _) = scene().await;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(br#"{"prompt": "Hi", "model": "words"}"#).unwrap();
    let mut request = post(scene.http(), "/v1/generate", encoder.finish().unwrap());
    request.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let response = soon("an answer", scene.client.request(request)).await.unwrap();
    let (status, body) = crate::text(response).await;
    assert_eq!((status, &json(&body)["text"]), (StatusCode::OK, &"tokens".into()));
}

#[tokio::test]
async fn grpc_calls_of_both_protocols_pass_compressed_or_not() {
    let (scene, _) = scene().await;
    let plain = InferenceServiceClient::connect(scene.grpc()).await.unwrap();
    let compressed = plain.clone().send_compressed(CompressionEncoding::Gzip);
    let compressed = compressed.accept_compressed(CompressionEncoding::Gzip);
    for mut caller in [plain, compressed] {
        let request = GenerateRequest { model: "words".into(), prompt: "Hi".into(), ..Default::default() };
        assert_eq!(caller.generate(request.clone()).await.unwrap().into_inner().text, "tokens");
        let pieces = caller.generate_stream(request).await.unwrap().into_inner().collect::<Vec<_>>().await;
        assert_eq!(pieces.len(), 3);
        let request = EmbedRequest { input: vec!["Hi".into()], ..Default::default() };
        assert_eq!(caller.embed(request).await.unwrap().into_inner().data.len(), 1);
        let request =
            ClassifyRequest { model: "words".into(), input: vec!["Hi".into()], ..Default::default() };
        let classified = caller.classify(request).await.unwrap().into_inner();
        assert_eq!(classified.results[0].scores[0].label, "yes");
        let request = RerankRequest {
            model: "words".into(),
            query: "Hi".into(),
            documents: vec!["a".into(), "b".into()],
            ..Default::default()
        };
        assert_eq!(caller.rerank(request).await.unwrap().into_inner().results.len(), 2);
    }
    let mut kserve = GrpcInferenceServiceClient::connect(scene.grpc()).await.unwrap();
    let request = ModelMetadataRequest { name: "words".into(), version: String::new() };
    assert_eq!(kserve.model_metadata(request).await.unwrap().into_inner().name, "default/words");
    assert!(kserve.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let request = ModelMetadataRequest { name: "other".into(), version: String::new() };
    assert_eq!(kserve.model_metadata(request).await.unwrap_err().code(), Code::NotFound);
}

fn started(id: &str, model: &str) -> SessionRequest {
    let request = GenerateRequest { model: model.into(), prompt: "Hi".into(), ..Default::default() };
    SessionRequest { request_id: id.into(), action: Some(Action::Generate(request)) }
}

#[tokio::test]
async fn a_session_goes_where_its_first_message_says_also_when_the_caller_waits_for_the_head() {
    let (scene, _) = scene().await;
    let mut caller = InferenceServiceClient::connect(scene.grpc()).await.unwrap();
    for first_at_once in [true, false] {
        // Two messages of each session.
        let (sender, messages) = mpsc::channel(2);
        if first_at_once {
            sender.send(started("one", "words")).await.unwrap();
        }
        let answers = soon("the head", caller.session(ReceiverStream::new(messages))).await.unwrap();
        let mut answers = answers.into_inner();
        if !first_at_once {
            sender.send(started("one", "words")).await.unwrap();
        }
        for id in ["one", "two"] {
            for _ in 0..3 {
                let answer = soon("a message", answers.message()).await.unwrap().unwrap();
                assert_eq!(answer.request_id, id);
            }
            if id == "one" {
                sender.send(started("two", "words")).await.unwrap();
            }
        }
        drop(sender);
        assert!(soon("the end", answers.message()).await.unwrap().is_none());
    }
    // Two sessions, and two requests of each.
    let attempts = r#"trustformers_gateway_attempts_total{outcome="ok",revision="r1",route="default/words"}"#;
    until("all to be counted", || async { scene.metric(attempts).await > 5.5 }).await;
    assert!((scene.metric(attempts).await - 6.0).abs() < 1e-9);
    let unknown = futures::stream::iter([started("one", "other")]);
    let status = soon("a status", caller.session(unknown)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let (sender, messages) = mpsc::channel(1);
    let mut late =
        soon("the head", caller.session(ReceiverStream::new(messages))).await.unwrap().into_inner();
    sender.send(started("one", "other")).await.unwrap();
    assert_eq!(soon("a status", late.message()).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_model_that_there_is_not_is_not_ready() {
    let (scene, _) = scene().await;
    let mut triton = GrpcInferenceServiceClient::connect(scene.grpc()).await.unwrap();
    for (name, expected) in [("words", true), ("missing", false)] {
        let request = ModelReadyRequest { name: name.into(), ..Default::default() };
        let ready = soon("an answer", triton.model_ready(request)).await.unwrap().into_inner().ready;
        assert_eq!(ready, expected, "{name}");
    }
    let request = ModelMetadataRequest { name: "missing".into(), ..Default::default() };
    assert_eq!(triton.model_metadata(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn grpc_web_passes_over_http1() {
    let (scene, _) = scene().await;
    let request = GenerateRequest { model: "words".into(), prompt: "Hi".into(), ..Default::default() };
    let message = request.encode_to_vec();
    let framed = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat();
    let mut request = post(scene.http(), "/trustformers.v1.InferenceService/Generate", framed);
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc-web+proto"));
    request.headers_mut().insert(ORIGIN, HeaderValue::from_static("https://page.example"));
    let response = soon("an answer", scene.client.request(request)).await.unwrap();
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    let body = soon("its end", response.into_body().collect()).await.unwrap().to_bytes();
    let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
    let answer = GenerateResponse::decode(&body[5..5 + length]).unwrap();
    assert_eq!(answer.text, "tokens");
    assert!(body[5 + length..].windows(13).any(|part| part == b"grpc-status:0"), "{body:?}");
    let preflight = Request::builder()
        .method(Method::OPTIONS)
        .uri(format!("http://{}/v1/generate", scene.http()))
        .header(ORIGIN, "https://page.example")
        .header("access-control-request-method", "POST")
        .body(Full::default())
        .unwrap();
    let response = soon("an answer", scene.client.request(preflight)).await.unwrap();
    assert!(response.headers().contains_key("access-control-allow-methods"), "{response:?}");
}

#[tokio::test]
async fn feedback_counts_once_for_an_answer() {
    let (scene, _) = scene().await;
    let answer = scene.request("words").await;
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    crate::text(answer).await;
    let scored =
        "trustformers_gateway_feedback_total{metric=\"score\",revision=\"r1\",route=\"default/words\"}";
    let send = async |id: &str| {
        let body = serde_json::json!({"request_id": id, "score": 0.5}).to_string();
        let response = scene.client.request(post(scene.http(), "/v1/feedback", body)).await.unwrap();
        crate::text(response).await
    };
    until("the answer to be remembered", || async { send(&id).await.0 == StatusCode::OK }).await;
    assert_eq!(json(&send(&id).await.1)["counted"], false);
    assert!((scene.metric(scored).await - 1.0).abs() < 1e-9);
    let (status, body) = send("another").await;
    assert_eq!((status, &json(&body)["error"]["type"]), (StatusCode::NOT_FOUND, &"unknown_request".into()));
}
