//! Step two of a reconcile: parse the spec into what the builders need.
//!
//! The API server has refused most mistakes by the schema. This step finds what a schema cannot express, and
//! objects that were stored before a rule existed. Nothing after this step reads the raw spec.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::Affinity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use trustformers_crds::{
    BatchStrategy, EmptyDirCache, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, Monitoring,
    NetworkPolicySettings, OciAccess, PodSettings, RouteSettings, Runtime, Source, SourceCache,
};
use trustformers_proto::Task;

use crate::adapters::{self, ValidatedAdapter};
use crate::affinity::{self, AffinityError};
use crate::duration::{self, DurationError};
use crate::names;
use crate::rollout::{MAX_EXPECT_BYTES, RolloutPolicy};
use crate::scaling::{self, Autoscaling, ScalingError};
use crate::traffic::{self, TrafficConflict, TrafficError};

/// Where the model's files are mounted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// An OCI image, by reference.
    Image {
        /// The reference, as in a container's `image`.
        reference: String,
    },
    /// A PersistentVolumeClaim of the model's namespace.
    Claim {
        /// The claim's name.
        claim: String,
        /// Path below the claim's root; empty is the root.
        path: String,
    },
    /// Nothing: the pod fetches the files into a cache.
    Fetched(CacheVolume),
}

/// The volume of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheVolume {
    /// A directory that lives as long as its pod.
    EmptyDir {
        /// The size at which kubelet evicts the pod.
        size_limit: Option<String>,
    },
    /// A claim that pods share.
    Claim(String),
}

/// A model whose spec can be honoured.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidatedModel {
    /// Name of the InferenceModel.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// Owner reference of its children.
    pub owner: OwnerReference,
    /// Its task; none if its files decide.
    pub task: Option<Task>,
    /// Where the files are.
    pub mount: Mount,
    /// The source as written: the URI, the globs, the pin.
    pub source: Source,
    /// Engine settings and container.
    pub runtime: Runtime,
    /// Its adapters.
    pub adapters: Vec<ValidatedAdapter>,
    /// Number of pods.
    pub replicas: i32,
    /// How an autoscaler changes that number; none: it is fixed.
    pub autoscaling: Option<Autoscaling>,
    /// How it moves to another revision.
    pub rollout: RolloutPolicy,
    /// How long requests may take to finish when a pod ends.
    pub drain_timeout: Duration,
    /// Serving pods that evictions may remove at the same time.
    pub max_unavailable: i32,
    /// Who reaches the pods; none: everybody.
    pub network_policy: Option<NetworkPolicySettings>,
    /// How a ServiceMonitor or a PodMonitor describes its metrics; none: it has neither.
    pub monitoring: Option<Monitoring>,
    /// How an HTTPRoute leads to it; none: it has none.
    pub route: Option<RouteSettings>,
    /// Rules about nodes and other pods.
    pub affinity: Option<Affinity>,
    /// Settings passed through to the pods.
    pub pod: PodSettings,
}

/// Why a spec cannot be honoured. Each names the field and what to write instead. Metrics use the variant's
/// name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
pub enum ValidateError {
    /// The object has no name, namespace or UID. Every stored object has them.
    #[error("metadata.{0} is missing")]
    Incomplete(&'static str),
    /// The name is too long for the objects made from it.
    #[error(
        "metadata.name has {0} characters; use at most {MAX_NAME_CHARS}, because longer names are made from it"
    )]
    NameTooLong(usize),
    /// The source of the model's files.
    #[error("spec.source.{0}")]
    Source(#[from] SourceError),
    /// An adapter that cannot be served.
    #[error("spec.runtime.adapters: {name:?}: {why}")]
    Adapter {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A duration cannot be read.
    #[error(transparent)]
    Duration(#[from] TrafficError),
    /// Fields of `spec.traffic` do not fit together.
    #[error(transparent)]
    Traffic(#[from] TrafficConflict),
    /// Rules about nodes and pods that Kubernetes does not know.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The autoscaler cannot do what the spec asks of it.
    #[error(transparent)]
    Scaling(#[from] ScalingError),
    /// A duration of the rollout cannot be read.
    #[error("spec.rollout.{field}: {cause}")]
    RolloutDuration {
        /// Field below `spec.rollout`.
        field: &'static str,
        /// What is wrong with it.
        cause: DurationError,
    },
    /// A golden prompt that pods could not check.
    #[error("spec.rollout.analysis.goldenPrompts: {0}")]
    GoldenPrompt(String),
    /// The key of a label or annotation is reserved.
    #[error(
        "spec.pod.{field}: the key {key} is reserved: keys that start with app.kubernetes.io/ or \
         serving.trustformers.dev/ select the pods of the release and of models; choose another key"
    )]
    ReservedKey {
        /// Field below `spec.pod`.
        field: &'static str,
        /// The key.
        key: String,
    },
    /// The environment names one variable twice.
    #[error("spec.runtime.env: the variable {0} occurs twice; remove one of them")]
    EnvTwice(String),
    /// A strategy that generation cannot use.
    #[error(
        "spec.runtime.batching.strategy: {0} is for models that read texts and generate none; generation is \
         batched continuously, so use dynamic or priority with task generate"
    )]
    Strategy(&'static str),
}

/// Why files cannot be read from a source. The field is below the source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The URI's scheme, or what follows it, is not supported.
    #[error(
        "uri: {0:?} is not supported; use oci://IMAGE, pvc://CLAIM[/PATH], hf://ORG/NAME, s3://BUCKET/KEY, \
         gs://BUCKET/KEY, az://CONTAINER/KEY or https://HOST/FILE"
    )]
    Uri(String),
    /// A field that its scheme cannot honour.
    #[error("{field}: {why}")]
    Field {
        /// Field below the source.
        field: &'static str,
        /// What to do.
        why: &'static str,
    },
}

