//! The status of an `ABTest`: where it is, what was counted, and what that says.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::Metric;
use crate::Condition;

/// The state of the test as the operator stored it last. The operator goes on from it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ABTestStatus {
    /// `metadata.generation` that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the test is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<ABTestPhase>,
    /// What it says; absent while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<ABTestVerdict>,
    /// The variant that won.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub winner: Option<String>,
    /// The variant that is ahead, which may be chance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// How sure it is that the leader and the control differ, 0 to 1, whenever one looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<String>,
    /// `ok`, `broken`, or `-` where requests are assigned or nobody was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srm: Option<String>,
    /// Bound of the probability of such a division of users if they are divided as configured, whenever one
    /// looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srm_p_value: Option<String>,
    /// Percent of the users that each variant gets, in the order of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// Users, or requests, of all variants.
    #[serde(default)]
    pub samples: i64,
    /// The spec that the test runs by, as JSON: the last one that could be honoured. Routes, guardrails and
    /// verdicts follow it while a newer spec is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_spec: Option<String>,
    /// How often the samples began anew because a variant moved to another revision.
    #[serde(default)]
    pub restarts: u32,
    /// When the samples began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_time_schema")]
    pub started_at: Option<Time>,
    /// When the test came to its verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_time_schema")]
    pub concluded_at: Option<Time>,
    /// Effect of the goal that the test finds now with a probability of 80 %, in the units of
    /// `smallestEffect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detectable_effect: Option<String>,
    /// Days until the smallest effect that matters is found, as the samples grow now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub days_left: Option<String>,
    /// The step of the ramp, from 0; the number of steps when variants have their weights.
    #[serde(default)]
    pub ramp_step: u32,
    /// Since when it is in this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_time_schema")]
    pub ramp_since: Option<Time>,
    /// Percent of the route that the winner was given beyond its weight.
    #[serde(default)]
    pub promoted: u32,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "optional_time_schema")]
    pub promoted_since: Option<Time>,
    /// Times of constant weights since the samples began, the newest last, and the time before the test, if
    /// it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 4),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["epoch"])
    )]
    pub epochs: Vec<TestEpoch>,
    /// Who owns the buckets of users, in ascending order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "atomic"))]
    pub owners: Vec<OwnerRange>,
    /// Who owned the buckets before a promotion, or a guardrail, gave some of them to another variant; absent
    /// where none did. They get them back when the promotion is undone, or samples begin anew.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "atomic"))]
    pub owners_before: Vec<OwnerRange>,
    /// The variants, in the order of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 4),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub variants: Vec<VariantStatus>,
    /// The goal's effect over time, the oldest first. The older a test is, the farther apart they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 48), extend("x-kubernetes-list-type" = "atomic"))]
    pub history: Vec<TestLook>,
    /// Hash of what restarts the samples when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_of: Option<String>,
    /// `Accepted`, `Serving`, `Sampling`, `SplitHealthy`, `LoadMatched` and `SamplesStored`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 8),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"])
    )]
    pub conditions: Vec<Condition>,
}

/// Where a test is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ABTestPhase {
    /// It has not started: the condition `Accepted` or `Serving` says why.
    Pending,
    /// Every user gets the control, and is counted at the variant that will be theirs.
    Baseline,
    /// The variants come to their weights.
    Ramping,
    /// Users are divided by the weights.
    Running,
    /// The winner gets more and more of the route.
    Promoting,
    /// It has a verdict.
    Concluded,
    /// A guardrail ended it: the control gets every request.
    Stopped,
}

/// What a test says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ABTestVerdict {
    /// A variant is better than the others.
    Winner,
    /// The variants differ by less than the margin.
    Equivalent,
    /// Nothing can be said.
    Inconclusive,
    /// Users were not divided as configured.
    Invalid,
}

/// What one checkpoint showed of the goal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TestLook {
    /// When.
    #[schemars(schema_with = "time_schema")]
    pub at: Time,
    /// Users, or requests, of all variants.
    pub samples: i64,
    /// The variants behind the control.
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "atomic"))]
    pub effects: Vec<LookEffect>,
}

