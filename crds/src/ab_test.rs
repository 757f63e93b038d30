//! `ABTest`: a route that several models share, and what their users show.
#![allow(unreachable_pub, reason = "the derive repeats the struct inside a function")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use trustformers_proto::yaml::{self, YamlError};

use crate::Condition;

/// Most variants of a test. The sums of more would not fit into the test's ConfigMap (see
/// `docs/ab-tests.md`).
pub const MAX_VARIANTS: usize = 4;

/// A test that divides the users of a route between variants and says which one is better.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "serving.trustformers.dev",
    version = "v1alpha1",
    kind = "ABTest",
    plural = "abtests",
    shortname = "abtest",
    category = "trustformers",
    namespaced,
    doc = "A test that divides the users of a route between variants and says which one is better.",
    status = "ABTestStatus",
    derive = "PartialEq",
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,43}[a-z0-9])?$')").message(
        "metadata.name: at most 45 characters, lower-case letters, digits and '-', starting with a letter, because a ConfigMap gets a name made from it"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Weights",
        type_ = "string",
        json_path = ".status.weights",
        description = "Percent of the users that each variant gets"
    ),
    printcolumn(
        name = "Samples",
        type_ = "integer",
        json_path = ".status.samples",
        description = "Users, or requests, of all variants"
    ),
    printcolumn(
        name = "Leader",
        type_ = "string",
        json_path = ".status.leader",
        description = "The variant that is ahead"
    ),
    printcolumn(
        name = "Confidence",
        type_ = "string",
        json_path = ".status.confidence",
        description = "How sure it is that variants differ, whenever one looks"
    ),
    printcolumn(
        name = "SRM",
        type_ = "string",
        json_path = ".status.srm",
        description = "Whether users are divided as configured"
    ),
    printcolumn(name = "Verdict", type_ = "string", json_path = ".status.verdict"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ABTestSpec {
    /// The model's name that callers use. No InferenceModel of the namespace may have it.
    #[schemars(length(min = 1, max = 45), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub route: String,

    /// What is compared. The first one is the control.
    #[schemars(
        length(min = 2, max = 4),
        extend(
            "x-kubernetes-list-type" = "map",
            "x-kubernetes-list-map-keys" = ["name"],
            "x-kubernetes-validations" = [{
                "rule": "self.map(variant, variant.weight).sum() == 100",
                "message": "spec.variants: the weights must sum to 100; change them together"
            }]
        )
    )]
    pub variants: Vec<Variant>,

    /// Who gets which variant.
    #[serde(default)]
    pub assignment: Assignment,

    /// How the variants behind the control come to their weights, step by step. Empty: at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 10),
        extend(
            "x-kubernetes-list-type" = "atomic",
            "x-kubernetes-validations" = [{
                "rule": "self.map(step, step.percent).isSorted()",
                "message": "spec.ramp: a percentage must not be smaller than the one before"
            }]
        )
    )]
    pub ramp: Vec<RampStep>,

    /// What decides which variant is better.
    pub goal: Goal,

    /// What is compared besides. It decides nothing, and its intervals account for its number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 5),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"])
    )]
    pub secondary: Vec<SecondaryMetric>,

    /// Limits that no variant but the control may pass. One that does ends the test: the control gets every
    /// request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 5),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"])
    )]
    pub guardrails: Vec<Guardrail>,

    /// When the test ends.
    #[serde(default)]
    pub stop_when: StopWhen,

    /// What happens when a variant has won. `Report`: nothing, the status says it. `Promote`: the winner gets
    /// every request of the route, in two steps. No other object is changed.
    #[serde(default)]
    pub on_conclusion: OnConclusion,
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Variant {
    /// Its name, which answers carry in `x-trustformers-variant`.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// The model that serves it.
    pub model_ref: ModelRef,
    /// Percent of the users.
    #[schemars(range(min = 0, max = 100), extend("format" = "int64"))]
    pub weight: u32,
}

/// A model of the test's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelRef {
    /// Name of the InferenceModel.
    #[schemars(length(min = 1, max = 45))]
    pub name: String,
    /// One of its revisions, as its status names them, such as a candidate whose rollout is held. Default:
    /// all that serve, by the shares of its rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub revision: Option<String>,
}

