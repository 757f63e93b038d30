//! Step five of a reconcile: write the status if it changed, then publish Events about the change.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;
use trustformers_control::build::undefined;
use trustformers_control::causes::Cause;
use trustformers_control::kinds::{AUTOSCALER, ChildKind, HTTP_ROUTE};
use trustformers_control::rollout::RolloutState;
use trustformers_control::status::{Refusal, StatusInputs, refused, status};
use trustformers_control::validate::ValidatedModel;
use trustformers_control::{events, names};
use trustformers_crds::{Condition, GROUP, InferenceModel, InferenceModelStatus, Phase, VERSION};

use super::apply::Applied;
use super::fetch::{self, Observed};
use crate::context::{Context, WrittenStatus};
use crate::queue::Lane;
use crate::recorder;
use crate::requests::patch_status;

/// The progress of a load is written at most this often for each model.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// While a model starts for the first time, a status that says nothing new but a reason or a message waits
/// for at most this long for the one that does: a launch takes few writes. A cause of a problem never waits.
pub const LAUNCH_WAIT: Duration = Duration::from_secs(4);

/// The same while other models wait for a pass. In a burst each of them passes through all steps of a launch,
/// and the API server is what limits them.
pub const LAUNCH_WAIT_BUSY: Duration = Duration::from_secs(30);

/// How often a status that waits for others is looked at without a change: rarely, because each look is a
/// pass while the operator has most to do.
const BUSY_LOOK: Duration = Duration::from_secs(10);

/// Why the status could not be written. Metrics use the variant's name.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum StatusError {
    /// The request failed.
    #[error("the status could not be written: {0}")]
    Request(Box<kube::Error>),
    /// The model changed since it was read, so that the step may be another one.
    #[error("the model changed while a step of its rollout was stored")]
    Changed,
}

/// A change of status to write.
struct Change<'a> {
    observed: &'a Observed,
    generation: Option<i64>,
    after: InferenceModelStatus,
    /// The resource version that the model must have.
    version: Option<String>,
}

/// Writes what was applied and what pods report. If only the progress changed and must wait, returns for how
/// long.
///
/// # Errors
/// When the API server does not accept the status.
pub async fn report(
    context: &Context,
    valid: &ValidatedModel,
    applied: &Applied,
    observed: &Observed,
    rollout: &RolloutState,
) -> Result<Option<Duration>, StatusError> {
    let gate_hold = context.feed.get().and_then(|feed| feed.hold());
    let undefined = undefined(valid, &context.optional_kinds());
    let child_of = |kind: &ChildKind| observed.children.iter().find(|child| child.kind == kind);
    let inputs = StatusInputs {
        deployment: applied.deployment.as_ref(),
        pods: &observed.pods,
        reports: &observed.reports,
        name_owner: observed.name_owner.as_ref(),
        rollout,
        gate_hold: gate_hold.as_ref(),
        undefined: &undefined,
        autoscaler: child_of(&AUTOSCALER).and_then(|child| child.autoscaler.as_ref()),
        exposure: child_of(&HTTP_ROUTE).and_then(|child| child.exposure.as_ref()),
        url: &context.settings.gateway_url,
        now: now(),
    };
    let after = status(valid, &applied.revision, inputs, &observed.previous);
    let change = Change { observed, generation: Some(valid.generation), after, version: None };
    write(context, change).await
}

/// Stores a step of the rollout, before it is acted on.
///
/// # Errors
/// When the API server does not accept it, or the model has changed since it was read.
pub async fn store_rollout(
    context: &Context,
    model: &InferenceModel,
    observed: &Observed,
    rollout: &RolloutState,
) -> Result<(), StatusError> {
    let mut after = observed.previous.clone();
    rollout.store(&mut after);
    let written = observed.written.as_ref().and_then(|written| written.version);
    // The cache may not show the operator's last write yet.
    let version = written.max(fetch::version(model)).map(|version| version.to_string());
    let change = Change { observed, generation: model.metadata.generation, after, version };
    write(context, change).await.map(|_| ())
}

/// Writes why the model could not be reconciled, and what its pods do meanwhile.
///
/// # Errors
/// When the API server does not accept the status.
pub async fn refuse(
    context: &Context,
    model: &InferenceModel,
    observed: &Observed,
    cause: &Cause,
) -> Result<(), StatusError> {
    let generation = model.metadata.generation;
    let refusal = Refusal { generation: generation.unwrap_or(0), cause, pods: &observed.pods, now: now() };
    let after = refused(refusal, &observed.previous);
    write(context, Change { observed, generation, after, version: None }).await.map(|_| ())
}

/// The present time in whole seconds, as it is stored: a status that is read back equals the one that was
/// written.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

