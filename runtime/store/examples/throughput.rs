//! How fast a model is fetched, beside what loopback, the disk and one core's sha256 can do. Prints a line
//! for each, and exits with 1 where fetching misses the bar.
//!
//! `cargo run --release -p trustformers-store --example throughput -- [MIB] [FOLDER]`: serves a file from
//! memory on loopback. Each round reads it once plainly, writes as much to the folder, hashes it, does all
//! three at once with no more than loops, and fetches it into a cache there, checked. Medians of the rounds
//! are compared, because a round has all kinds.
//!
//! The server, the system's copies and the digest share the cores. So the bar is a share of all three at
//! once: with enough cores that is the slowest of them, and with few it is what is left of it.
#![expect(clippy::unwrap_used, reason = "a measurement that fails ends")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use trustformers_store::{Environment, FetchLimits, FetchRequest, Source, Store, StoreSettings};

const MIB: usize = 1 << 20;
const ROUNDS: usize = 5;
/// What fetching must reach of its parts, all at once.
const MIN_SHARE_PERCENT: f64 = 80.0;
/// Ticks of the kernel's accounting in a second, as it shows them to programs.
const TICKS_PER_SECOND: u64 = 100;

/// What each round measures. All but the last two are parts of fetching.
const KINDS: [&str; 8] = [
    "loopback, read and dropped",
    "disk, written from memory",
    "disk, written and synced",
    "sha256 on one core",
    "loopback to disk on one thread",
    "the same beside a sha256",
    "fetched: written and checked",
    "in the cache: checked again",
];
/// Loopback, disk and sha256 alone. Fetching does not sync (its digest tells after a power failure), so the
/// disk counts as written.
const ALONE: [usize; 3] = [0, 1, 3];
/// All three at once.
const TOGETHER: usize = 5;
const FETCHED: usize = 6;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(1024, |text| text.parse().unwrap());
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let file: Vec<u8> = (0..mib * MIB).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let file: &'static [u8] = file.leak();
    let load = Arc::new(ServerLoad::default());
    let address = serve(file, Arc::clone(&load));
    let served = Served { address, pin: hex(Sha256::digest(file).as_slice()), file, load };
    let (mut rates, mut cost): ([Vec<f64>; KINDS.len()], _) = (Default::default(), FetchCost::default());
    for _ in 0..ROUNDS {
        for (rates, seconds) in rates.iter_mut().zip(served.round(folder.path(), &mut cost)) {
            rates.push(mib as f64 / seconds);
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{mib} MiB, {ROUNDS} rounds, {cores} cores, MiB/s: median (slowest to fastest), fetched beside it"
    );
    for rates in &mut rates {
        rates.sort_by(f64::total_cmp);
    }
    let medians = rates.each_ref().map(|rates| rates[ROUNDS / 2]);
    let fetched = medians[FETCHED];
    for ((kind, rates), median) in KINDS.iter().zip(&rates).zip(medians) {
        let (slowest, fastest) = (rates[0], rates[ROUNDS - 1]);
        let share = 100.0 * fetched / median;
        println!("{kind:32} {median:8.0} ({slowest:.0} to {fastest:.0}) {share:5.0} %");
    }
    cost.print(mib * ROUNDS, cores);
    let limit = ALONE.into_iter().min_by(|a, b| medians[*a].total_cmp(&medians[*b])).unwrap();
    println!("fetched / slowest part alone ({}): {:.0} %", KINDS[limit], 100.0 * fetched / medians[limit]);
    let share = 100.0 * fetched / medians[TOGETHER].min(medians[limit]);
    let is_met = share >= MIN_SHARE_PERCENT;
    let verdict = if is_met { "ok" } else { "MISS" };
    println!("fetched / all parts at once: {share:.0} %, need {MIN_SHARE_PERCENT} % {verdict}");
    if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the server of the measurement does and takes.
#[derive(Default)]
struct ServerLoad {
    /// Answers that are being written.
    answers: AtomicUsize,
    processor_ns: AtomicU64,
}

impl ServerLoad {
    /// Processor time of all answers so far, once none is being written.
    fn processor(&self) -> Duration {
        while self.answers.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        Duration::from_nanos(self.processor_ns.load(Ordering::Acquire))
    }
}

/// What fetching took in all rounds.
#[derive(Default)]
struct FetchCost {
    elapsed: Duration,
    /// Of the whole process, the server included.
    processor: Duration,
    server: Duration,
}

impl FetchCost {
    fn print(&self, mib: usize, cores: usize) {
        let percent = |part: Duration, whole: Duration| 100.0 * part.as_secs_f64() / whole.as_secs_f64();
        println!(
            "processor while fetching: {:.2} ms for each MiB, {:.0} % of the cores; {:.0} % of it the server's",
            1e3 * self.processor.as_secs_f64() / mib as f64,
            percent(self.processor, self.elapsed) / cores as f64,
            percent(self.server, self.processor),
        );
    }
}

/// Processor time of this process, also of threads that have ended, in steps of 10 ms.
fn process_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The name may contain spaces and ends with the last parenthesis; the ticks are 12 and 13 fields behind
    // it.
    let ticks = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

/// Processor time of this thread in nanoseconds; 0 where the system does not count it.
fn thread_ns() -> u64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    times.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// The file that all measurements move.
struct Served {
    address: SocketAddr,
    file: &'static [u8],
    pin: String,
    load: Arc<ServerLoad>,
}

impl Served {
    /// Seconds of each of [`KINDS`].
    fn round(&self, folder: &Path, cost: &mut FetchCost) -> [f64; KINDS.len()] {
        let plain = folder.join("plain");
        let loopback = seconds(|| read_plainly(self.address, &mut |_| {}));
        let (mut written, mut synced) = (0.0, 0.0);
        remove_after(&plain, |to| {
            synced = seconds(|| {
                written = seconds(|| self.file.chunks(MIB).for_each(|block| to.write_all(block).unwrap()));
                to.sync_all().unwrap();
            });
        });
        let hash = || assert_eq!(hex(Sha256::digest(self.file).as_slice()), self.pin);
        let hashed = seconds(hash);
        let to_disk = |to: &mut File| read_plainly(self.address, &mut |bytes| to.write_all(bytes).unwrap());
        let (mut one_thread, mut together) = (0.0, 0.0);
        remove_after(&plain, |to| one_thread = seconds(|| to_disk(to)));
        remove_after(&plain, |to| {
            together = seconds(|| {
                std::thread::scope(|threads| {
                    threads.spawn(hash);
                    to_disk(to);
                });
            });
        });
        let cache_dir = folder.join("cache");
        let (process, server) = (process_time(), self.load.processor());
        let fetched = seconds(|| self.fetch(&cache_dir));
        cost.elapsed += Duration::from_secs_f64(fetched);
        cost.server += self.load.processor() - server;
        cost.processor += process_time() - process;
        let checked = seconds(|| self.fetch(&cache_dir));
        std::fs::remove_dir_all(cache_dir).unwrap();
        [loopback, written, synced, hashed, one_thread, together, fetched, checked]
    }

    fn fetch(&self, cache_dir: &Path) {
        let settings = StoreSettings {
            cache_dir: cache_dir.to_owned(),
            max_cache_bytes: None,
            environment: Environment::default(),
            limits: FetchLimits::default(),
        };
        let store = Store::open(settings).unwrap();
        let source: Source = format!("http://{}/model.gguf", self.address).parse().unwrap();
        let request = FetchRequest { source: source.remote().unwrap(), files: &[], sha256: Some(&self.pin) };
        store.fetch_blocking(&request, &mut |_| ControlFlow::Continue(())).unwrap();
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn remove_after(path: &Path, work: impl FnOnce(&mut File)) {
    work(&mut File::create(path).unwrap());
    std::fs::remove_file(path).unwrap();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One plain request on one connection.
fn read_plainly(address: SocketAddr, each: &mut dyn FnMut(&[u8])) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /m HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut block = vec![0; MIB];
    loop {
        match stream.read(&mut block).unwrap() {
            0 => return,
            count => each(&block[..count]),
        }
    }
}

/// A server that costs little: a thread for each connection, which writes from memory.
fn serve(file: &'static [u8], load: Arc<ServerLoad>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let load = Arc::clone(&load);
            std::thread::spawn(move || connection(stream.unwrap(), file, &load));
        }
    });
    address
}

