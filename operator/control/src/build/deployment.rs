//! The Deployment of one pool.
//!
//! Its name and its selector contain the revision that the pool was made for, so that two pools are counted,
//! scaled and replaced apart. The name stays when its pods load another revision in place. A change of the
//! pod alone (image, resources) replaces the pods of the Deployment.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Platform, meta, pod};
use crate::names;
use crate::validate::ValidatedModel;

/// A load may take long, and the model's own conditions report its progress. With a week, the Deployment
/// never reports a load as failed.
const PROGRESS_DEADLINE_S: i32 = 7 * 24 * 3600;

/// A changed pod serves before an old one ends. GPUs are scarce: there the old one ends first.
pub(super) fn deployment(model: &ValidatedModel, platform: &Platform, pool: &str) -> Deployment {
    let labels = names::revision_labels(&model.name, pool);
    let config_map = names::config_map(&model.name, pool);
    let (surge, unavailable) = if model.runtime.gpus > 0 { (0, 1) } else { (1, 0) };
    let mut metadata = meta(model, &names::deployment(&model.name, pool));
    metadata.labels = Some(labels.clone());
    Deployment {
        metadata,
        spec: Some(DeploymentSpec {
            replicas: Some(model.replicas),
            selector: LabelSelector { match_labels: Some(labels), ..LabelSelector::default() },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(surge)),
                    max_unavailable: Some(IntOrString::Int(unavailable)),
                }),
            }),
            progress_deadline_seconds: Some(PROGRESS_DEADLINE_S),
            revision_history_limit: Some(1),
            template: pod::template(model, platform, pool, &config_map),
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}
