//! What nodes have beside processors and memory, such as GPUs: Kubernetes' extended resources.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::runtime::watcher::Event;

/// Amounts of each resource of one node, by the resource's name.
type Amounts = BTreeMap<String, u32>;

#[derive(Debug, Default)]
struct Listed {
    now: BTreeMap<String, Amounts>,
    /// A list that is not complete yet.
    next: BTreeMap<String, Amounts>,
}

/// The extended resources of the nodes that take pods. Other nodes need no memory here.
#[derive(Debug, Default)]
pub struct ExtendedResources(Mutex<Listed>);

impl ExtendedResources {
    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the nodes.
    pub fn apply(&self, event: &Event<Node>) {
        let mut listed = self.lock();
        match event {
            Event::Init => listed.next.clear(),
            Event::InitApply(node) => set(&mut listed.next, node),
            Event::InitDone => listed.now = std::mem::take(&mut listed.next),
            Event::Apply(node) => set(&mut listed.now, node),
            Event::Delete(node) => {
                listed.now.remove(&node.name_any());
            }
        }
    }

    /// How much of one resource each node has; nodes without it are left out.
    #[must_use]
    pub fn of(&self, resource: &str) -> BTreeMap<String, u32> {
        let listed = self.lock();
        let amounts = listed.now.iter().filter_map(|(node, all)| Some((node.clone(), *all.get(resource)?)));
        amounts.collect()
    }
}

fn set(nodes: &mut BTreeMap<String, Amounts>, node: &Node) {
    let amounts = if takes_pods(node) { amounts(node) } else { Amounts::new() };
    if amounts.is_empty() {
        nodes.remove(&node.name_any());
    } else {
        nodes.insert(node.name_any(), amounts);
    }
}

fn takes_pods(node: &Node) -> bool {
    let is_cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let is_ready = conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    is_ready && !is_cordoned
}

/// Device plugins report whole numbers under a name with the domain of their vendor.
fn amounts(node: &Node) -> Amounts {
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let extended = allocatable.into_iter().flatten().filter(|(name, _)| name.contains('/'));
    extended
        .filter_map(|(name, amount)| Some((name.clone(), amount.0.parse::<u32>().ok()?)))
        .filter(|(_, amount)| *amount > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(name: &str, ready: &str, spec: &Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec, "status": {
            "allocatable": {"cpu": "8", "memory": "9Gi", "hugepages-2Mi": "0", "nvidia.com/gpu": "4", "amd.com/gpu": "0"},
            "conditions": [{"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    #[test]
    fn nodes_that_take_pods_have_what_their_device_plugins_report() {
        let resources = ExtendedResources::default();
        let of = |resource: &str| resources.of(resource).into_iter().collect::<Vec<_>>();
        let free = json!({});
        resources.apply(&Event::Init);
        for (name, ready, spec) in
            [("a", "True", &free), ("b", "Unknown", &free), ("c", "True", &json!({"unschedulable": true}))]
        {
            resources.apply(&Event::InitApply(node(name, ready, spec)));
        }
        assert_eq!(of("nvidia.com/gpu"), [], "the list is not complete");
        resources.apply(&Event::InitDone);
        assert_eq!(of("nvidia.com/gpu"), [("a".to_owned(), 4)]);
        assert_eq!((of("amd.com/gpu"), of("cpu")), (Vec::new(), Vec::new()));
        resources.apply(&Event::Apply(node("b", "True", &free)));
        resources.apply(&Event::Apply(node("a", "Unknown", &free)));
        assert_eq!(of("nvidia.com/gpu"), [("b".to_owned(), 4)]);
        resources.apply(&Event::Delete(node("b", "True", &free)));
        assert_eq!(of("nvidia.com/gpu"), []);
    }
}
