//! Four times as many requests as a server can answer, for a minute: what callers get, and what it costs.
//!
//! `make test-overload` (or `cargo run --release -p trustformers-serve --example overload [SECONDS]`) serves
//! a small seeded model in this process, measures what it can answer (as many callers as the batch and the
//! queue hold), then sends four times that rate. It ends with status 1 unless every request got an answer or
//! a refusal that says when to try again (429 over HTTP, RESOURCE_EXHAUSTED over gRPC, with retry-after),
//! memory stayed flat, and admitted requests took at most 1.5 times as long as at saturation.
//!
//! Callers share the machine with the server, where real ones have machines of their own. So they have one
//! thread, their HTTP is as plain as it can be, and what they take of the processor is printed. They do not
//! obey retry-after: the rate is what a server gets from many callers who come once.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, spawn_blocking};
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
/// A connection that was not used for longer is not used again: the server closes it after a minute.
const IDLE: Duration = Duration::from_secs(20);
/// Ticks of the kernel's accounting in a second, as it shows them to programs.
const TICKS_PER_SECOND: u64 = 100;

/// How one request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Answered(Duration),
    /// Refused, and told when to try again.
    Refused,
    /// Anything else.
    Wrong,
}

/// How many requests went.
#[derive(Debug, Default)]
struct Tally {
    /// The times of those that were answered.
    times: Vec<Duration>,
    refused: usize,
    wrong: usize,
}

impl Tally {
    fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Answered(took) => self.times.push(took),
            Outcome::Refused => self.refused += 1,
            Outcome::Wrong => self.wrong += 1,
        }
    }

    fn requests(&self) -> usize {
        self.times.len() + self.refused + self.wrong
    }

    fn percentile(&self, percent: usize) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).copied().unwrap_or_default()
    }
}

/// A connection over HTTP/1.1, with what is read from it.
struct HttpConnection {
    stream: TcpStream,
    buffer: Vec<u8>,
    used: Instant,
}

/// What the head of an answer says.
struct HttpHead {
    status: u16,
    retry_after: bool,
    content_length: usize,
}

impl HttpHead {
    fn parse(head: &str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let mut found = Self { status, retry_after: false, content_length: 0 };
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                found.content_length = value.trim().parse().ok()?;
            }
            found.retry_after |= name.eq_ignore_ascii_case("retry-after");
        }
        Some(found)
    }
}

impl HttpConnection {
    async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new(), used: Instant::now() })
    }

    /// Sends a request and reads the whole answer.
    async fn exchange(&mut self, request: &[u8]) -> io::Result<HttpHead> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break at;
            }
            self.read().await?;
        };
        let head = std::str::from_utf8(&self.buffer[..end]).ok().and_then(HttpHead::parse);
        let head = head.ok_or(io::ErrorKind::InvalidData)?;
        while self.buffer.len() < end + 4 + head.content_length {
            self.read().await?;
        }
        self.used = Instant::now();
        Ok(head)
    }

    async fn read(&mut self) -> io::Result<()> {
        // Whole answers are shorter: each comes in one read.
        self.buffer.reserve(4096);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// Asks over HTTP, on connections that are kept.
struct HttpCaller {
    address: SocketAddr,
    request: Vec<u8>,
    /// Those that are not in use, the last used one last. At most one for each request at a time.
    idle: Mutex<Vec<HttpConnection>>,
}

impl HttpCaller {
    fn new(address: SocketAddr) -> Self {
        let length = BODY.len();
        let head =
            format!("POST /v1/generate HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n");
        let request = format!("{head}content-length: {length}\r\n\r\n{BODY}").into_bytes();
        Self { address, request, idle: Mutex::default() }
    }

    async fn ask(&self) -> io::Result<HttpHead> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let used_lately = idle().pop().filter(|connection| connection.used.elapsed() < IDLE);
        let mut connection = match used_lately {
            Some(connection) => connection,
            None => {
                // Those below were used even longer ago.
                idle().clear();
                HttpConnection::open(self.address).await?
            }
        };
        let head = connection.exchange(&self.request).await?;
        idle().push(connection);
        Ok(head)
    }
}

#[derive(Clone)]
struct Caller {
    http: Arc<HttpCaller>,
    grpc: InferenceServiceClient<Channel>,
}

