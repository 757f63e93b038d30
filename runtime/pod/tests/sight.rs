//! What can be seen of a process from outside: its liveness, its end, its figures, and its traces down to the
//! engine's steps.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../telemetry/tests/collector/mod.rs"]
mod collector;
mod gated;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use collector::Collector;
use gated::{Gate, Server, Setup, get, http, post, prompt, start};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tonic::transport::Channel;
use trustformers_proto::v1::ModelState;
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_runtime::faults::Faults;
use trustformers_runtime::metrics_compat::MetricsCompat;
use trustformers_runtime::process::{EndSignals, Sight};
use trustformers_telemetry::traces::{Destination, TraceOptions};

/// Far more than a probe takes on a busy machine.
const PROBES: Duration = Duration::from_secs(10);

/// A ready process.
async fn ready(setup: Setup) -> Server {
    let server = start(setup).await;
    server.until(ModelState::Ready).await;
    server
}

/// Waits until what is asked again and again is so; bounded by the test's own patience.
async fn until(mut is: impl AsyncFnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !is().await {
        assert!(Instant::now() < patience, "it never came");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_request_waits_as_long_as_a_fault_says() {
    let delay = Duration::from_millis(100);
    let server = ready(Setup { faults: Faults { delay }, ..Setup::default() }).await;
    let asked = Instant::now();
    let answer =
        http(server.http, &post("/v1/generate", r#"{"prompt":"Hello","max_tokens":1}"#)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(asked.elapsed() >= delay, "{:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_stands_still_with_work_is_not_alive_until_it_steps_again() {
    let stall = Duration::from_millis(300);
    let sight = Sight { engine_stall: stall, ..Sight::default() };
    let server = ready(Setup { sight, ..Setup::default() }).await;
    let (address, gate) = (server.http, server.gate.clone());
    let is_live = async || get(address, "/health/live").await.starts_with("HTTP/1.1 200");
    let begin = Instant::now();
    gate.allow(0);
    let asking =
        tokio::spawn(async move { http(address, &post("/v1/generate", r#"{"prompt":"Hello"}"#)).await });
    gate.until_blocked().await;
    until(async || !is_live().await).await;
    assert!(begin.elapsed() > stall, "not before its bound");
    assert!(begin.elapsed() < stall + PROBES, "{:?} is long behind its bound", begin.elapsed());
    let verdict = get(address, "/health/live").await;
    assert!(verdict.contains("the engine of m has work but made no step for"), "{verdict}");
    assert!(get(address, "/health/ready").await.starts_with("HTTP/1.1 200"), "readiness is another question");
    gate.allow(usize::MAX);
    assert!(asking.await.unwrap().unwrap().starts_with("HTTP/1.1 200"));
    until(is_live).await;
    assert!(server.process.drain().await);
}

/// A stream of 8 tokens; gives how many came, and whether its end did.
async fn stream(mut client: InferenceServiceClient<Channel>) -> (usize, bool) {
    let mut stream = client.generate_stream(prompt(8)).await.unwrap().into_inner();
    let (mut tokens, mut finished) = (0, false);
    while let Some(message) = stream.message().await.unwrap() {
        finished = message.finish_reason != 0;
        tokens += usize::from(!finished);
    }
    (tokens, finished)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_32_streams_and_refuses_newcomers_so_that_they_try_again() {
    let server = ready(Setup::default()).await;
    let (addresses, gate): ([SocketAddr; 2], Gate) =
        ([server.http, server.process.grpc_address()], server.gate.clone());
    let client = InferenceServiceClient::new(server.channel().await);
    let models = server.process.models().clone();
    gate.allow(3);
    let streams: Vec<_> = (0..32).map(|_| tokio::spawn(stream(client.clone()))).collect();
    until(async || models.inflight().count() == 32).await;
    let draining = tokio::spawn(server.process.drain());
    // A refused connection is what a caller may always try elsewhere.
    for address in addresses {
        until(async || TcpStream::connect(address).await.is_err()).await;
    }
    let newcomer = Channel::from_shared(format!("http://{}", addresses[1])).unwrap().connect_lazy();
    let refused = InferenceServiceClient::new(newcomer).generate(prompt(1)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
    assert!(!draining.is_finished());
    gate.allow(usize::MAX);
    for stream in streams {
        let (tokens, finished) = stream.await.unwrap();
        assert!(finished && (1..=8).contains(&tokens), "{tokens} tokens, finished: {finished}");
    }
    assert!(draining.await.unwrap(), "everything was answered");
}

#[tokio::test]
async fn the_second_signal_ends_a_drain_at_once() {
    let signals = EndSignals::new().unwrap();
    let send = |signal: &str| {
        let own = std::process::id().to_string();
        assert!(std::process::Command::new("kill").args([signal, &own]).status().unwrap().success());
    };
    let (started, drain_started) = oneshot::channel();
    let drain = async move {
        started.send(()).unwrap();
        std::future::pending::<bool>().await
    };
    let ending = tokio::spawn(signals.drain_on_the_first(drain));
    send("-TERM");
    drain_started.await.unwrap();
    assert!(!ending.is_finished());
    send("-INT");
    ending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_of_vllm_stand_beside_the_own_ones_only_where_they_are_asked_for() {
    for (metrics_compat, shown) in [(None, false), (Some(MetricsCompat::Vllm), true)] {
        let sight = Sight { metrics_compat, ..Sight::default() };
        let server = ready(Setup { sight, ..Setup::default() }).await;
        let ask = post("/v1/generate", r#"{"prompt":"Hello","max_tokens":3,"temperature":0}"#);
        assert!(http(server.http, &ask).await.unwrap().starts_with("HTTP/1.1 200"));
        // The engine counts a request down after it has sent the end of the answer.
        let mut page = String::new();
        until(async || {
            page = get(server.http, "/metrics").await;
            page.contains("trustformers_requests_running{model=\"m\"} 0")
        })
        .await;
        for own in ["trustformers_request_seconds_count{model=\"m\"} 1", "trustformers_kv_blocks_used{"] {
            assert!(page.contains(own), "{own} is not in {page}");
        }
        for gauge in ["num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"] {
            let line = format!("vllm:{gauge}{{model_name=\"m\"}} 0");
            assert_eq!(page.lines().any(|each| each == line), shown, "{line} {page}");
        }
        assert!(server.process.drain().await);
    }
}

/// The span of the caller's own request.
const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_from_the_caller_to_the_steps_of_the_engine() {
    let collector = Collector::start().await;
    let traces = TraceOptions {
        model_attributes: true,
        ..TraceOptions::new("pod", Destination::OtlpGrpc(format!("http://{}", collector.address)))
    };
    let sight = Sight { traces: Some(traces), ..Sight::default() };
    let server = ready(Setup { sight, ..Setup::default() }).await;
    let body = r#"{"prompt":"Hello marker","max_tokens":4,"temperature":0}"#;
    let ask = format!(
        "POST /v1/generate/stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntraceparent: {CALLER}\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert!(http(server.http, &ask).await.unwrap().contains("[DONE]"));
    let mut client = InferenceServiceClient::new(server.channel().await);
    client.generate(prompt(2)).await.unwrap();
    assert!(server.process.drain().await);
    let ends = |arrived: &collector::Arrived| {
        arrived.spans.iter().filter(|each| each.span.name == "decode").count() == 2
            && arrived.spans.iter().any(|each| each.span.name.ends_with("InferenceService/Generate"))
    };
    let arrived = collector.until(ends).await;
    let request = arrived.named("POST /v1/generate/stream");
    let hex: String = request.span.parent_span_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(CALLER.contains(&hex), "the caller's span is the parent: {hex}");
    let parts: Vec<_> = arrived.spans.iter().filter(|each| each.is_child_of(request)).collect();
    let mut phases: Vec<_> = parts.iter().map(|each| each.span.name.as_str()).collect();
    phases.sort_unstable();
    assert_eq!(phases, ["decode", "prefill", "prepare", "queue"]);
    let part = |name: &str| parts.iter().find(|each| each.span.name == name).unwrap();
    let steps = |name: &str| part(name).span.events.iter().filter(|event| event.name == "step").count();
    // The prompt is one step, and the last token is never computed.
    assert_eq!((steps("prefill"), steps("decode")), (1, 3));
    assert_eq!(part("decode").attribute("trustformers.outcome").as_deref(), Some("length"));
    assert!(part("queue").span.end_time_unix_nano <= part("prefill").span.end_time_unix_nano);
    for (key, value) in [
        ("gen_ai.request.max_tokens", "4"),
        ("gen_ai.response.model", "m"),
        ("gen_ai.usage.output_tokens", "4"),
    ] {
        assert_eq!(request.attribute(key).as_deref(), Some(value), "{key}");
    }
    let grpc = arrived.named("trustformers.v1.InferenceService/Generate");
    assert!(arrived.spans.iter().any(|each| each.span.name == "decode" && each.is_child_of(grpc)));
    assert!(!format!("{arrived:?}").contains("marker"), "no span has a text of a request");
}
