//! Makes one model true, in five steps: fetch, validate, build, apply, status.
//!
//! Validation and building are pure and live in `trustformers-control`. A spec that cannot be honoured waits for an
//! edit; everything else is tried again with growing pauses. Either way the cause is in the status and in an Event
//! before the error is returned.

pub mod apply;
pub mod fetch;
pub mod status;

#[cfg(test)]
mod scenarios;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::controller::{self, Action, Config, applier};
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use trustformers_control::build::{BuildError, build};
use trustformers_control::causes::Cause;
use trustformers_control::validate::{ValidateError, validate};
use trustformers_crds::InferenceModel;

use crate::world::World;
use apply::ApplyError;
use fetch::FetchError;
use status::StatusError;

/// Changes of one model that come this close together are reconciled once. Short, since every step of a start of a pod
/// passes here.
const DEBOUNCE: Duration = Duration::from_millis(20);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Which step of a reconcile failed, and why.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// What exists could not be told.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The spec cannot be honoured.
    #[error(transparent)]
    Validate(#[from] ValidateError),
    /// The objects could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The API server did not take an object.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The API server did not take the status.
    #[error(transparent)]
    Status(#[from] StatusError),
}

impl ReconcileError {
    /// Step and variant, as metrics label them.
    #[must_use]
    pub fn label(&self) -> String {
        let (step, variant) = match self {
            Self::Fetch(error) => ("Fetch", error.label()),
            Self::Validate(error) => ("Validate", error.label()),
            Self::Build(error) => ("Build", error.label()),
            Self::Apply(error) => ("Apply", error.label()),
            Self::Status(error) => ("Status", error.label()),
        };
        format!("{step}/{variant}")
    }

    /// What the status says; `None` where a short trouble of the API server is no news about the model.
    fn cause(&self) -> Option<Cause> {
        let reason = match self {
            Self::Fetch(_) | Self::Status(_) | Self::Apply(ApplyError::Request { .. }) => return None,
            Self::Validate(_) => "InvalidSpec",
            Self::Build(_) | Self::Apply(ApplyError::Json(_)) => "BuildFailed",
            Self::Apply(ApplyError::NotOurs { .. }) => "NameTaken",
            Self::Apply(ApplyError::Refused { .. }) => "Refused",
        };
        Some(Cause { reason: reason.to_owned(), message: self.to_string() })
    }
}

/// Reconciles whatever comes out of the queue, for as long as the queue lives.
pub async fn run(world: Arc<World>, queue: mpsc::Receiver<ObjectRef<InferenceModel>>) {
    let config = Config::default().debounce(DEBOUNCE).concurrency(world.settings.concurrency);
    let store = world.caches.models.clone();
    let queue = ReceiverStream::new(queue).map(Ok::<_, std::convert::Infallible>);
    applier(
        |model, world| Box::pin(reconcile(model, world)),
        |model, error, world| pause(&model, error, &world),
        world,
        store,
        queue,
        config,
    )
    .for_each(async |outcome| match outcome {
        Ok((model, _)) => tracing::debug!(%model, "reconciled"),
        Err(controller::Error::ReconcilerFailed(error, model)) => {
            tracing::warn!(%model, %error, "reconcile failed");
        }
        Err(error) => tracing::debug!(%error, "not reconciled"),
    })
    .await;
}

/// Makes one model true.
///
/// # Errors
/// The first step that failed; its cause is in the status already.
pub async fn reconcile(model: Arc<InferenceModel>, world: Arc<World>) -> Result<Action, ReconcileError> {
    if model.metadata.deletion_timestamp.is_some() {
        // The children belong to it and go with it.
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let outcome = pass(&model, &world).await;
    let label = outcome.as_ref().err().map(ReconcileError::label);
    world.metrics.reconciled(label.as_deref(), started.elapsed());
    if outcome.is_ok()
        && let Some(key) = fetch::key(&model)
        && world.memory(&key).failures > 0
    {
        world.remember(&key, |memory| memory.failures = 0);
    }
    outcome.map(|()| Action::await_change())
}

async fn pass(model: &InferenceModel, world: &World) -> Result<(), ReconcileError> {
    let seen = fetch::fetch(world, model)?;
    let before = seen.status.clone();
    let outcome = steps(model, world, seen).await;
    if let Err(error) = &outcome
        && let Some(cause) = error.cause()
    {
        status::refuse(world, model, &before, &cause).await?;
    }
    outcome
}

async fn steps(model: &InferenceModel, world: &World, seen: fetch::Seen) -> Result<(), ReconcileError> {
    let valid = validate(model)?;
    let desired = build(&valid, &world.settings.platform)?;
    let applied = apply::apply(world, desired, &seen).await?;
    status::report(world, model, &valid, (&applied, &seen)).await?;
    Ok(())
}

/// An invalid spec waits for an edit. Anything else is tried again, each time after twice the pause.
fn pause(model: &InferenceModel, error: &ReconcileError, world: &World) -> Action {
    if matches!(error, ReconcileError::Validate(_)) {
        return Action::await_change();
    }
    let Some(key) = fetch::key(model) else { return Action::await_change() };
    let mut failures = 0;
    world.remember(&key, |memory| {
        failures = memory.failures;
        memory.failures = memory.failures.saturating_add(1);
    });
    Action::requeue(FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(LONGEST_PAUSE))
}
