//! Scales the pods of other revisions, and deletes children that are no longer needed.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use trustformers_control::kinds::{CONFIG_MAP, DEPLOYMENT};
use trustformers_control::rollout::PoolSize;
use trustformers_control::{names, status};

use super::apply::{ApplyError, api};
use super::fetch::Observed;
use super::settled::Settled;
use crate::children::Child;
use crate::context::Context;

/// Earlier ConfigMaps that stay while a Deployment replaces its pods, besides those that pods have mounted: a
/// pod that an old ReplicaSet replaces needs its ConfigMap again.
const SPARE_CONFIG_MAPS: usize = 2;

/// Scales the Deployment of a revision that the spec does not describe any more. Nothing else of it is
/// written: its pods stay as they were made.
///
/// # Errors
/// When the API server does not accept it.
pub async fn scale(context: &Context, observed: &Observed, pool: &PoolSize) -> Result<(), ApplyError> {
    let is_pool = |child: &&Arc<Child>| {
        child.kind == &DEPLOYMENT && child.label(names::REVISION_LABEL) == Some(pool.pool.as_str())
    };
    // If it is gone, its revision has no pods, and the rollout goes on from that.
    let Some(child) = observed.children.iter().find(is_pool) else { return Ok(()) };
    let spec = child.deployment.as_ref().and_then(|deployment| deployment.spec.as_ref());
    if spec.and_then(|spec| spec.replicas) == i32::try_from(pool.replicas).ok() {
        return Ok(());
    }
    let body = json!({"metadata": {"uid": child.uid}, "spec": {"replicas": pool.replicas}});
    let params = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
    let object = format!("{} {}", child.kind.kind, child.name);
    match api(context, child.kind, &child.namespace).patch(&child.name, &params, &Patch::Merge(&body)).await {
        Ok(stored) => {
            context.metrics.count_write(child.kind.kind);
            let stored = Child::of(child.kind, stored).ok_or(ApplyError::Incomplete { object })?;
            context.children.insert(stored);
            Ok(())
        }
        // It is gone, or another object has its name.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(ApplyError::of(object, error)),
    }
}

/// Deletes children that are no longer needed.
///
/// # Errors
/// The first child that the API server did not delete.
pub async fn prune(
    context: &Context,
    settled: &Settled,
    observed: &Observed,
    pools: &[PoolSize],
    deployment: Option<&Deployment>,
) -> Result<(), ApplyError> {
    let complete = deployment.is_none_or(|deployment| {
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
        status::is_rolled_out(deployment, replicas)
    });
    for child in unneeded(settled, observed, pools, complete) {
        let this_one = Preconditions { uid: Some(child.uid.clone()), ..Preconditions::default() };
        let params = DeleteParams::default().preconditions(this_one);
        match api(context, child.kind, &child.namespace).delete(&child.name, &params).await {
            Ok(_) => {
                context.metrics.count_write(child.kind.kind);
                context.children.remove(child);
            }
            // It is gone, or another object has its name.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(ApplyError::of(format!("{} {}", child.kind.kind, child.name), error)),
        }
    }
    Ok(())
}

/// The children that are neither desired nor needed by a pod or a pool. While the Deployment replaces its
/// pods, an earlier ReplicaSet of it may replace some too: the newest ConfigMaps stay.
fn unneeded<'a>(
    settled: &Settled,
    observed: &'a Observed,
    pools: &[PoolSize],
    complete: bool,
) -> Vec<&'a Child> {
    let of_pool = |child: &Child| {
        let revision = child.label(names::REVISION_LABEL);
        pools.iter().any(|pool| Some(pool.pool.as_str()) == revision)
    };
    // A Deployment is needed by its pool, and the ConfigMap in its template with it.
    let is_needed = |child: &Child| match child.kind {
        kind if kind == &DEPLOYMENT => of_pool(child),
        kind if kind == &CONFIG_MAP => {
            observed.mounted.contains(&child.name)
                || of_pool(child) && child.label(names::REVISION_LABEL) != settled.pool.as_deref()
        }
        _ => false,
    };
    let children = observed.children.iter().map(|child| &**child);
    let unneeded: Vec<&Child> = children
        .filter(|child| child.kind.prune && !settled.has(child.kind, &child.name) && !is_needed(child))
        .collect();
    if complete {
        return unneeded;
    }
    let (mut candidates, mut others): (Vec<&Child>, Vec<&Child>) =
        unneeded.into_iter().partition(|child| child.kind == &CONFIG_MAP);
    // The newest comes first.
    candidates.sort_by_key(|child| std::cmp::Reverse(child.created));
    others.extend(candidates.split_off(SPARE_CONFIG_MAPS.min(candidates.len())));
    others
}
