//! Which Events a change of status is worth.
//!
//! Events are derived from the difference of two stored statuses, so that a restarted operator repeats none of them and
//! a cause that stays is told once.

use trustformers_crds::{Condition, InferenceModelStatus};

/// An Event to publish about a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happening {
    /// Whether something is wrong.
    pub warning: bool,
    /// One CamelCase word.
    pub reason: String,
    /// A sentence for a person.
    pub note: String,
}

/// Longest note that the API server takes is 1024 bytes.
const NOTE_BYTES: usize = 1000;

/// What happened between two statuses.
#[must_use]
pub fn between(before: &InferenceModelStatus, after: &InferenceModelStatus) -> Vec<Happening> {
    let mut happenings = Vec::new();
    if let Some(wrong) = news(before, after, "Degraded", "True") {
        happenings.push(happening(true, &wrong.reason, &wrong.message));
    }
    if let Some(taken) = news(before, after, "BareName", "False") {
        happenings.push(happening(true, "BareNameTaken", &taken.message));
    }
    if let Some(step) = news(before, after, "Progressing", "True")
        && matches!(step.reason.as_str(), "Loading" | "RollingOut")
        && find(before, "Progressing").is_none_or(|old| old.reason != step.reason)
    {
        happenings.push(happening(false, &step.reason, &step.message));
    }
    if let Some(ready) = news(before, after, "Ready", "True") {
        happenings.push(happening(false, "Ready", &ready.message));
    }
    happenings
}

/// The condition, if it has this status now and said something else before.
fn news<'a>(
    before: &InferenceModelStatus,
    after: &'a InferenceModelStatus,
    kind: &str,
    status: &str,
) -> Option<&'a Condition> {
    let now = find(after, kind).filter(|one| one.status == status)?;
    let known = find(before, kind).is_some_and(|old| {
        (&old.status, &old.reason, &old.message) == (&now.status, &now.reason, &now.message)
    });
    (!known).then_some(now)
}

fn find<'a>(status: &'a InferenceModelStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|one| one.type_ == kind)
}

fn happening(warning: bool, reason: &str, note: &str) -> Happening {
    let mut end = note.len().min(NOTE_BYTES);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    Happening { warning, reason: reason.to_owned(), note: note[..end].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::causes::Cause;
    use crate::status::refused;
    use k8s_openapi::jiff::Timestamp;

    fn failed(reason: &str, message: &str) -> InferenceModelStatus {
        let cause = Cause { reason: reason.to_owned(), message: message.to_owned() };
        refused(1, &cause, &InferenceModelStatus::default(), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_cause_is_told_once() {
        let none = InferenceModelStatus::default();
        let wrong = failed("DigestMismatch", "aa is not bb");
        let told = between(&none, &wrong);
        assert_eq!(told.len(), 1);
        assert!(told[0].warning && told[0].reason == "DigestMismatch");
        assert_eq!(between(&wrong, &wrong), []);
        assert_eq!(between(&wrong, &failed("DigestMismatch", "aa is not cc")).len(), 1);
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let told = between(&InferenceModelStatus::default(), &failed("X", &"é".repeat(900)));
        assert_eq!(told[0].note.len(), 1000);
    }
}
