//! The gateway at saturation, beside hostile callers: others keep their latency, memory stays flat and within
//! the printed bound, and when the callers have left nothing of theirs is left.
//!
//! `e2e/bench/soak.sh` runs it. Callers in a closed loop saturate the gateway's core all the time, at first
//! alone and then beside the hostile ones. Every window of time is a row of the table.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::time::sleep;

use crate::hostile::{HELD, Hostile, MADE_UP, SLOW_HEADS, SLOW_READERS, STALLED_STREAMS, STALLED_UPLOADS};
use crate::load::{self, LoadError};
use crate::programs::{Program, free_address, resident_mib};
use crate::quantile_ms;

/// Requests in flight that saturate the gateway.
const REQUESTS_AT_ONCE: usize = 32;
/// Windows without hostile callers.
const QUIET_WINDOWS: usize = 3;
/// Windows with them; the first one, in which they come, is not compared.
const HOSTILE_WINDOWS: u64 = 20;
/// What a latency may become beside hostile callers.
const MOST_SLOWER: f64 = 1.5;
/// What the memory of the last quarter may be beside that of the second one, and as much more.
const MOST_GROWTH: f64 = 1.1;
const MOST_GROWTH_MIB: f64 = 8.0;
/// Descriptors that connections to the pod may take, which stay for a minute.
const POOLED_DESCRIPTORS: usize = 48;
/// After the callers have left, their connections end within this time.
const LEFT_WITHIN: Duration = Duration::from_secs(90);
/// Streams that one caller may have where nothing is held: half of 10,240, without those of this program.
const STREAMS_OF_ONE_CALLER: usize = 5000;

/// What was measured in one window.
#[derive(Debug, Clone, Copy)]
struct Window {
    p50_ms: f64,
    p99_ms: f64,
    per_second: f64,
    resident_mib: f64,
    descriptors: usize,
}

/// The gateway, and what it was before hostile callers came.
struct Subject {
    address: SocketAddr,
    program: Program,
}

