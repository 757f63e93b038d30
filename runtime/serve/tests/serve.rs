//! `trustformers-serve` as users run it: the built program with a `config.yaml`, over HTTP, SSE and gRPC.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod program;

use std::process::Stdio;

use serde_json::Value;
use trustformers_serve::proto::{
    EmbedRequest, GenerateRequest, inference_service_client::InferenceServiceClient,
};

use program::{Server, body, program};

#[test]
fn it_serves_http_sse_grpc_and_metrics_and_ends_on_a_signal() {
    let mut server = Server::start("[{name: tiny, path: tiny.gguf, device: cpu, max_batch_size: 4}]");
    server.until_states(&[("tiny", "ready")]);
    let ask = r#"{"prompt":"Hello","max_tokens":4,"temperature":0}"#;
    let whole = server.post("/v1/generate", ask);
    assert!(whole.starts_with("HTTP/1.1 200"), "{whole}");
    let whole: Value = serde_json::from_str(whole.split("\r\n\r\n").nth(1).unwrap()).unwrap();

    let stream = server.post("/v1/generate/stream", ask);
    assert!(
        stream.contains("content-type: text/event-stream") && stream.contains("data: [DONE]"),
        "{stream}"
    );

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let mut client = InferenceServiceClient::connect(format!("http://{}", server.grpc)).await.unwrap();
        let request = GenerateRequest { prompt: "Hello".into(), max_tokens: 4, ..Default::default() };
        client.generate(request).await.unwrap().into_inner()
    });
    assert_eq!(answer.text, whole["text"].as_str().unwrap(), "both are greedy");

    for address in [&server.http, &server.grpc] {
        let page = server.get(address, "/metrics");
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("trustformers_build_info"), "{page}");
    }
    assert_eq!(server.end_with("-INT"), Some(0));
}

#[test]
fn one_process_serves_a_checkpoint_beside_a_gguf_file() {
    let mut server =
        Server::start("[{name: tiny, path: tiny.gguf}, {name: bert, path: bert, max_batch_size: 2}]");
    server.until_states(&[("tiny", "ready"), ("bert", "ready")]);
    // Neither request names a model: each task has exactly one.
    let answer = body(&server.post("/v1/embeddings", r#"{"input": ["hello", "", "the cat"]}"#));
    let data = answer["data"].as_array().unwrap();
    assert_eq!((data.len(), &answer["model"]), (3, &Value::from("bert")));
    assert_eq!(body(&server.post("/v1/generate", r#"{"prompt":"Hello","max_tokens":2}"#))["model"], "tiny");

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let embedded = runtime.block_on(async {
        let mut client = InferenceServiceClient::connect(format!("http://{}", server.grpc)).await.unwrap();
        let input = vec!["hello".into(), String::new(), "the cat".into()];
        client.embed(EmbedRequest { input, ..Default::default() }).await.unwrap().into_inner()
    });
    for (over_http, over_grpc) in data.iter().zip(&embedded.data) {
        let values: Vec<f32> = serde_json::from_value(over_http["embedding"].clone()).unwrap();
        assert_eq!(values, over_grpc.values);
    }
    let wrong = server.post("/v1/embeddings", r#"{"input": "a", "model": "tiny"}"#);
    assert!(wrong.starts_with("HTTP/1.1 400") && wrong.contains("/v1/generate"), "{wrong}");
    let wrong = server.post("/v1/generate", r#"{"prompt": "a", "model": "bert"}"#);
    assert!(wrong.starts_with("HTTP/1.1 400") && wrong.contains("/v1/embeddings"), "{wrong}");
    let page = server.get(&server.http, "/metrics");
    assert!(page.contains("trustformers_batch_texts_count{model=\"bert\"}"), "{page}");
    assert_eq!(server.end_with("-TERM"), Some(0));
}

#[test]
fn several_models_need_a_name_and_fail_independently() {
    let mut server =
        Server::start("[{name: a, path: tiny.gguf}, {name: b, path: tiny.gguf}, {name: c, path: none.gguf}]");
    server.until_states(&[("a", "ready"), ("b", "ready"), ("c", "failed")]);
    let unnamed = server.post("/v1/generate", r#"{"prompt":"Hello"}"#);
    assert!(
        unnamed.starts_with("HTTP/1.1 400") && unnamed.contains("a, b") && !unnamed.contains("a, b, c"),
        "{unnamed}"
    );
    for model in ["a", "b"] {
        let body = format!(r#"{{"prompt":"Hello","max_tokens":2,"model":"{model}"}}"#);
        let answer = server.post("/v1/generate", &body);
        assert!(answer.contains(&format!("\"model\":\"{model}\"")), "{answer}");
    }
    let failed = server.post("/v1/generate", r#"{"prompt":"Hello","model":"c"}"#);
    assert!(failed.starts_with("HTTP/1.1 503") && failed.contains("SourceNotFound"), "{failed}");
    assert_eq!(server.end_with("-TERM"), Some(0));
}

#[test]
fn a_missing_or_wrong_configuration_is_named_with_its_fix() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let output = program(folder.path()).stderr(Stdio::piped()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, message) = run();
    assert_eq!(code, Some(1));
    assert!(message.contains("config.yaml") && message.contains("--print-config-example"), "{message}");
    std::fs::write(folder.path().join("config.yaml"), "models: [{name: a, pth: /a}]").unwrap();
    let (_, message) = run();
    assert!(
        message.contains("config.yaml") && message.contains("models[0].pth") && message.contains("\"path\"")
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let config =
        format!("server: {{host: 127.0.0.1, port: {port}, grpc_port: 0}}\nmodels: [{{name: a, path: /a}}]");
    std::fs::write(folder.path().join("config.yaml"), config).unwrap();
    let (code, message) = run();
    assert_eq!(code, Some(1));
    assert!(message.contains(&format!("127.0.0.1:{port} for HTTP")), "{message}");
}
