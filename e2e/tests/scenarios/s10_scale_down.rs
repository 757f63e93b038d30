//! Where fewer pods are asked for, the one that has a request stays.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{api::ListParams, runtime::watcher};
use serde_json::json;
use trustformers_e2e::{
    load::Streams,
    metrics,
    model::SMOLLM2,
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

/// The annotation by which Kubernetes chooses.
const COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Some seconds of an answer; the operator needs less than one.
const TOKENS: u32 = 900;

#[tokio::test]
async fn the_pod_without_a_request_ends_and_the_other_one_answers_on() -> Result<()> {
    run("scale-down", async |scenario| {
        // Given: a model with two pods, one of which writes a long answer.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "runtime": {"numerics": "exact", "contextTokens": 1024},
            "scaling": {"replicas": 2},
        });
        models.apply("shrinking", spec).await?;
        models.ready("shrinking", 90).await?;
        let request =
            Request::new(&models.full_name("shrinking"), "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024,", TOKENS);
        let mut streams = Streams::open(&gateway, vec![request])?;
        streams.all_started(Duration::from_secs(20)).await?;
        let busy = busy_pod(scenario).await?;

        // When: one pod is asked for. Then: the operator has marked the other one, and that one ends.
        models.change("shrinking", json!({"scaling": {"replicas": 1}})).await?;
        let ends = Until::new("a pod ends", 60);
        let is_ending = |pods: &[&Pod]| {
            let mut ending = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_some());
            ending.next().map(|pod| pod.metadata.clone())
        };
        let ended = ends.watched(scenario.pods(), watcher::Config::default(), is_ending).await?;
        let cost = ended.annotations.unwrap_or_default().get(COST).cloned().unwrap_or_default();
        assert!(cost.starts_with('-'), "the pod that ends has the deletion cost {cost:?}");
        assert_ne!(ended.name.as_ref(), Some(&busy), "the pod with the request ends");

        // And: the answer comes to its end.
        for outcome in streams.ended().await? {
            outcome?;
        }
        models.ready("shrinking", 60).await?;
        Ok(())
    })
    .await
}

/// The only pod that computes a request, by its own metrics.
async fn busy_pod(scenario: &Scenario) -> Result<String> {
    let label = ListParams::default().labels("serving.trustformers.dev/model=shrinking");
    let mut busy = Vec::new();
    for pod in scenario.pods().list(&label).await?.items {
        let name = pod.metadata.name.context("a pod without a name")?;
        let scrape = scenario.cluster.pod_get(&scenario.namespace, &name, "/metrics").await?;
        let running = metrics::sum(&scrape, "trustformers_requests_running");
        if running.with_context(|| format!("pod {name} has no count of requests:\n{scrape}"))? > 0.0 {
            busy.push(name);
        }
    }
    ensure!(busy.len() == 1, "these pods compute the only request: {busy:?}");
    Ok(busy.remove(0))
}
