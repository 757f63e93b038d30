//! The ConfigMap of a pool: `pod.yaml`, which its pods load when they start, and the cluster's keys.
//!
//! It has the name of its pool and changes while pods run: after a rollout within running pods it names
//! another revision, and keys rotate. Pods load it at their start alone; kubelet brings a change to a running
//! pod within about a minute, and a pod that starts with an older text is asked over its admin port for what
//! is missing.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::Value;
use trustformers_crds::{BatchStrategy, DEFAULT_MAX_WAIT_MS, KvCache, Quantity};
use trustformers_proto::pod_config::{
    FILE_NAME, KEYS_FILE_NAME, PodAdmin, PodConfig, PodConfigError, PodEngine, PodFetch, PodGoldenPrompt,
    PodModel,
};

use super::pod::{CACHE_DIR, CONFIG_DIR, MODEL_DIR, SECRET_DIR};
use super::{PodAccess, meta};
use crate::adapters::ValidatedAdapter;
use crate::names;
use crate::rollout::GoldenPrompt;
use crate::validate::{CacheVolume, Mount, ValidatedModel};

/// The file with the configuration before the last change of revision: an undo needs it again.
const PREVIOUS_FILE: &str = "previous.yaml";

/// The files of a pool's ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolFiles {
    /// `pod.yaml`.
    pub pod: String,
    /// The `pod.yaml` of the revision before.
    pub previous: Option<String>,
    /// The cluster's public keys, a JSON Web Key Set.
    pub keys: Option<String>,
}

impl PoolFiles {
    /// The files in a stored ConfigMap; none if it has no `pod.yaml`.
    #[must_use]
    pub fn of(config_map: &Value) -> Option<Self> {
        let text = |name: &str| config_map["data"][name].as_str().map(str::to_owned);
        Some(Self { pod: text(FILE_NAME)?, previous: text(PREVIOUS_FILE), keys: text(KEYS_FILE_NAME) })
    }

    /// The configuration of a revision, if one of the files has it.
    #[must_use]
    pub fn config(&self, revision: &str) -> Option<PodConfig> {
        let texts = [Some(&self.pod), self.previous.as_ref()].into_iter().flatten();
        texts.filter_map(|text| PodConfig::parse(text).ok()).find(|one| one.model.revision == revision)
    }

    /// The files with which pods start with `revision`. `own` is the configuration of the spec, whose way to
    /// recognise the operator every file gets. A revision that neither the spec nor a file describes leaves
    /// the file as it is; without a file there is none.
    ///
    /// # Errors
    /// Only if a configuration cannot be written, which no validated model causes.
    pub fn next(
        revision: &str,
        own: &PodConfig,
        stored: Option<&Self>,
        access: Option<&PodAccess>,
    ) -> Result<Option<Self>, PodConfigError> {
        let present = |text: &str| PodConfig::parse(text).ok().map(|config| config.model.revision);
        let before = stored.and_then(|stored| present(&stored.pod));
        let mut files = match stored {
            _ if own.model.revision == revision => {
                let kept = stored.filter(|_| before.as_deref() != Some(revision)).map(|one| one.pod.clone());
                let previous = kept.or_else(|| stored?.previous.clone());
                Self { pod: own.to_yaml()?, previous, keys: None }
            }
            None => return Ok(None),
            Some(stored) => {
                let is_back = stored.previous.as_deref().and_then(present).as_deref() == Some(revision);
                match &stored.previous {
                    Some(previous) if is_back && before.as_deref() != Some(revision) => {
                        Self { pod: previous.clone(), previous: Some(stored.pod.clone()), keys: None }
                    }
                    _ => stored.clone(),
                }
            }
        };
        if let Ok(mut config) = PodConfig::parse(&files.pod) {
            config.admin = own.admin.clone();
            files.pod = config.to_yaml()?;
        }
        // Keys that cannot be read from the cluster now stay as they are.
        let keys = access.and_then(|access| access.keys.clone());
        files.keys = keys.or_else(|| stored?.keys.clone()).filter(|_| access.is_some());
        Ok(Some(files))
    }
}

