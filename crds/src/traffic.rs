//! How gateways handle a model's requests: time limits, retries, balancing, checks and breakers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ab_test::ModelRef;

/// How gateways handle the model's requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.attemptTimeout) || duration(self.attemptTimeout) <= duration(self.timeout)",
        "message": "spec.traffic.attemptTimeout: is longer than spec.traffic.timeout, which ends the request first; make it shorter"
    },
    {
        "rule": "!has(self.hashOn) || self.loadBalancing == 'ConsistentHash'",
        "message": "spec.traffic.hashOn: only loadBalancing ConsistentHash hashes requests; set it, or remove hashOn"
    },
    {
        "rule": "!has(self.hedge) || !has(self.hedge.delay) || duration(self.hedge.delay) < duration(self.timeout)",
        "message": "spec.traffic.hedge.delay: is not shorter than spec.traffic.timeout, which ends the request first; make it shorter"
    }
]))]
pub struct Traffic {
    /// From a request's arrival to the first byte of its response, such as `60s`, `1m30s` or `500ms`. A
    /// response that is not streamed starts when it is complete.
    #[serde(default = "default_timeout")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub timeout: String,

    /// The same for one attempt; a pod that has not responded by then is left, and another one is tried.
    /// Default: an attempt has all of `timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub attempt_timeout: Option<String>,

    /// Further attempts, each on another pod, while no byte of the response has arrived.
    #[serde(default = "default_retries")]
    #[schemars(range(min = 0, max = 10), extend("format" = "int64"))]
    pub retries: u32,

    /// Delay of the first retry, half of it up or down at random; each further one doubles it.
    #[serde(default = "default_retry_delay")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub retry_delay: String,

    /// How many retries all requests together may cause.
    #[serde(default)]
    pub retry_budget: RetryBudget,

    /// How long the requests of a pod that shuts down may take to finish.
    #[serde(default = "default_drain_timeout")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub drain_timeout: String,

    /// How a pod is chosen. `LeastRequests`: of two random pods the one with fewer requests. `RoundRobin`:
    /// one after the other. `Weighted`: at random, by the pods' annotation `serving.trustformers.dev/weight`.
    /// `LatencyEwma`: of two random pods the one that is expected to respond first. `ConsistentHash`:
    /// requests with the same key go to the same pod while it has at most 5/4 of the mean load.
    #[serde(default)]
    pub load_balancing: LoadBalancing,

    /// The key of `ConsistentHash`. Default: the first 256 bytes of the body of an HTTP request, so that
    /// prompts that begin alike meet the same prefix cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_on: Option<HashOn>,

    /// Time in which a new pod gets to its whole share, from a tenth. Default: it has it at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub slow_start: Option<String>,

    /// Requests wait for a pod while the model has none. Default: they are refused with 503.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,

    /// Gateways ask every pod whether it is ready. Default: the cluster's own readiness decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,

    /// A pod that fails again and again gets no requests for a while. Default: no breaker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,

    /// Requests that encode texts are sent to a second pod while the first one has not responded. Default:
    /// they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hedge: Option<Hedge>,

    /// Another model, or another revision of this one, answers a share of the requests as well, after their
    /// callers have their answers. Default: none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<TrafficShadow>,

    /// Whether a caller's header `x-gateway-inference-fairness-id` names its tenant. Otherwise only a proxy
    /// that the gateways trust names it.
    #[serde(default)]
    pub accept_tenant: bool,

    /// Whether a caller's header `x-trustformers-priority` chooses its priority class. Otherwise only a proxy
    /// that the gateways trust does.
    #[serde(default)]
    pub accept_priority: bool,
}

/// How a pod is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum LoadBalancing {
    /// Of two random pods the one with fewer requests.
    #[default]
    LeastRequests,
    /// One after the other.
    RoundRobin,
    /// At random, by the pods' weights.
    Weighted,
    /// Of two random pods the one that is expected to respond first.
    LatencyEwma,
    /// The same key goes to the same pod while its load is bounded.
    ConsistentHash,
}

/// The key of a consistent hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HashOn {
    /// A request's header, such as `x-user-id` or `x-session-id`. Requests without it go to the less busy of
    /// two pods.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z0-9]([-_a-z0-9]*[a-z0-9])?$"))]
    pub header: String,
}

/// How many retries all requests of the model together may cause at one gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetryBudget {
    /// Retries may be this share of the requests of `window`, in percent.
    #[serde(default = "default_budget_percent")]
    #[schemars(range(min = 0, max = 100), extend("format" = "int64"))]
    pub percent: u32,
    /// This many retries of `window` are free.
    #[serde(default = "default_min_retries")]
    #[schemars(range(min = 0, max = 10_000), extend("format" = "int64"))]
    pub min_retries: u32,
    /// The time that is looked at.
    #[serde(default = "default_window")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub window: String,
}

