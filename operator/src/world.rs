//! What the leader knows: caches that watches fill, what pods reported, and how its parts wake each other.
//!
//! Everything reads the same caches, so a reconcile costs no request, and a change wakes exactly the parts it concerns.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::{Client, ResourceExt};
use tokio::sync::{Notify, mpsc};
use trustformers_control::build::Platform;
use trustformers_control::routes::{Loaded, ModelKey};
use trustformers_crds::{InferenceModel, InferenceModelStatus};
use trustformers_proto::v1::ModelStatus;

use crate::metrics::Metrics;

/// Models that wait to be reconciled. One entry is some 200 bytes; a thousand models changing at once fit, and beyond
/// that the watches wait, which loses nothing.
const QUEUE: usize = 1024;

/// What was set from outside and does not change.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Namespace of the operator.
    pub namespace: String,
    /// Name of the operator's own pod, if it has one.
    pub pod_name: Option<String>,
    /// Where callers reach the gateway.
    pub gateway_url: String,
    /// What every model gets from the operator's settings.
    pub platform: Platform,
    /// Reconciles that may run at once.
    pub concurrency: u16,
}

/// Caches of everything the operator made or works from.
pub struct Caches {
    /// The models.
    pub models: Store<InferenceModel>,
    /// Their accounts.
    pub service_accounts: Store<ServiceAccount>,
    /// Their configurations.
    pub config_maps: Store<ConfigMap>,
    /// Their headless Services.
    pub services: Store<Service>,
    /// Their Deployments.
    pub deployments: Store<Deployment>,
    /// Their disruption budgets.
    pub budgets: Store<PodDisruptionBudget>,
    /// Their pods.
    pub pods: Store<Pod>,
}

/// The writing ends of [`Caches`].
pub struct Writers {
    /// Fills `models`.
    pub models: Writer<InferenceModel>,
    /// Fills `service_accounts`.
    pub service_accounts: Writer<ServiceAccount>,
    /// Fills `config_maps`.
    pub config_maps: Writer<ConfigMap>,
    /// Fills `services`.
    pub services: Writer<Service>,
    /// Fills `deployments`.
    pub deployments: Writer<Deployment>,
    /// Fills `budgets`.
    pub budgets: Writer<PodDisruptionBudget>,
    /// Fills `pods`.
    pub pods: Writer<Pod>,
}

/// The caches will never be complete: their watches ended.
#[derive(Debug, thiserror::Error)]
#[error("the watches ended before the caches were complete")]
pub struct WatchesEnded;

impl Caches {
    /// Empty caches, and what fills them.
    #[must_use]
    pub fn new() -> (Self, Writers) {
        let (models, models_in) = store();
        let (service_accounts, service_accounts_in) = store();
        let (config_maps, config_maps_in) = store();
        let (services, services_in) = store();
        let (deployments, deployments_in) = store();
        let (budgets, budgets_in) = store();
        let (pods, pods_in) = store();
        let caches = Self { models, service_accounts, config_maps, services, deployments, budgets, pods };
        let writers = Writers {
            models: models_in,
            service_accounts: service_accounts_in,
            config_maps: config_maps_in,
            services: services_in,
            deployments: deployments_in,
            budgets: budgets_in,
            pods: pods_in,
        };
        (caches, writers)
    }

    /// Waits until every cache has been filled once.
    ///
    /// # Errors
    /// When a watch ended before.
    pub async fn complete(&self) -> Result<(), WatchesEnded> {
        let Self { models, service_accounts, config_maps, services, deployments, budgets, pods } = self;
        tokio::try_join!(
            models.wait_until_ready(),
            service_accounts.wait_until_ready(),
            config_maps.wait_until_ready(),
            services.wait_until_ready(),
            deployments.wait_until_ready(),
            budgets.wait_until_ready(),
            pods.wait_until_ready(),
        )
        .map(|_| ())
        .map_err(|_| WatchesEnded)
    }
}

/// What the leader remembers between two looks at one model.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// The status as last written, which the cache may not show yet, and the UID of the model that it is about.
    pub written: Option<(String, InferenceModelStatus)>,
    /// Reconciles that failed in a row.
    pub failures: u32,
}

impl Memory {
    /// The status as last written for the model with this UID: a model that was deleted and made anew begins anew.
    #[must_use]
    pub fn written_for(self, uid: Option<&str>) -> Option<InferenceModelStatus> {
        self.written.filter(|(of, _)| Some(of.as_str()) == uid).map(|(_, status)| status)
    }
}

