//! A platform team installs the product, and installs it again.

use anyhow::Result;
use trustformers_e2e::{release, story::tell};

#[tokio::test]
async fn helm_installs_and_upgrading_is_harmless() -> Result<()> {
    tell("install", async |story| {
        // Given: the release is installed (every story's beginning), and its pods are known.
        let before = names_and_restarts(story).await?;
        assert!(!before.is_empty(), "the release has no pods");

        // When: the same chart with the same values is installed once more.
        let said = release::install(&story.cluster).await?;

        // Then: Helm reports a deployed release, and not one pod was replaced or restarted.
        assert!(said.contains("STATUS: deployed"), "{said}");
        assert_eq!(names_and_restarts(story).await?, before, "the upgrade replaced pods");

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

async fn names_and_restarts(story: &trustformers_e2e::story::Story) -> Result<Vec<(String, i32)>> {
    let list = release::pods(&story.cluster).list(&kube::api::ListParams::default()).await?;
    let restarts = |pod: &k8s_openapi::api::core::v1::Pod| {
        let statuses = pod.status.as_ref().and_then(|it| it.container_statuses.as_ref());
        statuses.into_iter().flatten().map(|it| it.restart_count).sum()
    };
    let mut all: Vec<_> =
        list.iter().map(|pod| (pod.metadata.name.clone().unwrap_or_default(), restarts(pod))).collect();
    all.sort();
    Ok(all)
}
