//! Step five of a reconcile: the status, from what was applied and what pods, kubelet and the scheduler say.
//!
//! "Does it serve now?" (`Serving`) is apart from "is the update done?" (`Ready`, `Progressing`) and from "is something
//! wrong?" (`Degraded`), since people confuse them at a cost. The status is a function of what was observed: it says the
//! same after a restart of the operator, and an unchanged one is not written again.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{Condition, InferenceModelStatus, Loading, Phase, StableRevision};
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::causes::{self, Cause};
use crate::names;
use crate::pods::PodView;
use crate::routes::ModelKey;
use crate::validate::ValidatedModel;

/// Longest message of a condition, as the schema bounds it.
const MESSAGE_CHARS: usize = 4000;

/// What the operator sees of one model.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    /// The Deployment as last applied or seen.
    pub deployment: Option<&'a Deployment>,
    /// The pods of this model.
    pub pods: &'a [PodView],
    /// What pods said about their model, by UID.
    pub reports: &'a BTreeMap<String, ModelStatus>,
    /// The model that holds this one's bare name, if it is another.
    pub name_holder: Option<&'a ModelKey>,
    /// Where callers reach the gateway.
    pub url: &'a str,
    /// The present time.
    pub now: Timestamp,
}

/// What the conditions are derived from.
struct Facts<'a> {
    wanted: usize,
    serving: usize,
    complete: bool,
    cause: Option<Cause>,
    step: Step,
    revision: &'a str,
}

/// How far the slowest pod of the wanted revision has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Starting,
    Loading,
    Warming,
    WaitingForGateways,
    RollingOut,
}

impl Step {
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
            Self::Starting => "pods are scheduled, or their images pulled",
            Self::Loading => "pods load the model",
            Self::Warming => "pods run their first inference",
            Self::WaitingForGateways => "pods are warm; gateways take them into their tables",
            Self::RollingOut => "pods are being replaced",
        }
    }
}

/// The status of a model whose spec can be honoured.
#[must_use]
pub fn status(
    model: &ValidatedModel,
    revision: &str,
    observed: Observed<'_>,
    previous: &InferenceModelStatus,
) -> InferenceModelStatus {
    let facts = facts(model, revision, observed);
    let serving_digest = digest(observed, revision);
    let stable = if facts.complete && facts.wanted > 0 {
        Some(StableRevision { revision: revision.to_owned(), digest: serving_digest.clone() })
    } else {
        previous.stable.clone()
    };
    let loaded = serving_digest.or_else(|| stable.as_ref().and_then(|stable| stable.digest.clone()));
    let mut conditions =
        Conditions { previous, now: observed.now, generation: model.generation, made: Vec::new() };
    describe(&facts, observed.name_holder, model, &mut conditions);
    InferenceModelStatus {
        observed_generation: Some(model.generation),
        phase: Some(phase(&facts)),
        url: Some(observed.url.to_owned()),
        selector: Some(names::pod_selector(&model.name)),
        replicas: count(observed.pods.iter().filter(|pod| pod.counts())),
        ready_replicas: i32::try_from(facts.serving).unwrap_or(i32::MAX),
        device: device(observed).or_else(|| previous.device.clone().filter(|_| facts.serving > 0)),
        task: task(observed, revision)
            .or_else(|| model.task.map(|task| task.as_str().to_owned()))
            .or_else(|| previous.task.clone()),
        digest: loaded,
        stable,
        loading: loading(observed, revision),
        conditions: conditions.made,
    }
}

/// The status of a model that could not be reconciled: `cause` says why, and what was known before stays.
#[must_use]
pub fn refused(
    generation: i64,
    cause: &Cause,
    previous: &InferenceModelStatus,
    now: Timestamp,
) -> InferenceModelStatus {
    let mut conditions = Conditions { previous, now, generation, made: Vec::new() };
    let serves = previous.ready_replicas > 0;
    let kept = previous.conditions.iter().find(|one| one.type_ == "Serving");
    match kept {
        Some(kept) => conditions.made.push(kept.clone()),
        None => conditions.set("Serving", false, &cause.reason, &cause.message),
    }
    conditions.set("Ready", false, &cause.reason, &cause.message);
    conditions.set("Progressing", false, &cause.reason, &cause.message);
    conditions.set("Degraded", true, &cause.reason, &cause.message);
    InferenceModelStatus {
        observed_generation: Some(generation),
        phase: Some(if serves { Phase::Degraded } else { Phase::Failed }),
        conditions: conditions.made,
        ..previous.clone()
    }
}

