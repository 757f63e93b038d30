//! How fast a model is fetched, beside what loopback, the disk and one core's sha256 can do. Prints a line
//! for each, and exits with 1 where fetching misses the bar.
//!
//! `cargo run --release -p trustformers-store --example throughput -- [MIB] [FOLDER]`: serves a file from
//! memory on loopback. Each round reads it once plainly, writes as much to the folder, hashes it, and fetches
//! it into a cache there, checked. Medians of the rounds are compared, because a round has all kinds.
#![expect(clippy::unwrap_used, reason = "a measurement that fails ends")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use sha2::{Digest as _, Sha256};
use trustformers_store::{Environment, FetchLimits, FetchRequest, Source, Store, StoreSettings};

const MIB: usize = 1 << 20;
const ROUNDS: usize = 5;
/// What fetching must reach of the slowest of loopback, disk and sha256.
const MIN_SHARE_PERCENT: f64 = 80.0;

/// What each round measures. All but the last two are parts of fetching, one at a time.
const KINDS: [&str; 7] = [
    "loopback, read and dropped",
    "disk, written from memory",
    "disk, written and synced",
    "sha256 on one core",
    "loopback to disk on one thread",
    "fetched: written and checked",
    "in the cache: checked again",
];
/// The parts that the bar compares with: loopback, disk and sha256. Fetching does not sync (its digest tells
/// after a power failure), so the disk counts as written.
const COMPARED: [usize; 3] = [0, 1, 3];
const FETCHED: usize = 5;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(1024, |text| text.parse().unwrap());
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let file: Vec<u8> = (0..mib * MIB).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let file: &'static [u8] = file.leak();
    let served = Served { address: serve(file), pin: hex(Sha256::digest(file).as_slice()), file };
    let mut rates: [Vec<f64>; KINDS.len()] = Default::default();
    for _ in 0..ROUNDS {
        for (rates, seconds) in rates.iter_mut().zip(served.round(folder.path())) {
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
    let limit = COMPARED.into_iter().min_by(|a, b| medians[*a].total_cmp(&medians[*b])).unwrap();
    let share = 100.0 * fetched / medians[limit];
    let is_met = share >= MIN_SHARE_PERCENT;
    let verdict = if is_met { "ok" } else { "MISS" };
    println!("fetched / slowest part ({}): {share:.0} %, need {MIN_SHARE_PERCENT} % {verdict}", KINDS[limit]);
    if is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The file that all measurements move.
struct Served {
    address: SocketAddr,
    file: &'static [u8],
    pin: String,
}

impl Served {
    /// Seconds of each of [`KINDS`].
    fn round(&self, folder: &Path) -> [f64; KINDS.len()] {
        let plain = folder.join("plain");
        let loopback = seconds(|| read_plainly(self.address, &mut |_| {}));
        let (mut written, mut synced) = (0.0, 0.0);
        remove_after(&plain, |to| {
            synced = seconds(|| {
                written = seconds(|| self.file.chunks(MIB).for_each(|block| to.write_all(block).unwrap()));
                to.sync_all().unwrap();
            });
        });
        let hashed = seconds(|| assert_eq!(hex(Sha256::digest(self.file).as_slice()), self.pin));
        let mut to_disk = 0.0;
        remove_after(&plain, |to| {
            to_disk = seconds(|| read_plainly(self.address, &mut |bytes| to.write_all(bytes).unwrap()));
        });
        let cache_dir = folder.join("cache");
        let fetched = seconds(|| self.fetch(&cache_dir));
        let checked = seconds(|| self.fetch(&cache_dir));
        std::fs::remove_dir_all(cache_dir).unwrap();
        [loopback, written, synced, hashed, to_disk, fetched, checked]
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
fn serve(file: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || connection(stream.unwrap(), file));
        }
    });
    address
}

/// Answers the requests of a connection until it ends.
fn connection(mut stream: TcpStream, file: &[u8]) {
    let mut pending = Vec::new();
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
        // The other side closes a connection that it needs no more.
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).is_err() {
            return;
        }
        if range.is_none() {
            return;
        }
    }
}
