//! Names, labels and annotations by which users, the operator and `kubectl trustformers` find each other's
//! objects.

/// Label with the name of the model that an object belongs to.
pub const MODEL_LABEL: &str = "serving.trustformers.dev/model";
/// Label with the revision that a pool was made for: of its pods and their configuration. The pods of a pool
/// may hold other revisions by now.
pub const REVISION_LABEL: &str = "serving.trustformers.dev/revision";
/// Label of the operator's pod that leads; the feed's Service selects it.
pub const LEADER_LABEL: &str = "serving.trustformers.dev/leader";
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
/// Selects the pods of operators, in their namespace.
pub const OPERATOR_SELECTOR: &str =
    "app.kubernetes.io/name=trustformers,app.kubernetes.io/component=operator";
/// Selects the pods of gateways, in the operator's namespace.
pub const GATEWAY_SELECTOR: &str = "app.kubernetes.io/name=trustformers,app.kubernetes.io/component=gateway";
/// Selects all objects that the operator makes.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=trustformers-operator";
/// Name of the Lease of the operator that leads, in its namespace.
pub const OPERATOR_LEASE: &str = "trustformers-operator";

/// Name of the ConfigMap with the sums of an A/B test. No name of a model's children has a dot.
#[must_use]
pub fn ab_test_samples(test: &str) -> String {
    format!("{test}.abtest-samples")
}
