//! Manual changes of what the operator owns are reverted, and causes that are only in Events reach the
//! status.

use anyhow::{Context, Result};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Service};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{SMOLLM2, condition, status_text},
    scenario::{Scenario, run},
    wait::Until,
};

const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

#[tokio::test]
async fn manual_changes_are_reverted() -> Result<()> {
    run("repair", async |scenario| {
        // Given: a stopped model, which has all its objects and no pod.
        let models = scenario.models();
        models.apply("fixed", json!({"source": {"uri": SMOLLM2}, "scaling": {"replicas": 0}})).await?;
        let stopped = Until::new("the model is stopped", 30);
        models
            .until("fixed", stopped, |model| (status_text(model, "/phase") == "Stopped").then_some(()))
            .await?;

        // When: somebody sets a variable. Then: it is removed.
        let deployments = Api::<Deployment>::namespaced(scenario.cluster.client.clone(), &scenario.namespace);
        let all = deployments.list(&ListParams::default()).await?;
        let pool = all.items.first().context("the model has no Deployment")?.name_any();
        kubectl(scenario, &["set", "env", &format!("deployment/{pool}"), "A=B"]).await?;
        let removed = Until::new("the variable is removed", 15);
        removed.polled(|| async { Ok(has_no_env(&deployments.get(&pool).await?).then_some(())) }).await?;

        // When: somebody changes the label by which the operator watches the Service. Then: it is changed
        // back.
        let label = format!("{MANAGED_BY}=somebody");
        kubectl(scenario, &["label", "service", "fixed", &label, "--overwrite"]).await?;
        let services = Api::<Service>::namespaced(scenario.cluster.client.clone(), &scenario.namespace);
        let restored = Until::new("the label is restored", 15);
        restored
            .polled(|| async {
                let service = services.get("fixed").await?;
                let label = service.labels().get(MANAGED_BY).map(String::as_str);
                Ok((label == Some("trustformers-operator")).then_some(()))
            })
            .await?;

        // When: somebody edits the status. Then: the operator writes it again.
        let patch = r#"{"status": {"phase": "Ready", "readyReplicas": 5}}"#;
        kubectl(
            scenario,
            &["patch", "inferencemodel", "fixed", "--subresource=status", "--type=merge", "--patch", patch],
        )
        .await?;
        let repaired = Until::new("the status is repaired", 15);
        let is_repaired = |model: &kube::api::DynamicObject| {
            let ready = model.data.pointer("/status/readyReplicas").and_then(Value::as_i64);
            (status_text(model, "/phase") == "Stopped" && ready == Some(0)).then(|| model.clone())
        };
        let model = models.until("fixed", repaired, is_repaired).await?;
        let degraded = condition(&model, "Degraded").context("no condition Degraded")?;
        assert_eq!(degraded.status, "False", "{degraded:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_volume_that_cannot_be_mounted_is_reported() -> Result<()> {
    run("mount", async |scenario| {
        // Given: a claim on a volume that is a file instead of a directory.
        let volume = format!("{}-file", scenario.namespace);
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}, "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "storageClassName": "none",
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": "/etc/hostname", "type": "Directory"}}},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "weights"}, "spec": {
                "accessModes": ["ReadOnlyMany"], "storageClassName": "none", "volumeName": volume,
                "resources": {"requests": {"storage": "1Gi"}}}},
        ]});
        let apply = ["--namespace", &scenario.namespace, "apply", "--filename=-"];
        scenario.cluster.kubectl(&apply).input(objects.to_string()).stdout().await?;

        // When: a model uses it. Then: the status has kubelet's reason, which is in Events only.
        let models = scenario.models();
        models.apply("unmounted", json!({"source": {"uri": "pvc://weights"}})).await?;
        let reported = Until::new("the model reports the mount failure", 45);
        let failed = |model: &_| condition(model, "Degraded").filter(|it| it.reason == "FailedMount");
        let found = models.until("unmounted", reported, failed).await;
        scenario.cluster.kubectl(&["delete", "persistentvolume", &volume, "--wait=false"]).stdout().await?;
        let degraded = found?;
        assert!(degraded.message.contains("/etc/hostname"), "{degraded:?}");
        Ok(())
    })
    .await
}

async fn kubectl(scenario: &Scenario, arguments: &[&str]) -> Result<()> {
    let all = [&["--namespace", scenario.namespace.as_str()][..], arguments].concat();
    scenario.cluster.kubectl(&all).stdout().await?;
    Ok(())
}

fn has_no_env(deployment: &Deployment) -> bool {
    let pod = deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    pod.is_some_and(|pod| pod.containers.iter().all(|one| one.env.as_ref().is_none_or(Vec::is_empty)))
}
