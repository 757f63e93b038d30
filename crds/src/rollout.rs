//! How a model moves to another revision: the settings, and what the status stores of a rollout.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// How the model moves to another revision: to another source or other settings of the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Where a new revision is loaded. `InPlace`: by the pods that serve, beside what they serve; no pod
    /// restarts. `Surge`: by new pods beside those. `DrainFirst`: a pod that serves ends before a new one
    /// starts, as far as `spec.disruption.maxUnavailable` allows. `Auto`: `InPlace` where the running pods
    /// can load it, else `Surge`, and `DrainFirst` if no node takes a new pod for a minute.
    #[serde(default)]
    pub placement: RolloutPlacement,

    /// The share of the requests that a new revision gets, step by step. Empty: all at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 10),
        extend(
            "x-kubernetes-list-type" = "atomic",
            "x-kubernetes-validations" = [{
                "rule": "self.map(step, step.weight).isSorted()",
                "message": "spec.rollout.steps: a weight must not be smaller than the one before"
            }]
        )
    )]
    pub steps: Vec<RolloutStep>,

    /// Limits that a new revision must stay within while it gets requests, and answers that it must give
    /// before. Absent: a step passes when it has lasted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<Analysis>,

    /// How long the pods of the previous revision stay ready after the last step, for an undo.
    #[serde(default = "default_bake")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub bake: String,

    /// What happens when a new revision fails. `Rollback`: the stable revision gets all requests again.
    /// `Hold`: the rollout stays where it is until somebody decides.
    #[serde(default)]
    pub on_failure: RolloutFailure,

    /// Decisions that `status.history` keeps.
    #[serde(default = "default_history_limit")]
    #[schemars(range(min = 1, max = 10), extend("format" = "int64"))]
    pub history_limit: u32,
}

fn default_bake() -> String {
    "0s".to_owned()
}

fn default_history_limit() -> u32 {
    5
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            placement: RolloutPlacement::default(),
            steps: Vec::new(),
            analysis: None,
            bake: default_bake(),
            on_failure: RolloutFailure::default(),
            history_limit: default_history_limit(),
        }
    }
}

/// Where a new revision is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum RolloutPlacement {
    /// What fits.
    #[default]
    Auto,
    /// A pod that serves ends before a new one starts.
    DrainFirst,
    /// By new pods beside those that serve.
    Surge,
    /// By the pods that serve.
    InPlace,
}

/// What happens when a new revision fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum RolloutFailure {
    /// The stable revision gets all requests again.
    #[default]
    Rollback,
    /// The rollout waits for a person.
    Hold,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStep {
    /// Percent of the requests that the new revision gets.
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub weight: u32,
    /// How long the step lasts at least, such as `2m`.
    #[serde(default = "default_bake")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub hold: String,
}

/// Limits that a new revision must stay within, by what gateways count of its requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    /// Largest share of its requests that the new revision may fail, 0 to 1. Requests that their callers got
    /// wrong or gave up, and those for which a pod had no room, do not count.
    #[serde(default = "default_max_error_rate")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_error_rate: f64,

    /// Largest ratio of the new revision's 95th percentile of latency to that of the stable revision. It
    /// needs some 150 requests of the stable revision. Absent: latency is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 100.0))]
    pub max_latency_ratio: Option<f64>,

    /// Requests of the new revision that each step needs before it passes. With fewer the step lasts on.
    #[serde(default = "default_min_requests")]
    #[schemars(range(min = 0, max = 1_000_000), extend("format" = "int64"))]
    pub min_requests: u32,

    /// Prompts with the beginning of the greedy answer that a pod must give before it serves. They belong to
    /// the revision: another prompt is another revision.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub golden_prompts: Vec<GoldenPrompt>,
}

// Neither JSON nor the schema's bounds have a number that differs from itself.
impl Eq for Analysis {}

fn default_max_error_rate() -> f64 {
    0.01
}

fn default_min_requests() -> u32 {
    200
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            max_error_rate: default_max_error_rate(),
            max_latency_ratio: None,
            min_requests: default_min_requests(),
            golden_prompts: Vec::new(),
        }
    }
}