fn facts<'a>(model: &ValidatedModel, revision: &'a str, observed: Observed<'_>) -> Facts<'a> {
    let wanted = usize::try_from(model.replicas).unwrap_or(0);
    let live = || observed.pods.iter().filter(|pod| pod.counts());
    let serving = live().filter(|pod| pod.ready).count();
    let current = live().filter(|pod| pod.ready && pod.revision == revision).count();
    let rolled_out = observed.deployment.is_some_and(|deployment| is_rolled_out(deployment, model.replicas));
    Facts {
        wanted,
        serving,
        complete: rolled_out && current >= wanted && live().count() == wanted,
        cause: cause(observed, revision),
        step: step(observed, revision),
        revision,
    }
}

/// Whether the Deployment's controller has seen the present template and every pod is of it.
#[must_use]
pub fn is_rolled_out(deployment: &Deployment, wanted: i32) -> bool {
    let Some(status) = &deployment.status else { return false };
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
}

/// The first cause, pods of the wanted revision before others, then by name.
fn cause(observed: Observed<'_>, revision: &str) -> Option<Cause> {
    let mut pods: Vec<_> = observed.pods.iter().filter(|pod| pod.counts() && !pod.ready).collect();
    pods.sort_by_key(|pod| (pod.revision != revision, pod.name.as_str()));
    let of_pod = |pod: &&PodView| {
        let reported = observed.reports.get(&pod.uid).and_then(causes::of_report);
        reported.or_else(|| pod.cause.clone())
    };
    pods.iter().find_map(of_pod).or_else(|| replica_failure(observed.deployment?))
}

/// Pods that could not even be made: a quota, an admission rule.
fn replica_failure(deployment: &Deployment) -> Option<Cause> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions.iter().find(|one| one.type_ == "ReplicaFailure" && one.status == "True")?;
    Some(Cause {
        reason: failure.reason.clone().unwrap_or_else(|| "FailedCreate".to_owned()),
        message: failure.message.clone().unwrap_or_default(),
    })
}

fn step(observed: Observed<'_>, revision: &str) -> Step {
    let waiting = observed.pods.iter().filter(|pod| pod.counts() && !pod.ready && pod.revision == revision);
    let of_pod = |pod: &PodView| match observed.reports.get(&pod.uid).map(ModelStatus::state) {
        _ if pod.containers_ready => Step::WaitingForGateways,
        Some(ModelState::Ready | ModelState::Warming) => Step::Warming,
        Some(ModelState::Loading) => Step::Loading,
        _ => Step::Starting,
    };
    let any = observed.pods.iter().any(PodView::counts);
    waiting.map(of_pod).min().unwrap_or(if any { Step::RollingOut } else { Step::Starting })
}

fn phase(facts: &Facts<'_>) -> Phase {
    match facts {
        Facts { wanted: 0, .. } => Phase::Stopped,
        Facts { complete: true, .. } => Phase::Ready,
        Facts { serving: 0, cause: Some(_), .. } => Phase::Failed,
        Facts { cause: Some(_), .. } => Phase::Degraded,
        Facts { serving: 0, step: Step::Loading | Step::Warming | Step::WaitingForGateways, .. } => {
            Phase::Loading
        }
        Facts { serving: 0, .. } => Phase::Pending,
        Facts { .. } => Phase::Updating,
    }
}

fn describe(facts: &Facts<'_>, holder: Option<&ModelKey>, model: &ValidatedModel, made: &mut Conditions<'_>) {
    let stopped = ("Stopped", "spec.scaling.replicas is 0");
    let (reason, message) = match (&facts.cause, facts.wanted) {
        (_, 0) => stopped,
        (Some(cause), _) => (cause.reason.as_str(), cause.message.as_str()),
        (None, _) => (facts.step.reason(), facts.step.message()),
    };
    if facts.serving > 0 {
        made.set("Serving", true, "PodsServe", &format!("{} pod(s) serve", facts.serving));
    } else {
        made.set("Serving", false, reason, message);
    }
    let ready = facts.complete && facts.wanted > 0;
    if ready {
        let message = format!("revision {} serves with {} pod(s)", facts.revision, facts.wanted);
        made.set("Ready", true, "AllPodsServe", &message);
        made.set("Progressing", false, "Complete", &message);
    } else {
        made.set("Ready", false, reason, message);
        made.set("Progressing", facts.cause.is_none() && facts.wanted > 0, reason, message);
    }
    match &facts.cause {
        Some(cause) if !ready && facts.wanted > 0 => {
            made.set("Degraded", true, &cause.reason, &cause.message);
        }
        _ => made.set("Degraded", false, "AsExpected", "nothing is wrong"),
    }
    if let Some((namespace, name)) = holder {
        let message = format!(
            "the older model {namespace}/{name} answers to {name}; callers reach this one as {}/{}",
            model.namespace, model.name
        );
        made.set("BareName", false, "Taken", &message);
    }
}

