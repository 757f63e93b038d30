//! The whole process over real connections: status while loading and after failing, models that come and
//! go, and the drain.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod gated;

use std::time::Duration;

use gated::{Server, Setup, UNGATED, get, http, post, prompt, start};
use tokio::net::TcpStream;
use trustformers_api::{ApiError, Generation, Inference};
use trustformers_model::seeded::SeededModel;
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{
    GenerateRequest, GenerateStreamResponse, ModelState, UnloadModelRequest, WatchModelsRequest,
};
use trustformers_runtime::control::ModelControl;
use trustformers_runtime::process::Drain;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_follows_the_warm_up_and_metrics_name_the_model() {
    let server = start(Setup::default()).await;
    server.until(ModelState::Ready).await;
    assert!(get(server.http, "/health/ready").await.starts_with("HTTP/1.1 200"));
    assert!(get(server.http, "/health/startup").await.starts_with("HTTP/1.1 200"));
    let answer =
        http(server.http, &post("/v1/generate", r#"{"prompt":"Hello","max_tokens":3}"#)).await.unwrap();
    // A sampled answer may end before its limit.
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"completion_tokens\":"), "{answer}");
    let metrics = get(server.http, "/metrics").await;
    for series in [
        "trustformers_requests_total{model=\"m\"",
        "trustformers_model_load_seconds{model=\"m\",phase=\"warm_up\"}",
    ] {
        assert!(metrics.contains(series), "{series} is not in {metrics}");
    }
    assert!(server.process.drain().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn liveness_fails_while_every_step_fails() {
    let server = start(Setup::default()).await;
    server.until(ModelState::Ready).await;
    let ask =
        || async { http(server.http, &post("/v1/generate", r#"{"prompt":"Hello","max_tokens":1}"#)).await };
    server.gate.fail(true);
    for failed in 1..=3 {
        let answer = ask().await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("pulled the plug"), "{answer}");
        let live = get(server.http, "/health/live").await;
        let expected = if failed < 3 { "HTTP/1.1 200" } else { "HTTP/1.1 503" };
        assert!(live.starts_with(expected), "{failed} {live}");
    }
    assert!(get(server.http, "/health/live").await.contains("the last 3 steps of the engine of m failed"));
    server.gate.fail(false);
    assert!(ask().await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(get(server.http, "/health/live").await.starts_with("HTTP/1.1 200"));
    assert!(server.process.drain().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_warms_up_is_alive_and_not_ready() {
    let server = start(Setup::default()).await;
    server.gate.allow(0);
    server.until(ModelState::Warming).await;
    assert!(get(server.http, "/health/live").await.starts_with("HTTP/1.1 200"));
    let ready = get(server.http, "/health/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("model m is warming"), "{ready}");
    let refused = http(server.http, &post("/v1/generate", r#"{"prompt":"a"}"#)).await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("retry-after: 1"), "{refused}");
    server.gate.allow(usize::MAX);
    server.until(ModelState::Ready).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_fails_to_load_shows_its_cause_everywhere() {
    let wrong = Some("0".repeat(64));
    let cases = [
        (Setup { sha256: wrong, ..Setup::default() }, "DigestMismatch"),
        (Setup { bytes: b"no model".to_vec(), ..Setup::default() }, "MalformedModel"),
    ];
    for (setup, reason) in cases {
        let server = start(setup).await;
        let mut client = ModelServiceClient::new(server.channel().await);
        let mut watch = client.watch_models(WatchModelsRequest {}).await.unwrap().into_inner();
        let status = loop {
            let status = watch.message().await.unwrap().unwrap().models.remove(0);
            if status.state() == ModelState::Failed {
                break status;
            }
        };
        assert_eq!(status.reason, reason);
        let ready = get(server.http, "/health/ready").await;
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains(reason), "{ready}");
        assert!(get(server.http, "/v1/models").await.contains(&format!("\"reason\":\"{reason}\"")));
        assert!(get(server.http, "/health/live").await.starts_with("HTTP/1.1 200"));
        let refused =
            InferenceServiceClient::new(server.channel().await).generate(prompt(1)).await.unwrap_err();
        assert!(
            refused.code() == tonic::Code::Unavailable && refused.message().contains(reason),
            "{refused:?}"
        );
        assert!(server.process.drain().await, "a watch does not hold up the end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_streams_and_serves_until_it_is_quiet() {
    let drain = Drain { quiet: Duration::from_millis(500), timeout: Duration::from_secs(60) };
    let server = start(Setup { drain, ..Setup::default() }).await;
    server.until(ModelState::Ready).await;
    let mut client = InferenceServiceClient::new(server.channel().await);
    server.gate.allow(3);
    let mut stream = client.generate_stream(prompt(40)).await.unwrap().into_inner();
    let (gate, address, models) = (server.gate.clone(), server.http, server.process.models().clone());
    let draining = tokio::spawn(server.process.drain());
    models.statuses().watch_readiness().wait_for(|verdict| !verdict.ok).await.unwrap();
    assert!(get(address, "/health/ready").await.starts_with("HTTP/1.1 503"));
    assert!(get(address, "/health/live").await.starts_with("HTTP/1.1 200"));
    let newcomer = tokio::spawn(async move {
        http(address, &post("/v1/generate", r#"{"prompt":"Hello","max_tokens":2}"#)).await
    });
    gate.allow(usize::MAX);
    let mut tokens = 0;
    let mut reason = 0;
    while let Some(message) = stream.message().await.unwrap() {
        reason = message.finish_reason;
        tokens += usize::from(reason == 0);
    }
    assert!(tokens > 3 && reason != 0, "{tokens} tokens, finish reason {reason}");
    assert!(newcomer.await.unwrap().unwrap().starts_with("HTTP/1.1 200"));
    assert!(draining.await.unwrap(), "everything was answered");
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_refuses_before_it_reads_what_is_asked() {
    let server = start(Setup { max_queue: Some(1), ..Setup::default() }).await;
    server.until(ModelState::Ready).await;
    server.gate.allow(0);
    let address = server.http;
    let asked = |more: &str| post("/v1/generate", &format!(r#"{{"prompt":"Hello","max_tokens":2{more}}}"#));
    let admitted = [0, 1].map(|_| {
        let request = asked("");
        tokio::spawn(async move { http(address, &request).await.unwrap() })
    });
    let models = server.process.models().clone();
    while !models.is_full() {
        tokio::task::yield_now().await;
    }
    // A route would find the mistake.
    let refused = http(address, &asked(r#","top_p":7"#)).await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
    let looked_at = http(address, &asked(r#","top_p":7,"priority":"high""#)).await.unwrap();
    assert!(looked_at.starts_with("HTTP/1.1 400"), "{looked_at}");
    let metrics = get(address, "/metrics").await;
    let is_count =
        |line: &str| line.starts_with("trustformers_requests_total{") && line.contains("overloaded");
    let counted = metrics.lines().find(|line| is_count(line)).unwrap();
    assert!(counted.ends_with(" 1"), "{counted}");
    server.gate.allow(usize::MAX);
    for answer in admitted {
        assert!(answer.await.unwrap().starts_with("HTTP/1.1 200"));
    }
    assert!(server.process.drain().await);
}

/// A server whose drain has no time at all, and a stream of it that is stuck after its first token.
async fn stuck() -> (Server, tonic::Streaming<GenerateStreamResponse>) {
    let drain = Drain { quiet: Duration::ZERO, timeout: Duration::ZERO };
    let server = start(Setup { drain, ..Setup::default() }).await;
    server.until(ModelState::Ready).await;
    server.gate.allow(1);
    let mut client = InferenceServiceClient::new(server.channel().await);
    let mut stream = client.generate_stream(prompt(40)).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().finish_reason, 0);
    server.gate.until_blocked().await;
    (server, stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_fail_when_the_drain_times_out() {
    let (server, mut stream) = stuck().await;
    let (gate, models) = (server.gate.clone(), server.process.models().clone());
    let draining = tokio::spawn(server.process.drain());
    let request = Generation {
        prompt: "Hello".into(),
        model: None,
        revision: None,
        max_tokens: 1,
        temperature: 0.0,
        top_p: 1.0,
        seed: None,
        priority: trustformers_api::Priority::Normal,
        tenant: String::new(),
        options: trustformers_api::Options::default(),
        left_out: trustformers_api::LeftOut::default(),
    };
    // The engine refuses once it was stopped; only then the step that hangs may end.
    while !matches!(models.generate(request.clone()).await, Err(ApiError::Unavailable { .. })) {
        tokio::task::yield_now().await;
    }
    gate.allow(usize::MAX);
    let status = loop {
        match stream.message().await {
            Ok(message) => assert_eq!(message.unwrap().finish_reason, 0, "it did not finish"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    assert!(!draining.await.unwrap(), "not everything was answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_hangs_does_not_keep_the_process_from_ending() {
    let (server, mut stream) = stuck().await;
    let gate = server.gate.clone();
    assert!(!server.process.drain().await, "not everything was answered");
    assert!(stream.message().await.is_err(), "the connection was cut");
    gate.allow(usize::MAX);
}

fn ask(model: &str) -> String {
    post("/v1/generate", &format!(r#"{{"model":"{model}","prompt":"Hello","max_tokens":2}}"#))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_loaded_and_unloaded_while_it_is_asked() {
    let server = start(Setup::default()).await;
    server.until(ModelState::Ready).await;
    let address = server.http;
    let path = server.another("b", "b.gguf", &SeededModel::default().gguf()).source;
    let path = path.path().unwrap().display().to_string();
    let load = |name: &str, path: &str| {
        let body = serde_json::json!({"name": name, "path": path, "context_tokens": 64});
        let request = post("/v1/models/load", &body.to_string());
        async move { http(address, &request).await.unwrap() }
    };
    let loaded = load("b", &path).await;
    assert!(loaded.starts_with("HTTP/1.1 200") && loaded.contains("\"context_tokens\":64"), "{loaded}");
    assert!(http(address, &ask("b")).await.unwrap().starts_with("HTTP/1.1 200"));
    for (name, path, status, says) in [
        ("b", path.as_str(), "400", "name of another model"),
        ("c", "/none.gguf", "400", "(SourceNotFound)"),
        ("c", "hf://org/name", "400", "hf://"),
    ] {
        let refused = load(name, path).await;
        assert!(refused.starts_with(&format!("HTTP/1.1 {status}")) && refused.contains(says), "{refused}");
    }
    assert_eq!(server.names(), ["m", "b"], "a load that failed leaves nothing behind");

    server.gate.allow(1);
    let mut client = InferenceServiceClient::new(server.channel().await);
    let request = GenerateRequest { model: "b".into(), ..prompt(40) };
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    let unload = post("/v1/models/unload", r#"{"model":"b"}"#);
    let unloading = tokio::spawn(async move { http(address, &unload).await.unwrap() });
    server.until_named("b", ModelState::Draining).await;
    let refused = http(address, &ask("b")).await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 404") && refused.contains("\"choices\":[\"m\"]"), "{refused}");
    assert!(get(address, "/health/ready").await.starts_with("HTTP/1.1 200"), "the other one serves");
    assert!(!unloading.is_finished(), "a stream is in flight");
    server.gate.allow(usize::MAX);
    while let Some(message) = stream.message().await.unwrap() {
        assert!(message.finish_reason != 0 || message.usage.is_none());
    }
    let unloaded = unloading.await.unwrap();
    assert!(
        unloaded.starts_with("HTTP/1.1 200") && unloaded.contains("\"state\":\"unloaded\""),
        "{unloaded}"
    );
    assert_eq!(server.names(), ["m"]);
    assert!(!get(address, "/metrics").await.contains("load_seconds{model=\"b\""));
    let again = http(address, &post("/v1/models/unload", r#"{"model":"b"}"#)).await.unwrap();
    assert!(again.starts_with("HTTP/1.1 404"), "{again}");
    assert!(http(address, &ask("m")).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(server.process.drain().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_takes_over_while_the_old_model_answers_what_it_began() {
    let server = start(Setup::default()).await;
    let old = server.until(ModelState::Ready).await;
    let models = server.process.models().clone();
    let broken =
        models.replace(server.another("m", "broken.gguf", b"no model")).await.unwrap_err().to_string();
    assert!(broken.contains("(MalformedModel)"), "{broken}");
    let still = server.until(ModelState::Ready).await;
    assert_eq!(still.slots[0], old.slots[0], "a model that cannot be loaded replaces nothing");
    assert_eq!(
        (still.slots[1].state(), still.slots[1].reason.as_str()),
        (ModelState::Failed, "MalformedModel")
    );

    server.gate.allow(1);
    let mut client = InferenceServiceClient::new(server.channel().await);
    let mut stream = client.generate_stream(prompt(40)).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().finish_reason, 0);
    server.gate.until_blocked().await;
    let new = SeededModel { seed: 7, ..SeededModel::default() };
    models.replace(server.another("m", UNGATED, &new.gguf())).await.unwrap();
    let status = server.until(ModelState::Ready).await;
    assert_ne!(status.digest, old.digest);
    let answer = client.generate(prompt(1)).await.unwrap().into_inner();
    assert_eq!(answer.model_digest, status.digest);
    server.gate.allow(usize::MAX);
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = Some(message);
    }
    assert_eq!(last.unwrap().model_digest, old.digest, "what the old one began, it finished");
    assert_eq!(server.names(), ["m"]);
    assert!(server.process.drain().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_the_operator_and_a_server_that_is_told_so_refuse_with_the_reason() {
    for (model_control, reason) in
        [(ModelControl::Operator, "InferenceModel"), (ModelControl::Disabled, "server.model_control")]
    {
        let server = start(Setup { model_control, ..Setup::default() }).await;
        server.until(ModelState::Ready).await;
        for (path, body) in
            [("/v1/models/load", r#"{"name":"b","path":"/b"}"#), ("/v1/models/unload", r#"{"model":"m"}"#)]
        {
            let refused = http(server.http, &post(path, body)).await.unwrap();
            assert!(refused.starts_with("HTTP/1.1 403") && refused.contains(reason), "{refused}");
        }
        let mut client = ModelServiceClient::new(server.channel().await);
        let status = client
            .unload_model(UnloadModelRequest { model: "m".into(), ..Default::default() })
            .await
            .unwrap_err();
        assert!(
            status.code() == tonic::Code::PermissionDenied && status.message().contains(reason),
            "{status:?}"
        );
        assert_eq!(server.names(), ["m"]);
    }
}
