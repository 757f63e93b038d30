//! What a leader does: watch, reconcile, observe, publish. All of it starts and ends with the lead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt};
use prometheus::IntGauge;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use trustformers_control::names::LEADER_LABEL;

use crate::context::{Context, NewContext};
use crate::feed::service::Leadership;
use crate::feed::{FeedState, gates, gateways, publish};
use crate::{ab_tests, cluster_keys, observer, reconcile, unreadable, watchers};

/// Limit on one request about a label.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
/// Pause between attempts to label the leader's pod.
const RETRY: Duration = Duration::from_millis(500);

/// Leads in this term while it is polled. When it is dropped, everything that belongs to the lead ends.
pub async fn lead(term: u64, new: NewContext, leaderships: watch::Sender<Option<Leadership>>) {
    let NewContext { context, writers, queue } = new;
    let feed = Arc::new(FeedState::new(term));
    // The context is new, so it has no feed yet.
    let _ = context.feed.set(Arc::clone(&feed));
    let ended = CancellationToken::new();
    let _ends = ended.clone().drop_guard();
    let _withdraws = Withdraw(leaderships.clone());
    let _gauge = LeaderGauge::set(context.metrics.leader.clone());
    let mut tasks = JoinSet::new();
    watchers::spawn(&context, writers, &mut tasks);
    tokio::select! {
        complete = context.complete() => {
            if let Err(error) = complete {
                tracing::error!(%error, "leading ends");
                return;
            }
        }
        _ = tasks.join_next() => return,
    }
    cluster_keys::read_first(&context).await;
    tracing::info!(term, models = context.models.len(), pods = context.pods.len(), "leading");
    tasks.spawn(reconcile::run(Arc::clone(&context), queue));
    tasks.spawn(observer::run(Arc::clone(&context)));
    tasks.spawn(cluster_keys::run(Arc::clone(&context)));
    tasks.spawn(unreadable::run(Arc::clone(&context)));
    tasks.spawn(publish::run(Arc::clone(&context), Arc::clone(&feed)));
    tasks.spawn(gateways::run(Arc::clone(&context), Arc::clone(&feed)));
    tasks.spawn(gates::run(Arc::clone(&context), Arc::clone(&feed)));
    tasks.spawn(ab_tests::run(Arc::clone(&context)));
    tasks.spawn(keep_label(Arc::clone(&context), Arc::clone(&feed)));
    context.start();
    leaderships.send_replace(Some(Leadership { feed, context, ended }));
    // No task ends by itself. A new lead repairs what ended one.
    let outcome = tasks.join_next().await;
    tracing::error!(?outcome, "a task of the leader ended; leading ends");
}

/// Removes the leadership from the feed, however it ends.
struct Withdraw(watch::Sender<Option<Leadership>>);

