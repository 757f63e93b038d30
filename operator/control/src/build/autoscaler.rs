//! The HorizontalPodAutoscaler. It scales the InferenceModel, and never a Deployment: during a rollout a
//! model has two of them.

use k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricSource, CrossVersionObjectReference, HPAScalingPolicy, HPAScalingRules,
    HorizontalPodAutoscaler, HorizontalPodAutoscalerBehavior, HorizontalPodAutoscalerSpec, MetricSpec,
    MetricTarget,
};
use trustformers_crds::{GROUP, VERSION};

use super::meta;
use crate::names;
use crate::scaling::{Autoscaling, Pace, ScalingTarget};
use crate::validate::ValidatedModel;

pub(super) fn autoscaler(model: &ValidatedModel, scaling: &Autoscaling) -> HorizontalPodAutoscaler {
    HorizontalPodAutoscaler {
        metadata: meta(model, &model.name),
        spec: HorizontalPodAutoscalerSpec {
            scale_target_ref: CrossVersionObjectReference {
                api_version: Some(format!("{GROUP}/{VERSION}")),
                kind: model.owner.kind.clone(),
                name: model.name.clone(),
            },
            min_replicas: Some(scaling.min_replicas),
            max_replicas: scaling.max_replicas,
            metrics: Some(scaling.targets.iter().map(metric).collect()),
            behavior: scaling.pace.as_ref().map(|paces| HorizontalPodAutoscalerBehavior {
                scale_up: Some(rules(paces.up)),
                scale_down: Some(rules(paces.down)),
            }),
        },
        status: None,
    }
}

/// The use of the runtime's container alone: a sidecar that somebody injects does not count.
fn metric(target: &ScalingTarget) -> MetricSpec {
    MetricSpec {
        type_: "ContainerResource".to_owned(),
        container_resource: Some(ContainerResourceMetricSource {
            container: names::CONTAINER.to_owned(),
            name: target.resource.to_owned(),
            target: MetricTarget {
                type_: "Utilization".to_owned(),
                average_utilization: Some(target.percent),
                ..MetricTarget::default()
            },
        }),
        ..MetricSpec::default()
    }
}

fn rules(pace: Pace) -> HPAScalingRules {
    let policy = |pods| HPAScalingPolicy { type_: "Pods".to_owned(), value: pods, period_seconds: 60 };
    HPAScalingRules {
        stabilization_window_seconds: Some(pace.stabilization_s),
        policies: pace.pods_per_minute.map(|pods| vec![policy(pods)]),
        ..HPAScalingRules::default()
    }
}