async fn write(context: &Context, change: Change<'_>) -> Result<Option<Duration>, StatusError> {
    let Change { observed, generation, after, version } = change;
    let remember = |change: WrittenStatus| {
        context.remember(&observed.key, &observed.uid, |memory| {
            memory.generation = generation;
            memory.written = Some(change);
            memory.status_waits_since = None;
        });
    };
    if observed.stored == after {
        return Ok(None);
    }
    let at = Instant::now();
    if version.is_none()
        && let Some(wait) = wait(context, observed, &after, at)
    {
        return Ok(Some(wait));
    }
    let (namespace, name) = &observed.key;
    // With the UID, the API server refuses a status about an earlier object of the same name.
    let mut body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": InferenceModel::kind(&()),
        "metadata": {"name": name, "uid": observed.uid},
        "status": after,
    });
    let is_conditional = version.is_some();
    if let Some(version) = version {
        body["metadata"]["resourceVersion"] = json!(version);
    }
    // The watch may deliver the new status before the response arrives.
    remember(WrittenStatus { status: after.clone(), version: None, at });
    let params = PatchParams::apply(names::MANAGER).force();
    let patch = Patch::Apply(&body);
    match patch_status::<InferenceModel, _>(&context.client, namespace, name, &params, &patch).await {
        Ok(receipt) => {
            context.metrics.count_write("InferenceModelStatus");
            remember(WrittenStatus { status: after.clone(), version: receipt.version(), at });
        }
        Err(kube::Error::Api(status)) if status.code == 409 && is_conditional => {
            context
                .remember(&observed.key, &observed.uid, |memory| memory.written = observed.written.clone());
            return Err(StatusError::Changed);
        }
        // The model was deleted meanwhile: it needs no status.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return Ok(None),
        Err(error) => {
            // Whether it was stored is not known; the next reconcile compares with what the watch shows.
            context
                .remember(&observed.key, &observed.uid, |memory| memory.written = observed.written.clone());
            return Err(StatusError::Request(Box::new(error)));
        }
    }
    let notes = events::between(&observed.previous, &after);
    recorder::publish(context, &recorder::about(&observed.key, &observed.uid), &notes).await;
    Ok(None)
}

/// For how long a status must wait because it says little.
fn wait(
    context: &Context,
    observed: &Observed,
    after: &InferenceModelStatus,
    now: Instant,
) -> Option<Duration> {
    let before = &observed.stored;
    let remaining = |since: Instant, limit: Duration| {
        limit.checked_sub(now.duration_since(since)).filter(|wait| !wait.is_zero())
    };
    if is_progress(before, after) {
        return remaining(observed.written.as_ref()?.at, PROGRESS_INTERVAL);
    }
    let is_busy = context.queue.has_waiting(Lane::New) || context.queue.has_waiting(Lane::Child);
    if !is_launch_step(before, after, is_busy) {
        return None;
    }
    let since = observed.status_waits_since.unwrap_or(now);
    context.remember(&observed.key, &observed.uid, |memory| memory.status_waits_since = Some(since));
    // That gateways hold every gate is news for whoever looks.
    let is_held = after.conditions.iter().any(|one| one.reason == "GatewaysSilent");
    let may_wait_longer = is_busy && !is_held && remaining(since, LAUNCH_WAIT_BUSY).is_some();
    if may_wait_longer && remaining(since, LAUNCH_WAIT).is_none() {
        // Whether others still wait is looked at again in a while.
        return remaining(since, LAUNCH_WAIT_BUSY).map(|wait| wait.min(BUSY_LOOK));
    }
    remaining(since, LAUNCH_WAIT)
}

/// Whether two statuses differ in the progress of a load, or of a rollout, alone.
fn is_progress(before: &InferenceModelStatus, after: &InferenceModelStatus) -> bool {
    let both_load = before.loading.is_some() == after.loading.is_some();
    let mut progress = InferenceModelStatus { loading: before.loading.clone(), ..after.clone() };
    // The figures of a rollout that waits are progress too.
    if let (Some(rollout), Some(earlier)) = (&mut progress.rollout, &before.rollout) {
        rollout.message.clone_from(&earlier.message);
        rollout.sample.clone_from(&earlier.sample);
    }
    for (condition, earlier) in progress.conditions.iter_mut().zip(&before.conditions) {
        if after.rollout.is_some() && condition.type_ == earlier.type_ {
            condition.message.clone_from(&earlier.message);
        }
    }
    both_load && progress == *before
}

/// Whether the status of a model that has never served differs in nothing that the status of a condition or
/// the cause of a problem says. The first one of a model that starts as expected is such a step too while
/// others are busy.
fn is_launch_step(before: &InferenceModelStatus, after: &InferenceModelStatus, is_busy: bool) -> bool {
    if before.stable.is_some() || after.stable.is_some() {
        return false;
    }
    if before.observed_generation.is_none() {
        let is_wrong = after.conditions.iter().any(|one| one.type_ == "Degraded" && one.status == "True");
        return !is_wrong && is_busy;
    }
    // Another cause of a problem is news too.
    let statuses = |status: &InferenceModelStatus| {
        let cause = |one: &Condition| (one.type_ == "Degraded").then(|| one.reason.clone());
        let conditions = status.conditions.iter();
        conditions.map(|one| (one.type_.clone(), one.status.clone(), cause(one))).collect::<Vec<_>>()
    };
    let starts = |phase: Option<Phase>| matches!(phase, Some(Phase::Pending | Phase::Loading));
    let step = InferenceModelStatus {
        phase: if starts(before.phase) && starts(after.phase) { before.phase } else { after.phase },
        replicas: before.replicas,
        ready_replicas: before.ready_replicas,
        loading: before.loading.clone(),
        conditions: before.conditions.clone(),
        ..after.clone()
    };
    step == *before && statuses(before) == statuses(after)
}
