//! Step one of a reconcile: what is known of the model, from the caches alone. It makes no request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::time::Instant;
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
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
    /// Since when a status waits that says nothing new but a reason or a message.
    pub status_waits_since: Option<Instant>,
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
    let pods = context.pods.of_model(&key);
    let live = pods.iter().filter(|pod| !pod.view.ended);
    let mounted = live.flat_map(|pod| pod.config_maps.iter().cloned()).collect();
    let views: Vec<PodView> = pods.iter().map(|pod| context.with_event_cause(pod.view.clone())).collect();
    let memory = context.memory(&key, &uid);
    let written = memory.written;
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
        status_waits_since: memory.status_waits_since,
        children: context.children.of_owner(&uid),
        mounted,
        reports: context.reports_of(&views),
        pods: views,
        name_owner: context.names.owner(&key.1).filter(|owner| *owner != key),
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
