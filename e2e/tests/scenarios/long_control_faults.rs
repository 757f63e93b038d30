//! The standard load while gateways are replaced, while no operator runs and pods are killed, and while the
//! API server gives no answer. Requests go on.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use trustformers_e2e::{
    faults::Stopped,
    leader, process,
    release::{self, GATEWAY, OPERATOR},
    scenario::{Scenario, run_within},
    standard_load::{LoadTargets, VECTORS, WORDS, pods_of},
    wait::Until,
};

use crate::long_pod_faults::{none_failed, only_those_of_killed_pods_failed, serves_again, under_load};

/// Two minutes without an operator, and the replacement of gateways and the start of pods beside them.
const LIMIT: Duration = Duration::from_secs(420);

/// No operator runs for this long.
const OPERATOR_AWAY_S: u32 = 120;

/// The API server is away for this long: longer than the 6 s after which a leader stops leading, and shorter
/// than the time after which a node without a sign of life is lost, which is 20 s in this cluster, with the
/// 10 s between two signs.
const API_SERVER_AWAY_S: u32 = 7;

/// The load goes on for this long afterwards.
const AFTER_S: u32 = 3;

/// From a pod's restart until every gateway asks it again: the pause that a pod asks for while it loads is
/// heeded for 10 s at most, and pauses behind refused connections (5 s) and the breaker's (3 s) are shorter.
const SETTLED_S: u32 = 12;

#[tokio::test]
async fn requests_go_on_while_the_control_plane_is_away() -> Result<()> {
    run_within("control-faults", LIMIT, async |scenario| {
        // Given: two models with two pods each.
        let targets = LoadTargets::deploy(scenario).await?;
        patient(scenario).await?;

        gateways_are_replaced(scenario, &targets).await?;
        let outcome = pods_are_killed_without_an_operator(scenario, &targets).await;
        // Also after an error: the scenarios after this one need the operator.
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        outcome?;
        all_serve(scenario).await?;
        the_api_server_is_away(scenario, &targets).await
    })
    .await
}

/// No pod hangs here, so an attempt may take its time: while one pod of each model is gone, the others share
/// the two cores with those that load.
async fn patient(scenario: &Scenario) -> Result<()> {
    for name in [VECTORS, WORDS] {
        let traffic = json!({"timeout": "10s", "attemptTimeout": "5s"});
        scenario.models().change(name, json!({"traffic": traffic})).await?;
    }
    all_serve(scenario).await
}

/// An operator leads, and every pod of both models serves.
async fn all_serve(scenario: &Scenario) -> Result<()> {
    leader::other_than(&scenario.cluster, None).await?;
    for name in [VECTORS, WORDS] {
        scenario.models().ready(name, 60).await?;
    }
    Ok(())
}

/// Every gateway is replaced, one after the other. Then: no request failed.
async fn gateways_are_replaced(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let label = kube::api::ListParams::default().labels("app.kubernetes.io/component=gateway");
    let old = release::pods(&scenario.cluster).list(&label).await?.items;
    let old: BTreeSet<String> = old.into_iter().filter_map(|pod| pod.metadata.name).collect();
    let outcomes = under_load(targets, "gateways are replaced", async |load| {
        let deployment = format!("deployment/{GATEWAY}");
        let restart = ["--namespace", release::NAMESPACE, "rollout", "restart", &deployment];
        scenario.cluster.kubectl(&restart).stdout().await?;
        let ended = Until::new("every old gateway has ended", 90);
        let none_is_old = |pods: &[&Pod]| {
            let is_old = |pod: &&Pod| pod.metadata.name.as_ref().is_some_and(|name| old.contains(name));
            pods.iter().all(|pod| !is_old(pod)).then_some(())
        };
        ended.watched(release::pods(&scenario.cluster), release::pods_of("gateway"), none_is_old).await?;
        load.seconds(AFTER_S).await
    })
    .await?;
    release::ready(&scenario.cluster, GATEWAY).await?;
    none_failed(&outcomes);
    Ok(())
}

/// No operator runs for two minutes, and the pods of each model are killed one after the other. Then: at most
/// what they were answering failed, because a replica remained.
async fn pods_are_killed_without_an_operator(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let (vectors, words) = (pods_of(scenario, VECTORS).await?, pods_of(scenario, WORDS).await?);
    release::scale(&scenario.cluster, OPERATOR, 0).await?;
    let none = |pods: &[&Pod]| pods.is_empty().then_some(());
    let gone = Until::new("no operator pod is left", 45);
    gone.watched(release::pods(&scenario.cluster), release::pods_of("operator"), none).await?;
    let mut killed = Vec::new();
    let outcomes = under_load(targets, "pods are killed while no operator runs", async |load| {
        for (vectors, words) in vectors.iter().zip(&words) {
            let pids =
                [process::container_pid(vectors, "runtime")?, process::container_pid(words, "runtime")?];
            for pid in pids {
                killed.push(Instant::now());
                process::kill_hard(pid).await?;
            }
            for pod in [vectors, words] {
                serves_again(scenario, pod).await?;
            }
            load.seconds(SETTLED_S).await?;
        }
        load.until_second(OPERATOR_AWAY_S).await
    })
    .await?;
    only_those_of_killed_pods_failed(&outcomes, &killed);
    Ok(())
}

/// The API server answers nothing, for so long that the operator stops leading. Then: no request failed, and
/// an operator leads again when it is back: a change comes into force.
async fn the_api_server_is_away(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let pid = process::daemon_pid(&scenario.cluster.settings, "kube-apiserver")?;
    let outcomes = under_load(targets, "the API server is away", async |load| {
        let away = Stopped::process(pid).await?;
        load.seconds(API_SERVER_AWAY_S).await?;
        drop(away);
        load.seconds(AFTER_S).await?;
        // The next lead begins under load: its first table must not be an empty one.
        scenario.models().change(VECTORS, json!({"traffic": {"timeout": "11s"}})).await?;
        all_serve(scenario).await?;
        load.seconds(AFTER_S).await
    })
    .await?;
    none_failed(&outcomes);
    release::ready(&scenario.cluster, OPERATOR).await
}
