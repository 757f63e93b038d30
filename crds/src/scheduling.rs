//! Where pods may run, and their labels and annotations: settings that the operator passes to the pods.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Settings that the operator passes to the pods.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSettings {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), with = "BTreeMap<String, LabelValue>")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub tolerations: Vec<Toleration>,

    /// Rules about nodes and other pods, as in a pod. What Kubernetes does not know is named by the model's
    /// conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "affinity_schema")]
    pub affinity: Option<Value>,

    /// How the pods of this model are spread over the cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 8),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["topologyKey"])
    )]
    pub topology_spread: Vec<TopologySpread>,

    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// RuntimeClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,

    /// ServiceAccount of the pods, for its image pull secrets. Default: one that the operator creates for
    /// this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account_name: Option<String>,

    /// Further labels of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "x-kubernetes-validations" = [{
            "rule": "self.all(key, !key.startsWith('app.kubernetes.io/') && !key.startsWith('serving.trustformers.dev/'))",
            "message": "spec.pod.labels: keys that start with app.kubernetes.io/ or serving.trustformers.dev/ are reserved, because Services select pods by them; choose another key"
        }]
    ), with = "BTreeMap<String, LabelValue>")]
    pub labels: BTreeMap<String, String>,

    /// Further annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "x-kubernetes-validations" = [{
            "rule": "self.all(key, !key.startsWith('app.kubernetes.io/') && !key.startsWith('serving.trustformers.dev/') && key != 'kubectl.kubernetes.io/default-container')",
            "message": "spec.pod.annotations: keys that start with app.kubernetes.io/ or serving.trustformers.dev/, and kubectl.kubernetes.io/default-container, are reserved, because Services select pods by them; choose another key"
        }]
    ), with = "BTreeMap<String, AnnotationValue>")]
    pub annotations: BTreeMap<String, String>,
}

/// The three parts of a pod's affinity; what is below them is read by the operator.
fn affinity_schema(_: &mut SchemaGenerator) -> Schema {
    let part = |description: &str| {
        json_schema!({
            "type": "object",
            "nullable": true,
            "description": description,
            "x-kubernetes-preserve-unknown-fields": true,
        })
    };
    json_schema!({
        "type": "object",
        "nullable": true,
        "properties": {
            "nodeAffinity": part("Nodes that the pods must or should run on."),
            "podAffinity": part("Pods that they must or should run beside."),
            "podAntiAffinity": part("Pods that they must not or should not run beside."),
        },
    })
}

/// A label's value.
#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "carries the schema of the map's values alone")]
pub(crate) struct LabelValue(
    #[schemars(length(max = 63), regex(pattern = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"))] String,
);

/// An annotation's value.
#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "carries the schema of the map's values alone")]
struct AnnotationValue(#[schemars(length(max = 4096))] String);

/// A taint that the pods tolerate, as in a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Toleration {
    /// The taint's key. Without a key, operator `Exists` tolerates every taint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 316))]
    pub key: Option<String>,
    /// How the value is compared.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// The taint's value, for operator `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// The taint's effect. Default: every effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TolerationEffect>,
    /// With effect `NoExecute`: seconds that the pod stays after the taint was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toleration_seconds: Option<i64>,
}

/// How a toleration compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// Key and value are those of the taint.
    #[default]
    Equal,
    /// The key is that of the taint.
    Exists,
}

/// What a taint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationEffect {
    /// New pods are not scheduled.
    NoSchedule,
    /// New pods are scheduled elsewhere if possible.
    PreferNoSchedule,
    /// Running pods are evicted too.
    NoExecute,
}

/// One rule for spreading pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopologySpread {
    /// Node label whose values are the domains, such as `kubernetes.io/hostname`.
    #[schemars(length(min = 1, max = 316))]
    pub topology_key: String,
    /// Largest difference between the numbers of pods in two domains.
    #[serde(default = "default_max_skew")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_skew: i32,
    /// Whether a pod that violates the rule stays unscheduled. Otherwise the rule is a preference.
    #[serde(default)]
    pub required: bool,
}

fn default_max_skew() -> i32 {
    1
}
