//! Why a pod does not serve, as reported by kubelet, the scheduler or the pod itself.
//!
//! The reason is a CamelCase word that Kubernetes or the runtime already uses (`ErrImagePull`,
//! `Unschedulable`,
//! `DigestMismatch`). The message names the object and the next step. Numbers that change by themselves, such
//! as kubelet's back-off between restarts, are omitted: each change would write the status again.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Event, Pod};
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::names;

/// Why a pod does not serve.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cause {
    /// One CamelCase word.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Cause {
    fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

/// What is wrong with a pod according to its status, if anything.
#[must_use]
pub fn of_pod(pod: &Pod) -> Option<Cause> {
    let status = pod.status.as_ref()?;
    let containers =
        status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    containers
        .filter_map(|one| of_container(name, one))
        .next()
        .or_else(|| of_phase(pod))
        .or_else(|| of_conditions(pod))
}

/// Reasons of Events that report a cause which is in no status: volumes that cannot be mounted or attached,
/// and sandboxes that cannot be created.
pub const EVENT_REASONS: &[&str] = &["FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"];

/// Kubelet repeats an Event when the problem persists. The first one may be a short delay, such as a
/// ConfigMap that has not reached the node yet.
const PERSISTENT_COUNT: i32 = 2;

/// What is wrong with a pod whose containers have not started, according to an Event about it.
#[must_use]
pub fn of_event(event: &Event) -> Option<Cause> {
    let reason = event.reason.as_deref().filter(|reason| EVENT_REASONS.contains(reason))?;
    let repeated = event.series.as_ref().and_then(|series| series.count).or(event.count).unwrap_or(1);
    let pod = event.involved_object.name.as_deref().unwrap_or_default();
    let message = event.message.as_deref().unwrap_or("kubelet gives no details").trim();
    let advice = match reason {
        "FailedCreatePodSandBox" => "check the node's network and the pod's runtimeClassName",
        _ => "check the volume that spec.source.uri names",
    };
    (repeated >= PERSISTENT_COUNT).then(|| Cause::new(reason, format!("pod {pod}: {message}; {advice}")))
}

/// What is wrong with the model according to the pod, if anything: it failed, or it retries for a reason.
#[must_use]
pub fn of_report(report: &ModelStatus) -> Option<Cause> {
    let failed = report.state == ModelState::Failed as i32;
    let retried = report.state == ModelState::Loading as i32 && !report.reason.is_empty();
    let reason = if report.reason.is_empty() { "ModelFailed" } else { &report.reason };
    (failed || retried).then(|| Cause::new(reason, report.message.clone()))
}

fn of_container(pod: &str, status: &ContainerStatus) -> Option<Cause> {
    let last = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    match status.state.as_ref()? {
        ContainerState { waiting: Some(waiting), .. } => {
            match waiting.reason.as_deref().unwrap_or_default() {
                "" | "ContainerCreating" | "PodInitializing" => None,
                "CrashLoopBackOff" => Some(last.map_or_else(
                    || {
                        Cause::new(
                            "CrashLoopBackOff",
                            format!("container {} of pod {pod} keeps ending", status.name),
                        )
                    },
                    |end| ended(pod, &status.name, end),
                )),
                reason => {
                    let message = waiting.message.as_deref().unwrap_or("kubelet gives no details");
                    let (reason, message) = last_pull_error(reason, message);
                    Some(Cause::new(reason, format!("container {} of pod {pod}: {message}", status.name)))
                }
            }
        }
        ContainerState { terminated: Some(end), .. } => Some(ended(pod, &status.name, end)),
        // It runs again, but the reason why it ended matters until it serves.
        _ if !status.ready => last
            .filter(|end| end.reason.as_deref() == Some("OOMKilled"))
            .map(|end| ended(pod, &status.name, end)),
        _ => None,
    }
}

/// Between two attempts to pull an image, kubelet's message repeats the error of the last attempt. The cause
/// is that error, so that it does not change with every attempt.
fn last_pull_error<'a>(reason: &'a str, message: &'a str) -> (&'a str, &'a str) {
    let attempt = (reason == "ImagePullBackOff").then(|| message.split_once(": ErrImagePull: ")).flatten();
    attempt.map_or((reason, message), |(_, error)| ("ErrImagePull", error))
}

fn ended(pod: &str, container: &str, end: &ContainerStateTerminated) -> Cause {
    if end.reason.as_deref() == Some("OOMKilled") {
        let advice = "raise spec.runtime.resources.limits.memory, or lower contextTokens or maxBatchSize";
        return Cause::new(
            "OOMKilled",
            format!("container {container} of pod {pod} exceeded its memory limit: {advice}"),
        );
    }
    let why = end.message.as_deref().filter(|text| !text.is_empty()).map(|text| format!(": {}", text.trim()));
    Cause::new(
        "CrashLoopBackOff",
        format!(
            "container {container} of pod {pod} ended with exit code {}{}; its last log: kubectl logs {pod} -c {container} --previous",
            end.exit_code,
            why.unwrap_or_default()
        ),
    )
}

fn of_phase(pod: &Pod) -> Option<Cause> {
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() != Some("Failed") {
        return None;
    }
    let reason = status.reason.as_deref().unwrap_or("PodFailed");
    let message = status.message.as_deref().unwrap_or("kubelet gives no details");
    Some(Cause::new(reason, format!("pod {}: {message}", pod.metadata.name.as_deref().unwrap_or_default())))
}

