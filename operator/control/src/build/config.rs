//! The ConfigMap with `pod.yaml`: what a pod loads.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use trustformers_crds::{BatchStrategy, DEFAULT_MAX_WAIT_MS, KvCache};
use trustformers_proto::pod_config::{FILE_NAME, PodConfig, PodConfigError, PodEngine, PodFetch, PodModel};

use super::meta;
use super::pod::{CACHE_DIR, MODEL_DIR, SECRET_DIR};
use crate::validate::{Mount, ValidatedModel};
use crate::{hash, names};

/// The name contains the hash of the content. So a change creates a new ConfigMap and changes the pod
/// template, and pods that exist keep the file that they started with.
pub(super) fn config_map(model: &ValidatedModel, revision: &str) -> Result<ConfigMap, PodConfigError> {
    let text = pod_config(model, revision).to_yaml()?;
    let mut metadata = meta(model, &names::config_map(&model.name, &hash::short(&text)));
    metadata.labels = Some(names::revision_labels(&model.name, revision));
    Ok(ConfigMap {
        metadata,
        data: Some(BTreeMap::from([(FILE_NAME.to_owned(), text)])),
        immutable: Some(true),
        ..ConfigMap::default()
    })
}

/// Defaults of fields that were added later are omitted, so that operator upgrades change no existing file
/// and older pods can read it.
fn pod_config(model: &ValidatedModel, revision: &str) -> PodConfig {
    let runtime = &model.runtime;
    let batching = &runtime.batching;
    let strategy = Some(batching.strategy).filter(|strategy| *strategy != BatchStrategy::default());
    let kv_cache = Some(runtime.kv_cache).filter(|kv_cache| *kv_cache != KvCache::default());
    let is_fetched = matches!(model.mount, Mount::Fetched(_));
    PodConfig {
        model: PodModel {
            names: vec![format!("{}/{}", model.namespace, model.name), model.name.clone()],
            revision: revision.to_owned(),
            path: if is_fetched { model.source.uri.clone() } else { MODEL_DIR.to_owned() },
            fetch: is_fetched.then(|| PodFetch {
                cache_dir: CACHE_DIR.to_owned(),
                revision: model.source.revision.clone(),
                secret_dir: model.source.secret_ref.as_ref().map(|_| SECRET_DIR.to_owned()),
                max_cache_bytes: None,
            }),
            files: model.source.files.clone(),
            sha256: model.source.sha256.clone(),
            task: model.task,
        },
        engine: PodEngine {
            device: Some(runtime.device.as_str().to_owned()),
            numerics: Some(runtime.numerics.as_str().to_owned()),
            kv_cache: kv_cache.map(|kv_cache| kv_cache.as_str().to_owned()),
            context_tokens: runtime.context_tokens,
            max_batch_size: Some(batching.max_batch_size),
            max_queue: Some(batching.max_queue),
            batch_strategy: strategy.map(|strategy| strategy.as_str().to_owned()),
            max_wait_ms: Some(batching.max_wait_ms).filter(|ms| *ms != DEFAULT_MAX_WAIT_MS),
            priority: batching.priority.then_some(true),
        },
        // Validation limits the drain timeout to a week, so it fits.
        drain_timeout_ms: u64::try_from(model.drain_timeout.as_millis()).unwrap_or(u64::MAX),
    }
}