impl Caller {
    async fn connect(http: SocketAddr, grpc: SocketAddr) -> Result<Self, Failure> {
        Ok(Self {
            http: Arc::new(HttpCaller::new(http)),
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
        match self.http.ask().await.ok()? {
            HttpHead { status: 200, .. } => Some(false),
            HttpHead { status: 429, retry_after: true, .. } => Some(true),
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

/// As many callers as the batch and the queue hold, each with one request after the other.
async fn saturate(caller: &Caller) -> Tally {
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
    let mut tally = Tally::default();
    callers.join_all().await.into_iter().flatten().for_each(|outcome| tally.add(outcome));
    tally
}

/// Requests at a rate, whatever becomes of them.
async fn overload(caller: &Caller, per_second: f64, lasting: Duration) -> Tally {
    let mut ticks = interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (until, mut requests, mut number) = (Instant::now() + lasting, JoinSet::new(), 0);
    let mut tally = Tally::default();
    while Instant::now() < until {
        ticks.tick().await;
        number += 1;
        requests.spawn(caller.clone().ask(number));
        // A task that has ended keeps its memory until its outcome is taken, and memory is measured.
        while let Some(outcome) = requests.try_join_next() {
            tally.add(outcome.unwrap_or(Outcome::Wrong));
        }
    }
    requests.join_all().await.into_iter().for_each(|outcome| tally.add(outcome));
    tally
}

/// What requests of one kind got, and what that took.
struct Phase {
    tally: Tally,
    elapsed: Duration,
    /// Processor time of the whole process.
    processor: Duration,
    /// Processor time of the callers' thread.
    callers: Duration,
}

impl Phase {
    /// Runs on the thread of the callers.
    async fn of(requests: impl Future<Output = Tally>) -> Result<Self, Failure> {
        let began = Instant::now();
        let (processor, callers) = (processor_time("self")?, processor_time("thread-self")?);
        let tally = requests.await;
        Ok(Self {
            tally,
            elapsed: began.elapsed(),
            processor: processor_time("self")? - processor,
            callers: processor_time("thread-self")? - callers,
        })
    }

    fn print_cost(&self) {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let percent =
            |part: Duration| 100.0 * part.as_secs_f64() / (cores as f64 * self.elapsed.as_secs_f64());
        let each_us = 1e6 * self.callers.as_secs_f64() / self.tally.requests().max(1) as f64;
        println!(
            "  {:.0} % of {cores} cores in use, {:.0} % by the callers, {each_us:.0} \u{b5}s for each request",
            percent(self.processor),
            percent(self.callers),
        );
    }
}

/// Processor time of a process or thread as `/proc` names it, in steps of 10 ms.
fn processor_time(of: &str) -> Result<Duration, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{of}/stat"))?;
    // The name may contain spaces and ends with the last parenthesis; the ticks are 12 and 13 fields behind
    // it.
    let (_, fields) = stat.rsplit_once(')').ok_or("stat has no name")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks = ticks.sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
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

/// What the callers saw.
struct Measured {
    saturation: Phase,
    overload: Phase,
    /// Resident memory after [`SETTLED`] of the overload, and at its end.
    settled_bytes: u64,
    end_bytes: u64,
}

/// All requests of the measurement.
async fn call(http: SocketAddr, grpc: SocketAddr, lasting: Duration) -> Result<Measured, Failure> {
    let caller = Caller::connect(http, grpc).await?;
    let saturation = Phase::of(saturate(&caller)).await?;
    let per_second = saturation.tally.times.len() as f64 / SATURATION.as_secs_f64();
    let (p50, p99) = (saturation.tally.percentile(50), saturation.tally.percentile(99));
    println!("saturation: {per_second:.0} requests/s, p50 {p50:.1?}, p99 {p99:.1?}");
    saturation.print_cost();
    let settled = tokio::spawn(async {
        sleep(SETTLED).await;
        resident_bytes()
    });
    let overload = Phase::of(overload(&caller, 4.0 * per_second, lasting)).await?;
    let (settled_bytes, end_bytes) = (settled.await??, resident_bytes()?);
    Ok(Measured { saturation, overload, settled_bytes, end_bytes })
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
    let (http, grpc) = (server.http_address(), server.grpc_address());
    let callers = spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(call(http, grpc, lasting))
    });
    let Measured { saturation, overload, settled_bytes, end_bytes } = callers.await??;
    let (p50, Tally { refused, wrong, times }) = (saturation.tally.percentile(50), &overload.tally);
    let (admitted_p50, admitted_p99) = (overload.tally.percentile(50), overload.tally.percentile(99));
    println!(
        "4 times that for {lasting:?}: {} answered, {refused} refused, {wrong} anything else; p50 \
         {admitted_p50:.1?} ({:.2} times), p99 {admitted_p99:.1?}; {} MiB resident after {SETTLED:?}, {} MiB at \
         the end",
        times.len(),
        admitted_p50.as_secs_f64() / p50.as_secs_f64(),
        settled_bytes >> 20,
        end_bytes >> 20,
    );
    overload.print_cost();
    server.drain().await;
    let limit_bytes = settled_bytes + settled_bytes / 20 + (8 << 20);
    require(*wrong == 0, format!("{wrong} requests got neither an answer nor a refusal"))?;
    require(*refused > 0, "nothing was refused, so this was no overload")?;
    require(end_bytes < limit_bytes, format!("memory grew from {settled_bytes} to {end_bytes} bytes"))?;
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
