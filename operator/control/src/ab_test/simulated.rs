//! Tests over simulated users: what is there is found, what is not there is not, and breaches end a test.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use trustformers_crds::{ABTestPhase, ABTestStatus, ABTestVerdict, Metric};
use trustformers_proto::ab_test::{UserSet, latency_cell};
use trustformers_proto::control::v1::VariantCounts;

use super::assess::{AssessInputs, EpochSample, Judgement, assess};
use super::sample::{SampleStore, VariantId, VariantSums};
use super::status::{StepInputs, TestFacts, Waiting, step, stored_variants};
use super::validate::tests::{spec, stored};
use super::validate::{ValidatedTest, validate};

/// `SplitMix64`: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        hashed(self.0)
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn hashed(number: u64) -> u64 {
    let mut mixed = number;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Users with levels of their own, who return.
struct Population {
    random: Random,
    users: u64,
    /// Percent of the users that get the treatment.
    treatment_percent: u64,
    /// Share of the requests of each variant that fail.
    error_rates: [f64; 2],
    sums: [VariantSums; 2],
}

impl Population {
    fn new(seed: u64, treatment_percent: u64, error_rates: [f64; 2]) -> Self {
        let sums = [VariantSums::default(), VariantSums::default()];
        Self { random: Random(seed), users: 20_000, treatment_percent, error_rates, sums }
    }

    /// Some users send a request.
    fn send(&mut self, requests: u32) {
        for _ in 0..requests {
            let user = self.random.next() % self.users;
            let hash = hashed(user.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 77);
            let variant = usize::from(hashed(hash) % 100 < self.treatment_percent);
            // A user's own level is half to one and a half times the mean.
            let level = 0.5 + (hash >> 40) as f64 / (1_u64 << 24) as f64;
            let failed = self.random.share() < self.error_rates[variant] * level;
            let latency = std::time::Duration::from_micros(10_000 + self.random.next() % 40_000);
            let sums = &mut self.sums[variant];
            sums.users.insert(hashed(hash + 1));
            let bucket = &mut sums.buckets[(hash & 255) as usize];
            bucket.requests += 1;
            bucket.errors += u64::from(failed);
            if !failed {
                bucket.answers_within[latency_cell(latency)] += 1;
                sums.answer.observe(latency);
            }
        }
    }

    /// What a gateway reports of both variants in the newest epoch.
    fn report(&self, test: &ValidatedTest, status: &ABTestStatus) -> Vec<VariantCounts> {
        let epoch = u64::try_from(status.epochs.last().unwrap().epoch).unwrap();
        let counts = ["control", "treatment"].iter().zip(&self.sums).map(|(variant, sums)| {
            let id = VariantId { test: test.uid.clone(), epoch, variant: (*variant).to_owned() };
            sums.to_wire(&id, 0)
        });
        counts.collect()
    }

    fn epoch(&self, weights: [u32; 2]) -> EpochSample {
        EpochSample { weights: weights.to_vec(), variants: self.sums.to_vec() }
    }
}

fn half_and_half(more: &str) -> ValidatedTest {
    let even = spec(more).replace("weight: 90", "weight: 50").replace("weight: 10", "weight: 50");
    validate(&stored(&even)).unwrap()
}

const AT_ONCE: &str = ", stopWhen: {minDuration: 0s, maxDuration: 60d}";

/// What each of `looks` says, until the first verdict.
fn until_verdict(test: &ValidatedTest, population: &mut Population, looks: u32) -> Vec<Judgement> {
    let mut judgements = Vec::new();
    let mut information = vec![0.0, 0.0];
    for look in 1..=looks {
        population.send(400);
        let epochs = [population.epoch([5000, 5000])];
        let days = f64::from(look) / 12.0;
        let judgement = assess(&AssessInputs {
            test,
            epochs: &epochs,
            baseline: None,
            thetas: &[],
            earlier_users: &UserSet::new(1),
            information: &information,
            days,
        });
        information = judgement.variants.iter().map(|variant| variant.information).collect();
        let is_over = judgement.conclusion.is_some();
        judgements.push(judgement);
        if is_over {
            break;
        }
    }
    judgements
}

#[test]
fn no_difference_is_not_concluded_over_thirty_days_of_looks() {
    let test = half_and_half(AT_ONCE);
    for seed in [1, 2] {
        let mut population = Population::new(seed, 50, [0.05, 0.05]);
        let looks = until_verdict(&test, &mut population, 360);
        assert_eq!(looks.len(), 360, "seed {seed}: {:?}", looks.last().unwrap().conclusion);
        let last = looks.last().unwrap();
        assert!(!last.split_is_broken() && last.breach.is_none());
        // The interval holds at every look that has one.
        for look in &looks {
            let comparison = look.variants[1].metrics[0].comparison.as_ref();
            assert!(comparison.is_none_or(|one| one.low <= 0.0 && one.high >= 0.0), "seed {seed}");
        }
        assert!(last.detectable_effect.is_some_and(|effect| effect > 0.0 && effect < 1.0));
    }
}

#[test]
fn a_true_difference_is_found_and_its_interval_holds() {
    let test = half_and_half(AT_ONCE);
    let mut population = Population::new(11, 50, [0.10, 0.05]);
    let looks = until_verdict(&test, &mut population, 360);
    let last = looks.last().unwrap();
    let conclusion = last.conclusion.unwrap();
    assert_eq!((conclusion.verdict, conclusion.winner), (ABTestVerdict::Winner, Some(1)));
    assert!(looks.len() > 3, "not before each variant has its least users and events");
    let comparison = last.variants[1].metrics[0].comparison.as_ref().unwrap();
    let truth = 0.5_f64.ln();
    assert!(comparison.low <= truth && truth <= comparison.high && comparison.high < 0.0, "{comparison:?}");
    assert_eq!(last.leader, Some(1));
    assert!(last.confidence.is_some_and(|confidence| confidence > 0.95));
}

#[test]
fn a_worse_treatment_makes_the_control_the_winner() {
    let test = half_and_half(AT_ONCE);
    let mut population = Population::new(12, 50, [0.05, 0.10]);
    let looks = until_verdict(&test, &mut population, 360);
    let conclusion = looks.last().unwrap().conclusion.unwrap();
    assert_eq!((conclusion.verdict, conclusion.winner), (ABTestVerdict::Winner, Some(0)));
}

#[test]
fn variants_that_hardly_differ_are_equivalent_within_a_margin() {
    let margin = half_and_half(AT_ONCE);
    let mut test = margin;
    test.goal.margin = 0.3;
    let mut population = Population::new(13, 50, [0.10, 0.10]);
    let looks = until_verdict(&test, &mut population, 360);
    assert_eq!(looks.last().unwrap().conclusion.unwrap().verdict, ABTestVerdict::Equivalent);
}

#[test]
fn a_verdict_waits_for_the_least_duration() {
    let test = half_and_half(", stopWhen: {minDuration: 4d, maxDuration: 60d}");
    let mut population = Population::new(11, 50, [0.10, 0.05]);
    let looks = until_verdict(&test, &mut population, 360);
    assert_eq!(looks.len(), 48, "four days of twelve looks");
}

#[test]
fn users_that_are_divided_otherwise_trip_the_ratio_check() {
    let test = half_and_half(AT_ONCE);
    let mut population = Population::new(14, 40, [0.05, 0.05]);
    let looks = until_verdict(&test, &mut population, 100);
    assert_eq!(looks.last().unwrap().conclusion.unwrap().verdict, ABTestVerdict::Invalid);
    assert!(looks.len() < 20, "{} looks of 400 requests", looks.len());
}

/// Steps a test checkpoint by checkpoint, as the operator does, until `looks` or a phase beyond sampling.
fn stepped(test: &ValidatedTest, population: &mut Population, looks: i64) -> (ABTestStatus, i64) {
    stepped_while(test, population, looks, None)
}

/// The same while a newer spec waits behind the first checkpoint.
fn stepped_while(
    test: &ValidatedTest,
    population: &mut Population,
    looks: i64,
    waiting: Option<Waiting>,
) -> (ABTestStatus, i64) {
    let facts = TestFacts {
        conflict: None,
        waiting: None,
        revisions: vec!["r1".to_owned(), "r1".to_owned()],
        replicas: vec![1, 1],
        checkpoint_error: None,
    };
    let begin = Timestamp::from_second(1_800_000_000).unwrap();
    let inputs =
        StepInputs { test, stored: &ABTestStatus::default(), facts: &facts, samples: None, now: begin };
    let mut status = step(&inputs);
    let facts = TestFacts { waiting, ..facts };
    let mut store = SampleStore::default();
    for look in 1..=looks {
        population.send(200);
        store.report("gateway", &population.report(test, &status));
        let now = begin.checked_add(SignedDuration::from_secs(30 * look)).unwrap();
        status = step(&StepInputs { test, stored: &status, facts: &facts, samples: Some(&store), now });
        if status.phase != Some(ABTestPhase::Running) {
            return (status, look);
        }
    }
    (status, looks)
}

#[test]
fn thirty_days_without_a_difference_end_in_no_verdict_and_lose_no_request() {
    let test = half_and_half(AT_ONCE);
    let facts = TestFacts {
        conflict: None,
        waiting: None,
        revisions: vec!["r1".to_owned(), "r1".to_owned()],
        replicas: vec![1, 1],
        checkpoint_error: None,
    };
    let begin = Timestamp::from_second(1_800_000_000).unwrap();
    let first = ABTestStatus::default();
    let mut status =
        step(&StepInputs { test: &test, stored: &first, facts: &facts, samples: None, now: begin });
    let mut population = Population::new(1, 50, [0.05, 0.05]);
    let mut store = SampleStore::default();
    // Twelve looks a day.
    for look in 1..=360_u32 {
        population.send(400);
        store.report("gateway", &population.report(&test, &status));
        if look % 36 == 0 {
            // Another operator, with what is stored.
            let stored = store.checkpoint(&test.uid, 900_000).unwrap();
            store = SampleStore::default();
            assert!(store.restore(&stored, &stored_variants(&test.uid, &status)).is_empty());
            let text = serde_json::to_string(&status).unwrap();
            status = serde_json::from_str(&text).unwrap();
        }
        let now = begin.checked_add(SignedDuration::from_hours(2 * i64::from(look))).unwrap();
        let samples = Some(&store);
        status = step(&StepInputs { test: &test, stored: &status, facts: &facts, samples, now });
        assert_eq!((status.phase, status.verdict), (Some(ABTestPhase::Running), None), "look {look}");
        let requests: i64 = status.variants.iter().map(|variant| variant.requests).sum();
        assert_eq!(requests, 400 * i64::from(look), "look {look}");
    }
    assert_eq!((status.srm.as_deref(), status.restarts), (Some("ok"), 0));
    let metric = &status.variants[1].metrics[0];
    let end = |end: &Option<String>| end.as_ref().unwrap().parse::<f64>().unwrap();
    assert!(!metric.differs && end(&metric.low) <= 0.0 && end(&metric.high) >= 0.0, "{metric:?}");
}

#[test]
fn a_guardrail_stops_within_two_checkpoints_and_the_control_gets_everything() {
    let more = ", guardrails: [{metric: errorRate, max: 0.02}], stopWhen: {maxDuration: 60d}";
    let mut population = Population::new(15, 50, [0.0, 0.4]);
    let (status, looks) = stepped(&half_and_half(more), &mut population, 10);
    assert_eq!(status.phase, Some(ABTestPhase::Stopped));
    assert!(looks <= 2, "{looks} checkpoints");
    assert_eq!(status.epochs.last().unwrap().weights, [10_000, 0]);
    assert!(status.owners.iter().all(|owner| owner.variant == "control"));
    let sampling = status.conditions.iter().find(|one| one.type_ == "Sampling").unwrap();
    assert_eq!(sampling.reason, "GuardrailBroken");
    assert!(sampling.message.contains("ErrorRate of treatment"), "{}", sampling.message);
}

/// A checkpoint of one day, without a baseline.
fn inputs<'a>(
    test: &'a ValidatedTest,
    epochs: &'a [EpochSample],
    earlier_users: &'a UserSet,
) -> AssessInputs<'a> {
    AssessInputs {
        test,
        epochs,
        baseline: None,
        thetas: &[],
        earlier_users,
        information: &[0.0, 0.0],
        days: 1.0,
    }
}

