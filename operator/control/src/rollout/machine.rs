//! What the state of a rollout becomes.
//!
//! The candidate of a rollout is loaded and admitted, gets its share step by step, and becomes the stable
//! revision. A change of the spec in any state is a transition of its own: the candidate so far retires, and
//! the new one starts from the first step. Admission is never remembered: what a candidate may get follows
//! from the pods that serve it now.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::analysis::{Verdict, verdict};
use super::plan::pods_for;
use super::state::{Decision, LONGEST_HISTORY, Member, Retiring, RolloutPhase, RolloutState, own_pool};
use super::{OnFailure, Placement, RevisionFacts, RolloutFacts};

/// A pod that cannot be scheduled for this long does not fit.
pub(super) const UNSCHEDULABLE_AFTER: Duration = Duration::from_secs(60);

/// Restarts of a candidate's containers that fail it. Fewer may have a cause outside, such as a node.
pub(super) const RESTARTS_TO_FAIL: u32 = 3;

/// How often counts are looked at while they decide something. Gateways report them every second.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

/// One call of [`super::step`].
pub(super) struct Machine<'a, 'f> {
    pub(super) state: RolloutState,
    pub(super) facts: &'a RolloutFacts<'f>,
    pub(super) now: Timestamp,
}

impl<'a, 'f> Machine<'a, 'f> {
    pub(super) fn new(state: RolloutState, facts: &'a RolloutFacts<'f>, now: Timestamp) -> Self {
        Self { state, facts, now }
    }

    pub(super) fn into_state(self) -> RolloutState {
        self.state
    }

    /// Makes at most one transition; returns when to look again.
    pub(super) fn advance(&mut self) -> Option<Timestamp> {
        self.drop_ended();
        if self.follow_command() || self.follow_spec() {
            return Some(self.now);
        }
        let phase = self.state.phase;
        let wake_at = match phase {
            RolloutPhase::Done | RolloutPhase::RolledBack => None,
            RolloutPhase::Pending => self.place(),
            RolloutPhase::Placing | RolloutPhase::Loading | RolloutPhase::Warming => self.admit(),
            RolloutPhase::Admitted => self.enter_step(0),
            RolloutPhase::Shifting | RolloutPhase::Verifying => self.shift(),
            RolloutPhase::Promoted => self.bake(),
            RolloutPhase::RollingBack => self.finish_rollback(),
        };
        if self.state.phase != phase {
            return Some(self.now);
        }
        // What waits for a person is decided already.
        let counts = !self.state.held
            && matches!(phase, RolloutPhase::Shifting | RolloutPhase::Verifying | RolloutPhase::Promoted);
        let look = self.facts.policy.analysis.filter(|_| counts).map(|_| later(self.now, LOOK_EVERY));
        wake_at.into_iter().chain(look).min()
    }

    /// Forgets retired revisions whose pods have ended.
    fn drop_ended(&mut self) {
        let facts = self.facts;
        let host = self.state.stable.as_ref().map(|one| one.pool.clone());
        self.state.retiring.retain(|one| {
            let pool = facts.pool(&one.member.pool);
            let loaded = facts
                .revisions
                .get(&one.member.revision)
                .is_some_and(|loads| loads.routable + loads.warming + loads.loading > 0);
            // In a pool that stays, it ends when no pod has it loaded.
            let stays = host.as_ref() == Some(&one.member.pool);
            let failed =
                facts.revisions.get(&one.member.revision).is_some_and(|loads| loads.failure.is_some());
            if stays { loaded || failed } else { pool.pods + pool.terminating + pool.replicas > 0 }
        });
    }

    /// Follows the spec: it may name another revision in any state.
    fn follow_spec(&mut self) -> bool {
        let desired = self.facts.desired;
        let is = |member: &Option<Member>| member.as_ref().is_some_and(|one| one.revision == desired);
        if self.state.stable.is_none() {
            return self.follow_spec_without_stable();
        }
        if is(&self.state.candidate) {
            return false;
        }
        if is(&self.state.stable) {
            let refused = self.state.refused.take().is_some();
            if self.state.candidate.is_some() {
                let message = "the spec names the stable revision again".to_owned();
                self.retire_candidate(false);
                self.enter(RolloutPhase::RollingBack, "Reverted", message);
                return true;
            }
            if self.state.phase == RolloutPhase::RolledBack {
                self.enter(RolloutPhase::Done, "Reverted", String::new());
                return true;
            }
            return refused;
        }
        if self.state.refused.as_deref() == Some(desired) {
            return false;
        }
        self.retire_candidate(false);
        self.start(desired);
        true
    }

