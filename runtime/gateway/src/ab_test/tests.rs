//! What a test counts, without a route around it.

use std::collections::BTreeMap;

use trustformers_proto::ab_test::UserSet;
use trustformers_proto::buckets::RevisionWeight;

use super::*;
use crate::shadow::ShadowResult;

fn rule(epoch: u64, weights: &[(&str, u32)]) -> TestRule {
    let variant = |&(name, weight): &(&str, u32)| VariantWeight { name: name.to_owned(), weight };
    TestRule {
        uid: "t".to_owned(),
        epoch,
        variants: weights.iter().map(variant).collect(),
        feedback_metric: "score".to_owned(),
        baseline: false,
    }
}

fn backend(variant: &str, weight: u32) -> TestBackend<'_> {
    TestBackend { variant, weight }
}

fn numbered(sequence: u64) -> VariantChoice<'static> {
    VariantChoice { sequence, bucket: None, forced: None, names_revision: false }
}

fn end(outcome: Outcome, took_ms: u64) -> ObservedEnd {
    let usage = Some(EndUsage { prompt_tokens: 3, completion_tokens: 10 });
    ObservedEnd { outcome, took: Duration::from_millis(took_ms), first_token: None, usage }
}

#[test]
fn requests_are_divided_exactly_and_within_a_variant_by_the_shares_of_its_revisions() {
    let registry = VariantRegistry::default();
    let backends = [backend("a", 1), backend("b", 1), backend("b", 3)];
    let live = LiveTest::new(&rule(1, &[("a", 90), ("b", 10)]), None, &backends, &registry);
    let mut counts = [0_u32; 3];
    for sequence in 0..40_000 {
        counts[live.backend(numbered(sequence)).unwrap()] += 1;
    }
    assert_eq!(counts[0], 36_000);
    // One quarter of 4,000; seven standard deviations are 190.
    assert!(counts[1].abs_diff(1000) < 190, "{counts:?}");
}

#[test]
fn a_user_keeps_the_variant_and_a_forced_one_gets_the_named() {
    let weights = [("a", 50), ("b", 50)]
        .map(|(revision, weight)| RevisionWeight { revision: revision.to_owned(), weight });
    let owners = BucketOwners::with_weights(&weights).unwrap();
    let registry = VariantRegistry::default();
    let backends = [backend("a", 1), backend("b", 1)];
    let live = LiveTest::new(&rule(1, &[("a", 50), ("b", 50)]), Some(&owners), &backends, &registry);
    for sequence in 0..50 {
        for (bucket, expected) in [(4999, 0), (5000, 1)] {
            let choice = VariantChoice { bucket: Some(bucket), ..numbered(sequence) };
            assert_eq!(live.backend(choice), Some(expected));
            assert_eq!(live.backend(VariantChoice { forced: Some("b"), ..choice }), Some(1));
        }
    }
    let without_pods = LiveTest::new(
        &rule(1, &[("a", 50), ("b", 50)]),
        Some(&owners),
        &[backend("a", 1), backend("b", 0)],
        &registry,
    );
    let choice = VariantChoice { bucket: Some(9999), ..numbered(0) };
    assert_eq!(without_pods.backend(choice), None, "the route chooses another variant's");
}

