//! Names, labels and ports that the parts of the control plane share.
//!
//! Children are watched by label. They belong to a model by the UID in their owner reference.

use std::collections::BTreeMap;

/// Field manager of all writes of the operator, and value of the managed-by label.
pub const MANAGER: &str = "trustformers-operator";
/// Label of all objects that the operator makes.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label with the name of the model that an object belongs to.
pub const MODEL_LABEL: &str = "serving.trustformers.dev/model";
/// Label with the revision that a pool was made for: of its pods and their configuration. The pods of a pool
/// may hold other revisions by now.
pub const REVISION_LABEL: &str = "serving.trustformers.dev/revision";
/// Label of the operator's pod that leads; the feed's Service selects it.
pub const LEADER_LABEL: &str = "serving.trustformers.dev/leader";
/// Annotation with the hash of the object as it was last applied.
pub const APPLIED_ANNOTATION: &str = "serving.trustformers.dev/applied";
/// Annotation of a pod template with the hash of the settings that make the pod.
pub const POOL_ANNOTATION: &str = "serving.trustformers.dev/pool";
/// Annotation of a pod with its capacity relative to the other pods of its model: a number from 1 to 1000.
pub const WEIGHT_ANNOTATION: &str = "serving.trustformers.dev/weight";
/// Annotation of a model that aborts the rollout of the revision in its value: `REVISION` or
/// `REVISION/NONCE`.
pub const ABORT_ANNOTATION: &str = "serving.trustformers.dev/abort";
/// Annotation that returns to the revision before the one in its value.
pub const UNDO_ANNOTATION: &str = "serving.trustformers.dev/undo";
/// Annotation that skips the remaining steps of the rollout of the revision in its value.
pub const PROMOTE_ANNOTATION: &str = "serving.trustformers.dev/promote";
/// Readiness gate of every model pod: true when every gateway has the pod in its table.
pub const ROUTABLE_GATE: &str = "serving.trustformers.dev/routable";
/// Name of the container in a model's pod.
pub const CONTAINER: &str = "runtime";
/// The pod's port for HTTP.
pub const HTTP_PORT: u16 = 8080;
/// The pod's port for gRPC.
pub const GRPC_PORT: u16 = 9090;
/// The pod's port for the operator alone: there models are loaded, swapped and unloaded.
pub const ADMIN_PORT: u16 = 9092;
/// Audience of the tokens that the operator presents there.
pub const ADMIN_AUDIENCE: &str = "trustformers-pods";

/// Selects the pods of gateways, in the operator's namespace.
pub const GATEWAY_SELECTOR: &str = "app.kubernetes.io/name=trustformers,app.kubernetes.io/component=gateway";

/// Selects all objects that the operator makes.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=trustformers-operator";

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
    format!("{test}.abtest-samples")
}

/// Name of the ServiceAccount of the model's pods.
#[must_use]
pub fn service_account(model: &str) -> String {
    format!("{model}-pod")
}
