//! A server shaped like Hugging Face: revisions, large files behind redirects, refusals.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;
use trustformers_store::Environment;

use crate::server::{Received, Reply, TestServer};
use crate::{Wanted, contents, fetch, noise, sha256, store};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const CONFIG: &[u8] = b"{\"a\": 1}\n";
/// `git hash-object` of [`CONFIG`].
const CONFIG_BLOB: &str = "cb5b2f69babc53f9145b45ad20b9a075d48717ef";

/// The hub and the server that holds its large files.
struct Hugging {
    api: TestServer,
    files: TestServer,
    is_away: Arc<AtomicBool>,
}

/// `damaged` transfers of the weights give other bytes than the list says.
async fn hugging(weights: Vec<u8>, damaged: usize) -> Hugging {
    let digest = sha256(&weights);
    let size = weights.len();
    let count = AtomicUsize::new(0);
    let files = TestServer::start(move |received| {
        assert_eq!(received.header("authorization"), None, "the token is the hub's alone");
        let mut bytes = weights.clone();
        if count.fetch_add(1, Ordering::SeqCst) < damaged {
            bytes[10] ^= 1;
        }
        Reply::file(received, &bytes)
    })
    .await;
    let target = format!("{}/large?signed", files.url());
    let is_away = Arc::new(AtomicBool::new(false));
    let away = Arc::clone(&is_away);
    let api = TestServer::start(move |received: &Received| {
        if away.load(Ordering::SeqCst) {
            return Reply::new(503, "");
        }
        if received.header("authorization") != Some("Bearer t0ken") {
            return Reply::new(401, "").header("x-error-code", "RepoNotFound");
        }
        match received.target.as_str() {
            "/api/models/org/name/revision/main?blobs=true"
            | "/api/models/org/name/revision/refs%2Fpr%2F1?blobs=true"
            | "/api/models/org/name/revision/0123456789abcdef0123456789abcdef01234567?blobs=true" => {
                let siblings = json!([
                    {"rfilename": "README.md", "size": 5, "blobId": "00"},
                    {"rfilename": "config.json", "size": CONFIG.len(), "blobId": CONFIG_BLOB},
                    {"rfilename": "model.safetensors", "size": size, "blobId": "11",
                     "lfs": {"sha256": digest, "size": size, "pointerSize": 134}},
                ]);
                Reply::new(200, json!({"sha": COMMIT, "siblings": siblings}).to_string())
            }
            "/org/name/resolve/0123456789abcdef0123456789abcdef01234567/config.json" => {
                Reply::file(received, CONFIG)
            }
            "/org/name/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors" => {
                Reply::new(302, "").header("location", target.clone())
            }
            "/api/models/org/gated/revision/main?blobs=true" => {
                Reply::new(403, "").header("x-error-code", "GatedRepo")
            }
            _ => Reply::new(404, "").header("x-error-code", "RevisionNotFound"),
        }
    })
    .await;
    Hugging { api, files, is_away }
}

fn environment(servers: &Hugging, token: &str) -> Environment {
    Environment::from_variables([("HF_ENDPOINT", servers.api.url() + "/"), ("HF_TOKEN", token.to_owned())])
}

const MODEL: Wanted<'_> = Wanted { uri: "hf://org/name", revision: None, files: &[], sha256: None };

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_becomes_a_commit_and_every_byte_is_checked() {
    let (weights, folder) = (noise(700_000, 7), tempfile::tempdir().unwrap());
    let servers = hugging(weights.clone(), 0).await;
    let store = store(folder.path(), environment(&servers, "t0ken"));
    let fetched = fetch(&store, MODEL).await.unwrap();
    assert_eq!(fetched.version(), Some(COMMIT));
    let found = contents(&fetched);
    let names: Vec<&str> = found.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["config.json", "model.safetensors"], "the checkpoint, without the page");
    assert!(found[1].bytes == weights && found[0].bytes == CONFIG);
    let lines = format!("{}  config.json\n{}  model.safetensors\n", sha256(CONFIG), sha256(&weights));
    let mut lines: Vec<&str> = lines.split_inclusive('\n').collect();
    lines.sort_unstable();
    assert_eq!(fetched.digest().as_str(), sha256(lines.concat().as_bytes()));

    // Another name for the same commit asks once, and fetches nothing.
    let sent = servers.files.sent_bytes();
    let (asked, branch) = (servers.api.log().len(), Wanted { revision: Some("refs/pr/1"), ..MODEL });
    assert_eq!(fetch(&store, branch).await.unwrap().digest(), fetched.digest());
    assert_eq!((servers.api.log().len(), servers.files.sent_bytes()), (asked + 1, sent));

    // While the hub is away its last state counts, and a commit needs no hub.
    let commit = Wanted { revision: Some(COMMIT), ..MODEL };
    fetch(&store, commit).await.unwrap();
    servers.is_away.store(true, Ordering::SeqCst);
    let asked = servers.api.log().len();
    assert_eq!(fetch(&store, commit).await.unwrap().digest(), fetched.digest());
    assert_eq!(servers.api.log().len(), asked);
    assert_eq!(fetch(&store, MODEL).await.unwrap().version(), Some(COMMIT));
    let other = fetch(&store, Wanted { files: &["*.json"], ..MODEL }).await.unwrap_err();
    assert_eq!(other.reason(), "SourceBusy", "what was never fetched cannot be guessed");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_bytes_are_fetched_once_more_and_then_refused() {
    let weights = noise(50_000, 8);
    for (damaged, reason) in [(1, None), (9, Some("DigestMismatch"))] {
        let folder = tempfile::tempdir().unwrap();
        let servers = hugging(weights.clone(), damaged).await;
        let store = store(folder.path(), environment(&servers, "t0ken"));
        let wanted = Wanted { files: &["*.safetensors"], ..MODEL };
        let fetched = fetch(&store, wanted).await;
        let blobs = std::fs::read_dir(folder.path().join("blobs")).unwrap().count();
        match (fetched, reason) {
            (Ok(fetched), None) => assert!(contents(&fetched)[0].bytes == weights && blobs == 1),
            (Err(error), Some(reason)) => {
                assert_eq!((error.reason(), error.is_transient()), (reason, false), "{error}");
                assert_eq!(blobs, 0);
                assert_eq!(servers.files.log().len(), 2);
            }
            (other, _) => panic!("{damaged}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_has_the_word_of_its_cause() {
    let folder = tempfile::tempdir().unwrap();
    let servers = hugging(noise(10, 9), 0).await;
    let with = |token: &str| store(folder.path(), environment(&servers, token));
    let error = fetch(&with(""), MODEL).await.unwrap_err();
    assert_eq!(error.reason(), "Unauthorized", "without a token the hub does not say whether it exists");
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    for (uri, revision, reason) in [
        ("hf://org/name", Some("none"), "SourceNotFound"),
        ("hf://org/gated", None, "AccessDenied"),
        ("hf://org/name/none.gguf", None, "SourceNotFound"),
    ] {
        let wanted = Wanted { uri, revision, ..Wanted::default() };
        assert_eq!(fetch(&with("t0ken"), wanted).await.unwrap_err().reason(), reason, "{uri}");
    }
    let error = fetch(&with("t0ken"), Wanted { files: &["*.gguf"], ..MODEL }).await.unwrap_err();
    assert_eq!(error.reason(), "ModelFileNotFound");
    assert!(error.to_string().contains("model.safetensors"), "it lists what there is: {error}");
    let one = Wanted { uri: "hf://org/name/config.json", ..Wanted::default() };
    assert_eq!(contents(&fetch(&with("t0ken"), one).await.unwrap())[0].bytes, CONFIG);
}
