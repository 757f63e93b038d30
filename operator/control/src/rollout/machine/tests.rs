//! Transitions of a rollout, each by name; the facts are written by hand.

use super::super::analysis::{AnalysisLimits, RequestSample, SampleKey, StepSample};
use super::super::{
    Command, CommandText, PodCommand, PoolFacts, PoolSize, RolloutPolicy, ShiftStep, StepOutcome, step,
};
use super::*;
use crate::causes::Cause;
use std::collections::{BTreeMap, BTreeSet};

mod faults;

/// A model, and what a test changes about it.
struct RolloutCase {
    state: RolloutState,
    desired: String,
    replicas: u32,
    max_unavailable: u32,
    policy: RolloutPolicy,
    in_place: Result<(), String>,
    budget: Option<u32>,
    pools: BTreeMap<String, PoolFacts>,
    revisions: BTreeMap<String, RevisionFacts>,
    unrouted: BTreeSet<String>,
    errors: Option<u64>,
    requests: u64,
    commands: BTreeMap<Command, CommandText>,
    at_s: i64,
}

impl RolloutCase {
    /// `r1` serves with four pods; the spec names `r2`, with steps of 25 and 50 percent.
    fn changed() -> Self {
        let steps = vec![
            ShiftStep { weight_percent: 25, hold: Duration::from_secs(120) },
            ShiftStep { weight_percent: 50, hold: Duration::from_secs(120) },
        ];
        let limits =
            AnalysisLimits { max_error_rate: Some(0.01), max_latency_ratio: None, min_requests: 100 };
        let policy = RolloutPolicy {
            steps,
            analysis: Some(limits),
            bake: Duration::from_secs(600),
            history_limit: 5,
            ..RolloutPolicy::default()
        };
        let mut case = Self {
            state: RolloutState { stable: Some(own_pool("r1")), ..RolloutState::default() },
            desired: "r2".to_owned(),
            replicas: 4,
            max_unavailable: 1,
            policy,
            in_place: Err("the image of a running pod is fixed".to_owned()),
            budget: None,
            pools: BTreeMap::new(),
            revisions: BTreeMap::new(),
            unrouted: BTreeSet::new(),
            errors: None,
            requests: 0,
            commands: BTreeMap::new(),
            at_s: 1_000_000,
        };
        case.serve("r1", 4);
        case
    }

    /// Pods of the revision's own pool that serve it.
    fn serve(&mut self, revision: &str, pods: u32) {
        self.pools.insert(revision.to_owned(), PoolFacts { replicas: pods, pods, terminating: 0 });
        self.revisions.entry(revision.to_owned()).or_default().routable = pods;
    }

    fn loads(&mut self, revision: &str) -> &mut RevisionFacts {
        self.revisions.entry(revision.to_owned()).or_default()
    }

    fn pass(&mut self) -> StepOutcome {
        let sample = self.errors.and_then(|errors| {
            let candidate = RequestSample { requests: self.requests, errors, latency: Vec::new() };
            let key = self.state.sample_key()?;
            Some(StepSample { key, candidate, stable: RequestSample::default() })
        });
        let facts = RolloutFacts {
            desired: &self.desired,
            replicas: self.replicas,
            max_unavailable: self.max_unavailable,
            policy: &self.policy,
            in_place: self.in_place.clone(),
            budget: self.budget,
            pools: self.pools.clone(),
            revisions: self.revisions.clone(),
            unrouted: self.unrouted.clone(),
            sample: sample.as_ref(),
            commands: self.commands.clone(),
        };
        let outcome = step(&self.state, &facts, Timestamp::from_second(self.at_s).unwrap());
        self.state = outcome.state.clone();
        outcome
    }

    /// Passes until the state is the same twice.
    fn run(&mut self) -> StepOutcome {
        for _ in 0..20 {
            let before = self.state.clone();
            let outcome = self.pass();
            if self.state == before {
                return outcome;
            }
        }
        panic!("no end: {:?}", self.state);
    }

    fn wait_s(&mut self, seconds: i64) -> StepOutcome {
        self.at_s += seconds;
        self.run()
    }

