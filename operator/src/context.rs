//! What the tasks of a leader share: caches that watches fill, reports of pods, and the means to wake each
//! other.
//!
//! All tasks read the same caches, so a reconcile reads nothing from the API server, and a change wakes
//! exactly the tasks that depend on it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::{Client, ResourceExt};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use trustformers_control::build::Platform;
use trustformers_control::causes::Cause;
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
use trustformers_control::status::PodReport;
use trustformers_crds::{InferenceModel, InferenceModelStatus};
use trustformers_proto::v1::ModelStatus;

use crate::children::Children;
use crate::feed::FeedState;
use crate::feed::counts::GatewaySums;
use crate::metrics::Metrics;

/// Requests for reconciles that wait to be coalesced. One entry takes about 200 bytes: 1024 × 200 B = 200 kB.
/// When the queue is full, the watches wait, which loses nothing.
const QUEUE: usize = 1024;

/// Settings of the process, which do not change.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Namespace of the operator.
    pub namespace: String,
    /// Name of the operator's own pod, if it runs in one.
    pub pod_name: Option<String>,
    /// Where callers reach the gateway.
    pub gateway_url: String,
    /// What every model gets from the operator's settings.
    pub platform: Platform,
    /// Reconciles that may run at the same time.
    pub concurrency: u16,
}

/// The writing ends of the caches.
pub struct Writers {
    /// Fills `models`.
    pub models: Writer<InferenceModel>,
    /// Fills `pods`.
    pub pods: Writer<Pod>,
}

/// The caches will never be complete: their watches ended.
#[derive(Debug, thiserror::Error)]
#[error("the watches ended before the caches were complete")]
pub struct WatchesEnded;

/// A status that the operator wrote.
#[derive(Debug, Clone)]
pub struct WrittenStatus {
    /// The status.
    pub status: InferenceModelStatus,
    /// The model's resource version after the write; none while the request is in flight.
    pub version: Option<u64>,
    /// When it was sent.
    pub at: Instant,
}

/// What the leader remembers of one model between two reconciles.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// UID of the model: a model that was deleted and created again starts without memory.
    pub uid: String,
    /// The status that was sent last.
    pub written: Option<WrittenStatus>,
    /// `metadata.generation` at the last reconcile.
    pub generation: Option<i64>,
    /// Reconciles that failed in a row.
    pub failures: u32,
}

/// What the tasks of a leader share. Each term has its own: a new leader starts with empty caches.
pub struct Context {
    /// Client of the API server.
    pub client: Client,
    /// Settings of the process.
    pub settings: Settings,
    /// The operator's metrics.
    pub metrics: Metrics,
    /// The models.
    pub models: Store<InferenceModel>,
    /// Their pods.
    pub pods: Store<Pod>,
    /// What the operator made for them.
    pub children: Children,
    /// What gateways have counted.
    pub counts: GatewaySums,
    /// Reports of pods, by UID of the pod. The observer removes those of pods that it does not observe.
    reports: Mutex<BTreeMap<String, PodReport>>,
    /// Causes from Events about pods, by UID of the pod. The observer removes those of pods that are gone.
    pod_events: Mutex<BTreeMap<String, Cause>>,
    /// The feed of this lead: which tables gateways have.
    pub feed: OnceLock<Arc<FeedState>>,
    memories: Mutex<HashMap<ModelKey, Memory>>,
    /// Stored models that cannot be decoded, each with the error.
    unreadable: Mutex<BTreeMap<ModelKey, Unreadable>>,
    queue: mpsc::Sender<ObjectRef<InferenceModel>>,
    /// Set when the caches are complete: before, no task empties the queue.
    started: AtomicBool,
    /// Something that routes depend on has changed.
    pub routes_changed: Notify,
    /// Something that readiness gates depend on has changed.
    pub gates_changed: Notify,
    /// The set of pods to observe has changed.
    pub pods_changed: Notify,
    /// The set of models that cannot be decoded has changed.
    pub unreadable_changed: Notify,
}

/// A stored model that this version cannot decode.
#[derive(Debug, Clone, PartialEq)]
pub struct Unreadable {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Why it cannot be decoded.
    pub error: String,
}

/// The parts of a new context that its creator hands out.
pub struct NewContext {
    /// The context itself.
    pub context: Arc<Context>,
    /// Fill the caches.
    pub writers: Writers,
    /// Requests for reconciles.
    pub queue: mpsc::Receiver<ObjectRef<InferenceModel>>,
}

