//! Brings one model into the state that its spec describes, in five steps: fetch, validate, build, apply,
//! status.
//!
//! Validation and building are pure and live in `trustformers-control`. A spec that cannot be honoured waits
//! for an edit. Other failures are retried after growing pauses. In both cases the cause is in the status and
//! in an Event before the error is returned.
//!
//! Models wait in a queue with lanes. While new models wait, a new model gets only what its pods need, so
//! that Deployments come first; the rest follows in its next pass.

pub mod apply;
pub mod ending;
pub mod fetch;
pub mod in_place;
pub mod prune;
pub mod rollout;
pub mod settled;
pub mod status;

#[cfg(test)]
mod scenarios;

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::task::JoinSet;
use tokio::time::Instant;
use trustformers_control::build::{BuildError, Platform, Pools, build, pod_config};
use trustformers_control::causes::Cause;
use trustformers_control::hash;
use trustformers_control::routes::ModelKey;
use trustformers_control::validate::{ValidateError, ValidatedModel, validate};
use trustformers_crds::InferenceModel;

use crate::context::Context;
use crate::queue::{Action, Lane, Queue};
use apply::{ApplyError, Extent};
use fetch::{FetchError, Observed};
use rollout::RolloutPlan;
use settled::{BuildInputs, Settled};
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
                ApplyError::Request { .. }
                | ApplyError::Incomplete { .. }
                | ApplyError::Changed { .. }
                | ApplyError::NotDeletedYet { .. },
            ) => return None,
            Self::Validate(_) => "InvalidSpec",
            Self::Build(_) => "BuildFailed",
            Self::Apply(ApplyError::NotOurs { .. }) => "NameTaken",
            Self::Apply(ApplyError::Refused { .. }) => "Refused",
        };
        Some(Cause { reason: reason.to_owned(), message: self.to_string() })
    }
}

/// Reconciles the models in the queue, without end. Every pass is a task of its own. It returns only when one
/// of them panics.
pub async fn run(context: Arc<Context>, queue: Arc<Queue<ModelKey>>) {
    let limit = usize::from(context.settings.concurrency);
    let mut passes = JoinSet::new();
    loop {
        tokio::select! {
            Some(ended) = passes.join_next(), if !passes.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a reconcile ended unexpectedly");
                    return;
                }
            }
            key = queue.next(), if passes.len() < limit => {
                passes.spawn(pass(Arc::clone(&context), Arc::clone(&queue), key));
            }
        }
    }
}

async fn pass(context: Arc<Context>, queue: Arc<Queue<ModelKey>>, key: ModelKey) {
    let mut action = Action::await_change();
    if let Some(model) = context.model(&key) {
        action = match reconcile(Arc::clone(&model), Arc::clone(&context)).await {
            Ok(action) => action,
            Err(error) => {
                let (namespace, name) = &key;
                tracing::warn!(namespace, name, %error, "reconcile failed");
                pause(&model, &error, &context)
            }
        };
    }
    queue.finish(&key);
    if let Some(after) = action.after() {
        // The rest of a new model is no timer.
        let lane = if after.is_zero() { Lane::Child } else { Lane::Status };
        queue.request_after(&key, lane, after);
    }
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
    observed: &Observed,
) -> Result<Option<Duration>, ReconcileError> {
    let valid = validate(model)?;
    let revision = hash::revision(&valid);
    let mut plan = rollout::plan(context, model, &valid, observed, &revision);
    let mut after_write = None;
    if plan.store_first {
        status::store_rollout(context, model, observed, &plan.state).await?;
        after_write = Some(fetch::fetch(context, model)?);
    }
    let observed = after_write.as_ref().unwrap_or(observed);
    ending::mark(context, observed, &plan.pools).await;
    let platform = context.platform();
    let pass = ModelPass { valid: &valid, revision: &revision, observed, platform: &platform };
    let Some(settled) = settle(context, &pass, &plan).await? else {
        return Ok(Some(Duration::ZERO));
    };
    report(context, &pass, &mut plan, &settled).await
}

/// What a pass works with.
struct ModelPass<'a> {
    valid: &'a ValidatedModel,
    revision: &'a str,
    observed: &'a Observed,
    platform: &'a Platform,
}

impl ModelPass<'_> {
    fn pools(&self, plan: &RolloutPlan) -> Result<Pools, BuildError> {
        in_place::pools(self.valid, self.revision, self.observed, plan, self.platform.admin.as_ref())
    }
}

/// Writes what differs of the desired objects. None if other new models go first.
async fn settle(
    context: &Context,
    pass: &ModelPass<'_>,
    plan: &RolloutPlan,
) -> Result<Option<Arc<Settled>>, ReconcileError> {
    let observed = pass.observed;
    let inputs = BuildInputs::of(pass.valid, pass.revision, plan, pass.platform);
    let is_current = |settled: &Arc<Settled>| settled.inputs == inputs && settled.holds(context, observed);
    if let Some(settled) = context.memory(&observed.key, &observed.uid).settled.filter(is_current) {
        return Ok(Some(settled));
    }
    let desired = build(pass.valid, pass.platform, &pass.pools(plan)?)?;
    let others_wait = observed.children.is_empty() && context.queue.has_waiting(Lane::New);
    let extent = if others_wait { Extent::Pods } else { Extent::All };
    apply::write(context, &desired, observed, extent).await?;
    if extent == Extent::Pods {
        return Ok(None);
    }
    let settled = Arc::new(Settled::of(&desired, inputs));
    context.remember(&observed.key, &observed.uid, |memory| memory.settled = Some(Arc::clone(&settled)));
    Ok(Some(settled))
}

/// Ends what is no longer needed, asks pods for what they do not hold yet, and writes the status.
async fn report(
    context: &Context,
    pass: &ModelPass<'_>,
    plan: &mut RolloutPlan,
    settled: &Settled,
) -> Result<Option<Duration>, ReconcileError> {
    let observed = pass.observed;
    let applied = apply::finish(context, settled, observed, &plan.pools).await?;
    if plan.commands.is_empty() {
        context.set_asked(&observed.key, false);
    } else {
        let pools = pass.pools(plan)?;
        let own = pod_config(pass.valid, pass.revision, pass.platform.admin.as_ref());
        in_place::act(context, observed, &own, &pools, plan).await;
    }
    let wait = status::report(context, pass.valid, &applied, observed, &plan.state).await?;
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
