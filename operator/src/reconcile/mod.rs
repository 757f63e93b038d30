//! Brings one model into the state that its spec describes, in five steps: fetch, validate, build, apply,
//! status.
//!
//! Validation and building are pure and live in `trustformers-control`. A spec that cannot be honoured waits
//! for an edit. Other failures are retried after growing pauses. In both cases the cause is in the status and
//! in an Event before the error is returned.

pub mod apply;
pub mod fetch;
pub mod rollout;
pub mod status;

#[cfg(test)]
mod scenarios;

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::StreamExt;
use kube::runtime::controller::{self, Action, Config, applier};
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc;
use tokio::time::Instant;
use trustformers_control::build::{BuildError, build};
use trustformers_control::causes::Cause;
use trustformers_control::hash;
use trustformers_control::validate::{ValidateError, validate};
use trustformers_crds::InferenceModel;

use crate::context::Context;
use crate::queue::coalesce;
use apply::ApplyError;
use fetch::FetchError;
use status::StatusError;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Which step of a reconcile failed, and why.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The caches could not be read.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The spec cannot be honoured.
    #[error(transparent)]
    Validate(#[from] ValidateError),
    /// The objects could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The API server did not accept an object.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The API server did not accept the status.
    #[error(transparent)]
    Status(#[from] StatusError),
}

impl ReconcileError {
    /// Step and variant, as metrics label them.
    #[must_use]
    pub fn label(&self) -> String {
        let (step, variant): (_, &'static str) = match self {
            Self::Fetch(error) => ("Fetch", error.into()),
            Self::Validate(error) => ("Validate", error.into()),
            Self::Build(error) => ("Build", error.into()),
            Self::Apply(error) => ("Apply", error.into()),
            Self::Status(error) => ("Status", error.into()),
        };
        format!("{step}/{variant}")
    }

    /// The cause that the status shows; `None` for a temporary failure of the API server, which says nothing
    /// about the model.
    fn cause(&self) -> Option<Cause> {
        let reason = match self {
            Self::Fetch(_) | Self::Status(_) => return None,
            Self::Apply(
                ApplyError::Request { .. } | ApplyError::Incomplete { .. } | ApplyError::NotDeletedYet { .. },
            ) => return None,
            Self::Validate(_) => "InvalidSpec",
            Self::Build(_) => "BuildFailed",
            Self::Apply(ApplyError::NotOurs { .. }) => "NameTaken",
            Self::Apply(ApplyError::Refused { .. }) => "Refused",
        };
        Some(Cause { reason: reason.to_owned(), message: self.to_string() })
    }
}

/// Reconciles the models in the queue until the queue ends.
pub async fn run(context: Arc<Context>, queue: mpsc::Receiver<ObjectRef<InferenceModel>>) {
    let config = Config::default().concurrency(context.settings.concurrency);
    let models = context.models.clone();
    let queue = coalesce(queue).map(Ok::<_, std::convert::Infallible>);
    applier(
        |model, context| Box::pin(reconcile(model, context)),
        |model, error, context| pause(&model, error, &context),
        context,
        models,
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

/// Reconciles one model.
///
/// # Errors
/// The first step that failed. The status shows the cause.
pub async fn reconcile(model: Arc<InferenceModel>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    if model.metadata.deletion_timestamp.is_some() {
        // Kubernetes deletes its children with it.
        return Ok(Action::await_change());
    }
    if fetch::key(&model).is_some_and(|key| context.unreadable().contains_key(&key)) {
        // The cache has an older version. `unreadable` reports the stored one.
        context.unreadable_changed.notify_one();
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let outcome = observe_and_step(&model, &context).await;
    let label = outcome.as_ref().err().map(ReconcileError::label);
    context.metrics.reconciled(label.as_deref(), started.elapsed());
    if outcome.is_ok() {
        remember(&model, &context, |failures| *failures = 0);
    }
    Ok(outcome?.map_or_else(Action::await_change, Action::requeue))
}

/// Returns when to reconcile again without a change.
async fn observe_and_step(
    model: &InferenceModel,
    context: &Context,
) -> Result<Option<Duration>, ReconcileError> {
    let observed = fetch::fetch(context, model)?;
    context.remember(&observed.key, &observed.uid, |memory| memory.generation = model.metadata.generation);
    let outcome = steps(model, context, &observed).await;
    if let Err(error) = &outcome
        && let Some(cause) = error.cause()
    {
        status::refuse(context, model, &observed, &cause).await?;
    }
    outcome
}

async fn steps(
    model: &InferenceModel,
    context: &Context,
    observed: &fetch::Observed,
) -> Result<Option<Duration>, ReconcileError> {
    let valid = validate(model)?;
    let revision = hash::revision(&valid);
    let plan = rollout::plan(context, model, &valid, observed, &revision);
    let mut after_write = None;
    if plan.store_first {
        status::store_rollout(context, model, observed, &plan.state).await?;
        after_write = Some(fetch::fetch(context, model)?);
    }
    let observed = after_write.as_ref().unwrap_or(observed);
    let desired = build(&valid, &context.settings.platform, plan.replicas(&revision))?;
    let applied = apply::apply(context, &desired, observed, &plan.pools).await?;
    let wait = status::report(context, &valid, &applied, observed, &plan.state).await?;
    Ok(wait.into_iter().chain(plan.wait).min())
}

/// An invalid spec waits for an edit. Other failures are retried, each time after twice the pause.
fn pause(model: &InferenceModel, error: &ReconcileError, context: &Context) -> Action {
    if matches!(error, ReconcileError::Validate(_)) {
        return Action::await_change();
    }
    let mut count = 0;
    remember(model, context, |failures| {
        count = *failures;
        *failures = failures.saturating_add(1);
    });
    let mut pauses = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .build();
    // Ten doublings of the first pause are above the longest.
    Action::requeue(pauses.nth(count.min(10) as usize).unwrap_or(LONGEST_PAUSE))
}

/// Changes the number of failures in a row of a model.
fn remember(model: &InferenceModel, context: &Context, change: impl FnOnce(&mut u32)) {
    if let (Some(key), Some(uid)) = (fetch::key(model), &model.metadata.uid) {
        context.remember(&key, uid, |memory| change(&mut memory.failures));
    }
}
