//! The checks of `doctor`: from what was read to what is right, what is wrong, and what to do about it.

use std::collections::BTreeSet;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde::Serialize;
use trustformers_crds::names::{LEADER_LABEL, ROUTABLE_GATE};
use trustformers_crds::{Condition, InferenceModel, OciAccess, Phase};

use super::definitions::{DefinitionFacts, Difference, difference};
use crate::table::one_line;
use crate::text;

/// A leader renews its Lease every 2 s and stops 6 s after the last success; clocks may differ by the rest.
const RENEWED_WITHIN_S: i64 = 30;
/// A pod whose containers are ready is acknowledged within a second or two.
const ACKNOWLEDGED_WITHIN_S: i64 = 30;
/// Older Events about gateways say nothing about the present.
const RECENT_S: i64 = 3600;
/// Conditions of what a model asks for beside its pods; without it, it serves all the same.
const MISSING_CONDITIONS: [&str; 4] = ["Autoscaled", "Integrated", "Exposed", "BareName"];
/// Objects that a message names; the rest is a number.
const NAMED_OBJECTS: usize = 3;

/// What was read. A part that could not be read has the sentence that says why.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The version of the API server.
    pub server: String,
    /// The namespace of the operator.
    pub system_namespace: String,
    /// The definitions of the custom resources.
    pub definitions: Vec<DefinitionFacts>,
    /// The Lease of the operator that leads.
    pub lease: Result<Option<LeaseFacts>, String>,
    /// The pods of operators.
    pub operators: Result<Vec<Pod>, String>,
    /// The pods of gateways.
    pub gateways: Result<Vec<Pod>, String>,
    /// Events about gateways that acknowledge nothing.
    pub gateway_events: Result<Vec<GatewayEvent>, String>,
    /// The rights of the person.
    pub rights: Vec<RightFacts>,
    /// The models.
    pub models: Result<Vec<InferenceModel>, String>,
    /// Their pods.
    pub model_pods: Result<Vec<Pod>, String>,
    /// Whether image volumes work.
    pub image_volumes: ImageVolumes,
    /// The present time.
    pub now: Timestamp,
}

/// The Lease of the operator that leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseFacts {
    /// Who holds it; empty if nobody does.
    pub holder: String,
    /// When it was renewed last.
    pub renewed: Option<Timestamp>,
}

impl LeaseFacts {
    /// What a Lease says.
    #[must_use]
    pub fn of(lease: &Lease) -> Self {
        let spec = lease.spec.clone().unwrap_or_default();
        Self { holder: spec.holder_identity.unwrap_or_default(), renewed: spec.renew_time.map(|time| time.0) }
    }
}

/// An Event about a gateway that acknowledges nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayEvent {
    /// The gateway's pod.
    pub pod: String,
    /// When it was counted last.
    pub at: Option<Timestamp>,
}

impl GatewayEvent {
    /// What an Event says.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        let at = event.last_timestamp.as_ref().map(|time| time.0);
        Self {
            pod: event.involved_object.name.clone().unwrap_or_default(),
            at: at.or(event.event_time.as_ref().map(|time| time.0)),
        }
    }
}

/// Whether the person may do something that a command does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RightFacts {
    /// The verb.
    pub verb: &'static str,
    /// The resource, with its subresource.
    pub resource: String,
    /// The namespace.
    pub namespace: String,
    /// The answer of the API server.
    pub allowed: Result<bool, String>,
}

/// Whether pods can have image volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageVolumes {
    /// The API server keeps them.
    Kept,
    /// The API server drops them: the feature gate is off.
    Dropped,
    /// It could not be tried.
    Unknown(String),
}

impl ImageVolumes {
    /// What the API server made of a pod with an image volume.
    #[must_use]
    pub fn of(answer: &Pod) -> Self {
        let volumes = answer.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
        if volumes.into_iter().flatten().any(|volume| volume.image.is_some()) {
            Self::Kept
        } else {
            Self::Dropped
        }
    }

    /// What a refusal means. A volume without any source, which is what remains when the field is dropped, is
    /// refused as such.
    #[must_use]
    pub fn of_refusal(error: String) -> Self {
        let is_dropped = error.contains("must specify a volume type");
        if is_dropped { Self::Dropped } else { Self::Unknown(error) }
    }
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Level {
    /// It is right.
    Ok,
    /// It deserves a look, or could not be checked.
    Warning,
    /// It is wrong.
    Failed,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// How it ended.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    fn ok(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Ok, message: message.into(), fix: None }
    }