    fn command(&mut self, command: Command, text: &str) -> StepOutcome {
        self.commands.insert(command, CommandText(text.to_owned()));
        self.run()
    }

    /// At 25 percent, with enough good requests.
    fn shifting() -> Self {
        let mut case = Self::changed();
        case.run();
        case.serve("r2", 1);
        (case.errors, case.requests) = (Some(0), 1000);
        case.run();
        assert_eq!((case.state.phase, case.state.weight), (RolloutPhase::Shifting, 25));
        case
    }

    fn promoted() -> Self {
        let mut case = Self::shifting();
        case.wait_s(120);
        case.serve("r2", 2);
        case.run();
        case.wait_s(120);
        case.serve("r2", 4);
        case.run();
        assert_eq!(case.state.phase, RolloutPhase::Promoted, "{:?}", case.state);
        case
    }
}

fn sizes(outcome: &StepOutcome) -> Vec<(&str, u32)> {
    outcome.pools.iter().map(|PoolSize { pool, replicas }| (pool.as_str(), *replicas)).collect()
}

fn shares(outcome: &StepOutcome) -> Vec<(&str, u32)> {
    let mut shares: Vec<_> = outcome.split.iter().map(|one| (one.revision.as_str(), one.weight)).collect();
    shares.sort_unstable();
    shares
}

#[test]
fn a_good_candidate_is_shifted_step_by_step_and_promoted() {
    let mut case = RolloutCase::changed();
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.placement), (RolloutPhase::Placing, Placement::Surge));
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 1)]);
    assert_eq!(shares(&outcome), [("r1", 10_000)]);

    case.loads("r2").loading = 1;
    case.run();
    assert_eq!(case.state.phase, RolloutPhase::Loading);
    *case.loads("r2") = RevisionFacts { warming: 1, ..RevisionFacts::default() };
    case.run();
    assert_eq!(case.state.phase, RolloutPhase::Warming);
    *case.loads("r2") = RevisionFacts::default();
    case.serve("r2", 1);
    let outcome = case.run();
    assert_eq!(shares(&outcome), [("r1", 7_500), ("r2", 2_500)]);

    (case.errors, case.requests) = (Some(0), 1000);
    case.wait_s(119);
    assert_eq!((case.state.step, case.state.reason.as_str()), (0, "Holding"));
    let outcome = case.wait_s(1);
    assert_eq!((case.state.step, case.state.weight), (1, 50));
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 2)]);
    assert_eq!(shares(&outcome), [("r1", 7_500), ("r2", 2_500)], "its pods can take a quarter");
    case.serve("r2", 2);
    assert_eq!(shares(&case.run()), [("r1", 5_000), ("r2", 5_000)]);
    let outcome = case.wait_s(120);
    assert_eq!(case.state.phase, RolloutPhase::Verifying);
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 4)]);
    case.serve("r2", 4);
    let outcome = case.run();
    assert_eq!(case.state.phase, RolloutPhase::Promoted);
    assert_eq!(shares(&outcome), [("r2", 10_000)]);
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 4)], "the previous revision stays ready");

    case.wait_s(600);
    assert_eq!(case.state.phase, RolloutPhase::Done);
    case.unrouted.insert("r1".to_owned());
    assert_eq!(sizes(&case.run()), [("r1", 0), ("r2", 4)]);
    case.pools.remove("r1");
    case.revisions.remove("r1");
    assert_eq!(sizes(&case.run()), [("r2", 4)]);
    assert!(case.state.retiring.is_empty());
    let decisions: Vec<_> = case.state.history.iter().map(|one| one.decision.as_str()).collect();
    assert_eq!(decisions, ["Passed", "Passed", "Promoted"]);
}

#[test]
fn no_pod_of_a_retired_revision_ends_before_gateways_acknowledge() {
    let mut case = RolloutCase::promoted();
    case.wait_s(600);
    assert_eq!(sizes(&case.run()), [("r1", 4), ("r2", 4)]);
    case.unrouted.insert("r1".to_owned());
    assert_eq!(sizes(&case.run()), [("r1", 0), ("r2", 4)]);
}

