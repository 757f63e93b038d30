//! The rollout of a model: what it is now, and what follows from it.
//!
//! The state is in the status. A step that changes pods or shares is stored there before it is acted on, so
//! that another operator goes on from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_control::names;
use trustformers_control::rollout::{PoolSize, RolloutFacts, RolloutState, observe, step};
use trustformers_control::validate::ValidatedModel;
use trustformers_crds::InferenceModel;

use super::fetch::Observed;
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
    /// When to look again without a change.
    pub wait: Option<Duration>,
}

impl RolloutPlan {
    /// Replicas of the pods that load `revision`; none if they should not exist.
    #[must_use]
    pub fn replicas(&self, revision: &str) -> Option<u32> {
        self.pools.iter().find(|one| one.pool == revision).map(|one| one.replicas)
    }
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
    let unrouted = unrouted(context, observed, pools.keys());
    let facts = RolloutFacts {
        desired: revision,
        replicas: u32::try_from(valid.replicas).unwrap_or(0),
        max_unavailable: u32::try_from(valid.max_unavailable).unwrap_or(0),
        policy: &valid.rollout,
        in_place: Err("a new revision is loaded by new pods".to_owned()),
        // The scheduler decides what fits.
        budget: None,
        revisions: observe::revisions(&deployments, &observed.pods, &observed.reports),
        pools,
        unrouted,
        sample: None,
        commands: observe::commands(model.metadata.annotations.as_ref()),
    };
    let now = now();
    let outcome = step(&state, &facts, now);
    let wake = outcome.wake_at.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    let tables = (!outcome.state.retiring.is_empty()).then_some(LOOK_AT_TABLES);
    RolloutPlan {
        store_first: outcome.store_first,
        pools: outcome.pools,
        state: outcome.state,
        wait: wake.into_iter().chain(tables).min(),
    }
}

/// The Deployments of the model, by revision.
fn deployments(observed: &Observed) -> BTreeMap<String, Deployment> {
    let children = observed.children.iter().filter(|child| child.kind == &DEPLOYMENT);
    children
        .filter_map(|child| {
            let revision = child.label(names::REVISION_LABEL)?.to_owned();
            Some((revision, serde_json::from_value(child.object.clone()).ok()?))
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
