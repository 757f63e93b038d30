//! Step two of a reconcile: parse the spec, once, into what the builders need.
//!
//! The schema has refused most mistakes at the API server; this is for what a schema cannot say, and for objects
//! that were stored before a rule existed. Nothing after this step reads the raw spec.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use trustformers_crds::{
    BatchStrategy, InferenceModel, InferenceModelSpec, MAX_NAME_CHARS, PodSettings, Runtime, Source, Task,
};

use crate::span::{self, SpanError};

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
    /// Makes a child belong to the model.
    pub owner: OwnerReference,
    /// What it must be for; none where its files decide.
    pub task: Option<Task>,
    /// Where the files are.
    pub mount: Mount,
    /// The source as written: the URI, the globs, the pin.
    pub source: Source,
    /// Engine settings and container.
    pub runtime: Runtime,
    /// Pods that should serve.
    pub replicas: i32,
    /// From a request's arrival to the first byte of its answer.
    pub first_byte_timeout: Duration,
    /// More attempts while no byte of the answer has come.
    pub retries: u32,
    /// How long the requests of a pod that ends may take.
    pub drain_timeout: Duration,
    /// Pods that an eviction may take at once.
    pub max_unavailable: i32,
    /// Settings passed through to the pods.
    pub pod: PodSettings,
}

/// Why a spec cannot be honoured. Each names the field and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValidateError {
    /// The object came without a name, namespace or UID, as no stored object does.
    #[error("metadata.{0} is missing")]
    Incomplete(&'static str),
    /// The name is too long for the objects made from it.
    #[error(
        "metadata.name has {0} characters; at most {MAX_NAME_CHARS} leave room for the names made from it"
    )]
    NameTooLong(usize),
    /// The URI's scheme, or what follows it, is not supported.
    #[error("spec.source.uri: {0:?} is not supported; use oci://IMAGE or pvc://CLAIM[/PATH]")]
    Source(String),
    /// A length of time cannot be read.
    #[error("spec.traffic.{field}: {cause}")]
    Span {
        /// Field below `spec.traffic`.
        field: &'static str,
        /// What is wrong with it.
        cause: SpanError,
    },
    /// A label would replace one that the operator needs.
    #[error("spec.pod.labels: {0} belongs to the operator; choose another key")]
    ReservedLabel(String),
    /// The environment names one variable twice.
    #[error("spec.runtime.env: {0} is there twice")]
    EnvTwice(String),
    /// A strategy that generation cannot follow.
    #[error(
        "spec.runtime.batching.strategy: {0} is for models that embed; with task generate, which is batched \
         continuously, write dynamic or priority"
    )]
    Strategy(&'static str),
}

impl ValidateError {
    /// The variant's name, as metrics label it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Incomplete(_) => "Incomplete",
            Self::NameTooLong(_) => "NameTooLong",
            Self::Source(_) => "Source",
            Self::Span { .. } => "Span",
            Self::ReservedLabel(_) => "ReservedLabel",
            Self::EnvTwice(_) => "EnvTwice",
            Self::Strategy(_) => "Strategy",
        }
    }
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
    if let Some(reserved) = spec.pod.labels.keys().find(|key| is_reserved(key)) {
        return Err(ValidateError::ReservedLabel(reserved.clone()));
    }
    let mut seen = BTreeMap::new();
    if let Some(twice) = spec.runtime.env.iter().find(|one| seen.insert(one.name.as_str(), ()).is_some()) {
        return Err(ValidateError::EnvTwice(twice.name.clone()));
    }
    check_strategy(spec)?;
    let time = |field, text: &str| span::parse(text).map_err(|cause| ValidateError::Span { field, cause });
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

/// Without a task the pod knows, once it has read the files; it says so in its log.
fn check_strategy(spec: &InferenceModelSpec) -> Result<(), ValidateError> {
    let strategy = spec.runtime.batching.strategy;
    match (spec.task, strategy) {
        (Some(Task::Generate), BatchStrategy::Time | BatchStrategy::Size) => {
            Err(ValidateError::Strategy(strategy.as_str()))
        }
        _ => Ok(()),
    }
}

fn is_reserved(key: &str) -> bool {
    key.starts_with("serving.trustformers.dev/") || key == crate::names::MANAGED_BY
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

    /// A stored model as the API server would hand it out, from the YAML of its spec.
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
    fn what_cannot_be_honoured_is_named_with_the_way_out() {
        for uri in ["hf://a/b", "oci://", "pvc://", "pvc://c/../d", "pvc://c//d"] {
            let error = error(&format!("{{source: {{uri: '{uri}'}}}}"));
            assert!(matches!(error, ValidateError::Source(_)), "{uri}");
            assert!(error.to_string().contains("oci://IMAGE or pvc://CLAIM"), "{error}");
        }
        let late = error("{source: {uri: 'oci://x'}, traffic: {timeout: 900h}}");
        assert!(late.to_string().contains("spec.traffic.timeout"), "{late}");
        let label = error("{source: {uri: 'oci://x'}, pod: {labels: {serving.trustformers.dev/model: y}}}");
        assert!(label.to_string().contains("serving.trustformers.dev/model"), "{label}");
        let twice = error("{source: {uri: 'oci://x'}, runtime: {env: [{name: A}, {name: A}]}}");
        assert_eq!(twice.label(), "EnvTwice");
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
    fn a_name_too_long_for_its_children_is_refused() {
        let long = "a".repeat(46);
        assert_eq!(
            validate(&model(&long, "{source: {uri: 'oci://x'}}")).unwrap_err(),
            ValidateError::NameTooLong(46)
        );
    }
}
