//! How fast a model is fetched, beside what loopback and the disk of this machine can do.
//!
//! `cargo run --release -p trustformers-store --example throughput -- [MIB] [FOLDER]`: serves a file from
//! memory on loopback, reads it once plainly, writes as much to the folder, then fetches it into a cache
//! there, checked.
#![expect(clippy::unwrap_used, reason = "a measurement that fails ends")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use sha2::{Digest as _, Sha256};
use trustformers_store::{Environment, FetchLimits, FetchRequest, Source, Store, StoreSettings};

const MIB: usize = 1 << 20;
/// Measurements of each kind; the best counts, because other load only makes them worse.
const ROUNDS: usize = 3;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(1024, |text| text.parse().unwrap());
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let file: Vec<u8> = (0..mib * MIB).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let file: &'static [u8] = file.leak();
    let address = serve(file);
    let pin: String = Sha256::digest(file).iter().map(|byte| format!("{byte:02x}")).collect();

    let best = |measure: &dyn Fn(usize) -> f64| (0..ROUNDS).map(measure).fold(0.0, f64::max);
    let rate = |start: Instant| mib as f64 / start.elapsed().as_secs_f64();
    let loopback = best(&|_| {
        let start = Instant::now();
        read_plainly(address, &mut |_| {});
        rate(start)
    });
    let loopback_to_disk = best(&|round| {
        let mut to = std::fs::File::create(folder.path().join(format!("plain-{round}"))).unwrap();
        let start = Instant::now();
        read_plainly(address, &mut |bytes| to.write_all(bytes).unwrap());
        let rate = rate(start);
        std::fs::remove_file(folder.path().join(format!("plain-{round}"))).unwrap();
        rate
    });
    let fetched = best(&|round| {
        let cache_dir = folder.path().join(format!("cache-{round}"));
        let settings = StoreSettings {
            cache_dir: cache_dir.clone(),
            max_cache_bytes: None,
            environment: Environment::default(),
            limits: FetchLimits::default(),
        };
        let store = Store::open(settings).unwrap();
        let source: Source = format!("http://{address}/model.gguf").parse().unwrap();
        let request = FetchRequest { source: source.remote().unwrap(), files: &[], sha256: Some(&pin) };
        let start = Instant::now();
        store.fetch_blocking(&request, &mut |_| ControlFlow::Continue(())).unwrap();
        let rate = rate(start);
        std::fs::remove_dir_all(cache_dir).unwrap();
        rate
    });
    println!("loopback, read and dropped:  {loopback:8.0} MiB/s");
    println!("loopback, written to disk:   {loopback_to_disk:8.0} MiB/s");
    println!(
        "fetched, written and hashed: {fetched:8.0} MiB/s = {:.0} % of the line before",
        100.0 * fetched / loopback_to_disk
    );
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
