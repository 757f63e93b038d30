//! Step two of a reconcile: parse the spec into what the builders need.
//!
//! The API server has refused most mistakes by the schema. This step finds what a schema cannot express, and
//! objects that were stored before a rule existed. Nothing after this step reads the raw spec.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use trustformers_crds::{
    BatchStrategy, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, PodSettings, Runtime, Source,
};
use trustformers_proto::Task;

use crate::duration::{self, DurationError};
use crate::names;

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
    /// Number of pods.
    pub replicas: i32,
    /// From a request's arrival to the first byte of its response.
    pub first_byte_timeout: Duration,
    /// Further attempts while no byte of the response has arrived.
    pub retries: u32,
    /// How long requests may take to finish when a pod ends.
    pub drain_timeout: Duration,
    /// Serving pods that evictions may remove at the same time.
    pub max_unavailable: i32,
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
    /// The URI's scheme, or what follows it, is not supported.
    #[error("spec.source.uri: {0:?} is not supported; use oci://IMAGE or pvc://CLAIM[/PATH]")]
    Source(String),
    /// A duration cannot be read.
    #[error("spec.traffic.{field}: {cause}")]
    Duration {
        /// Field below `spec.traffic`.
        field: &'static str,
        /// What is wrong with it.
        cause: DurationError,
    },
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
        "spec.runtime.batching.strategy: {0} is for models that embed; generation is batched continuously, so use \
         dynamic or priority with task generate"
    )]
    Strategy(&'static str),
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
    let time =
        |field, text: &str| duration::parse(text).map_err(|cause| ValidateError::Duration { field, cause });
    Ok(ValidatedModel {
        name,
        namespace,
        generation: meta.generation.unwrap_or(0),
        owner,
        task: spec.task,
        mount: mount(&spec.source.uri)?,
        source: spec.source.clone(),
        runtime: spec.runtime.clone(),
        replicas: spec.scaling.replicas,
        first_byte_timeout: time("timeout", &spec.traffic.timeout)?,
        retries: spec.traffic.retries,
        drain_timeout: time("drainTimeout", &spec.traffic.drain_timeout)?,
        max_unavailable: spec.disruption.max_unavailable,
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

fn mount(uri: &str) -> Result<Mount, ValidateError> {
    let refused = || ValidateError::Source(uri.to_owned());
    if let Some(reference) = uri.strip_prefix("oci://") {
        let fits = !reference.is_empty() && !reference.contains(char::is_whitespace);
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
    fn errors_name_the_field_and_the_next_step() {
        for uri in ["hf://a/b", "oci://", "pvc://", "pvc://c/../d", "pvc://c//d"] {
            let error = error(&format!("{{source: {{uri: '{uri}'}}}}"));
            assert!(matches!(error, ValidateError::Source(_)), "{uri}");
            assert!(error.to_string().contains("oci://IMAGE or pvc://CLAIM"), "{error}");
        }
        let late = error("{source: {uri: 'oci://x'}, traffic: {timeout: 900h}}");
        assert!(late.to_string().contains("spec.traffic.timeout"), "{late}");
        let twice = error("{source: {uri: 'oci://x'}, runtime: {env: [{name: A}, {name: A}]}}");
        assert_eq!(<&str>::from(&twice), "EnvTwice");
        let window =
            error("{task: generate, source: {uri: 'oci://x'}, runtime: {batching: {strategy: time}}}");
        assert!(window.to_string().contains("time is for models that embed"), "{window}");
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
