//! The state of a rollout as the status of a model stores it, and its settings as the spec has them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{
    CandidateRevision, ConsumedCommands, InferenceModelStatus, RetiringRevision, Rollout, RolloutDecision,
    RolloutFailure, RolloutPlacement, RolloutStatus, StableRevision,
};

use super::analysis::AnalysisLimits;
use super::state::{Decision, Member, Retiring, RolloutPhase, RolloutState};
use super::window::SampleWindow;
use super::{Command, CommandText, GoldenPrompt, OnFailure, Placement, RolloutPolicy, ShiftStep};
use crate::duration::{self, DurationError};

impl RolloutPolicy {
    /// Reads the settings.
    ///
    /// # Errors
    /// The field below `spec.rollout` whose duration cannot be read, and why.
    pub fn of(rollout: &Rollout) -> Result<Self, (&'static str, DurationError)> {
        let steps = rollout.steps.iter().map(|step| {
            let hold = duration::parse(&step.hold).map_err(|cause| ("steps", cause))?;
            Ok(ShiftStep { weight_percent: step.weight, hold })
        });
        Ok(Self {
            placement: match rollout.placement {
                RolloutPlacement::Auto => None,
                RolloutPlacement::DrainFirst => Some(Placement::DrainFirst),
                RolloutPlacement::Surge => Some(Placement::Surge),
                RolloutPlacement::InPlace => Some(Placement::InPlace),
            },
            steps: steps.collect::<Result<_, _>>()?,
            analysis: rollout.analysis.as_ref().map(|one| AnalysisLimits {
                max_error_rate: Some(one.max_error_rate),
                max_latency_ratio: one.max_latency_ratio,
                min_requests: u64::from(one.min_requests),
            }),
            golden_prompts: rollout.analysis.iter().flat_map(|one| &one.golden_prompts).map(golden).collect(),
            bake: duration::parse(&rollout.bake).map_err(|cause| ("bake", cause))?,
            on_failure: match rollout.on_failure {
                RolloutFailure::Rollback => OnFailure::Rollback,
                RolloutFailure::Hold => OnFailure::Hold,
            },
            history_limit: rollout.history_limit as usize,
        })
    }
}

impl RolloutState {
    /// Reads the state. A phase that this version does not have counts as `Pending`: the rollout starts
    /// again.
    #[must_use]
    pub fn of(status: &InferenceModelStatus) -> Self {
        let stable = status.stable.as_ref().map(|one| member(&one.revision, one.pool.as_ref()));
        let history = status.history.iter().map(decision).collect();
        let Some(rollout) = &status.rollout else {
            return Self { stable, history, ..Self::default() };
        };
        let phase = RolloutPhase::ALL.into_iter().find(|phase| phase.as_str() == rollout.phase);
        let candidate = status.candidate.as_ref();
        let known = [Placement::DrainFirst, Placement::InPlace];
        let placement = known.into_iter().find(|one| one.as_str() == rollout.placement).unwrap_or_default();
        Self {
            phase: phase.unwrap_or(RolloutPhase::Pending),
            since: rollout.since.0,
            stable,
            candidate: candidate.map(|one| member(&one.revision, one.pool.as_ref())),
            previous: status.previous.as_ref().map(|one| member(&one.revision, one.pool.as_ref())),
            retiring: rollout
                .retiring
                .iter()
                .map(|one| Retiring { member: member(&one.revision, one.pool.as_ref()), failed: one.failed })
                .collect(),
            refused: rollout.refused.clone(),
            placement,
            step: candidate.map_or(0, |one| one.step),
            reached: rollout.reached,
            weight: candidate.map_or(0, |one| one.weight),
            base: rollout.base,
            restarts: rollout.restarts_by_pod.clone(),
            attempt: rollout.attempt,
            forced: rollout.forced,
            reason: rollout.reason.clone(),
            message: rollout.message.clone(),
            held: rollout.held,
            window: rollout.sample.as_ref().and_then(SampleWindow::of),
            consumed: consumed(&rollout.consumed).collect(),
            history,
        }
    }

    /// Writes the state into a status. A model that was never rolled out has no state besides its stable
    /// revision.
    pub fn store(&self, status: &mut InferenceModelStatus) {
        let before = status.clone();
        let known = |revision: &str| digest(&before, revision);
        let revision = |member: &Member| StableRevision {
            revision: member.revision.clone(),
            pool: other_pool(member),
            digest: known(&member.revision),
        };
        status.stable = self.stable.as_ref().map(revision);
        status.previous = self.previous.as_ref().map(revision);
        status.candidate = self.candidate.as_ref().map(|member| CandidateRevision {
            revision: member.revision.clone(),
            pool: other_pool(member),
            digest: known(&member.revision),
            weight: self.weight,
            step: self.step,
            since: Time(self.since),
        });
        status.history = self.history.iter().map(stored_decision).collect();
        let never = self.attempt == 0 && self.consumed.is_empty() && self.retiring.is_empty();
        status.rollout = (!never).then(|| self.stored());
    }

