//! The gateway beside other proxies, in one run and before the same mock pod.
//!
//! Each proxy is a process of its own on one core (`taskset`), with one worker. The mock pod and the callers
//! are this process. Measurements of the proxies alternate, so that other load on the machine affects all of
//! them. Columns: latency added at 1,000 and 5,000 requests per second, sent at fixed times; requests and
//! streamed tokens per second of the proxy's processor time; resident memory at 10,000 open streams.
//!
//! `e2e/bench/gateway.sh` gets the peers, builds the gateway and runs this. BENCH_GATEWAY, BENCH_ENVOY and
//! BENCH_NGINX are the programs; a peer without one is left out.
//!
//! Bounded: ROUNDS rounds of some seconds for each proxy and column.
#![allow(clippy::unwrap_used, reason = "an unexpected value ends the measurement")]

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::{MissedTickBehavior, interval};
use trustformers_gateway::disk::TableFile;
use trustformers_proto::control::v1 as wire;

const ROUNDS: usize = 3;
const SECONDS_PER_ROUND: u64 = 4;
const RATES: [u64; 2] = [1000, 5000];
/// Requests and streams in flight while throughput is measured.
const AT_ONCE: usize = 32;
const BURST: usize = 20_000;
const STREAMS: usize = 400;
const TOKENS_PER_STREAM: usize = 256;
const OPEN_STREAMS: usize = 10_000;
/// The gateway shares its bounds fairly between addresses of callers, and one may have half of each.
const CALLER_ADDRESSES: usize = 8;
const BODY: &str = r#"{"model": "a", "prompt": "What is the capital of France?", "max_tokens": 16}"#;
/// What the mock pod does, in a header that every proxy passes on.
const MODE: &str = "x-mock";
const TOKEN: &str = "data: {\"text\":\" Paris\",\"token\":7042}\n\n";

type CallerClient = Client<HttpConnector, Full<Bytes>>;
type AnswerBody = UnsyncBoxBody<Bytes, Infallible>;

/// A proxy, or none: the pod itself.
struct Proxy {
    name: &'static str,
    address: SocketAddr,
    process: Option<Child>,
    added: [Vec<Duration>; RATES.len()],
    requests_per_core_second: Vec<f64>,
    tokens_per_core_second: Vec<f64>,
    memory_mib: f64,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // It ends with this program; one that has ended already is no error.
            let _ended = process.kill();
            let _status = process.wait();
        }
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pod = listener.local_addr().unwrap();
        tokio::spawn(serve_pod(listener));
        let folder = tempfile::tempdir().unwrap();
        let mut targets = targets(pod, folder.path());
        for target in &targets {
            until_ready(target).await;
        }
        for round in 0..ROUNDS {
            for target in &mut targets {
                eprintln!("round {}: {}", round + 1, target.name);
                measure(target).await;
            }
        }
        for target in targets.iter_mut().filter(|target| target.process.is_some()) {
            target.memory_mib = memory_at_open_streams(target).await;
        }
        print(&targets);
    });
}

fn targets(pod: SocketAddr, folder: &Path) -> Vec<Proxy> {
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut all = vec![target("direct", pod, None)];
    let mut add = |name, variable: &str, command: &dyn Fn(&mut Command, SocketAddr)| {
        let Some(program) = std::env::var_os(variable).filter(|program| !program.is_empty()) else { return };
        let address = port();
        // The last core, which the mock pod and the callers share with nobody else as far as the system can.
        let core = std::thread::available_parallelism().map_or(0, |count| count.get() - 1);
        let mut taskset = Command::new("taskset");
        taskset.arg("--cpu-list").arg(core.to_string()).arg(program);
        command(&mut taskset, address);
        taskset.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        all.push(target(name, address, Some(taskset.spawn().unwrap())));
    };
    add("ours", "BENCH_GATEWAY", &|command, address| {
        let state = folder.join("ours");
        std::fs::create_dir_all(&state).unwrap();
        TableFile::in_folder(&state).unwrap().save(&table(pod).encode_to_vec()).unwrap();
        // The feed's address has no listener: the saved table serves.
        command.args(["--feed", "http://127.0.0.1:9", "--grpc-address", "127.0.0.1:0"]);
        command.arg("--state-dir").arg(&state).arg("--http-address").arg(address.to_string());
    });
    add("envoy", "BENCH_ENVOY", &|command, address| {
        let file = folder.join("envoy.yaml");
        std::fs::write(&file, envoy_config(address, pod)).unwrap();
        command.arg("-c").arg(&file).args(["--concurrency", "1", "--log-level", "error"]);
        command.args(["--base-id", &std::process::id().to_string()]);
    });
    add("nginx", "BENCH_NGINX", &|command, address| {
        let (file, prefix) = (folder.join("nginx.conf"), folder.join("nginx"));
        std::fs::create_dir_all(&prefix).unwrap();
        std::fs::write(&file, nginx_config(address, pod)).unwrap();
        command.arg("-c").arg(&file).arg("-p").arg(&prefix);
    });
    all
}

