//! The facts of a rollout, from Deployments, pods and their reports.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::jiff::Timestamp;
use trustformers_proto::v1::{ModelSlot, ModelState};

use super::machine::RESTARTS_TO_FAIL;
use super::{Command, CommandText, PoolFacts, RevisionFacts, RolloutState};
use crate::causes::{self, Cause};
use crate::pods::PodView;
use crate::status::PodReport;
use crate::{names, versions};

/// The Deployments of a model, by the revision that each was made for.
#[must_use]
pub fn pools(deployments: &BTreeMap<String, Deployment>, pods: &[PodView]) -> BTreeMap<String, PoolFacts> {
    let mut pools: BTreeMap<String, PoolFacts> = BTreeMap::new();
    for (revision, deployment) in deployments {
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
        pools.entry(revision.clone()).or_default().replicas = u32::try_from(replicas).unwrap_or(0);
    }
    for pod in pods.iter().filter(|pod| !pod.ended) {
        let pool = pools.entry(pod.revision.clone()).or_default();
        if pod.deleting {
            pool.terminating += 1;
        } else {
            pool.pods += 1;
        }
    }
    pools
}

/// What pods do with each revision, the state of the rollout given. A pod that has not reported yet counts
/// for what it was asked to hold.
#[must_use]
pub fn revisions(
    deployments: &BTreeMap<String, Deployment>,
    pods: &[PodView],
    reports: &BTreeMap<String, PodReport>,
    state: &RolloutState,
) -> BTreeMap<String, RevisionFacts> {
    let mut revisions: BTreeMap<String, RevisionFacts> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.counts()) {
        let report = reports.get(&pod.uid).map(|report| &report.model);
        let slots = report.map(|report| versions::slots(pod, report)).unwrap_or_default();
        for slot in slots.iter().skip(1) {
            let facts = revisions.entry(slot.revision.clone()).or_default();
            count_second(pod, slot, state, facts);
        }
        if report.is_none() && is_routable(pod) {
            for revision in state.held_besides(&pod.revision) {
                revisions.entry(revision.to_owned()).or_default().routable += 1;
            }
            // Whether it still holds these is not certain, so that none of them counts as gone.
            for revision in state.doubtful(&pod.revision) {
                revisions.entry(revision.to_owned()).or_default().loading += 1;
            }
        }
        let first =
            slots.first().map_or_else(|| state.start_revision(&pod.revision), |slot| slot.revision.as_str());
        let facts = revisions.entry(first.to_owned()).or_default();
        match report.map(trustformers_proto::v1::ModelStatus::state) {
            _ if is_routable(pod) => facts.routable += 1,
            _ if pod.containers_ready => facts.warming += 1,
            Some(ModelState::Warming | ModelState::Ready) => facts.warming += 1,
            Some(ModelState::Loading) => facts.loading += 1,
            _ => {}
        }
        count_restarts(pod, facts);
        facts.unschedulable_since = earlier(facts.unschedulable_since, pod.unschedulable_since);
        let failed = report
            .filter(|report| report.state() == ModelState::Failed)
            .and_then(causes::of_report)
            .or_else(|| pod.cause.clone().filter(|_| pod.restarts >= RESTARTS_TO_FAIL));
        facts.failure = facts.failure.take().or(failed);
    }
    for (revision, deployment) in deployments {
        let revision = state.start_revision(revision).to_owned();
        let facts = revisions.entry(revision).or_default();
        facts.unschedulable_since = earlier(facts.unschedulable_since, not_created_since(deployment));
    }
    revisions
}

/// Counts a version that a pod holds beside the one that answers.
fn count_second(pod: &PodView, slot: &ModelSlot, state: &RolloutState, facts: &mut RevisionFacts) {
    match slot.state() {
        ModelState::Ready if is_routable(pod) => facts.routable += 1,
        ModelState::Ready | ModelState::Warming => facts.warming += 1,
        // It is there until it has ended.
        ModelState::Pending | ModelState::Loading | ModelState::Draining => facts.loading += 1,
        ModelState::Unspecified | ModelState::Unloaded | ModelState::Failed => {}
    }
    // What another pool could not load says nothing about a revision that has pods of its own by now.
    if !state.members().any(|member| member.revision == slot.revision && member.pool == pod.revision) {
        return;
    }
    count_restarts(pod, facts);
    if slot.state() == ModelState::Failed {
        let reason = if slot.reason.is_empty() { "ModelFailed" } else { &slot.reason };
        let failure = Cause { reason: reason.to_owned(), message: slot.message.clone() };
        facts.failure.get_or_insert(failure);
    }
}

fn count_restarts(pod: &PodView, facts: &mut RevisionFacts) {
    if pod.restarts > 0 {
        facts.restarts.insert(pod.name.clone(), pod.restarts);
    }
}

/// Whether every gateway can route to the pod: its gate is open, and it still serves.
#[must_use]
pub fn is_routable(pod: &PodView) -> bool {
    pod.routable() && pod.ready
}

/// Since when pods cannot be created, for example because of a quota.
fn not_created_since(deployment: &Deployment) -> Option<Timestamp> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions.iter().find(|one| one.type_ == "ReplicaFailure" && one.status == "True")?;
    failure.last_transition_time.as_ref().map(|time| time.0)
}

fn earlier(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    one.into_iter().chain(other).min()
}

/// The commands in a model's annotations.
#[must_use]
pub fn commands(annotations: Option<&BTreeMap<String, String>>) -> BTreeMap<Command, CommandText> {
    let text = |key: &str| annotations?.get(key).filter(|text| !text.is_empty()).cloned().map(CommandText);
    let all = [
        (Command::Abort, text(names::ABORT_ANNOTATION)),
        (Command::Undo, text(names::UNDO_ANNOTATION)),
        (Command::Promote, text(names::PROMOTE_ANNOTATION)),
    ];
    all.into_iter().filter_map(|(command, text)| Some((command, text?))).collect()
}

/// Revisions of `pools` to which no gateway sends requests: `routed` are those that some gateway may.
#[must_use]
pub fn unrouted(pools: &BTreeMap<String, PoolFacts>, routed: &BTreeSet<String>) -> BTreeSet<String> {
    pools.keys().filter(|revision| !routed.contains(*revision)).cloned().collect()
}