/// Who gets which variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// `User`: a user keeps the variant. `Request`: of each 100 requests every variant gets exactly its
    /// weight. `Percentage`: each request is drawn by itself.
    #[serde(default)]
    pub by: AssignBy,
    /// `User`: the header whose value is the user. Requests without it are divided one by one, and do not
    /// count in the analysis.
    #[serde(default = "default_header")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9][-A-Za-z0-9]*$"))]
    pub header: String,
    /// `User`: users that get a variant whatever the weights. They do not count in the analysis.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 100),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["user"])
    )]
    pub forced: Vec<ForcedUser>,
}

impl Default for Assignment {
    fn default() -> Self {
        Self { by: AssignBy::default(), header: default_header(), forced: Vec::new() }
    }
}

fn default_header() -> String {
    "x-user-id".to_owned()
}

/// What is assigned to a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AssignBy {
    /// Users.
    #[default]
    User,
    /// Requests, exactly.
    Request,
    /// Requests, at random.
    Percentage,
}

/// A user that gets a variant whatever the weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForcedUser {
    /// The value of the header.
    #[schemars(length(min = 1, max = 128))]
    pub user: String,
    /// Name of the variant.
    #[schemars(length(min = 1, max = 32))]
    pub variant: String,
}

/// One step towards the weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RampStep {
    /// Percent of its weight that each variant behind the control gets.
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub percent: u32,
    /// How long the step lasts, such as `1h`.
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h|d))+$"))]
    pub hold: String,
}

/// What is measured of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Metric {
    /// The mean score of `POST /v1/feedback`.
    FeedbackScore,
    /// Failures among the requests that were answered or failed, 0 to 1.
    ErrorRate,
    /// The latency in ms that half of the requests do not exceed. A failure counts as endless.
    LatencyP50Ms,
    /// The latency in ms that 95 % of the requests do not exceed.
    LatencyP95Ms,
    /// The latency in ms that 99 % of the requests do not exceed.
    LatencyP99Ms,
    /// The time to the first token in ms that 95 % of the streams do not exceed.
    FirstTokenP95Ms,
    /// Produced tokens, by the time of the answers with them.
    TokensPerSecond,
}

/// Which direction of a metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Direction {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// What decides which variant is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Goal {
    /// What is measured.
    pub metric: Metric,
    /// Which direction is better.
    pub direction: Direction,
    /// `feedbackScore`: the metric of the scores.
    #[serde(default = "default_feedback_metric")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_]+$"))]
    pub feedback_metric: String,
    /// The smallest effect that matters, relative to the control: 0.05 is 5 %. Of `feedbackScore` in units of
    /// the score. The test is tuned for it. Fix it before the test starts; a change restarts the samples.
    #[serde(default = "default_smallest_effect")]
    #[schemars(range(min = 0.001, max = 1.0))]
    pub smallest_effect: f64,
    /// Effects up to this size, in the same units, are none: if the interval is within them, the variants are
    /// equivalent. 0: the test never says so.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub margin: f64,
}

fn default_feedback_metric() -> String {
    "score".to_owned()
}

fn default_smallest_effect() -> f64 {
    0.05
}

/// A metric that is compared and decides nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecondaryMetric {
    /// What is measured.
    pub metric: Metric,
    /// Which direction is better.
    pub direction: Direction,
}

/// A limit that a variant must not pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.max) != has(self.min)",
    "message": "spec.guardrails[]: set exactly one of max and min"
}]))]
pub struct Guardrail {
    /// What is measured.
    pub metric: Metric,
    /// It must not be above this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// It must not be below this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
}

/// When the test ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StopWhen {
    /// How sure a verdict has to be. It holds however often one looks.
    #[serde(default = "default_confidence")]
    #[schemars(range(min = 0.5, max = 0.9999))]
    pub confidence: f64,
    /// Users that each variant needs for a verdict; requests, where requests are assigned.
    #[serde(default = "default_min_samples")]
    #[schemars(range(min = 500, max = 1_000_000_000), extend("format" = "int64"))]
    pub min_samples_per_variant: u32,
    /// No verdict comes earlier, such as `7d`: users behave otherwise at first, and at weekends. A guardrail
    /// does not wait.
    #[serde(default = "default_min_duration")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h|d))+$"))]
    pub min_duration: String,
    /// The test ends after this time, at most `90d`, with what it has.
    #[serde(default = "default_max_duration")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h|d))+$"))]
    pub max_duration: String,
}

fn default_confidence() -> f64 {
    0.95
}

fn default_min_samples() -> u32 {
    500
}

fn default_min_duration() -> String {
    "7d".to_owned()
}

fn default_max_duration() -> String {
    "14d".to_owned()
}

