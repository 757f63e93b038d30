//! Kinds of children that are no part of Kubernetes: their definitions may be installed and removed while the
//! operator runs.
//!
//! Such a kind is watched, and objects of it are made, while the cluster has its definition. What the API
//! server lists of a definition is its metadata alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use trustformers_control::kinds::{CHILDREN, ChildKind};

use crate::children::Children;
use crate::context::Context;
use crate::watchers::{ManagedFields, events, wake_all, watch_children};

/// How long a lead waits for the objects of these kinds: their definitions may be broken, and models serve
/// without them.
const FIRST_LIMIT: Duration = Duration::from_secs(5);

/// Which of these kinds the cluster has definitions of.
#[derive(Debug)]
pub struct Definitions {
    installed: watch::Sender<Option<BTreeSet<&'static str>>>,
}

impl Default for Definitions {
    fn default() -> Self {
        Self { installed: watch::Sender::new(None) }
    }
}

impl Definitions {
    /// Whether the cluster has the definition of this kind.
    #[must_use]
    pub fn has(&self, kind: &ChildKind) -> bool {
        self.installed.borrow().as_ref().is_some_and(|installed| installed.contains(kind.kind))
    }

    /// Waits until it is known which kinds there are, and their objects have been listed, within a limit.
    pub async fn complete(&self, children: &Children) {
        let listed = async {
            let mut installed = self.installed.subscribe();
            let known = match installed.wait_for(Option::is_some).await {
                Ok(known) => known.clone().unwrap_or_default(),
                // The sender lives as long as `self`.
                Err(_) => return,
            };
            children.listed(&known).await;
        };
        if timeout(FIRST_LIMIT, listed).await.is_err() {
            tracing::warn!("optional kinds of objects could not be listed; models go on without them");
        }
    }
}

fn optional() -> impl Iterator<Item = &'static ChildKind> {
    CHILDREN.iter().copied().filter(|kind| kind.needs_definition)
}

/// The kind that a definition is of, if the operator makes objects of it.
fn kind_of(definition: &PartialObjectMeta<CustomResourceDefinition>) -> Option<&'static str> {
    let name = definition.metadata.name.as_deref()?;
    optional().find(|kind| kind.definition() == name).map(|kind| kind.kind)
}

/// Follows the definitions without end.
pub async fn run(context: Arc<Context>) {
    let api = Api::<PartialObjectMeta<CustomResourceDefinition>>::all(context.client.clone());
    let mut events = events(api, watcher::Config::default(), ManagedFields::Drop);
    let mut watches = KindWatches { context, tasks: JoinSet::new(), running: BTreeMap::new() };
    let mut installed: BTreeSet<&'static str> = BTreeSet::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Init => installed.clear(),
            Event::InitApply(definition) => installed.extend(kind_of(&definition)),
            Event::InitDone => watches.follow(&installed),
            Event::Apply(definition) => {
                installed.extend(kind_of(&definition));
                watches.follow(&installed);
            }
            Event::Delete(definition) => {
                if let Some(kind) = kind_of(&definition) {
                    installed.remove(kind);
                }
                watches.follow(&installed);
            }
        }
    }
}

/// The watches of kinds whose definitions are installed.
struct KindWatches {
    context: Arc<Context>,
    tasks: JoinSet<()>,
    running: BTreeMap<&'static str, AbortHandle>,
}

impl KindWatches {
    /// Starts and ends watches. A kind that is gone has taken its objects with it.
    fn follow(&mut self, installed: &BTreeSet<&'static str>) {
        for kind in optional() {
            let is_installed = installed.contains(kind.kind);
            if is_installed && !self.running.contains_key(kind.kind) {
                tracing::info!(kind = kind.kind, "its definition is installed");
                // A watch that was ended may have added something in its last moment.
                self.context.children.forget(kind);
                let watch = self.tasks.spawn(watch_children(Arc::clone(&self.context), kind));
                self.running.insert(kind.kind, watch);
            } else if !is_installed && let Some(watch) = self.running.remove(kind.kind) {
                tracing::info!(kind = kind.kind, "its definition was removed");
                watch.abort();
                self.context.children.forget(kind);
                wake_all(&self.context);
            }
        }
        // Those that were ended.
        while self.tasks.try_join_next().is_some() {}
        self.context.definitions.installed.send_replace(Some(installed.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use http::StatusCode;
    use serde_json::{Value, json};
    use trustformers_control::kinds::SERVICE_MONITOR;

    use crate::context::NewContext;
    use crate::context::tests::{metrics, settings};
    use crate::testing::mock_client;

    /// An API server whose watches of definitions deliver these events, one each; the second one only when it
    /// may.
    fn context(events: &'static [&'static str], may_go_on: &Arc<AtomicBool>) -> Arc<Context> {
        let (delivered, may_go_on) = (Arc::new(AtomicUsize::new(0)), Arc::clone(may_go_on));
        let client = mock_client(move |request| {
            let query = request.uri.query().unwrap_or_default();
            if !query.contains("watch=true") {
                let list = json!({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": []});
                return (StatusCode::OK, list);
            }
            let number = delivered.load(Ordering::SeqCst);
            let waits = number > 0 && !may_go_on.load(Ordering::SeqCst);
            let Some(kind) = events.get(number).filter(|_| !waits) else {
                return (StatusCode::OK, Value::Null);
            };
            if request.uri.path().contains("servicemonitors") {
                return (StatusCode::OK, Value::Null);
            }
            delivered.fetch_add(1, Ordering::SeqCst);
            let metadata =
                json!({"name": SERVICE_MONITOR.definition(), "resourceVersion": (number + 2).to_string()});
            let event = json!({"type": kind, "object": {"metadata": metadata,
                "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata"}});
            (StatusCode::OK, event)
        });
        let NewContext { context, .. } = Context::create(client, settings(), metrics());
        context
    }

    #[tokio::test(start_paused = true)]
    async fn a_kind_is_made_from_when_its_definition_is_installed_until_it_is_removed() {
        let may_go_on = Arc::new(AtomicBool::new(false));
        let context = context(&["ADDED", "DELETED"], &may_go_on);
        let following = tokio::spawn(run(Arc::clone(&context)));
        assert!(context.platform().optional_kinds.is_empty());
        context.children.listed(&BTreeSet::from([SERVICE_MONITOR.kind])).await;
        let platform = context.platform();
        assert!(platform.optional_kinds.contains(SERVICE_MONITOR.kind), "{platform:?}");
        may_go_on.store(true, Ordering::SeqCst);
        while context.children.is_listed(&SERVICE_MONITOR) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(context.platform().optional_kinds.is_empty());
        following.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_lead_does_not_wait_for_kinds_that_the_cluster_does_not_have() {
        let context = context(&[], &Arc::new(AtomicBool::new(false)));
        let following = tokio::spawn(run(Arc::clone(&context)));
        context.definitions.complete(&context.children).await;
        assert!(!context.children.is_listed(&SERVICE_MONITOR));
        following.abort();
    }
}
