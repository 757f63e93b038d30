//! The latency that the gateway adds: the same load is sent directly to a trivial server and through the
//! gateway.
//!
//! Three threads: callers, the gateway, the server. The gateway runs on a single thread, so it uses one core.
//! Rounds alternate between direct and through, so that other load on the machine affects both equally.
//! Requests are sent at fixed times, whether or not earlier ones have been answered. The output also has the
//! processor time of the gateway's thread, which other programs affect least.
//!
//! Bounded: ROUNDS rounds of REQUESTS requests at RATE per second, twice, then one burst at full speed.
#![allow(clippy::unwrap_used, reason = "an unexpected value ends the measurement")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval};
use trustformers_gateway::{Settings, disk::TableFile, start};
use trustformers_proto::control::v1 as wire;

const RATE: u64 = 1000;
const ROUNDS: usize = 5;
const REQUESTS: usize = 4000;
const BURST: usize = 50_000;
const BURST_AT_ONCE: usize = 32;
const BODY: &str = r#"{"model": "a", "prompt": "What is the capital of France?", "max_tokens": 16}"#;

type HttpClient = Client<HttpConnector, Full<Bytes>>;

fn main() {
    let (at, server) = oneshot::channel();
    on_own_thread("server", async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        at.send(listener.local_addr().unwrap()).unwrap();
        answer_all(listener).await;
    });
    let server = server.blocking_recv().unwrap();
    let state = tempfile::tempdir().unwrap();
    TableFile::in_folder(state.path()).unwrap().save(&table(server).encode_to_vec()).unwrap();
    let folder = state.path().to_str().unwrap().to_owned();
    let (at, gateway) = oneshot::channel();
    // One query at a time: the sender waits for the result.
    let (queries, mut receiver) = tokio::sync::mpsc::channel::<oneshot::Sender<Duration>>(1);
    on_own_thread("gateway", async move {
        // The feed's address has no listener: the saved table serves.
        let flags = ["gateway", "--feed", "http://127.0.0.1:9", "--state-dir", &folder];
        let ports = ["--http-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0"];
        let running = start(Settings::parse_from(flags.iter().chain(&ports))).await.unwrap();
        at.send(running.http_address()).unwrap();
        while let Some(query) = receiver.recv().await {
            query.send(processor_time()).unwrap();
        }
    });
    let gateway = gateway.blocking_recv().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure(server, gateway, async || {
        let (answer, used) = oneshot::channel();
        queries.send(answer).await.unwrap();
        used.await.unwrap()
    }));
}

fn on_own_thread(name: &str, work: impl Future<Output = ()> + Send + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || runtime.block_on(work)).unwrap();
}

/// Processor time of the calling thread.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

async fn answer_all(listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let service = service_fn(async |request: Request<Incoming>| {
                let _read = request.into_body().collect().await;
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"{\"text\": \"Paris\"}"))))
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn table(server: SocketAddr) -> wire::RouteTable {
    let endpoint = |index: u32| wire::Endpoint {
        pod_name: format!("pod-{index}"),
        pod_uid: format!("uid-{index}"),
        restart_count: 0,
        address: server.ip().to_string(),
        http_port: u32::from(server.port()),
        grpc_port: u32::from(server.port()),
        ..wire::Endpoint::default()
    };
    let backend = wire::Backend {
        revision: "r1".to_owned(),
        digest: String::new(),
        weight: 1,
        endpoints: (0..4).map(endpoint).collect(),
        ..wire::Backend::default()
    };
    let route = wire::Route {
        name: "default/a".to_owned(),
        aliases: vec!["a".to_owned()],
        backends: vec![backend],
        policy: Some(wire::Policy { first_byte_timeout_ms: 60_000, retries: 1, ..wire::Policy::default() }),
        task: "generate".to_owned(),
        ..wire::Route::default()
    };
    wire::RouteTable { version: Some(wire::TableVersion { term: 1, counter: 1 }), routes: vec![route] }
}

async fn measure(server: SocketAddr, gateway: SocketAddr, used: impl AsyncFn() -> Duration) {
    let caller: HttpClient = Client::builder(TokioExecutor::new()).build_http();
    for address in [server, gateway] {
        paced(&caller, address, 500).await;
    }
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    let mut gateway_time = Duration::ZERO;
    for round in 1..=ROUNDS {
        let one = paced(&caller, server, REQUESTS).await;
        let before = used().await;
        let two = paced(&caller, gateway, REQUESTS).await;
        gateway_time += used().await - before;
        print_line(&format!("round {round}: direct"), &one);
        print_line(&format!("round {round}: through"), &two);
        direct.extend(one);
        through.extend(two);
    }
    print_line("all: direct", &direct);
    print_line("all: through", &through);
    for (name, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
        let (one, two) = (quantile(&direct, share), quantile(&through, share));
        let ratio = two.as_secs_f64() / one.as_secs_f64();
        println!(
            "added at {name}: {:.3} ms (ratio {ratio:.2})",
            (two.as_secs_f64() - one.as_secs_f64()) * 1e3
        );
    }
    let per_request = gateway_time / u32::try_from(ROUNDS * REQUESTS).unwrap();
    println!("processor time of the gateway: {per_request:?} per request at {RATE} per second");
    let before = used().await;
    let (rate_direct, _) = burst(&caller, server).await;
    let (rate_through, latencies) = burst(&caller, gateway).await;
    let per_request = (used().await - before) / u32::try_from(BURST).unwrap();
    println!("full speed, {BURST_AT_ONCE} at once: {rate_direct:.0}/s direct, {rate_through:.0}/s through");
    println!("processor time of the gateway: {per_request:?} per request at full speed");
    print_line("full speed: through", &latencies);
}

/// Sends requests at fixed times and returns the duration of each.
async fn paced(caller: &HttpClient, address: SocketAddr, count: usize) -> Vec<Duration> {
    let mut ticks = interval(Duration::from_micros(1_000_000 / RATE));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut tasks = Vec::with_capacity(count);
    for _ in 0..count {
        ticks.tick().await;
        let caller = caller.clone();
        tasks.push(tokio::spawn(async move { send_one(&caller, address).await }));
    }
    let mut latencies = Vec::with_capacity(count);
    for task in tasks {
        latencies.push(task.await.unwrap());
    }
    latencies
}

async fn burst(caller: &HttpClient, address: SocketAddr) -> (f64, Vec<Duration>) {
    let began = Instant::now();
    let latencies: Vec<Duration> = futures::stream::iter(0..BURST)
        .map(|_| send_one(caller, address))
        .buffer_unordered(BURST_AT_ONCE)
        .collect()
        .await;
    (BURST as f64 / began.elapsed().as_secs_f64(), latencies)
}

async fn send_one(caller: &HttpClient, address: SocketAddr) -> Duration {
    let request = Request::post(format!("http://{address}/v1/generate"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from_static(BODY.as_bytes())))
        .unwrap();
    let began = Instant::now();
    let response = caller.request(request).await.unwrap();
    assert_eq!(response.status(), http::StatusCode::OK);
    response.into_body().collect().await.unwrap();
    began.elapsed()
}

fn quantile(latencies: &[Duration], share: f64) -> Duration {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

fn print_line(name: &str, latencies: &[Duration]) {
    let ms = |share| quantile(latencies, share).as_secs_f64() * 1e3;
    println!(
        "{name:28} p50 {:.3} ms, p90 {:.3} ms, p99 {:.3} ms, longest {:.1} ms",
        ms(0.5),
        ms(0.9),
        ms(0.99),
        ms(1.0)
    );
}
