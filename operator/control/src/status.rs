//! Step five of a reconcile: the status, from what was applied and what pods, kubelet and the scheduler
//! report.
//!
//! `Serving` (does it serve now?) is separate from `Ready` and `Progressing` (is the update complete?) and
//! from `Degraded` (is something wrong?). The status is a function of its inputs: it is the same after a
//! restart of the operator, and an unchanged status is not written again.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{Condition, InferenceModelStatus, Loading, Phase};
use trustformers_proto::v1::{ModelSlot, ModelState, ModelStatus};

use crate::causes::{self, Cause};
use crate::exposure::RouteReport;
use crate::kinds::{ChildKind, HTTP_ROUTE};
use crate::names;
use crate::pods::PodView;
use crate::rollout::{Placement, RolloutPhase, RolloutState};
use crate::routes::ModelKey;
use crate::scaling::AutoscalerReport;
use crate::validate::ValidatedModel;
use crate::versions;

/// Longest message of a condition, as the schema bounds it.
const MESSAGE_CHARS: usize = 4000;

/// A pod's report about its model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PodReport {
    /// The report.
    pub model: ModelStatus,
    /// Restarts of the container that sent it: a report does not outlive its container.
    pub restarts: u32,
    /// When the loaded bytes changed last, by the operator's clock. The estimate of the time that remains
    /// uses this time and not the present, so that a stalled load has a constant status.
    pub progressed_at: Timestamp,
}

impl PodReport {
    /// Whether the container that sent the report still runs.
    #[must_use]
    pub fn is_current(&self, pod: &PodView) -> bool {
        pod.running && !pod.ended && pod.restarts == self.restarts
    }
}

/// What the status of one model is computed from.
#[derive(Debug, Clone, Copy)]
pub struct StatusInputs<'a> {
    /// The Deployment as it is stored.
    pub deployment: Option<&'a Deployment>,
    /// The pods of this model.
    pub pods: &'a [PodView],
    /// Reports of these pods, by UID.
    pub reports: &'a BTreeMap<String, PodReport>,
    /// The model that owns this one's bare name, if it is another.
    pub name_owner: Option<&'a ModelKey>,
    /// The rollout as it is stored.
    pub rollout: &'a RolloutState,
    /// Why no readiness gate opens, if gateways are the cause.
    pub gate_hold: Option<&'a Cause>,
    /// What the model's autoscaler reports; none before its first report.
    pub autoscaler: Option<&'a AutoscalerReport>,
    /// What Gateways report of the model's HTTPRoute; none before the first of them does.
    pub exposure: Option<&'a RouteReport>,
    /// Kinds of which the spec asks for an object and the cluster has no definition.
    pub undefined: &'a [&'static ChildKind],
    /// Where callers reach the gateway.
    pub url: &'a str,
    /// The present time.
    pub now: Timestamp,
}

/// What the conditions are derived from.
struct Facts<'a> {
    desired: usize,
    serving: usize,
    complete: bool,
    cause: Option<Cause>,
    step: LoadStep,
    gate_hold: Option<&'a Cause>,
    revision: &'a str,
    rollout: &'a RolloutState,
}

/// The state of the slowest pod of the desired revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LoadStep {
    Starting,
    Loading,
    Warming,
    WaitingForGateways,
    RollingOut,
}

impl LoadStep {
    fn reason(self) -> &'static str {
        match self {
            Self::Starting => "Starting",
            Self::Loading => "Loading",
            Self::Warming => "Warming",
            Self::WaitingForGateways => "WaitingForGateways",
            Self::RollingOut => "RollingOut",
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::Starting => "pods are being scheduled, or their images pulled",
            Self::Loading => "pods are loading the model",
            Self::Warming => "pods are running their first inference",
            Self::WaitingForGateways => "pods are warm; gateways have not acknowledged them yet",
            Self::RollingOut => "pods are being replaced",
        }
    }
}

