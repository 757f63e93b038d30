//! Which pods of a pool end first when it is made smaller.
//!
//! Kubernetes ends pods that are not ready first, and of the others those with the lowest deletion cost. So
//! as many pods as must end get a cost below that of the others, which have none: one write for each pod that
//! ends, and none for those that stay.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::pods::PodView;
use crate::versions;

/// Annotation of a pod by which Kubernetes chooses: a whole number of 32 bits, 0 without it.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// 2020-01-01, in seconds since 1970. Costs that count from there fit until 2088: 2^31 s are 68 years.
const COST_EPOCH_S: i64 = 1_577_836_800;

/// A pod that serves, and may end.
#[derive(Debug, Clone, Copy)]
pub struct ServingPod<'a> {
    /// The pod.
    pub pod: &'a PodView,
    /// What it reported of its model; none if it has not yet.
    pub report: Option<&'a ModelStatus>,
    /// Requests of gateways that it answers now; none if it did not say.
    pub load: Option<u32>,
}

/// Pods of a pool that serve and must end for it to have `replicas`. Those that do not serve end first.
#[must_use]
pub fn serving_excess(pods: &[PodView], pool: &str, replicas: u32) -> usize {
    let live = || pods.iter().filter(|pod| pod.counts() && pod.revision == pool);
    let excess = live().count().saturating_sub(usize::try_from(replicas).unwrap_or(usize::MAX));
    excess.saturating_sub(live().filter(|pod| !pod.ready).count())
}

/// The pods to end, `number` of those that serve: no pod that alone has a revision loaded while another can
/// end, then those with the fewest requests. None where nothing tells them apart.
#[must_use]
pub fn first_to_end<'a>(mut serving: Vec<ServingPod<'a>>, number: usize) -> Vec<&'a PodView> {
    let mut holders: BTreeMap<String, usize> = BTreeMap::new();
    for revision in serving.iter().flat_map(loaded) {
        *holders.entry(revision).or_default() += 1;
    }
    let is_last = |one: &ServingPod<'_>, holders: &BTreeMap<String, usize>| {
        loaded(one).iter().any(|revision| holders.get(revision) == Some(&1))
    };
    let key = |one: &ServingPod<'_>, holders: &BTreeMap<String, usize>| {
        // One that does not answer may have most to do.
        (is_last(one, holders), one.load.unwrap_or(u32::MAX))
    };
    let all_alike = serving.windows(2).all(|pair| key(&pair[0], &holders) == key(&pair[1], &holders));
    if all_alike || serving.len() <= number {
        return Vec::new();
    }
    let mut chosen = Vec::new();
    for _ in 0..number {
        let next =
            serving.iter().enumerate().min_by_key(|(_, one)| (key(one, &holders), one.pod.name.as_str()));
        let Some((at, _)) = next else { break };
        let ended = serving.swap_remove(at);
        for revision in loaded(&ended) {
            if let Some(count) = holders.get_mut(&revision) {
                *count -= 1;
            }
        }
        chosen.push(ended.pod);
    }
    chosen
}

/// The revisions that a pod can answer with.
fn loaded(one: &ServingPod<'_>) -> Vec<String> {
    let Some(report) = one.report else { return vec![one.pod.revision.clone()] };
    let slots = versions::slots(one.pod, report).into_iter();
    slots.filter(|slot| slot.state() == ModelState::Ready).map(|slot| slot.revision).collect()
}

/// The cost of a pod that is to end: below that of pods without one, and below every earlier mark, so that a
/// pod which was to end and stayed is no choice of its own later.
#[must_use]
pub fn cost(now: Timestamp) -> i32 {
    let since = now.as_second().saturating_sub(COST_EPOCH_S).max(1);
    i32::try_from(since).map_or(i32::MIN, |since| -since)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::view;
    use trustformers_proto::v1::ModelSlot;

    fn report(revisions: &[&str]) -> ModelStatus {
        let slot = |revision: &&str| {
            let mut slot = ModelSlot { revision: (*revision).to_owned(), ..ModelSlot::default() };
            slot.set_state(ModelState::Ready);
            slot
        };
        ModelStatus { slots: revisions.iter().map(slot).collect(), ..ModelStatus::default() }
    }

    fn named(pods: &[&PodView]) -> Vec<String> {
        pods.iter().map(|pod| pod.name.clone()).collect()
    }

    #[test]
    fn pods_that_do_not_serve_end_without_a_mark() {
        let ready = |name: &str, ready: bool| PodView { ready, ..view("chat", name) };
        let pods = [ready("a", true), ready("b", true), ready("c", false)];
        let pool = pods[0].revision.clone();
        assert_eq!(serving_excess(&pods, &pool, 3), 0);
        assert_eq!(serving_excess(&pods, &pool, 2), 0, "c ends by itself");
        assert_eq!(serving_excess(&pods, &pool, 1), 1);
        assert_eq!(serving_excess(&pods, "other", 0), 0);
    }

    #[test]
    fn the_pods_with_the_fewest_requests_end() {
        let pods = ["a", "b", "c", "d"].map(|name| view("chat", name));
        let loads = [Some(7), Some(0), None, Some(2)];
        let serving =
            || pods.iter().zip(loads).map(|(pod, load)| ServingPod { pod, report: None, load }).collect();
        assert_eq!(named(&first_to_end(serving(), 1)), ["b"]);
        assert_eq!(named(&first_to_end(serving(), 3)), ["b", "d", "a"], "c did not answer");
        assert_eq!(named(&first_to_end(serving(), 4)), Vec::<String>::new(), "all of them end");
    }

    #[test]
    fn pods_that_nothing_tells_apart_are_left_to_kubernetes() {
        let pods = ["a", "b"].map(|name| view("chat", name));
        for load in [None, Some(3)] {
            let serving = pods.iter().map(|pod| ServingPod { pod, report: None, load }).collect();
            assert_eq!(named(&first_to_end(serving, 1)), Vec::<String>::new());
        }
    }

    #[test]
    fn the_only_pod_with_a_revision_stays_whatever_it_does() {
        let pods = ["a", "b", "c"].map(|name| view("chat", name));
        let (both, one) = (report(&["r1", "r2"]), report(&["r1"]));
        let reports = [&both, &one, &one];
        let serving = |loads: [u32; 3]| {
            let of = |((pod, report), load)| ServingPod { pod, report: Some(report), load: Some(load) };
            pods.iter().zip(reports).zip(loads).map(of).collect::<Vec<_>>()
        };
        assert_eq!(named(&first_to_end(serving([0, 5, 6]), 1)), ["b"]);
        assert_eq!(named(&first_to_end(serving([0, 5, 6]), 2)), ["b", "c"]);
        assert_eq!(named(&first_to_end(serving([9, 9, 9]), 1)), ["b"]);
    }

    #[test]
    fn a_later_mark_counts_more_than_an_earlier_one() {
        let at = |second: i64| cost(Timestamp::from_second(second).unwrap());
        assert!(at(1_800_000_001) < at(1_800_000_000) && at(1_800_000_000) < 0);
        assert_eq!(at(0), -1);
        assert_eq!(at(9_000_000_000), i32::MIN);
    }
}
