//! One file of a web server: resume, stalls, damage, and what each refusal is called.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;
use trustformers_store::{Environment, FetchLimits, FetchProgress};

use crate::server::{Fault, Reply, TestServer};
use crate::{LIMITS, NamedContent, Wanted, contents, fetch, noise, sha256, store, store_with, watched};

const SIZE: usize = 1_000_003;

/// Serves one file; the handler gives the fault of each answer by its number.
async fn server(file: Vec<u8>, fault: impl Fn(usize) -> Fault + Send + Sync + 'static) -> TestServer {
    let count = AtomicUsize::new(0);
    TestServer::start(move |received| {
        let reply = Reply::file(received, &file).header("etag", "\"v1\"");
        // The probe for the length is the first.
        reply.fault(fault(count.fetch_add(1, Ordering::SeqCst)))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_comes_in_ranges_over_several_connections() {
    let (file, folder) = (noise(SIZE, 1), tempfile::tempdir().unwrap());
    let server = server(file.clone(), |_| Fault::None).await;
    let limits = FetchLimits { chunk_bytes: 4 << 10, ..LIMITS };
    let store = store_with(folder.path(), Environment::default(), limits);
    let (uri, pin) = (format!("{}/a/my%20model.gguf?sig=secret", server.url()), sha256(&file));
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let (sender, progress) = watch::channel(FetchProgress::default());
    let fetched = watched(&store, wanted, sender).await.unwrap();
    assert!(contents(&fetched) == [NamedContent::new("my model.gguf", &file)]);
    assert_eq!(fetched.digest().as_str(), pin);
    let last = *progress.borrow();
    assert_eq!((last.done_bytes, last.total_bytes), (SIZE as u64, SIZE as u64));
    // The probe's single byte, a first chunk, and ranges of three chunks: the four connections together ask
    // for at most a sixteenth of the file, 15,625 bytes each. The last range has the short rest, too.
    assert_eq!(server.sent_bytes(), SIZE as u64 + 1);
    assert_eq!(server.log().len(), 2 + (SIZE - (4 << 10)) / (3 * (4 << 10)));
    // Its digest is pinned and in the cache, so that nobody is asked.
    let again = fetch(&store, wanted).await.unwrap();
    assert_eq!((again.digest().as_str(), server.sent_bytes()), (pin.as_str(), SIZE as u64 + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_cut_or_stall_go_on_where_they_stopped() {
    for fault in [Fault::Cut(50_000), Fault::Stall(50_000)] {
        let (file, folder) = (noise(SIZE, 2), tempfile::tempdir().unwrap());
        // Every second answer fails in its middle.
        let server = server(file.clone(), move |n| if n % 2 == 1 { fault } else { Fault::None }).await;
        let pin = sha256(&file);
        let uri = format!("{}/m.gguf", server.url());
        let store = store(folder.path(), Environment::default());
        let fetched = fetch(&store, Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() }).await;
        assert!(contents(&fetched.unwrap())[0].bytes == file, "{fault:?}");
        assert_eq!(server.sent_bytes(), SIZE as u64 + 1, "{fault:?}: no byte came twice");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_brings_nothing_ends_after_the_allowed_attempts() {
    for (fault, reason) in [(Fault::Stall(0), "SourceStalled"), (Fault::Cut(0), "SourceInterrupted")] {
        let (file, folder) = (noise(SIZE, 3), tempfile::tempdir().unwrap());
        let pin = sha256(&file);
        let server = server(file, move |n| if n == 0 { Fault::None } else { fault }).await;
        let limits = FetchLimits { stall_timeout: std::time::Duration::from_millis(100), ..LIMITS };
        let store = store_with(folder.path(), Environment::default(), limits);
        let uri = format!("{}/m.gguf", server.url());
        let error = fetch(&store, Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() }).await;
        let error = error.unwrap_err();
        assert_eq!((error.reason(), error.is_transient()), (reason, true), "{error}");
        assert_eq!(server.log().len(), 1 + LIMITS.attempts);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_sends_all_of_it_and_again_after_a_cut() {
    let (file, folder) = (noise(SIZE, 4), tempfile::tempdir().unwrap());
    let (sent, count) = (file.clone(), AtomicUsize::new(0));
    let server = TestServer::start(move |_| {
        let is_cut = count.fetch_add(1, Ordering::SeqCst) == 2;
        Reply::new(200, sent.clone()).fault(if is_cut { Fault::Cut(300_000) } else { Fault::None })
    })
    .await;
    let uri = format!("{}/m.gguf", server.url());
    let store = store(folder.path(), Environment::default());
    let pin = sha256(&file);
    let (sender, progress) = watch::channel(FetchProgress::default());
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let fetched = watched(&store, wanted, sender).await.unwrap();
    assert!(contents(&fetched)[0].bytes == file);
    assert_eq!(progress.borrow().done_bytes, SIZE as u64, "what came twice counts once");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_another_version_are_never_mixed() {
    let (old, new, folder) = (noise(SIZE, 5), noise(SIZE, 6), tempfile::tempdir().unwrap());
    let (served, pin, count) = (new.clone(), sha256(&new), AtomicUsize::new(0));
    let server = TestServer::start(move |received| {
        let is_old = count.fetch_add(1, Ordering::SeqCst) < 3;
        let (file, etag) = if is_old { (&old, "\"old\"") } else { (&served, "\"new\"") };
        Reply::file(received, file).header("etag", etag)
    })
    .await;
    let uri = format!("{}/m.gguf", server.url());
    let store = store(folder.path(), Environment::default());
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let error = fetch(&store, wanted).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("SourceChanged", true), "{error}");
    assert!(contents(&fetch(&store, wanted).await.unwrap())[0].bytes == new);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), Environment::default());
    let pin = "0".repeat(64);
    for (status, reason) in [
        (401, "Unauthorized"),
        (403, "AccessDenied"),
        (404, "SourceNotFound"),
        (429, "SourceBusy"),
        (500, "SourceFailed"),
    ] {
        let server = TestServer::start(move |_| Reply::new(status, "no")).await;
        let uri = format!("{}/m.gguf", server.url());
        let error = fetch(&store, Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() }).await;
        assert_eq!(error.unwrap_err().reason(), reason);
        let is_retried = matches!(status, 429 | 500);
        assert_eq!(server.log().len(), if is_retried { LIMITS.attempts } else { 1 }, "{status}");
    }
    let server = TestServer::start(|received| Reply::file(received, b"model")).await;
    let host = server.host.clone();
    for (uri, pin, reason) in [
        (format!("https://{host}/m"), Some(&pin), "TlsFailed"),
        (format!("http://{host}/m"), None, "UnsupportedSource"),
        (format!("http://{host}/m"), Some(&pin), "DigestMismatch"),
    ] {
        let wanted = Wanted { uri: &uri, sha256: pin.map(String::as_str), ..Wanted::default() };
        assert_eq!(fetch(&store, wanted).await.unwrap_err().reason(), reason, "{uri}");
    }
    drop(server);
    let uri = format!("https://{host}/m");
    let error = fetch(&store, Wanted { uri: &uri, ..Wanted::default() }).await.unwrap_err();
    assert_eq!((error.reason(), error.is_transient()), ("SourceUnreachable", true), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_to_the_server_and_not_into_messages() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|received| match received.header("authorization") {
        Some("Basic dTpwOnE=") => Reply::file(received, b"model"),
        _ => Reply::new(401, ""),
    })
    .await;
    let uri = format!("{}/m", server.url());
    let pin = sha256(b"model");
    let wanted = Wanted { uri: &uri, sha256: Some(&pin), ..Wanted::default() };
    let wrong = Environment::from_variables([("SOURCE_TOKEN", "secret")]);
    let error = fetch(&store(folder.path(), wrong), wanted).await.unwrap_err().to_string();
    assert!(error.contains("SOURCE_TOKEN") && !error.contains("secret"), "{error}");
    let right = Environment::from_variables([("SOURCE_USERNAME", "u"), ("SOURCE_PASSWORD", "p:q")]);
    fetch(&store(folder.path(), right), wanted).await.unwrap();
}
