//! Four times as many requests as a server can answer, for a minute: what callers get, and what it costs.
//!
//! `make test-overload` (or `cargo run --release -p trustformers-serve --example overload [SECONDS]`) serves
//! a small seeded model in this process, measures what it can answer (as many callers as the batch and the
//! queue hold), then sends four times that rate. It ends with status 1 unless every request got an answer or
//! a refusal that says when to try again (429 over HTTP, RESOURCE_EXHAUSTED over gRPC, with retry-after),
//! memory stayed flat, and admitted requests took at most 1.5 times as long as at saturation.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tonic::Code;
use tonic::transport::Channel;
use trustformers_model::seeded::SeededModel;
use trustformers_serve::proto::GenerateRequest;
use trustformers_serve::proto::inference_service_client::InferenceServiceClient;
use trustformers_serve::{Config, TrustformersServer};

/// What ends a measurement early; only its text is used.
type Failure = Box<dyn std::error::Error + Send + Sync>;

const BATCH: usize = 8;
const QUEUE: usize = 16;
const TOKENS: u32 = 48;
const SATURATION: Duration = Duration::from_secs(10);
/// Memory is compared with that after this time under overload: buffers have their size by then.
const SETTLED: Duration = Duration::from_secs(5);
const BODY: &str = r#"{"prompt":"The quick brown fox","max_tokens":48,"temperature":0}"#;

/// How one request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Answered(Duration),
    /// Refused, and told when to try again.
    Refused,
    /// Anything else.
    Wrong,
}

#[derive(Clone)]
struct Caller {
    http: Client<HttpConnector, Full<Bytes>>,
    url: String,
    grpc: InferenceServiceClient<Channel>,
}

impl Caller {
    async fn connect(http: SocketAddr, grpc: SocketAddr) -> Result<Self, Failure> {
        Ok(Self {
            http: Client::builder(TokioExecutor::new()).build_http(),
            url: format!("http://{http}/v1/generate"),
            grpc: InferenceServiceClient::connect(format!("http://{grpc}")).await?,
        })
    }

    /// Every fourth request goes over gRPC.
    async fn ask(mut self, number: usize) -> Outcome {
        let begin = Instant::now();
        let refused = if number.is_multiple_of(4) { self.over_grpc().await } else { self.over_http().await };
        match refused {
            Some(false) => Outcome::Answered(begin.elapsed()),
            Some(true) => Outcome::Refused,
            None => Outcome::Wrong,
        }
    }

    /// Whether it was refused; none for anything that is neither an answer nor a refusal.
    async fn over_http(&self) -> Option<bool> {
        let request = Request::post(&self.url).header("content-type", "application/json");
        let request = request.body(Full::from(Bytes::from_static(BODY.as_bytes()))).ok()?;
        let response = self.http.request(request).await.ok()?;
        let (status, retry_after) = (response.status(), response.headers().contains_key("retry-after"));
        response.into_body().collect().await.ok()?;
        match status {
            StatusCode::OK => Some(false),
            StatusCode::TOO_MANY_REQUESTS if retry_after => Some(true),
            _ => None,
        }
    }

    async fn over_grpc(&mut self) -> Option<bool> {
        let prompt = "The quick brown fox".to_owned();
        let request = GenerateRequest { prompt, max_tokens: TOKENS, ..Default::default() };
        match self.grpc.generate(request).await {
            Ok(_) => Some(false),
            Err(status) if status.code() == Code::ResourceExhausted => {
                status.metadata().contains_key("retry-after").then_some(true)
            }
            Err(_) => None,
        }
    }
}