#[test]
fn what_users_did_before_the_test_makes_the_interval_narrower() {
    let test = half_and_half(AT_ONCE);
    let mut population = Population::new(19, 50, [0.2, 0.2]);
    population.users = 400;
    population.send(60_000);
    let before = population.epoch([5000, 5000]);
    population.sums = [VariantSums::default(), VariantSums::default()];
    population.send(60_000);
    let epochs = [population.epoch([5000, 5000])];
    let nobody = UserSet::new(1);
    let plain = inputs(&test, &epochs, &nobody);
    let look = |thetas: &[BTreeMap<Metric, f64>]| {
        let judgement = assess(&AssessInputs { baseline: Some(&before), thetas, ..plain });
        judgement.variants[1].metrics[0].comparison.clone().unwrap()
    };
    let first = look(&[]);
    let theta = first.theta.unwrap();
    assert!((0.5..1.2).contains(&theta), "{theta}");
    let second = look(&[BTreeMap::new(), BTreeMap::from([(Metric::ErrorRate, theta)])]);
    let unadjusted = assess(&plain).variants[1].metrics[0].comparison.clone().unwrap();
    assert_eq!(first.standard_error, unadjusted.standard_error, "the first look has no coefficient");
    let narrower = second.standard_error.unwrap() / first.standard_error.unwrap();
    assert!(narrower < 0.8, "{narrower}");
    assert!(second.low < 0.0 && second.high > 0.0, "{second:?}");
}