    fn stored(&self) -> RolloutStatus {
        let command = |command| self.consumed.get(&command).map(|text: &CommandText| text.0.clone());
        RolloutStatus {
            phase: self.phase.as_str().to_owned(),
            reason: self.reason.clone(),
            message: self.message.clone(),
            placement: self.placement.as_str().to_owned(),
            since: Time(self.since),
            base: self.base,
            restarts_by_pod: self.restarts.clone(),
            attempt: self.attempt,
            reached: self.reached,
            forced: self.forced,
            held: self.held,
            sample: self.window.as_ref().map(SampleWindow::stored),
            refused: self.refused.clone(),
            retiring: self
                .retiring
                .iter()
                .map(|one| RetiringRevision {
                    revision: one.member.revision.clone(),
                    pool: other_pool(&one.member),
                    failed: one.failed,
                })
                .collect(),
            consumed: ConsumedCommands {
                abort: command(Command::Abort),
                undo: command(Command::Undo),
                promote: command(Command::Promote),
            },
        }
    }
}

/// A revision in the pool that the status names, or else in its own.
fn member(revision: &str, pool: Option<&String>) -> Member {
    Member { revision: revision.to_owned(), pool: pool.map_or(revision, String::as_str).to_owned() }
}

/// The pool, unless it is the revision's own.
fn other_pool(member: &Member) -> Option<String> {
    (member.pool != member.revision).then(|| member.pool.clone())
}

fn golden(stored: &trustformers_crds::GoldenPrompt) -> GoldenPrompt {
    GoldenPrompt { prompt: stored.prompt.clone(), expect: stored.expect.clone() }
}

/// The digest that a status has for a revision.
fn digest(status: &InferenceModelStatus, revision: &str) -> Option<String> {
    let stable = [&status.stable, &status.previous].into_iter().flatten();
    let candidate = status.candidate.iter().map(|one| (&one.revision, &one.digest));
    stable
        .map(|one| (&one.revision, &one.digest))
        .chain(candidate)
        .find(|(of, digest)| *of == revision && digest.is_some())
        .and_then(|(_, digest)| digest.clone())
}

fn consumed(commands: &ConsumedCommands) -> impl Iterator<Item = (Command, CommandText)> {
    let all = [
        (Command::Abort, &commands.abort),
        (Command::Undo, &commands.undo),
        (Command::Promote, &commands.promote),
    ];
    all.into_iter().filter_map(|(command, text)| Some((command, CommandText(text.clone()?))))
}

fn decision(stored: &RolloutDecision) -> Decision {
    Decision {
        at: stored.time.0,
        revision: stored.revision.clone(),
        decision: stored.decision.clone(),
        reason: stored.reason.clone(),
        message: stored.message.clone(),
    }
}

fn stored_decision(decision: &Decision) -> RolloutDecision {
    RolloutDecision {
        time: Time(whole_seconds(decision.at)),
        revision: decision.revision.clone(),
        decision: decision.decision.clone(),
        reason: decision.reason.clone(),
        message: decision.message.clone(),
    }
}

