//! Which gateway pods exist, and what is said about gateways that do not report or do not acknowledge.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use trustformers_control::causes::Cause;
use trustformers_control::events::EventNote;
use trustformers_control::gate::{BEHIND, GatewayPod};
use trustformers_control::names;
use trustformers_control::pods::PodView;

use super::FeedState;
use crate::context::Context;
use crate::queue::Lane;
use crate::recorder;

/// Watches the gateway pods of the operator's namespace, without end. Until the first list no gate opens.
pub async fn run(context: Arc<Context>, feed: Arc<FeedState>) {
    let api = Api::<Pod>::namespaced(context.client.clone(), &context.settings.namespace);
    let config = watcher::Config::default().labels(names::GATEWAY_SELECTOR);
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut pods = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if update(&mut pods, &event) && feed.set_gateway_pods(pods.values().cloned()) {
                    context.gates_changed.notify_one();
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the watch of gateway pods failed and starts again");
            }
        }
    }
}

/// Updates the gateway pods, by name. False while a new list is incomplete.
fn update(pods: &mut BTreeMap<String, GatewayPod>, event: &Event<Pod>) -> bool {
    match event {
        Event::Init => pods.clear(),
        Event::InitApply(pod) | Event::Apply(pod) => {
            let name = pod.metadata.name.clone().unwrap_or_default();
            match gateway_pod(pod) {
                Some(found) => pods.insert(name, found),
                None => pods.remove(&name),
            };
        }
        Event::Delete(pod) => {
            pods.remove(pod.metadata.name.as_deref().unwrap_or_default());
        }
        Event::InitDone => {}
    }
    !matches!(event, Event::Init | Event::InitApply(_))
}

/// Reads a gateway's pod; none if it is about to end.
fn gateway_pod(pod: &Pod) -> Option<GatewayPod> {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    if pod.metadata.deletion_timestamp.is_some() || matches!(phase, "Succeeded" | "Failed") {
        return None;
    }
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let ready = conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    Some(GatewayPod { uid: pod.metadata.uid.clone()?, name: pod.metadata.name.clone()?, ready })
}

/// What was said last about gates that do not open.
#[derive(Debug, Default)]
pub struct Announcements {
    hold: Option<Cause>,
}

impl Announcements {
    /// Publishes an Event about each gateway that was left out because it acknowledges nothing. When gates
    /// begin or end to wait for silent gateways, wakes the models whose pods wait, because their status says
    /// so.
    pub fn update(&mut self, context: &Arc<Context>, feed: &FeedState) {
        for instance in feed.newly_behind() {
            let pod = feed.gateway_pod(&instance);
            tracing::warn!(
                instance,
                pod = pod.as_ref().map(|pod| &pod.name),
                "a gateway acknowledges no table"
            );
            if let Some(pod) = pod {
                let context = Arc::clone(context);
                tokio::spawn(async move {
                    let about = about(&context, &pod);
                    recorder::publish(&context, &about, &[left_out()]).await;
                });
            }
        }
        let hold = feed.hold();
        if hold != self.hold {
            if let Some(hold) = &hold {
                tracing::warn!(message = hold.message, "no pod becomes ready");
            }
            self.hold = hold;
            wake_waiting(context);
        }
    }
}

fn about(context: &Context, pod: &GatewayPod) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(context.settings.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    }
}

fn left_out() -> EventNote {
    let note = format!(
        "this gateway reports, but has acknowledged no route table for {} s; pods become ready without it, and it \
         may send requests to pods that are gone: see its log, or delete its pod",
        BEHIND.as_secs()
    );
    EventNote { warning: true, reason: "GatewayLeftOut".to_owned(), note }
}

/// Requests a reconcile of each model with a pod whose gate waits.
fn wake_waiting(context: &Context) {
    for key in context.pods.models() {
        let pods = context.pods.of_model(&key);
        let waits = |pod: &PodView| pod.routable() && !pod.gate.is_some_and(|gate| gate.open);
        if pods.iter().any(|pod| waits(&pod.view)) {
            context.request(&key.0, &key.1, Lane::Child);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, ready: &str, change: impl Fn(&mut Value)) -> Pod {
        let mut pod = json!({
            "metadata": {"name": name, "namespace": "sys", "uid": format!("uid-{name}")},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
        });
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn gateway_pods_that_are_about_to_end_are_not_expected() {
        let ending =
            pod("a", "True", |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"));
        let evicted = pod("a", "False", |pod| pod["status"]["phase"] = json!("Failed"));
        assert_eq!((gateway_pod(&ending), gateway_pod(&evicted)), (None, None));
        let ready = |text: &str| gateway_pod(&pod("a", text, |_| {})).unwrap().ready;
        assert!(ready("True") && !ready("False") && !ready("Unknown"));
    }

    #[test]
    fn the_list_is_used_when_it_is_complete() {
        let mut pods = BTreeMap::new();
        assert!(!update(&mut pods, &Event::Init));
        assert!(!update(&mut pods, &Event::InitApply(pod("a", "True", |_| {}))));
        assert!(update(&mut pods, &Event::InitDone));
        assert!(update(&mut pods, &Event::Apply(pod("b", "False", |_| {}))));
        assert_eq!(pods.len(), 2);
        assert!(update(&mut pods, &Event::Delete(pod("a", "True", |_| {}))));
        assert_eq!(pods.values().next().unwrap().uid, "uid-b");
    }
}
