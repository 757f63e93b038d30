//! Writes the readiness gates of pods.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use trustformers_control::gate::GateChange;
use trustformers_control::names;
use trustformers_control::pods::{PodView, open_message};

use super::Hub;
use crate::world::World;

/// Gates written at once.
const CONCURRENCY: usize = 8;
/// A gate that was just written is not written again while the cache may still show the old one.
const CACHE_LAG: Duration = Duration::from_secs(2);
/// Longest sleep, so that the census of gateways on the metrics page stays fresh.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// A pause after writes that failed.
const RETRY: Duration = Duration::from_millis(500);

/// What was written last for a pod, and when.
type Written = HashMap<String, (GateChange, Instant)>;

/// Writes gates for ever.
pub async fn run(world: Arc<World>, hub: Arc<Hub>) {
    let mut written = Written::new();
    loop {
        world.metrics.gateways(hub.census());
        let failed = pass(&world, &hub, &mut written).await;
        let pause = if failed {
            RETRY
        } else {
            hub.next_change().map_or(LONGEST_SLEEP, |next| next.min(LONGEST_SLEEP))
        };
        tokio::select! {
            () = world.gates_changed.notified() => {}
            () = sleep(pause) => {}
        }
    }
}

/// Writes every gate that should be another; true where one could not be written.
async fn pass(world: &World, hub: &Hub, written: &mut Written) -> bool {
    written.retain(|_, (_, at)| at.elapsed() < CACHE_LAG);
    let pods = world.caches.pods.state();
    let changes: Vec<(PodView, GateChange)> = pods
        .iter()
        .filter_map(|pod| PodView::of(pod))
        .filter_map(|pod| hub.wanted(&pod).map(|change| (pod, change)))
        .filter(|(pod, change)| written.get(&pod.uid).is_none_or(|(last, _)| last != change))
        .collect();
    let outcomes: Vec<(String, GateChange, bool)> = stream::iter(changes)
        .map(async |(pod, change)| {
            let done = write(world, &pod, change).await;
            (pod.uid, change, done)
        })
        .buffer_unordered(CONCURRENCY)
        .collect()
        .await;
    let failed = outcomes.iter().any(|(_, _, done)| !done);
    for (uid, change, _) in outcomes.into_iter().filter(|(_, _, done)| *done) {
        written.insert(uid, (change, Instant::now()));
    }
    failed
}

async fn write(world: &World, pod: &PodView, change: GateChange) -> bool {
    let api = Api::<Pod>::namespaced(world.client.clone(), &pod.namespace);
    let body = Patch::Strategic(body(pod, change, Timestamp::now()));
    match api.patch_status(&pod.name, &PatchParams::default(), &body).await {
        Ok(_) => {
            tracing::debug!(pod = pod.name, ?change, "readiness gate written");
            world.metrics.wrote("PodStatus");
            true
        }
        // It is gone, or another pod has its name.
        Err(kube::Error::Api(said)) if matches!(said.code, 404 | 409) => true,
        Err(error) => {
            tracing::warn!(pod = pod.name, %error, "the readiness gate could not be written; it is tried again");
            false
        }
    }
}

/// Conditions are merged by type; the UID makes the API server refuse a patch for an earlier pod of the name.
fn body(pod: &PodView, change: GateChange, now: Timestamp) -> Value {
    let (status, reason, message) = match change {
        GateChange::Open { restarts } => ("True", "Acknowledged", open_message(restarts)),
        GateChange::Close => ("False", "NotInTable", "gateways do not route to this pod".to_owned()),
    };
    json!({
        "metadata": {"uid": pod.uid},
        "status": {"conditions": [{
            "type": names::ROUTABLE_GATE,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
        }]},
    })
}