impl Drop for Withdraw {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

/// The gauge is 1 while this exists, also while the caches fill.
struct LeaderGauge(IntGauge);

impl LeaderGauge {
    fn set(gauge: IntGauge) -> Self {
        gauge.set(1);
        Self(gauge)
    }
}

impl Drop for LeaderGauge {
    fn drop(&mut self) {
        self.0.set(0);
    }
}

/// Keeps the leader's label on this pod and on no other, so that the feed's Service selects this pod. The
/// label may still be on the pod of a leader that was killed, and somebody may remove it. A watch of the
/// labelled pods shows both.
async fn keep_label(context: Arc<Context>, feed: Arc<FeedState>) {
    let Some(own) = context.settings.pod_name.clone() else {
        feed.set_reachable();
        return std::future::pending().await;
    };
    let pods = Api::<Pod>::namespaced(context.client.clone(), &context.settings.namespace);
    let selector = format!("{LEADER_LABEL}=true");
    let metadata =
        Api::<PartialObjectMeta<Pod>>::namespaced(context.client.clone(), &context.settings.namespace);
    let mut events = watcher(metadata, watcher::Config::default().labels(&selector))
        .default_backoff()
        .inspect_err(
            |error| tracing::warn!(%error, "the watch of the leader's label failed and starts again"),
        )
        .boxed();
    let mut labelled = BTreeSet::new();
    loop {
        repair_label(&pods, &own, &labelled).await;
        feed.set_reachable();
        loop {
            match events.next().await {
                Some(Ok(event)) if update_labelled(&mut labelled, &event) => break,
                Some(_) => {}
                None => return,
            }
        }
    }
}

/// Updates the names of the labelled pods. False while a new list is incomplete.
fn update_labelled(labelled: &mut BTreeSet<String>, event: &Event<PartialObjectMeta<Pod>>) -> bool {
    let complete = !matches!(event, Event::Init | Event::InitApply(_));
    match event {
        Event::Init => labelled.clear(),
        Event::InitApply(pod) | Event::Apply(pod) => {
            labelled.insert(pod.name_any());
        }
        Event::Delete(pod) => {
            labelled.remove(&pod.name_any());
        }
        Event::InitDone => {}
    }
    complete
}

/// Labels this pod, and removes the label from others. Without the label no gateway finds the feed, so it is
/// retried.
async fn repair_label(pods: &Api<Pod>, own: &str, labelled: &BTreeSet<String>) {
    while !labelled.contains(own) {
        match set_label(pods, own, true).await {
            Ok(()) => break,
            Err(error) => {
                tracing::error!(pod = own, %error, "the leader's pod could not be labelled, so gateways do not find the feed; it is tried again");
                sleep(RETRY).await;
            }
        }
    }
    for other in labelled.iter().filter(|name| *name != own) {
        if let Err(error) = set_label(pods, other, false).await {
            tracing::warn!(pod = other, %error, "the label of an earlier leader could not be removed");
        }
    }
}

/// Removes the leader's label from this pod.
pub async fn unlabel(context: &Context) {
    let Some(own) = &context.settings.pod_name else { return };
    let pods = Api::<Pod>::namespaced(context.client.clone(), &context.settings.namespace);
    if let Err(error) = set_label(&pods, own, false).await {
        tracing::warn!(pod = own, %error, "the leader's label could not be removed");
    }
}

/// Why a label could not be written.
#[derive(Debug, thiserror::Error)]
enum LabelError {
    #[error(transparent)]
    Request(#[from] kube::Error),
    #[error("no response within {} s", REQUEST_LIMIT.as_secs())]
    TimedOut,
}

async fn set_label(pods: &Api<Pod>, name: &str, leads: bool) -> Result<(), LabelError> {
    let body = Patch::Merge(json!({"metadata": {"labels": {LEADER_LABEL: leads.then_some("true")}}}));
    let params = PatchParams::default();
    match timeout(REQUEST_LIMIT, pods.patch_metadata(name, &params, &body)).await {
        Err(_) => Err(LabelError::TimedOut),
        Ok(Err(kube::Error::Api(status))) if !leads && status.code == 404 => Ok(()),
        Ok(outcome) => Ok(outcome.map(drop)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    use http::StatusCode;

    use crate::context::tests::{metrics, settings};
    use crate::testing::mock_client;

    #[tokio::test]
    async fn the_label_is_set_again_and_removed_from_others() {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let client = mock_client(move |request| {
            let label = request.body["metadata"]["labels"][LEADER_LABEL].clone();
            log.lock().unwrap().push(format!("{} {label}", request.uri.path().rsplit('/').next().unwrap()));
            (StatusCode::OK, json!({"metadata": {"name": "p"}}))
        });
        let pods = Api::<Pod>::namespaced(client, "trustformers-system");
        let pod = |name: &str| {
            let mut pod = PartialObjectMeta::<Pod>::default();
            pod.metadata.name = Some(name.to_owned());
            pod
        };
        let mut labelled = BTreeSet::new();
        repair_label(&pods, "own", &labelled).await;
        update_labelled(&mut labelled, &Event::Apply(pod("own")));
        repair_label(&pods, "own", &labelled).await;
        // Somebody moves the label to another pod.
        update_labelled(&mut labelled, &Event::Delete(pod("own")));
        update_labelled(&mut labelled, &Event::Apply(pod("other")));
        repair_label(&pods, "own", &labelled).await;
        assert_eq!(*requests.lock().unwrap(), ["own \"true\"", "own \"true\"", "other null"]);
    }

    #[tokio::test]
    async fn the_gauge_is_zero_when_a_lead_ends_before_its_caches_fill() {
        let client = mock_client(|_| (StatusCode::INTERNAL_SERVER_ERROR, json!({})));
        let (metrics, (sender, _receiver)) = (metrics(), watch::channel(None));
        let new = Context::create(client, settings(), metrics.clone());
        {
            let mut lead = std::pin::pin!(lead(1, new, sender));
            assert!(futures::poll!(&mut lead).is_pending());
            assert_eq!(metrics.leader.get(), 1);
        }
        assert_eq!(metrics.leader.get(), 0);
    }
}
