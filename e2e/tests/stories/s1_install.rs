//! A platform team installs the product, installs it again, and takes it away and brings it back.

use std::collections::BTreeMap;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::ListParams};
use serde_json::json;
use trustformers_e2e::{ask::Ask, model::SMOLLM2, release, story::tell};

#[tokio::test]
async fn helm_installs_and_upgrading_is_harmless() -> Result<()> {
    tell("install", async |story| {
        // Given: the release is installed (every story's beginning), and its pods are known.
        let pods = release::pods(&story.cluster);
        let before = restarts(&pods).await?;
        assert!(before.len() >= 2, "the release has only {before:?}");

        // When: the same chart with the same values is installed once more.
        let said = release::install(&story.cluster).await?;

        // Then: Helm reports a deployed release, and not one pod was replaced or restarted.
        assert!(said.contains("STATUS: deployed"), "{said}");
        assert_eq!(restarts(&pods).await?, before, "the upgrade replaced pods");

        // And: the gateway says of itself that it is ready, and so does the custom resource's definition.
        let (status, body) = story.gateway().await?.get("/health/ready").await?;
        assert_eq!(status, 200, "{body}");
        let crd =
            ["get", "crd", "inferencemodels.serving.trustformers.dev", "-o", "jsonpath={.status.conditions}"];
        let conditions = story.cluster.kubectl(&crd).stdout().await?;
        assert!(conditions.contains(r#""type":"Established""#), "{conditions}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_release_that_comes_back_finds_its_models_as_they_were() -> Result<()> {
    tell("reinstall", async |story| {
        // Given: a model that serves.
        let models = story.models();
        models.apply("stays", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}})).await?;
        models.ready("stays", 60).await?;
        let ask = Ask::new(&models.full_name("stays"), "Hello", 2);
        let tokens = story.gateway().await?.http(&ask).await?.tokens;
        let pods = restarts(&story.pods()).await?;

        // When: the release is removed. Then: the model and its pod are still there.
        release::uninstall(&story.cluster).await?;
        let meanwhile = (restarts(&story.pods()).await, models.api.get_opt("stays").await);

        // When: it is installed again. Whatever was found, the stories after this one need it.
        release::install(&story.cluster).await?;
        assert_eq!(meanwhile.0?, pods, "removing the release touched the model's pods");
        assert!(meanwhile.1?.is_some(), "removing the release deleted the model");

        // Then: the same pod serves, without having been restarted.
        models.ready("stays", 60).await?;
        assert_eq!(story.gateway().await?.http(&ask).await?.tokens, tokens);
        assert_eq!(restarts(&story.pods()).await?, pods, "the new release touched the model's pods");
        Ok(())
    })
    .await
}

/// The pods by name, each with the number of restarts of its containers.
async fn restarts(pods: &Api<Pod>) -> Result<BTreeMap<String, i32>> {
    let count = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|it| it.container_statuses.as_ref());
        statuses.into_iter().flatten().map(|it| it.restart_count).sum()
    };
    let list = pods.list(&ListParams::default()).await?;
    Ok(list.iter().map(|pod| (pod.metadata.name.clone().unwrap_or_default(), count(pod))).collect())
}
