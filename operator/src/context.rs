//! What the tasks of a leader share: caches that watches fill, reports of pods, and the means to wake each
//! other.
//!
//! All tasks read the same caches, so a reconcile reads nothing from the API server. Everything is indexed by
//! model, and a change wakes exactly the tasks that depend on it, for that model alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::{Client, ResourceExt};
use tokio::sync::Notify;
use tokio::time::Instant;
use trustformers_control::build::Platform;
use trustformers_control::causes::Cause;
use trustformers_control::kinds::{CHILDREN, ChildKind};
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
use trustformers_control::status::PodReport;
use trustformers_crds::{ABTest, InferenceModel, InferenceModelStatus};
use trustformers_proto::v1::ModelStatus;

use crate::ab_tests::samples::TestSamples;
use crate::changes::Changes;
use crate::children::Children;
use crate::cluster_keys::ClusterKeys;
use crate::definitions::Definitions;
use crate::extended::ExtendedResources;
use crate::feed::FeedState;
use crate::feed::counts::GatewaySums;
use crate::metrics::Metrics;
use crate::models::{ModelNames, ModelWriter};
use crate::pod_admin::Identity;
use crate::pod_tokens::PodTokens;
use crate::pods::{PodWriter, Pods};
use crate::queue::{Lane, Queue};
use crate::reconcile::settled::Settled;
use crate::recorder::EventCounts;

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
    /// Who the operator is for pods; none: pods are not changed while they run.
    pub identity: Option<Identity>,
    /// The admin port of pods; another one only in tests.
    pub admin_port: u16,
    /// Their port for gRPC; another one only in tests.
    pub grpc_port: u16,
}

/// The writing ends of the caches.
pub struct Writers {
    /// Fills `models`.
    pub models: ModelWriter,
    /// Fills `pods`.
    pub pods: PodWriter,
    /// Fills `ab_tests`.
    pub ab_tests: Writer<ABTest>,
}

/// What the writers of caches mark.
#[derive(Debug, Default)]
pub struct ChangeMarks {
    /// Models whose route may change.
    pub routes: Arc<Changes>,
    /// Models whose pods may need another readiness gate.
    pub gates: Arc<Changes>,
    /// Models whose pods may have to be observed.
    pub pods: Arc<Changes>,
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
    /// What was desired and found stored last.
    pub settled: Option<Arc<Settled>>,
    /// Since when a status waits that says nothing new but a reason or a message.
    pub status_waits_since: Option<Instant>,
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
    /// The models by their bare name.
    pub names: Arc<ModelNames>,
    /// Their pods, with what is reported about them.
    pub pods: Arc<Pods>,
    /// The A/B tests.
    pub ab_tests: Store<ABTest>,
    /// What the operator made for them.
    pub children: Children,
    /// What nodes have beside processors and memory.
    pub extended: ExtendedResources,
    /// Which optional kinds of children the cluster has definitions of.
    pub definitions: Definitions,
    /// What gateways have counted.
    pub counts: GatewaySums,
    /// What gateways have counted of A/B tests.
    pub samples: TestSamples,
    /// Events that were published lately.
    pub event_counts: EventCounts,
    /// With which keys pods recognise the operator.
    pub cluster_keys: ClusterKeys,
    /// The operator's tokens for pods.
    pub pod_tokens: PodTokens,
    /// The feed of this lead: which tables gateways have.
    pub feed: OnceLock<Arc<FeedState>>,
    memories: Mutex<HashMap<ModelKey, Memory>>,
    /// Stored models that cannot be decoded, each with the error.
    unreadable: Mutex<BTreeMap<ModelKey, Unreadable>>,
    /// Models that need a reconcile.
    pub queue: Arc<Queue<ModelKey>>,
    /// Set when the caches are complete: before, no task empties the queue.
    started: AtomicBool,
    /// Models for which something has changed that routes depend on.
    pub routes_changed: Arc<Changes>,
    /// Models for which something has changed that readiness gates depend on.
    pub gates_changed: Arc<Changes>,
    /// Models whose set of pods to observe may have changed.
    pub pods_changed: Arc<Changes>,
    /// The set of models that cannot be decoded has changed.
    pub unreadable_changed: Notify,
    /// Something that A/B tests depend on has changed.
    pub ab_tests_changed: Notify,
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
    /// Models that need a reconcile.
    pub queue: Arc<Queue<ModelKey>>,
}