fn target(name: &'static str, address: SocketAddr, process: Option<Child>) -> Proxy {
    Proxy {
        name,
        address,
        process,
        added: Default::default(),
        requests_per_core_second: Vec::new(),
        tokens_per_core_second: Vec::new(),
        memory_mib: 0.0,
    }
}

fn table(pod: SocketAddr) -> wire::RouteTable {
    let endpoint = wire::Endpoint {
        pod_name: "mock".to_owned(),
        pod_uid: "mock".to_owned(),
        address: pod.ip().to_string(),
        http_port: u32::from(pod.port()),
        grpc_port: u32::from(pod.port()),
        ..Default::default()
    };
    let backend = wire::Backend {
        revision: "r1".to_owned(),
        weight: 1,
        endpoints: vec![endpoint],
        ..Default::default()
    };
    let route = wire::Route {
        name: "default/a".to_owned(),
        aliases: vec!["a".to_owned()],
        backends: vec![backend],
        policy: Some(wire::Policy::default()),
        ..Default::default()
    };
    wire::RouteTable { version: Some(wire::TableVersion { term: 1, counter: 1 }), routes: vec![route] }
}

/// HTTP/2 to the pod, as the gateway speaks, and bounds that the open streams do not reach.
fn envoy_config(listen: SocketAddr, pod: SocketAddr) -> String {
    format!(
        r#"static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: pod, timeout: 0s}}}}]}}
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: pod
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_connections: 65536, max_requests: 65536, max_pending_requests: 65536}}]}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{max_concurrent_streams: 100}}}}
    load_assignment:
      cluster_name: pod
      endpoints:
      - lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]
"#,
        listen.port(),
        pod.port()
    )
}

/// nginx speaks HTTP/1.1 to the pod: its only way to keep connections.
fn nginx_config(listen: SocketAddr, pod: SocketAddr) -> String {
    format!(
        "daemon off;\nworker_processes 1;\nworker_rlimit_nofile 65536;\npid nginx.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 65536; }}\n\
         http {{\n  access_log off;\n  upstream pod {{ server {pod}; keepalive 256; keepalive_requests 1000000; }}\n\
         server {{\n    listen {listen} reuseport;\n    keepalive_requests 1000000;\n    location / {{\n\
         proxy_pass http://pod;\n      proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n\
         proxy_buffering off;\n      proxy_read_timeout 600s;\n    }}\n  }}\n}}\n"
    )
}

/// The mock pod: answers at once, or streams tokens as fast as they are read, or opens a stream that never
/// ends.
async fn serve_pod(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _set = stream.set_nodelay(true);
        tokio::spawn(async move {
            let service = service_fn(async |request: Request<Incoming>| {
                let mode = request.headers().get(MODE).map(|mode| mode.as_bytes().to_vec());
                let _read = request.into_body().collect().await;
                Ok::<_, Infallible>(pod_answer(mode.as_deref()))
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn pod_answer(mode: Option<&[u8]>) -> Response<AnswerBody> {
    let token = || Ok::<_, Infallible>(Frame::data(Bytes::from_static(TOKEN.as_bytes())));
    let (kind, body) = match mode {
        Some(b"stream") => {
            let tokens = stream::repeat_with(token).take(TOKENS_PER_STREAM);
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(tokens)))
        }
        Some(_) => {
            let endless = stream::once(std::future::ready(token())).chain(stream::pending());
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(endless)))
        }
        None => {
            let answer = Full::new(Bytes::from_static(b"{\"text\": \"Paris\"}"));
            ("application/json", answer.boxed_unsync())
        }
    };
    Response::builder().header("content-type", kind).body(body).unwrap()
}

fn client(address: IpAddr) -> CallerClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_local_address(Some(address));
    Client::builder(TokioExecutor::new()).build(connector)
}

fn request(address: SocketAddr, mode: Option<&'static str>) -> Request<Full<Bytes>> {
    let mut request =
        Request::post(format!("http://{address}/v1/generate")).header("content-type", "application/json");
    if let Some(mode) = mode {
        request = request.header(MODE, mode);
    }
    request.body(Full::new(Bytes::from_static(BODY.as_bytes()))).unwrap()
}

