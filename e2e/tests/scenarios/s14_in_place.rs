//! A new revision is loaded, admitted and taken back within the pods that serve: none of them restarts, and
//! no request fails.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use trustformers_e2e::{
    load::{Outcome, Steady},
    model::{is_ready, status_text},
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

const FIRST: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SECOND: &str = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf";

#[tokio::test]
async fn pods_change_their_model_and_take_it_back_without_a_restart() -> Result<()> {
    run("in-place", async |scenario| {
        // Given: a volume with two models, one of which two pods serve, and clients that send requests.
        let folder = tempfile::tempdir()?;
        let volume = claim(scenario, folder.path()).await?;
        let outcome = change_and_undo(scenario).await;
        volume.delete(&scenario.namespace, &DeleteParams::default()).await?;
        outcome
    })
    .await
}

async fn change_and_undo(scenario: &Scenario) -> Result<()> {
    let (models, gateway) = (scenario.models(), scenario.gateway().await?);
    let spec = json!({
        "source": {"uri": "pvc://weights", "files": [FIRST]},
        "runtime": {"contextTokens": 256},
        "scaling": {"replicas": 2},
        "rollout": {"placement": "InPlace", "steps": [{"weight": 50, "hold": "3s"}], "bake": "10m"},
    });
    models.apply("changing", spec).await?;
    let before = models.ready("changing", 120).await?;
    let (old, digest) = (text(&before, "/stable/revision"), text(&before, "/stable/digest"));
    let pods = uids(scenario).await?;
    ensure!(pods.len() == 2, "two pods were expected: {pods:?}");
    let steady = Steady::start(&gateway, Request::new(&models.full_name("changing"), "Hello", 2), 4)?;

    // When: the spec names the other file. Then: both pods answer with it, and are the same pods.
    models.change("changing", json!({"source": {"files": [SECOND]}})).await?;
    let moved = Until::new("both pods answer with the new revision", 240);
    let promoted = |model: &DynamicObject| {
        let is_new = status_text(model, "/stable/revision") != old;
        (is_ready(model) && is_new && status_text(model, "/rollout/phase") == "Promoted")
            .then(|| model.clone())
    };
    let model = models.until("changing", moved, promoted).await?;
    assert_eq!(text(&model, "/rollout/placement"), "InPlace");
    assert_eq!(text(&model, "/stable/pool"), old);
    assert_ne!(text(&model, "/stable/digest"), digest);
    assert_eq!(uids(scenario).await?, pods);

    // When: somebody takes it back during the bake. Then: the same pods answer with the first one again.
    let new = text(&model, "/stable/revision");
    let undo = json!({"metadata": {"annotations": {"serving.trustformers.dev/undo": new}}});
    models.api.patch("changing", &PatchParams::default(), &Patch::Merge(undo)).await?;
    let back = Until::new("the first revision is the stable one again", 120);
    let undone =
        |model: &DynamicObject| (status_text(model, "/rollout/phase") == "RolledBack").then(|| model.clone());
    let model = models.until("changing", back, undone).await?;
    assert_eq!((text(&model, "/stable/revision"), text(&model, "/stable/digest")), (old, digest));
    assert_eq!(uids(scenario).await?, pods);
    none_failed(&steady.stop().await?);
    Ok(())
}

/// A claim `weights` of the scenario's namespace on a folder of the machine with both models, which pods of
/// any user may read; returns the API of its volume, which has the namespace's name.
async fn claim(scenario: &Scenario, folder: &Path) -> Result<Api<PersistentVolume>> {
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755))?;
    for file in [FIRST, SECOND] {
        let (from, to) = (scenario.cluster.settings.cache.join("models").join(file), folder.join(file));
        std::fs::copy(&from, &to).with_context(|| {
            format!("{} is missing: make models MODELS=\"smollm2 qwen-0.5b\"", from.display())
        })?;
        std::fs::set_permissions(&to, PermissionsExt::from_mode(0o644))?;
    }
    let client = &scenario.cluster.client;
    let size = json!({"storage": "1Gi"});
    let volume: PersistentVolume = serde_json::from_value(json!({
        "metadata": {"name": scenario.namespace},
        "spec": {
            "capacity": size, "accessModes": ["ReadOnlyMany"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": folder, "type": "Directory"},
        },
    }))?;
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "weights"},
        "spec": {
            "accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": scenario.namespace,
            "resources": {"requests": size},
        },
    }))?;
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    volumes.create(&PostParams::default(), &volume).await?;
    let claims = Api::namespaced(client.clone(), &scenario.namespace);
    claims.create(&PostParams::default(), &claim).await?;
    Ok(volumes)
}

/// UIDs of the pods with the restarts of their containers, sorted.
async fn uids(scenario: &Scenario) -> Result<Vec<String>> {
    let pods = scenario.pods().list(&ListParams::default()).await?;
    let describe = |pod: &Pod| {
        let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        let restarts: i32 = containers.map(|container| container.restart_count).sum();
        format!("{} restarted {restarts}", pod.metadata.uid.clone().unwrap_or_default())
    };
    let mut uids: Vec<String> = pods.iter().map(describe).collect();
    uids.sort();
    Ok(uids)
}

fn text(model: &DynamicObject, pointer: &str) -> String {
    status_text(model, pointer).to_owned()
}

fn none_failed(requests: &[Outcome]) {
    let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
    eprintln!("{} requests, none failed", requests.len());
}
