//! Nodes of the test cluster: the daemon that speaks for one, and a node that is emptied.

use anyhow::{Context, Result};

use crate::{cluster::Cluster, process};

/// The pid of the kubelet of `node`, whose name is `node1`, `node2` and so on.
///
/// # Errors
/// When it does not run.
pub fn kubelet(cluster: &Cluster, node: &str) -> Result<u32> {
    let number = node.strip_prefix("node").with_context(|| format!("{node} is not of the test cluster"))?;
    process::daemon_pid(&cluster.settings, &format!("kubelet{number}"))
}

/// Evicts the pods of `node` that the label selects, and lets no other pod start there.
///
/// # Errors
/// When a pod may not be evicted in time.
pub async fn drain(cluster: &Cluster, node: &str, label: &str) -> Result<()> {
    let selector = format!("--pod-selector={label}");
    let drain = ["drain", node, &selector, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=50s"];
    cluster.kubectl(&drain).stdout().await.map(drop)
}

/// Lets pods start on `node` again.
///
/// # Errors
/// When there is no such node.
pub async fn uncordon(cluster: &Cluster, node: &str) -> Result<()> {
    cluster.kubectl(&["uncordon", node]).stdout().await.map(drop)
}
