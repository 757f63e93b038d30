//! Ports of a pod on loopback, through `kubectl port-forward`: pods have no address that is reachable from
//! outside the cluster.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};
use tonic::transport::{Channel, Endpoint};

use crate::cluster::Cluster;

/// A pod's port for gRPC.
const GRPC_PORT: u16 = 9090;

/// Forwarded ports; they are closed when this value is dropped.
pub struct Forward {
    /// The addresses on loopback, in the order of the pod's ports.
    pub addresses: Vec<String>,
    _kubectl: Child,
    /// Stays open: kubectl prints a line for each connection, and ends where nobody can read it.
    _printed: Lines<BufReader<ChildStdout>>,
}

/// A connection to a pod's gRPC port.
pub struct GrpcForward {
    /// Connected to the pod's port.
    pub channel: Channel,
    _forward: Forward,
}

impl Forward {
    /// Forwards to `ports` of `pod`. kubectl reports that it forwards before it has reached the pod: the
    /// first call may fail and should be retried.
    ///
    /// # Errors
    /// When `kubectl port-forward` does not say within ten seconds that it forwards.
    pub async fn open(cluster: &Cluster, namespace: &str, pod: &str, ports: &[u16]) -> Result<Self> {
        let mut command = Command::new(cluster.settings.bin.join("kubectl"));
        command.args(["--namespace", namespace, "port-forward", &format!("pod/{pod}")]);
        command.args(ports.iter().map(|port| format!(":{port}")));
        command.env("KUBECONFIG", &cluster.settings.kubeconfig);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut kubectl = command.spawn().context("could not start kubectl port-forward")?;
        let stdout = kubectl.stdout.take().context("kubectl has no standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut addresses = vec![None; ports.len()];
        while addresses.contains(&None) {
            let line = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await;
            let line = line.with_context(|| format!("kubectl does not forward to pod {pod}"))??;
            let line = line.with_context(|| format!("kubectl port-forward to {pod} ended"))?;
            let Some(ForwardedPort { local, remote }) = forwarded_port(&line) else { continue };
            let index = ports.iter().position(|port| *port == remote);
            if let Some(address) = index.and_then(|index| addresses.get_mut(index)) {
                *address = Some(format!("127.0.0.1:{local}"));
            }
        }
        let addresses = addresses.into_iter().flatten().collect();
        Ok(Self { addresses, _kubectl: kubectl, _printed: lines })
    }

    /// Connects to the gRPC port of `pod`.
    ///
    /// # Errors
    /// As [`Self::open`], and where nothing listens.
    pub async fn grpc(cluster: &Cluster, namespace: &str, pod: &str) -> Result<GrpcForward> {
        let forward = Self::open(cluster, namespace, pod, &[GRPC_PORT]).await?;
        let address = forward.addresses.first().context("no port was forwarded")?;
        let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
        Ok(GrpcForward { channel, _forward: forward })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct ForwardedPort {
    local: u16,
    remote: u16,
}

fn forwarded_port(line: &str) -> Option<ForwardedPort> {
    let (local, remote) = line.strip_prefix("Forwarding from 127.0.0.1:")?.split_once(" -> ")?;
    Some(ForwardedPort { local: local.parse().ok()?, remote: remote.trim().parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::{ForwardedPort, forwarded_port};

    #[test]
    fn ports_are_read_from_the_output_of_kubectl() {
        let found = forwarded_port("Forwarding from 127.0.0.1:41234 -> 9090");
        assert_eq!(found, Some(ForwardedPort { local: 41234, remote: 9090 }));
        assert_eq!(forwarded_port("Forwarding from [::1]:41234 -> 9090"), None);
        assert_eq!(forwarded_port("error: no such pod"), None);
    }
}
