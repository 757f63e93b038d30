//! What the operator reports about an InferenceModel.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::{CandidateRevision, RolloutDecision, RolloutStatus};

/// The state of the model as the operator observed it last.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceModelStatus {
    /// `metadata.generation` that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Summary in one word. Programs should read the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// Where callers reach the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,

    /// Label selector of the pods, for `/scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// Number of pods of the stable revision. Pods of a revision that is rolled out do not count.
    #[serde(default)]
    pub replicas: i32,

    /// Number of serving pods.
    #[serde(default)]
    pub ready_replicas: i32,

    /// The device that the model runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,

    /// The model's task according to its files, a word of `spec.task`. It stays while no pod runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,

    /// sha256 of the loaded file; of several files, sha256 of their sorted lines `<sha256>  <path>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// The revision that serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<StableRevision>,

    /// The revision that is rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<CandidateRevision>,

    /// The revision before the stable one, while its pods are ready for an undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<StableRevision>,

    /// The state of the rollout, or of the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,

    /// The last decisions about rollouts, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    pub history: Vec<RolloutDecision>,

    /// Progress of the load, while a pod loads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<Loading>,

    /// `Serving`, `Ready`, `Progressing`, `Degraded`, `RolloutHealthy` if there was a rollout, `Autoscaled`
    /// if `spec.scaling.metrics` are given, `Integrated` if the cluster lacks the definition of an object
    /// that the spec asks for, `Exposed` if `spec.route` names Gateways, and `BareName` if another model owns
    /// this one's bare name.
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
    /// No pod has started to load.
    Pending,
    /// Pods load or warm up; none serves yet.
    Loading,
    /// The desired revision serves with all its replicas.
    Ready,
    /// Some pods serve while others load or are replaced.
    Updating,
    /// Some pods serve, and others have a problem.
    Degraded,
    /// No pod serves; the conditions show the cause.
    Failed,
    /// `spec.scaling.replicas` is 0.
    Stopped,
}

/// A revision whose pods serve.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StableRevision {
    /// Hash of what is loaded: source and engine settings.
    pub revision: String,
    /// The revision whose pods hold it, where they are not its own: they loaded it in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// sha256 of what its pods loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Progress of the slowest loading pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Loading {
    /// Bytes read so far.
    pub bytes: i64,
    /// Bytes in total, if known.
    pub total_bytes: i64,
    /// Estimated seconds that remain, as of the last progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
}

/// One condition, as in other Kubernetes resources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Type of the condition.
    #[serde(rename = "type")]
    #[schemars(length(max = 64))]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(length(max = 8))]
    pub status: String,
    /// Cause in one CamelCase word.
    #[schemars(length(max = 128))]
    pub reason: String,
    /// Cause in a sentence.
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