#[test]
fn every_end_counts_one_time_and_reports_have_what_changed() {
    let registry = VariantRegistry::default();
    let live = LiveTest::new(&rule(7, &[("a", 1)]), None, &[backend("a", 1)], &registry);
    let user = |number: u8| TestUser { bucket: number, fingerprint: u64::from(number) + 1 };
    let answered = HeaderValue::from_static("a");
    for (number, outcome) in [
        (1, Outcome::Ok),
        (1, Outcome::PodError),
        (2, Outcome::Ok),
        (2, Outcome::Cancelled),
        (3, Outcome::Overloaded),
    ] {
        let observation = live.observe(numbered(0), Some(user(number))).unwrap();
        observation.ended(&end(outcome, 5), Some(&answered));
    }
    let other = HeaderValue::from_static("b");
    live.observe(numbered(0), Some(user(9))).unwrap().ended(&end(Outcome::Ok, 5), Some(&other));
    let report = registry.take_changed(usize::MAX);
    let counts = &report.variants[0];
    assert_eq!((counts.epoch, counts.variant.as_str(), counts.fallbacks), (7, "a", 1));
    let mut users = counts.users.clone();
    users.sort_unstable();
    assert_eq!(users, [2, 3, 4, 10]);
    let buckets: BTreeMap<u32, (u64, u64, u64)> = counts
        .buckets
        .iter()
        .map(|one| (one.bucket, (one.requests, one.errors, one.completion_tokens)))
        .collect();
    assert_eq!(buckets, BTreeMap::from([(1, (2, 1, 10)), (2, (1, 0, 10)), (9, (1, 0, 10))]));
    // 5 ms is in the cell up to 8 ms.
    assert_eq!(counts.buckets[0].answers_within, [0, 0, 0, 0, 1]);
    assert!(registry.take_changed(usize::MAX).variants.is_empty());

    // A score alone sends its bucket, and another metric none.
    let scored = live.observe(numbered(0), Some(user(2))).unwrap().scored_bucket().unwrap();
    scored.scored("score", "id-1", 0.5);
    scored.scored("tone", "id-1", 0.5);
    let counts = registry.take_changed(usize::MAX).variants.remove(0);
    let sums: Vec<_> = counts.buckets.iter().map(|one| (one.bucket, one.scores, one.score_sum)).collect();
    assert_eq!((sums, counts.users.len()), (vec![(2, 1, 0.5)], 0));

    // A new stream gets all of it.
    registry.report_all();
    let counts = registry.take_changed(usize::MAX).variants.remove(0);
    assert_eq!((counts.buckets.len(), counts.users.len()), (3, 4));
}

#[test]
fn in_a_baseline_the_control_answers_and_users_count_at_their_variant() {
    let weights = [("a", 50), ("b", 50)]
        .map(|(revision, weight)| RevisionWeight { revision: revision.to_owned(), weight });
    let owners = BucketOwners::with_weights(&weights).unwrap();
    let registry = VariantRegistry::default();
    let baseline = TestRule { baseline: true, ..rule(1, &[("a", 50), ("b", 50)]) };
    let backends = [backend("a", 1), backend("b", 1)];
    let live = LiveTest::new(&baseline, Some(&owners), &backends, &registry);
    let of_b = VariantChoice { bucket: Some(9999), ..numbered(0) };
    assert_eq!(live.backend(of_b), Some(0));
    let observation = live.observe(of_b, Some(TestUser { bucket: 1, fingerprint: 2 })).unwrap();
    observation.ended(&end(Outcome::Ok, 5), Some(&HeaderValue::from_static("a")));
    let reported = registry.take_changed(usize::MAX).variants;
    let counts = reported.iter().find(|counts| counts.variant == "b").unwrap();
    assert_eq!((counts.buckets[0].requests, counts.fallbacks), (1, 0));
}

#[test]
fn a_request_that_names_its_revision_counts_nowhere() {
    let registry = VariantRegistry::default();
    let live = LiveTest::new(&rule(1, &[("a", 1)]), None, &[backend("a", 1)], &registry);
    let choice = VariantChoice { names_revision: true, ..numbered(0) };
    let user = TestUser { bucket: 1, fingerprint: 2 };
    let observation = live.observe(choice, Some(user)).unwrap();
    observation.ended(&end(Outcome::Ok, 5), None);
    assert!(observation.scored_bucket().is_none());
    let counts = registry.take_changed(usize::MAX).variants.remove(0);
    assert_eq!((counts.forced, counts.buckets.len(), counts.users.len()), (1, 0, 0));
}

#[test]
fn users_are_distinguished_by_the_salt_and_spread_over_the_buckets() {
    let mut buckets = [0_u32; 256];
    let mut users = UserSet::new(1 << 20);
    for number in 0..25_600 {
        let user = TestUser::of("salt", format!("user-{number}").as_bytes());
        buckets[usize::from(user.bucket)] += 1;
        assert!(users.insert(user.fingerprint));
    }
    // 100 expected in each; six standard deviations are 60.
    assert!(buckets.iter().all(|count| (40..=160).contains(count)), "{buckets:?}");
    assert_ne!(TestUser::of("salt", b"u"), TestUser::of("other", b"u"));
}

