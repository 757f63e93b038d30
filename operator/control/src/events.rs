//! Which Events a change of status publishes.
//!
//! Events follow from the difference of two statuses, so that a restarted operator repeats none of them. A
//! cause that only changes its wording, such as a count of nodes or the name of a pod, publishes none. A
//! model that starts as expected publishes none either: its conditions say what it does.

use trustformers_crds::{Condition, InferenceModelStatus, RolloutDecision};

/// An Event to publish about a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventNote {
    /// Whether something is wrong.
    pub warning: bool,
    /// One CamelCase word.
    pub reason: String,
    /// A sentence for people.
    pub note: String,
}

/// Longest note that the API server takes is 1024 bytes.
const NOTE_BYTES: usize = 1000;

/// The Events of a change from one status to another.
#[must_use]
pub fn between(before: &InferenceModelStatus, after: &InferenceModelStatus) -> Vec<EventNote> {
    let mut notes = Vec::new();
    if let Some(degraded) = changed(before, after, "Degraded", "True") {
        notes.push(note(true, &degraded.reason, &degraded.message));
    }
    if let Some(refused) = changed(before, after, "BareName", "False") {
        notes.push(note(true, "BareNameTaken", &refused.message));
    }
    if let Some(step) = changed(before, after, "Progressing", "True")
        && step.reason == "RollingOut"
        && find(before, "Progressing").is_none_or(|old| old.reason != step.reason)
    {
        notes.push(note(false, &step.reason, &step.message));
    }
    let newest = before.history.iter().map(|one| &one.time.0).max();
    let is_new = |one: &&RolloutDecision| {
        newest.is_none_or(|newest| one.time.0 >= *newest) && !before.history.contains(one)
    };
    for one in after.history.iter().filter(is_new).filter(|one| one.decision != "Passed") {
        let warning = matches!(one.decision.as_str(), "RolledBack" | "Held" | "Replaced");
        let text = format!("revision {}: {}: {}", one.revision, one.reason, one.message);
        notes.push(note(warning, &one.decision, &text));
    }
    let was_wrong = find(before, "Degraded").is_some_and(|one| one.status == "True");
    if let Some(ready) = changed(before, after, "Ready", "True")
        && (was_wrong || before.stable.is_some())
    {
        notes.push(note(false, "Ready", &ready.message));
    }
    notes
}

/// The condition, if it has this status now and had another status or reason before. Another message counts
/// only after an edit of the spec.
fn changed<'a>(
    before: &InferenceModelStatus,
    after: &'a InferenceModelStatus,
    kind: &str,
    status: &str,
) -> Option<&'a Condition> {
    let now = find(after, kind).filter(|one| one.status == status)?;
    let unchanged = find(before, kind).is_some_and(|old| {
        let same_spec = old.observed_generation == now.observed_generation;
        (&old.status, &old.reason) == (&now.status, &now.reason) && (same_spec || old.message == now.message)
    });
    (!unchanged).then_some(now)
}

fn find<'a>(status: &'a InferenceModelStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|one| one.type_ == kind)
}

fn note(warning: bool, reason: &str, note: &str) -> EventNote {
    let mut end = note.len().min(NOTE_BYTES);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    EventNote { warning, reason: reason.to_owned(), note: note[..end].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::causes::Cause;
    use crate::status::{Refusal, refused};
    use k8s_openapi::jiff::Timestamp;

    fn failed(generation: i64, reason: &str, message: &str) -> InferenceModelStatus {
        let cause = Cause { reason: reason.to_owned(), message: message.to_owned() };
        let refusal = Refusal { generation, cause: &cause, pods: &[], now: Timestamp::UNIX_EPOCH };
        refused(refusal, &InferenceModelStatus::default())
    }

    /// A status that is ready, or starts.
    fn started(ready: bool) -> InferenceModelStatus {
        let condition = |kind: &str, status: bool, reason: &str| Condition {
            type_: kind.to_owned(),
            status: if status { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            ..failed(1, "X", "").conditions[0].clone()
        };
        InferenceModelStatus {
            conditions: vec![
                condition("Ready", ready, if ready { "Ready" } else { "Loading" }),
                condition("Progressing", !ready, "Loading"),
                condition("Degraded", false, "AsExpected"),
            ],
            ..InferenceModelStatus::default()
        }
    }

    #[test]
    fn a_model_that_starts_as_expected_publishes_no_event() {
        let none = InferenceModelStatus::default();
        assert_eq!(between(&none, &started(false)), []);
        assert_eq!(between(&started(false), &started(true)), []);
        // That it recovered is news.
        let recovered = between(&failed(1, "CrashLoopBackOff", "exit code 9"), &started(true));
        assert_eq!((recovered.len(), recovered[0].reason.as_str()), (1, "Ready"));
    }

    #[test]
    fn a_lasting_cause_publishes_one_event() {
        let none = InferenceModelStatus::default();
        let before = failed(1, "Unschedulable", "0/57 nodes are available");
        let notes = between(&none, &before);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].warning && notes[0].reason == "Unschedulable");
        assert_eq!(between(&before, &before), []);
        assert_eq!(between(&before, &failed(1, "Unschedulable", "0/58 nodes are available")), []);
    }

    #[test]
    fn another_reason_or_an_edited_spec_publishes_an_event() {
        let before = failed(1, "InvalidSpec", "spec.source.uri: no");
        assert_eq!(between(&before, &failed(1, "NameTaken", "spec.source.uri: no")).len(), 1);
        assert_eq!(between(&before, &failed(2, "InvalidSpec", "spec.traffic.timeout: no")).len(), 1);
        assert_eq!(between(&before, &failed(2, "InvalidSpec", "spec.source.uri: no")), []);
    }

    #[test]
    fn a_long_note_ends_between_characters() {
        let notes = between(&InferenceModelStatus::default(), &failed(1, "X", &"é".repeat(900)));
        assert_eq!(notes[0].note.len(), 1000);
    }
}
