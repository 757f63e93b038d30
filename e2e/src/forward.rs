//! A pod's gRPC port on loopback, through `kubectl port-forward`: pods have no address that is reachable from
//! outside the cluster.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};
use tonic::transport::{Channel, Endpoint};

use crate::cluster::Cluster;

/// A forwarded port; it is closed when this value is dropped.
pub struct Forward {
    /// Connected to the pod's port.
    pub channel: Channel,
    _kubectl: Child,
}

impl Forward {
    /// Forwards to the gRPC port of `pod`. kubectl reports that it forwards before it has reached the pod:
    /// the first call may fail and should be retried.
    ///
    /// # Errors
    /// When `kubectl port-forward` does not say within ten seconds that it forwards.
    pub async fn grpc(cluster: &Cluster, namespace: &str, pod: &str) -> Result<Self> {
        let mut command = Command::new(cluster.settings.bin.join("kubectl"));
        command.args(["--namespace", namespace, "port-forward", &format!("pod/{pod}"), ":9090"]);
        command.env("KUBECONFIG", &cluster.settings.kubeconfig);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut kubectl = command.spawn().context("could not start kubectl port-forward")?;
        let stdout = kubectl.stdout.take().context("kubectl has no standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        let first = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await;
        let first =
            first.with_context(|| format!("kubectl does not forward to pod {pod}"))??.unwrap_or_default();
        let port = forwarded_port(&first)
            .with_context(|| format!("kubectl port-forward to {pod} printed '{first}'"))?;
        let channel = Endpoint::from_shared(format!("http://127.0.0.1:{port}"))?.connect().await?;
        Ok(Self { channel, _kubectl: kubectl })
    }
}

fn forwarded_port(line: &str) -> Option<u16> {
    line.strip_prefix("Forwarding from 127.0.0.1:")?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::forwarded_port;

    #[test]
    fn the_port_is_read_from_the_output_of_kubectl() {
        assert_eq!(forwarded_port("Forwarding from 127.0.0.1:41234 -> 9090"), Some(41234));
        assert_eq!(forwarded_port("error: no such pod"), None);
    }
}