fn of_conditions(pod: &Pod) -> Option<Cause> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let scheduled = conditions.iter().find(|one| one.type_ == "PodScheduled" && one.status == "False")?;
    let reason = scheduled.reason.as_deref().unwrap_or("Unschedulable");
    if reason == "SchedulingGated" {
        return None;
    }
    Some(Cause::new(reason, scheduled.message.clone().unwrap_or_default()))
}

/// How often kubelet has restarted the container.
pub(crate) fn restarts(pod: &Pod) -> u32 {
    main_container(pod).map_or(0, |one| u32::try_from(one.restart_count).unwrap_or(0))
}

/// Whether the container runs.
pub(crate) fn runs(pod: &Pod) -> bool {
    main_container(pod).and_then(|one| one.state.as_ref()).is_some_and(|state| state.running.is_some())
}

fn main_container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|one| one.name == names::CONTAINER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(status: &str) -> Option<Cause> {
        let pod: Pod = serde_yaml::from_str(&format!("metadata: {{name: p}}\nstatus: {status}\n")).unwrap();
        of_pod(&pod)
    }

    fn waiting(reason: &str, message: &str) -> Option<Cause> {
        cause(&format!(
            "{{containerStatuses: [{{name: runtime, ready: false, restartCount: 0, image: i, imageID: '', state: {{waiting: {{reason: {reason}, message: '{message}'}}}}}}]}}"
        ))
    }

    #[test]
    fn kubelets_reason_and_message_are_used() {
        for reason in ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "CreateContainerConfigError"]
        {
            let cause = waiting(reason, "no such image localhost/none:1").unwrap();
            assert_eq!(cause.reason, reason);
            assert!(cause.message.contains("localhost/none:1"), "{}", cause.message);
        }
        assert_eq!(waiting("ContainerCreating", ""), None);
    }

    #[test]
    fn a_pull_back_off_has_the_cause_of_the_last_pull() {
        let pull = waiting("ErrImagePull", "failed to pull x:1");
        assert_eq!(
            waiting("ImagePullBackOff", "Back-off pulling image x:1: ErrImagePull: failed to pull x:1"),
            pull
        );
    }

    #[test]
    fn a_crash_loop_has_the_exit_code_and_not_the_back_off() {
        let crash_loop = |pause: &str| {
            cause(&format!(
                "{{containerStatuses: [{{name: runtime, ready: false, restartCount: 3, image: i, imageID: '', state: {{waiting: {{reason: CrashLoopBackOff, message: back-off {pause}}}}}, lastState: {{terminated: {{exitCode: 2, reason: Error}}}}}}]}}"
            ))
        };
        assert_eq!(crash_loop("10s"), crash_loop("20s"));
        assert!(crash_loop("10s").unwrap().message.contains("exit code 2"));
    }

    #[test]
    fn an_out_of_memory_kill_is_the_cause_until_the_pod_serves() {
        let killed = |ready: bool| {
            cause(&format!(
                "{{containerStatuses: [{{name: runtime, ready: {ready}, restartCount: 1, image: i, imageID: '', state: {{running: {{}}}}, lastState: {{terminated: {{exitCode: 137, reason: OOMKilled}}}}}}]}}"
            ))
        };
        assert_eq!(killed(false).unwrap().reason, "OOMKilled");
        assert_eq!(killed(true), None);
    }

    #[test]
    fn an_unschedulable_pod_has_the_schedulers_reason() {
        let cause = cause(
            "{conditions: [{type: PodScheduled, status: 'False', reason: Unschedulable, message: '0/2 nodes are available'}]}",
        );
        assert_eq!(cause.unwrap().reason, "Unschedulable");
    }

    #[test]
    fn an_evicted_pod_has_its_reason() {
        let cause = cause("{phase: Failed, reason: Evicted, message: 'low on memory'}").unwrap();
        assert_eq!(cause.reason, "Evicted");
        assert!(cause.message.contains("low on memory"));
    }

    #[test]
    fn an_event_is_a_cause_once_it_repeats() {
        let event = |reason: &str, count: i32| -> Event {
            serde_yaml::from_str(&format!(
                "metadata: {{}}\ninvolvedObject: {{kind: Pod, name: p, uid: u}}\nreason: {reason}\ncount: {count}\nmessage: hostPath type check failed\n"
            ))
            .unwrap()
        };
        assert_eq!(of_event(&event("FailedMount", 1)), None, "kubelet retries a short delay by itself");
        let cause = of_event(&event("FailedMount", 2)).unwrap();
        assert_eq!(cause.reason, "FailedMount");
        assert!(cause.message.contains("pod p: hostPath type check failed"), "{}", cause.message);
        assert_eq!(of_event(&event("Unhealthy", 9)), None);
    }

    #[test]
    fn a_pods_report_is_a_cause_if_it_failed_or_retries() {
        let mut report = ModelStatus { reason: "DigestMismatch".to_owned(), ..ModelStatus::default() };
        assert_eq!(of_report(&report), None);
        report.state = ModelState::Loading as i32;
        assert_eq!(of_report(&report).unwrap().reason, "DigestMismatch");
        assert_eq!(of_report(&ModelStatus { reason: String::new(), ..report.clone() }), None);
        report.state = ModelState::Failed as i32;
        assert_eq!(of_report(&report).unwrap().reason, "DigestMismatch");
    }
}
