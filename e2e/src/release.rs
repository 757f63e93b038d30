//! The Helm release under test, and the addresses of its gateway.

use anyhow::{Context, Result};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Pod, Service},
};
use kube::{Api, runtime::watcher};
use tokio::sync::OnceCell;

use crate::{cluster::Cluster, gateway::Gateway, wait::Until};

/// Name of the release.
pub const RELEASE: &str = "trustformers";

/// Namespace of the release.
pub const NAMESPACE: &str = "trustformers-system";

/// Name of the operator's Deployment.
pub const OPERATOR: &str = "trustformers-operator";

/// Name of the gateway's Deployment and Service.
pub const GATEWAY: &str = "trustformers-gateway";

/// Installs or upgrades the release with the images under test, and returns Helm's output.
///
/// # Errors
/// When Helm fails, or what it installed does not become ready.
pub async fn install(cluster: &Cluster) -> Result<String> {
    let chart = cluster.settings.chart();
    let tag = format!("image.tag={}", cluster.settings.image_tag);
    let output = cluster
        .helm(&[
            "upgrade",
            "--install",
            RELEASE,
            chart.to_str().context("the checkout's path is not UTF-8")?,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
            "--set-string",
            &tag,
            "--set",
            "gateway.service.type=NodePort",
            "--wait",
            "--timeout",
            "120s",
        ])
        .stdout()
        .await?;
    for name in [OPERATOR, GATEWAY] {
        ready(cluster, name).await?;
    }
    Ok(output)
}

/// Removes the release and waits until its pods have ended.
///
/// # Errors
/// When Helm fails, or a pod stays.
pub async fn uninstall(cluster: &Cluster) -> Result<()> {
    cluster
        .helm(&["uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "120s"])
        .stdout()
        .await?;
    let none = |left: &[&Pod]| left.is_empty().then_some(());
    let ended = Until::new("no pod of the release is left", 100);
    ended.watched(pods(cluster), watcher::Config::default(), none).await
}

/// Installs the release unless this run of the scenarios has done so already.
///
/// # Errors
/// As [`install`].
pub async fn installed(cluster: &Cluster) -> Result<()> {
    static INSTALLED: OnceCell<()> = OnceCell::const_new();
    INSTALLED.get_or_try_init(|| async { install(cluster).await.map(drop) }).await?;
    Ok(())
}

/// Waits until every replica of one of the release's Deployments is available and up to date.
///
/// # Errors
/// When that takes more than a minute.
pub async fn ready(cluster: &Cluster, name: &str) -> Result<()> {
    let deployments = Api::<Deployment>::namespaced(cluster.client.clone(), NAMESPACE);
    let what = format!("every replica of {name} is available");
    Until::new(&what, 60)
        .object(deployments, name, |found| {
            let status = found?.status.as_ref()?;
            let wanted = found?.spec.as_ref()?.replicas.unwrap_or(1);
            let current = status.observed_generation == found?.metadata.generation
                && status.replicas.unwrap_or(0) == wanted
                && status.updated_replicas.unwrap_or(0) == wanted
                && status.available_replicas.unwrap_or(0) == wanted;
            current.then_some(())
        })
        .await
}

/// Sets the number of replicas of one of the release's Deployments.
///
/// # Errors
/// When the API server refuses.
pub async fn scale(cluster: &Cluster, name: &str, replicas: u32) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    cluster.kubectl(&["--namespace", NAMESPACE, "scale", "deployment", name, &replicas]).stdout().await?;
    Ok(())
}

/// Replaces the pods of one of the release's Deployments, as an upgrade does.
///
/// # Errors
/// When the API server refuses, or the new ones do not become ready.
pub async fn replace_pods(cluster: &Cluster, name: &str) -> Result<()> {
    let deployment = format!("deployment/{name}");
    cluster.kubectl(&["--namespace", NAMESPACE, "rollout", "restart", &deployment]).stdout().await?;
    ready(cluster, name).await
}

/// Starts the gateways anew with one more argument, until [`without_fault`].
///
/// # Errors
/// When the API server refuses, or they do not become ready.
pub async fn with_fault(cluster: &Cluster, argument: &str) -> Result<()> {
    let added = serde_json::json!([
        {"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": argument},
    ]);
    let patch = added.to_string();
    let arguments =
        ["--namespace", NAMESPACE, "patch", "deployment", GATEWAY, "--type=json", "--patch", &patch];
    cluster.kubectl(&arguments).stdout().await?;
    ready(cluster, GATEWAY).await
}

/// Starts the gateways anew as they were before [`with_fault`].
///
/// # Errors
/// As [`with_fault`].
pub async fn without_fault(cluster: &Cluster) -> Result<()> {
    let deployment = format!("deployment/{GATEWAY}");
    cluster.kubectl(&["--namespace", NAMESPACE, "rollout", "undo", &deployment]).stdout().await?;
    ready(cluster, GATEWAY).await
}

/// Starts the operator again where a scenario left the cluster without one: those after it need it.
///
/// # Errors
/// When the API server refuses, or the operator does not become ready.
pub async fn restore(cluster: &Cluster) -> Result<()> {
    let deployments = Api::<Deployment>::namespaced(cluster.client.clone(), NAMESPACE);
    let operator = deployments.get_opt(OPERATOR).await?;
    if operator.and_then(|found| found.spec?.replicas) != Some(0) {
        return Ok(());
    }
    scale(cluster, OPERATOR, 1).await?;
    ready(cluster, OPERATOR).await
}

/// The pods of one of the release's Deployments, through its own selector.
#[must_use]
pub fn pods_of(component: &str) -> watcher::Config {
    watcher::Config::default().labels(&format!("app.kubernetes.io/component={component}"))
}

/// The API for the release's pods.
#[must_use]
pub fn pods(cluster: &Cluster) -> Api<Pod> {
    Api::namespaced(cluster.client.clone(), NAMESPACE)
}

/// The gateway at its node ports on every node.
///
/// # Errors
/// When the Service has none, or a node is outside the test cluster's network.
pub async fn gateway(cluster: &Cluster) -> Result<Gateway> {
    let service = Api::<Service>::namespaced(cluster.client.clone(), NAMESPACE).get(GATEWAY).await?;
    let ports = service.spec.and_then(|it| it.ports).unwrap_or_default();
    let node_port = |name: &str| {
        let port = ports.iter().find(|it| it.name.as_deref() == Some(name)).and_then(|it| it.node_port);
        let port = port.with_context(|| format!("Service {GATEWAY} has no node port named {name}"))?;
        u16::try_from(port).with_context(|| format!("node port {port} of {GATEWAY}"))
    };
    let addresses: Vec<String> = cluster.nodes().await?.into_iter().map(|(_, address)| address).collect();
    Gateway::new(&addresses, node_port("http")?, node_port("grpc")?)
}
