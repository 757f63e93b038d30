//! Rollouts: how a model moves from one revision to another.
//!
//! A rollout is a state machine. Its state is stored in the status before anything is done about it, so that
//! another operator goes on from there. [`step`] gives the next state and what follows from it: how many pods
//! each pool has, which share of the requests each revision gets, what pods must load, and when to look
//! again. Everything follows from stored objects, reports and the time of the caller's clock.

pub mod analysis;
mod command;
pub mod in_place;
mod machine;
pub mod observe;
pub mod plan;
pub mod room;
pub mod state;
mod stored;
pub mod window;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use crate::causes::Cause;
use analysis::{AnalysisLimits, StepSample};
pub use state::{RolloutPhase, RolloutState, step};

/// Where the weights of a candidate are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Placement {
    /// New pods, beside those of the stable revision.
    #[default]
    Surge,
    /// A pod of the stable revision ends before one of the candidate starts.
    DrainFirst,
    /// The pods of the stable revision load the candidate too.
    InPlace,
}

impl Placement {
    /// The word as users write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Surge => "Surge",
            Self::DrainFirst => "DrainFirst",
            Self::InPlace => "InPlace",
        }
    }
}

/// One step of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShiftStep {
    /// Share of the requests that the candidate gets, 1 to 100 percent.
    pub weight_percent: u32,
    /// How long it keeps this share at least.
    pub hold: Duration,
}

/// What happens when a candidate fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// The stable revision gets all requests again, and the candidate's pods end.
    #[default]
    Rollback,
    /// The rollout stays where it is until somebody decides.
    Hold,
}

/// A prompt with the beginning of the greedy answer that pods must give before they serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoldenPrompt {
    /// The prompt.
    pub prompt: String,
    /// How its answer begins, at most [`MAX_EXPECT_BYTES`].
    pub expect: String,
}

/// Longest beginning of an answer: a token has at least one byte, and a pod asks for 256 tokens at most.
pub const MAX_EXPECT_BYTES: usize = 256;

/// The settings of rollouts of one model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RolloutPolicy {
    /// The placement; none: what fits.
    pub placement: Option<Placement>,
    /// The steps, with ascending weights; none: all requests move at once.
    pub steps: Vec<ShiftStep>,
    /// Limits that the candidate must stay within.
    pub analysis: Option<AnalysisLimits>,
    /// What pods must answer before they serve.
    pub golden_prompts: Vec<GoldenPrompt>,
    /// How long the previous revision stays ready after a promotion.
    pub bake: Duration,
    /// What happens when a candidate fails.
    pub on_failure: OnFailure,
    /// Decisions that the status keeps.
    pub history_limit: usize,
}

/// What somebody asks of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    /// Stop, and give all requests to the stable revision.
    Abort,
    /// Return to the previous revision while it is still ready.
    Undo,
    /// Skip the steps, holds and limits that remain; after a rollback, try the revision again.
    Promote,
}

impl Command {
    /// In the order in which they are followed when several arrive together.
    pub const ALL: [Self; 3] = [Self::Abort, Self::Undo, Self::Promote];
}

/// A command as it is written: `REVISION` or `REVISION/NONCE`. Another nonce repeats the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandText(pub String);

impl CommandText {
    /// The revision that it is about.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.0.split_once('/').map_or(self.0.as_str(), |(revision, _)| revision)
    }
}

/// Pods of one Deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolFacts {
    /// Replicas that its Deployment asks for.
    pub replicas: u32,
    /// Pods that exist and are not about to end.
    pub pods: u32,
    /// Pods that are about to end. They still use their devices.
    pub terminating: u32,
}

/// Loads of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RevisionFacts {
    /// Pods that every gateway can route to, with this revision loaded and warm.
    pub routable: u32,
    /// Pods whose warm-up passed, that gateways have not acknowledged yet, or that warm up.
    pub warming: u32,
    /// Pods that load it.
    pub loading: u32,
    /// Restarts of the containers that run it, by pod; pods without any are left out.
    pub restarts: BTreeMap<String, u32>,
    /// Since when a pod could not be scheduled.
    pub unschedulable_since: Option<Timestamp>,
    /// Why it cannot be loaded, if waiting does not help.
    pub failure: Option<Cause>,
}

/// What is observed of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutFacts<'a> {
    /// The revision that the spec describes.
    pub desired: &'a str,
    /// Pods that serve the model, apart from a rollout.
    pub replicas: u32,
    /// Serving pods that may be missing because of what the operator does.
    pub max_unavailable: u32,
    /// The settings.
    pub policy: &'a RolloutPolicy,
    /// Whether pods can load the desired revision beside the present one. If not: why.
    pub in_place: Result<(), String>,
    /// Pods that the model may have at the same time, by the estimate of what the cluster has; none: unknown.
    pub budget: Option<u32>,
    /// Pools that exist, by name.
    pub pools: BTreeMap<String, PoolFacts>,
    /// Loads, by revision.
    pub revisions: BTreeMap<String, RevisionFacts>,
    /// Revisions that get no request by the tables that every gateway has acknowledged.
    pub unrouted: BTreeSet<String>,
    /// What was counted since the step started.
    pub sample: Option<&'a StepSample>,
    /// Commands, as they are written.
    pub commands: BTreeMap<Command, CommandText>,
}

impl RolloutFacts<'_> {
    /// Pods that gateways can route to, with this revision.
    #[must_use]
    pub fn routable(&self, revision: &str) -> u32 {
        self.revisions.get(revision).map_or(0, |facts| facts.routable)
    }

    /// The pool, or an empty one.
    #[must_use]
    pub fn pool(&self, pool: &str) -> PoolFacts {
        self.pools.get(pool).copied().unwrap_or_default()
    }

    /// Pods that use devices, or will as soon as their Deployment's controller acts.
    #[must_use]
    pub fn physical(&self) -> u32 {
        self.pools.values().map(|pool| pool.pods.max(pool.replicas) + pool.terminating).sum()
    }
}

/// Replicas of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSize {
    /// The pool's name: the revision that it was made for.
    pub pool: String,
    /// Replicas that its Deployment asks for.
    pub replicas: u32,
}

/// Share of the requests that one revision gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionWeight {
    /// The revision.
    pub revision: String,
    /// Ten-thousandths of the model's requests.
    pub weight: u32,
}

/// What pods of a pool must do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodCommand {
    /// Load the revision into the second slot.
    Load {
        /// The pool.
        pool: String,
        /// The revision.
        revision: String,
    },
    /// Let the model's name mean this revision.
    Swap {
        /// The pool.
        pool: String,
        /// The revision.
        revision: String,
    },
    /// Unload the revision.
    Unload {
        /// The pool.
        pool: String,
        /// The revision.
        revision: String,
    },
}

/// What follows from a state and the facts.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// The next state. It must be stored before anything else is done.
    pub state: RolloutState,
    /// Every pool that should exist. Others are deleted.
    pub pools: Vec<PoolSize>,
    /// The share of each revision; those not listed get none.
    pub split: Vec<RevisionWeight>,
    /// What pods must do, for pods that have not done it yet.
    pub commands: Vec<PodCommand>,
    /// Whether the state must be stored before it is acted on: it asks for other pods or shares.
    pub store_first: bool,
    /// When to call again if nothing changes before.
    pub wake_at: Option<Timestamp>,
}

#[cfg(test)]
mod properties;