impl Default for StopWhen {
    fn default() -> Self {
        Self {
            confidence: default_confidence(),
            min_samples_per_variant: default_min_samples(),
            min_duration: default_min_duration(),
            max_duration: default_max_duration(),
        }
    }
}

/// What happens when a variant has won.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnConclusion {
    /// The status says it.
    #[default]
    Report,
    /// The winner gets every request of the route.
    Promote,
}

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
    /// Times of constant weights since the samples began, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 3),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["epoch"])
    )]
    pub epochs: Vec<TestEpoch>,
    /// Who owns the buckets of users, in ascending order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "atomic"))]
    pub owners: Vec<OwnerRange>,
    /// The variants, in the order of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 4),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"])
    )]
    pub variants: Vec<VariantStatus>,
    /// Hash of what restarts the samples when it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_of: Option<String>,
    /// `Accepted`, `Serving`, `Sampling`, `SplitHealthy` and `SamplesStored`.
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
    /// Requests of forced users, and of none, which do not count.
    #[serde(default)]
    pub uncounted: i64,
    /// Tokens of the answers.
    #[serde(default)]
    pub tokens: i64,
    /// Median latency in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p50_ms: Option<String>,
    /// 95th percentile of the latency in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p95_ms: Option<String>,
    /// Scores.
    #[serde(default)]
    pub scores: i64,
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
}

fn time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

fn optional_time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "nullable": true})
}

/// The CustomResourceDefinition as YAML, as the committed copies hold it.
///
/// # Errors
/// Only if the schema cannot be written as YAML, which the tests rule out.
pub fn ab_test_crd_yaml() -> Result<String, YamlError> {
    yaml::write(&ABTest::crd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const SMALL: &str = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: ABTest\nmetadata: {name: t}\n\
        spec: {route: chat, variants: [{name: control, modelRef: {name: a}, weight: 90}, \
        {name: treatment, modelRef: {name: b}, weight: 10}], goal: {metric: errorRate, direction: Lower}}\n";

    fn spec_schema() -> Value {
        let crd = serde_json::to_value(ABTest::crd()).unwrap();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
    }

    #[test]
    fn a_small_test_has_every_default() {
        let test: ABTest = serde_yaml::from_str(SMALL).unwrap();
        let ABTestSpec { assignment, stop_when, on_conclusion, goal, .. } = &test.spec;
        assert_eq!((assignment.by, assignment.header.as_str()), (AssignBy::User, "x-user-id"));
        assert_eq!((stop_when.confidence, stop_when.min_samples_per_variant), (0.95, 500));
        assert_eq!((stop_when.min_duration.as_str(), stop_when.max_duration.as_str()), ("7d", "14d"));
        assert_eq!(*on_conclusion, OnConclusion::Report);
        assert_eq!((goal.feedback_metric.as_str(), goal.smallest_effect, goal.margin), ("score", 0.05, 0.0));
        let schema = spec_schema();
        let properties = &schema["properties"];
        assert_eq!(properties["stopWhen"]["default"], serde_json::to_value(StopWhen::default()).unwrap());
        assert_eq!(properties["assignment"]["default"]["header"], "x-user-id");
    }

    #[test]
    fn rules_say_what_to_do() {
        let text = spec_schema().to_string();
        for message in [
            "spec.variants: the weights must sum to 100; change them together",
            "spec.ramp: a percentage must not be smaller than the one before",
            "spec.guardrails[]: set exactly one of max and min",
        ] {
            assert!(text.contains(message), "{message}");
        }
    }

    #[test]
    fn lists_and_strings_of_the_spec_are_bounded() {
        fn walk(node: &Value, path: &str, faults: &mut Vec<String>) {
            let bounded = match node["type"].as_str() {
                Some("string") => node["maxLength"].is_u64() || node["enum"].is_array(),
                Some("array") => node["maxItems"].is_u64() && node["x-kubernetes-list-type"].is_string(),
                _ => true,
            };
            if !bounded {
                faults.push(path.to_owned());
            }
            for (name, property) in node["properties"].as_object().into_iter().flatten() {
                walk(property, &format!("{path}.{name}"), faults);
            }
            if node["items"].is_object() {
                walk(&node["items"], &format!("{path}[]"), faults);
            }
        }
        let mut faults = Vec::new();
        walk(&spec_schema(), "spec", &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
    }

    #[test]
    fn the_definition_has_the_short_name_and_the_columns() {
        let text = ab_test_crd_yaml().unwrap();
        for expected in ["abtest", ".status.weights", ".status.leader", ".status.confidence", ".status.srm"] {
            assert!(text.contains(expected), "{expected}");
        }
    }
}