impl Context {
    /// A context with empty caches.
    #[must_use]
    pub fn create(client: Client, settings: Settings, metrics: Metrics) -> NewContext {
        let (models, models_writer) = store();
        let (pods, pods_writer) = store();
        let (sender, queue) = mpsc::channel(QUEUE);
        let context = Self {
            client,
            settings,
            metrics,
            models,
            pods,
            children: Children::default(),
            counts: GatewaySums::default(),
            reports: Mutex::default(),
            pod_events: Mutex::default(),
            feed: OnceLock::new(),
            memories: Mutex::default(),
            unreadable: Mutex::default(),
            queue: sender,
            started: AtomicBool::new(false),
            routes_changed: Notify::new(),
            gates_changed: Notify::new(),
            pods_changed: Notify::new(),
            unreadable_changed: Notify::new(),
        };
        NewContext {
            context: Arc::new(context),
            writers: Writers { models: models_writer, pods: pods_writer },
            queue,
        }
    }

    /// Waits until every cache has been filled.
    ///
    /// # Errors
    /// When a watch ended before.
    pub async fn complete(&self) -> Result<(), WatchesEnded> {
        tokio::try_join!(self.models.wait_until_ready(), self.pods.wait_until_ready())
            .map_err(|_| WatchesEnded)?;
        self.children.complete().await;
        Ok(())
    }

    /// From now on changes request reconciles. Every model is requested.
    pub async fn start(&self) {
        self.started.store(true, Ordering::Release);
        for model in self.models.state() {
            self.request_reconcile(&model.namespace().unwrap_or_default(), &model.name_any()).await;
        }
        self.routes_changed.notify_one();
        self.gates_changed.notify_one();
        self.pods_changed.notify_one();
        self.unreadable_changed.notify_one();
    }

    /// Requests a reconcile of a model. A request for a model that is gone has no effect.
    pub async fn request_reconcile(&self, namespace: &str, name: &str) {
        if !self.started.load(Ordering::Acquire) {
            return;
        }
        // The receiver ends with the lead; after that no reconcile is needed.
        let _ = self.queue.send(ObjectRef::new(name).within(namespace)).await;
    }

    /// Records a pod's report. True if more than the progress changed.
    pub fn record_report(&self, uid: &str, restarts: u32, model: ModelStatus) -> bool {
        let mut reports = lock(&self.reports);
        let previous = reports.get(uid).filter(|previous| previous.restarts == restarts);
        let progressed_at = previous
            .filter(|previous| previous.model.loaded_bytes == model.loaded_bytes)
            .map_or_else(Timestamp::now, |previous| previous.progressed_at);
        let without_progress = |model: &ModelStatus| {
            let mut model = ModelStatus { loaded_bytes: 0, total_bytes: 0, ..model.clone() };
            for slot in &mut model.slots {
                (slot.loaded_bytes, slot.total_bytes) = (0, 0);
                (slot.bytes_per_second, slot.eta_ms) = (0, None);
            }
            model
        };
        let changed =
            previous.is_none_or(|previous| without_progress(&previous.model) != without_progress(&model));
        reports.insert(uid.to_owned(), PodReport { model, restarts, progressed_at });
        changed
    }

    /// Removes the reports of pods that are not in `observed`, and causes from Events about pods that are
    /// gone.
    pub fn retain_pods(&self, observed: &HashSet<&str>) {
        lock(&self.reports).retain(|uid, _| observed.contains(uid.as_str()));
        let pods = self.pods.state();
        let existing: HashSet<&str> = pods.iter().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        lock(&self.pod_events).retain(|uid, _| existing.contains(uid.as_str()));
    }

    /// The reports of these pods that their running containers sent.
    #[must_use]
    pub fn reports_of(&self, pods: &[PodView]) -> BTreeMap<String, PodReport> {
        let reports = lock(&self.reports);
        let report = |pod: &PodView| {
            let report = reports.get(&pod.uid).filter(|report| report.is_current(pod))?;
            Some((pod.uid.clone(), report.clone()))
        };
        pods.iter().filter_map(report).collect()
    }

    /// Records the cause that an Event about a pod names. True if it is new.
    pub fn record_pod_event(&self, uid: &str, cause: Cause) -> bool {
        lock(&self.pod_events).insert(uid.to_owned(), cause.clone()) != Some(cause)
    }

