//! The rollout of a model: what it is now, and what follows from it.
//!
//! The state is in the status. A step that changes pods or shares is stored there before it is acted on, so
//! that another operator goes on from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use trustformers_control::counts::SeriesKey;
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_control::names;
use trustformers_control::rollout::window::SampleWindow;
use trustformers_control::rollout::{PodCommand, PoolSize, RolloutFacts, RolloutState, observe, step};
use trustformers_control::validate::ValidatedModel;
use trustformers_crds::InferenceModel;

use super::fetch::Observed;
use super::in_place;
use super::status::now;
use crate::context::Context;

/// How often acknowledgements of gateways are looked at while pods wait for them to end.
const LOOK_AT_TABLES: Duration = Duration::from_secs(1);

/// What follows from the rollout of a model.
#[derive(Debug)]
pub struct RolloutPlan {
    /// The next state.
    pub state: RolloutState,
    /// Whether it must be stored before it is acted on.
    pub store_first: bool,
    /// Every pool that should exist.
    pub pools: Vec<PoolSize>,
    /// What pods must do.
    pub commands: Vec<PodCommand>,
    /// Revisions that get no request by any gateway's table.
    pub unrouted: BTreeSet<String>,
    /// When to look again without a change.
    pub wait: Option<Duration>,
}

/// The next step of the model's rollout.
#[must_use]
pub fn plan(
    context: &Context,
    model: &InferenceModel,
    valid: &ValidatedModel,
    observed: &Observed,
    revision: &str,
) -> RolloutPlan {
    let deployments = deployments(observed);
    let pools = observe::pools(&deployments, &observed.pods);
    // Not the stored one: somebody may have edited it.
    let state = RolloutState::of(&observed.previous);
    let revisions = observe::revisions(&deployments, &observed.pods, &observed.reports, &state);
    let named = state.members().map(|member| &member.revision);
    let unrouted = unrouted(context, observed, pools.keys().chain(revisions.keys()).chain(named));
    // Asked only of a revision that is not there yet.
    let in_place = match &state.stable {
        Some(stable) if stable.revision == revision => Err("it serves already".to_owned()),
        _ => in_place::check(context, valid, observed, &state),
    };
    let route = format!("{}/{}", observed.key.0, observed.key.1);
    let counts = |revision: &str| {
        let key = SeriesKey { route: route.clone(), revision: revision.to_owned() };
        context.counts.by_process(&key)
    };
    let window = SampleWindow::next(state.window.as_ref(), &state, &valid.rollout, &counts);
    let sample = window.as_ref().map(SampleWindow::sample);
    let facts = RolloutFacts {
        desired: revision,
        replicas: u32::try_from(valid.replicas).unwrap_or(0),
        max_unavailable: u32::try_from(valid.max_unavailable).unwrap_or(0),
        policy: &valid.rollout,
        in_place,
        // The scheduler decides what fits.
        budget: None,
        revisions,
        pools,
        unrouted: unrouted.clone(),
        sample: sample.as_ref(),
        commands: observe::commands(model.metadata.annotations.as_ref()),
    };
    let now = now();
    let mut outcome = step(&state, &facts, now);
    // The sums at the start of a step are stored with the step.
    outcome.state.window = SampleWindow::next(window.as_ref(), &outcome.state, &valid.rollout, &counts);
    let wake = outcome.wake_at.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    let tables = (!outcome.state.retiring.is_empty()).then_some(LOOK_AT_TABLES);
    RolloutPlan {
        store_first: outcome.store_first,
        pools: outcome.pools,
        commands: outcome.commands,
        unrouted,
        state: outcome.state,
        wait: wake.into_iter().chain(tables).min(),
    }
}

/// The Deployments of the model, by the revision that each was made for.
fn deployments(observed: &Observed) -> BTreeMap<String, Deployment> {
    let children = observed.children.iter().filter(|child| child.kind == &DEPLOYMENT);
    children
        .filter_map(|child| {
            let revision = child.label(names::REVISION_LABEL)?.to_owned();
            Some((revision, child.deployment.as_deref()?.clone()))
        })
        .collect()
}

/// The revisions to which no gateway sends requests any more. Before the feed starts, that is not certain of
/// any.
fn unrouted<'a>(
    context: &Context,
    observed: &Observed,
    revisions: impl Iterator<Item = &'a String>,
) -> BTreeSet<String> {
    let Some(feed) = context.feed.get() else { return BTreeSet::new() };
    let (namespace, name) = &observed.key;
    let route = format!("{namespace}/{name}");
    revisions.filter(|revision| feed.is_unrouted(&route, revision)).cloned().collect()
}