/// A prompt whose greedy answer is fixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GoldenPrompt {
    /// The prompt, given to the model as it is, without a chat template.
    #[schemars(length(min = 1, max = 4096))]
    pub prompt: String,
    /// The text with which the greedy answer begins, at most 256 bytes.
    #[schemars(length(min = 1, max = 256))]
    pub expect: String,
}

/// The revision that is rolled out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CandidateRevision {
    /// Hash of what is loaded.
    pub revision: String,
    /// The revision whose pods hold it, where they are not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// sha256 of what its pods loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Percent of the requests that it gets, as far as its pods can take them.
    pub weight: u32,
    /// The step, from 0; the number of steps when it gets all requests.
    pub step: u32,
    /// Since when the rollout is in this phase or step.
    #[schemars(schema_with = "time_schema")]
    pub since: Time,
}

/// The state of a rollout. The operator goes on from what is stored here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// `Pending`, `Placing`, `Loading`, `Warming`, `Admitted`, `Shifting`, `Verifying`, `Promoted`, `Done`,
    /// `RollingBack` or `RolledBack`.
    pub phase: String,
    /// Why, in one CamelCase word.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Why, in a sentence, with the figures.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Where the new revision is loaded: `InPlace`, `Surge` or `DrainFirst`.
    pub placement: String,
    /// Since when.
    #[schemars(schema_with = "time_schema")]
    pub since: Time,
    /// Replicas of the model when the step started.
    pub base: u32,
    /// Restarts of the pods that were asked to load the new revision, before they were asked, by pod. Pods
    /// without any are left out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 2000))]
    pub restarts_by_pod: BTreeMap<String, u32>,
    /// Rollouts that have started so far.
    pub attempt: u32,
    /// Whether the step had all its pods.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reached: bool,
    /// Whether somebody asked to skip the remaining steps.
    #[serde(default, skip_serializing_if = "is_false")]
    pub forced: bool,
    /// Whether it waits for a person.
    #[serde(default, skip_serializing_if = "is_false")]
    pub held: bool,
    /// The revision of the spec that was rolled back. It is not tried again by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// What was counted of the requests, while limits are compared with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<RolloutSample>,
    /// Revisions whose pods end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 32),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["revision"])
    )]
    pub retiring: Vec<RetiringRevision>,
    /// The commands that were followed or refused last.
    #[serde(default, skip_serializing_if = "ConsumedCommands::is_empty")]
    pub consumed: ConsumedCommands,
}

/// What gateways have counted of a rollout's requests, so that another operator goes on from there.
///
/// Counts are text: requests, errors, and the buckets of latency that are not empty, each with its distance
/// to the one before and its count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutSample {
    /// The revision that is compared.
    pub candidate: String,
    /// The revision that it is compared with.
    pub stable: String,
    /// The step that the candidate's counts are about.
    pub step: u32,
    /// The attempt that the stable revision's counts are about.
    pub attempt: u32,
    /// Counts of the candidate since the step started.
    pub candidate_counts: String,
    /// Counts of the stable revision since the attempt started.
    pub stable_counts: String,
    /// What each gateway process had counted when this was written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["process"])
    )]
    pub processes: Vec<CountedProcess>,
}

/// The sums of one gateway process since it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedProcess {
    /// Id of the process.
    pub process: String,
    /// Counts of the candidate.
    pub candidate: String,
    /// Counts of the stable revision.
    pub stable: String,
}

/// A revision whose pods end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetiringRevision {
    /// The revision.
    pub revision: String,
    /// The revision whose pods hold it, where they are not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Whether it failed.
    #[serde(default, skip_serializing_if = "is_false")]
    pub failed: bool,
}

/// The annotations of commands as they were consumed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsumedCommands {
    /// `serving.trustformers.dev/abort`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<String>,
    /// `serving.trustformers.dev/undo`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// `serving.trustformers.dev/promote`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<String>,
}

impl ConsumedCommands {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A decision about a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutDecision {
    /// When it was made.
    #[schemars(schema_with = "time_schema")]
    pub time: Time,
    /// The revision that it is about.
    pub revision: String,
    /// `Passed`, `Promoted`, `RolledBack`, `Forced`, `Held` or `Replaced`.
    pub decision: String,
    /// Why, in one CamelCase word.
    pub reason: String,
    /// The figures, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

fn time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}
