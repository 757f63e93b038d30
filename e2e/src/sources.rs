//! Servers of model sources that pods of the cluster can reach: `e2e/sources/server.py`, which is a hub, a
//! signed S3, a registry and a web server at one address with a certificate of its own.
//!
//! It listens on the address of the first node, inside that node's network namespace: pods of every node have
//! a route there, and nothing outside the test cluster has.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::{cluster::Cluster, command::Invocation};

/// The network namespace of the first node, as `e2e/cluster/lan.sh` makes it.
const NAMESPACE: &str = "/run/netns/tf-n1";
/// Hashing the file that it serves takes less than a second.
const START_LIMIT: Duration = Duration::from_secs(30);

/// The credentials that the server takes, as a Secret has them.
pub const S3_KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")];
/// Of the hub.
pub const HUGGING_FACE_TOKEN: (&str, &str) = ("HF_TOKEN", "t0ken");
/// Of the registry.
pub const REGISTRY_LOGIN: [(&str, &str); 2] = [("SOURCE_USERNAME", "user"), ("SOURCE_PASSWORD", "pass")];

/// What the server has sent of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Requests that came.
    pub requests: u64,
    /// Bytes of the bodies of their answers.
    pub bytes: u64,
}

/// The server. It answers as long as this value lives.
pub struct SourceServer {
    /// Host and port, as pods reach it.
    pub address: String,
    /// The certificate authority that its certificate is of, as PEM.
    pub authority: String,
    /// The name of the file that it serves.
    pub file: String,
    /// The file's sha256.
    pub sha256: String,
    /// The file's length.
    pub bytes: u64,
    _process: Child,
    _folder: TempDir,
}

impl SourceServer {
    /// Starts it with one file.
    ///
    /// # Errors
    /// When Python, openssl or the first node is missing.
    pub async fn start(cluster: &Cluster, file: &Path) -> Result<Self> {
        let nodes = cluster.nodes().await?;
        let (_, host) = nodes.into_iter().next().context("the cluster has no node")?;
        let folder = tempfile::tempdir()?;
        let certificate = certificate(folder.path(), &host).await?;
        let script = cluster.settings.repository.join("e2e/sources/server.py");
        let mut process = Command::new("nsenter")
            .arg(format!("--net={NAMESPACE}"))
            .arg("python3")
            .arg(&script)
            .arg(file)
            .args(["--address", &host, "--certificate"])
            .arg(folder.path().join("tls.crt"))
            .arg("--key")
            .arg(folder.path().join("tls.key"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("could not start nsenter: root and the test cluster's nodes are needed")?;
        let output = process.stdout.take().context("the server has no output")?;
        let mut port = String::new();
        let mut lines = BufReader::new(output);
        let reading = lines.read_line(&mut port);
        let shown = script.display();
        tokio::time::timeout(START_LIMIT, reading)
            .await
            .with_context(|| format!("{shown} did not listen within {START_LIMIT:?}"))??;
        if port.trim().is_empty() {
            bail!("{shown} ended before it listened; its error is above");
        }
        let name = file.file_name().and_then(|name| name.to_str()).context("the file has no name")?;
        let content = std::fs::read(file)?;
        let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            address: format!("{host}:{}", port.trim()),
            authority: certificate,
            file: name.to_owned(),
            sha256,
            bytes: content.len() as u64,
            _process: process,
            _folder: folder,
        })
    }

    /// What was sent of a path, such as `/files/NAME`.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn sent(&self, path: &str) -> Result<Sent> {
        let counts: Value = serde_json::from_str(&self.request("GET", "/counts").await?)?;
        let of = |what: &str| counts[path][what].as_u64().unwrap_or(0);
        Ok(Sent { requests: of("requests"), bytes: of("bytes") })
    }

    /// Lets the transfers of `/held/NAME` go on.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn release(&self) -> Result<()> {
        self.request("POST", "/release").await.map(drop)
    }

    async fn request(&self, method: &str, path: &str) -> Result<String> {
        let url = format!("https://{}{path}", self.address);
        // Its certificate is made anew with each server, and says nothing here.
        let options =
            ["--silent", "--show-error", "--fail", "--insecure", "--noproxy", "*", "--max-time", "20"];
        let arguments = options.into_iter().chain(["--request", method, &url]);
        Invocation::new(Path::new("curl"), arguments).stdout().await
    }
}

/// Makes a certificate of the address, which is its own authority, and its key in `folder`.
async fn certificate(folder: &Path, host: &str) -> Result<String> {
    let address = format!("subjectAltName=IP:{host}");
    let [key, written] = ["tls.key", "tls.crt"].map(|name| folder.join(name));
    let fixed = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=sources \
                 -addext basicConstraints=critical,CA:FALSE";
    let words = fixed.split_whitespace().chain(["-addext", &address]).map(OsStr::new);
    let files = [OsStr::new("-keyout"), key.as_os_str(), OsStr::new("-out"), written.as_os_str()];
    Invocation::new(Path::new("openssl"), words.chain(files)).stdout().await?;
    Ok(std::fs::read_to_string(written)?)
}