/// The status of a model whose objects were applied.
#[must_use]
pub fn status(
    model: &ValidatedModel,
    revision: &str,
    inputs: StatusInputs<'_>,
    previous: &InferenceModelStatus,
) -> InferenceModelStatus {
    let facts = facts(model, revision, inputs);
    let stored = with_rollout(inputs, previous);
    // Until a revision has served with all its pods, the one of the spec is reported.
    let main = stored.stable.as_ref().map_or(revision, |stable| &stable.revision);
    let loaded = stored
        .stable
        .as_ref()
        .map_or_else(|| digest(inputs, revision), |stable| stable.digest.clone())
        .or_else(|| previous.digest.clone().filter(|_| stored.stable.is_none()));
    let pool = inputs.rollout.pool_of(main);
    let main_pods = || inputs.pods.iter().filter(|pod| pod.counts() && pod.revision == pool);
    let mut conditions =
        Conditions { previous, now: inputs.now, generation: model.generation, list: Vec::new() };
    describe(&facts, inputs.name_owner, model, &mut conditions);
    conditions.set_autoscaled(model, inputs.autoscaler);
    conditions.set_integrated(inputs.undefined);
    conditions.set_exposed(model, inputs);
    InferenceModelStatus {
        observed_generation: Some(model.generation),
        phase: Some(phase(&facts)),
        url: Some(inputs.url.to_owned()),
        selector: Some(names::revision_selector(&model.name, pool)),
        replicas: count(main_pods()),
        ready_replicas: count(main_pods().filter(|pod| pod.ready)),
        device: device(inputs).or_else(|| previous.device.clone().filter(|_| facts.serving > 0)),
        task: task(inputs, revision)
            .or_else(|| model.task.map(|task| task.as_str().to_owned()))
            .or_else(|| previous.task.clone()),
        digest: loaded,
        loading: loading(inputs, revision),
        conditions: conditions.list,
        ..stored
    }
}

/// The parts of the status that store the rollout, with the digests that pods reported.
fn with_rollout(inputs: StatusInputs<'_>, previous: &InferenceModelStatus) -> InferenceModelStatus {
    let mut stored = InferenceModelStatus {
        stable: previous.stable.clone(),
        candidate: previous.candidate.clone(),
        previous: previous.previous.clone(),
        ..InferenceModelStatus::default()
    };
    inputs.rollout.store(&mut stored);
    for one in [&mut stored.stable, &mut stored.previous].into_iter().flatten() {
        one.digest = digest(inputs, &one.revision).or_else(|| one.digest.take());
    }
    if let Some(one) = &mut stored.candidate {
        one.digest = digest(inputs, &one.revision).or_else(|| one.digest.take());
    }
    stored
}

/// What the status of a model that could not be reconciled is computed from.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// `metadata.generation` of the model.
    pub generation: i64,
    /// Why it could not be reconciled.
    pub cause: &'a Cause,
    /// The pods of this model. They go on serving.
    pub pods: &'a [PodView],
    /// The present time.
    pub now: Timestamp,
}

/// The status of a model that could not be reconciled: what its pods do now, and the cause. All else stays.
#[must_use]
pub fn refused(refusal: Refusal<'_>, previous: &InferenceModelStatus) -> InferenceModelStatus {
    let Refusal { generation, cause, pods, now } = refusal;
    let mut conditions = Conditions { previous, now, generation, list: Vec::new() };
    let serving = pods.iter().filter(|pod| pod.counts() && pod.ready).count();
    conditions.set_serving(serving, &cause.reason, &cause.message);
    conditions.set("Ready", false, &cause.reason, &cause.message);
    conditions.set("Progressing", false, &cause.reason, &cause.message);
    conditions.set("Degraded", true, &cause.reason, &cause.message);
    let stays =
        |one: &&Condition| matches!(one.type_.as_str(), "BareName" | "Autoscaled" | "Integrated" | "Exposed");
    conditions.list.extend(previous.conditions.iter().filter(stays).cloned());
    InferenceModelStatus {
        observed_generation: Some(generation),
        phase: Some(if serving > 0 { Phase::Degraded } else { Phase::Failed }),
        replicas: count(pods.iter().filter(|pod| pod.counts())),
        ready_replicas: i32::try_from(serving).unwrap_or(i32::MAX),
        loading: None,
        conditions: conditions.list,
        ..previous.clone()
    }
}