impl Context {
    /// A context with empty caches.
    #[must_use]
    pub fn create(client: Client, settings: Settings, metrics: Metrics) -> NewContext {
        let (models, models_writer) = store();
        let (ab_tests, ab_tests_writer) = store();
        let marks = Arc::new(ChangeMarks::default());
        let (names, pods) = (Arc::new(ModelNames::default()), Arc::new(Pods::default()));
        let writers = Writers {
            models: ModelWriter::new(models_writer, Arc::clone(&names), Arc::clone(&marks)),
            pods: PodWriter::new(Arc::clone(&pods), Arc::clone(&marks)),
            ab_tests: ab_tests_writer,
        };
        let queue = Arc::new(Queue::default());
        let context = Self {
            client,
            settings,
            metrics,
            models,
            names,
            pods,
            ab_tests,
            children: Children::default(),
            extended: ExtendedResources::default(),
            definitions: Definitions::default(),
            counts: GatewaySums::default(),
            samples: TestSamples::default(),
            event_counts: EventCounts::default(),
            cluster_keys: ClusterKeys::default(),
            pod_tokens: PodTokens::default(),
            feed: OnceLock::new(),
            memories: Mutex::default(),
            unreadable: Mutex::default(),
            queue: Arc::clone(&queue),
            started: AtomicBool::new(false),
            routes_changed: Arc::clone(&marks.routes),
            gates_changed: Arc::clone(&marks.gates),
            pods_changed: Arc::clone(&marks.pods),
            unreadable_changed: Notify::new(),
            ab_tests_changed: Notify::new(),
        };
        NewContext { context: Arc::new(context), writers, queue }
    }

    /// What the operator's settings add to every model, with the keys and the optional kinds as they are
    /// known now.
    #[must_use]
    pub fn platform(&self) -> Platform {
        let access = |identity: &Identity| self.cluster_keys.access(&identity.subject());
        Platform {
            admin: self.settings.identity.as_ref().map(access),
            optional_kinds: self.optional_kinds(),
            ..self.settings.platform.clone()
        }
    }

