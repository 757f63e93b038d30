//! How many pods of a model the GPUs of the cluster have room for.
//!
//! It is an estimate: what pods outside of any model have, and rules about nodes, are not known. Where it is
//! too high, the scheduler takes no pod, and the rollout goes on from that.

use std::collections::BTreeMap;

use crate::pods::PodView;

/// What the estimate is made from.
#[derive(Debug, Clone, Copy)]
pub struct GpuDemand<'a> {
    /// GPUs of each pod, at least one.
    pub gpus: u32,
    /// GPUs of the nodes that take pods, by the node's name. Nodes without any are left out.
    pub nodes: &'a BTreeMap<String, u32>,
    /// GPUs that pods of other models have, by the name of their node.
    pub others: &'a BTreeMap<String, u32>,
    /// The model's own pods.
    pub own: &'a [PodView],
}

/// The model's pods that may exist at the same time; none where no node has such GPUs: an autoscaler of nodes
/// may add some.
#[must_use]
pub fn budget(demand: &GpuDemand<'_>) -> Option<u32> {
    if demand.nodes.is_empty() {
        return None;
    }
    let room = |(node, gpus): (&String, &u32)| {
        let used = demand.others.get(node).copied().unwrap_or(0);
        gpus.saturating_sub(used) / demand.gpus.max(1)
    };
    let on_nodes = demand.nodes.iter().map(room).fold(0, u32::saturating_add);
    // Those on nodes that take no more pods stay there.
    let elsewhere = demand
        .own
        .iter()
        .filter(|pod| !pod.ended && pod.node.as_ref().is_some_and(|node| !demand.nodes.contains_key(node)));
    Some(on_nodes.saturating_add(u32::try_from(elsewhere.count()).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::view;

    fn amounts(of: &[(&str, u32)]) -> BTreeMap<String, u32> {
        of.iter().map(|(node, gpus)| ((*node).to_owned(), *gpus)).collect()
    }

    #[test]
    fn whole_pods_fit_on_what_others_leave_of_each_node() {
        let nodes = amounts(&[("a", 4), ("b", 3), ("c", 1)]);
        let others = amounts(&[("a", 1), ("c", 2), ("gone", 9)]);
        let demand = GpuDemand { gpus: 2, nodes: &nodes, others: &others, own: &[] };
        assert_eq!(budget(&demand), Some(2), "one on a, one on b, none on c");
        assert_eq!(budget(&GpuDemand { gpus: 1, ..demand }), Some(6));
    }

    #[test]
    fn a_pod_on_a_node_that_takes_no_more_needs_no_room_elsewhere() {
        let (nodes, none) = (amounts(&[("a", 1)]), BTreeMap::new());
        let on = |node: &str| PodView { node: Some(node.to_owned()), ..view("chat", node) };
        let own = [on("a"), on("cordoned"), PodView { ended: true, ..on("cordoned") }];
        assert_eq!(budget(&GpuDemand { gpus: 1, nodes: &nodes, others: &none, own: &own }), Some(2));
    }

    #[test]
    fn without_any_node_of_the_kind_the_scheduler_decides() {
        let none = BTreeMap::new();
        assert_eq!(budget(&GpuDemand { gpus: 1, nodes: &none, others: &none, own: &[] }), None);
    }
}
