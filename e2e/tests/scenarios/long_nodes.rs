//! A node that is lost gets no requests, and one that is emptied ends no stream.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, api::ListParams};
use serde_json::json;
use trustformers_e2e::{
    faults::Stopped,
    gateway::Gateway,
    load::Streams,
    metrics,
    model::SMOLLM2,
    node::{drain, kubelet, uncordon},
    release,
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

const LABEL: &str = "serving.trustformers.dev/model=pair";
const GATE: &str = "serving.trustformers.dev/routable";
/// Streams while a node is emptied.
const STREAMS: usize = 6;
/// Long enough that none ends before its pod is evicted.
const TOKENS: u32 = 96;
/// From a node that is not ready to pods that get no requests.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

#[tokio::test]
async fn pods_of_a_lost_node_get_no_requests_and_a_drain_ends_no_stream() -> Result<()> {
    run("nodes", async |scenario| {
        // Given: two pods on two nodes.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 512}, "scaling": {"replicas": 2},
        });
        models.apply("pair", spec).await?;
        models.ready("pair", 90).await?;
        let pods = scenario.pods().list(&ListParams::default().labels(LABEL)).await?.items;
        let nodes: BTreeSet<&str> = pods.iter().filter_map(node_of).collect();
        assert_eq!((pods.len(), nodes.len()), (2, 2), "two pods on {nodes:?}");
        let request = Request::new(&models.full_name("pair"), "2, 4, 8, 16, 32, 64,", TOKENS);

        // When: the kubelet of one stands still, as when the node's network is cut, until it is dropped.
        // The node is not the operator's: what is shown is the end of the pods' routes, not another lead.
        let operators = release::pods(&scenario.cluster)
            .list(&ListParams::default().labels("app.kubernetes.io/component=operator"))
            .await?
            .items;
        let operators: BTreeSet<&str> = operators.iter().filter_map(node_of).collect();
        let lost = pods.iter().find(|pod| node_of(pod).is_some_and(|node| !operators.contains(node)));
        let lost = lost.or(pods.first()).context("no pod")?;
        let node = node_of(lost).context("a pod without a node")?;
        let kubelet = Stopped::process(kubelet(&scenario.cluster, node)?).await?;
        pods_leave(scenario, &gateway, lost, &request).await?;
        drop(kubelet);

        // Then: when it is back, the model is ready with both.
        models.ready("pair", 60).await?;

        // When: that node is emptied while streams run on both. Then: every stream is whole.
        let mut streams = Streams::open(&gateway, vec![request; STREAMS])?;
        streams.all_started(Duration::from_secs(20)).await?;
        let drained = drain(&scenario.cluster, node, LABEL).await;
        uncordon(&scenario.cluster, node).await?;
        drained?;
        for outcome in streams.ended().await? {
            let answer = outcome?;
            ensure!(answer.tokens.len() == usize::try_from(TOKENS)?, "a stream ended early: {answer:?}");
        }
        models.ready("pair", 60).await?;
        Ok(())
    })
    .await
}

/// Waits until the pod's node is not ready, and then for the end of its routes.
async fn pods_leave(scenario: &Scenario, gateway: &Gateway, lost: &Pod, request: &Request) -> Result<()> {
    let (name, node) = (lost.metadata.name.as_deref().unwrap_or_default(), node_of(lost).unwrap_or_default());
    let nodes = Api::<Node>::all(scenario.cluster.client.clone());
    let not_ready = |found: Option<&Node>| {
        let conditions = found?.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().any(|one| one.type_ == "Ready" && one.status != "True").then_some(())
    };
    // The controller manager of the cluster counts a node as lost after 20 s.
    Until::new("the node is not ready", 45).object(nodes, node, not_ready).await?;
    let lost_at = Instant::now();
    let closed = |found: Option<&Pod>| {
        let conditions = found?.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().any(|one| one.type_ == GATE && one.status == "False").then_some(())
    };
    Until::new("the pod's gate is closed", 20).object(scenario.pods(), name, closed).await?;
    let after = lost_at.elapsed();
    eprintln!("the gate closed {} ms after the node was not ready", after.as_millis());
    ensure!(after <= LEAVE_LIMIT, "the gate closed only after {after:?}");

    // Its containers still run, so that its own counter shows that no request comes any more.
    let before = requests_of(scenario, name).await?;
    for _ in 0..10 {
        gateway.http(&Request { max_tokens: 2, ..request.clone() }).await?;
    }
    ensure!(requests_of(scenario, name).await? == before, "pod {name} still gets requests");
    Ok(())
}

/// The requests that a pod has ended, by its own metrics.
async fn requests_of(scenario: &Scenario, pod: &str) -> Result<f64> {
    let scrape = scenario.cluster.pod_get(&scenario.namespace, pod, "/metrics").await?;
    metrics::sum(&scrape, "trustformers_requests_total").context("no metric trustformers_requests_total")
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}