impl PodAccess {
    /// What the pods of a namespace are told of it.
    fn of_pod(&self, namespace: &str) -> PodAdmin {
        PodAdmin {
            port: names::ADMIN_PORT,
            keys_file: format!("{CONFIG_DIR}/{KEYS_FILE_NAME}"),
            audience: names::admin_audience(namespace),
            subject: self.subject.clone(),
            issuer: self.issuer.clone(),
        }
    }
}

pub(super) fn config_map(model: &ValidatedModel, pool: &str, files: &PoolFiles) -> ConfigMap {
    let mut metadata = meta(model, &names::config_map(&model.name, pool));
    metadata.labels = Some(names::revision_labels(&model.name, pool));
    let PoolFiles { pod, previous, keys } = files.clone();
    let mut data = BTreeMap::from([(FILE_NAME.to_owned(), pod)]);
    data.extend(previous.map(|text| (PREVIOUS_FILE.to_owned(), text)));
    data.extend(keys.map(|text| (KEYS_FILE_NAME.to_owned(), text)));
    ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
}

fn golden_prompt(one: &GoldenPrompt) -> PodGoldenPrompt {
    PodGoldenPrompt { prompt: one.prompt.clone(), expect: one.expect.clone() }
}

/// What kubelet counts of a cache beside the files: journals of transfers, records and folders.
const CACHE_OVERHEAD_BYTES: u64 = 1 << 20;

/// The most that a pod keeps in its cache. Below the size at which kubelet evicts the pod, so that the pod
/// can say that a model does not fit. A limit with a fraction is kubelet's alone.
fn max_cache_bytes(mount: &Mount) -> Option<u64> {
    let Mount::Fetched(CacheVolume::EmptyDir { size_limit: Some(limit) }) = mount else { return None };
    let limit_bytes = Quantity(limit.clone()).whole_bytes()?;
    Some(limit_bytes.saturating_sub(CACHE_OVERHEAD_BYTES))
}

