//! Names, labels and ports that the parts of the control plane share.
//!
//! Children are watched by label. They belong to a model by the UID in their owner reference.

use std::collections::BTreeMap;

pub use trustformers_crds::names::{
    ABORT_ANNOTATION, CONTAINER, LEADER_LABEL, MODEL_LABEL, PROMOTE_ANNOTATION, REVISION_LABEL,
    ROUTABLE_GATE, UNDO_ANNOTATION,
};

/// Field manager of all writes of the operator, and value of the managed-by label.
pub const MANAGER: &str = "trustformers-operator";
/// Label of all objects that the operator makes.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Annotation with the hash of the object as it was last applied.
pub const APPLIED_ANNOTATION: &str = "serving.trustformers.dev/applied";
/// Annotation of a pod template with the hash of the settings that make the pod.
pub const POOL_ANNOTATION: &str = "serving.trustformers.dev/pool";
/// Annotation of a pod with its capacity relative to the other pods of its model: a number from 1 to 1000.
pub const WEIGHT_ANNOTATION: &str = "serving.trustformers.dev/weight";
/// The pod's port for HTTP.
pub const HTTP_PORT: u16 = 8080;
/// The pod's port for gRPC.
pub const GRPC_PORT: u16 = 9090;
/// The pod's port for the operator alone: there models are loaded, swapped and unloaded.
pub const ADMIN_PORT: u16 = 9092;
/// Beginning of the audiences of the tokens that the operator presents there.
const ADMIN_AUDIENCE: &str = "trustformers-pods";

/// Selects the pods of gateways, in the operator's namespace.
pub const GATEWAY_SELECTOR: &str = trustformers_crds::names::GATEWAY_SELECTOR;

/// Selects all objects that the operator makes.
pub const MANAGED_SELECTOR: &str = trustformers_crds::names::MANAGED_SELECTOR;

/// Prefix of the labels and annotations that belong to the operator.
pub const OWN_PREFIX: &str = "serving.trustformers.dev/";
/// Prefix of the labels by which Services and budgets of the release select its own pods.
pub const APP_PREFIX: &str = "app.kubernetes.io/";
/// Annotation of a pod template with the container that `kubectl logs` shows.
pub const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// Labels of the objects of `model` that do not depend on its revision.
#[must_use]
pub fn model_labels(model: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(MANAGED_BY.to_owned(), MANAGER.to_owned()), (MODEL_LABEL.to_owned(), model.to_owned())])
}

/// Labels of the objects of one revision of `model`.
#[must_use]
pub fn revision_labels(model: &str, revision: &str) -> BTreeMap<String, String> {
    let mut labels = model_labels(model);
    labels.insert(REVISION_LABEL.to_owned(), revision.to_owned());
    labels
}

/// Name of the Deployment whose pods load one revision of `model`.
#[must_use]
pub fn deployment(model: &str, revision: &str) -> String {
    format!("{model}-{revision}")
}

/// Selector of the pods of one revision of `model`, as text.
#[must_use]
pub fn revision_selector(model: &str, revision: &str) -> String {
    format!("{MODEL_LABEL}={model},{REVISION_LABEL}={revision}")
}

/// Name of the ConfigMap with the configuration of the pods of one pool.
#[must_use]
pub fn config_map(model: &str, pool: &str) -> String {
    format!("{model}-pod-{pool}")
}

/// Name of the ConfigMap with the sums of an A/B test. No name of a model's children has a dot.
#[must_use]
pub fn ab_test_samples(test: &str) -> String {
    trustformers_crds::names::ab_test_samples(test)
}

/// Audience of the operator's tokens for the pods of a namespace. Whoever may start a pod with a model's
/// labels is sent such a token: it is worth nothing in another namespace.
#[must_use]
pub fn admin_audience(namespace: &str) -> String {
    format!("{ADMIN_AUDIENCE}.{namespace}")
}

/// Name of the ServiceAccount of the model's pods.
#[must_use]
pub fn service_account(model: &str) -> String {
    format!("{model}-pod")
}
