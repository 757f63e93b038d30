//! A test step by step: its beginning, its ramp, a variant that moves, its promotion, and its Events.

use std::collections::BTreeSet;

use k8s_openapi::jiff::SignedDuration;
use serde_json::{Value, json};
use trustformers_crds::{Metric, MetricStatus, OwnerRange};

use super::super::sample::VariantSums;
use super::super::validate::tests::{spec, stored};
use super::super::validate::validate;
use super::*;

fn test(more: &str) -> ValidatedTest {
    validate(&stored(&spec(more))).unwrap()
}

fn facts<const VARIANTS: usize>(revisions: [&str; VARIANTS]) -> TestFacts {
    let revisions = revisions.map(str::to_owned).to_vec();
    TestFacts {
        conflict: None,
        waiting: None,
        revisions,
        replicas: vec![1; VARIANTS],
        checkpoint_error: None,
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap().checked_add(SignedDuration::from_secs(second)).unwrap()
}

fn stepped(test: &ValidatedTest, stored: &ABTestStatus, facts: &TestFacts, second: i64) -> ABTestStatus {
    step(&StepInputs { test, stored, facts, samples: None, now: at(second) })
}

fn reason(status: &ABTestStatus, kind: &str) -> (String, String) {
    let found = status.conditions.iter().find(|one| one.type_ == kind).unwrap();
    (found.status.clone(), found.reason.clone())
}

fn pair(one: &str, other: &str) -> (String, String) {
    (one.to_owned(), other.to_owned())
}

#[test]
fn the_first_status_of_a_test_is_this_one() {
    let status = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let mut found = serde_json::to_value(&status).unwrap();
    let conditions = found["conditions"].take();
    let words: Vec<String> = conditions
        .as_array()
        .unwrap()
        .iter()
        .map(|one| format!("{}={} {}", one["type"], one["status"], one["reason"]).replace('"', ""))
        .collect();
    assert_eq!(
        words,
        [
            "Accepted=True Accepted",
            "Serving=True Serving",
            "Sampling=True Started",
            "SamplesStored=True Stored"
        ]
    );
    found["samplesOf"].take();
    found["acceptedSpec"].take();
    let variant = |name: &str, revision: &str| {
        json!({"name": name, "revision": revision, "users": 0, "requests": 0, "errors": 0, "fallbacks": 0,
               "uncounted": 0, "tokens": 0, "replicas": 0, "scores": 0})
    };
    let began = "2027-01-15T08:00:00Z";
    let expected = json!({
        "observedGeneration": 1,
        "phase": "Running",
        "srm": "-",
        "weights": "90/10",
        "samples": 0,
        "startedAt": began,
        "rampStep": 0,
        "rampSince": began,
        "promoted": 0,
        "epochs": [{"epoch": 1_800_000_000, "since": began, "weights": [9000, 1000]}],
        "owners": [{"end": 9000, "variant": "control"}, {"end": 10_000, "variant": "treatment"}],
        "variants": [variant("control", "r1"), variant("treatment", "r2")],
        "samplesOf": Value::Null,
        "acceptedSpec": Value::Null,
        "restarts": 0,
        "conditions": Value::Null,
    });
    assert_eq!(found, expected);
}

#[test]
fn a_test_waits_for_its_variants_and_for_its_route() {
    let test = test("");
    let waits = stepped(&test, &ABTestStatus::default(), &facts(["r1", ""]), 0);
    assert_eq!((waits.phase, waits.epochs.len()), (Some(ABTestPhase::Pending), 0));
    assert_eq!(reason(&waits, "Serving"), pair("False", "VariantNotServing"));
    let conflict = TestConflict::RouteIsModel { route: "chat".to_owned() };
    let refused = TestFacts { conflict: Some(conflict), ..facts(["r1", "r2"]) };
    let refused = stepped(&test, &waits, &refused, 1);
    assert_eq!(reason(&refused, "Accepted"), pair("False", "RouteIsModel"));
    assert!(refused.epochs.is_empty());
    let begins = stepped(&test, &refused, &facts(["r1", "r2"]), 2);
    assert_eq!(begins.phase, Some(ABTestPhase::Running));
    // A variant that ends serving later keeps the test.
    let lost = stepped(&test, &begins, &facts(["r1", ""]), 3);
    assert_eq!((lost.phase, lost.epochs.len()), (Some(ABTestPhase::Running), 1));
    assert_eq!(lost.variants[1].revision, "r2");
    let back = stepped(&test, &lost, &facts(["r1", "r2"]), 4);
    assert_eq!(back.epochs, begins.epochs);
}

#[test]
fn a_ramp_moves_users_to_the_treatment_alone() {
    let test = test(", ramp: [{percent: 10, hold: 1h}, {percent: 50, hold: 1h}]");
    let serving = facts(["r1", "r2"]);
    let first = stepped(&test, &ABTestStatus::default(), &serving, 0);
    assert_eq!((first.phase, first.weights.as_deref()), (Some(ABTestPhase::Ramping), Some("99/1")));
    assert_eq!(wake_in(&test, &first, at(3590)), Duration::from_secs(10));
    assert_eq!(stepped(&test, &first, &serving, 3599).epochs.len(), 1);
    let second = stepped(&test, &first, &serving, 3600);
    assert_eq!((second.weights.as_deref(), second.epochs.len()), (Some("95/5"), 2));
    assert!(second.epochs[1].epoch > second.epochs[0].epoch);
    let last = stepped(&test, &second, &serving, 7200);
    assert_eq!((last.phase, last.weights.as_deref()), (Some(ABTestPhase::Running), Some("90/10")));
    let treatment = |status: &ABTestStatus| {
        let mut from = 0;
        let mut all = BTreeSet::new();
        for owner in &status.owners {
            if owner.variant == "treatment" {
                all.extend(from..owner.end);
            }
            from = owner.end;
        }
        all
    };
    assert!(treatment(&first).is_subset(&treatment(&second)));
    assert!(treatment(&second).is_subset(&treatment(&last)));
    assert_eq!(last.epochs.len(), 3);
}

#[test]
fn a_variant_that_moves_to_another_revision_restarts_the_samples_and_says_so() {
    let test = test("");
    let begins = stepped(&test, &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let moved = stepped(&test, &begins, &facts(["r1", "r2+r3"]), 60);
    assert_eq!(reason(&moved, "Sampling"), pair("True", "VariantChanged"));
    assert_eq!((moved.epochs.len(), moved.started_at.as_ref().unwrap().0), (1, at(60)));
    assert!(moved.epochs[0].epoch > begins.epochs[0].epoch);
    assert_eq!((moved.owners, moved.weights.as_deref()), (begins.owners.clone(), Some("90/10")));
    let moved = stepped(&test, &begins, &facts(["r1", "r3"]), 60);
    let notes = events(&begins, &moved);
    assert_eq!((notes.len(), notes[0].reason.as_str()), (1, "VariantChanged"));
    assert!(notes[0].note.contains("treatment from r2 to r3"), "{}", notes[0].note);
}

#[test]
fn other_weights_are_an_epoch_and_another_goal_begins_anew() {
    let begins = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let weights = spec("").replace("weight: 90", "weight: 80").replace("weight: 10", "weight: 20");
    let reweighed = stepped(&validate(&stored(&weights)).unwrap(), &begins, &facts(["r1", "r2"]), 60);
    assert_eq!((reweighed.epochs.len(), &reweighed.started_at), (2, &begins.started_at));
    let goal = validate(&stored(&spec("").replace("errorRate", "tokensPerSecond"))).unwrap();
    let anew = stepped(&goal, &reweighed, &facts(["r1", "r2"]), 120);
    assert_eq!((anew.epochs.len(), anew.started_at.unwrap().0), (1, at(120)));
}

#[test]
fn a_winner_is_promoted_in_two_steps() {
    let test = test(", onConclusion: Promote");
    let serving = facts(["r1", "r2"]);
    let mut won = stepped(&test, &ABTestStatus::default(), &serving, 0);
    won.phase = Some(ABTestPhase::Promoting);
    (won.winner, won.promoted) = (Some("treatment".to_owned()), 50);
    won.promoted_since = Some(Time(at(100)));
    let half = stepped(&test, &won, &serving, 101);
    assert_eq!((half.weights.as_deref(), half.phase), (Some("45/55"), Some(ABTestPhase::Promoting)));
    let whole = stepped(&test, &half, &serving, 160);
    assert_eq!((whole.weights.as_deref(), whole.promoted), (Some("0/100"), 100));
    assert_eq!(events(&half, &whole)[0].reason, "Promoted");
    let done = stepped(&test, &whole, &serving, 220);
    assert_eq!((done.phase, done.weights.as_deref()), (Some(ABTestPhase::Concluded), Some("0/100")));
    // It stays so.
    assert_eq!(stepped(&test, &done, &serving, 900).weights.as_deref(), Some("0/100"));
}

#[test]
fn a_spec_that_cannot_be_honoured_leaves_a_running_test_as_it_is() {
    let begins = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let refused = refused(&TestSpecError::MinDuration, 2, &begins, at(5));
    assert_eq!(reason(&refused, "Accepted"), pair("False", "InvalidSpec"));
    assert_eq!((refused.phase, refused.epochs.clone()), (begins.phase, begins.epochs.clone()));
    let notes = events(&begins, &refused);
    assert!(notes.len() == 1 && notes[0].warning && notes[0].reason == "InvalidSpec");
    assert!(events(&refused, &refused).is_empty());
}

fn planned(spec: &str, revisions: [&str; 2]) -> Planned {
    Planned { test: validate(&stored(spec)).unwrap(), facts: facts(revisions) }
}

#[test]
fn a_test_runs_by_its_last_good_spec_until_the_newest_can_be_honoured() {
    let running = || Some(planned(&spec(""), ["r1", "r2"]));
    let goal = spec("").replace("errorRate", "tokensPerSecond");
    // Refused, and without pods: the one before, which says why.
    let refused = plan(Err(TestSpecError::MinDuration), running()).unwrap();
    assert_eq!(
        (refused.test.goal.metric, refused.facts.waiting.unwrap().reason),
        (Metric::ErrorRate, "InvalidSpec")
    );
    let waits = plan(Ok(planned(&goal, ["r1", ""])), running()).unwrap();
    assert_eq!(waits.test.goal.metric, Metric::ErrorRate);
    let waiting = waits.facts.waiting.clone().unwrap();
    assert!(waiting.reason == "VariantNotServing" && waiting.message.contains("treatment"), "{waiting:?}");
    let good = plan(Ok(planned(&goal, ["r1", "r2"])), running()).unwrap();
    assert_eq!((good.test.goal.metric, good.facts.waiting), (Metric::TokensPerSecond, None));
    assert!(plan(Err(TestSpecError::MinDuration), None).is_err());

    // The status says so one time, and the ramp goes on meanwhile.
    let ramp = test(", ramp: [{percent: 10, hold: 1h}]");
    let begins = stepped(&ramp, &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let next = stepped(&ramp, &begins, &waits.facts, 3600);
    assert_eq!(reason(&next, "Accepted"), pair("False", "VariantNotServing"));
    assert_eq!((next.phase, next.weights.as_deref()), (Some(ABTestPhase::Running), Some("90/10")));
    let accepted = next.accepted_spec.as_deref().unwrap();
    assert!(accepted.contains("\"percent\":10"), "{accepted}");
    assert_eq!(stepped(&ramp, &next, &waits.facts, 3630), next, "nothing to write");
}

#[test]
fn a_variant_that_moves_again_and_again_ends_the_test() {
    let test = test("");
    let mut status = stepped(&test, &ABTestStatus::default(), &facts(["r1", "r0"]), 0);
    for (number, second) in (1_u32..=MAX_RESTARTS).zip((60..).step_by(60)) {
        let revision = if number % 2 == 1 { "r0+r1" } else { "r0" };
        status = stepped(&test, &status, &facts(["r1", revision]), second);
        assert_eq!((status.restarts, status.verdict), (number, None));
    }
    let ended = stepped(&test, &status, &facts(["r1", "r9"]), 6000);
    assert_eq!((ended.phase, ended.verdict), (Some(ABTestPhase::Concluded), Some(ABTestVerdict::Invalid)));
    assert_eq!(reason(&ended, "Sampling"), pair("False", "VariantUnstable"));
    assert_eq!(stepped(&test, &ended, &facts(["r1", "r0"]), 6060).phase, ended.phase, "it stays so");
}

#[test]
fn a_promotion_is_undone_by_report() {
    let serving = facts(["r1", "r2"]);
    let mut won = stepped(&test(", onConclusion: Promote"), &ABTestStatus::default(), &serving, 0);
    won.phase = Some(ABTestPhase::Promoting);
    (won.winner, won.promoted) = (Some("treatment".to_owned()), 100);
    won.promoted_since = Some(Time(at(100)));
    let whole = stepped(&test(", onConclusion: Promote"), &won, &serving, 101);
    assert_eq!(whole.weights.as_deref(), Some("0/100"));
    let undone = stepped(&test(""), &whole, &serving, 110);
    assert_eq!((undone.phase, undone.weights.as_deref()), (Some(ABTestPhase::Concluded), Some("90/10")));
    let notes = events(&whole, &undone);
    assert!(notes.iter().any(|note| note.reason == "PromotionUndone" && !note.warning), "{notes:?}");
}

/// The variant of each bucket of users.
fn variant_of_buckets(owners: &[OwnerRange]) -> Vec<String> {
    let mut variants = Vec::new();
    for OwnerRange { end, variant } in owners {
        variants.resize(*end as usize, variant.clone());
    }
    assert_eq!(variants.len(), 10_000);
    variants
}

/// A test with so many percent for each of three variants.
fn of_three(weights: [u32; 3], more: &str) -> ValidatedTest {
    let [control, treatment, third] = weights;
    let others = format!("weight: {treatment}}}, {{name: third, modelRef: {{name: c}}, weight: {third}}}]");
    let text = spec(more).replace("weight: 90", &format!("weight: {control}"));
    validate(&stored(&text.replace("weight: 10}]", &others))).unwrap()
}

const SERVING: [&str; 3] = ["r1", "r2", "r3"];
const PROMOTES: &str = ", onConclusion: Promote";

/// The test has a winner, which gets half of what the others have, and a minute later all, if `percent` says
/// so. Each status is read by another operator.
fn promoted_to(test: &ValidatedTest, status: &ABTestStatus, winner: &str, percent: u32) -> ABTestStatus {
    let won = ABTestStatus {
        phase: Some(ABTestPhase::Promoting),
        winner: Some(winner.to_owned()),
        promoted: 50,
        promoted_since: Some(Time(at(10_000))),
        ..status.clone()
    };
    let read = |status: &ABTestStatus| -> ABTestStatus {
        serde_json::from_value(serde_json::to_value(status).unwrap()).unwrap()
    };
    let half = stepped(test, &read(&won), &facts(SERVING), 10_000);
    assert_eq!((half.promoted, half.owners_before.clone()), (50, status.owners.clone()));
    if percent == 50 {
        return read(&half);
    }
    let whole = stepped(test, &half, &facts(SERVING), 10_060);
    assert!(whole.owners.iter().all(|owner| owner.variant == winner), "{:?}", whole.owners);
    read(&whole)
}

#[test]
fn an_undo_gives_every_user_the_variant_of_before() {
    let ramp = ", ramp: [{percent: 10, hold: 1h}, {percent: 50, hold: 1h}]";
    for more in ["", ramp] {
        let promotes = format!("{more}{PROMOTES}");
        // The ramp ends before the weights are edited two times.
        let mut status = ABTestStatus::default();
        let times = [(0, [60, 20, 20]), (3600, [60, 20, 20]), (7200, [60, 20, 20])];
        for (second, weights) in times.into_iter().chain([(8000, [20, 40, 40]), (9000, [50, 35, 15])]) {
            status = stepped(&of_three(weights, &promotes), &status, &facts(SERVING), second);
        }
        assert_eq!(status.weights.as_deref(), Some("50/35/15"));
        assert!(status.owners_before.is_empty());
        let before = variant_of_buckets(&status.owners);
        for (winner, percent) in [("treatment", 50), ("treatment", 100), ("third", 100), ("control", 100)] {
            let promoted = promoted_to(&of_three([50, 35, 15], &promotes), &status, winner, percent);
            let report = of_three([50, 35, 15], more);
            let undone = stepped(&report, &promoted, &facts(SERVING), 20_000);
            assert_eq!(reason(&undone, "Sampling"), pair("False", "PromotionUndone"));
            assert_eq!(variant_of_buckets(&undone.owners), before, "{winner} had {percent} % more");
            assert_eq!((undone.weights.as_deref(), undone.owners_before.len()), (Some("50/35/15"), 0));
            assert_eq!(stepped(&report, &undone, &facts(SERVING), 20_030), undone, "nothing to write");
        }
    }
}

#[test]
fn weights_that_are_edited_beside_a_promotion_move_the_fewest_users_from_those_before() {
    let serving = facts(SERVING);
    let begins = stepped(&of_three([60, 20, 20], PROMOTES), &ABTestStatus::default(), &serving, 0);
    let edited = stepped(&of_three([20, 40, 40], PROMOTES), &begins, &serving, 60);
    let status = stepped(&of_three([50, 35, 15], PROMOTES), &edited, &serving, 120);
    let before = variant_of_buckets(&status.owners);
    let moved = |after: &ABTestStatus| {
        let after = variant_of_buckets(&after.owners);
        before.iter().zip(&after).filter(|(before, after)| before != after).count()
    };
    // Before the undo, and with it.
    let promoted = promoted_to(&of_three([50, 35, 15], PROMOTES), &status, "treatment", 100);
    let edited = stepped(&of_three([45, 35, 20], PROMOTES), &promoted, &serving, 20_000);
    assert_eq!(edited.weights.as_deref(), Some("0/100/0"));
    for status in [&promoted, &edited] {
        let undone = stepped(&of_three([45, 35, 20], ""), status, &serving, 20_060);
        assert_eq!((undone.weights.as_deref(), moved(&undone)), (Some("45/35/20"), 500));
    }
    // The weights are those that the promotion made. The owners come back nevertheless, as another epoch.
    let half = promoted_to(&of_three([50, 34, 16], PROMOTES), &status, "treatment", 50);
    assert_eq!(half.weights.as_deref(), Some("25/67/8"));
    let undone = stepped(&of_three([25, 67, 8], ""), &half, &serving, 20_000);
    assert_eq!((undone.weights.as_deref(), moved(&undone)), (Some("25/67/8"), 3200));
    assert_eq!(undone.epochs.last().unwrap().epoch, half.epochs.last().unwrap().epoch + 1);
}

#[test]
fn samples_that_begin_anew_have_the_owners_from_before_a_promotion_or_a_guardrail() {
    let serving = facts(SERVING);
    let begins = stepped(&of_three([60, 20, 20], PROMOTES), &ABTestStatus::default(), &serving, 0);
    let edited = stepped(&of_three([20, 40, 40], PROMOTES), &begins, &serving, 60);
    let test = of_three([50, 35, 15], PROMOTES);
    let status = stepped(&test, &edited, &serving, 120);
    let promoted = promoted_to(&test, &status, "third", 100);
    // A guardrail ends the promotion, or the test.
    let stopped = |status: &ABTestStatus| {
        let stopped =
            ABTestStatus { phase: Some(ABTestPhase::Stopped), winner: None, promoted: 0, ..status.clone() };
        let stopped = stepped(&test, &stopped, &serving, 20_000);
        assert!(stopped.owners.iter().all(|owner| owner.variant == "control"));
        stopped
    };
    let anew = spec(PROMOTES).replace("errorRate", "tokensPerSecond");
    let others = "weight: 35}, {name: third, modelRef: {name: c}, weight: 15}]";
    let anew = anew.replace("weight: 90", "weight: 50").replace("weight: 10}]", others);
    let anew = validate(&stored(&anew)).unwrap();
    for ended in [promoted.clone(), stopped(&promoted), stopped(&status)] {
        let again = stepped(&anew, &ended, &serving, 30_000);
        assert_eq!((again.phase, again.promoted), (Some(ABTestPhase::Running), 0));
        assert_eq!(variant_of_buckets(&again.owners), variant_of_buckets(&status.owners));
        assert!(again.owners_before.is_empty());
    }
}

#[test]
fn a_baseline_gives_every_user_the_control_and_stays_beside_later_epochs() {
    let with = test(", baseline: 1h");
    let serving = facts(["r1", "r2"]);
    let begins = stepped(&with, &ABTestStatus::default(), &serving, 0);
    assert_eq!((begins.phase, begins.weights.as_deref()), (Some(ABTestPhase::Baseline), Some("90/10")));
    assert!(begins.epochs[0].baseline);
    assert_eq!(wake_in(&with, &begins, at(3595)), Duration::from_secs(5));
    assert_eq!(stepped(&with, &begins, &serving, 3599), begins);
    let mut status = stepped(&with, &begins, &serving, 3600);
    assert_eq!((status.phase, status.started_at.as_ref().unwrap().0), (Some(ABTestPhase::Running), at(3600)));
    assert_eq!(status.owners, begins.owners, "users get the variant at which they counted");
    let heavier = spec(", baseline: 1h");
    for (number, weight) in (1..).zip([80, 70, 60, 50]) {
        let changed = heavier.replace("weight: 90", &format!("weight: {weight}"));
        let changed = changed.replace("weight: 10", &format!("weight: {}", 100 - weight));
        status = stepped(&validate(&stored(&changed)).unwrap(), &status, &serving, 3600 + 60 * number);
    }
    let baseline: Vec<bool> = status.epochs.iter().map(|epoch| epoch.baseline).collect();
    assert_eq!(baseline, [true, false, false, false]);
}

#[test]
fn the_history_keeps_the_whole_time_in_a_bounded_number_of_entries() {
    let mut status = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let metric = MetricStatus {
        metric: Metric::ErrorRate,
        value: None,
        effect: Some("0.1".to_owned()),
        low: None,
        high: None,
        differs: false,
        cuped: None,
    };
    status.variants[1].metrics = vec![metric];
    for look in 1..=5000 {
        looks::remember(&mut status, at(30 * look));
        assert!(status.history.len() <= 48);
    }
    let first = status.history.first().unwrap().at.0;
    let last = status.history.last().unwrap().at.0;
    assert!(status.history.len() >= 20 && first == at(30), "{} entries", status.history.len());
    assert!(at(150_000).duration_since(last) < SignedDuration::from_secs(150_000 / 20));
}

#[test]
fn variants_with_another_load_per_pod_are_warned_of() {
    let mut status = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let sums = |requests: u64| {
        let mut sums = VariantSums::default();
        sums.buckets[0].requests = requests;
        sums
    };
    let epoch = EpochSample { weights: vec![9000, 1000], variants: vec![sums(9000), sums(1000)] };
    let with = |replicas: Vec<u32>| TestFacts { replicas, ..facts(["r1", "r2"]) };
    let differs = looks::load(&mut status, &epoch, &with(vec![1, 1]), at(1000)).unwrap();
    assert!(
        !differs.matched && differs.message.contains("control 9.00, treatment 1.00"),
        "{}",
        differs.message
    );
    assert!(looks::load(&mut status, &epoch, &with(vec![9, 1]), at(1000)).unwrap().matched);
    assert_eq!(status.variants[0].load_per_replica.as_deref(), Some("1.000"));
    let few = EpochSample { variants: vec![sums(9000), sums(10)], ..epoch };
    assert!(looks::load(&mut status, &few, &with(vec![9, 1]), at(1000)).is_none());
}

#[test]
fn events_say_how_a_test_began_one_time() {
    let begins = stepped(&test(""), &ABTestStatus::default(), &facts(["r1", "r2"]), 0);
    let notes = events(&ABTestStatus::default(), &begins);
    assert_eq!((notes.len(), notes[0].reason.as_str(), notes[0].warning), (1, "Started", false));
    let later = stepped(&test(""), &begins, &facts(["r1", "r2"]), 30);
    assert!(events(&begins, &later).is_empty());
    assert_eq!(later, begins, "nothing to write");
}
