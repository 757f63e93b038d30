//! How many pods serve the model: a fixed number, or what an autoscaler finds by their load.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many pods serve the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.metrics) || size(self.metrics) == 0 || has(self.maxReplicas)",
        "message": "spec.scaling.maxReplicas: is missing; spec.scaling.metrics need the largest number of pods"
    },
    {
        "rule": "!has(self.maxReplicas) || has(self.metrics) && size(self.metrics) > 0",
        "message": "spec.scaling.maxReplicas: nothing changes the number of pods; add spec.scaling.metrics, or remove maxReplicas"
    },
    {
        "rule": "!has(self.maxReplicas) || self.minReplicas <= self.maxReplicas",
        "message": "spec.scaling.maxReplicas: is below spec.scaling.minReplicas; make it larger"
    },
    {
        "rule": "!has(self.behavior) || has(self.metrics) && size(self.metrics) > 0",
        "message": "spec.scaling.behavior: nothing changes the number of pods; add spec.scaling.metrics, or remove behavior"
    }
]))]
pub struct Scaling {
    /// Pods that serve the model. Zero stops it. With `metrics` an autoscaler writes this number: leave it
    /// out of what you apply again.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,

    /// Smallest number of pods that the autoscaler chooses.
    #[serde(default = "default_min_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub min_replicas: i32,

    /// Largest number of pods that the autoscaler chooses; required with `metrics`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: Option<i32>,

    /// What the autoscaler keeps near its target, by a HorizontalPodAutoscaler. The metric that asks for most
    /// pods decides. The cluster needs metrics-server. Empty: the number of pods is fixed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 2),
        extend(
            "x-kubernetes-list-type" = "atomic",
            "x-kubernetes-validations" = [{
                "rule": "self.filter(one, has(one.cpu)).size() <= 1 && self.filter(one, has(one.memory)).size() <= 1",
                "message": "spec.scaling.metrics: a metric occurs twice; remove one of them"
            }]
        )
    )]
    pub metrics: Vec<ScalingMetric>,

    /// How fast the autoscaler follows the load. Default: Kubernetes' own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behavior: Option<ScalingBehavior>,
}

/// One target of the autoscaler.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.cpu) != has(self.memory)",
    "message": "spec.scaling.metrics: give one of cpu and memory in each entry"
}]))]
pub struct ScalingMetric {
    /// Mean use of processors, in percent of the container's request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub cpu: Option<i32>,

    /// Mean use of memory, in percent of the container's request. A runtime keeps most of its memory, so this
    /// rarely removes pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub memory: Option<i32>,
}

/// How fast the autoscaler follows the load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingBehavior {
    /// Adding pods.
    #[serde(default = "default_up")]
    pub scale_up: ScalingPace,

    /// Removing pods.
    #[serde(default = "default_down")]
    pub scale_down: ScalingPace,
}

/// How fast pods are added or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "duration(self.stabilization) <= duration('1h')",
    "message": "spec.scaling.behavior: stabilization is longer than 1h, the most that Kubernetes takes; make it shorter"
}]))]
pub struct ScalingPace {
    /// Of the numbers that the load asked for within this time, the one that changes least counts. At most
    /// `1h`.
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(s|m|h))+$"))]
    pub stabilization: String,

    /// Most pods in a minute. Default: Kubernetes' own limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub pods_per_minute: Option<i32>,
}

fn default_up() -> ScalingPace {
    ScalingPace { stabilization: "0s".to_owned(), pods_per_minute: None }
}

fn default_down() -> ScalingPace {
    ScalingPace { stabilization: "5m".to_owned(), pods_per_minute: None }
}

fn default_replicas() -> i32 {
    1
}

fn default_min_replicas() -> i32 {
    1
}

impl Default for Scaling {
    fn default() -> Self {
        Self {
            replicas: default_replicas(),
            min_replicas: default_min_replicas(),
            max_replicas: None,
            metrics: Vec::new(),
            behavior: None,
        }
    }
}