    /// The kinds of children that are no part of Kubernetes and that the cluster has definitions of.
    #[must_use]
    pub fn optional_kinds(&self) -> BTreeSet<&'static str> {
        let is_there = |kind: &ChildKind| self.definitions.has(kind) && self.children.is_listed(kind);
        let optional = CHILDREN.iter().filter(|kind| kind.needs_definition && is_there(kind));
        optional.map(|kind| kind.kind).collect()
    }

    /// Waits until every cache has been filled.
    ///
    /// # Errors
    /// When a watch ended before.
    pub async fn complete(&self) -> Result<(), WatchesEnded> {
        self.models.wait_until_ready().await.map_err(|_| WatchesEnded)?;
        self.ab_tests.wait_until_ready().await.map_err(|_| WatchesEnded)?;
        self.pods.complete().await;
        self.children.complete().await;
        self.definitions.complete(&self.children).await;
        Ok(())
    }

    /// From now on changes request reconciles. Every model is requested.
    pub fn start(&self) {
        self.started.store(true, Ordering::Release);
        for model in self.models.state() {
            self.request(&model.namespace().unwrap_or_default(), &model.name_any(), lane_of(&model));
        }
        self.routes_changed.mark_all();
        self.gates_changed.mark_all();
        self.pods_changed.mark_all();
        self.unreadable_changed.notify_one();
        self.ab_tests_changed.notify_one();
    }

    /// Requests a reconcile of a model. A request for a model that is gone has no effect.
    pub fn request(&self, namespace: &str, name: &str, lane: Lane) {
        if self.started.load(Ordering::Acquire) {
            self.queue.request(&(namespace.to_owned(), name.to_owned()), lane);
        }
    }

    /// The model with this key.
    #[must_use]
    pub fn model(&self, (namespace, name): &ModelKey) -> Option<Arc<InferenceModel>> {
        self.models.get(&ObjectRef::new(name).within(namespace))
    }

    /// Records a pod's report. True if more than the progress changed.
    pub fn record_report(&self, uid: &str, restarts: u32, model: ModelStatus) -> bool {
        self.pods.record_report(uid, restarts, model)
    }

    /// The reports of these pods that their running containers sent.
    #[must_use]
    pub fn reports_of(&self, pods: &[PodView]) -> BTreeMap<String, PodReport> {
        pods.iter().filter_map(|pod| Some((pod.uid.clone(), self.pods.report(pod)?))).collect()
    }

    /// Records which nodes are ready; returns the models with pods on those of which that changed.
    pub fn set_ready_nodes(&self, ready: &BTreeSet<String>) -> BTreeSet<ModelKey> {
        let changed = self.pods.set_ready_nodes(ready);
        for key in &changed {
            self.routes_changed.mark(key);
            self.gates_changed.mark(key);
            self.pods_changed.mark(key);
        }
        changed
    }

    /// Records whether pods of a model are asked for something, so that they are observed until they did it.
    pub fn set_asked(&self, key: &ModelKey, is_asked: bool) {
        if self.pods.set_asked(key, is_asked) {
            self.pods_changed.mark(key);
        }
    }

    /// Records the cause that an Event about a pod names. True if it is new.
    pub fn record_pod_event(&self, uid: &str, cause: Cause) -> bool {
        self.pods.record_cause(uid, cause)
    }

    /// The cause that an Event about a pod names, while the pod's container has never run and its status has
    /// none.
    #[must_use]
    pub fn with_event_cause(&self, pod: PodView) -> PodView {
        let starts = pod.cause.is_none() && !pod.running && !pod.ended && pod.restarts == 0;
        let cause = if starts { self.pods.cause(&pod.uid) } else { None };
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
        self.routes_changed.mark(key);
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
    pub fn set_unreadable(&self, key: &ModelKey, model: Option<Unreadable>) {
        let mut unreadable = lock(&self.unreadable);
        let changed = match model {
            Some(model) => unreadable.insert(key.clone(), model.clone()) != Some(model),
            None => unreadable.remove(key).is_some(),
        };
        if changed {
            self.routes_changed.mark(key);
            self.unreadable_changed.notify_one();
        }
    }

    /// The stored models that cannot be decoded.
    #[must_use]
    pub fn unreadable(&self) -> BTreeMap<ModelKey, Unreadable> {
        lock(&self.unreadable).clone()
    }
}

/// The lane of a model that needs a reconcile for no other reason than that it exists.
pub(crate) fn lane_of(model: &InferenceModel) -> Lane {
    let observed = model.status.as_ref().and_then(|status| status.observed_generation);
    match observed {
        None => Lane::New,
        Some(generation) if Some(generation) != model.metadata.generation => Lane::Spec,
        Some(_) => Lane::Status,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use trustformers_control::build::GatewayService;

    pub(crate) fn settings() -> Settings {
        Settings {
            namespace: "trustformers-system".to_owned(),
            pod_name: Some("operator-0".to_owned()),
            gateway_url: "http://gateway:8080".to_owned(),
            platform: Platform {
                runtime_image: "localhost/trustformers-runtime:v0.1.0".to_owned(),
                namespace: "trustformers-system".to_owned(),
                gateway: GatewayService {
                    name: "trustformers-gateway".to_owned(),
                    http_port: 8080,
                    grpc_port: 9090,
                },
                optional_kinds: BTreeSet::new(),
                pull_policy: "IfNotPresent".to_owned(),
                admin: None,
            },
            concurrency: 4,
            identity: None,
            admin_port: trustformers_control::names::ADMIN_PORT,
            grpc_port: trustformers_control::names::GRPC_PORT,
        }
    }

    pub(crate) fn identity() -> Identity {
        Identity { namespace: "trustformers-system".to_owned(), account: "trustformers-operator".to_owned() }
    }

    pub(crate) fn metrics() -> Metrics {
        Metrics::new(&prometheus::Registry::new()).unwrap()
    }

    fn context() -> Arc<Context> {
        let client = crate::testing::mock_client(|request| panic!("{request:?}"));
        Context::create(client, settings(), metrics()).context
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
