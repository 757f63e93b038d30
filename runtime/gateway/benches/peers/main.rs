//! The gateway beside other proxies, in one run and before the same mock pod.
//!
//! Each proxy is a process of its own on one core, with one worker. The mock pod and the callers are this
//! process, which `e2e/bench/gateway.sh` keeps on the other cores; only the callers of open streams are
//! another one (`held`). Measurements of the proxies alternate, so that other load on the machine affects all
//! of them. Measured are the latency added at 1,000 and 5,000 requests per second, sent at fixed times: the
//! median of the rounds' quantiles, so that a round in which the machine stood still decides nothing;
//! requests and streamed tokens per second of the proxy's processor time; and resident memory at 10,000 open
//! streams, or as many as the limit of file descriptors allows the proxy.
//!
//! The script gets the peers, builds the gateway and runs this. BENCH_GATEWAY, BENCH_ENVOY, BENCH_NGINX and
//! BENCH_SGLANG are the programs; a peer without one is left out, and so is one that fails.
//! GATEWAY_BENCH_SECONDS is the time of each proxy at each rate, 12 where it is not set; BENCH_REPORT a file
//! for the figures.
//!
//! With GATEWAY_SOAK_SECONDS it is instead the soak (`soak`), of our gateway alone.
//!
//! Bounded: rounds of at most one second for each proxy and rate, counts in proportion, time limits on
//! every request.
#![allow(clippy::unwrap_used, reason = "an unexpected value ends the measurement")]

mod held;
mod hostile;
mod load;
mod programs;
mod soak;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use held::HeldStreams;
use load::{LoadError, TOKENS_PER_STREAM};
use programs::Program;

const NAMES: [&str; 4] = ["ours", "envoy", "nginx", "sglang"];
const RATES: [u64; 2] = [1000, 5000];
/// Per second of the measurement.
const BURST: u64 = 2000;
const STREAMS: u64 = 30;
/// Linux counts processor time in 1/100 s, so that fewer would say little.
const LEAST_BURST: u64 = 6000;
const LEAST_STREAMS: u64 = 64;
const OPEN_STREAMS: usize = 10_000;
/// Proxies whose streams share connections to the pod. The others have a connection for each.
const SHARING: [&str; 2] = ["ours", "envoy"];
/// Descriptors that a program needs beside those of streams; those of shared connections are a hundredth.
const OTHER_DESCRIPTORS: usize = 500;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Amounts {
    /// Of one second at each rate.
    rounds: u64,
    burst: usize,
    streams: usize,
}

impl Amounts {
    fn of_environment() -> Self {
        let rounds = seconds_of("GATEWAY_BENCH_SECONDS").unwrap_or(12).clamp(1, 600);
        let count = |per_second: u64, least: u64| (per_second * rounds).max(least) as usize / rounds as usize;
        Self { rounds, burst: count(BURST, LEAST_BURST), streams: count(STREAMS, LEAST_STREAMS) }
    }
}

/// How many streams a proxy can have open. A stream has a descriptor for its caller, and one for the pod
/// where the proxy does not share.
fn open_streams(name: &str) -> usize {
    let descriptors = programs::descriptors().saturating_sub(OTHER_DESCRIPTORS);
    OPEN_STREAMS.min(if SHARING.contains(&name) { descriptors } else { descriptors / 2 })
}

/// A proxy, or none: the pod itself.
struct Proxy {
    name: &'static str,
    address: SocketAddr,
    program: Option<Program>,
    /// Of each round.
    latencies: [Vec<Vec<Duration>>; RATES.len()],
    requests: Work,
    tokens: Work,
    memory_mib: f64,
}

/// What a proxy did, and the processor time that it took.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    count: usize,
    used: Duration,
}

impl Work {
    fn add(&mut self, count: usize, used: Duration) {
        self.count += count;
        self.used += used;
    }

    fn per_core_second(self) -> f64 {
        self.count as f64 / self.used.as_secs_f64().max(0.01)
    }
}