/// The goal's effect of one variant at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LookEffect {
    /// Name of the variant.
    pub variant: String,
    /// How it differs from the control, in the units of `variants[].metrics[].effect`.
    pub effect: String,
    /// The lower end of the interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<String>,
    /// The upper end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<String>,
}

/// A time of constant weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TestEpoch {
    /// Its number, which only grows.
    pub epoch: i64,
    /// When it began.
    #[schemars(schema_with = "time_schema")]
    pub since: Time,
    /// Share of each variant, in the order of the spec, in ten-thousandths.
    #[schemars(length(max = 4), extend("x-kubernetes-list-type" = "atomic"))]
    pub weights: Vec<u32>,
    /// Whether every user got the control in it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub baseline: bool,
}

/// The buckets behind those of the range before, up to `end` (exclusive).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OwnerRange {
    /// End of the range.
    pub end: u32,
    /// Name of the variant.
    pub variant: String,
}

/// What is known of one variant.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VariantStatus {
    /// Its name.
    pub name: String,
    /// The revisions that serve it; another one restarts the samples.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub revision: String,
    /// Users since the samples began.
    #[serde(default)]
    pub users: i64,
    /// Requests that were answered or failed.
    #[serde(default)]
    pub requests: i64,
    /// Requests that failed.
    #[serde(default)]
    pub errors: i64,
    /// Requests that another variant answered, since this one had no pod for them.
    #[serde(default)]
    pub fallbacks: i64,
    /// Requests of forced and excluded users, of none, and those that name a revision, which do not count.
    #[serde(default)]
    pub uncounted: i64,
    /// Tokens of the answers.
    #[serde(default)]
    pub tokens: i64,
    /// Pods that serve it.
    #[serde(default)]
    pub replicas: i64,
    /// Requests per second and pod since the last change of weights: variants with another load are compared
    /// unfairly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_per_replica: Option<String>,
    /// Median latency in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p50_ms: Option<String>,
    /// 95th percentile of the latency in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p95_ms: Option<String>,
    /// Scores.
    #[serde(default)]
    pub scores: i64,
    /// What it answered as the test's shadow; absent where that is nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<ShadowStatus>,
    /// The goal and the secondary metrics, the goal first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 6),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"])
    )]
    pub metrics: Vec<MetricStatus>,
    /// Why it has too little for a verdict.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "set"))]
    pub shortfalls: Vec<String>,
    /// Information of the goal so far, in the scale of its comparison: it must not fall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub information: Option<String>,
}

/// What a variant answered as the test's shadow since the samples began, beside the answers of callers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShadowStatus {
    /// Answers that say the same.
    #[serde(default)]
    pub same: i64,
    /// Answers that do not.
    #[serde(default)]
    pub different: i64,
    /// Answers that cannot be compared.
    #[serde(default)]
    pub incomparable: i64,
    /// Answers of a shadow with `compare: false`.
    #[serde(default)]
    pub answered: i64,
    /// Requests that it did not answer, or with an error.
    #[serde(default)]
    pub failed: i64,
    /// Requests that it was not sent, because gateways had no room for the copy.
    #[serde(default)]
    pub dropped: i64,
    /// Share of `same` among `same` and `different`, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<String>,
}

/// One metric of a variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetricStatus {
    /// Which one.
    pub metric: Metric,
    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// How it differs from the control's, relative to it: 0.02 is 2 % more. Of `feedbackScore` the
    /// difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
    /// The lower end of the effect's interval, which holds whenever one looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<String>,
    /// The upper end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<String>,
    /// Whether the difference is one beyond chance.
    #[serde(default)]
    pub differs: bool,
    /// How much of what users did in the baseline is subtracted (CUPED), as the next checkpoint uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuped: Option<String>,
}

fn time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

fn optional_time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "nullable": true})
}