    fn warning(name: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Warning, fix: Some(fix.into()), ..Self::ok(name, message) }
    }

    fn failed(name: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Failed, fix: Some(fix.into()), ..Self::ok(name, message) }
    }

    fn unreadable(name: impl Into<String>, error: &str) -> Self {
        Self::warning(
            name,
            error,
            "ask for the right to read it, or let somebody who has it run this command",
        )
    }
}

/// Whether a check failed.
#[must_use]
pub fn failed(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.level == Level::Failed)
}

/// The checks as text.
#[must_use]
pub fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let mark = match check.level {
            Level::Ok => "ok  ",
            Level::Warning => "warn",
            Level::Failed => "FAIL",
        };
        text.push_str(&format!("{mark}  {}: {}\n", check.name, one_line(&check.message)));
        if let Some(fix) = &check.fix {
            text.push_str(&format!("      → {}\n", one_line(fix)));
        }
    }
    let count = |level: Level| checks.iter().filter(|check| check.level == level).count();
    let (warnings, failures) = (count(Level::Warning), count(Level::Failed));
    text.push_str(&format!("{} checks, {warnings} warnings, {failures} failed\n", checks.len()));
    text
}

/// All checks, in the order in which one depends on the other.
#[must_use]
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![Check::ok("API server", facts.server.clone())];
    checks.extend(facts.definitions.iter().map(definition));
    checks.push(operators(facts));
    checks.push(lease(facts));
    checks.push(gateways(facts));
    checks.push(acknowledgements(facts));
    checks.push(rights(facts));
    checks.push(image_volumes(facts));
    checks.extend(models(facts));
    checks
}

fn definition(facts: &DefinitionFacts) -> Check {
    let name = format!("definition {}", facts.name);
    let upgrade = "install the chart of this version (helm upgrade), or apply `trustformers-operator crd`";
    let installed = match &facts.installed {
        Err(error) => return Check::unreadable(name, error),
        Ok(None) => return Check::failed(name, "it is not installed", upgrade),
        Ok(Some(installed)) => installed,
    };
    match difference(&facts.own, installed) {
        Difference::None => Check::ok(name, "its fields are those of this version"),
        Difference::NotServed => {
            Check::failed(name, format!("{} is not served", trustformers_crds::VERSION), upgrade)
        }
        Difference::Older(fields) => Check::failed(name, format!("it is older: without {fields}"), upgrade),
        Difference::Newer(fields) => Check::warning(
            name,
            format!("it is newer: with {fields}"),
            "use the plugin of the installed version, which shows all fields",
        ),
    }
}

fn is_ready(pod: &Pod) -> bool {
    is_true(pod, "Ready") && pod.metadata.deletion_timestamp.is_none()
}

fn is_true(pod: &Pod, kind: &str) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    conditions.filter(|one| one.type_ == kind).any(|one| one.status == "True")
}