/// A number of seconds in the environment.
fn seconds_of(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

fn main() {
    if held::hold_as_told() {
        return;
    }
    if let Some(seconds) = seconds_of("GATEWAY_SOAK_SECONDS") {
        let holds = soak::run(seconds.clamp(20, 3600));
        std::process::exit(i32::from(!holds));
    }
    let amounts = Amounts::of_environment();
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (proxies, left_out) = runtime.block_on(async {
        let pod = load::start_pod().await;
        let folder = tempfile::tempdir().unwrap();
        let mut left_out = Vec::new();
        let mut proxies = started(pod, folder.path(), &mut left_out).await;
        for round in 0..amounts.rounds {
            eprintln!("round {} of {}", round + 1, amounts.rounds);
            proxies =
                each(proxies, &mut left_out, async |proxy: &mut Proxy| measure(proxy, amounts).await).await;
        }
        for proxy in &mut proxies {
            // Its other figures stand without this one.
            if let Err(error) = hold_streams(proxy).await {
                left_out.push(format!("{}: no memory at open streams: {error}", proxy.name));
            }
        }
        (proxies, left_out)
    });
    let figures = figures(&proxies, amounts, &left_out);
    print(&figures, began.elapsed());
    if let Some(file) = std::env::var_os("BENCH_REPORT") {
        std::fs::write(&file, format!("{figures:#}\n")).unwrap();
    }
    assert!(proxies.iter().any(|proxy| proxy.name == "ours"), "our gateway could not be measured");
}

/// Does something with each proxy; one that fails is ended and left out.
async fn each(
    proxies: Vec<Proxy>,
    left_out: &mut Vec<String>,
    action: impl AsyncFn(&mut Proxy) -> Result<(), LoadError>,
) -> Vec<Proxy> {
    let mut good = Vec::with_capacity(proxies.len());
    for mut proxy in proxies {
        match action(&mut proxy).await {
            Ok(()) => good.push(proxy),
            Err(error) => {
                let words = proxy.program.as_ref().map(Program::last_words).unwrap_or_default();
                left_out.push(format!("{}: {error}; {words}", proxy.name));
            }
        }
    }
    good
}

/// The pod itself, and the proxies that answer.
async fn started(pod: SocketAddr, folder: &Path, left_out: &mut Vec<String>) -> Vec<Proxy> {
    let mut proxies = vec![proxy("direct", pod, None)];
    for name in NAMES {
        let address = programs::free_address();
        match Program::start(name, folder, address, pod) {
            Ok(Some(program)) => proxies.push(proxy(name, address, Some(program))),
            Ok(None) => left_out.push(format!("{name}: there is no program")),
            Err(error) => left_out.push(format!("{name}: {error}")),
        }
    }
    each(proxies, left_out, async |proxy: &mut Proxy| until_answered(proxy.address).await).await
}

fn proxy(name: &'static str, address: SocketAddr, program: Option<Program>) -> Proxy {
    Proxy {
        name,
        address,
        program,
        latencies: Default::default(),
        requests: Work::default(),
        tokens: Work::default(),
        memory_mib: f64::NAN,
    }
}

async fn until_answered(address: SocketAddr) -> Result<(), LoadError> {
    let caller = load::client();
    let mut last = Ok(0);
    for _ in 0..500 {
        last = load::send(&caller, address, None).await;
        if last.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    last.map(|_length| ())
}

async fn measure(proxy: &mut Proxy, amounts: Amounts) -> Result<(), LoadError> {
    let address = proxy.address;
    eprintln!("  {}", proxy.name);
    load::paced(address, RATES[0], RATES[0] as usize / 2).await?;
    for (index, rate) in RATES.into_iter().enumerate() {
        proxy.latencies[index].push(load::paced(address, rate, rate as usize).await?);
    }
    let Some(program) = &proxy.program else { return Ok(()) };
    let id = program.id();
    let before = programs::processor_time(id);
    load::burst(address, amounts.burst).await?;
    let between = programs::processor_time(id);
    load::streams(address, amounts.streams).await?;
    let after = programs::processor_time(id);
    proxy.requests.add(amounts.burst, between.saturating_sub(before));
    proxy.tokens.add(amounts.streams * TOKENS_PER_STREAM, after.saturating_sub(between));
    // A measurement that ends early has told this much.
    eprintln!(
        "    p99 {:.3} and {:.3} ms, {:.0} requests and {:.0} tokens per core-second",
        latency_ms(&proxy.latencies[0], 0.99),
        latency_ms(&proxy.latencies[1], 0.99),
        proxy.requests.per_core_second(),
        proxy.tokens.per_core_second()
    );
    Ok(())
}

/// Resident memory while streams are open.
async fn hold_streams(proxy: &mut Proxy) -> Result<(), LoadError> {
    let Some(program) = &proxy.program else { return Ok(()) };
    let streams = HeldStreams::open(proxy.address, open_streams(proxy.name)).await?;
    proxy.memory_mib = programs::resident_mib(program.id());
    streams.end().await;
    Ok(())
}

fn quantile_ms(latencies: &[Duration], share: f64) -> f64 {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len().saturating_sub(1) as f64 * share) as usize;
    sorted.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e3)
}

/// The median of the rounds' quantiles.
fn latency_ms(rounds: &[Vec<Duration>], share: f64) -> f64 {
    let mut quantiles: Vec<f64> = rounds.iter().map(|round| quantile_ms(round, share)).collect();
    quantiles.sort_unstable_by(f64::total_cmp);
    match (quantiles.len(), quantiles.len() / 2) {
        (0, _) => f64::NAN,
        (count, middle) if count % 2 == 0 => f64::midpoint(quantiles[middle - 1], quantiles[middle]),
        (_, middle) => quantiles[middle],
    }
}