#[test]
fn too_little_traffic_holds_however_long_it_takes() {
    let mut case = RolloutCase::shifting();
    case.requests = 99;
    case.wait_s(100_000);
    assert_eq!((case.state.step, case.state.reason.as_str()), (0, "Inconclusive"));
    assert_eq!(case.state.message, "99 of 100 requests");
    case.requests = 100;
    case.run();
    assert_eq!(case.state.step, 1);
}

#[test]
fn a_sample_of_another_step_says_nothing() {
    let mut case = RolloutCase::shifting();
    let key = SampleKey { step: 7, ..case.state.sample_key().unwrap() };
    let candidate = RequestSample { requests: 1000, errors: 1000, latency: Vec::new() };
    let sample = StepSample { key, candidate, stable: RequestSample::default() };
    let machine = Machine {
        state: case.state.clone(),
        facts: &RolloutFacts {
            desired: "r2",
            replicas: 4,
            max_unavailable: 1,
            policy: &case.policy,
            in_place: Ok(()),
            budget: None,
            pools: case.pools.clone(),
            revisions: case.revisions.clone(),
            unrouted: BTreeSet::new(),
            sample: Some(&sample),
            commands: BTreeMap::new(),
        },
        now: Timestamp::from_second(case.at_s).unwrap(),
    };
    assert!(matches!(machine.verdict(), Some(Verdict::Inconclusive { .. })));
    // And a candidate that starts again has another key.
    case.serve("r2", 0);
    let before = case.state.sample_key();
    case.run();
    assert_ne!(case.state.sample_key(), before);
}

#[test]
fn errors_start_a_rollback_and_the_revision_is_not_tried_again_by_itself() {
    let mut case = RolloutCase::shifting();
    case.errors = Some(100);
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::RollingBack, "ErrorRate"));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
    case.unrouted.insert("r2".to_owned());
    assert_eq!(sizes(&case.run()), [("r1", 4), ("r2", 0)]);
    case.pools.remove("r2");
    case.revisions.remove("r2");
    case.wait_s(10_000);
    assert_eq!(case.state.phase, RolloutPhase::RolledBack);
    assert!(
        case.state.history[0].message.contains("100 of 1000 requests failed"),
        "{:?}",
        case.state.history
    );
    // It stays at no pod when the model is scaled.
    case.replicas = 6;
    case.serve("r1", 4);
    assert_eq!(sizes(&case.run()), [("r1", 6)]);
    // Another revision is tried.
    case.desired = "r3".to_owned();
    case.serve("r1", 6);
    assert_eq!(sizes(&case.run()), [("r1", 6), ("r3", 2)]);
}

#[test]
fn a_broken_candidate_rolls_back_with_the_pods_own_reason() {
    let mut case = RolloutCase::changed();
    case.run();
    let cause = Cause { reason: "DigestMismatch".to_owned(), message: "another file".to_owned() };
    case.loads("r2").failure = Some(cause);
    case.run();
    // It has no pod that would have to end first.
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::RolledBack, "DigestMismatch"));

    let mut case = RolloutCase::shifting();
    case.loads("r2").restarts.insert("p".to_owned(), RESTARTS_TO_FAIL);
    case.run();
    assert_eq!(case.state.reason, "Crashing");
}

#[test]
fn on_failure_hold_waits_for_a_person() {
    let mut case = RolloutCase::shifting();
    case.policy.on_failure = OnFailure::Hold;
    case.errors = Some(100);
    case.wait_s(10_000);
    assert_eq!((case.state.phase, case.state.weight, case.state.held), (RolloutPhase::Shifting, 25, true));
    let mut promoted =
        RolloutCase { state: case.state.clone(), policy: case.policy.clone(), ..RolloutCase::shifting() };
    promoted.command(Command::Promote, "r2");
    assert_eq!(promoted.state.phase, RolloutPhase::Verifying);
    case.command(Command::Abort, "r2");
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::RollingBack, "Aborted"));
}