fn named(names: impl IntoIterator<Item = String>) -> String {
    let all: Vec<String> = names.into_iter().collect();
    let shown = all.get(..NAMED_OBJECTS.min(all.len())).unwrap_or_default().join(", ");
    match all.len().saturating_sub(NAMED_OBJECTS) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn operators(facts: &Facts) -> Check {
    let system = &facts.system_namespace;
    let pods = match &facts.operators {
        Err(error) => return Check::unreadable("operator", error),
        Ok(pods) => pods,
    };
    if pods.is_empty() {
        let fix = "install the chart, scale its Deployment up, or name its namespace with --system-namespace";
        return Check::failed("operator", format!("no pod in namespace {system}"), fix);
    }
    let logs = format!("kubectl --namespace {system} logs deployment/trustformers-operator --all-pods");
    let ready: Vec<&Pod> = pods.iter().filter(|pod| is_ready(pod)).collect();
    if ready.is_empty() {
        return Check::failed("operator", format!("none of {} pods is ready", pods.len()), logs);
    }
    let leads = |pod: &&&Pod| pod.labels().get(LEADER_LABEL).is_some_and(|leads| leads == "true");
    let leaders = named(ready.iter().filter(leads).map(|pod| pod.name_any()));
    if leaders.is_empty() {
        return Check::failed("operator", format!("{} pods are ready and none leads", ready.len()), logs);
    }
    let message = format!("{} of {} pods are ready; {leaders} leads", ready.len(), pods.len());
    if ready.len() < pods.len() {
        return Check::warning("operator", message, logs);
    }
    Check::ok("operator", message)
}

fn lease(facts: &Facts) -> Check {
    let fix = format!(
        "kubectl --namespace {} logs deployment/trustformers-operator --all-pods; without a leader pods that serve go \
         on, and nothing changes",
        facts.system_namespace
    );
    let lease = match &facts.lease {
        Err(error) => return Check::unreadable("leader", error),
        Ok(None) => return Check::failed("leader", "there is no Lease: no operator has led yet", fix),
        Ok(Some(lease)) => lease,
    };
    let age = lease.renewed.map(|renewed| facts.now.as_second() - renewed.as_second());
    match age {
        _ if lease.holder.is_empty() => Check::failed("leader", "nobody holds the Lease", fix),
        Some(age) if age <= RENEWED_WITHIN_S => {
            Check::ok("leader", format!("{} renewed the Lease {} ago", lease.holder, text::seconds(age)))
        }
        Some(age) => Check::failed(
            "leader",
            format!("{} renewed the Lease {} ago; it lasts 10s", lease.holder, text::seconds(age)),
            fix,
        ),
        None => Check::failed("leader", format!("{} never renewed the Lease", lease.holder), fix),
    }
}

fn gateways(facts: &Facts) -> Check {
    let system = &facts.system_namespace;
    let pods = match &facts.gateways {
        Err(error) => return Check::unreadable("gateways", error),
        Ok(pods) => pods,
    };
    if pods.is_empty() {
        let fix = "install the gateway of the chart, or reach pods through the Service of their model";
        return Check::warning("gateways", format!("no pod in namespace {system}"), fix);
    }
    let unready: Vec<String> = pods.iter().filter(|pod| !is_ready(pod)).map(ResourceExt::name_any).collect();
    if unready.is_empty() {
        return Check::ok("gateways", format!("{} of {} pods are ready", pods.len(), pods.len()));
    }
    let message = format!(
        "{} of {} pods are ready; not ready: {}",
        pods.len() - unready.len(),
        pods.len(),
        named(unready.iter().cloned())
    );
    let fix =
        format!("kubectl --namespace {system} describe pods --selector app.kubernetes.io/component=gateway");
    if unready.len() == pods.len() {
        return Check::failed("gateways", message, fix);
    }
    Check::warning("gateways", message, fix)
}

fn acknowledgements(facts: &Facts) -> Check {
    const NAME: &str = "acknowledgements";
    let pods = match &facts.model_pods {
        Err(error) => return Check::unreadable(NAME, error),
        Ok(pods) => pods,
    };
    let fix = "see the logs of the gateways and of the operator: a gateway needs its token and port 9091 of the operator";
    let waits = |pod: &&Pod| {
        is_true(pod, "ContainersReady")
            && !is_true(pod, ROUTABLE_GATE)
            && pod.metadata.deletion_timestamp.is_none()
            && ready_since(pod).is_some_and(|since| facts.now.as_second() - since > ACKNOWLEDGED_WITHIN_S)
    };
    let waiting: Vec<String> = pods.iter().filter(waits).map(ResourceExt::name_any).collect();
    if !waiting.is_empty() {
        let message = format!("pods wait for gateways: {}", named(waiting));
        return Check::failed(NAME, message, fix);
    }
    let recent =
        |event: &&GatewayEvent| event.at.is_some_and(|at| facts.now.as_second() - at.as_second() <= RECENT_S);
    let left_out: BTreeSet<String> =
        facts.gateway_events.iter().flatten().filter(recent).map(|event| event.pod.clone()).collect();
    if !left_out.is_empty() {
        let message = format!("in the last hour these gateways acknowledged nothing: {}", named(left_out));
        return Check::warning(NAME, message, fix);
    }
    match &facts.gateway_events {
        Err(error) => Check::unreadable(NAME, error),
        Ok(_) => Check::ok(NAME, "every pod that is ready is in the tables of the gateways"),
    }
}

/// Since when the containers of a pod are ready.
fn ready_since(pod: &Pod) -> Option<i64> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|one| one.type_ == "ContainersReady")?;
    Some(ready.last_transition_time.as_ref()?.0.as_second())
}

fn rights(facts: &Facts) -> Check {
    let unknown = facts.rights.iter().find_map(|right| right.allowed.as_ref().err());
    if let Some(error) = unknown {
        return Check::unreadable("your rights", error);
    }
    let missing = facts.rights.iter().filter(|right| right.allowed == Ok(false));
    let missing: Vec<String> =
        missing.map(|right| format!("{} {} in {}", right.verb, right.resource, right.namespace)).collect();
    if missing.is_empty() {
        return Check::ok("your rights", "every command of this plugin");
    }
    let message = format!("you may not: {}", missing.join(", "));
    Check::warning("your rights", message, "docs/kubectl.md has a Role with what each command needs")
}

