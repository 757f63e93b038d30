//! Creates many models for a leader of the operator and prints what each of them cost.
//!
//! `cargo run --profile ci -p trustformers-operator --example thousand -- --models 1000 --silent-s 60`
//!
//! The tasks of a leader run as in a cluster, over HTTP on a loopback port, against an API server in the
//! memory of this process. Its threads have another name, so that processor time is counted apart. It needs
//! no cluster and is what a profiler is pointed at; `make bench-operator` measures on a real API server, with
//! TLS.

mod api_server;
mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::Parser;
use prometheus::Registry;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use trustformers_control::build::{GatewayService, Platform};
use trustformers_control::names;
use trustformers_operator::context::{Context, Settings};
use trustformers_operator::metrics::Metrics;
use trustformers_operator::{leader, requests};

use api_server::LoopbackServer;

/// Names of the threads; the kernel keeps 15 bytes.
const OPERATOR_THREAD: &str = "operator";
const SERVER_THREAD: &str = "api-server";
/// Models of one namespace.
const PER_NAMESPACE: usize = 500;
/// The last changes are made when no request has come for so long.
const QUIET: Duration = Duration::from_secs(2);
/// A leader that never comes to rest is measured all the same.
const QUIET_LIMIT: Duration = Duration::from_secs(30);
/// Linux counts the processor time of threads in hundredths of a second.
const TICKS_PER_S: f64 = 100.0;

/// What to measure.
#[derive(Debug, Parser)]
struct Arguments {
    /// Number of models.
    #[arg(long, default_value_t = 1000)]
    models: usize,
    /// Models a second; 0: all at once.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Seconds to look at while nothing happens.
    #[arg(long, default_value_t = 0)]
    silent_s: u64,
    /// Longest time until all models are ready, in seconds.
    #[arg(long, default_value_t = 600)]
    limit_s: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let server = LoopbackServer::new();
    cluster::add_node(&server);
    let servers = runtime(SERVER_THREAD, 2)?;
    let listener = servers.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    let router = server.router();
    servers.spawn(async move { axum::serve(listener, router).await });

    let operators = runtime(OPERATOR_THREAD, 1)?;
    // One message in all: the caches are filled.
    let (leads, led) = mpsc::sync_channel(1);
    // The thread that waits for the lead belongs to the operator too.
    std::thread::Builder::new().name(OPERATOR_THREAD.to_owned()).spawn(move || {
        let ended = operators.block_on(lead(&address.to_string(), leads));
        eprintln!("the lead ended: {ended:?}");
    })?;
    led.recv()?;
    let before = Spent::now(&server);
    let began = Instant::now();
    let all_ready = servers.block_on(async {
        timeout(Duration::from_secs(arguments.limit_s), async {
            create(&server, &arguments).await;
            server.until_ready(arguments.models).await;
        })
        .await
    });
    if all_ready.is_err() {
        return Err(format!("{} of {} models are ready", server.ready_models(), arguments.models).into());
    }
    let after = Spent::now(&server);
    report(&before, &after, arguments.models, began.elapsed());
    if arguments.silent_s > 0 {
        // One that never comes to rest is no error.
        let _rest = servers.block_on(async { timeout(QUIET_LIMIT, until_quiet(&server)).await });
        let before = Spent::now(&server);
        servers.block_on(async { sleep(Duration::from_secs(arguments.silent_s)).await });
        let after = Spent::now(&server);
        let minutes = Duration::from_secs(arguments.silent_s).as_secs_f64() / 60.0;
        println!("silent: {:.2} CPU s a minute", (after.operator_s - before.operator_s) / minutes);
        println!("silent: {:.1} requests a minute", (after.total() - before.total()) as f64 / minutes);
    }
    Ok(())
}

fn runtime(thread: &str, workers: usize) -> std::io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(workers).thread_name(thread).enable_all().build()
}

