//! Why a pod does not serve, in the words of kubelet, the scheduler or the pod itself.
//!
//! The reason is a CamelCase word that others have coined already (`ErrImagePull`, `Unschedulable`,
//! `DigestMismatch`); the message names the object and the next step. Figures that change by themselves, such as
//! kubelet's growing pause between restarts, are left out: each change would be one more Event.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::names;

/// Why a pod does not serve.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cause {
    /// One CamelCase word.
    pub reason: String,
    /// A sentence for a person.
    pub message: String,
}

impl Cause {
    fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

/// What kubelet and the scheduler say is wrong with a pod, if anything is.
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

/// What the pod itself says is wrong with its model, if anything is: it failed for good, or tries again for a reason.
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
                    let said = waiting.message.as_deref().unwrap_or("kubelet gives no details");
                    let (reason, said) = behind_the_pause(reason, said);
                    Some(Cause::new(reason, format!("container {} of pod {pod}: {said}", status.name)))
                }
            }
        }
        ContainerState { terminated: Some(end), .. } => Some(ended(pod, &status.name, end)),
        // It runs again, but why it ended matters until it serves.
        _ if !status.ready => last
            .filter(|end| end.reason.as_deref() == Some("OOMKilled"))
            .map(|end| ended(pod, &status.name, end)),
        _ => None,
    }
}

/// While kubelet pauses between two attempts to pull, its message repeats what the last attempt gave, after its reason.
/// That is told, so that the cause does not change with every attempt.
fn behind_the_pause<'a>(reason: &'a str, said: &'a str) -> (&'a str, &'a str) {
    let attempt = (reason == "ImagePullBackOff").then(|| said.split_once(": ErrImagePull: ")).flatten();
    attempt.map_or((reason, said), |(_, said)| ("ErrImagePull", said))
}

fn ended(pod: &str, container: &str, end: &ContainerStateTerminated) -> Cause {
    if end.reason.as_deref() == Some("OOMKilled") {
        let advice = "raise spec.runtime.resources.limits.memory, or lower contextTokens or maxBatchSize";
        return Cause::new(
            "OOMKilled",
            format!("container {container} of pod {pod} was killed for its memory: {advice}"),
        );
    }
    let why = end.message.as_deref().filter(|text| !text.is_empty()).map(|text| format!(": {}", text.trim()));
    Cause::new(
        "CrashLoopBackOff",
        format!(
            "container {container} of pod {pod} ended with exit code {}{}; its last words: kubectl logs {pod} -c {container} --previous",
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
    let said = status.message.as_deref().unwrap_or("kubelet gives no details");
    Some(Cause::new(reason, format!("pod {}: {said}", pod.metadata.name.as_deref().unwrap_or_default())))
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
    fn kubelets_reason_and_words_are_kept() {
        for reason in ["ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "CreateContainerConfigError"]
        {
            let cause = waiting(reason, "no such image localhost/none:1").unwrap();
            assert_eq!(cause.reason, reason);
            assert!(cause.message.contains("localhost/none:1"), "{}", cause.message);
        }
        assert_eq!(waiting("ContainerCreating", ""), None);
    }

    #[test]
    fn the_pause_between_two_pulls_is_the_same_cause_as_the_pull() {
        let pull = waiting("ErrImagePull", "failed to pull x:1");
        assert_eq!(
            waiting("ImagePullBackOff", "Back-off pulling image x:1: ErrImagePull: failed to pull x:1"),
            pull
        );
    }

    #[test]
    fn a_crash_loop_tells_how_it_ended_and_not_how_long_the_pause_is() {
        let loops = |pause: &str| {
            cause(&format!(
                "{{containerStatuses: [{{name: runtime, ready: false, restartCount: 3, image: i, imageID: '', state: {{waiting: {{reason: CrashLoopBackOff, message: back-off {pause}}}}}, lastState: {{terminated: {{exitCode: 2, reason: Error}}}}}}]}}"
            ))
        };
        assert_eq!(loops("10s"), loops("20s"));
        assert!(loops("10s").unwrap().message.contains("exit code 2"));
    }

    #[test]
    fn a_kill_for_memory_is_told_until_the_pod_serves() {
        let killed = |ready: bool| {
            cause(&format!(
                "{{containerStatuses: [{{name: runtime, ready: {ready}, restartCount: 1, image: i, imageID: '', state: {{running: {{}}}}, lastState: {{terminated: {{exitCode: 137, reason: OOMKilled}}}}}}]}}"
            ))
        };
        assert_eq!(killed(false).unwrap().reason, "OOMKilled");
        assert_eq!(killed(true), None);
    }

    #[test]
    fn the_scheduler_is_heard() {
        let cause = cause(
            "{conditions: [{type: PodScheduled, status: 'False', reason: Unschedulable, message: '0/2 nodes are available'}]}",
        );
        assert_eq!(cause.unwrap().reason, "Unschedulable");
    }

    #[test]
    fn an_evicted_pod_says_so() {
        let cause = cause("{phase: Failed, reason: Evicted, message: 'low on memory'}").unwrap();
        assert_eq!(cause.reason, "Evicted");
        assert!(cause.message.contains("low on memory"));
    }

    #[test]
    fn a_pods_own_report_counts_when_it_failed_or_tries_again() {
        let mut report = ModelStatus { reason: "DigestMismatch".to_owned(), ..ModelStatus::default() };
        assert_eq!(of_report(&report), None);
        report.state = ModelState::Loading as i32;
        assert_eq!(of_report(&report).unwrap().reason, "DigestMismatch");
        assert_eq!(of_report(&ModelStatus { reason: String::new(), ..report.clone() }), None);
        report.state = ModelState::Failed as i32;
        assert_eq!(of_report(&report).unwrap().reason, "DigestMismatch");
    }
}
