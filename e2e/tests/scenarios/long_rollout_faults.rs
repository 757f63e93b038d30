//! Rollouts go on after every kind of interruption: an operator that is killed in each phase, weights that
//! are broken, a process that crashes, and gateways that cannot authenticate.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom, Write};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Node, Pod},
};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use trustformers_e2e::{
    leader,
    load::{Outcome, Steady},
    model::{Models, SMOLLM2, condition, conditions, is_ready, status_text},
    process,
    registry::Registry,
    release::{self, GATEWAY, OPERATOR},
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

/// Phases in which a killed operator is interesting: each is left by what the operator does.
const PHASES: [&str; 6] = ["Placing", "Loading", "Shifting", "Verifying", "Promoted", "RollingBack"];
/// A resource that nodes have as many of as a scenario says, as they have GPUs.
const ACCELERATOR: &str = "scenarios.trustformers.dev/accelerator";
const REVISION: &str = "serving.trustformers.dev/revision";
const UNDO: &str = "serving.trustformers.dev/undo";

#[tokio::test]
async fn an_operator_that_is_killed_in_each_phase_is_followed_by_one_that_goes_on() -> Result<()> {
    run("killed-leader", async |scenario| {
        // Given: two operators, a model that serves, and clients that send it requests.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 512},
            "rollout": {"placement": "Surge", "steps": [{"weight": 50, "hold": "1s"}], "bake": "10m"},
        });
        models.apply("moving", spec).await?;
        let old = stable(&models.ready("moving", 60).await?);
        let steady = Steady::start(&gateway, Request::new(&models.full_name("moving"), "Hello", 2), 2)?;
        release::scale(&scenario.cluster, OPERATOR, 2).await?;
        let outcome = kill_in_each_phase(scenario, &models, &old).await;
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        let killed = outcome?;

        // Then: the model has its first revision again, and no request failed.
        eprintln!("killed in {killed:?}");
        for phase in ["Shifting", "Promoted", "RollingBack"] {
            ensure!(killed.contains(phase), "no operator was killed in {phase}: {killed:?}");
        }
        none_failed(&steady.stop().await?);
        Ok(())
    })
    .await
}

/// Changes the model, takes the change back while it bakes, and kills the leader when it enters a phase.
/// Returns the phases.
async fn kill_in_each_phase(scenario: &Scenario, models: &Models, old: &str) -> Result<BTreeSet<String>> {
    release::ready(&scenario.cluster, OPERATOR).await?;
    models.change("moving", json!({"runtime": {"contextTokens": 256}})).await?;
    let mut killed = BTreeSet::new();
    let mut undone = false;
    loop {
        let next = Until::new("the rollout enters another phase, or ends", 60);
        let model = models
            .until("moving", next, |model| {
                let phase = status_text(model, "/rollout/phase");
                let is_new = PHASES.contains(&phase) && !killed.contains(phase);
                (is_new || phase == "RolledBack").then(|| model.clone())
            })
            .await?;
        let phase = status_text(&model, "/rollout/phase").to_owned();
        if phase == "RolledBack" {
            ensure!(undone && stable(&model) == old, "it ended too early: {killed:?}");
            return Ok(killed);
        }
        let name = leader::kill(&scenario.cluster).await?;
        leader::delete_lease(&scenario.cluster).await?;
        killed.insert(phase.clone());
        if phase == "Promoted" {
            ensure!(stable(&model) != old, "the new revision is not the stable one");
            let undo = json!({"metadata": {"annotations": {UNDO: stable(&model)}}});
            models.api.patch("moving", &PatchParams::default(), &Patch::Merge(undo)).await?;
            undone = true;
        }
        leader::other_than(&scenario.cluster, Some(&name)).await?;
    }
}

