//! The versions of its model that one pod holds, as it reports them.

use trustformers_proto::v1::{ModelSlot, ModelState, ModelStatus, SlotRole};

use crate::pods::PodView;

/// The versions in a pod's slots; the first one answers requests that name no revision. A report without
/// slots is about one version: the one that the pod's own pool was made for.
#[must_use]
pub fn slots(pod: &PodView, report: &ModelStatus) -> Vec<ModelSlot> {
    if report.slots.is_empty() {
        return vec![ModelSlot {
            role: SlotRole::Current as i32,
            state: report.state,
            revision: pod.revision.clone(),
            digest: report.digest.clone(),
            reason: report.reason.clone(),
            message: report.message.clone(),
            loaded_bytes: report.loaded_bytes,
            total_bytes: report.total_bytes,
            since_unix_ms: report.since_unix_ms,
            ..ModelSlot::default()
        }];
    }
    report.slots.clone()
}

/// Whether the version has its weights, so that its digest is certain.
#[must_use]
pub fn is_loaded(slot: &ModelSlot) -> bool {
    matches!(slot.state(), ModelState::Ready | ModelState::Warming | ModelState::Draining)
}

/// The version of a revision in a pod, if the pod reported it.
#[must_use]
pub fn find(pod: &PodView, report: &ModelStatus, revision: &str) -> Option<ModelSlot> {
    slots(pod, report).into_iter().find(|slot| slot.revision == revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::view;

    #[test]
    fn a_report_without_slots_is_about_the_pods_own_revision() {
        let mut report = ModelStatus { digest: "d1".to_owned(), ..ModelStatus::default() };
        report.set_state(ModelState::Ready);
        let found = slots(&view("chat", "a"), &report);
        assert_eq!((found.len(), found[0].revision.as_str(), found[0].digest.as_str()), (1, "r1", "d1"));
        assert!(is_loaded(&found[0]));
        let second = ModelSlot { revision: "r2".to_owned(), ..ModelSlot::default() };
        report.slots = vec![found[0].clone(), second];
        assert!(find(&view("chat", "a"), &report, "r2").is_some());
        assert_eq!(find(&view("chat", "a"), &report, "r3"), None);
    }
}