#[test]
fn a_revert_in_the_middle_returns_to_the_stable_revision() {
    let mut case = RolloutCase::shifting();
    case.desired = "r1".to_owned();
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::RollingBack, "Reverted"));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
    case.unrouted.insert("r2".to_owned());
    case.run();
    assert_eq!((case.state.phase, case.state.refused.as_deref()), (RolloutPhase::Done, None));
    // Its candidate is tried again from the first step.
    case.desired = "r2".to_owned();
    case.unrouted.clear();
    case.serve("r2", 0);
    case.run();
    assert_eq!((case.state.phase, case.state.step), (RolloutPhase::Placing, 0));
}

#[test]
fn a_second_change_retires_the_first_candidate_and_starts_from_the_first_step() {
    let mut case = RolloutCase::shifting();
    case.wait_s(120);
    case.serve("r2", 2);
    case.run();
    assert_eq!(case.state.weight, 50);
    case.desired = "r3".to_owned();
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.weight, case.state.step), (RolloutPhase::Placing, 0, 0));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 2), ("r3", 1)], "gateways have not acknowledged yet");
    case.unrouted.insert("r2".to_owned());
    assert_eq!(sizes(&case.run()), [("r1", 4), ("r2", 0), ("r3", 1)]);
}

#[test]
fn a_stable_revision_with_too_few_pods_shares_with_a_candidate_that_retires() {
    let mut case = RolloutCase::shifting();
    case.serve("r2", 4);
    case.serve("r1", 1);
    case.desired = "r1".to_owned();
    assert_eq!(shares(&case.run()), [("r1", 2_500), ("r2", 7_500)]);
    // A failed one gets nothing while the stable revision has a pod, and all while it has none.
    let mut case = RolloutCase::shifting();
    case.serve("r1", 1);
    case.errors = Some(500);
    assert_eq!(shares(&case.run()), [("r1", 10_000)]);
    case.serve("r1", 0);
    assert_eq!(shares(&case.run()), [("r2", 10_000)]);
}

#[test]
fn admission_follows_the_pods_that_serve_now() {
    let mut case = RolloutCase::shifting();
    case.serve("r2", 0);
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.weight), (RolloutPhase::Placing, 0));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
}

#[test]
fn a_stable_revision_that_does_not_serve_is_not_waited_for() {
    let mut case = RolloutCase::changed();
    case.serve("r1", 0);
    case.run();
    case.serve("r2", 1);
    let outcome = case.run();
    assert_eq!(case.state.phase, RolloutPhase::Verifying);
    assert_eq!(shares(&outcome), [("r2", 10_000)]);
}

#[test]
fn abort_wins_over_undo_and_promote_and_each_is_followed_one_time() {
    let mut case = RolloutCase::shifting();
    for (command, text) in [(Command::Promote, "r2"), (Command::Abort, "r2"), (Command::Undo, "r2")] {
        case.commands.insert(command, CommandText(text.to_owned()));
    }
    case.run();
    assert_eq!(case.state.reason, "Aborted");
    case.unrouted.insert("r2".to_owned());
    case.serve("r2", 0);
    case.run();
    assert_eq!(case.state.phase, RolloutPhase::RolledBack);
    // Another nonce repeats a command: the revision is tried again.
    case.command(Command::Promote, "r2/again");
    assert_eq!(case.state.phase, RolloutPhase::Placing);
}

#[test]
fn abort_without_a_candidate_changes_nothing() {
    let mut case = RolloutCase::changed();
    case.desired = "r1".to_owned();
    case.run();
    let outcome = case.command(Command::Abort, "r1");
    assert_eq!((case.state.phase, sizes(&outcome)), (RolloutPhase::Done, vec![("r1", 4)]));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
}

#[test]
fn promote_skips_steps_and_limits_but_not_the_pods() {
    let mut case = RolloutCase::shifting();
    case.requests = 0;
    let outcome = case.command(Command::Promote, "r2");
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 4)]);
    assert_eq!(shares(&outcome), [("r1", 7_500), ("r2", 2_500)], "its pod can take a quarter");
    case.serve("r2", 4);
    case.run();
    assert_eq!(case.state.phase, RolloutPhase::Promoted);
}

