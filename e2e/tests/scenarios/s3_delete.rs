//! Deleting a model takes everything with it.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    model::SMOLLM2,
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

#[tokio::test]
async fn deleting_a_model_removes_every_child() -> Result<()> {
    run("delete", async |scenario| {
        // Given: a model that serves, and the objects that were made for it.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models.apply("goner", json!({"source": {"uri": SMOLLM2}})).await?;
        models.ready("goner", 60).await?;
        let request = Request::new(&models.full_name("goner"), "Hello", 2);
        gateway.http(&request).await?;
        let made = labelled(scenario, "goner").await?;
        for kind in
            ["deployment.apps/", "replicaset.apps/", "pod/", "configmap/", "service/", "serviceaccount/"]
        {
            assert!(made.iter().any(|it| it.starts_with(kind)), "no {kind} among {made:?}");
        }

        // When: it is deleted.
        let deleted = Instant::now();
        models.delete("goner").await?;

        // Then: the name is unknown to the gateway, within a second or so.
        let unknown = Until::new("the gateway answers 404", 10);
        unknown
            .polled(|| async {
                let status = gateway.http(&request).await.err().and_then(|failure| failure.status());
                Ok((status == Some(404)).then_some(()))
            })
            .await?;
        let unrouted = deleted.elapsed();
        eprintln!("the gateway answers 404 {} ms after the deletion", unrouted.as_millis());
        assert!(unrouted < Duration::from_secs(3), "still routed {unrouted:?} after the deletion");

        // And: nothing that carries the model's label is left.
        let gone = Until::new("every child is gone", 45);
        gone.polled(|| async { Ok(labelled(scenario, "goner").await?.is_empty().then_some(())) }).await?;
        Ok(())
    })
    .await
}

/// Every object of every kind in the scenario's namespace that carries the model's label.
async fn labelled(scenario: &Scenario, model: &str) -> Result<Vec<String>> {
    let kinds = ["api-resources", "--verbs=list", "--namespaced", "--output=name"];
    let kinds: Vec<String> =
        scenario.cluster.kubectl(&kinds).stdout().await?.lines().map(str::to_owned).collect();
    // Metrics are no objects: they list a pod for a while after it ended.
    let kinds: Vec<String> = kinds.into_iter().filter(|kind| !kind.contains("metrics.k8s.io")).collect();
    let (kinds, label) = (kinds.join(","), format!("serving.trustformers.dev/model={model}"));
    let arguments =
        ["--namespace", &scenario.namespace, "get", &kinds, "--selector", &label, "--output=name"];
    let list = scenario.cluster.kubectl(&arguments).stdout().await?;
    Ok(list.lines().map(str::to_owned).collect())
}
