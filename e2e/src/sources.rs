//! Servers of model sources that pods of the cluster can reach: `e2e/sources/server.py`, which is a hub, a
//! signed S3, a registry and a web server at one address with a certificate of its own.
//!
//! It listens on the address of the first node, inside that node's network namespace: pods of every node have
//! a route there, and nothing outside the test cluster has.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
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
        let sha256: String =
            Sha256::digest(std::fs::read(file)?).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            address: format!("{host}:{}", port.trim()),
            authority: certificate,
            file: name.to_owned(),
            sha256,
            _process: process,
            _folder: folder,
        })
    }
}

/// Makes a certificate of the address, which is its own authority, and its key in `folder`.
async fn certificate(folder: &Path, host: &str) -> Result<String> {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let arguments = [
        "req".to_owned(),
        "-x509".to_owned(),
        "-newkey".to_owned(),
        "ec".to_owned(),
        "-pkeyopt".to_owned(),
        "ec_paramgen_curve:P-256".to_owned(),
        "-nodes".to_owned(),
        "-days".to_owned(),
        "2".to_owned(),
        "-subj".to_owned(),
        "/CN=sources".to_owned(),
        "-addext".to_owned(),
        format!("subjectAltName=IP:{host}"),
        "-addext".to_owned(),
        "basicConstraints=critical,CA:FALSE".to_owned(),
        "-keyout".to_owned(),
        path("tls.key"),
        "-out".to_owned(),
        path("tls.crt"),
    ];
    Invocation::new(Path::new("openssl"), arguments).stdout().await?;
    Ok(std::fs::read_to_string(path("tls.crt"))?)
}
