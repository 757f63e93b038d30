//! Faults in the middle of a rollout: an operator that dies after any write, commands that cross a change, an
//! autoscaler, pods that are evicted, and accelerators that go away.

use super::*;

/// What follows from one pass: the phase, the pods of each pool and the share of each revision.
#[derive(Debug, PartialEq)]
struct Pass {
    phase: RolloutPhase,
    sizes: Vec<(String, u32)>,
    shares: Vec<(String, u32)>,
}

fn owned(pairs: Vec<(&str, u32)>) -> Vec<(String, u32)> {
    pairs.into_iter().map(|(name, number)| (name.to_owned(), number)).collect()
}

/// The state as another operator reads it from the status.
fn read_back(state: &RolloutState) -> RolloutState {
    let mut status = trustformers_crds::InferenceModelStatus::default();
    state.store(&mut status);
    RolloutState::of(&serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap())
}

/// Passes until nothing changes; with `dies`, each one is made by an operator that knows the status alone.
fn passes(case: &mut RolloutCase, dies: bool, log: &mut Vec<Pass>) {
    for _ in 0..20 {
        if dies {
            case.state = read_back(&case.state);
        }
        let before = case.state.clone();
        let outcome = case.pass();
        log.push(Pass {
            phase: case.state.phase,
            sizes: owned(sizes(&outcome)),
            shares: owned(shares(&outcome)),
        });
        if case.state == before {
            return;
        }
    }
    panic!("no end: {:?}", case.state);
}

/// A rollout that is promoted, and undone while it bakes.
fn whole_rollout(dies: bool) -> Vec<Pass> {
    let mut case = RolloutCase::changed();
    let mut log = Vec::new();
    passes(&mut case, dies, &mut log);
    case.serve("r2", 1);
    (case.errors, case.requests) = (Some(0), 1000);
    passes(&mut case, dies, &mut log);
    for pods in [2, 4] {
        case.at_s += 120;
        passes(&mut case, dies, &mut log);
        case.serve("r2", pods);
        passes(&mut case, dies, &mut log);
    }
    assert_eq!(case.state.phase, RolloutPhase::Promoted, "{:?}", case.state);
    case.commands.insert(Command::Undo, CommandText("r2".to_owned()));
    passes(&mut case, dies, &mut log);
    case.unrouted.insert("r2".to_owned());
    passes(&mut case, dies, &mut log);
    assert_eq!(case.state.phase, RolloutPhase::RolledBack, "{:?}", case.state);
    log
}

#[test]
fn an_operator_that_dies_after_any_write_is_followed_by_one_that_does_the_same() {
    assert_eq!(whole_rollout(true), whole_rollout(false));
}

#[test]
fn promote_and_abort_together_with_a_new_spec_start_the_new_revision() {
    let mut case = RolloutCase::shifting();
    for command in [Command::Promote, Command::Abort] {
        case.commands.insert(command, CommandText("r2".to_owned()));
    }
    case.desired = "r3".to_owned();
    case.run();
    // Requests leave the candidate that is aborted.
    case.unrouted.insert("r2".to_owned());
    case.serve("r2", 0);
    let outcome = case.run();
    let candidate = case.state.candidate.as_ref().map(|one| one.revision.as_str());
    assert_eq!((candidate, case.state.step, case.state.forced), (Some("r3"), 0, false));
    assert_eq!(shares(&outcome), [("r1", 10_000)], "it gets no request before its pods serve");
    // The commands were about r2 alone.
    case.serve("r3", 1);
    (case.errors, case.requests) = (Some(0), 1000);
    case.run();
    assert_eq!((case.state.phase, case.state.weight), (RolloutPhase::Shifting, 25));
}

#[test]
fn a_candidate_whose_pods_are_evicted_at_90_percent_gives_its_requests_back() {
    let mut case = RolloutCase::changed();
    case.policy.steps = vec![ShiftStep { weight_percent: 90, hold: Duration::from_secs(600) }];
    case.run();
    case.serve("r2", 4);
    (case.errors, case.requests) = (Some(0), 1000);
    assert_eq!(shares(&case.run()), [("r1", 1_000), ("r2", 9_000)]);
    case.loads("r2").routable = 1;
    assert_eq!(shares(&case.run()), [("r1", 7_500), ("r2", 2_500)], "one of four pods takes a quarter");
    case.loads("r2").routable = 0;
    assert_eq!(shares(&case.run()), [("r1", 10_000)]);
    assert!(case.state.candidate.is_some(), "its pods may come back");
}

#[test]
fn an_autoscaler_scales_the_stable_revision_in_an_abort() {
    let mut case = RolloutCase::shifting();
    case.command(Command::Abort, "r2");
    case.replicas = 8;
    let outcome = case.run();
    assert!(sizes(&outcome).contains(&("r1", 8)), "{outcome:?}");
    case.serve("r1", 8);
    case.unrouted.insert("r2".to_owned());
    case.serve("r2", 0);
    case.run();
    assert_eq!(case.state.phase, RolloutPhase::RolledBack);
    // An aborted revision stays without pods when the model is scaled.
    case.replicas = 10;
    let outcome = case.run();
    assert!(sizes(&outcome).iter().all(|(pool, pods)| *pool == "r1" || *pods == 0), "{outcome:?}");
    assert!(sizes(&outcome).contains(&("r1", 10)), "{outcome:?}");
}

#[test]
fn an_autoscaler_scales_the_promoted_revision_while_it_bakes() {
    let mut case = RolloutCase::promoted();
    case.replicas = 8;
    let outcome = case.run();
    assert!(sizes(&outcome).contains(&("r2", 8)), "{outcome:?}");
    // Four pods serve half of what eight are asked for: those of the previous revision help until more serve.
    assert_eq!(shares(&outcome), [("r1", 5_000), ("r2", 5_000)]);
}

#[test]
fn accelerators_that_go_away_in_a_surge_make_pods_end_first() {
    let mut case = RolloutCase::shifting();
    // Four pods and one more: the next step needs two of the candidate.
    case.budget = Some(5);
    let outcome = case.wait_s(120);
    assert_eq!(case.state.placement, Placement::DrainFirst, "{:?}", case.state);
    let pods: u32 = sizes(&outcome).iter().map(|(_, pods)| pods).sum();
    assert!(pods <= 5, "{outcome:?}");
}