#[tokio::test]
async fn broken_weights_and_silent_gateways_end_no_pod_that_serves() -> Result<()> {
    run("rollout-faults", async |scenario| {
        // Given: a model that serves, and clients that send it requests.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models.apply("staying", json!({"source": {"uri": SMOLLM2}})).await?;
        let old = stable(&models.ready("staying", 60).await?);
        let pod = only_pod(scenario).await?;
        let steady = Steady::start(&gateway, Request::new(&models.full_name("staying"), "Hello", 2), 3)?;

        // When: the spec names weights that are no numbers. Then: the revision is rolled back by itself, and
        // the status says why.
        let nodes: Vec<String> = scenario.cluster.nodes().await?.into_iter().map(|(name, _)| name).collect();
        let registry = Registry::open(&nodes).await?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("broken.gguf");
        break_weights(scenario, &file)?;
        let broken = registry.publish("broken", &file).await?;
        models.change("staying", json!({"source": {"uri": broken}})).await?;
        let model = rolled_back(&models, "staying").await?;
        assert_eq!(stable(&model), old);
        let healthy = condition(&model, "RolloutHealthy").context("no condition RolloutHealthy")?;
        assert_eq!((healthy.status.as_str(), healthy.reason.as_str()), ("False", "NotFinite"));
        models.change("staying", json!({"source": {"uri": SMOLLM2}})).await?;
        models.ready("staying", 30).await?;

        // When: a revision crashes whenever it has started. Then: it is rolled back by itself, too.
        models.change("staying", json!({"runtime": {"contextTokens": 128}})).await?;
        assert_eq!(stable(&crashes(scenario, &models, &old).await?), old);
        models.change("staying", json!({"runtime": {"contextTokens": null}})).await?;
        models.ready("staying", 30).await?;
        none_failed(&steady.stop().await?);

        // When: every gateway is replaced by one with another account, and the model is changed.
        let outcome = with_wrong_account(scenario, &models, &pod).await;
        account(scenario, GATEWAY, "RollingUpdate").await?;
        release::ready(&scenario.cluster, GATEWAY).await?;
        outcome?;

        // Then: when gateways authenticate again, the rollout ends well.
        let moved = Until::new("the new revision serves", 60);
        let done = |model: &DynamicObject| (is_ready(model) && stable(model) != old).then_some(());
        models.until("staying", moved, done).await?;
        Ok(())
    })
    .await
}

/// Kills the processes of other revisions than `old` until the model says that its revision crashes.
async fn crashes(scenario: &Scenario, models: &Models, old: &str) -> Result<DynamicObject> {
    let is_other = |pod: &Pod| pod.labels().get(REVISION).is_some_and(|revision| revision != old);
    // Kubelet waits for 10 s before the second restart, and for 20 s before the third.
    let refused = Until::new("the crashing revision is rolled back", 90);
    refused
        .polled(|| async {
            let model = models.api.get("staying").await?;
            let (phase, reason) =
                (status_text(&model, "/rollout/phase"), status_text(&model, "/rollout/reason"));
            if (phase, reason) == ("RolledBack", "Crashing") {
                return Ok(Some(model));
            }
            let pods = scenario.pods().list(&ListParams::default()).await?;
            for pod in pods.iter().filter(|pod| is_other(pod) && runs(pod)) {
                process::kill_hard(process::container_pid(pod, "runtime")?).await?;
            }
            Ok(None)
        })
        .await
}

fn runs(pod: &Pod) -> bool {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    containers
        .into_iter()
        .flatten()
        .any(|one| one.state.as_ref().is_some_and(|state| state.running.is_some()))
}

/// The new revision is loaded, no gateway acknowledges it, and the old pod stays.
async fn with_wrong_account(scenario: &Scenario, models: &Models, pod: &str) -> Result<()> {
    account(scenario, "default", "Recreate").await?;
    let replaced = Until::new("only gateways with the wrong account are left", 60);
    let wrong = |pods: &[&Pod]| {
        let account = |pod: &&Pod| pod.spec.as_ref()?.service_account_name.clone();
        (!pods.is_empty() && pods.iter().all(|pod| account(pod).as_deref() == Some("default"))).then_some(())
    };
    replaced.watched(release::pods(&scenario.cluster), release::pods_of("gateway"), wrong).await?;
    models.change("staying", json!({"runtime": {"contextTokens": 256}})).await?;
    let waits = Until::new("the model waits for gateways", 60);
    let silent = |model: &DynamicObject| {
        let is_loaded = status_text(model, "/rollout/phase") == "Warming";
        (is_loaded && conditions(model).iter().any(|one| one.reason == "GatewaysSilent")).then_some(())
    };
    models.until("staying", waits, silent).await?;
    let pods = scenario.pods().list(&ListParams::default()).await?.items;
    let stays = |one: &Pod| one.name_any() == pod && one.metadata.deletion_timestamp.is_none();
    ensure!(pods.iter().any(stays), "pod {pod} has ended");
    Ok(())
}