#[test]
fn undo_returns_to_the_previous_revision_while_it_is_ready() {
    let mut case = RolloutCase::promoted();
    let outcome = case.command(Command::Undo, "r2");
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
    case.unrouted.insert("r2".to_owned());
    case.run();
    assert_eq!((case.state.phase, case.state.refused.as_deref()), (RolloutPhase::RolledBack, Some("r2")));
}

#[test]
fn errors_while_the_previous_revision_is_ready_return_to_it() {
    let mut case = RolloutCase::promoted();
    case.errors = Some(500);
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::RollingBack, "ErrorRate"));
    assert_eq!(shares(&outcome), [("r1", 10_000)]);
}

#[test]
fn errors_while_the_previous_revision_is_ready_wait_for_a_person_with_hold() {
    let mut case = RolloutCase::promoted();
    case.policy.on_failure = OnFailure::Hold;
    case.errors = Some(500);
    case.run();
    assert_eq!((case.state.phase, case.state.held), (RolloutPhase::Promoted, true));
    assert_eq!(case.state.history.last().unwrap().decision, "Held");
    case.wait_s(10_000);
    assert_eq!(case.state.phase, RolloutPhase::Promoted, "the previous revision stays ready");
    assert_eq!(case.state.history.iter().filter(|one| one.decision == "Held").count(), 1);
    case.command(Command::Undo, "r2");
    assert_eq!((case.state.phase, case.state.held), (RolloutPhase::RollingBack, false));
}

#[test]
fn a_return_to_the_stable_revision_ends_what_waits_for_a_person() {
    let mut case = RolloutCase::shifting();
    case.policy.on_failure = OnFailure::Hold;
    case.errors = Some(100);
    case.run();
    assert!(case.state.held);
    case.desired = "r1".to_owned();
    case.run();
    assert_eq!((case.state.reason.as_str(), case.state.held), ("Reverted", false));
}

#[test]
fn a_return_to_the_previous_revision_uses_its_pods() {
    let mut case = RolloutCase::promoted();
    case.desired = "r1".to_owned();
    let outcome = case.run();
    assert_eq!((case.state.phase, case.state.weight), (RolloutPhase::Shifting, 25));
    assert_eq!(shares(&outcome), [("r1", 2_500), ("r2", 7_500)]);
}

#[test]
fn without_room_a_pod_is_drained_first() {
    let mut case = RolloutCase::changed();
    case.budget = Some(4);
    let outcome = case.run();
    assert_eq!(case.state.placement, Placement::DrainFirst);
    assert_eq!(sizes(&outcome), [("r1", 3), ("r2", 0)]);
    case.pools.insert("r1".to_owned(), PoolFacts { replicas: 3, pods: 3, terminating: 1 });
    case.loads("r1").routable = 3;
    assert_eq!(sizes(&case.run()), [("r1", 3), ("r2", 0)], "the pod that ends still has its device");
    case.serve("r1", 3);
    assert_eq!(sizes(&case.run()), [("r1", 3), ("r2", 1)]);
}

#[test]
fn without_room_and_without_a_pod_to_spare_the_status_says_what_is_missing() {
    let mut case = RolloutCase::changed();
    (case.budget, case.max_unavailable) = (Some(4), 0);
    let outcome = case.wait_s(10_000);
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::Pending, "NoCapacity"));
    assert!(case.state.message.contains("needs 1 pod(s)") && case.state.message.contains("room for 0"));
    assert_eq!(sizes(&outcome), [("r1", 4), ("r2", 0)]);
}

#[test]
fn a_surge_that_no_node_takes_becomes_drain_first() {
    let mut case = RolloutCase::changed();
    case.run();
    case.pools.insert("r2".to_owned(), PoolFacts { replicas: 1, pods: 1, terminating: 0 });
    case.loads("r2").unschedulable_since = Timestamp::from_second(case.at_s).ok();
    case.wait_s(59);
    assert_eq!(case.state.placement, Placement::Surge);
    let outcome = case.wait_s(1);
    assert_eq!(case.state.placement, Placement::DrainFirst);
    assert_eq!(sizes(&outcome), [("r1", 3), ("r2", 1)]);
    // With a placement of its own choice the model waits.
    let mut case = RolloutCase::changed();
    case.policy.placement = Some(Placement::Surge);
    case.run();
    case.loads("r2").unschedulable_since = Timestamp::from_second(case.at_s).ok();
    case.wait_s(600);
    assert_eq!((case.state.placement, case.state.reason.as_str()), (Placement::Surge, "NoCapacity"));
}

