//! A registry inside each node, so that kubelet really pulls: the network that carries an image is the one
//! thing that the preloaded images of the test cluster leave out.
//!
//! It listens on loopback *inside* every node's network namespace, because containerd speaks plain HTTP to
//! `localhost` without any configuration. Each published image has a layer with bytes of its own: a node that
//! already holds the same layer would not fetch it again, and nothing would be measured.

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::{SocketAddr, TcpListener},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::command::Invocation;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What may be fetched: content by its digest, and manifests by `name:tag`.
#[derive(Default)]
struct Shelf {
    content: HashMap<String, (&'static str, Bytes)>,
    tags: HashMap<String, String>,
}

/// The registry. It answers as long as this value lives.
pub struct Registry {
    shelf: Arc<Mutex<Shelf>>,
    port: u16,
    _servers: JoinSet<()>,
}

impl Registry {
    /// Listens on loopback of every node; the nodes are named `node1`, `node2` and so on.
    ///
    /// # Errors
    /// When a node's network namespace cannot be entered: that needs root on the nodes' machine.
    pub async fn open(nodes: &[String]) -> Result<Self> {
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let mut servers = JoinSet::new();
        let mut port = 0;
        for node in nodes {
            let number = node
                .strip_prefix("node")
                .with_context(|| format!("node {node} is not of the test cluster"))?;
            let listener = listen_inside(PathBuf::from(format!("/run/netns/tf-n{number}")), port).await?;
            port = listener.local_addr()?.port();
            listener.set_nonblocking(true)?;
            servers.spawn(serve(tokio::net::TcpListener::from_std(listener)?, Arc::clone(&shelf)));
        }
        Ok(Self { shelf, port, _servers: servers })
    }

    /// Publishes an image with this one file at its root, and returns its `oci://` address.
    ///
    /// # Errors
    /// When the file cannot be read or packed.
    pub async fn publish(&self, name: &str, file: &Path) -> Result<String> {
        let layer = pack(file).await?;
        let layer = Blob::new(LAYER, layer);
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
        });
        let config = Blob::new(CONFIG, config.to_string().into());
        let describe =
            |blob: &Blob| json!({"mediaType": blob.kind, "digest": blob.digest, "size": blob.bytes.len()});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": describe(&config), "layers": [describe(&layer)],
        });
        let manifest = Blob::new(MANIFEST, manifest.to_string().into());
        let mut shelf = self.shelf.lock().map_err(|_| anyhow::anyhow!("the registry's task panicked"))?;
        shelf.tags.insert(format!("{name}/1"), manifest.digest.clone());
        for blob in [layer, config, manifest] {
            shelf.content.insert(blob.digest, (blob.kind, blob.bytes));
        }
        Ok(format!("oci://localhost:{}/{name}:1", self.port))
    }
}

struct Blob {
    kind: &'static str,
    digest: String,
    bytes: Bytes,
}

impl Blob {
    fn new(kind: &'static str, bytes: Bytes) -> Self {
        let hex: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { kind, digest: format!("sha256:{hex}"), bytes }
    }
}

/// A tar of `file` and of a note that no other image has.
async fn pack(file: &Path) -> Result<Bytes> {
    let folder = tempfile::tempdir()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    std::fs::write(folder.path().join("note"), format!("{} {now:?}\n", std::process::id()))?;
    let archive = folder.path().join("layer.tar");
    let name = file
        .file_name()
        .and_then(|it| it.to_str())
        .with_context(|| format!("{} has no name", file.display()))?;
    let parent = file.parent().unwrap_or(Path::new("."));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let arguments = [
        "--create".to_owned(),
        format!("--file={}", text(&archive)),
        "--owner=0".to_owned(),
        "--group=0".to_owned(),
        format!("--directory={}", text(parent)),
        name.to_owned(),
        format!("--directory={}", text(folder.path())),
        "note".to_owned(),
    ];
    Invocation::new(Path::new("tar"), arguments).stdout().await?;
    Ok(std::fs::read(&archive)?.into())
}

/// Binds a socket on loopback of another network namespace. A socket stays in the namespace it was made in;
/// the thread that goes there ends, so that none of the runtime's own threads is ever anywhere else.
async fn listen_inside(namespace: PathBuf, port: u16) -> Result<TcpListener> {
    let shown = namespace.display().to_string();
    let thread = std::thread::spawn(move || -> io::Result<TcpListener> {
        let namespace = File::open(namespace)?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port)))
    });
    let listener = tokio::task::spawn_blocking(move || thread.join()).await?;
    let listener = listener.map_err(|_| anyhow::anyhow!("the thread for {shown} panicked"))?;
    listener.with_context(|| {
        format!("could not listen inside {shown}: root and the test cluster's nodes are needed")
    })
}

async fn serve(listener: tokio::net::TcpListener, shelf: Arc<Mutex<Shelf>>) {
    let mut connections = JoinSet::new();
    // Ends with the registry, whose task set holds this task.
    while let Ok((stream, _)) = listener.accept().await {
        let shelf = Arc::clone(&shelf);
        let service = service_fn(move |request: Request<Incoming>| {
            let answer = answer(&shelf, request.uri().path());
            async move { Ok::<_, std::convert::Infallible>(answer) }
        });
        connections.spawn(async move {
            // A client that goes away ends its connection; kubelet reports what it could not fetch.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// `GET` and `HEAD` of the distribution protocol; hyper leaves the body out of the answer to `HEAD`.
fn answer(shelf: &Mutex<Shelf>, path: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    if path == "/v2/" {
        return response;
    }
    let found = shelf.lock().ok().and_then(|shelf| find(&shelf, path));
    let Some((digest, kind, bytes)) = found else {
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    *response.body_mut() = Full::new(bytes);
    response.headers_mut().insert("content-type", hyper::http::HeaderValue::from_static(kind));
    if let Ok(digest) = digest.parse() {
        response.headers_mut().insert("docker-content-digest", digest);
    }
    response
}

fn find(shelf: &Shelf, path: &str) -> Option<(String, &'static str, Bytes)> {
    let path = path.strip_prefix("/v2/")?;
    let (name, reference) = path.split_once("/manifests/").or_else(|| path.split_once("/blobs/"))?;
    let digest = if reference.starts_with("sha256:") {
        reference
    } else {
        shelf.tags.get(&format!("{name}/{reference}"))?
    };
    let (kind, bytes) = shelf.content.get(digest)?;
    Some((digest.to_owned(), kind, bytes.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_published_is_found_by_tag_and_by_digest() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        std::fs::write(&file, "weights").unwrap();
        let registry = Registry { shelf: Arc::default(), port: 5, _servers: JoinSet::new() };
        assert_eq!(registry.publish("m", &file).await.unwrap(), "oci://localhost:5/m:1");

        let (_, kind, manifest) = find(&registry.shelf.lock().unwrap(), "/v2/m/manifests/1").unwrap();
        assert_eq!(kind, MANIFEST);
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let layer = manifest["layers"][0]["digest"].as_str().unwrap();
        let (_, _, bytes) = find(&registry.shelf.lock().unwrap(), &format!("/v2/m/blobs/{layer}")).unwrap();
        assert_eq!(bytes.len(), manifest["layers"][0]["size"]);
        assert!(bytes.windows(7).any(|it| it == b"weights"));
        assert_eq!(answer(&registry.shelf, "/v2/m/manifests/2").status(), StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn no_two_images_share_a_layer() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        std::fs::write(&file, "weights").unwrap();
        assert_ne!(pack(&file).await.unwrap(), pack(&file).await.unwrap());
    }
}
