//! Step five of a reconcile: write the status if it says something new, then tell it by Events.

use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use trustformers_control::causes::Cause;
use trustformers_control::status::{self, Observed};
use trustformers_control::validate::ValidatedModel;
use trustformers_control::{events, names};
use trustformers_crds::{GROUP, InferenceModel, InferenceModelStatus, VERSION};

use super::apply::Applied;
use super::fetch::{Seen, key};
use crate::recorder;
use crate::world::World;

/// Why the status could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The request failed.
    #[error("the status could not be written: {0}")]
    Request(Box<kube::Error>),
}

impl StatusError {
    /// The variant's name, as metrics label it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Request(_) => "Request",
        }
    }
}

/// Writes what was applied and what pods say.
///
/// # Errors
/// When the API server does not take the status.
pub async fn report(
    world: &World,
    model: &InferenceModel,
    valid: &ValidatedModel,
    (applied, seen): (&Applied, &Seen),
) -> Result<(), StatusError> {
    let observed = Observed {
        deployment: Some(&applied.deployment),
        pods: &seen.pods,
        reports: &seen.reports,
        name_holder: seen.name_holder.as_ref(),
        url: &world.settings.gateway_url,
        now: Timestamp::now(),
    };
    write(world, model, &seen.status, status::status(valid, &applied.revision, observed, &seen.status)).await
}

/// Writes why the model could not be reconciled.
///
/// # Errors
/// When the API server does not take the status.
pub async fn refuse(
    world: &World,
    model: &InferenceModel,
    before: &InferenceModelStatus,
    cause: &Cause,
) -> Result<(), StatusError> {
    let generation = model.metadata.generation.unwrap_or(0);
    write(world, model, before, status::refused(generation, cause, before, Timestamp::now())).await
}

async fn write(
    world: &World,
    model: &InferenceModel,
    before: &InferenceModelStatus,
    after: InferenceModelStatus,
) -> Result<(), StatusError> {
    if *before == after {
        return Ok(());
    }
    let api = Api::<InferenceModel>::namespaced(world.client.clone(), &model.namespace().unwrap_or_default());
    // The UID makes the API server refuse a status about an earlier object of the same name.
    let body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "InferenceModel",
        "metadata": {"name": model.name_any(), "uid": model.uid()},
        "status": after,
    });
    let params = PatchParams::apply(names::MANAGER).force();
    match api.patch_status(&model.name_any(), &params, &Patch::Apply(&body)).await {
        Ok(_) => world.metrics.wrote("InferenceModelStatus"),
        // It was deleted meanwhile: nobody reads its status any more.
        Err(kube::Error::Api(said)) if matches!(said.code, 404 | 409) => return Ok(()),
        Err(error) => return Err(StatusError::Request(Box::new(error))),
    }
    let happenings = events::between(before, &after);
    if let Some(key) = key(model) {
        let uid = model.uid().unwrap_or_default();
        world.remember(&key, |memory| memory.written = Some((uid, after)));
    }
    recorder::publish(world, model, &happenings).await;
    Ok(())
}