/// Lets the gateways run with an account of their namespace.
async fn account(scenario: &Scenario, name: &str, strategy: &str) -> Result<()> {
    let deployments = Api::<Deployment>::namespaced(scenario.cluster.client.clone(), release::NAMESPACE);
    let rolling = match strategy {
        "RollingUpdate" => json!({"maxUnavailable": 0, "maxSurge": 1}),
        _ => Value::Null,
    };
    let patch = json!({"spec": {
        "strategy": {"type": strategy, "rollingUpdate": rolling},
        "template": {"spec": {"serviceAccountName": name, "serviceAccount": name}},
    }});
    deployments.patch(GATEWAY, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

/// The file of a model whose last weights are no numbers: in each type of a GGUF file, a number or a scale of
/// ones alone is none.
fn break_weights(scenario: &Scenario, to: &std::path::Path) -> Result<()> {
    /// More than the alignment at the end, and a part of the last tensors.
    const BROKEN_BYTES: usize = 64 << 10;
    let from = scenario.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    std::fs::copy(&from, to).with_context(|| format!("{} is missing: make models", from.display()))?;
    let mut file = std::fs::OpenOptions::new().write(true).open(to)?;
    file.seek(SeekFrom::End(-i64::try_from(BROKEN_BYTES)?))?;
    file.write_all(&[0xff; BROKEN_BYTES])?;
    Ok(())
}

#[tokio::test]
async fn each_placement_fits_the_accelerators_of_a_node() -> Result<()> {
    run("accelerators", async |scenario| {
        // Given: one node with one accelerator, which the pod of a model has.
        let nodes = scenario.cluster.nodes().await?;
        let (node, _) = nodes.first().context("no node")?;
        accelerators(scenario, node, Some("1")).await?;
        let outcome = placements(scenario, node).await;
        accelerators(scenario, node, None).await?;
        outcome
    })
    .await
}

async fn placements(scenario: &Scenario, node: &str) -> Result<()> {
    let models = scenario.models();
    let spec = json!({
        "source": {"uri": SMOLLM2},
        "runtime": {"contextTokens": 512, "resources": {"limits": {ACCELERATOR: "1"}}},
        "rollout": {"placement": "DrainFirst"}, "disruption": {"maxUnavailable": 1},
    });
    models.apply("fitting", spec).await?;
    let old = stable(&models.ready("fitting", 60).await?);

    // When: it is changed and may not have two pods. Then: the old pod ends before the new one starts.
    models.change("fitting", json!({"runtime": {"contextTokens": 256}})).await?;
    let new = moved(&models, "fitting", &old).await?;

    // When: new pods shall start beside the old ones. Then: the status says that nothing fits, and the old
    // pod serves on.
    let surge = json!({"runtime": {"contextTokens": 128}, "rollout": {"placement": "Surge"}});
    models.change("fitting", surge).await?;
    let reported = Until::new("the status says that no node has room", 60);
    let no_room = |model: &DynamicObject| {
        conditions(model).iter().any(|one| one.reason == "Unschedulable").then_some(())
    };
    models.until("fitting", reported, no_room).await?;
    let model = models.api.get("fitting").await?;
    ensure!(stable(&model) == new, "the old revision ended although the new one does not fit");
    let serving = condition(&model, "Serving").context("no condition Serving")?;
    ensure!(serving.status == "True", "{serving:?}");

    // When: the node has a second accelerator. Then: the new pod starts there, and the revision is promoted.
    accelerators(scenario, node, Some("2")).await?;
    moved(&models, "fitting", &new).await.map(drop)
}

/// Sets how many accelerators a node has; none removes them.
async fn accelerators(scenario: &Scenario, node: &str, count: Option<&str>) -> Result<()> {
    let nodes = Api::<Node>::all(scenario.cluster.client.clone());
    let amount = json!({ACCELERATOR: count});
    let patch = Patch::Merge(json!({"status": {"capacity": amount, "allocatable": amount}}));
    nodes.patch_status(node, &PatchParams::default(), &patch).await?;
    Ok(())
}

/// Waits until another revision than `old` is the stable one and ready, and returns it.
async fn moved(models: &Models, name: &str, old: &str) -> Result<String> {
    let moved = Until::new("the new revision serves", 60);
    let done = |model: &DynamicObject| (is_ready(model) && stable(model) != old).then(|| stable(model));
    models.until(name, moved, done).await
}

async fn rolled_back(models: &Models, name: &str) -> Result<DynamicObject> {
    let returned = Until::new("the revision is rolled back", 90);
    let ended =
        |model: &DynamicObject| (status_text(model, "/rollout/phase") == "RolledBack").then(|| model.clone());
    models.until(name, returned, ended).await
}

/// The name of the only pod.
async fn only_pod(scenario: &Scenario) -> Result<String> {
    let pods = scenario.pods().list(&ListParams::default()).await?.items;
    ensure!(pods.len() == 1, "one pod was expected: {}", pods.len());
    Ok(pods.first().context("no pod")?.name_any())
}

/// The revision that is the stable one.
fn stable(model: &DynamicObject) -> String {
    status_text(model, "/stable/revision").to_owned()
}

fn none_failed(requests: &[Outcome]) {
    let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
    eprintln!("{} requests, none failed", requests.len());
}