/// Parses a model's spec.
///
/// # Errors
/// The first thing in the spec that cannot be honoured.
pub fn validate(model: &InferenceModel) -> Result<ValidatedModel, ValidateError> {
    let meta = &model.metadata;
    let name = meta.name.clone().ok_or(ValidateError::Incomplete("name"))?;
    let namespace = meta.namespace.clone().ok_or(ValidateError::Incomplete("namespace"))?;
    let owner = model.controller_owner_ref(&()).ok_or(ValidateError::Incomplete("uid"))?;
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(ValidateError::NameTooLong(name.chars().count()));
    }
    let spec = &model.spec;
    check_keys("labels", &spec.pod.labels)?;
    check_keys("annotations", &spec.pod.annotations)?;
    let mut variables = BTreeSet::new();
    if let Some(twice) = spec.runtime.env.iter().find(|one| !variables.insert(one.name.as_str())) {
        return Err(ValidateError::EnvTwice(twice.name.clone()));
    }
    check_strategy(spec)?;
    let rollout = RolloutPolicy::of(&spec.rollout)
        .map_err(|(field, cause)| ValidateError::RolloutDuration { field, cause })?;
    check_golden_prompts(spec.task, &rollout)?;
    traffic::check_conflicts(&traffic::policy(&spec.traffic)?)?;
    traffic::check_shadow(&name, &spec.traffic)?;
    let time = |field, text: &str| duration::parse(text).map_err(|cause| TrafficError { field, cause });
    Ok(ValidatedModel {
        name,
        namespace,
        generation: meta.generation.unwrap_or(0),
        owner,
        task: spec.task,
        mount: mount(&spec.source)?,
        source: spec.source.clone(),
        runtime: spec.runtime.clone(),
        adapters: adapters::validate(spec)?,
        replicas: spec.scaling.replicas,
        autoscaling: scaling::autoscaling(spec)?,
        rollout,
        drain_timeout: time("drainTimeout", &spec.traffic.drain_timeout)?,
        max_unavailable: spec.disruption.max_unavailable,
        network_policy: Some(&spec.network_policy).filter(|policy| policy.enabled).cloned(),
        monitoring: Some(&spec.monitoring).filter(|one| one.service_monitor || one.pod_monitor).cloned(),
        route: Some(&spec.route).filter(|one| !one.parent_refs.is_empty()).cloned(),
        affinity: spec.pod.affinity.as_ref().map(affinity::parse).transpose()?,
        pod: spec.pod.clone(),
    })
}

/// Without a task in the spec, the pod finds the task in the files and logs what it ignores.
fn check_strategy(spec: &InferenceModelSpec) -> Result<(), ValidateError> {
    let strategy = spec.runtime.batching.strategy;
    match (spec.task, strategy) {
        (Some(Task::Generate), BatchStrategy::Time | BatchStrategy::Size) => {
            Err(ValidateError::Strategy(strategy.as_str()))
        }
        _ => Ok(()),
    }
}

/// Without a task in the spec, a pod whose files are for another task refuses to load them.
fn check_golden_prompts(task: Option<Task>, rollout: &RolloutPolicy) -> Result<(), ValidateError> {
    let prompts = &rollout.golden_prompts;
    if task == Some(Task::Embed) && !prompts.is_empty() {
        let why = "a model with task embed generates no text to compare; remove them";
        return Err(ValidateError::GoldenPrompt(why.to_owned()));
    }
    // The schema bounds characters, of which each may have several bytes.
    match prompts.iter().find(|one| one.expect.len() > MAX_EXPECT_BYTES) {
        Some(long) => Err(ValidateError::GoldenPrompt(format!(
            "the expected answer to {:?} has {} bytes; give at most {MAX_EXPECT_BYTES}, its beginning is enough",
            long.prompt,
            long.expect.len()
        ))),
        None => Ok(()),
    }
}