    /// Until a revision has served with all its replicas there is nothing to roll back to: the pods of the
    /// spec's revision are created at once, and replace all others.
    fn follow_spec_without_stable(&mut self) -> bool {
        let desired = self.facts.desired;
        let candidate = self.state.candidate.take();
        if let Some(other) = candidate.filter(|one| one.revision != desired) {
            self.state.retiring.push(Retiring { member: other, failed: false });
        }
        self.state.retiring.retain(|one| one.member.revision != desired);
        let replicas = self.facts.replicas;
        let serves = replicas > 0 && self.facts.routable(desired) >= replicas;
        if serves {
            self.state.stable = Some(own_pool(desired));
            self.enter(RolloutPhase::Done, "FirstRevision", String::new());
        }
        serves
    }

    /// Starts the rollout of a revision, from its first step.
    pub(super) fn start(&mut self, revision: &str) {
        let state = &mut self.state;
        let previous = state.previous.take().map(|member| Retiring { member, failed: false });
        state.retiring.extend(previous);
        let same = |one: &Retiring| one.member.revision == revision;
        let retired = state.retiring.iter().position(same).map(|at| state.retiring.remove(at).member);
        state.attempt = state.attempt.saturating_add(1);
        let pool = state.new_pool(revision);
        state.candidate = Some(retired.unwrap_or_else(|| Member { revision: revision.to_owned(), pool }));
        state.refused = None;
        state.forced = false;
        state.held = false;
        state.weight = 0;
        state.step = 0;
        state.reached = false;
        state.base = self.facts.replicas;
        self.enter(RolloutPhase::Pending, "NewRevision", String::new());
    }

    /// Chooses where the candidate is loaded.
    fn place(&mut self) -> Option<Timestamp> {
        let facts = self.facts;
        if facts.replicas == 0 {
            self.explain("Stopped", "the model has no replicas: nothing can be loaded".to_owned());
            return None;
        }
        self.state.base = facts.replicas;
        let needed = pods_for(self.state.step_weight(facts), facts.replicas);
        let own = self.state.candidate.as_ref().map_or(0, |one| facts.pool(&one.pool).pods);
        let room = facts.budget.map(|budget| budget.saturating_sub(facts.physical()));
        let fits = room.is_none_or(|room| room + own >= needed);
        let choice = match facts.policy.placement {
            Some(Placement::InPlace) => match &facts.in_place {
                Ok(()) => Placement::InPlace,
                Err(why) => {
                    self.explain("CannotLoadInPlace", why.clone());
                    return None;
                }
            },
            Some(Placement::Surge) => Placement::Surge,
            None if facts.in_place.is_ok() => Placement::InPlace,
            None if fits => Placement::Surge,
            None | Some(Placement::DrainFirst) if facts.max_unavailable > 0 => Placement::DrainFirst,
            None | Some(Placement::DrainFirst) => {
                self.explain("NoCapacity", self.what_is_missing(needed));
                return None;
            }
        };
        self.use_placement(choice);
        let in_place = choice == Placement::InPlace;
        self.state.restarts = if in_place { self.host_restarts() } else { BTreeMap::new() };
        self.enter(RolloutPhase::Placing, choice.as_str(), String::new());
        None
    }

    pub(super) fn use_placement(&mut self, placement: Placement) {
        self.state.placement = placement;
        let Some(stable) = self.state.stable.as_ref().map(|one| one.pool.clone()) else { return };
        let Some(mut candidate) = self.state.candidate.take() else { return };
        candidate.pool = match placement {
            Placement::InPlace => stable,
            Placement::Surge | Placement::DrainFirst => {
                // One that it has already stays, whatever becomes of the placement.
                let own = format!("{}-", candidate.revision);
                match candidate.pool.starts_with(&own) && candidate.pool != stable {
                    true => candidate.pool,
                    false => self.state.new_pool(&candidate.revision),
                }
            }
        };
        self.state.candidate = Some(candidate);
    }

    fn what_is_missing(&self, needed: u32) -> String {
        let facts = self.facts;
        let room = facts.budget.map_or(0, |budget| budget.saturating_sub(facts.physical()));
        format!(
            "the candidate needs {needed} pod(s) beside those that serve, and the cluster has room for \
             {room}; add nodes, or allow a pod to be missing with spec.disruption.maxUnavailable"
        )
    }

