//! What a leader does: watch, reconcile, observe, publish. All of it begins and ends with the lead.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use trustformers_control::names::LEADER_LABEL;

use crate::feed::service::Lead;
use crate::feed::{Hub, gates, publish};
use crate::world::{NewWorld, World};
use crate::{observer, reconcile, watch as watches};

/// Longest wait for one request about a label.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
/// Pause between attempts to label the leader's pod.
const RETRY: Duration = Duration::from_millis(500);

/// Leads in this term, for as long as it is polled. Dropping it ends everything that belongs to the lead.
pub async fn lead(term: u64, new: NewWorld, leads: watch::Sender<Option<Lead>>) {
    let NewWorld { world, writers, queue } = new;
    let hub = Arc::new(Hub::new(term));
    let ended = CancellationToken::new();
    let _ends = ended.clone().drop_guard();
    let _withdraws = Withdraw(leads.clone());
    world.metrics.leader.set(1);
    let mut tasks = JoinSet::new();
    watches::spawn(&world, writers, &mut tasks);
    tokio::select! {
        complete = world.caches.complete() => {
            if let Err(error) = complete {
                tracing::error!(%error, "leading ends");
                return;
            }
        }
        _ = tasks.join_next() => return,
    }
    tracing::info!(term, models = world.caches.models.len(), pods = world.caches.pods.len(), "leading");
    tasks.spawn(reconcile::run(Arc::clone(&world), queue));
    tasks.spawn(observer::run(Arc::clone(&world)));
    tasks.spawn(publish::run(Arc::clone(&world), Arc::clone(&hub)));
    tasks.spawn(gates::run(Arc::clone(&world), Arc::clone(&hub)));
    tasks.spawn(label(Arc::clone(&world), Arc::clone(&hub)));
    world.awaken().await;
    leads.send_replace(Some(Lead { hub, world, ended }));
    // The tasks run for ever, except the one that labels the pod; any other end is a fault that a new lead mends.
    let mut finished = 0;
    while let Some(outcome) = tasks.join_next().await {
        finished += 1;
        if finished > 1 || outcome.is_err() {
            tracing::error!(?outcome, "a task of the leader ended; leading ends");
            return;
        }
    }
}

/// Takes the lead out of the feed, however it ends.
struct Withdraw(watch::Sender<Option<Lead>>);

impl Drop for Withdraw {
    fn drop(&mut self) {
        if let Some(lead) = self.0.send_replace(None) {
            lead.world.metrics.leader.set(0);
        }
    }
}

/// Moves the leader's label to this pod, so that the feed's Service leads here. It may still be on the pod of a leader
/// that was killed. Without the label no gateway finds the feed, so it is tried until it is there.
async fn label(world: Arc<World>, hub: Arc<Hub>) {
    let Some(own) = world.settings.pod_name.clone() else { return hub.can_be_found() };
    let pods = Api::<Pod>::namespaced(world.client.clone(), &world.settings.namespace);
    while let Err(error) = set_label(&pods, &own, true).await {
        tracing::error!(pod = own, %error, "the pod could not be labelled as leader, so that gateways do not find the feed; it is tried again");
        sleep(RETRY).await;
    }
    hub.can_be_found();
    match pods.list_metadata(&ListParams::default().labels(&format!("{LEADER_LABEL}=true"))).await {
        Ok(labelled) => {
            for other in labelled.items.iter().map(ResourceExt::name_any).filter(|name| *name != own) {
                if let Err(error) = set_label(&pods, &other, false).await {
                    tracing::warn!(pod = other, %error, "the label of an earlier leader could not be removed");
                }
            }
        }
        Err(error) => tracing::warn!(%error, "earlier leaders could not be listed"),
    }
}

/// Removes the leader's label from this pod.
pub async fn unlabel(world: &World) {
    let Some(own) = &world.settings.pod_name else { return };
    let pods = Api::<Pod>::namespaced(world.client.clone(), &world.settings.namespace);
    if let Err(error) = set_label(&pods, own, false).await {
        tracing::warn!(pod = own, %error, "the leader's label could not be removed");
    }
}

/// Why a label could not be written.
#[derive(Debug, thiserror::Error)]
enum LabelError {
    #[error(transparent)]
    Request(#[from] kube::Error),
    #[error("no answer within {} s", REQUEST_LIMIT.as_secs())]
    TimedOut,
}

async fn set_label(pods: &Api<Pod>, name: &str, leads: bool) -> Result<(), LabelError> {
    let body = Patch::Merge(json!({"metadata": {"labels": {LEADER_LABEL: leads.then_some("true")}}}));
    let params = PatchParams::default();
    match timeout(REQUEST_LIMIT, pods.patch_metadata(name, &params, &body)).await {
        Err(_) => Err(LabelError::TimedOut),
        Ok(Err(kube::Error::Api(said))) if !leads && said.code == 404 => Ok(()),
        Ok(outcome) => Ok(outcome.map(drop)?),
    }
}