/// As the API server stores it.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use std::time::Duration;
    use trustformers_proto::control::v1::LatencyHistogram;

    use super::super::analysis::SampleKey;
    use super::super::state::own_pool;
    use super::super::window::{ProcessTally, Tally};
    use crate::counts::Histogram;

    fn state() -> RolloutState {
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        RolloutState {
            phase: RolloutPhase::Shifting,
            since: at,
            stable: Some(own_pool("r1")),
            candidate: Some(own_pool("r2")),
            previous: None,
            retiring: vec![Retiring { member: own_pool("r0"), failed: true }],
            refused: Some("r0".to_owned()),
            placement: Placement::DrainFirst,
            step: 1,
            reached: true,
            weight: 50,
            base: 4,
            restarts: BTreeMap::from([("p".to_owned(), 2)]),
            attempt: 3,
            forced: true,
            reason: "Holding".to_owned(),
            message: "99 of 100 requests".to_owned(),
            held: true,
            window: Some(window()),
            consumed: [(Command::Promote, CommandText("r2/1".to_owned()))].into(),
            history: vec![Decision {
                at,
                revision: "r0".to_owned(),
                decision: "RolledBack".to_owned(),
                reason: "ErrorRate".to_owned(),
                message: "5 of 10".to_owned(),
            }],
        }
    }

    fn window() -> SampleWindow {
        let answered = |requests, errors| {
            let mut tally = Tally { requests, errors, latency: Histogram::default() };
            for latency_ms in [1, 90, 90, 4000] {
                tally.latency.observe(Duration::from_millis(latency_ms));
            }
            // The sum of latencies is not stored: nothing is decided by a mean.
            Tally { latency: Histogram::from(&wire(&tally.latency)), ..tally }
        };
        let wire_sums = ProcessTally { candidate: answered(7, 1), stable: answered(900, 0) };
        SampleWindow {
            key: SampleKey { revision: "r2".to_owned(), step: 1, attempt: 3 },
            stable_revision: "r1".to_owned(),
            candidate: answered(5, 1),
            stable: Tally::default(),
            processes: [("p".to_owned(), wire_sums)].into(),
        }
    }

    fn wire(histogram: &Histogram) -> LatencyHistogram {
        LatencyHistogram::of_buckets(histogram.bucket_counts(), 0)
    }

    #[test]
    fn limits_and_prompts_of_the_spec_become_the_policy() {
        let rollout: Rollout = serde_yaml::from_str(
            "analysis: {maxLatencyRatio: 1.2, goldenPrompts: [{prompt: '2 + 2 =', expect: ' 4'}]}",
        )
        .unwrap();
        let policy = RolloutPolicy::of(&rollout).unwrap();
        let limits =
            AnalysisLimits { max_error_rate: Some(0.01), max_latency_ratio: Some(1.2), min_requests: 200 };
        assert_eq!(policy.analysis, Some(limits));
        let prompt = GoldenPrompt { prompt: "2 + 2 =".to_owned(), expect: " 4".to_owned() };
        assert_eq!(policy.golden_prompts, [prompt]);
        assert_eq!(RolloutPolicy::of(&Rollout::default()).unwrap().analysis, None);
    }

    /// As it comes back from the API server.
    fn read_back(status: &InferenceModelStatus) -> InferenceModelStatus {
        serde_json::from_str(&serde_json::to_string(status).unwrap()).unwrap()
    }

    #[test]
    fn a_stored_state_is_read_back() {
        for phase in RolloutPhase::ALL {
            let state = RolloutState { phase, ..state() };
            let mut status = InferenceModelStatus::default();
            state.store(&mut status);
            assert_eq!(RolloutState::of(&read_back(&status)), state);
        }
        let promoted = RolloutState {
            phase: RolloutPhase::Promoted,
            candidate: None,
            previous: Some(own_pool("r1")),
            weight: 0,
            step: 0,
            ..state()
        };
        let mut status = InferenceModelStatus::default();
        promoted.store(&mut status);
        assert_eq!(RolloutState::of(&read_back(&status)), promoted);
        // In place: the pods of an earlier revision hold all of them.
        let in_r1 = |revision: &str| Member { revision: revision.to_owned(), pool: "r1".to_owned() };
        let in_place = RolloutState {
            placement: Placement::InPlace,
            stable: Some(in_r1("r2")),
            candidate: Some(in_r1("r3")),
            previous: Some(own_pool("r1")),
            retiring: vec![Retiring { member: in_r1("r0"), failed: false }],
            ..state()
        };
        let mut status = InferenceModelStatus::default();
        in_place.store(&mut status);
        assert_eq!(RolloutState::of(&read_back(&status)), in_place);
    }

    #[test]
    fn a_model_that_was_never_rolled_out_stores_its_stable_revision_only() {
        let mut status = InferenceModelStatus::default();
        RolloutState { stable: Some(own_pool("r1")), ..RolloutState::default() }.store(&mut status);
        assert_eq!(status.rollout, None);
        assert_eq!(status.stable.unwrap().revision, "r1");
    }

    #[test]
    fn digests_follow_their_revisions() {
        let mut status = InferenceModelStatus::default();
        state().store(&mut status);
        status.candidate.as_mut().unwrap().digest = Some("d2".to_owned());
        let promoted = RolloutState {
            stable: Some(own_pool("r2")),
            candidate: None,
            previous: Some(own_pool("r1")),
            ..state()
        };
        promoted.store(&mut status);
        assert_eq!(status.stable.unwrap().digest.as_deref(), Some("d2"));
        assert_eq!(status.previous.unwrap().digest, None);
    }
}