/// The names of the figures, and whether more is better.
const FIGURES: [(&str, bool); 7] = [
    ("p50_added_ms_at_1000", false),
    ("p99_added_ms_at_1000", false),
    ("p50_added_ms_at_5000", false),
    ("p99_added_ms_at_5000", false),
    ("requests_per_core_second", true),
    ("tokens_per_core_second", true),
    ("mib_at_open_streams", false),
];

/// All figures, and those of each peer divided by ours or the other way round, so that above 1 is better for
/// us.
fn figures(proxies: &[Proxy], amounts: Amounts, left_out: &[String]) -> Value {
    let direct = proxies.iter().find(|proxy| proxy.name == "direct");
    let row = |proxy: &Proxy| {
        let added = |index: usize, share| {
            let base = direct.map_or(f64::NAN, |direct| latency_ms(&direct.latencies[index], share));
            latency_ms(&proxy.latencies[index], share) - base
        };
        [
            added(0, 0.5),
            added(0, 0.99),
            added(1, 0.5),
            added(1, 0.99),
            proxy.requests.per_core_second(),
            proxy.tokens.per_core_second(),
            proxy.memory_mib,
        ]
    };
    let named = |values: [f64; 7]| -> Value {
        FIGURES.iter().zip(values).map(|((name, _), value)| ((*name).to_owned(), json!(value))).collect()
    };
    let peers = proxies.iter().filter(|proxy| proxy.program.is_some());
    let all: Vec<(&str, [f64; 7])> = peers.map(|proxy| (proxy.name, row(proxy))).collect();
    let ours = all.iter().find(|(name, _)| *name == "ours").map(|(_, row)| *row);
    let ratios = all.iter().filter(|(name, _)| *name != "ours").filter_map(|(name, row)| {
        let ours = ours?;
        let mut ratios = [0.0; 7];
        for (index, (_, more_is_better)) in FIGURES.iter().enumerate() {
            let (mine, theirs) = (ours[index], row[index]);
            ratios[index] = if *more_is_better { mine / theirs } else { theirs / mine };
        }
        Some(((*name).to_owned(), named(ratios)))
    });
    let base = |index: usize, share| direct.map(|direct| latency_ms(&direct.latencies[index], share));
    json!({
        "amounts": {
            "rounds": amounts.rounds, "burst": amounts.burst,
            "streams": amounts.streams,
            "open_streams": NAMES.map(|name| (name, open_streams(name))).into_iter().collect::<Value>(),
        },
        "direct_ms": {"p50_at_1000": base(0, 0.5), "p99_at_1000": base(0, 0.99),
                      "p50_at_5000": base(1, 0.5), "p99_at_5000": base(1, 0.99)},
        "proxies": all.iter().map(|(name, row)| ((*name).to_owned(), named(*row))).collect::<Value>(),
        "ratios": ratios.collect::<Value>(),
        "left_out": left_out,
    })
}

fn print(figures: &Value, took: Duration) {
    println!(
        "| proxy | p50, p99 added at 1k/s (ms) | p50, p99 added at 5k/s (ms) | requests per core-second | \
         tokens per core-second | MiB at {} streams |\n|---|---|---|---|---|---|",
        figures["amounts"]["open_streams"]["ours"]
    );
    let number = |row: &Value, index: usize| row[FIGURES[index].0].as_f64().unwrap_or(f64::NAN);
    let rows = |section: &str| figures[section].as_object().cloned().unwrap_or_default();
    for name in NAMES {
        let Some(row) = rows("proxies").get(name).cloned() else { continue };
        let at = |index| number(&row, index);
        let open = open_streams(name);
        let fewer = if open < open_streams(NAMES[0]) { format!(" at {open}") } else { String::new() };
        println!(
            "| {name} | {:.3}, {:.3} | {:.3}, {:.3} | {:.0} | {:.0} | {:.0}{fewer} |",
            at(0),
            at(1),
            at(2),
            at(3),
            at(4),
            at(5),
            at(6)
        );
    }
    for (name, row) in rows("ratios") {
        let at = |index| {
            let ratio = number(&row, index);
            // Where we add nothing that can be measured there is no ratio.
            if ratio.is_finite() && ratio > 0.0 { format!("{ratio:.2}×") } else { "-".to_owned() }
        };
        let cells: Vec<String> = [0, 2].map(|index| format!("{}, {}", at(index), at(index + 1))).to_vec();
        let rest: Vec<String> = (4..7).map(at).collect();
        println!("| ours beside {name} | {} | {} |", cells.join(" | "), rest.join(" | "));
    }
    for reason in figures["left_out"].as_array().into_iter().flatten() {
        println!("left out: {}", reason.as_str().unwrap_or_default());
    }
    let note =
        "Above 1× is better for us. Latency is the quantile through the proxy minus that of the pod itself.";
    println!("{note} The measurement took {} s.", took.as_secs());
}
