//! The Events of a test.

use trustformers_crds::ABTestStatus;

use crate::events::EventNote;

/// The Events of a change from one status to another.
#[must_use]
pub fn events(before: &ABTestStatus, after: &ABTestStatus) -> Vec<EventNote> {
    let find =
        |status: &ABTestStatus, kind: &str| status.conditions.iter().find(|one| one.type_ == kind).cloned();
    let mut notes = Vec::new();
    for kind in ["Accepted", "Serving", "SplitHealthy", "LoadMatched", "Sampling", "SamplesStored"] {
        let Some(now) = find(after, kind) else { continue };
        let old = find(before, kind);
        // The same status and reason with other words says nothing new, except that samples began anew.
        let is_new = old.as_ref().is_none_or(|old| {
            (&old.status, &old.reason) != (&now.status, &now.reason)
                || (kind == "Sampling" && old.message != now.message)
        });
        let is_sampling = kind == "Sampling";
        if is_new && (is_sampling || now.status == "False") {
            let is_good = ["Started", "BaselineEnded", "Winner", "Equivalent", "PromotionUndone"]
                .contains(&now.reason.as_str());
            notes.push(EventNote {
                warning: !(is_sampling && is_good),
                reason: now.reason.clone(),
                note: now.message.clone(),
            });
        }
    }
    if after.promoted != before.promoted && after.promoted > 0 {
        let winner = after.winner.clone().unwrap_or_default();
        notes.push(EventNote {
            warning: false,
            reason: "Promoted".to_owned(),
            note: format!("{winner} gets {} % of what the others had", after.promoted),
        });
    }
    notes
}