    /// Waits for pods that serve the candidate.
    fn admit(&mut self) -> Option<Timestamp> {
        if self.facts.replicas == 0 {
            self.enter(RolloutPhase::Pending, "Stopped", String::new());
            return None;
        }
        if self.leave_in_place() || self.fail_if_broken() {
            return None;
        }
        let loads = self.candidate_loads();
        if loads.routable > 0 {
            self.enter(RolloutPhase::Admitted, "Admitted", String::new());
            return None;
        }
        if let Some(late) = self.misfit_at() {
            if self.now < late {
                return Some(late);
            }
            self.do_without_surge();
            return None;
        }
        let phase = if loads.warming > 0 {
            RolloutPhase::Warming
        } else if loads.loading > 0 {
            RolloutPhase::Loading
        } else {
            RolloutPhase::Placing
        };
        if phase != self.state.phase {
            self.enter(phase, phase.as_str(), String::new());
        }
        self.refused_at()
    }

    /// When it is certain that the pods of this step do not fit.
    fn misfit_at(&self) -> Option<Timestamp> {
        let facts = self.facts;
        let candidate = self.state.candidate.as_ref()?;
        let is_over_budget = self.state.placement == Placement::Surge
            && facts.budget.is_some_and(|budget| facts.physical() >= budget)
            && facts.pool(&candidate.pool).replicas < self.state.candidate_pods(facts);
        if is_over_budget {
            return Some(self.now);
        }
        let since = self.candidate_loads().unschedulable_since?;
        // A pod that drains first makes room for a while after this placement was chosen.
        let drains = self.state.placement == Placement::DrainFirst;
        Some(later(if drains { since.max(self.state.since) } else { since }, UNSCHEDULABLE_AFTER))
    }

    /// The estimate of what fits was wrong.
    fn do_without_surge(&mut self) {
        let may_drain = self.facts.policy.placement.is_none() && self.facts.max_unavailable > 0;
        let needed = self.state.candidate_pods(self.facts);
        let missing = self.what_is_missing(needed);
        if self.state.placement == Placement::Surge && may_drain {
            self.use_placement(Placement::DrainFirst);
            self.record_candidate(
                "Replaced",
                "Unschedulable",
                format!("DrainFirst instead of Surge: {missing}"),
            );
            self.enter(RolloutPhase::Placing, "DrainFirst", missing);
        } else if self.state.placement == Placement::DrainFirst {
            self.explain("Unschedulable", "no node takes a pod of the candidate".to_owned());
        } else {
            self.explain("NoCapacity", missing);
        }
    }

    /// Gives the candidate the share of a step.
    fn enter_step(&mut self, step: u32) -> Option<Timestamp> {
        // A stable revision that does not serve is not waited for.
        let dead = self.stable_routable() == 0;
        self.state.step = if dead || self.state.forced { self.last_step() } else { step };
        self.state.base = self.facts.replicas;
        self.state.reached = false;
        self.state.weight = if dead { 100 } else { self.state.step_weight(self.facts) };
        let phase =
            if self.state.step < self.last_step() { RolloutPhase::Shifting } else { RolloutPhase::Verifying };
        self.enter(phase, phase.as_str(), String::new());
        None
    }

    fn last_step(&self) -> u32 {
        // The schema bounds the list to ten.
        u32::try_from(self.facts.policy.steps.len()).unwrap_or(u32::MAX)
    }

    /// Waits until the step is reached, has lasted and is within the limits; then takes the next one.
    fn shift(&mut self) -> Option<Timestamp> {
        if self.fail_if_broken() {
            return None;
        }
        if self.candidate_loads().routable == 0 {
            // Its pods are gone: it is admitted anew.
            self.state.weight = 0;
            self.state.attempt = self.state.attempt.saturating_add(1);
            self.enter(RolloutPhase::Placing, "NoPods", "no pod serves the candidate any more".to_owned());
            return None;
        }
        if self.state.forced && self.state.step < self.last_step() {
            return self.enter_step(self.last_step());
        }
        let verdict = if self.state.forced { None } else { self.verdict() };
        if let Some(Verdict::Fail { reason, .. }) = verdict {
            self.fail(reason, figures(verdict.as_ref()));
            return None;
        }
        let needed = self.state.candidate_pods(self.facts);
        if self.candidate_loads().routable < needed {
            let routable = self.candidate_loads().routable;
            self.explain("WaitingForPods", format!("{routable} of {needed} pods serve the candidate"));
            return self.unschedulable_wake();
        }
        if !self.state.reached {
            self.state.reached = true;
            self.state.since = self.now;
        }
        if self.state.held {
            return None;
        }
        let until = self.hold_end();
        if self.now < until && !self.state.forced {
            self.explain("Holding", figures(verdict.as_ref()));
            return Some(until);
        }
        if matches!(verdict, Some(Verdict::Inconclusive { .. })) {
            self.explain("Inconclusive", figures(verdict.as_ref()));
            return None;
        }
        if self.state.phase == RolloutPhase::Verifying {
            self.promote(figures(verdict.as_ref()));
            return None;
        }
        self.record_candidate("Passed", "StepPassed", figures(verdict.as_ref()));
        self.enter_step(self.state.step + 1);
        // The phase may be the same one.
        Some(self.now)
    }

