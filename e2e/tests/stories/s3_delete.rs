//! Deleting a model takes everything with it.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    ask::Ask,
    model::SMOLLM2,
    story::{Story, tell},
    wait::Until,
};

#[tokio::test]
async fn deleting_a_model_removes_every_child() -> Result<()> {
    tell("delete", async |story| {
        // Given: a model that serves, and the objects that were made for it.
        let (models, gateway) = (story.models(), story.gateway().await?);
        models.apply("goner", json!({"source": {"uri": SMOLLM2}})).await?;
        models.ready("goner", 60).await?;
        let ask = Ask::new(&models.full_name("goner"), "Hello", 2);
        gateway.http(&ask).await?;
        let made = labelled(story, "goner").await?;
        for kind in
            ["deployment.apps/", "replicaset.apps/", "pod/", "configmap/", "service/", "serviceaccount/"]
        {
            assert!(made.iter().any(|it| it.starts_with(kind)), "no {kind} among {made:?}");
        }

        // When: it is deleted.
        let deleted = Instant::now();
        models.delete("goner").await?;

        // Then: the gateway knows the name no more, within a second or so.
        let unknown = Until::new("the gateway answers 404", 10);
        unknown
            .asked(|| async {
                let status = gateway.http(&ask).await.err().and_then(|failure| failure.status());
                Ok((status == Some(404)).then_some(()))
            })
            .await?;
        let unrouted = deleted.elapsed();
        eprintln!("the gateway answers 404 {} ms after the deletion", unrouted.as_millis());
        assert!(unrouted < Duration::from_secs(3), "still routed {unrouted:?} after the deletion");

        // And: nothing that carries the model's label is left.
        let gone = Until::new("every child is gone", 45);
        gone.asked(|| async { Ok(labelled(story, "goner").await?.is_empty().then_some(())) }).await?;
        Ok(())
    })
    .await
}

/// Every object of every kind in the story's namespace that carries the model's label.
async fn labelled(story: &Story, model: &str) -> Result<Vec<String>> {
    let kinds = ["api-resources", "--verbs=list", "--namespaced", "--output=name"];
    let kinds: Vec<String> =
        story.cluster.kubectl(&kinds).stdout().await?.lines().map(str::to_owned).collect();
    // Measurements are no objects: a pod that ended is in them for a while.
    let kinds: Vec<String> = kinds.into_iter().filter(|kind| !kind.contains("metrics.k8s.io")).collect();
    let (kinds, label) = (kinds.join(","), format!("serving.trustformers.dev/model={model}"));
    let arguments = ["--namespace", &story.namespace, "get", &kinds, "--selector", &label, "--output=name"];
    let list = story.cluster.kubectl(&arguments).stdout().await?;
    Ok(list.lines().map(str::to_owned).collect())
}
