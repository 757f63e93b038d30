//! One trace over two services: from a caller through a gateway and a server to the steps of the engine.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::needless_update, reason = "the messages of the feed grow")]

#[path = "../../telemetry/tests/collector/mod.rs"]
mod collector;
mod program;

use std::net::SocketAddr;

use clap::Parser;
use collector::{Arrived, Collector, Received};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use trustformers_gateway::disk::TableFile;
use trustformers_proto::control::v1::{Backend, Endpoint, Policy, Route, RouteTable, TableVersion};
use trustformers_serve::{Config, TracingConfig, TracingExporter, TrustformersServer};

/// The span of the caller's own request.
const CALLER_SPAN: &str = "b7ad6b7169203331";
const CALLER_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// A table with one route, to one pod at these addresses.
fn table(http: SocketAddr, grpc: SocketAddr) -> RouteTable {
    let endpoint = Endpoint {
        pod_name: "pod-1".to_owned(),
        pod_uid: "uid-1".to_owned(),
        address: http.ip().to_string(),
        http_port: http.port().into(),
        grpc_port: grpc.port().into(),
        ..Default::default()
    };
    let backend =
        Backend { revision: "r1".to_owned(), weight: 1, endpoints: vec![endpoint], ..Default::default() };
    let route = Route {
        name: "default/tiny".to_owned(),
        aliases: vec!["tiny".to_owned()],
        backends: vec![backend],
        policy: Some(Policy { retries: 1, ..Default::default() }),
        task: "generate".to_owned(),
        ..Default::default()
    };
    let version = Some(TableVersion { term: 1, counter: 1 });
    RouteTable { version, routes: vec![route], ..Default::default() }
}

async fn ask(address: SocketAddr, path: &str, flags: &str) -> String {
    let body = r#"{"model":"tiny","prompt":"Hello","max_tokens":3,"temperature":0}"#;
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\
         traceparent: 00-{CALLER_TRACE}-{CALLER_SPAN}-{flags}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The only part of a span that has this name.
fn part<'a>(arrived: &'a Arrived, parent: &Received, name: &str) -> &'a Received {
    let mut found = arrived.spans.iter().filter(|each| each.span.name == name && each.is_child_of(parent));
    let one = found.next().unwrap_or_else(|| panic!("no {name} in {parent:?}"));
    assert!(found.next().is_none(), "{name} is there twice");
    one
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_goes_from_the_caller_through_the_gateway_to_the_steps_of_the_engine() {
    let collector = Collector::start().await;
    let endpoint = format!("http://{}", collector.address);
    let folder = program::folder_of_models();
    let path = folder.path().join("tiny.gguf");
    let config = format!(
        "server: {{host: 127.0.0.1, port: 0, grpc_port: 0}}\nmodels: [{{name: tiny, path: {}}}]",
        path.display()
    );
    let mut server = TrustformersServer::new(config.parse::<Config>().unwrap());
    server
        .enable_tracing(TracingConfig {
            exporter: TracingExporter::Otlp(endpoint.clone()),
            jaeger_endpoint: String::new(),
            // The caller has decided; so it counts for both services.
            sampling_rate: 0.0,
            service_name: "the-pod".to_owned(),
        })
        .unwrap();
    let server = server.start().await.unwrap();
    server.until_ready().await;

    let state = folder.path().join("state");
    let encoded = table(server.http_address(), server.grpc_address()).encode_to_vec();
    TableFile::in_folder(&state).unwrap().save(&encoded).unwrap();
    let any = "127.0.0.1:0";
    let flags = ["trustformers-gateway", "--feed", "http://127.0.0.1:1", "--trace-sampling", "0"];
    let settings = trustformers_gateway::Settings::parse_from(flags.into_iter().map(str::to_owned).chain([
        format!("--state-dir={}", state.display()),
        format!("--http-address={any}"),
        format!("--grpc-address={any}"),
        format!("--trace-endpoint={endpoint}"),
        "--drain-timeout=1s".to_owned(),
    ]));
    let gateway = trustformers_gateway::start(settings).await.unwrap();

    let unsampled = ask(gateway.http_address(), "/v1/generate", "00").await;
    assert!(unsampled.starts_with("HTTP/1.1 200"), "{unsampled}");
    let answer = ask(gateway.http_address(), "/v1/generate/stream", "01").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("[DONE]"), "{answer}");
    gateway.finish().await;
    assert!(server.drain().await);

    let complete = |arrived: &Arrived| arrived.spans.len() >= 7;
    let arrived = collector.until(complete).await;
    assert!(arrived.spans.iter().all(|each| hex(&each.span.trace_id) == CALLER_TRACE));
    let front = arrived.named("generate_stream");
    assert_eq!(
        (front.service.as_str(), hex(&front.span.parent_span_id).as_str()),
        ("trustformers-gateway", CALLER_SPAN)
    );
    let attempt = part(&arrived, front, "attempt");
    assert_eq!(attempt.attribute("trustformers.pod").as_deref(), Some("pod-1"));
    let request = part(&arrived, attempt, "POST /v1/generate/stream");
    assert_eq!(request.service, "the-pod");
    for phase in ["prepare", "queue", "prefill", "decode"] {
        part(&arrived, request, phase);
    }
    let steps = part(&arrived, request, "prefill").span.events.len()
        + part(&arrived, request, "decode").span.events.len();
    assert_eq!(steps, 3, "one for the prompt, and one for each token but the first");
    assert_eq!(arrived.spans.len(), 7, "nothing of the request whose caller did not want it: {arrived:?}");
}