/// Requests that wait for a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hold {
    /// The longest wait.
    #[serde(default = "default_hold_time")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub time: String,
    /// The most requests that wait at one gateway; further ones are refused with 503.
    #[serde(default = "default_hold_requests")]
    #[schemars(range(min = 1, max = 512), extend("format" = "int64"))]
    pub max_requests: u32,
}

/// When a request that encodes texts is sent to a second pod. The first response counts, and the other one is
/// cancelled. Requests that generate are never sent twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hedge {
    /// Time that the first pod has. Default: the time in which 95 % of the model's recent responses came, at
    /// each gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub delay: Option<String>,
    /// Such requests may be this share of those of 10 s, in percent, and one more.
    #[serde(default = "default_hedge_percent")]
    #[schemars(range(min = 1, max = 20), extend("format" = "int64"))]
    pub budget_percent: u32,
}

/// Who answers requests as well. Its answers are counted by gateways and thrown away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrafficShadow {
    /// A model of the same namespace, for the same task.
    pub model_ref: ModelRef,
    /// Share of the requests, in percent. It is exact.
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub percent: u32,
    /// Whether the answers are compared with those that the callers got: texts by edit distance, vectors by
    /// their cosine.
    #[serde(default = "default_compare")]
    pub compare: bool,
}

/// How gateways ask pods whether they are ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "duration(self.timeout) <= duration(self.interval)",
    "message": "spec.traffic.healthCheck.timeout: is longer than the interval; make it shorter"
}]))]
pub struct HealthCheck {
    /// Time between two checks of a pod, at least a second.
    #[serde(default = "default_check_interval")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(s|m|h))+$"))]
    pub interval: String,
    /// A pod that does not respond for this long has failed the check.
    #[serde(default = "default_check_timeout")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub timeout: String,
    /// Failed checks in a row after which the pod gets no requests.
    #[serde(default = "default_down_after")]
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub down_after: u32,
    /// Good checks in a row after which it gets requests again.
    #[serde(default = "default_up_after")]
    #[schemars(range(min = 1, max = 100), extend("format" = "int64"))]
    pub up_after: u32,
}

/// When a pod that fails gets no requests. Failures are errors of the pod, broken connections, and responses
/// that do not come in time; a full queue is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.consecutiveFailures > 0 || self.failurePercent > 0",
    "message": "spec.traffic.circuitBreaker: nothing opens it; set consecutiveFailures or failurePercent above 0, or remove circuitBreaker"
}]))]
pub struct CircuitBreaker {
    /// Failures in a row that open it. 0: they do not.
    #[serde(default = "default_consecutive_failures")]
    #[schemars(range(min = 0, max = 1000), extend("format" = "int64"))]
    pub consecutive_failures: u32,
    /// Share of failures among the attempts of `window` that opens it, in percent. 0: it does not.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100), extend("format" = "int64"))]
    pub failure_percent: u32,
    /// Attempts in `window` below which the share says nothing.
    #[serde(default = "default_min_attempts")]
    #[schemars(range(min = 1, max = 1_000_000), extend("format" = "int64"))]
    pub min_attempts: u32,
    /// The time that the share looks at.
    #[serde(default = "default_window")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub window: String,
    /// Time until one request is let through to see whether the pod works again.
    #[serde(default = "default_open")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(ms|s|m|h))+$"))]
    pub open: String,
}

fn default_timeout() -> String {
    "60s".to_owned()
}

fn default_retries() -> u32 {
    2
}

fn default_retry_delay() -> String {
    "100ms".to_owned()
}

fn default_drain_timeout() -> String {
    "60s".to_owned()
}

fn default_budget_percent() -> u32 {
    20
}

fn default_min_retries() -> u32 {
    10
}

fn default_window() -> String {
    "10s".to_owned()
}

fn default_hold_time() -> String {
    "30s".to_owned()
}

fn default_hold_requests() -> u32 {
    256
}

fn default_hedge_percent() -> u32 {
    5
}

fn default_compare() -> bool {
    true
}

fn default_check_interval() -> String {
    "30s".to_owned()
}

fn default_check_timeout() -> String {
    "2s".to_owned()
}

fn default_down_after() -> u32 {
    3
}

fn default_up_after() -> u32 {
    2
}

fn default_consecutive_failures() -> u32 {
    5
}

fn default_min_attempts() -> u32 {
    20
}

fn default_open() -> String {
    "60s".to_owned()
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            timeout: default_timeout(),
            attempt_timeout: None,
            retries: default_retries(),
            retry_delay: default_retry_delay(),
            retry_budget: RetryBudget::default(),
            drain_timeout: default_drain_timeout(),
            load_balancing: LoadBalancing::default(),
            hash_on: None,
            slow_start: None,
            hold: None,
            health_check: None,
            circuit_breaker: None,
            hedge: None,
            shadow: None,
            accept_tenant: false,
            accept_priority: false,
        }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            percent: default_budget_percent(),
            min_retries: default_min_retries(),
            window: default_window(),
        }
    }
}