#[tokio::test(start_paused = true)]
async fn the_series_of_an_old_epoch_are_kept_until_they_are_reported() {
    let registry = VariantRegistry::default();
    let (old, new) = (rule(1, &[("a", 1)]), rule(2, &[("a", 1)]));
    let live = LiveTest::new(&old, None, &[backend("a", 1)], &registry);
    let running = live.observe(numbered(0), None).unwrap();
    registry.in_force([&new].into_iter());
    // A request of the old epoch ends behind the change.
    running.ended(&end(Outcome::Ok, 1), None);
    tokio::time::advance(Duration::from_secs(7200)).await;
    registry.in_force([&new].into_iter());
    assert_eq!(registry.take_changed(usize::MAX).variants[0].buckets[0].requests, 1);
    registry.in_force([&new].into_iter());
    registry.report_all();
    assert!(registry.take_changed(usize::MAX).variants.is_empty());
}

#[test]
fn answers_of_a_shadow_are_reported_with_its_variant() {
    let registry = VariantRegistry::default();
    let live = LiveTest::new(&rule(1, &[("a", 100), ("b", 0)]), None, &[backend("a", 1)], &registry);
    assert!(live.series_of("").is_none(), "a shadow that is no variant");
    let series = live.series_of("b").unwrap();
    for result in [ShadowResult::Same, ShadowResult::Same, ShadowResult::Different, ShadowResult::Failed] {
        series.count_shadow(result);
    }
    let reported = registry.take_changed(usize::MAX).variants;
    let [only] = &reported[..] else { panic!("{reported:?}") };
    let shadow = only.shadow.as_ref().unwrap();
    assert_eq!((only.variant.as_str(), shadow.same, shadow.different, shadow.failed), ("b", 2, 1, 1));
    assert!(registry.take_changed(usize::MAX).variants.is_empty());
}

#[test]
fn scores_are_reported_with_their_answers_and_again_in_a_new_stream() {
    let registry = VariantRegistry::default();
    let live = LiveTest::new(&rule(1, &[("a", 100)]), None, &[backend("a", 1)], &registry);
    let series = live.series_of("a").unwrap();
    let scored = |bucket| ScoredBucket { series: Arc::downgrade(&series), bucket, user: None };
    scored(3).scored("score", "id-1", 0.5);
    scored(3).scored("tone", "id-1", 0.5);
    let take = || registry.take_changed(usize::MAX).variants.remove(0).scored;
    let first = take();
    assert_eq!(first.iter().map(|one| (one.bucket, one.score)).collect::<Vec<_>>(), [(3, 0.5)]);
    scored(4).scored("score", "id-1", 1.0);
    let second = take();
    assert_eq!(second.iter().map(|one| (one.bucket, one.score)).collect::<Vec<_>>(), [(4, 1.0)]);
    assert_ne!(first[0].answer, second[0].answer, "answers to two users");
    registry.report_all();
    assert_eq!(take(), [first, second].concat());
    // The same answer at another gateway.
    let other = VariantRegistry::default();
    let elsewhere = LiveTest::new(&rule(1, &[("a", 100)]), None, &[backend("a", 1)], &other);
    let place =
        ScoredBucket { series: Arc::downgrade(&elsewhere.series_of("a").unwrap()), bucket: 3, user: None };
    place.scored("score", "id-1", 0.5);
    let there = other.take_changed(usize::MAX).variants.remove(0).scored;
    registry.report_all();
    assert_eq!(there[0].answer, take()[0].answer);
}

#[test]
fn a_splitter_with_a_fault_gives_users_of_the_control_the_treatment() {
    let weights = [("a", 90), ("b", 10)]
        .map(|(revision, weight)| RevisionWeight { revision: revision.to_owned(), weight });
    let owners = BucketOwners::with_weights(&weights).unwrap();
    let registry = VariantRegistry::default();
    registry.skew_split(SplitSkew::parse("split-skew=0.5").unwrap());
    let backends = [backend("a", 1), backend("b", 1)];
    let live = LiveTest::new(&rule(1, &[("a", 90), ("b", 10)]), Some(&owners), &backends, &registry);
    let of = |bucket| live.backend(VariantChoice { bucket: Some(bucket), ..numbered(0) }).unwrap();
    let treated = (0..BUCKETS).map(of).filter(|backend| *backend == 1).count();
    // 1,000 and half of 9,000; five standard deviations are 240.
    assert!(treated.abs_diff(5500) < 240, "{treated}");
    assert!((9000..BUCKETS).all(|bucket| of(bucket) == 1), "nobody leaves the treatment");
}
