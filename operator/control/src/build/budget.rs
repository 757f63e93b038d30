//! The PodDisruptionBudget: how many serving pods a node drain may evict at the same time.
//!
//! Pods that do not serve may always be evicted (`AlwaysAllow`): a failed model must not block a node drain.

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::meta;
use crate::names;
use crate::validate::ValidatedModel;

/// Whether the budget can refuse an eviction: more pods are desired than may be unavailable.
pub(super) fn binds(model: &ValidatedModel) -> bool {
    model.replicas > model.max_unavailable
}

pub(super) fn budget(model: &ValidatedModel) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: meta(model, &model.name),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(model.max_unavailable)),
            selector: Some(LabelSelector {
                match_labels: Some(names::model_labels(&model.name)),
                ..LabelSelector::default()
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
