//! What the operator reports about an InferenceModel.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What the operator last saw and did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceModelStatus {
    /// `metadata.generation` that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// One word for people; machines read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// Where callers reach the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,

    /// Label selector of the pods, for `/scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// Pods that exist.
    #[serde(default)]
    pub replicas: i32,

    /// Pods that serve.
    #[serde(default)]
    pub ready_replicas: i32,

    /// Where the model really runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,

    /// What the model does, as its files say: `generate` or `embed`. It stays while nothing is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,

    /// sha256 of the loaded file; of several files, sha256 of their sorted lines `<sha256>  <path>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// The revision that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<StableRevision>,

    /// How far loading has come, while a pod loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<Loading>,

    /// `Serving`, `Ready`, `Progressing`, `Degraded`, and `BareName` where another model holds this one's bare name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,
}

/// The state of an InferenceModel in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// No pod has begun to load.
    Pending,
    /// Pods load or warm up, none serves yet.
    Loading,
    /// The wanted revision serves with all its replicas.
    Ready,
    /// Some pods serve while others load or are replaced, as planned.
    Updating,
    /// Some pods serve, and something is wrong with others.
    Degraded,
    /// Nothing serves, and the conditions say why.
    Failed,
    /// No replica is wanted.
    Stopped,
}

/// A revision whose pods serve.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StableRevision {
    /// Hash of what is loaded: source and engine settings.
    pub revision: String,
    /// sha256 of what its pods loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// How far the slowest loading pod has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Loading {
    /// Bytes read so far.
    pub bytes: i64,
    /// Bytes there are, as far as known.
    pub total_bytes: i64,
    /// Seconds left at the present speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
}

/// One aspect of the state, as Kubernetes conditions are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Which aspect.
    #[serde(rename = "type")]
    #[schemars(length(max = 64))]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(length(max = 8))]
    pub status: String,
    /// Why, in one CamelCase word.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// Why, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// When `status` last changed.
    #[schemars(schema_with = "time_schema")]
    pub last_transition_time: Time,
    /// `metadata.generation` that this condition is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

fn time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}