    /// A step whose pods do not fit waits; with a choice it continues without a surge.
    fn unschedulable_wake(&mut self) -> Option<Timestamp> {
        let late = self.misfit_at()?;
        if self.now < late {
            return Some(late);
        }
        let may_drain = self.facts.policy.placement.is_none() && self.facts.max_unavailable > 0;
        if self.state.placement == Placement::Surge && may_drain {
            self.use_placement(Placement::DrainFirst);
            let message = self.what_is_missing(self.state.candidate_pods(self.facts));
            self.record_candidate(
                "Replaced",
                "Unschedulable",
                format!("DrainFirst instead of Surge: {message}"),
            );
            return Some(self.now);
        }
        self.explain("NoCapacity", self.what_is_missing(self.state.candidate_pods(self.facts)));
        None
    }

    fn hold_end(&self) -> Timestamp {
        let hold =
            self.facts.policy.steps.get(self.state.step as usize).map_or(Duration::ZERO, |step| step.hold);
        later(self.state.since, hold)
    }

    fn verdict(&self) -> Option<Verdict> {
        let limits = self.facts.policy.analysis?;
        let key = self.state.sample_key();
        let sample = self.facts.sample.filter(|sample| Some(&sample.key) == key.as_ref());
        Some(verdict(limits, sample, self.stable_routable() > 0))
    }

    /// The candidate becomes the stable revision.
    fn promote(&mut self, figures: String) {
        self.record_candidate("Promoted", "AllStepsPassed", figures);
        let state = &mut self.state;
        let previous = state.stable.take();
        state.stable = state.candidate.take();
        state.previous = previous;
        state.weight = 0;
        state.step = 0;
        state.forced = false;
        self.enter(RolloutPhase::Promoted, "Promoted", String::new());
    }

    /// Waits with the previous revision ready. A failure that a person must decide about keeps it ready for
    /// as long as that takes.
    fn bake(&mut self) -> Option<Timestamp> {
        let until = later(self.state.since, self.facts.policy.bake);
        if self.state.held {
            return None;
        }
        if self.now >= until {
            self.finish_bake();
            return None;
        }
        if let Some((reason, message)) = self.broken(self.state.stable.as_ref()) {
            self.fail_bake(&reason, message);
        } else if let Some(Verdict::Fail { reason, figures }) = self.verdict() {
            self.fail_bake(reason, figures);
        }
        Some(until)
    }

    fn fail_bake(&mut self, reason: &str, message: String) {
        match self.facts.policy.on_failure {
            // Without a pod of the previous revision there is nothing to return to.
            OnFailure::Rollback if self.previous_routable() > 0 => self.undo(reason, message),
            OnFailure::Rollback => self.explain(reason, message),
            OnFailure::Hold => {
                let revision = self.state.stable.as_ref().map(|one| one.revision.clone());
                self.record(&revision.unwrap_or_default(), "Held", reason, message.clone());
                self.state.held = true;
                self.explain(reason, message);
            }
        }
    }

    pub(super) fn finish_bake(&mut self) {
        if let Some(previous) = self.state.previous.take() {
            self.state.retiring.push(Retiring { member: previous, failed: false });
        }
        self.state.held = false;
        self.enter(RolloutPhase::Done, "Complete", String::new());
    }

    /// The previous revision becomes the stable one again.
    pub(super) fn undo(&mut self, reason: &str, message: String) {
        let Some(previous) = self.state.previous.take() else { return };
        self.state.held = false;
        if let Some(failed) = self.state.stable.replace(previous) {
            self.record(&failed.revision.clone(), "RolledBack", reason, message.clone());
            self.state.refused = Some(failed.revision.clone());
            self.state.retiring.push(Retiring { member: failed, failed: true });
        }
        self.enter(RolloutPhase::RollingBack, reason, message);
    }