fn facts<'a>(model: &ValidatedModel, revision: &'a str, inputs: StatusInputs<'a>) -> Facts<'a> {
    let desired = usize::try_from(model.replicas).unwrap_or(0);
    let live = || inputs.pods.iter().filter(|pod| pod.counts());
    let serving = live().filter(|pod| pod.ready).count();
    let current = live().filter(|pod| pod.ready && answers(inputs, pod, revision)).count();
    let rolled_out = inputs.deployment.is_some_and(|deployment| is_rolled_out(deployment, model.replicas));
    let rollout = inputs.rollout;
    let is_stable = rollout.stable.as_ref().is_some_and(|stable| stable.revision == revision);
    let pool = rollout.pool_of(revision);
    let pods = live().filter(|pod| pod.revision == pool).count();
    let step = step(inputs, revision);
    Facts {
        desired,
        serving,
        complete: is_stable
            && rollout.candidate.is_none()
            && rolled_out
            && current >= desired
            && pods == desired,
        cause: rollout_cause(rollout, revision).or_else(|| cause(inputs, revision)),
        step,
        gate_hold: inputs.gate_hold.filter(|_| step == LoadStep::WaitingForGateways),
        revision,
        rollout,
    }
}

/// Whether a pod answers with the revision; one that has not reported yet counts for what it loads first.
fn answers(inputs: StatusInputs<'_>, pod: &PodView, revision: &str) -> bool {
    match inputs.reports.get(&pod.uid) {
        Some(report) => {
            versions::slots(pod, &report.model).first().is_some_and(|slot| slot.revision == revision)
        }
        None => inputs.rollout.start_revision(&pod.revision) == revision,
    }
}

/// The cause of a revision that was rolled back, or that waits for a person.
fn rollout_cause(rollout: &RolloutState, revision: &str) -> Option<Cause> {
    let is_refused = rollout.refused.as_deref() == Some(revision) || rollout.held;
    let decision = rollout.history.iter().rev().find(|one| one.revision == revision);
    is_refused.then(|| Cause {
        reason: decision.map_or_else(|| rollout.reason.clone(), |one| one.reason.clone()),
        message: match decision {
            Some(one) => format!("revision {revision}: {}", one.message),
            None => rollout.message.clone(),
        },
    })
}

/// Whether the Deployment's controller has observed the present template and all pods have it.
#[must_use]
pub fn is_rolled_out(deployment: &Deployment, replicas: i32) -> bool {
    let Some(status) = &deployment.status else { return false };
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) == replicas
        && status.replicas.unwrap_or(0) == replicas
}

/// The first cause: pods of the desired revision before others, then by name.
fn cause(inputs: StatusInputs<'_>, revision: &str) -> Option<Cause> {
    let mut pods: Vec<_> = inputs.pods.iter().filter(|pod| pod.counts() && !pod.ready).collect();
    let pool = inputs.rollout.pool_of(revision);
    pods.sort_by_key(|pod| (pod.revision != pool, pod.name.as_str()));
    let of_pod = |pod: &&PodView| {
        let reported = inputs.reports.get(&pod.uid).and_then(|report| causes::of_report(&report.model));
        reported.or_else(|| pod.cause.clone())
    };
    pods.iter().find_map(of_pod).or_else(|| replica_failure(inputs.deployment?))
}

/// Pods that could not be created, for example because of a quota or an admission rule.
fn replica_failure(deployment: &Deployment) -> Option<Cause> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions.iter().find(|one| one.type_ == "ReplicaFailure" && one.status == "True")?;
    Some(Cause {
        reason: failure.reason.clone().unwrap_or_else(|| "FailedCreate".to_owned()),
        message: failure.message.clone().unwrap_or_default(),
    })
}