/// Leads without end. Says when the caches are filled.
async fn lead(address: &str, leads: mpsc::SyncSender<()>) -> Result<(), Box<dyn Error + Send + Sync>> {
    let config = kube::Config::new(format!("http://{address}").parse()?);
    let clients = requests::clients(config)?;
    let new = Context::create(clients.objects, settings(), Metrics::new(&Registry::new())?);
    let (leaderships, mut led) = watch::channel(None);
    tokio::spawn(async move {
        if led.wait_for(Option::is_some).await.is_ok() {
            // The other end waits until it has this.
            let _ = leads.send(());
        }
        // The sender needs a receiver as long as it leads.
        std::future::pending::<()>().await;
    });
    leader::lead(1, new, leaderships).await;
    Ok(())
}

fn settings() -> Settings {
    Settings {
        namespace: "trustformers-system".to_owned(),
        pod_name: None,
        gateway_url: "http://gateway:8080".to_owned(),
        platform: Platform {
            runtime_image: "localhost/trustformers-runtime:v0".to_owned(),
            namespace: "trustformers-system".to_owned(),
            gateway: GatewayService {
                name: "trustformers-gateway".to_owned(),
                http_port: 8080,
                grpc_port: 9090,
            },
            optional_kinds: BTreeSet::new(),
            pull_policy: "IfNotPresent".to_owned(),
            admin: None,
        },
        concurrency: 16,
        identity: None,
        admin_port: names::ADMIN_PORT,
        grpc_port: names::GRPC_PORT,
    }
}

async fn create(server: &LoopbackServer, arguments: &Arguments) {
    let pause = Duration::from_secs(1).checked_div(arguments.rate).unwrap_or_default();
    for number in 0..arguments.models {
        let namespace = format!("bench-{}", number / PER_NAMESPACE);
        server.put(
            "inferencemodels",
            json!({"apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel",
                "metadata": {"name": format!("m{number:05}"), "namespace": namespace},
                "spec": {"source": {"uri": "oci://localhost/bench:1"}}}),
        );
        if !pause.is_zero() {
            sleep(pause).await;
        }
    }
}

/// Waits until the last statuses are written.
async fn until_quiet(server: &LoopbackServer) {
    let total = || server.requests().values().sum::<u64>();
    let mut before = total();
    loop {
        sleep(QUIET).await;
        let now = total();
        if now == before {
            return;
        }
        before = now;
    }
}

/// What has been spent so far.
struct Spent {
    operator_s: f64,
    server_s: f64,
    requests: BTreeMap<String, u64>,
}

impl Spent {
    fn now(server: &LoopbackServer) -> Self {
        Self {
            operator_s: thread_seconds(OPERATOR_THREAD),
            server_s: thread_seconds(SERVER_THREAD),
            requests: server.requests(),
        }
    }

    fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

fn report(before: &Spent, after: &Spent, models: usize, took: Duration) {
    let each = |number: f64| number / models as f64;
    let operator_s = after.operator_s - before.operator_s;
    println!("{models} models ready after {:.1} s", took.as_secs_f64());
    println!("operator: {operator_s:.2} CPU s, {:.2} ms for each model", each(operator_s * 1000.0));
    println!("API server of this process: {:.2} CPU s", after.server_s - before.server_s);
    println!("peak of both together: {:.1} MiB", peak_mib());
    for (what, number) in &after.requests {
        let new = number - before.requests.get(what).copied().unwrap_or(0);
        if new > 0 {
            println!("{what}: {:.2} for each model", each(new as f64));
        }
    }
    println!("all requests: {:.2} for each model", each((after.total() - before.total()) as f64));
}

/// Processor time of the threads of this name.
fn thread_seconds(name: &str) -> f64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0.0 };
    let of_task = |path: PathBuf| {
        let comm = fs::read_to_string(path.join("comm")).ok()?;
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        (comm.trim() == name).then_some((ticks(11)? + ticks(12)?) / TICKS_PER_S)
    };
    tasks.filter_map(Result::ok).filter_map(|task| of_task(task.path())).sum()
}

fn peak_mib() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|text| text.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