    /// Waits until the stable revision has its pods and the others get no request.
    fn finish_rollback(&mut self) -> Option<Timestamp> {
        let facts = self.facts;
        let least = facts.replicas.saturating_sub(facts.max_unavailable);
        let gets_none = |one: &Retiring| facts.unrouted.contains(&one.member.revision);
        let restored = self.stable_routable() >= least || self.state.retiring.is_empty();
        if restored && self.state.retiring.iter().all(gets_none) {
            let (reason, message) = (self.state.reason.clone(), self.state.message.clone());
            let phase =
                if self.state.refused.is_some() { RolloutPhase::RolledBack } else { RolloutPhase::Done };
            self.enter(phase, &reason, message);
        }
        None
    }

    fn fail_if_broken(&mut self) -> bool {
        let Some((reason, message)) = self.broken(self.state.candidate.as_ref()) else { return false };
        self.fail(&reason, message);
        true
    }

    /// Why a revision can be neither loaded nor run.
    fn broken(&self, member: Option<&Member>) -> Option<(String, String)> {
        let member = member?;
        let loads = self.facts.revisions.get(&member.revision);
        if let Some(cause) = loads.and_then(|loads| loads.failure.as_ref()) {
            return Some((cause.reason.clone(), cause.message.clone()));
        }
        let restarts = self.restarts_of(member, loads);
        (restarts >= self.restarts_to_fail(member))
            .then(|| ("Crashing".to_owned(), format!("its container was restarted {restarts} times")))
    }

    fn fail(&mut self, reason: &str, message: String) {
        match self.facts.policy.on_failure {
            OnFailure::Rollback => self.start_rollback(reason, message),
            OnFailure::Hold if self.state.held => {}
            OnFailure::Hold => {
                self.record_candidate("Held", reason, message.clone());
                self.state.held = true;
                self.explain(reason, message);
            }
        }
    }

    pub(super) fn start_rollback(&mut self, reason: &str, message: String) {
        self.record_candidate("RolledBack", reason, message.clone());
        self.state.refused = self.state.candidate.as_ref().map(|one| one.revision.clone());
        self.retire_candidate(true);
        self.enter(RolloutPhase::RollingBack, reason, message);
    }

    fn retire_candidate(&mut self, failed: bool) {
        self.state.weight = 0;
        self.state.step = 0;
        self.state.held = false;
        if let Some(member) = self.state.candidate.take() {
            self.state.retiring.push(Retiring { member, failed });
        }
    }

    pub(super) fn enter(&mut self, phase: RolloutPhase, reason: &str, message: String) {
        self.state.phase = phase;
        self.state.since = self.now;
        self.explain(reason, message);
    }

    fn explain(&mut self, reason: &str, message: String) {
        reason.clone_into(&mut self.state.reason);
        self.state.message = message;
    }

    pub(super) fn record_candidate(&mut self, decision: &str, reason: &str, message: String) {
        if let Some(revision) = self.state.candidate.as_ref().map(|one| one.revision.clone()) {
            self.record(&revision, decision, reason, message);
        }
    }

    pub(super) fn record(&mut self, revision: &str, decision: &str, reason: &str, message: String) {
        self.state.history.push(Decision {
            at: self.now,
            revision: revision.to_owned(),
            decision: decision.to_owned(),
            reason: reason.to_owned(),
            message,
        });
        let limit = self.facts.policy.history_limit.min(LONGEST_HISTORY);
        let excess = self.state.history.len().saturating_sub(limit);
        self.state.history.drain(..excess);
    }

    pub(super) fn candidate_loads(&self) -> RevisionFacts {
        let candidate = self.state.candidate.as_ref();
        candidate.and_then(|one| self.facts.revisions.get(&one.revision)).cloned().unwrap_or_default()
    }

    fn stable_routable(&self) -> u32 {
        self.state.stable.as_ref().map_or(0, |one| self.facts.routable(&one.revision))
    }

    fn previous_routable(&self) -> u32 {
        self.state.previous.as_ref().map_or(0, |one| self.facts.routable(&one.revision))
    }
}

fn figures(verdict: Option<&Verdict>) -> String {
    match verdict {
        Some(
            Verdict::Pass { figures } | Verdict::Inconclusive { figures } | Verdict::Fail { figures, .. },
        ) => figures.clone(),
        None => String::new(),
    }
}

pub(super) fn later(since: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| since.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests;