#[test]
fn users_that_return_after_many_epochs_are_not_new() {
    let test = half_and_half(AT_ONCE);
    // 2,000 users of each variant in an epoch that is forgotten; of the treatment few return.
    let mut earlier = UserSet::new(32_768);
    let users = |from: u64, count: u64| (from..from + count).map(|user| hashed(user << 20));
    for user in users(0, 4000) {
        earlier.insert(user);
    }
    let mut sums = [VariantSums::default(), VariantSums::default()];
    for user in users(0, 2000) {
        sums[0].users.insert(user);
    }
    for user in users(2000, 200) {
        sums[1].users.insert(user);
    }
    for user in users(10_000, 500) {
        sums[0].users.insert(user);
    }
    for user in users(20_000, 500) {
        sums[1].users.insert(user);
    }
    let epochs = [EpochSample { weights: vec![5000, 5000], variants: sums.to_vec() }];
    let broken = |earlier_users: &UserSet| assess(&inputs(&test, &epochs, earlier_users)).split_is_broken();
    assert!(!broken(&earlier));
    assert!(broken(&UserSet::new(1)), "as if all of them were new");
}

#[test]
fn a_guardrail_stops_a_test_whose_new_spec_is_refused() {
    let more = ", guardrails: [{metric: errorRate, max: 0.02}], stopWhen: {maxDuration: 60d}";
    let running = half_and_half(more);
    let waiting = Waiting { reason: "InvalidSpec", message: "spec.variants: wrong".to_owned() };
    let mut population = Population::new(15, 50, [0.0, 0.4]);
    let (status, looks) = stepped_while(&running, &mut population, 10, Some(waiting));
    assert_eq!((status.phase, looks <= 2), (Some(ABTestPhase::Stopped), true));
    let accepted = status.conditions.iter().find(|one| one.type_ == "Accepted").unwrap();
    assert_eq!((accepted.status.as_str(), accepted.reason.as_str()), ("False", "InvalidSpec"));
}

