//! Step one of a reconcile: what is known of the model, from the caches alone. Nothing is asked of the API server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::runtime::reflector::{Lookup, ObjectRef, Store};
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_control::routes::{ModelKey, RouteModel, bare_names};
use trustformers_crds::{InferenceModel, InferenceModelStatus};
use trustformers_proto::v1::ModelStatus;

use crate::world::World;

/// What exists for a model, as the caches show it.
#[derive(Debug, Default)]
pub struct Seen {
    /// The status as last written or stored.
    pub status: InferenceModelStatus,
    /// The account of the pods.
    pub service_account: Option<Arc<ServiceAccount>>,
    /// Every configuration, old ones included.
    pub config_maps: Vec<Arc<ConfigMap>>,
    /// The headless Service.
    pub service: Option<Arc<Service>>,
    /// The Deployment.
    pub deployment: Option<Arc<Deployment>>,
    /// The disruption budget.
    pub budget: Option<Arc<PodDisruptionBudget>>,
    /// The pods.
    pub pods: Vec<PodView>,
    /// Names of the ConfigMaps that pods have mounted.
    pub mounted: BTreeSet<String>,
    /// The pods' own words, by UID.
    pub reports: BTreeMap<String, ModelStatus>,
    /// The older model that holds this one's bare name.
    pub name_holder: Option<ModelKey>,
}

/// Why what exists could not be told.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// A stored object has neither name nor namespace.
    #[error("a stored InferenceModel has no name or namespace")]
    Incomplete,
}

impl FetchError {
    /// The variant's name, as metrics label it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Incomplete => "Incomplete",
        }
    }
}

/// Gathers what the caches show of `model`.
///
/// # Errors
/// When the model lacks a name, as no stored object does.
pub fn fetch(world: &World, model: &InferenceModel) -> Result<Seen, FetchError> {
    let key = key(model).ok_or(FetchError::Incomplete)?;
    let (namespace, name) = (key.0.as_str(), key.1.as_str());
    let caches = &world.caches;
    let pods = caches.pods.state_filter(|pod: &Pod| is_of(pod, namespace, name));
    let views: Vec<PodView> = pods.iter().filter_map(|pod| PodView::of(pod)).collect();
    let stored = model.status.clone().unwrap_or_default();
    Ok(Seen {
        status: world.memory(&key).written_for(model.metadata.uid.as_deref()).unwrap_or(stored),
        service_account: by_name(&caches.service_accounts, namespace, &names::service_account(name)),
        config_maps: caches.config_maps.state_filter(|map: &ConfigMap| is_of(map, namespace, name)),
        service: by_name(&caches.services, namespace, name),
        deployment: by_name(&caches.deployments, namespace, name),
        budget: by_name(&caches.budgets, namespace, name),
        mounted: pods.iter().flat_map(|pod| mounted(pod)).collect(),
        reports: world.reports_of(views.iter().map(|pod| pod.uid.as_str())),
        pods: views,
        name_holder: name_holder(world, &key),
    })
}

/// Namespace and name of a model.
pub(crate) fn key(model: &InferenceModel) -> Option<ModelKey> {
    Some((model.metadata.namespace.clone()?, model.metadata.name.clone()?))
}

fn by_name<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: Lookup<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

fn is_of<K: ResourceExt>(child: &K, namespace: &str, model: &str) -> bool {
    child.meta().namespace.as_deref() == Some(namespace)
        && child.labels().get(names::MODEL_LABEL).is_some_and(|label| label == model)
}

fn mounted(pod: &Pod) -> impl Iterator<Item = String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| volume.config_map.as_ref().map(|map| map.name.clone()))
}

fn name_holder(world: &World, key: &ModelKey) -> Option<ModelKey> {
    let namesakes = world
        .caches
        .models
        .state_filter(|other: &InferenceModel| other.metadata.name.as_deref() == Some(key.1.as_str()));
    let claims: Vec<RouteModel> = namesakes.iter().filter_map(|other| RouteModel::of(other)).collect();
    bare_names(&claims).remove(&key.1).filter(|holder| holder != key)
}