/// Answers the requests of a connection until it ends.
fn connection(mut stream: TcpStream, file: &[u8], load: &ServerLoad) {
    let mut pending = Vec::new();
    let mut counted_ns = 0;
    let mut block = [0; 4096];
    loop {
        let end = loop {
            if let Some(end) = pending.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            match stream.read(&mut block) {
                Ok(count) if count > 0 => pending.extend_from_slice(&block[..count]),
                _ => return,
            }
        };
        let head: Vec<u8> = pending.drain(..end).collect();
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let range = head.split("range: bytes=").nth(1).and_then(|rest| rest.split("\r\n").next());
        let range = range.and_then(|range| range.split_once('-'));
        let total = file.len();
        let (status, body) = match range {
            Some((start, last)) => {
                let (start, end) = (start.parse().unwrap(), last.parse::<usize>().unwrap() + 1);
                let status =
                    format!("206 Partial Content\r\ncontent-range: bytes {start}-{}/{total}", end - 1);
                (status, &file[start..end])
            }
            None => ("200 OK".to_owned(), file),
        };
        let head = format!("HTTP/1.1 {status}\r\netag: \"1\"\r\ncontent-length: {}\r\n\r\n", body.len());
        load.answers.fetch_add(1, Ordering::AcqRel);
        let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        let taken_ns = thread_ns();
        load.processor_ns.fetch_add(taken_ns - counted_ns, Ordering::AcqRel);
        counted_ns = taken_ns;
        load.answers.fetch_sub(1, Ordering::AcqRel);
        // The other side closes a connection that it needs no more.
        if sent.is_err() || range.is_none() {
            return;
        }
    }
}