/// What the spec asks a pod to load. Defaults of fields that were added later are omitted, so that operator
/// upgrades change no existing file and older pods can read it.
#[must_use]
pub fn pod_config(model: &ValidatedModel, revision: &str, access: Option<&PodAccess>) -> PodConfig {
    let runtime = &model.runtime;
    let batching = &runtime.batching;
    let strategy = Some(batching.strategy).filter(|strategy| *strategy != BatchStrategy::default());
    let kv_cache = Some(runtime.kv_cache).filter(|kv_cache| *kv_cache != KvCache::default());
    let adapters = &model.adapters;
    let is_fetched =
        matches!(model.mount, Mount::Fetched(_)) || adapters.iter().any(ValidatedAdapter::is_fetched);
    PodConfig {
        model: PodModel {
            names: vec![format!("{}/{}", model.namespace, model.name), model.name.clone()],
            revision: revision.to_owned(),
            path: path(model),
            fetch: is_fetched.then(|| PodFetch {
                cache_dir: CACHE_DIR.to_owned(),
                revision: model.source.revision.clone(),
                secret_dir: model.source.secret_ref.as_ref().map(|_| SECRET_DIR.to_owned()),
                max_cache_bytes: max_cache_bytes(&model.mount),
            }),
            files: model.source.files.clone(),
            sha256: model.source.sha256.clone(),
            task: model.task,
            golden_prompts: model.rollout.golden_prompts.iter().map(golden_prompt).collect(),
            adapters: adapters.iter().map(ValidatedAdapter::of_pod).collect(),
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
        admin: access.map(|access| access.of_pod(&model.namespace)),
    }
}

/// Where the model lies for the pod. Of a claim the root is mounted, so that a running pod reaches every
/// path in it.
fn path(model: &ValidatedModel) -> String {
    match &model.mount {
        Mount::Fetched(_) => model.source.uri.clone(),
        Mount::Claim { path, .. } if !path.is_empty() => format!("{MODEL_DIR}/{path}"),
        Mount::Claim { .. } | Mount::Image { .. } => MODEL_DIR.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::tests::valid;

    fn access(keys: Option<&str>) -> PodAccess {
        PodAccess {
            subject: "system:serviceaccount:sys:operator".to_owned(),
            issuer: Some("https://cluster".to_owned()),
            keys: keys.map(str::to_owned),
        }
    }

    fn own(revision: &str) -> PodConfig {
        with_access(revision, Some(&access(None)))
    }

    fn with_access(revision: &str, access: Option<&PodAccess>) -> PodConfig {
        pod_config(&valid("chat", "{source: {uri: 'pvc://weights/a'}}"), revision, access)
    }

    fn next(revision: &str, spec: &str, stored: Option<&PoolFiles>) -> Option<PoolFiles> {
        PoolFiles::next(revision, &own(spec), stored, Some(&access(Some("{k1}")))).unwrap()
    }

    fn starts_with(files: &PoolFiles) -> String {
        PodConfig::parse(&files.pod).unwrap().model.revision
    }

    #[test]
    fn a_pool_keeps_the_file_of_its_revision_until_another_one_is_promoted_and_takes_it_back() {
        let first = next("r1", "r1", None).unwrap();
        assert_eq!((starts_with(&first), first.previous.clone()), ("r1".to_owned(), None));
        // While the spec's revision is only a candidate, pods start with the stable one.
        assert_eq!(next("r1", "r2", Some(&first)), Some(first.clone()));
        let promoted = next("r2", "r2", Some(&first)).unwrap();
        assert_eq!((starts_with(&promoted), promoted.previous.as_ref()), ("r2".to_owned(), Some(&first.pod)));
        assert_eq!(next("r2", "r2", Some(&promoted)), Some(promoted.clone()));
        let undone = next("r1", "r2", Some(&promoted)).unwrap();
        assert_eq!((starts_with(&undone), undone.previous.as_ref()), ("r1".to_owned(), Some(&promoted.pod)));
        assert_eq!(next("r1", "r2", Some(&undone)), Some(undone.clone()));
        assert_eq!(undone.config("r2").unwrap().model.revision, "r2");
        assert_eq!(undone.config("r3"), None);
        assert_eq!(next("r1", "r2", None), None, "nothing describes it");
    }

    #[test]
    fn keys_follow_the_cluster_and_stay_while_they_cannot_be_read() {
        let first = next("r1", "r1", None).unwrap();
        assert_eq!(first.keys.as_deref(), Some("{k1}"));
        let kept =
            |keys| PoolFiles::next("r1", &own("r2"), Some(&first), Some(&access(keys))).unwrap().unwrap();
        assert_eq!(kept(None).keys.as_deref(), Some("{k1}"));
        assert_eq!(kept(Some("{k2}")).keys.as_deref(), Some("{k2}"));
        assert_eq!(PodConfig::parse(&kept(None).pod).unwrap().admin, Some(access(None).of_pod("team")));
        let without = PoolFiles::next("r1", &with_access("r2", None), Some(&first), None).unwrap().unwrap();
        assert_eq!((without.keys, PodConfig::parse(&without.pod).unwrap().admin), (None, None));
    }

    #[test]
    fn the_files_are_read_back_from_the_object() {
        let model = valid("chat", "{source: {uri: 'pvc://weights/a'}}");
        let files = next("r2", "r2", next("r1", "r1", None).as_ref()).unwrap();
        let stored = serde_json::to_value(config_map(&model, "r1", &files)).unwrap();
        assert_eq!(stored["metadata"]["name"], "chat-pod-r1");
        assert_eq!(PoolFiles::of(&stored), Some(files));
    }

    #[test]
    fn the_config_map_of_a_pool_whose_pods_changed_their_revision() {
        let model = valid("chat", "{source: {uri: 'hf://org/name', revision: v2}}");
        let cluster = access(Some(r#"{"keys":[]}"#));
        let config = |revision| pod_config(&model, revision, Some(&cluster));
        let first = PoolFiles::next("r1", &config("r1"), None, Some(&cluster)).unwrap();
        let files = PoolFiles::next("r2", &config("r2"), first.as_ref(), Some(&cluster)).unwrap().unwrap();
        insta::assert_yaml_snapshot!(config_map(&model, "r1", &files));
    }
}