fn image_volumes(facts: &Facts) -> Check {
    const NAME: &str = "image volumes";
    let needs = |model: &&InferenceModel| {
        model.spec.source.uri.starts_with("oci://") && model.spec.source.oci != Some(OciAccess::Pull)
    };
    let needing = facts.models.iter().flatten().filter(needs).map(ResourceExt::name_any);
    let needing = named(needing);
    match (&facts.image_volumes, needing.is_empty()) {
        (ImageVolumes::Kept, _) => Check::ok(NAME, "the API server accepts them"),
        (ImageVolumes::Dropped, false) => Check::failed(
            NAME,
            format!("the feature gate ImageVolume is off, and these models need it: {needing}"),
            "set spec.source.oci: Pull, or use Kubernetes 1.35 or newer",
        ),
        (ImageVolumes::Dropped, true) => Check::warning(
            NAME,
            "the feature gate ImageVolume is off; no model needs it",
            "for oci:// set spec.source.oci: Pull, or use Kubernetes 1.35 or newer",
        ),
        (ImageVolumes::Unknown(error), _) => Check::warning(
            NAME,
            format!("they could not be tried: {error}"),
            "run this command with the right to create pods (it creates none), or look at the version",
        ),
    }
}

fn models(facts: &Facts) -> Vec<Check> {
    let all = match &facts.models {
        Err(error) => return vec![Check::unreadable("models", error)],
        Ok(models) => models,
    };
    let faulty: Vec<Check> = all.iter().filter_map(|model| model_check(model, facts)).collect();
    let mut checks =
        vec![Check::ok("models", format!("{} of {} are ready", all.len() - faulty.len(), all.len()))];
    checks.extend(faulty);
    checks
}

/// What is wrong with a model, if anything.
fn model_check(model: &InferenceModel, facts: &Facts) -> Option<Check> {
    let namespace = model.namespace().unwrap_or_default();
    let name = format!("model {namespace}/{}", model.name_any());
    let Some(status) = &model.status else {
        return Some(Check::failed(
            name,
            "the operator has not looked at it",
            "see the checks of the operator above",
        ));
    };
    if status.observed_generation < model.metadata.generation {
        let message = "the operator has not looked at its last change";
        return Some(Check::warning(name, message, "see the checks of the operator above"));
    }
    let of = |kind: &str, value: &str| {
        status.conditions.iter().find(|one| one.type_ == kind && one.status == value)
    };
    let ready = of("Ready", "False").or(of("Ready", "Unknown"));
    // The cause is in `Degraded`, where there is one; `RolloutHealthy` has what a person must decide.
    let fault = of("Degraded", "True").or(of("RolloutHealthy", "False"));
    // What is missing beside: an autoscaler, an object of another project, the bare name.
    let missing = || MISSING_CONDITIONS.into_iter().find_map(|kind| of(kind, "False"));
    let cause = fault.or(ready).or_else(missing)?;
    if status.phase == Some(Phase::Stopped) {
        return None;
    }
    let age = text::age(cause.last_transition_time.0, facts.now);
    let message = format!("{} for {age}: {}", cause.reason, cause.message);
    let fix = fix_for(cause, &namespace, &model.name_any());
    let in_progress = matches!(status.phase, Some(Phase::Pending | Phase::Loading | Phase::Updating));
    let serves = ready.is_none();
    Some(if fault.is_none() && (in_progress || serves) {
        Check::warning(name, message, fix)
    } else {
        Check::failed(name, message, fix)
    })
}

fn fix_for(cause: &Condition, namespace: &str, name: &str) -> String {
    let fix = match cause.reason.as_str() {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" => {
            "check the image of spec.source or spec.runtime.image, and that nodes may pull it"
        }
        "Unschedulable" | "NoCapacity" => {
            "add nodes or lower spec.runtime.resources; during a rollout, allow spec.disruption.maxUnavailable: 1"
        }
        "OOMKilled" | "InsufficientMemory" => {
            "raise the memory limit in spec.runtime.resources, or lower spec.runtime.contextTokens"
        }
        "DigestMismatch" => "correct spec.source.sha256, or find out who changed the file",
        "WrongAnswer" => {
            "the files are not those that the golden prompts were written for: correct one of the two"
        }
        "ErrorRate" | "Latency" => {
            "the revision was rolled back: correct it, or `kubectl trustformers rollout promote` tries it again"
        }
        "InvalidSpec" => "the message names the field and the value",
        "GatewaysSilent" => "see the checks of the gateways above",
        "NodeNotReady" => "kubectl get nodes; pods move when the node's are evicted",
        "CreateContainerConfigError" | "FailedMount" => {
            "create the Secret, ConfigMap or claim that the message names"
        }
        "FailedCreate" => "a quota or a policy of the namespace refuses pods: the message names it",
        _ => "",
    };
    let look = format!("kubectl trustformers status {name} --namespace {namespace}");
    if fix.is_empty() { look } else { format!("{fix}; {look}") }
}

#[cfg(test)]
mod tests;
