//! Step three of a reconcile: the objects that should exist for a model, from the validated model alone.
//!
//! Pure, so that its tests are YAML in and golden objects out. Each object carries a hash of itself in an annotation:
//! the apply step compares it with what the API server holds and sends nothing where nothing changed.

mod budget;
mod config;
mod deployment;
mod network;
mod pod;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Serialize;
use trustformers_proto::pod_config::PodConfigError;

use crate::validate::ValidatedModel;
use crate::{hash, names};

/// What the operator's own settings add to every model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Image of a pod's container where the model names none.
    pub runtime_image: String,
    /// `IfNotPresent`, `Always` or `Never`, for the container and for image volumes.
    pub pull_policy: String,
}

/// Everything that should exist for one model. The apply step takes it apart field by field, so that an object that
/// is added here and not applied there does not compile.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// Hash of what is loaded.
    pub revision: String,
    /// Account of the pods; has no rights and no token.
    pub service_account: ServiceAccount,
    /// `pod.yaml`.
    pub config_map: ConfigMap,
    /// Headless: addresses for scraping and for clients that balance on their own.
    pub service: Service,
    /// The pods.
    pub deployment: Deployment,
    /// How many of them an eviction may take.
    pub budget: PodDisruptionBudget,
}

/// Why objects could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// `pod.yaml` could not be written.
    #[error("the pod's configuration: {0}")]
    PodConfig(#[from] PodConfigError),
    /// An object could not be written as JSON.
    #[error("an object of this model: {0}")]
    Json(#[from] serde_json::Error),
}

impl BuildError {
    /// The variant's name, as metrics label it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::PodConfig(_) => "PodConfig",
            Self::Json(_) => "Json",
        }
    }
}

/// The objects that should exist for `model`.
///
/// # Errors
/// Only if an object cannot be serialised, which no value that passed validation causes.
pub fn build(model: &ValidatedModel, platform: &Platform) -> Result<Desired, BuildError> {
    let revision = hash::revision(model);
    let config_map = config::config_map(model, &revision)?;
    let config_name = config_map.metadata.name.clone().unwrap_or_default();
    Ok(Desired {
        service_account: sealed(network::service_account(model))?,
        service: sealed(network::headless_service(model))?,
        deployment: sealed(deployment::deployment(model, platform, &revision, &config_name))?,
        budget: sealed(budget::budget(model))?,
        config_map: sealed(config_map)?,
        revision,
    })
}

/// Metadata of a child: found by its labels, deleted with its owner.
fn meta(model: &ValidatedModel, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(model.namespace.clone()),
        labels: Some(names::model_labels(&model.name)),
        owner_references: Some(vec![model.owner.clone()]),
        ..ObjectMeta::default()
    }
}

/// Adds the annotation with the object's own hash.
fn sealed<K: Resource + Serialize>(mut object: K) -> Result<K, serde_json::Error> {
    let seal = hash::short(&serde_json::to_string(&object)?);
    object.meta_mut().annotations.get_or_insert_default().insert(names::APPLIED_ANNOTATION.to_owned(), seal);
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate::tests::valid;

    fn platform() -> Platform {
        Platform {
            runtime_image: "localhost/trustformers-runtime:v0.1.0".to_owned(),
            pull_policy: "IfNotPresent".to_owned(),
        }
    }

    /// All objects as one YAML text, in the order in which they are applied.
    fn yaml(spec: &str) -> String {
        let desired = build(&valid("chat", spec), &platform()).unwrap();
        let Desired { revision: _, service_account, config_map, service, deployment, budget } = desired;
        [
            serde_yaml::to_string(&service_account),
            serde_yaml::to_string(&config_map),
            serde_yaml::to_string(&service),
            serde_yaml::to_string(&deployment),
            serde_yaml::to_string(&budget),
        ]
        .map(Result::unwrap)
        .join("---\n")
    }

    #[test]
    fn a_model_from_an_image() {
        insta::assert_snapshot!(yaml("{source: {uri: 'oci://localhost/smollm2-135m-instruct:q4_1'}}"));
    }

    #[test]
    fn a_model_from_a_claim_with_every_setting() {
        insta::assert_snapshot!(yaml(
            "{task: embed, source: {uri: 'pvc://weights/smol/v2', files: ['*.gguf'], sha256: ab}, \
             runtime: {device: cpu, numerics: exact, contextTokens: 64, \
             batching: {strategy: size, maxBatchSize: 2, maxWaitMs: 7, maxQueue: 3, priority: true}, image: 'my/runtime:1', \
             env: [{name: RUST_LOG, value: debug}], resources: {requests: {cpu: 1, memory: 1Gi}, limits: {nvidia.com/gpu: 1}}}, \
             scaling: {replicas: 3}, traffic: {drainTimeout: 90s}, disruption: {maxUnavailable: 2}, \
             pod: {nodeSelector: {zone: a}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}], \
             topologySpread: [{topologyKey: kubernetes.io/hostname}], priorityClassName: high, runtimeClassName: nvidia, \
             serviceAccountName: puller, labels: {team: a}, annotations: {note: b}}}"
        ));
    }

    #[test]
    fn only_a_change_of_what_the_pod_reads_renames_its_configuration() {
        let name = |spec: &str| build(&valid("chat", spec), &platform()).unwrap().config_map.metadata.name;
        let base = name("{source: {uri: 'oci://x'}}");
        assert_eq!(name("{source: {uri: 'oci://x'}, scaling: {replicas: 2}}"), base);
        assert_ne!(name("{source: {uri: 'oci://x'}, runtime: {numerics: exact}}"), base);
        assert_ne!(name("{source: {uri: 'oci://x'}, traffic: {drainTimeout: 1s}}"), base);
    }

    #[test]
    fn names_made_from_the_longest_name_fit_a_service() {
        let long = "a".repeat(45);
        let desired = build(&valid(&long, "{source: {uri: 'oci://x'}}"), &platform()).unwrap();
        for name in [desired.config_map.metadata.name, desired.service_account.metadata.name] {
            assert!(name.unwrap().len() <= 63);
        }
    }
}