/// A label with a reserved key could make the pod an endpoint of the gateway's or the feed's Service.
fn check_keys(field: &'static str, map: &BTreeMap<String, String>) -> Result<(), ValidateError> {
    let reserved = |key: &&String| {
        key.starts_with(names::OWN_PREFIX)
            || key.starts_with(names::APP_PREFIX)
            || (field == "annotations" && *key == names::DEFAULT_CONTAINER)
    };
    match map.keys().find(reserved) {
        Some(key) => Err(ValidateError::ReservedKey { field, key: key.clone() }),
        None => Ok(()),
    }
}

/// Schemes that pods fetch.
const FETCHED_SCHEMES: [&str; 5] = ["hf", "s3", "gs", "az", "https"];

/// Where the files of a source are for a pod.
pub(crate) fn mount(source: &Source) -> Result<Mount, SourceError> {
    let uri = source.uri.as_str();
    let refused = || SourceError::Uri(uri.to_owned());
    let (scheme, rest) = uri.split_once("://").ok_or_else(refused)?;
    let is_pulled = source.oci == Some(OciAccess::Pull);
    let wrong = |field, why| Err(SourceError::Field { field, why });
    if source.revision.is_some() && scheme != "hf" {
        return wrong("revision", "only hf:// has branches, tags and commits; remove it");
    }
    if source.oci.is_some() && scheme != "oci" {
        return wrong("oci", "it says how oci:// is read; remove it");
    }
    let is_fetched = FETCHED_SCHEMES.contains(&scheme) || (scheme == "oci" && is_pulled);
    let fits = !rest.is_empty() && !rest.contains(char::is_whitespace);
    if is_fetched {
        let mount = Mount::Fetched(cache_volume(source.cache.as_ref())?);
        return fits.then_some(mount).ok_or_else(refused);
    }
    for (field, is_set) in [("secretRef", source.secret_ref.is_some()), ("cache", source.cache.is_some())] {
        if is_set {
            return wrong(
                field,
                "it is for files that the pod fetches; for oci:// set oci: Pull, else remove it",
            );
        }
    }
    if let Some(reference) = uri.strip_prefix("oci://") {
        return fits.then(|| Mount::Image { reference: reference.to_owned() }).ok_or_else(refused);
    }
    let rest = uri.strip_prefix("pvc://").ok_or_else(refused)?;
    let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_end_matches('/');
    if claim.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(refused());
    }
    Ok(Mount::Claim { claim: claim.to_owned(), path: path.to_owned() })
}

