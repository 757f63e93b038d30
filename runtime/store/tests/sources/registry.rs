//! Artifacts of a registry with a token service: files, archives, images, and damaged layers.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use trustformers_store::Environment;

use crate::server::{Received, Reply, TestServer};
use crate::{NamedContent, Wanted, contents, fetch, noise, sha256, store};

/// Blobs and manifests by their path below `/v2/org/model`.
#[derive(Default, Clone)]
struct Content {
    objects: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// A layer, as a manifest names it.
    fn layer(&mut self, media_type: &str, bytes: &[u8], annotations: &[(&str, &str)]) -> Value {
        let digest = format!("sha256:{}", sha256(bytes));
        self.objects.insert(format!("blobs/{digest}"), bytes.to_vec());
        let annotations: BTreeMap<&str, &str> = annotations.iter().copied().collect();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len(), "annotations": annotations})
    }

    fn manifest(&mut self, reference: &str, content: &Value) -> String {
        let text = content.to_string();
        let digest = format!("sha256:{}", sha256(text.as_bytes()));
        for name in [reference, &digest] {
            self.objects.insert(format!("manifests/{name}"), text.clone().into_bytes());
        }
        digest
    }

    /// A registry whose blobs lie behind a redirect, as in a cloud, and which wants a token.
    async fn serve(self) -> TestServer {
        TestServer::start(move |received: &Received| self.answer(received)).await
    }

    fn answer(&self, received: &Received) -> Reply {
        let host = received.header("host").unwrap();
        if received.path() == "/token" {
            assert!(received.target.contains("scope=repository%3Aorg%2Fmodel%3Apull"), "{}", received.target);
            assert!(received.target.contains("service=registry"), "{}", received.target);
            return match received.header("authorization") {
                Some("Basic dXNlcjpwYXNz") => Reply::new(200, r#"{"token": "t0ken"}"#),
                _ => Reply::new(401, ""),
            };
        }
        if received.header("authorization") != Some("Bearer t0ken") {
            let challenge = format!(
                r#"Bearer realm="http://{host}/token",service="registry",scope="repository:org/model:pull""#
            );
            return Reply::new(401, "").header("www-authenticate", challenge);
        }
        let name = received.path().trim_start_matches("/v2/org/model/").trim_start_matches("/stored/");
        match self.objects.get(name) {
            Some(_) if received.path().starts_with("/v2/org/model/blobs") => {
                Reply::new(307, "").header("location", format!("/stored/{name}"))
            }
            Some(bytes) => Reply::file(received, bytes),
            None => Reply::new(404, ""),
        }
    }
}

fn tar_gz(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&builder.into_inner().unwrap()).unwrap();
    encoder.finish().unwrap()
}

fn login(folder: &std::path::Path, host: &str) -> Environment {
    let auth = BASE64_STANDARD.encode("user:pass");
    let config = json!({"auths": {host: {"auth": auth}}});
    std::fs::write(folder.join(".dockerconfigjson"), config.to_string()).unwrap();
    Environment::default().with_secret_dir(Some(folder.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_archives_of_an_artifact_become_one_model() {
    let (weights, config) = (noise(400_000, 11), br#"{"x": 1}"#);
    let mut content = Content::default();
    let title = "org.cncf.model.filepath";
    let layers = [
        content.layer("application/vnd.cncf.model.weight.v1.raw", &weights, &[(title, "model.safetensors")]),
        content.layer(
            "application/vnd.kitops.modelkit.model.v1.tar+gzip",
            &tar_gz(&[("config.json", config), ("sub/other.txt", b"text")]),
            &[],
        ),
        content.layer("application/vnd.ollama.image.license", b"text", &[]),
    ];
    let pinned = content.manifest("v1", &json!({"schemaVersion": 2, "layers": layers}));
    let other = json!({"digest": format!("sha256:{}", "0".repeat(64)), "platform": {"os": "windows", "architecture": "amd64"}});
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let ours = json!({"digest": pinned, "platform": {"os": "linux", "architecture": architecture}});
    content.manifest("index", &json!({"schemaVersion": 2, "manifests": [other, ours]}));
    let server = content.serve().await;

    let (folder, secret) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = store(folder.path(), login(secret.path(), &server.host));
    let uri = format!("oci://{}/org/model:index", server.host);
    let fetched = fetch(&store, Wanted { uri: &uri, ..Wanted::default() }).await.unwrap();
    let expected =
        [NamedContent::new("config.json", config), NamedContent::new("model.safetensors", &weights)];
    assert!(contents(&fetched) == expected);
    assert_eq!(fetched.version(), Some(pinned.as_str()));

    // The packed layer is not kept beside its files, and nothing comes again.
    let sent = server.sent_bytes();
    let by_digest = format!("oci://{}/org/model@{pinned}", server.host);
    let by_digest = Wanted { uri: &by_digest, files: &["sub/*", "config.json"], ..Wanted::default() };
    let picked = fetch(&store, by_digest).await.unwrap();
    assert!(contents(&picked)[1] == NamedContent::new("sub/other.txt", b"text"));
    assert!(server.sent_bytes() - sent < 2000, "a token and the manifest");
    assert_eq!(std::fs::read_dir(folder.path().join("blobs")).unwrap().count(), 3);
    let asked = server.log().len();
    fetch(&store, by_digest).await.unwrap();
    assert_eq!(server.log().len(), asked, "a digest names the same files for ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_logins_missing_tags_and_damaged_layers_are_told_apart() {
    let mut content = Content::default();
    let title = [("org.opencontainers.image.title", "m.gguf")];
    let layer = content.layer("application/vnd.oci.image.layer.v1.tar", b"model", &title);
    content.manifest("v1", &json!({"layers": [layer]}));
    let outside = [("org.opencontainers.image.title", "../m.gguf")];
    let layer = content.layer("application/x", b"model", &outside);
    content.manifest("outside", &json!({"layers": [layer]}));
    content.objects.insert(format!("blobs/sha256:{}", sha256(b"model")), b"m0del".to_vec());
    let server = content.serve().await;
    let (folder, secret) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stranger = store(folder.path(), Environment::default());
    let store = store(folder.path(), login(secret.path(), &server.host));
    for (store, tag, reason) in [
        (&stranger, "v1", "Unauthorized"),
        (&store, "none", "SourceNotFound"),
        (&store, "outside", "InvalidArtifact"),
    ] {
        let uri = format!("oci://{}/org/model:{tag}", server.host);
        let error = fetch(store, Wanted { uri: &uri, ..Wanted::default() }).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{tag}: {error}");
    }
    let uri = format!("oci://{}/org/model:v1", server.host);
    let error = fetch(&store, Wanted { uri: &uri, ..Wanted::default() }).await.unwrap_err();
    assert_eq!(error.reason(), "DigestMismatch", "{error}");
}
