//! Writes the readiness gates of pods.
//!
//! A gate that is open changes only with its pod. One that is not may open by a gateway's report or by time:
//! the models with such pods are looked at again, and no others.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use trustformers_control::gate::GateChange;
use trustformers_control::names;
use trustformers_control::pods::{PodView, open_message};
use trustformers_control::routes::ModelKey;

use super::FeedState;
use super::gateways::Announcements;
use crate::changes::Marked;
use crate::context::Context;
use crate::requests::patch_status;

/// Gates that are written at the same time. Requests that hang use up to this many; the client ends them
/// after 10 s.
const CONCURRENCY: usize = 32;
/// A gate that was just written is not written again while the cache may still show the old one.
const CACHE_LAG: Duration = Duration::from_secs(2);
/// Longest sleep, so that the gateway counts of the metrics page are up to date.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// From one look to the next at least: while many models start, each change of a pod marks one, and all that
/// wait are looked at. A change after a time without any is looked at immediately.
const GATHER: Duration = Duration::from_millis(5);
/// A pause after a write that failed.
const RETRY: Duration = Duration::from_millis(500);

/// The last write of one pod's gate.
#[derive(Debug, Clone, Copy, PartialEq)]
enum GateWrite {
    InFlight,
    Done { change: GateChange, at: Instant },
    Failed { at: Instant },
}

impl GateWrite {
    /// Whether a new write of `change` must wait.
    fn blocks(self, change: GateChange) -> bool {
        match self {
            Self::InFlight => true,
            Self::Done { change: last, at } => last == change && at.elapsed() < CACHE_LAG,
            Self::Failed { at } => at.elapsed() < RETRY,
        }
    }

    fn is_over(self) -> bool {
        match self {
            Self::InFlight => false,
            Self::Done { at, .. } => at.elapsed() >= CACHE_LAG,
            Self::Failed { at } => at.elapsed() >= RETRY,
        }
    }
}

/// Writes gates without end. A request that hangs delays only the gate that it is for.
pub async fn run(context: Arc<Context>, feed: Arc<FeedState>) {
    let mut writes: HashMap<String, GateWrite> = HashMap::new();
    let mut in_flight = FuturesUnordered::new();
    let mut candidates: BTreeSet<ModelKey> = BTreeSet::new();
    let mut announcements = Announcements::default();
    loop {
        let next_gather = Instant::now() + GATHER;
        context.metrics.gateways(feed.counts());
        announcements.update(&context, &feed);
        writes.retain(|_, write| !write.is_over());
        match context.gates_changed.drain() {
            Marked::All => candidates.extend(context.pods.models()),
            Marked::Models(models) => candidates.extend(models),
        }
        for (pod, change) in changes(&context, &feed, &writes, &mut candidates) {
            if in_flight.len() >= CONCURRENCY {
                break;
            }
            writes.insert(pod.uid.clone(), GateWrite::InFlight);
            let context = &context;
            in_flight.push(async move {
                let written = write(context, &pod, change).await;
                (pod.uid, change, written)
            });
        }
        let failed = writes.values().any(|write| matches!(write, GateWrite::Failed { .. }));
        let longest = if failed { RETRY } else { LONGEST_SLEEP };
        let pause = feed.next_change().map_or(longest, |next| next.min(longest));
        let mut next_look = Instant::now() + pause;
        loop {
            tokio::select! {
                Some((uid, change, written)) = in_flight.next() => {
                    let at = Instant::now();
                    let write = if written { GateWrite::Done { change, at } } else { GateWrite::Failed { at } };
                    writes.insert(uid, write);
                    next_look = next_look.min(next_gather);
                }
                () = context.gates_changed.notified() => next_look = next_look.min(next_gather),
                () = sleep_until(next_look) => break,
            }
        }
    }
}

/// The gates to write now. Models whose gates neither wait nor need a change are no candidates any more.
fn changes(
    context: &Context,
    feed: &FeedState,
    writes: &HashMap<String, GateWrite>,
    candidates: &mut BTreeSet<ModelKey>,
) -> Vec<(PodView, GateChange)> {
    let mut wanted = Vec::new();
    candidates.retain(|key| {
        let mut waits = false;
        for pod in context.pods.of_model(key) {
            let change = feed.change(&pod.view);
            let is_closed = pod.view.gate.is_none_or(|gate| !gate.open);
            waits |= change.is_some() || (is_closed && pod.view.routable());
            wanted.extend(change.map(|change| (pod.view.clone(), change)));
        }
        waits
    });
    wanted.retain(|(pod, change)| writes.get(&pod.uid).is_none_or(|write| !write.blocks(*change)));
    wanted
}

async fn write(context: &Context, pod: &PodView, change: GateChange) -> bool {
    let (params, patch) = (PatchParams::default(), Patch::Strategic(body(pod, change, Timestamp::now())));
    match patch_status::<Pod, _>(&context.client, &pod.namespace, &pod.name, &params, &patch).await {
        Ok(_) => {
            tracing::debug!(pod = pod.name, ?change, "readiness gate written");
            context.metrics.count_write("PodStatus");
            true
        }
        // It is gone, or another pod has its name.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
        Err(error) => {
            tracing::warn!(pod = pod.name, %error, "the readiness gate could not be written; it is tried again");
            false
        }
    }
}

/// Conditions are merged by type. With the UID, the API server refuses a patch for an earlier pod of the
/// name.
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes the gate of a pod.
    pub(crate) async fn write_one(context: &Context) {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "team", "uid": "p1",
            "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}}}))
            .unwrap();
        assert!(write(context, &PodView::of(&pod).unwrap(), GateChange::Close).await);
    }
}