fn cache_volume(cache: Option<&SourceCache>) -> Result<CacheVolume, SourceError> {
    let Some(SourceCache { empty_dir, pvc }) = cache else {
        return Ok(CacheVolume::EmptyDir { size_limit: None });
    };
    match (empty_dir, pvc) {
        (Some(EmptyDirCache { size_limit }), None) => {
            Ok(CacheVolume::EmptyDir { size_limit: size_limit.as_ref().map(|limit| limit.0.clone()) })
        }
        (None, Some(claim)) => Ok(CacheVolume::Claim(claim.claim_name.clone())),
        _ => Err(SourceError::Field { field: "cache", why: "give one of emptyDir and pvc" }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A stored model with this spec, as the API server returns it.
    pub(crate) fn model(name: &str, spec: &str) -> InferenceModel {
        let text = format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: {name}, namespace: team, uid: u-{name}, generation: 3, creationTimestamp: '2026-01-02T03:04:05Z'}}\n\
             spec: {spec}\n"
        );
        serde_yaml::from_str(&text).unwrap()
    }

    pub(crate) fn valid(name: &str, spec: &str) -> ValidatedModel {
        validate(&model(name, spec)).unwrap()
    }

    fn error(spec: &str) -> ValidateError {
        validate(&model("chat", spec)).unwrap_err()
    }

    #[test]
    fn sources_become_mounts() {
        let image = valid("chat", "{source: {uri: 'oci://localhost/smollm2:q4_1'}}");
        assert_eq!(image.mount, Mount::Image { reference: "localhost/smollm2:q4_1".to_owned() });
        let claim = valid("chat", "{source: {uri: 'pvc://weights/a/b/'}}");
        assert_eq!(claim.mount, Mount::Claim { claim: "weights".to_owned(), path: "a/b".to_owned() });
        let root = valid("chat", "{source: {uri: 'pvc://weights'}}");
        assert_eq!(root.mount, Mount::Claim { claim: "weights".to_owned(), path: String::new() });
    }

    #[test]
    fn fetched_sources_have_a_cache_and_fields_that_others_refuse() {
        let cache = |spec: &str| valid("chat", spec).mount;
        let empty_dir = |size_limit: Option<&str>| {
            Mount::Fetched(CacheVolume::EmptyDir { size_limit: size_limit.map(str::to_owned) })
        };
        assert_eq!(cache("{source: {uri: 'hf://a/b', revision: v1}}"), empty_dir(None));
        assert_eq!(cache("{source: {uri: 'oci://r/a:v1', oci: Pull}}"), empty_dir(None));
        let limited = "{source: {uri: 's3://a/b', cache: {emptyDir: {sizeLimit: 9Gi}}}}";
        assert_eq!(cache(limited), empty_dir(Some("9Gi")));
        let shared = "{source: {uri: 'https://a/b', secretRef: {name: s}, cache: {pvc: {claimName: c}}}}";
        assert_eq!(cache(shared), Mount::Fetched(CacheVolume::Claim("c".to_owned())));
        for (fields, field) in [
            ("uri: 's3://a/b', revision: v1", "revision"),
            ("uri: 'hf://a/b', oci: Pull", "oci"),
            ("uri: 'pvc://a', secretRef: {name: s}", "secretRef"),
            ("uri: 'oci://a', oci: ImageVolume, cache: {emptyDir: {}}", "cache"),
            ("uri: 'hf://a/b', cache: {}", "cache"),
        ] {
            let error = error(&format!("{{source: {{{fields}}}}}"));
            assert!(error.to_string().starts_with(&format!("spec.source.{field}: ")), "{error}");
        }
    }

    #[test]
    fn errors_name_the_field_and_the_next_step() {
        for uri in ["ftp://a/b", "hf://", "oci://", "pvc://", "pvc://c/../d", "pvc://c//d"] {
            let error = error(&format!("{{source: {{uri: '{uri}'}}}}"));
            assert!(matches!(error, ValidateError::Source(_)), "{uri}");
            assert!(error.to_string().contains("oci://IMAGE, pvc://CLAIM"), "{error}");
        }
        let late = error("{source: {uri: 'oci://x'}, traffic: {timeout: 900h}}");
        assert!(late.to_string().contains("spec.traffic.timeout"), "{late}");
        let slow = error("{source: {uri: 'oci://x'}, traffic: {timeout: 5s, attemptTimeout: 6s}}");
        assert!(slow.to_string().contains("spec.traffic.attemptTimeout"), "{slow}");
        let twice = error("{source: {uri: 'oci://x'}, runtime: {env: [{name: A}, {name: A}]}}");
        assert_eq!(<&str>::from(&twice), "EnvTwice");
        let window =
            error("{task: generate, source: {uri: 'oci://x'}, runtime: {batching: {strategy: time}}}");
        assert!(window.to_string().contains("time is for models that read texts"), "{window}");
        for (task, expect, says) in
            [("embed", "b".to_owned(), "task embed"), ("generate", "é".repeat(129), "258 bytes")]
        {
            let golden = error(&format!(
                "{{task: {task}, source: {{uri: 'oci://x'}}, rollout: {{analysis: {{goldenPrompts: [{{prompt: a, expect: {expect}}}]}}}}}}"
            ));
            assert!(golden.to_string().contains(says), "{golden}");
        }
        for good in ["task: embed, ", ""] {
            valid(
                "e",
                &format!("{{{good}source: {{uri: 'oci://x'}}, runtime: {{batching: {{strategy: time}}}}}}"),
            );
        }
    }

    #[test]
    fn reserved_keys_of_labels_and_annotations_are_refused() {
        for (field, key) in [
            ("labels", "serving.trustformers.dev/model"),
            ("labels", "app.kubernetes.io/component"),
            ("labels", "app.kubernetes.io/managed-by"),
            ("annotations", "serving.trustformers.dev/pool"),
            ("annotations", "app.kubernetes.io/name"),
            ("annotations", "kubectl.kubernetes.io/default-container"),
        ] {
            let error = error(&format!("{{source: {{uri: 'oci://x'}}, pod: {{{field}: {{{key}: y}}}}}}"));
            assert_eq!(error, ValidateError::ReservedKey { field, key: key.to_owned() });
            assert!(error.to_string().contains(&format!("spec.pod.{field}: the key {key}")), "{error}");
        }
        valid(
            "chat",
            "{source: {uri: 'oci://x'}, pod: {labels: {app: y, example.com/app.kubernetes.io: z}}}",
        );
    }

    #[test]
    fn a_name_too_long_for_its_children_is_refused() {
        let long = "a".repeat(46);
        assert_eq!(
            validate(&model(&long, "{source: {uri: 'oci://x'}}")).unwrap_err(),
            ValidateError::NameTooLong(46)
        );
    }
}
