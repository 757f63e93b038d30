//! Autoscaling: what the spec asks of it, and what the autoscaler reports.
//!
//! A HorizontalPodAutoscaler scales the InferenceModel itself, by `/scale`: it writes
//! `spec.scaling.replicas` and reads the pods of the stable revision. The operator alone divides that number
//! among pools, so that a rollout and the autoscaler never write the same field.

use std::time::Duration;

use serde_json::Value;
use trustformers_crds::{InferenceModelSpec, Resources, ScalingPace};

use crate::causes::Cause;
use crate::duration::{self, DurationError};

/// Longest stabilization that Kubernetes takes.
const MAX_STABILIZATION: Duration = Duration::from_secs(3600);

/// How an autoscaler chooses the number of pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Autoscaling {
    /// Smallest number of pods.
    pub min_replicas: i32,
    /// Largest number of pods.
    pub max_replicas: i32,
    /// What is kept near its target.
    pub targets: Vec<ScalingTarget>,
    /// How fast pods are added and removed; none: Kubernetes' own pace.
    pub pace: Option<ScalingPaces>,
}

/// One target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalingTarget {
    /// `cpu` or `memory`.
    pub resource: &'static str,
    /// Mean use in percent of the container's request.
    pub percent: i32,
}

/// How fast the autoscaler follows the load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalingPaces {
    /// Adding pods.
    pub up: Pace,
    /// Removing pods.
    pub down: Pace,
}

/// How fast pods are added or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Within this many seconds the number that changes least counts.
    pub stabilization_s: i32,
    /// Most pods in a minute.
    pub pods_per_minute: Option<i32>,
}

/// Why a model cannot be scaled as its spec says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScalingError {
    /// There are metrics and no largest number of pods.
    #[error("spec.scaling.maxReplicas: is missing; spec.scaling.metrics need the largest number of pods")]
    NoMaximum,
    /// The limits exclude every number.
    #[error("spec.scaling.maxReplicas: is below spec.scaling.minReplicas; make it larger")]
    Inverted,
    /// An entry names no metric, or several.
    #[error("spec.scaling.metrics: give one of cpu and memory in each entry")]
    Metric,
    /// Pods have no request that the metric could be a share of.
    #[error(
        "spec.scaling.metrics: {0} is in percent of a request that the pods do not have; set \
         spec.runtime.resources.requests.{0}"
    )]
    NoRequest(&'static str),
    /// A duration cannot be read.
    #[error("spec.scaling.behavior: stabilization: {0}")]
    Duration(#[from] DurationError),
    /// A stabilization is longer than Kubernetes takes.
    #[error(
        "spec.scaling.behavior: stabilization is longer than 1h, the most that Kubernetes takes; make it shorter"
    )]
    TooLong,
}

/// What the spec asks of an autoscaler; none if the number of pods is fixed.
///
/// # Errors
/// What an autoscaler cannot honour.
pub fn autoscaling(spec: &InferenceModelSpec) -> Result<Option<Autoscaling>, ScalingError> {
    let scaling = &spec.scaling;
    if scaling.metrics.is_empty() {
        return Ok(None);
    }
    let max_replicas = scaling.max_replicas.ok_or(ScalingError::NoMaximum)?;
    if max_replicas < scaling.min_replicas {
        return Err(ScalingError::Inverted);
    }
    let mut targets = Vec::new();
    for metric in &scaling.metrics {
        let (resource, percent) = match (metric.cpu, metric.memory) {
            (Some(percent), None) => ("cpu", percent),
            (None, Some(percent)) => ("memory", percent),
            _ => return Err(ScalingError::Metric),
        };
        if !has_request(&spec.runtime.resources, resource) {
            return Err(ScalingError::NoRequest(resource));
        }
        targets.push(ScalingTarget { resource, percent });
    }
    let paces = |behavior: &trustformers_crds::ScalingBehavior| {
        Ok::<_, ScalingError>(ScalingPaces {
            up: pace(&behavior.scale_up)?,
            down: pace(&behavior.scale_down)?,
        })
    };
    let pace = scaling.behavior.as_ref().map(paces).transpose()?;
    Ok(Some(Autoscaling { min_replicas: scaling.min_replicas, max_replicas, targets, pace }))
}

/// A limit without a request is the request.
fn has_request(resources: &Resources, resource: &str) -> bool {
    resources.requests.contains_key(resource) || resources.limits.contains_key(resource)
}

