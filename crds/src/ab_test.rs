//! `ABTest`: a route that several models share, and what their users show.
#![allow(unreachable_pub, reason = "the derive repeats the struct inside a function")]

mod status;

use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use trustformers_proto::yaml::{self, YamlError};

pub use status::{
    ABTestPhase, ABTestStatus, ABTestVerdict, LookEffect, MetricStatus, OwnerRange, ShadowStatus, TestEpoch,
    TestLook, VariantStatus,
};

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

    /// Before the test all users get the control for this time, such as `1d`, at most `90d`, and count at the
    /// variant that will be theirs. What they did then explains some of their differences later, so that the
    /// test needs fewer of them (CUPED). Not with `ramp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h|d))+$"))]
    pub baseline: Option<String>,

    /// Requests that a variant answers as well; its answers are compared with those that callers got, and
    /// thrown away. They do not count in the test.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<TestShadow>,

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

    /// `Promote`: how long each of its two steps lasts, at most `90d`. Guardrails are watched meanwhile.
    #[serde(default = "default_promote_hold")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h|d))+$"))]
    pub promote_hold: String,
}

fn default_promote_hold() -> String {
    "1m".to_owned()
}

/// Requests that a variant answers as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TestShadow {
    /// Name of the variant, such as one of weight 0 that is to get users later.
    #[schemars(length(min = 1, max = 32))]
    pub variant: String,
    /// Share of the requests, in percent. It is exact.
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub percent: u32,
    /// Whether the answers are compared: texts by edit distance, vectors by their cosine.
    #[serde(default = "default_compare")]
    pub compare: bool,
}

fn default_compare() -> bool {
    true
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// What its requests cost, for the metric `costPerRequest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
}

/// What requests cost, in any unit of money that all variants share.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// Of each request that was answered or failed.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub per_request: f64,
    /// Of a million tokens that answers say they read.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub per_million_prompt_tokens: f64,
    /// Of a million tokens that answers have.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub per_million_completion_tokens: f64,
}

/// A model of the same namespace.
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
    /// `User`: the claim of the caller's bearer token (a JWT) that is the user, such as `sub`, in place of
    /// the header. The gateway verifies no signature: a proxy in front of it must refuse tokens that are not
    /// valid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_.:/-]+$"))]
    pub jwt_claim: Option<String>,
    /// `User`: tests of one namespace in one layer share its users, and none is in two of them. Users outside
    /// get the control and do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<Layer>,
    /// `User`: percent of the namespace's users that get the control in every test with a holdout, and count
    /// in none. The same users are held out of all these tests.
    #[serde(default)]
    #[schemars(range(min = 0, max = 50), extend("format" = "int64"))]
    pub holdout_percent: u32,
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
        Self {
            by: AssignBy::default(),
            header: default_header(),
            jwt_claim: None,
            layer: None,
            holdout_percent: 0,
            forced: Vec::new(),
        }
    }
}

/// A test's part of the users that several tests share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.from < self.to",
    "message": "spec.assignment.layer: from must be below to"
}]))]
pub struct Layer {
    /// Its name, which tests of one namespace share.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Percent of the users where this test's part begins.
    #[schemars(range(min = 0, max = 99), extend("format" = "int64"))]
    pub from: u32,
    /// Percent of the users where it ends.
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub to: u32,
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
    /// Cost by requests that were answered or failed, from `variants[].cost`.
    CostPerRequest,
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
    /// The winner gets every request of the route. `Report` written over it later undoes that: the variants
    /// have their weights again, and users the variants of before.
    Promote,
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
        assert_eq!((*on_conclusion, test.spec.promote_hold.as_str()), (OnConclusion::Report, "1m"));
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