impl Subject {
    fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.program.id());
        std::fs::read_dir(folder).map_or(0, Iterator::count)
    }

    async fn window(&self, length: Duration) -> Result<Window, LoadError> {
        let began = Instant::now();
        let caller = load::client();
        let loops = (0..REQUESTS_AT_ONCE).map(|_| async {
            let mut latencies = Vec::new();
            while began.elapsed() < length {
                let sent = Instant::now();
                load::send(&caller, self.address, None).await?;
                latencies.push(sent.elapsed());
            }
            Ok::<_, LoadError>(latencies)
        });
        let latencies: Vec<Duration> = try_join_all(loops).await?.concat();
        let window = Window {
            p50_ms: quantile_ms(&latencies, 0.5),
            p99_ms: quantile_ms(&latencies, 0.99),
            per_second: latencies.len() as f64 / began.elapsed().as_secs_f64(),
            resident_mib: resident_mib(self.program.id()),
            descriptors: self.descriptors(),
        };
        println!(
            "| {:.2} | {:.2} | {:.0} | {:.1} | {} |",
            window.p50_ms, window.p99_ms, window.per_second, window.resident_mib, window.descriptors
        );
        Ok(window)
    }

    /// The sum of a metric's series.
    async fn metric(&self, name: &str) -> Result<f64, LoadError> {
        let text = load::get(&load::client(), self.address, "/metrics").await?;
        let of_name = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
        };
        let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        Ok(text.lines().filter(of_name).filter_map(value).sum())
    }

    /// Waits until nothing of the callers is left; gives what is.
    async fn left(&self, descriptors: usize) -> Result<Vec<String>, LoadError> {
        let deadline = Instant::now() + LEFT_WITHIN;
        loop {
            let mut left = Vec::new();
            for name in ["trustformers_gateway_in_flight", "trustformers_gateway_held"] {
                let value = self.metric(name).await?;
                if value > 0.0 {
                    left.push(format!("{name} is {value}"));
                }
            }
            let open = self.descriptors();
            if open > descriptors + POOLED_DESCRIPTORS {
                left.push(format!("{open} descriptors are open, {descriptors} were before"));
            }
            if left.is_empty() || Instant::now() > deadline {
                return Ok(left);
            }
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// Measures for `seconds` beside hostile callers and prints the table. False where an objective is missed.
pub(crate) fn run(seconds: u64) -> bool {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let missed = runtime.block_on(soak(seconds));
    match missed {
        Ok(missed) => {
            missed.iter().for_each(|missed| println!("MISS: {missed}"));
            if missed.is_empty() {
                println!("every objective holds");
            }
            missed.is_empty()
        }
        Err(error) => {
            println!("MISS: {error}");
            false
        }
    }
}

async fn soak(seconds: u64) -> Result<Vec<String>, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let pod = load::start_pod().await;
    let address = free_address();
    let program = Program::start("ours", folder.path(), address, pod).unwrap();
    let subject = Subject { address, program: program.expect("BENCH_GATEWAY names the gateway's program") };
    crate::until_answered(address).await?;
    let bound_mib = subject.program.printed_number("bound_mib").unwrap_or(f64::NAN);
    let length = Duration::from_secs(seconds).div_f64(HOSTILE_WINDOWS as f64);
    println!(
        "Closed loop of {REQUESTS_AT_ONCE} requests, windows of {:.0} s, at first {QUIET_WINDOWS} without \
         hostile callers; then {STALLED_STREAMS} stalled streams, {STALLED_UPLOADS} stalled uploads, \
         {SLOW_HEADS} slow heads, {SLOW_READERS} slow readers, {MADE_UP} callers with names that are made up \
         and {HELD} of a model without pods. The gateway prints a bound of {bound_mib} MiB.\n\n\
         | p50 (ms) | p99 (ms) | requests/s | MiB | descriptors |\n|---|---|---|---|---|",
        length.as_secs_f64()
    );
    // The first one fills caches and pools.
    subject.window(length.min(Duration::from_secs(5))).await?;
    let mut quiet = Vec::new();
    for _ in 0..QUIET_WINDOWS {
        quiet.push(subject.window(length).await?);
    }
    let descriptors = subject.descriptors();
    let hostile = Hostile::start(address);
    let mut beside = Vec::new();
    for _ in 0..HOSTILE_WINDOWS {
        beside.push(subject.window(length).await?);
    }
    hostile.stop().await;
    let mut missed = missed_by(&quiet, &beside[1..], bound_mib);
    missed.extend(subject.left(descriptors).await?);
    // A slot that was not given back would be missing here.
    let again =
        load::open_streams_from(address, STREAMS_OF_ONE_CALLER, |_| Ipv4Addr::new(127, 0, 2, 1)).await;
    if let Err(error) = again {
        missed.push(format!("one caller can't have {STREAMS_OF_ONE_CALLER} streams afterwards: {error}"));
    }
    Ok(missed)
}

/// Which objectives the windows miss.
fn missed_by(quiet: &[Window], beside: &[Window], bound_mib: f64) -> Vec<String> {
    let mut missed = Vec::new();
    let figures: [Figure; 2] = [|window| window.p50_ms, |window| window.p99_ms];
    for (name, figure) in ["p50", "p99"].into_iter().zip(figures) {
        let (before, during) = (median(quiet, figure), median(beside, figure));
        let ratio = during / before;
        println!("{name}: {before:.2} ms alone, {during:.2} ms beside hostile callers ({ratio:.2}×)");
        if ratio > MOST_SLOWER {
            missed.push(format!("the median {name} became {ratio:.2} times as long, at most {MOST_SLOWER}"));
        }
    }
    let largest = beside.iter().map(|window| window.resident_mib).fold(0.0, f64::max);
    println!("memory: {largest:.1} MiB at most");
    if largest > bound_mib {
        missed.push(format!("{largest:.1} MiB are above the bound of {bound_mib} MiB"));
    }
    let quarter = beside.len() / 4;
    let resident = |window: &Window| window.resident_mib;
    let second = median(&beside[quarter..2 * quarter.max(1)], resident);
    let last = median(&beside[beside.len() - quarter.max(1)..], resident);
    println!("memory: {second:.1} MiB in the second quarter, {last:.1} MiB in the last one");
    if last > second * MOST_GROWTH + MOST_GROWTH_MIB {
        missed.push(format!("memory grew from {second:.1} to {last:.1} MiB"));
    }
    missed
}

/// What of a window is looked at.
type Figure = fn(&Window) -> f64;

fn median(windows: &[Window], figure: Figure) -> f64 {
    let mut values: Vec<f64> = windows.iter().map(figure).collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
