//! Names, labels and ports that the parts of the control plane agree on.
//!
//! Everything made for a model is found again by its labels and its owner reference, never by guessing names.

use std::collections::BTreeMap;

/// Field manager of everything that the operator applies, and value of the managed-by label.
pub const MANAGER: &str = "trustformers-operator";
/// Label that marks everything the operator made.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label with the name of the model that an object was made for.
pub const MODEL_LABEL: &str = "serving.trustformers.dev/model";
/// Label with the revision that a pod, or a pod's configuration, stands for.
pub const REVISION_LABEL: &str = "serving.trustformers.dev/revision";
/// Label of the operator's pod that leads; the feed's Service selects it.
pub const LEADER_LABEL: &str = "serving.trustformers.dev/leader";
/// Annotation with the hash of the object as it was last applied.
pub const APPLIED_ANNOTATION: &str = "serving.trustformers.dev/applied";
/// Annotation of a pod template with the hash of the settings that make the pod.
pub const POOL_ANNOTATION: &str = "serving.trustformers.dev/pool";
/// Readiness gate of every model pod: true once every gateway has the pod in its table.
pub const ROUTABLE_GATE: &str = "serving.trustformers.dev/routable";
/// Name of the container in a model's pod.
pub const CONTAINER: &str = "runtime";
/// Port of the pod for HTTP.
pub const HTTP_PORT: u16 = 8080;
/// Port of the pod for gRPC.
pub const GRPC_PORT: u16 = 9090;

/// Selects everything that the operator made.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=trustformers-operator";

/// Labels of what is made for `model`, whatever its revision.
#[must_use]
pub fn model_labels(model: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(MANAGED_BY.to_owned(), MANAGER.to_owned()), (MODEL_LABEL.to_owned(), model.to_owned())])
}

/// Labels of what is made for one revision of `model`.
#[must_use]
pub fn revision_labels(model: &str, revision: &str) -> BTreeMap<String, String> {
    let mut labels = model_labels(model);
    labels.insert(REVISION_LABEL.to_owned(), revision.to_owned());
    labels
}

/// Selector of the pods of `model`, as text.
#[must_use]
pub fn pod_selector(model: &str) -> String {
    format!("{MODEL_LABEL}={model}")
}

/// Name of the ConfigMap that tells the pods of one revision what to load. The hash covers the whole file, so that
/// a ConfigMap's content never changes under a pod that has mounted it.
#[must_use]
pub fn config_map(model: &str, content_hash: &str) -> String {
    format!("{model}-pod-{content_hash}")
}

/// Name of the ServiceAccount of the model's pods.
#[must_use]
pub fn service_account(model: &str) -> String {
    format!("{model}-pod")
}
