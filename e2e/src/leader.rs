//! The operator that leads: which pod it is, and its end as when its node is lost.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;

use crate::{cluster::Cluster, process, release, wait::Until};

/// Waits until an operator leads that is not `name`.
///
/// # Errors
/// When none does within a minute.
pub async fn other_than(cluster: &Cluster, name: Option<&str>) -> Result<Pod> {
    let leads = watcher::Config::default().labels("serving.trustformers.dev/leader=true");
    let other = |pods: &[&Pod]| {
        let pod = pods.iter().find(|it| it.metadata.name.as_deref() != name)?;
        Some((*pod).clone())
    };
    Until::new("an operator leads", 60).watched(release::pods(cluster), leads, other).await
}

/// Kills the leader's process and deletes its pod without grace, as when its node is lost. Returns the pod's
/// name.
///
/// # Errors
/// When no operator leads, or its process is not found.
pub async fn kill(cluster: &Cluster) -> Result<String> {
    let leader = other_than(cluster, None).await?;
    let name = leader.metadata.name.clone().context("a pod without a name")?;
    process::kill_hard(process::container_pid(&leader, "operator")?).await?;
    let delete = ["delete", "pod", &name, "--grace-period=0", "--force", "--wait=false"];
    cluster.kubectl(&[&["--namespace", release::NAMESPACE][..], &delete].concat()).stdout().await?;
    Ok(name)
}

/// Deletes the Lease, so that another operator need not wait until it has expired. Its term is above every
/// earlier one all the same.
///
/// # Errors
/// When there is no Lease.
pub async fn delete_lease(cluster: &Cluster) -> Result<()> {
    let delete = ["--namespace", release::NAMESPACE, "delete", "lease", release::OPERATOR];
    cluster.kubectl(&delete).stdout().await.map(drop)
}