#[test]
fn a_cheaper_variant_wins_by_its_cost() {
    let cost = |per_request: f64| format!("cost: {{perRequest: {per_request}}}");
    let spec = spec(AT_ONCE)
        .replace("errorRate", "costPerRequest")
        .replace("weight: 90", &format!("weight: 50, {}", cost(2.0)))
        .replace("weight: 10", "weight: 50, cost: {perRequest: 1, perMillionCompletionTokens: 10}");
    let test = validate(&stored(&spec)).unwrap();
    let mut population = Population::new(18, 50, [0.05, 0.05]);
    population.send(4000);
    let mut epoch = population.epoch([5000, 5000]);
    for (sums, variant) in epoch.variants.iter_mut().zip(&test.variants) {
        sums.cost = variant.cost.unwrap();
        // Answers of some length, so that the costs of buckets differ.
        for (bucket, tokens) in sums.buckets.iter_mut().zip((1000_u64..).step_by(7)) {
            bucket.completion_tokens = tokens * bucket.requests;
        }
    }
    let epochs = [epoch];
    let judgement = assess(&inputs(&test, &epochs, &UserSet::new(1)));
    let metric = &judgement.variants[1].metrics[0];
    assert!(metric.value.is_some_and(|value| (1.01..1.03).contains(&value)), "{metric:?}");
    let comparison = metric.comparison.as_ref();
    assert!(comparison.is_none_or(|one| one.estimate < 0.0), "{metric:?}");
}