fn step(inputs: StatusInputs<'_>, revision: &str) -> LoadStep {
    let pool = inputs.rollout.pool_of(revision);
    let waiting = inputs.pods.iter().filter(|pod| pod.counts() && !pod.ready && pod.revision == pool);
    let of_pod = |pod: &PodView| match inputs.reports.get(&pod.uid).map(|report| report.model.state()) {
        _ if pod.containers_ready && pod.node_ready => LoadStep::WaitingForGateways,
        Some(ModelState::Ready | ModelState::Warming) => LoadStep::Warming,
        Some(ModelState::Loading) => LoadStep::Loading,
        _ => LoadStep::Starting,
    };
    let any = inputs.pods.iter().any(PodView::counts);
    waiting.map(of_pod).min().unwrap_or(if any { LoadStep::RollingOut } else { LoadStep::Starting })
}

fn phase(facts: &Facts<'_>) -> Phase {
    match facts {
        Facts { desired: 0, .. } => Phase::Stopped,
        Facts { complete: true, .. } => Phase::Ready,
        Facts { serving: 0, cause: Some(_), .. } => Phase::Failed,
        Facts { cause: Some(_), .. } => Phase::Degraded,
        Facts {
            serving: 0,
            step: LoadStep::Loading | LoadStep::Warming | LoadStep::WaitingForGateways,
            ..
        } => Phase::Loading,
        Facts { serving: 0, .. } => Phase::Pending,
        Facts { .. } => Phase::Updating,
    }
}

fn describe(
    facts: &Facts<'_>,
    name_owner: Option<&ModelKey>,
    model: &ValidatedModel,
    conditions: &mut Conditions<'_>,
) {
    let stopped = ("Stopped", "spec.scaling.replicas is 0");
    let (reason, message) = match (facts.cause.as_ref().or(facts.gate_hold), facts.desired) {
        (_, 0) => stopped,
        (Some(cause), _) => (cause.reason.as_str(), cause.message.as_str()),
        (None, _) if shifts(facts.rollout) => (facts.rollout.reason.as_str(), facts.rollout.message.as_str()),
        (None, _) => (facts.step.reason(), facts.step.message()),
    };
    conditions.set_serving(facts.serving, reason, message);
    let ready = facts.complete && facts.desired > 0;
    if ready {
        let message = format!("revision {} serves with {} pod(s)", facts.revision, facts.desired);
        conditions.set("Ready", true, "AllPodsServe", &message);
        conditions.set("Progressing", false, "Complete", &message);
    } else {
        conditions.set("Ready", false, reason, message);
        conditions.set("Progressing", facts.cause.is_none() && facts.desired > 0, reason, message);
    }
    match &facts.cause {
        Some(cause) if !ready && facts.desired > 0 => {
            conditions.set("Degraded", true, &cause.reason, &cause.message);
        }
        _ => conditions.set("Degraded", false, "AsExpected", "no problem found"),
    }
    if facts.rollout.attempt > 0 {
        let RolloutState { reason, message, .. } = facts.rollout;
        conditions.set("RolloutHealthy", is_healthy(facts.rollout), reason, message);
    }
    if let Some((namespace, name)) = name_owner {
        let message = format!(
            "the older model {namespace}/{name} owns the name {name}; callers use {}/{} for this one",
            model.namespace, model.name
        );
        conditions.set("BareName", false, "Taken", &message);
    }
}

/// Whether the rollout itself says what it waits for, and not its pods.
fn shifts(rollout: &RolloutState) -> bool {
    use RolloutPhase::{Admitted, Loading, Placing, Shifting, Verifying, Warming};
    // Pods that load it in place serve meanwhile: they say nothing of what is waited for.
    let waits_for_pods =
        matches!(rollout.phase, Placing | Loading | Warming) && rollout.placement != Placement::InPlace;
    match rollout.phase {
        Admitted | Shifting | Verifying => true,
        _ => rollout.candidate.is_some() && !(waits_for_pods && is_healthy(rollout)),
    }
}

fn is_healthy(rollout: &RolloutState) -> bool {
    rollout.refused.is_none()
        && !rollout.held
        && !matches!(rollout.reason.as_str(), "NoCapacity" | "Unschedulable" | "CannotLoadInPlace")
}

