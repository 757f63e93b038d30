//! One cache for several processes: one transfer, resume after a kill, damage, room.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use trustformers_store::{Environment, FetchPhase, FetchProgress};

use crate::server::{Fault, Reply, TestServer};
use crate::{LIMITS, Wanted, contents, fetch, noise, sha256, store, watched};

const SIZE: usize = 4 << 20;
/// Where the answers stop until the test lets them go on.
const STOP: u64 = 3 << 20;
const LONGEST: Duration = Duration::from_secs(60);

/// A server whose answers all stop at [`STOP`] bytes while `is_held`.
async fn server(file: Vec<u8>, is_held: Arc<AtomicBool>) -> TestServer {
    TestServer::start(move |received| {
        let fault = if is_held.load(Ordering::SeqCst) { Fault::StallAll(STOP) } else { Fault::None };
        Reply::file(received, &file).header("etag", "\"v1\"").fault(fault)
    })
    .await
}

/// Bytes of complete chunks, by the journal of the only transfer.
fn journalled_bytes(cache: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(cache.join("partial")) else { return 0 };
    let mut journals = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let journal = journals.find(|path| path.extension().is_some_and(|end| end == "journal"));
    let content = journal.and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
    content.iter().skip(16).filter(|byte| **byte == 1).count() as u64 * LIMITS.chunk_bytes
}

/// Waits for a condition of the file system.
async fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONGEST, "the condition never came true");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_share_a_cache_fetch_once() {
    let (file, folder) = (noise(SIZE, 31), tempfile::tempdir().unwrap());
    let is_held = Arc::new(AtomicBool::new(true));
    let server = server(file.clone(), Arc::clone(&is_held)).await;
    let (uri, pin) = (format!("{}/m.gguf", server.url()), sha256(&file));
    let limits =
        trustformers_store::FetchLimits { stall_timeout: Duration::from_secs(2), attempts: 9, ..LIMITS };
    // Two stores have two views of the directory, as two processes do.
    let stores = [0, 1].map(|_| crate::store_with(folder.path(), Environment::default(), limits));
    let senders = [0, 1].map(|_| watch::channel(FetchProgress::default()).0);
    let watchers = senders.each_ref().map(watch::Sender::subscribe);
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let [first, second] = senders;
    let watching = async {
        // One of them waits, and shows what the other one has.
        let is_waiting = |watcher: &watch::Receiver<FetchProgress>| {
            let progress = *watcher.borrow();
            progress.phase == FetchPhase::Waiting && progress.done_bytes > 0
        };
        until(|| watchers.iter().any(is_waiting)).await;
        is_held.store(false, Ordering::SeqCst);
    };
    let (one, two, ()) =
        tokio::join!(watched(&stores[0], wanted, first), watched(&stores[1], wanted, second), watching);
    let (one, two) = (one.unwrap(), two.unwrap());
    assert!(contents(&one)[0].bytes == file && contents(&two)[0].bytes == file);
    for watcher in watchers {
        assert_eq!(watcher.borrow().done_bytes, SIZE as u64);
    }
    // Each asks for the length; the held answers were asked for again where they had stopped.
    let sent = server.sent_bytes();
    assert!((SIZE as u64..=SIZE as u64 + 2).contains(&sent), "{sent}");
}

/// What the killed process does: this test itself, started with these variables.
const CHILD_URI: &str = "STORE_TEST_CHILD_URI";
const CHILD_CACHE: &str = "STORE_TEST_CHILD_CACHE";

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_leaves_its_chunks_to_the_next() {
    let file = noise(SIZE, 32);
    let pin = sha256(&file);
    if let (Ok(uri), Ok(cache)) = (std::env::var(CHILD_URI), std::env::var(CHILD_CACHE)) {
        let store = crate::store_with(
            Path::new(&cache),
            Environment::default(),
            trustformers_store::FetchLimits { stall_timeout: LONGEST, ..LIMITS },
        );
        let ended = fetch(&store, Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() }).await;
        panic!("the server holds its answers, and this ended: {ended:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let is_held = Arc::new(AtomicBool::new(true));
    let server = server(file.clone(), Arc::clone(&is_held)).await;
    let uri = format!("{}/m.gguf", server.url());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["cache::a_killed_process_leaves_its_chunks_to_the_next", "--exact"])
        .env(CHILD_URI, &uri)
        .env(CHILD_CACHE, folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until(|| server.sent_bytes() >= STOP && journalled_bytes(folder.path()) >= STOP / 2).await;
    child.kill().unwrap();
    child.wait().unwrap();
    is_held.store(false, Ordering::SeqCst);
    let (there, sent) = (journalled_bytes(folder.path()), server.sent_bytes());
    let store = store(folder.path(), Environment::default());
    let fetched = fetch(&store, Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() }).await.unwrap();
    assert!(contents(&fetched)[0].bytes == file);
    // The length is asked for again, and not one complete chunk.
    assert_eq!(server.sent_bytes() - sent, SIZE as u64 - there + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_is_dropped_goes_on_where_it_stopped() {
    let (file, folder) = (noise(SIZE, 33), tempfile::tempdir().unwrap());
    let is_held = Arc::new(AtomicBool::new(true));
    let server = server(file.clone(), Arc::clone(&is_held)).await;
    let (uri, pin) = (format!("{}/m.gguf", server.url()), sha256(&file));
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let limits = trustformers_store::FetchLimits { stall_timeout: LONGEST, ..LIMITS };
    let held = crate::store_with(folder.path(), Environment::default(), limits);
    tokio::select! {
        ended = fetch(&held, wanted) => panic!("the server holds its answers: {ended:?}"),
        () = until(|| server.sent_bytes() >= STOP && journalled_bytes(folder.path()) >= STOP / 2) => {}
    }
    is_held.store(false, Ordering::SeqCst);
    // Its connections end with it; whoever had the lock is gone once they have.
    let (sender, progress) = watch::channel(FetchProgress::default());
    let fetched = watched(&held, wanted, sender).await.unwrap();
    assert!(contents(&fetched)[0].bytes == file);
    assert!(server.sent_bytes() < (SIZE + (SIZE / 2)) as u64, "{}", server.sent_bytes());
    assert_eq!(progress.borrow().done_bytes, SIZE as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_damaged_on_the_volume_is_fetched_again() {
    let (file, folder) = (noise(100_000, 34), tempfile::tempdir().unwrap());
    let server = server(file.clone(), Arc::new(AtomicBool::new(false))).await;
    let (uri, pin) = (format!("{}/m.gguf", server.url()), sha256(&file));
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let store = store(folder.path(), Environment::default());
    let path = fetch(&store, wanted).await.unwrap().resolved().files()[0].path.clone();
    let mut damaged = file.clone();
    damaged[77] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert!(contents(&fetch(&store, wanted).await.unwrap())[0].bytes == file);
    assert_eq!(server.sent_bytes(), 2 * (file.len() as u64 + 1));
}
