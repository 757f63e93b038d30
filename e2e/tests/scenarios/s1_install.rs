//! Installing the release, upgrading it without a change, removing it and installing it again.

use std::collections::BTreeMap;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::ListParams};
use serde_json::json;
use trustformers_e2e::{model::SMOLLM2, release, request::Request, scenario::run};

#[tokio::test]
async fn an_upgrade_without_a_change_replaces_no_pod() -> Result<()> {
    run("install", async |scenario| {
        // Given: the release is installed (before every scenario), and its pods are listed.
        let pods = release::pods(&scenario.cluster);
        let before = restarts(&pods).await?;
        assert!(before.len() >= 2, "the release has only {before:?}");

        // When: the same chart with the same values is installed once more.
        let output = release::install(&scenario.cluster).await?;

        // Then: Helm reports a deployed release, and no pod was replaced or restarted.
        assert!(output.contains("STATUS: deployed"), "{output}");
        assert_eq!(restarts(&pods).await?, before, "the upgrade replaced pods");

        // And: the gateway is ready, and the definition of the custom resource is established.
        let (status, body) = scenario.gateway().await?.get("/health/ready").await?;
        assert_eq!(status, 200, "{body}");
        let crd =
            ["get", "crd", "inferencemodels.serving.trustformers.dev", "-o", "jsonpath={.status.conditions}"];
        let conditions = scenario.cluster.kubectl(&crd).stdout().await?;
        assert!(conditions.contains(r#""type":"Established""#), "{conditions}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn reinstalling_leaves_models_unchanged() -> Result<()> {
    run("reinstall", async |scenario| {
        // Given: a model that serves.
        let models = scenario.models();
        models.apply("stays", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}})).await?;
        models.ready("stays", 60).await?;
        let request = Request::new(&models.full_name("stays"), "Hello", 2);
        let tokens = scenario.gateway().await?.http(&request).await?.tokens;
        let pods = restarts(&scenario.pods()).await?;

        // When: the release is removed. Then: the model and its pod remain.
        release::uninstall(&scenario.cluster).await?;
        let meanwhile = (restarts(&scenario.pods()).await, models.api.get_opt("stays").await);

        // When: it is installed again, also after a failure above: the scenarios after this one need it.
        release::install(&scenario.cluster).await?;
        assert_eq!(meanwhile.0?, pods, "removing the release touched the model's pods");
        assert!(meanwhile.1?.is_some(), "removing the release deleted the model");

        // Then: the same pod serves, and was not restarted.
        models.ready("stays", 60).await?;
        assert_eq!(scenario.gateway().await?.http(&request).await?.tokens, tokens);
        assert_eq!(restarts(&scenario.pods()).await?, pods, "the new release touched the model's pods");
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
