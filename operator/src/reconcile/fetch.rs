//! Step one of a reconcile: what is known of the model, from the caches alone. It makes no request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_control::routes::{ModelKey, RouteModel, bare_names};
use trustformers_control::status::PodReport;
use trustformers_crds::{InferenceModel, InferenceModelStatus};

use crate::children::Child;
use crate::context::{Context, WrittenStatus};

/// What exists for a model, as the caches show it.
#[derive(Debug)]
pub struct Observed {
    /// Namespace and name of the model.
    pub key: ModelKey,
    /// UID of the model.
    pub uid: String,
    /// The status as it is stored, including a write that the cache does not show yet.
    pub stored: InferenceModelStatus,
    /// The status as the operator wrote it last, or else the stored one. They differ when somebody edited the
    /// status.
    pub previous: InferenceModelStatus,
    /// The last write of the status.
    pub written: Option<WrittenStatus>,
    /// The children that the model owns.
    pub children: Vec<Arc<Child>>,
    /// The pods.
    pub pods: Vec<PodView>,
    /// Names of the ConfigMaps that pods have mounted. A pod that ended needs none.
    pub mounted: BTreeSet<String>,
    /// The reports of these pods, by UID.
    pub reports: BTreeMap<String, PodReport>,
    /// The older model that owns this one's bare name.
    pub name_owner: Option<ModelKey>,
}

/// Why the caches could not be read. Metrics use the variant's name.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum FetchError {
    /// A stored object has no name, namespace or UID.
    #[error("a stored InferenceModel has no name, namespace or UID")]
    Incomplete,
}

/// Gathers what the caches show of `model`.
///
/// # Errors
/// When the model lacks metadata that every stored object has.
pub fn fetch(context: &Context, model: &InferenceModel) -> Result<Observed, FetchError> {
    let (key, uid) = key(model).zip(model.metadata.uid.clone()).ok_or(FetchError::Incomplete)?;
    let pods = context.pods.state_filter(|pod: &Pod| is_of(pod, &key));
    let views: Vec<PodView> = pods.iter().filter_map(|pod| PodView::of(pod)).collect();
    let ended: BTreeSet<&str> = views.iter().filter(|pod| pod.ended).map(|pod| pod.uid.as_str()).collect();
    let live = pods.iter().filter(|pod| !ended.contains(pod.metadata.uid.as_deref().unwrap_or_default()));
    let mounted = live.flat_map(|pod| mounted(pod)).collect();
    let views: Vec<PodView> = views.into_iter().map(|pod| context.with_event_cause(pod)).collect();
    let written = context.memory(&key, &uid).written;
    let cached = model.status.clone().unwrap_or_default();
    let stored = match &written {
        // The cache does not show the operator's last write yet.
        Some(written) if written.version > version(model) => written.status.clone(),
        _ => cached,
    };
    Ok(Observed {
        previous: written.as_ref().map_or_else(|| stored.clone(), |written| written.status.clone()),
        stored,
        written,
        children: context.children.of_owner(&uid),
        mounted,
        reports: context.reports_of(&views),
        pods: views,
        name_owner: name_owner(context, &key),
        key,
        uid,
    })
}

/// Namespace and name of a model.
pub(crate) fn key(model: &InferenceModel) -> Option<ModelKey> {
    Some((model.metadata.namespace.clone()?, model.metadata.name.clone()?))
}

/// Resource version of a model.
pub(crate) fn version(model: &InferenceModel) -> Option<u64> {
    model.metadata.resource_version.as_deref()?.parse().ok()
}

fn is_of(pod: &Pod, (namespace, model): &ModelKey) -> bool {
    pod.metadata.namespace.as_ref() == Some(namespace) && pod.labels().get(names::MODEL_LABEL) == Some(model)
}

fn mounted(pod: &Pod) -> impl Iterator<Item = String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| volume.config_map.as_ref().map(|map| map.name.clone()))
}

fn name_owner(context: &Context, key: &ModelKey) -> Option<ModelKey> {
    let namesakes = context
        .models
        .state_filter(|other: &InferenceModel| other.metadata.name.as_deref() == Some(key.1.as_str()));
    let claims: Vec<RouteModel> = namesakes.iter().filter_map(|other| RouteModel::of(other)).collect();
    bare_names(&claims).remove(&key.1).filter(|owner| owner != key)
}