/// What the leader knows. One for each term: a new leader begins with nothing.
pub struct World {
    /// Talks to the API server.
    pub client: Client,
    /// What was set from outside.
    pub settings: Settings,
    /// What the operator counts.
    pub metrics: Metrics,
    /// What watches have seen.
    pub caches: Caches,
    /// The pods' own words by UID of the pod.
    reports: Mutex<BTreeMap<String, ModelStatus>>,
    memories: Mutex<HashMap<ModelKey, Memory>>,
    queue: mpsc::Sender<ObjectRef<InferenceModel>>,
    /// Set once the caches are complete: before, nobody empties the queue.
    awake: AtomicBool,
    /// Something that routes depend on has changed.
    pub routes_changed: Notify,
    /// Something that readiness gates depend on has changed.
    pub gates_changed: Notify,
    /// The set of pods to observe has changed.
    pub pods_changed: Notify,
}

/// The parts of a new world that its owner hands out.
pub struct NewWorld {
    /// The world itself.
    pub world: Arc<World>,
    /// Fill the caches.
    pub writers: Writers,
    /// Models to reconcile.
    pub queue: mpsc::Receiver<ObjectRef<InferenceModel>>,
}

impl World {
    /// A world that knows nothing yet.
    #[must_use]
    pub fn create(client: Client, settings: Settings, metrics: Metrics) -> NewWorld {
        let (caches, writers) = Caches::new();
        let (sender, queue) = mpsc::channel(QUEUE);
        let world = Self {
            client,
            settings,
            metrics,
            caches,
            reports: Mutex::default(),
            memories: Mutex::default(),
            queue: sender,
            awake: AtomicBool::new(false),
            routes_changed: Notify::new(),
            gates_changed: Notify::new(),
            pods_changed: Notify::new(),
        };
        NewWorld { world: Arc::new(world), writers, queue }
    }

    /// From now on changes ask for reconciles, and every model is asked for once.
    pub async fn awaken(&self) {
        self.awake.store(true, Ordering::Release);
        for model in self.caches.models.state() {
            self.reconcile_soon(&model.namespace().unwrap_or_default(), &model.name_any()).await;
        }
        self.routes_changed.notify_one();
        self.gates_changed.notify_one();
        self.pods_changed.notify_one();
    }

    /// Asks for a reconcile of a model. Asking for one that is gone does no harm.
    pub async fn reconcile_soon(&self, namespace: &str, name: &str) {
        if !self.awake.load(Ordering::Acquire) {
            return;
        }
        // The receiver ends with the lead; then nobody reconciles any more.
        let _ = self.queue.send(ObjectRef::new(name).within(namespace)).await;
    }

    /// Notes what a pod said about its model. True where more than the progress changed.
    pub fn heard(&self, uid: &str, report: ModelStatus) -> bool {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let known = reports.insert(uid.to_owned(), report.clone());
        known.is_none_or(|known| {
            ModelStatus { loaded_bytes: 0, total_bytes: 0, ..known }
                != ModelStatus { loaded_bytes: 0, total_bytes: 0, ..report }
        })
    }

    /// Forgets a pod's words.
    pub fn forget_pod(&self, uid: &str) {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// What these pods have said.
    pub fn reports_of<'a>(&self, uids: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, ModelStatus> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        uids.into_iter().filter_map(|uid| Some((uid.to_owned(), reports.get(uid)?.clone()))).collect()
    }

    /// What pods have loaded, by UID of the pod.
    pub fn loaded(&self) -> BTreeMap<String, Loaded> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports
            .iter()
            .filter(|(_, report)| !report.digest.is_empty())
            .map(|(uid, report)| {
                (uid.clone(), Loaded { digest: report.digest.clone(), task: report.task.clone() })
            })
            .collect()
    }

    /// What is remembered of a model.
    pub fn memory(&self, key: &ModelKey) -> Memory {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned().unwrap_or_default()
    }

    /// Changes what is remembered of a model.
    pub fn remember(&self, key: &ModelKey, change: impl FnOnce(&mut Memory)) {
        change(self.memories.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()).or_default());
    }

    /// Forgets a model that was deleted.
    pub fn forget_model(&self, key: &ModelKey) {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::metrics::Metrics;

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
}