fn pace(written: &ScalingPace) -> Result<Pace, ScalingError> {
    let stabilization = duration::parse(&written.stabilization)?;
    if stabilization > MAX_STABILIZATION {
        return Err(ScalingError::TooLong);
    }
    // At most 3600.
    let stabilization_s = i32::try_from(stabilization.as_secs()).unwrap_or(i32::MAX);
    Ok(Pace { stabilization_s, pods_per_minute: written.pods_per_minute })
}

/// What a HorizontalPodAutoscaler reports of itself: whether it works, and not its figures, which change with
/// every reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoscalerReport {
    /// Why it does not scale the model; none if it does.
    pub problem: Option<Cause>,
}

impl AutoscalerReport {
    /// Reads the status of a HorizontalPodAutoscaler; none if it has not reported yet.
    #[must_use]
    pub fn of(status: &Value) -> Option<Self> {
        let conditions = status["conditions"].as_array().filter(|conditions| !conditions.is_empty())?;
        let is_false = |one: &&Value| {
            matches!(one["type"].as_str(), Some("AbleToScale" | "ScalingActive")) && one["status"] == "False"
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let problem = conditions.iter().find(is_false);
        let problem =
            problem.map(|one| Cause { reason: text(&one["reason"]), message: text(&one["message"]) });
        Some(Self { problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(scaling: &str) -> InferenceModelSpec {
        let resources = "resources: {requests: {cpu: 500m}, limits: {memory: 1Gi}}";
        serde_yaml::from_str(&format!(
            "{{source: {{uri: 'oci://x'}}, runtime: {{{resources}}}, scaling: {{{scaling}}}}}"
        ))
        .unwrap()
    }

    fn error(scaling: &str) -> String {
        autoscaling(&spec(scaling)).unwrap_err().to_string()
    }

    #[test]
    fn a_fixed_number_of_pods_needs_no_autoscaler() {
        assert_eq!(autoscaling(&spec("replicas: 3")), Ok(None));
    }

    #[test]
    fn targets_and_paces_are_read() {
        let all = "maxReplicas: 3, metrics: [{cpu: 70}, {memory: 80}], \
                   behavior: {scaleUp: {stabilization: 30s, podsPerMinute: 2}}";
        let read = autoscaling(&spec(all)).unwrap().unwrap();
        assert_eq!((read.min_replicas, read.max_replicas), (1, 3));
        let targets: Vec<_> = read.targets.iter().map(|one| (one.resource, one.percent)).collect();
        assert_eq!(targets, [("cpu", 70), ("memory", 80)]);
        let paces = read.pace.unwrap();
        assert_eq!(paces.up, Pace { stabilization_s: 30, pods_per_minute: Some(2) });
        assert_eq!(paces.down, Pace { stabilization_s: 300, pods_per_minute: None });
    }

    #[test]
    fn errors_name_the_field_and_the_next_step() {
        assert!(error("metrics: [{cpu: 70}]").starts_with("spec.scaling.maxReplicas: is missing"));
        let inverted = error("minReplicas: 3, maxReplicas: 2, metrics: [{cpu: 70}]");
        assert!(inverted.ends_with("make it larger"), "{inverted}");
        assert!(error("maxReplicas: 2, metrics: [{}]").contains("one of cpu and memory"));
        let long = "maxReplicas: 2, metrics: [{cpu: 70}], behavior: {scaleUp: {stabilization: 2h}}";
        assert!(error(long).contains("make it shorter"));
        let mut without = spec("maxReplicas: 2, metrics: [{cpu: 70}]");
        without.runtime.resources = Resources::default();
        let missing = autoscaling(&without).unwrap_err();
        assert!(missing.to_string().ends_with("spec.runtime.resources.requests.cpu"), "{missing}");
    }

    #[test]
    fn an_autoscaler_works_unless_a_condition_says_why_not() {
        assert_eq!(AutoscalerReport::of(&json!({})), None);
        let limited = json!({"conditions": [
            {"type": "AbleToScale", "status": "True", "reason": "ReadyForNewScale"},
            {"type": "ScalingActive", "status": "True", "reason": "ValidMetricFound"},
            {"type": "ScalingLimited", "status": "True", "reason": "TooFewReplicas"}]});
        assert_eq!(AutoscalerReport::of(&limited), Some(AutoscalerReport { problem: None }));
        let failed = json!({"conditions": [{"type": "ScalingActive", "status": "False",
            "reason": "FailedGetContainerResourceMetric", "message": "no metrics"}]});
        let problem = AutoscalerReport::of(&failed).unwrap().problem.unwrap();
        assert_eq!(problem.reason, "FailedGetContainerResourceMetric");
        assert_eq!(problem.message, "no metrics");
    }
}