async fn until_ready(target: &Proxy) {
    let caller = client(Ipv4Addr::LOCALHOST.into());
    for _ in 0..500 {
        let answer = caller.request(request(target.address, None)).await;
        if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{} does not answer at {}", target.name, target.address);
}

async fn measure(target: &mut Proxy) {
    let caller = client(Ipv4Addr::LOCALHOST.into());
    paced(&caller, target.address, RATES[0], RATES[0] as usize / 2).await;
    for (index, rate) in RATES.into_iter().enumerate() {
        let latencies = paced(&caller, target.address, rate, (rate * SECONDS_PER_ROUND) as usize).await;
        target.added[index].extend(latencies);
    }
    let Some(process) = &target.process else { return };
    let before = processor_time(process.id());
    let sent = stream::iter(0..BURST).map(|_| send_one(&caller, target.address));
    sent.buffer_unordered(AT_ONCE).for_each(|_| std::future::ready(())).await;
    let used = (processor_time(process.id()) - before).as_secs_f64();
    target.requests_per_core_second.push(BURST as f64 / used);
    let before = processor_time(process.id());
    let streams = stream::iter(0..STREAMS).map(|_| async {
        let answer = caller.request(request(target.address, Some("stream"))).await.unwrap();
        let read = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(read.len(), TOKENS_PER_STREAM * TOKEN.len());
    });
    streams.buffer_unordered(AT_ONCE).for_each(std::future::ready).await;
    let used = (processor_time(process.id()) - before).as_secs_f64();
    target.tokens_per_core_second.push((STREAMS * TOKENS_PER_STREAM) as f64 / used);
}

/// Sends requests at fixed times and returns the duration of each.
async fn paced(caller: &CallerClient, address: SocketAddr, rate: u64, count: usize) -> Vec<Duration> {
    let mut ticks = interval(Duration::from_nanos(1_000_000_000 / rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut sent = FuturesUnordered::new();
    for _ in 0..count {
        ticks.tick().await;
        let caller = caller.clone();
        sent.push(tokio::spawn(async move { send_one(&caller, address).await }));
    }
    let mut latencies = Vec::with_capacity(count);
    while let Some(latency) = sent.next().await {
        latencies.push(latency.unwrap());
    }
    latencies
}

async fn send_one(caller: &CallerClient, address: SocketAddr) -> Duration {
    let began = Instant::now();
    let response = caller.request(request(address, None)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    response.into_body().collect().await.unwrap();
    began.elapsed()
}

/// Resident memory while streams are open, each on a connection of its own as HTTP/1.1 callers have them.
async fn memory_at_open_streams(target: &Proxy) -> f64 {
    let head = format!(
        "POST /v1/generate HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{MODE}: open\r\n\
         content-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let open = stream::iter(0..OPEN_STREAMS).map(|index| {
        let head = head.as_bytes();
        async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let socket = TcpSocket::new_v4().unwrap();
            let last = u8::try_from(index % CALLER_ADDRESSES).unwrap() + 2;
            socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0))).unwrap();
            let mut stream = socket.connect(target.address).await.unwrap();
            stream.write_all(head).await.unwrap();
            let mut read = Vec::new();
            while !read.ends_with(b"\n\n") && !read.ends_with(b"\n\n\r\n") {
                assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "{} closed a stream", target.name);
            }
            assert!(read.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&read));
            stream
        }
    });
    let _streams: Vec<_> = open.buffer_unordered(64).collect().await;
    resident_mib(target.process.as_ref().unwrap().id())
}

/// The process and its children: nginx works in one.
fn family(process: u32) -> Vec<u32> {
    let mut family = vec![process];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if stat(id).is_some_and(|fields| fields[1].parse() == Ok(process)) {
            family.push(id);
        }
    }
    family
}

/// The fields of `/proc/ID/stat` behind the name.
fn stat(process: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}

/// User and system time of a process and its children. Linux counts it in 1/100 s.
fn processor_time(process: u32) -> Duration {
    let ticks = |id| {
        let fields = stat(id).unwrap_or_default();
        let field = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        field(11) + field(12)
    };
    Duration::from_millis(10 * family(process).into_iter().map(ticks).sum::<u64>())
}

fn resident_mib(process: u32) -> f64 {
    let resident = |id| {
        let text = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:").map(str::to_owned));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or(0.0)
    };
    family(process).into_iter().map(resident).sum::<f64>() / 1024.0
}

fn quantile(latencies: &[Duration], share: f64) -> f64 {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn print(targets: &[Proxy]) {
    let direct = &targets[0];
    println!(
        "| proxy | p50, p99 added at 1k/s (ms) | p50, p99 added at 5k/s (ms) | requests per core-second | \
         tokens per core-second | MiB at {OPEN_STREAMS} streams |\n|---|---|---|---|---|---|"
    );
    for target in &targets[1..] {
        let added = |index: usize, share| {
            quantile(&target.added[index], share) - quantile(&direct.added[index], share)
        };
        println!(
            "| {} | {:.3}, {:.3} | {:.3}, {:.3} | {:.0} | {:.0} | {:.0} |",
            target.name,
            added(0, 0.5),
            added(0, 0.99),
            added(1, 0.5),
            added(1, 0.99),
            mean(&target.requests_per_core_second),
            mean(&target.tokens_per_core_second),
            target.memory_mib
        );
    }
}