/// The digest that pods of the revision with a loaded model reported.
fn digest(inputs: StatusInputs<'_>, revision: &str) -> Option<String> {
    let pods = inputs.pods.iter().filter(|pod| pod.counts());
    pods.filter_map(|pod| versions::find(pod, &inputs.reports.get(&pod.uid)?.model, revision))
        .filter(versions::is_loaded)
        .map(|slot| slot.digest)
        .find(|digest| !digest.is_empty())
}

/// The task that pods of the revision reported.
fn task(inputs: StatusInputs<'_>, revision: &str) -> Option<String> {
    let pool = inputs.rollout.pool_of(revision);
    let pods = inputs.pods.iter().filter(|pod| pod.revision == pool && pod.counts());
    let reports = pods.filter_map(|pod| inputs.reports.get(&pod.uid));
    reports.map(|report| &report.model.task).find(|task| !task.is_empty()).cloned()
}

/// The devices that pods run on; more than one only in a mixed cluster.
fn device(inputs: StatusInputs<'_>) -> Option<String> {
    let reports =
        inputs.pods.iter().filter(|pod| pod.counts()).filter_map(|pod| inputs.reports.get(&pod.uid));
    let devices: BTreeSet<_> =
        reports.map(|one| one.model.device.as_str()).filter(|one| !one.is_empty()).collect();
    (!devices.is_empty()).then(|| devices.into_iter().collect::<Vec<_>>().join(","))
}

/// Progress of the pod that has the smallest share loaded.
fn loading(inputs: StatusInputs<'_>, revision: &str) -> Option<Loading> {
    let pool = inputs.rollout.pool_of(revision);
    let pods = || inputs.pods.iter().filter(|pod| pod.counts() && pod.revision == pool);
    let besides = pods().filter_map(|pod| second(inputs, pod, revision));
    let slowest_beside = besides.min_by(|one, other| loaded_share(one).total_cmp(&loaded_share(other)));
    if let Some(slot) = slowest_beside {
        return Some(Loading {
            bytes: i64::try_from(slot.loaded_bytes).unwrap_or(i64::MAX),
            total_bytes: i64::try_from(slot.total_bytes).unwrap_or(i64::MAX),
            eta_seconds: slot.eta_ms.and_then(|ms| i64::try_from(ms.div_ceil(1000)).ok()),
        });
    }
    let slowest = pods()
        .filter_map(|pod| inputs.reports.get(&pod.uid))
        .filter(|report| report.model.state() == ModelState::Loading)
        .min_by(|one, other| share(&one.model).total_cmp(&share(&other.model)))?;
    Some(Loading {
        bytes: i64::try_from(slowest.model.loaded_bytes).unwrap_or(i64::MAX),
        total_bytes: i64::try_from(slowest.model.total_bytes).unwrap_or(i64::MAX),
        eta_seconds: eta_seconds(slowest),
    })
}

/// The revision, where a pod loads it beside the one that answers.
fn second(inputs: StatusInputs<'_>, pod: &PodView, revision: &str) -> Option<ModelSlot> {
    let slots = versions::slots(pod, &inputs.reports.get(&pod.uid)?.model);
    let loads = |slot: &ModelSlot| slot.revision == revision && slot.state() == ModelState::Loading;
    slots.into_iter().skip(1).find(loads)
}

fn loaded_share(slot: &ModelSlot) -> f64 {
    slot.loaded_bytes as f64 / slot.total_bytes.max(1) as f64
}

fn share(report: &ModelStatus) -> f64 {
    report.loaded_bytes as f64 / report.total_bytes.max(1) as f64
}

/// Time that remains at the average speed up to the last progress.
fn eta_seconds(PodReport { model: report, progressed_at, .. }: &PodReport) -> Option<i64> {
    let since_ms = i64::try_from(report.since_unix_ms).ok()?;
    let elapsed_ms = progressed_at.as_millisecond().checked_sub(since_ms).filter(|elapsed| *elapsed > 0)?;
    let remaining = report.total_bytes.checked_sub(report.loaded_bytes)?;
    let loaded = report.loaded_bytes.max(1);
    let eta_ms = elapsed_ms as f64 * remaining as f64 / loaded as f64;
    (report.loaded_bytes > 0).then_some((eta_ms / 1000.0).ceil() as i64)
}