#[test]
fn an_autoscaler_scales_the_stable_revision_at_once_and_the_candidate_with_its_next_step() {
    let mut case = RolloutCase::shifting();
    case.replicas = 8;
    assert_eq!(sizes(&case.run()), [("r1", 8), ("r2", 1)]);
    case.serve("r1", 8);
    assert_eq!(sizes(&case.wait_s(120)), [("r1", 8), ("r2", 4)]);
}

#[test]
fn in_place_loads_the_candidate_into_the_pods_of_the_stable_revision() {
    let mut case = RolloutCase::changed();
    case.in_place = Ok(());
    let load = PodCommand::Load { pool: "r1".to_owned(), revision: "r2".to_owned() };
    let outcome = case.run();
    assert_eq!((sizes(&outcome), outcome.commands.clone()), (vec![("r1", 4)], vec![load]));
    (case.errors, case.requests) = (Some(0), 1000);
    case.loads("r2").routable = 4;
    case.run();
    case.wait_s(120);
    case.wait_s(120);
    let swap = PodCommand::Swap { pool: "r1".to_owned(), revision: "r2".to_owned() };
    assert_eq!((case.state.phase, case.run().commands), (RolloutPhase::Promoted, vec![swap.clone()]));
    case.wait_s(600);
    case.unrouted.insert("r1".to_owned());
    let unload = PodCommand::Unload { pool: "r1".to_owned(), revision: "r1".to_owned() };
    let outcome = case.run();
    assert_eq!((sizes(&outcome), outcome.commands.clone()), (vec![("r1", 4)], vec![swap, unload]));
}

#[test]
fn new_pods_of_the_revision_that_a_swapped_pool_is_named_after_are_a_pool_of_their_own() {
    let mut case = RolloutCase::changed();
    case.state.stable = Some(Member { revision: "r2".to_owned(), pool: "r1".to_owned() });
    case.revisions.clear();
    case.loads("r2").routable = 4;
    case.desired = "r1".to_owned();
    let outcome = case.run();
    assert_eq!(sizes(&outcome), [("r1", 4), ("r1-1", 1)]);
    assert_eq!((case.state.placement, case.state.pool_of("r1")), (Placement::Surge, "r1-1"));
    let swap = PodCommand::Swap { pool: "r1".to_owned(), revision: "r2".to_owned() };
    assert_eq!(outcome.commands, [swap], "the pods that serve load nothing");
}

#[test]
fn an_image_volume_cannot_change_in_a_running_pod() {
    let mut case = RolloutCase::changed();
    case.policy.placement = Some(Placement::InPlace);
    case.run();
    assert_eq!((case.state.phase, case.state.reason.as_str()), (RolloutPhase::Pending, "CannotLoadInPlace"));
    assert_eq!(case.state.message, "the image of a running pod is fixed");
}

#[test]
fn a_first_revision_has_no_steps_and_is_replaced_at_once() {
    let mut case = RolloutCase::changed();
    (case.state, case.desired) = (RolloutState::default(), "r1".to_owned());
    case.pools.clear();
    case.revisions.clear();
    let outcome = case.run();
    assert_eq!((sizes(&outcome), &case.state), (vec![("r1", 4)], &RolloutState::default()));
    // It never serves; the next one does.
    case.pools.insert("r1".to_owned(), PoolFacts { replicas: 4, pods: 4, terminating: 0 });
    case.desired = "r2".to_owned();
    assert_eq!(sizes(&case.run()), [("r1", 0), ("r2", 4)]);
    case.serve("r2", 4);
    case.pools.remove("r1");
    case.run();
    assert_eq!(case.state.stable, Some(own_pool("r2")));
}

#[test]
fn a_stopped_model_rolls_nothing_out() {
    let mut case = RolloutCase::shifting();
    case.replicas = 0;
    assert_eq!(sizes(&case.run()), [("r1", 0), ("r2", 0)]);
}