#[test]
fn a_guardrail_that_holds_ends_no_test() {
    let more = ", guardrails: [{metric: errorRate, max: 0.06}, {metric: latencyP95Ms, max: 60}], \
                stopWhen: {maxDuration: 60d}";
    let mut population = Population::new(16, 50, [0.02, 0.02]);
    let (status, looks) = stepped(&half_and_half(more), &mut population, 300);
    assert_eq!((status.phase, looks), (Some(ABTestPhase::Running), 300));
    let slow = more.replace("max: 60}", "max: 20}");
    let mut population = Population::new(17, 50, [0.02, 0.02]);
    let (status, looks) = stepped(&half_and_half(&slow), &mut population, 300);
    assert_eq!(status.phase, Some(ABTestPhase::Stopped), "half of the requests take more than 20 ms");
    assert!(looks <= 3, "{looks}");
}

#[test]
fn a_few_scores_that_agree_by_chance_do_not_keep_a_test_from_its_verdict() {
    let test = validate(&stored(&spec(AT_ONCE).replace("errorRate", "feedbackScore"))).unwrap();
    let mut population = Population::new(20, 50, [0.0, 0.0]);
    population.send(4000);
    let mut epoch = population.epoch([5000, 5000]);
    // Two scores of each variant, which hardly differ: an estimate of a precision that never comes again.
    for sums in &mut epoch.variants {
        for (bucket, score) in sums.buckets.iter_mut().zip([0.5, 0.5001]) {
            (bucket.scores, bucket.score_sum) = (1, score);
        }
    }
    let none = UserSet::new(1);
    let early = [epoch.clone()];
    let judgement = assess(&inputs(&test, &early, &none));
    let treatment = &judgement.variants[1];
    assert!(treatment.metrics[0].comparison.as_ref().is_some_and(|one| one.information > 1e6));
    assert!(treatment.shortfalls.contains(&"Events".to_owned()), "{:?}", treatment.shortfalls);
    let information: Vec<f64> = judgement.variants.iter().map(|variant| variant.information).collect();
    assert_eq!(information, [0.0, 0.0]);

    // Four scores of each bucket, of which one to three are 1.
    for sums in &mut epoch.variants {
        for (bucket, ones) in sums.buckets.iter_mut().zip([1.0, 2.0, 3.0, 2.0].into_iter().cycle()) {
            (bucket.scores, bucket.score_sum) = (4, ones);
        }
    }
    let later = [epoch];
    let judgement = assess(&AssessInputs { information: &information, ..inputs(&test, &later, &none) });
    let treatment = &judgement.variants[1];
    assert_eq!(treatment.shortfalls, [""; 0]);
    assert!(treatment.information > 1000.0, "{}", treatment.information);

    // A precision that a large enough sample had, and that fell, is remembered.
    let fell = [0.0, 2.0 * treatment.information];
    let judgement = assess(&AssessInputs { information: &fell, ..inputs(&test, &later, &none) });
    assert_eq!(judgement.variants[1].shortfalls, ["InformationFell"]);
}