    /// The cause that an Event about a pod names, while the pod's container has never run and its status has
    /// none.
    #[must_use]
    pub fn with_event_cause(&self, pod: PodView) -> PodView {
        let starts = pod.cause.is_none() && !pod.running && !pod.ended && pod.restarts == 0;
        let cause = if starts { lock(&self.pod_events).get(&pod.uid).cloned() } else { None };
        PodView { cause: pod.cause.clone().or(cause), ..pod }
    }

    /// What is remembered of the model with this key and UID.
    #[must_use]
    pub fn memory(&self, key: &ModelKey, uid: &str) -> Memory {
        let memories = lock(&self.memories);
        memories.get(key).filter(|memory| memory.uid == uid).cloned().unwrap_or_default()
    }

    /// Changes what is remembered of a model, if it still exists.
    pub fn remember(&self, key: &ModelKey, uid: &str, change: impl FnOnce(&mut Memory)) {
        let mut memories = lock(&self.memories);
        let memory = memories.entry(key.clone()).or_default();
        if memory.uid != uid {
            *memory = Memory { uid: uid.to_owned(), ..Memory::default() };
        }
        change(memory);
    }

    /// Drops what is remembered of a deleted model.
    pub fn drop_model(&self, key: &ModelKey) {
        lock(&self.memories).remove(key);
        lock(&self.unreadable).remove(key);
    }

    /// Drops what is remembered of models that are gone: some may have been deleted while no watch was open.
    pub fn retain_models(&self, listed_unreadable: &HashSet<ModelKey>) {
        lock(&self.unreadable).retain(|key, _| listed_unreadable.contains(key));
        let unreadable = self.unreadable();
        lock(&self.memories).retain(|(namespace, name), _| {
            let stored = self.models.get(&ObjectRef::new(name).within(namespace)).is_some();
            stored || unreadable.contains_key(&(namespace.clone(), name.clone()))
        });
    }

    /// Records whether a stored model can be decoded.
    pub fn set_unreadable(&self, key: ModelKey, model: Option<Unreadable>) {
        let mut unreadable = lock(&self.unreadable);
        let changed = match model {
            Some(model) => unreadable.insert(key, model.clone()) != Some(model),
            None => unreadable.remove(&key).is_some(),
        };
        if changed {
            self.unreadable_changed.notify_one();
        }
    }

    /// The stored models that cannot be decoded.
    #[must_use]
    pub fn unreadable(&self) -> BTreeMap<ModelKey, Unreadable> {
        lock(&self.unreadable).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        Settings {
            namespace: "trustformers-system".to_owned(),
            pod_name: Some("operator-0".to_owned()),
            gateway_url: "http://gateway:8080".to_owned(),
            platform: Platform {
                runtime_image: "localhost/trustformers-runtime:v0.1.0".to_owned(),
                pull_policy: "IfNotPresent".to_owned(),
            },
            concurrency: 4,
        }
    }

    pub(crate) fn metrics() -> Metrics {
        Metrics::new(&prometheus::Registry::new()).unwrap()
    }

    fn context() -> Arc<Context> {
        let client = crate::testing::mock_client(|request| panic!("{request:?}"));
        Context::create(client, settings(), metrics()).context
    }

    fn loading(loaded_bytes: u64) -> ModelStatus {
        ModelStatus { loaded_bytes, total_bytes: 100, ..ModelStatus::default() }
    }

    #[tokio::test]
    async fn only_progress_is_no_other_change() {
        let context = context();
        assert!(context.record_report("p", 0, loading(1)));
        assert!(!context.record_report("p", 0, loading(2)));
        assert!(context.record_report("p", 1, loading(2)), "another container started");
    }

    #[tokio::test]
    async fn reports_of_pods_that_are_not_observed_are_dropped() {
        let context = context();
        context.record_report("p", 0, loading(1));
        context.record_report("q", 0, loading(1));
        context.record_pod_event("q", Cause { reason: "FailedMount".to_owned(), message: String::new() });
        context.retain_pods(&HashSet::from(["p"]));
        assert_eq!(lock(&context.reports).keys().collect::<Vec<_>>(), ["p"]);
        assert!(lock(&context.pod_events).is_empty());
    }

    #[tokio::test]
    async fn a_recreated_model_has_no_memory() {
        let context = context();
        let key = ("team".to_owned(), "chat".to_owned());
        context.remember(&key, "u1", |memory| memory.failures = 3);
        assert_eq!(context.memory(&key, "u1").failures, 3);
        assert_eq!(context.memory(&key, "u2").failures, 0);
        context.retain_models(&HashSet::new());
        assert!(lock(&context.memories).is_empty(), "the model is in no cache");
    }
}