fn count<'a>(pods: impl Iterator<Item = &'a PodView>) -> i32 {
    i32::try_from(pods.count()).unwrap_or(i32::MAX)
}

/// Builds conditions. The transition time of a condition stays the same until its status changes.
struct Conditions<'a> {
    previous: &'a InferenceModelStatus,
    now: Timestamp,
    generation: i64,
    list: Vec<Condition>,
}

impl Conditions<'_> {
    fn set_serving(&mut self, serving: usize, reason: &str, message: &str) {
        if serving > 0 {
            self.set("Serving", true, "PodsServe", &format!("{serving} pod(s) serve"));
        } else {
            self.set("Serving", false, reason, message);
        }
    }

    /// Whether an autoscaler changes the number of pods, if one is to. Its figures change all the time and
    /// are not shown here.
    fn set_autoscaled(&mut self, model: &ValidatedModel, report: Option<&AutoscalerReport>) {
        let Some(scaling) = &model.autoscaling else { return };
        match report {
            _ if model.replicas == 0 => {
                self.set(
                    "Autoscaled",
                    false,
                    "Stopped",
                    "spec.scaling.replicas is 0, which no autoscaler changes",
                );
            }
            None => self.set("Autoscaled", false, "Starting", "the autoscaler has not reported yet"),
            Some(AutoscalerReport { problem: Some(Cause { reason, message }) }) => {
                self.set("Autoscaled", false, reason, message);
            }
            Some(AutoscalerReport { problem: None }) => {
                let targets = scaling.targets.iter().map(|one| format!("{} {} %", one.resource, one.percent));
                let targets = targets.collect::<Vec<_>>().join(", ");
                let (least, most) = (scaling.min_replicas, scaling.max_replicas);
                let message = format!("{least} to {most} pods keep {targets} of the request");
                self.set("Autoscaled", true, "Scaling", &message);
            }
        }
    }

    /// Names the objects that are not made because the cluster does not know their kinds.
    fn set_integrated(&mut self, undefined: &[&'static ChildKind]) {
        let missing = undefined.iter().map(|kind| format!("{} ({})", kind.kind, kind.definition()));
        let missing = missing.collect::<Vec<_>>().join(", ");
        if !missing.is_empty() {
            let message = format!("the cluster has no definition of {missing}; it is made when it has one");
            self.set("Integrated", false, "NotDefined", &message);
        }
    }

    /// Whether Gateways take requests for the model's host names, where they are to and can.
    fn set_exposed(&mut self, model: &ValidatedModel, inputs: StatusInputs<'_>) {
        let Some(route) = &model.route else { return };
        if inputs.undefined.contains(&&HTTP_ROUTE) {
            return;
        }
        match inputs.exposure {
            None => {
                let names = route.parent_refs.iter().map(|one| one.name.as_str()).collect::<Vec<_>>();
                let message = format!("no Gateway has answered yet; asked: {}", names.join(", "));
                self.set("Exposed", false, "Waiting", &message);
            }
            Some(RouteReport { problem: Some(Cause { reason, message }) }) => {
                self.set("Exposed", false, reason, message);
            }
            Some(RouteReport { problem: None }) => {
                let message = format!("Gateways take requests for {}", route.hostnames.join(", "));
                self.set("Exposed", true, "Accepted", &message);
            }
        }
    }

    fn set(&mut self, kind: &str, status: bool, reason: &str, message: &str) {
        let status = if status { "True" } else { "False" };
        let before = self.previous.conditions.iter().find(|one| one.type_ == kind && one.status == status);
        self.list.push(Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.chars().take(MESSAGE_CHARS).collect(),
            last_transition_time: before
                .map_or_else(|| Time(self.now), |before| before.last_transition_time.clone()),
            observed_generation: Some(self.generation),
        });
    }
}

#[cfg(test)]
mod tests;
