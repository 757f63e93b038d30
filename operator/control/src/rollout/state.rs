//! The state of a rollout, as the status stores it.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;

use super::analysis::SampleKey;
use super::machine::Machine;
use super::plan::{self, pods_for};
use super::window::SampleWindow;
use super::{Command, CommandText, Placement, RolloutFacts, StepOutcome};

/// Decisions that a status can hold.
pub const LONGEST_HISTORY: usize = 10;

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum RolloutPhase {
    /// A candidate exists; its placement is not decided.
    Pending,
    /// Pods for it are created, and wait for a node.
    Placing,
    /// They load it.
    Loading,
    /// They warm up, or wait for the acknowledgement of gateways.
    Warming,
    /// A pod serves the candidate; it gets no request yet.
    Admitted,
    /// It gets the share of a step.
    Shifting,
    /// It gets all requests, and the stable revision is still there.
    Verifying,
    /// It is the stable revision; the previous one is still ready.
    Promoted,
    /// No rollout is in progress.
    #[default]
    Done,
    /// The stable revision takes all requests again.
    RollingBack,
    /// The revision of the spec was rolled back.
    RolledBack,
}

impl RolloutPhase {
    /// All phases.
    pub const ALL: [Self; 11] = [
        Self::Pending,
        Self::Placing,
        Self::Loading,
        Self::Warming,
        Self::Admitted,
        Self::Shifting,
        Self::Verifying,
        Self::Promoted,
        Self::Done,
        Self::RollingBack,
        Self::RolledBack,
    ];

    /// Its word in the status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Placing => "Placing",
            Self::Loading => "Loading",
            Self::Warming => "Warming",
            Self::Admitted => "Admitted",
            Self::Shifting => "Shifting",
            Self::Verifying => "Verifying",
            Self::Promoted => "Promoted",
            Self::Done => "Done",
            Self::RollingBack => "RollingBack",
            Self::RolledBack => "RolledBack",
        }
    }

    /// Whether nothing happens any more without a change.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack)
    }
}

/// A revision, and the pool whose pods load it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The revision.
    pub revision: String,
    /// The pool: the revision that it was made for.
    pub pool: String,
}

/// A revision whose pods end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retiring {
    /// The revision.
    pub member: Member,
    /// Whether it failed: it gets no request while another one can answer.
    pub failed: bool,
}

/// A decision, with its reason and figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// When it was made.
    pub at: Timestamp,
    /// The revision that it is about.
    pub revision: String,
    /// What was decided, in one CamelCase word.
    pub decision: String,
    /// Why, in one CamelCase word.
    pub reason: String,
    /// The figures, in a sentence.
    pub message: String,
}

/// The state of a model's rollout, as the status stores it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RolloutState {
    /// Where it is.
    pub phase: RolloutPhase,
    /// Since when: the phase, or the step.
    pub since: Timestamp,
    /// The revision that serves; none until one has served with all its replicas.
    pub stable: Option<Member>,
    /// The revision that is rolled out.
    pub candidate: Option<Member>,
    /// The revision before the stable one, ready for an undo while `Promoted`.
    pub previous: Option<Member>,
    /// Revisions whose pods end.
    pub retiring: Vec<Retiring>,
    /// The revision of the spec that was rolled back: it is not tried again by itself.
    pub refused: Option<String>,
    /// The placement.
    pub placement: Placement,
    /// The step, from 0; the number of steps while `Verifying`.
    pub step: u32,
    /// Whether the candidate had the pods of this step. Its hold counts from then.
    pub reached: bool,
    /// Percent of the requests that the candidate gets, as far as its pods can take them.
    pub weight: u32,
    /// Replicas of the model when the step started.
    pub base: u32,
    /// Restarts of the stable revision's pods when they were asked to load the candidate too, by pod; pods
    /// without any are left out.
    pub restarts: BTreeMap<String, u32>,
    /// Attempts since the model exists: it makes the samples of two rollouts of one revision differ.
    pub attempt: u32,
    /// Whether somebody asked to skip what remains.
    pub forced: bool,
    /// Why, in one CamelCase word, where the phase needs a reason.
    pub reason: String,
    /// Why, in a sentence.
    pub message: String,
    /// Whether it waits for a person: a failure with `onFailure: Hold`.
    pub held: bool,
    /// What was counted of the requests, while limits are compared with it.
    pub window: Option<SampleWindow>,
    /// The last command of each kind that was followed or refused.
    pub consumed: BTreeMap<Command, CommandText>,
    /// The last decisions, the newest last.
    pub history: Vec<Decision>,
}

/// The next state and what follows from it. At most one transition is made.
#[must_use]
pub fn step(before: &RolloutState, facts: &RolloutFacts<'_>, now: Timestamp) -> StepOutcome {
    let mut machine = Machine::new(before.clone(), facts, now);
    let wake_at = machine.advance();
    let state = machine.into_state();
    let plan = |state: &RolloutState| {
        let state = state.with_first_revision(facts.desired);
        let split = plan::split(&state, facts.replicas, &|revision| facts.routable(revision));
        (plan::pools(&state, facts), split, plan::commands(&state, facts))
    };
    let (pools, split, commands) = plan(&state);
    let (pools_before, split_before, commands_before) = plan(before);
    let store_first = pools != pools_before || split != split_before || commands != commands_before;
    StepOutcome { state, pools, split, commands, store_first, wake_at }
}

impl RolloutState {
    /// The state in which the spec's revision counts as stable if none has served yet.
    #[must_use]
    pub fn with_first_revision(&self, desired: &str) -> Self {
        let first = || own_pool(desired);
        Self { stable: Some(self.stable.clone().unwrap_or_else(first)), ..self.clone() }
    }

    /// Pods that the candidate's pool should have.
    #[must_use]
    pub fn candidate_pods(&self, facts: &RolloutFacts<'_>) -> u32 {
        let percent = self.step_weight(facts);
        match self.phase {
            _ if self.candidate.is_none() || facts.replicas == 0 => 0,
            RolloutPhase::Pending => 0,
            // With all requests it follows the autoscaler; with a share it keeps the pods of its step.
            _ if percent == 100 => facts.replicas,
            _ => pods_for(percent, self.base),
        }
    }

    /// Percent of the present step.
    pub(super) fn step_weight(&self, facts: &RolloutFacts<'_>) -> u32 {
        let step = facts.policy.steps.get(self.step as usize).filter(|_| !self.forced);
        step.map_or(100, |step| step.weight_percent.min(100))
    }

    /// Whether the command was followed or refused.
    #[must_use]
    pub fn has_consumed(&self, command: Command, text: &CommandText) -> bool {
        self.consumed.get(&command) == Some(text)
    }

    /// The step that a sample must be about.
    #[must_use]
    pub fn sample_key(&self) -> Option<SampleKey> {
        let member = match self.phase {
            RolloutPhase::Promoted => self.stable.as_ref(),
            _ => self.candidate.as_ref(),
        };
        Some(SampleKey { revision: member?.revision.clone(), step: self.step, attempt: self.attempt })
    }
}

/// A revision in the pool that was made for it.
pub(super) fn own_pool(revision: &str) -> Member {
    Member { revision: revision.to_owned(), pool: revision.to_owned() }
}