/// The digest that serving pods of the revision reported.
fn digest(observed: Observed<'_>, revision: &str) -> Option<String> {
    let pods = observed.pods.iter().filter(|pod| pod.revision == revision && pod.counts());
    pods.filter_map(|pod| observed.reports.get(&pod.uid))
        .filter(|report| {
            matches!(report.state(), ModelState::Ready | ModelState::Warming | ModelState::Draining)
        })
        .map(|report| report.digest.clone())
        .find(|digest| !digest.is_empty())
}

/// The task that pods of the revision reported.
fn task(observed: Observed<'_>, revision: &str) -> Option<String> {
    let pods = observed.pods.iter().filter(|pod| pod.revision == revision && pod.counts());
    let reports = pods.filter_map(|pod| observed.reports.get(&pod.uid));
    reports.map(|report| &report.task).find(|task| !task.is_empty()).cloned()
}

/// The devices that pods run on; more than one only in a mixed cluster.
fn device(observed: Observed<'_>) -> Option<String> {
    let reports =
        observed.pods.iter().filter(|pod| pod.counts()).filter_map(|pod| observed.reports.get(&pod.uid));
    let devices: BTreeSet<_> = reports.map(|one| one.device.as_str()).filter(|one| !one.is_empty()).collect();
    (!devices.is_empty()).then(|| devices.into_iter().collect::<Vec<_>>().join(","))
}

/// Progress of the pod that has the smallest share loaded.
fn loading(observed: Observed<'_>, revision: &str) -> Option<Loading> {
    let pods = observed.pods.iter().filter(|pod| pod.counts() && pod.revision == revision);
    let slowest = pods
        .filter_map(|pod| observed.reports.get(&pod.uid))
        .filter(|report| report.state() == ModelState::Loading)
        .min_by(|one, other| share(one).total_cmp(&share(other)))?;
    Some(Loading {
        bytes: i64::try_from(slowest.loaded_bytes).unwrap_or(i64::MAX),
        total_bytes: i64::try_from(slowest.total_bytes).unwrap_or(i64::MAX),
        eta_seconds: eta_seconds(slowest, observed.now),
    })
}

fn share(report: &ModelStatus) -> f64 {
    report.loaded_bytes as f64 / report.total_bytes.max(1) as f64
}

fn eta_seconds(report: &ModelStatus, now: Timestamp) -> Option<i64> {
    let since_ms = i64::try_from(report.since_unix_ms).ok()?;
    let elapsed_ms = now.as_millisecond().checked_sub(since_ms).filter(|elapsed| *elapsed > 0)?;
    let left = report.total_bytes.checked_sub(report.loaded_bytes)?;
    let loaded = report.loaded_bytes.max(1);
    let eta_ms = elapsed_ms as f64 * left as f64 / loaded as f64;
    (report.loaded_bytes > 0).then_some((eta_ms / 1000.0).ceil() as i64)
}

fn count<'a>(pods: impl Iterator<Item = &'a PodView>) -> i32 {
    i32::try_from(pods.count()).unwrap_or(i32::MAX)
}

/// Conditions in the making: the time of the last transition stays while the status stays.
struct Conditions<'a> {
    previous: &'a InferenceModelStatus,
    now: Timestamp,
    generation: i64,
    made: Vec<Condition>,
}

impl Conditions<'_> {
    fn set(&mut self, kind: &str, status: bool, reason: &str, message: &str) {
        let status = if status { "True" } else { "False" };
        let before = self.previous.conditions.iter().find(|one| one.type_ == kind && one.status == status);
        self.made.push(Condition {
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
