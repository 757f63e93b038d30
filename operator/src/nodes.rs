//! Which nodes are ready. The pods of a node that is not get no requests.
//!
//! The conditions of a pod are what its kubelet wrote last. When a node is lost, nobody writes them: its pods
//! would stay in route tables, with open gates, until they are evicted after minutes. So a node is watched
//! for its own condition `Ready`, which the cluster's node controller writes.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt};

use crate::context::Context;
use crate::queue::Lane;

/// Watches the nodes, without end.
pub async fn run(context: Arc<Context>) {
    let api = Api::<Node>::all(context.client.clone());
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    let mut ready = BTreeSet::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                context.extended.apply(&event);
                if update(&mut ready, &event) {
                    for (namespace, name) in context.set_ready_nodes(&ready) {
                        context.request(&namespace, &name, Lane::Child);
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the watch of nodes failed and starts again"),
        }
    }
}

/// Updates the names of the nodes that are ready. False if that changes nothing, or a new list is incomplete.
fn update(ready: &mut BTreeSet<String>, event: &Event<Node>) -> bool {
    match event {
        Event::Init => {
            ready.clear();
            false
        }
        Event::InitApply(node) => {
            set(ready, node);
            false
        }
        Event::InitDone => true,
        Event::Apply(node) => set(ready, node),
        Event::Delete(node) => ready.remove(&node.name_any()),
    }
}

fn set(ready: &mut BTreeSet<String>, node: &Node) -> bool {
    let name = node.name_any();
    if is_ready(node) { ready.insert(name) } else { ready.remove(&name) }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use crate::context::NewContext;
    use crate::context::tests::{metrics, settings};
    use crate::testing::mock_client;

    fn node(name: &str, ready: &str) -> Node {
        let conditions =
            json!([{"type": "Ready", "status": ready}, {"type": "DiskPressure", "status": "False"}]);
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    #[test]
    fn only_changes_of_readiness_count() {
        let mut ready = BTreeSet::new();
        for event in
            [Event::Init, Event::InitApply(node("a", "True")), Event::InitApply(node("b", "Unknown"))]
        {
            assert!(!update(&mut ready, &event));
        }
        assert!(update(&mut ready, &Event::InitDone));
        assert_eq!(ready, BTreeSet::from(["a".to_owned()]));
        assert!(!update(&mut ready, &Event::Apply(node("a", "True"))), "a heartbeat");
        assert!(update(&mut ready, &Event::Apply(node("a", "Unknown"))));
        assert!(update(&mut ready, &Event::Apply(node("a", "True"))));
        assert!(update(&mut ready, &Event::Delete(node("a", "True"))));
        assert!(ready.is_empty());
    }

    #[tokio::test]
    async fn pods_of_a_lost_node_are_not_routable() {
        let client = mock_client(|request| panic!("{request:?}"));
        let NewContext { context, mut writers, queue: _ } = Context::create(client, settings(), metrics());
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "team", "uid": "u",
                "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}},
            "spec": {"nodeName": "a", "containers": []},
            "status": {"podIP": "10.0.0.1", "conditions": [{"type": "ContainersReady", "status": "True"}]},
        }))
        .unwrap();
        writers.pods.apply_watcher_event(&Event::Apply(pod));
        let key = ("team".to_owned(), "chat".to_owned());
        let view = || context.pods.of_model(&key)[0].view.clone();
        assert!(view().routable(), "until nodes are listed nothing is known of them");
        let nodes = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let models = BTreeSet::from([key.clone()]);
        assert_eq!(context.set_ready_nodes(&nodes(&["a", "b"])), models);
        assert!(view().routable());
        assert_eq!(context.set_ready_nodes(&nodes(&["a"])), BTreeSet::new(), "it has no pod on b");
        assert_eq!(context.set_ready_nodes(&nodes(&["b"])), models);
        assert!(!view().routable());
        assert_eq!(view().cause.unwrap().reason, "NodeNotReady");
    }
}