/// The times of answered requests, sorted.
fn times(outcomes: &[Outcome]) -> Vec<Duration> {
    let answered = outcomes.iter().filter_map(|outcome| match outcome {
        Outcome::Answered(took) => Some(*took),
        _ => None,
    });
    let mut times: Vec<_> = answered.collect();
    times.sort_unstable();
    times
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// As many callers as the batch and the queue hold, each with one request after the other.
async fn saturate(caller: &Caller) -> Vec<Outcome> {
    let (until, count) = (Instant::now() + SATURATION, Arc::new(AtomicUsize::new(0)));
    let mut callers = JoinSet::new();
    for _ in 0..BATCH + QUEUE {
        let (caller, count) = (caller.clone(), Arc::clone(&count));
        callers.spawn(async move {
            let mut outcomes = Vec::new();
            while Instant::now() < until {
                outcomes.push(caller.clone().ask(count.fetch_add(1, Ordering::Relaxed)).await);
            }
            outcomes
        });
    }
    callers.join_all().await.concat()
}

/// Requests at a rate, whatever becomes of them.
async fn overload(caller: &Caller, per_second: f64, lasting: Duration) -> Vec<Outcome> {
    let mut ticks = interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (until, mut requests, mut number) = (Instant::now() + lasting, JoinSet::new(), 0);
    let mut outcomes = Vec::new();
    while Instant::now() < until {
        ticks.tick().await;
        number += 1;
        requests.spawn(caller.clone().ask(number));
        // A task that has ended keeps its memory until its outcome is taken, and memory is measured.
        while let Some(outcome) = requests.try_join_next() {
            outcomes.push(outcome.unwrap_or(Outcome::Wrong));
        }
    }
    outcomes.extend(requests.join_all().await);
    outcomes
}

/// Fails with the message unless the condition holds.
fn require(condition: bool, message: impl Into<Failure>) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(message.into()) }
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> Result<u64, Failure> {
    let pages = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = pages.split_whitespace().nth(1).ok_or("statm has no second figure")?.parse()?;
    // The page size of every machine that this is measured on.
    Ok(pages * 4096)
}

async fn measure(lasting: Duration) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("seeded.gguf");
    std::fs::write(&path, SeededModel::default().gguf())?;
    let config: Config = format!(
        "server: {{host: 127.0.0.1, port: 0, grpc_port: 0}}\n\
         models: [{{name: seeded, path: {}, max_batch_size: {BATCH}, max_queue: {QUEUE}}}]",
        path.display()
    )
    .parse()?;
    let server = TrustformersServer::new(config).start().await?;
    server.until_ready().await;
    let caller = Caller::connect(server.http_address(), server.grpc_address()).await?;

    let at_saturation = times(&saturate(&caller).await);
    let per_second = at_saturation.len() as f64 / SATURATION.as_secs_f64();
    let (p50, p99) = (percentile(&at_saturation, 50), percentile(&at_saturation, 99));
    println!("saturation: {per_second:.0} requests/s, p50 {p50:.1?}, p99 {p99:.1?}");

    let settled = tokio::spawn(async {
        sleep(SETTLED).await;
        resident_bytes()
    });
    let outcomes = overload(&caller, 4.0 * per_second, lasting).await;
    let (before, after) = (settled.await??, resident_bytes()?);
    let count = |wanted: Outcome| outcomes.iter().filter(|outcome| **outcome == wanted).count();
    let (refused, wrong) = (count(Outcome::Refused), count(Outcome::Wrong));
    let admitted = times(&outcomes);
    let (admitted_p50, admitted_p99) = (percentile(&admitted, 50), percentile(&admitted, 99));
    println!(
        "4 times that for {lasting:?}: {} answered, {refused} refused, {wrong} anything else; p50 \
         {admitted_p50:.1?}, p99 {admitted_p99:.1?}; {} MiB resident after {SETTLED:?}, {} MiB at the end",
        admitted.len(),
        before >> 20,
        after >> 20,
    );
    server.drain().await;
    require(wrong == 0, format!("{wrong} requests got neither an answer nor a refusal"))?;
    require(refused > 0, "nothing was refused, so this was no overload")?;
    require(after < before + before / 20 + (8 << 20), format!("memory grew from {before} to {after} bytes"))?;
    require(admitted_p50 <= p50.mul_f64(1.5), format!("the median is {admitted_p50:?} instead of {p50:?}"))?;
    Ok(())
}

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(60);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::from)
        .and_then(|runtime| runtime.block_on(measure(Duration::from_secs(seconds))));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("overload: {error}");
            ExitCode::FAILURE
        }
    }
}
