//! Sums of reports against one count of everything that gateways did.

use std::collections::BTreeMap;

use trustformers_proto::control::v1::{FeedbackSum, HeldRequests};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A generator of numbers for tests (splitmix64): the same numbers in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn key(route: usize, revision: usize) -> SeriesKey {
    SeriesKey { route: format!("d/m{route}"), revision: format!("r{revision}") }
}

fn wire(key: &SeriesKey, series: u64, counts: &Counts) -> RevisionCounts {
    let outcomes = |outcomes: &Outcomes| {
        let counted = Outcome::ALL.into_iter().map(|outcome| (outcome, outcomes.of(outcome)));
        counted.map(|(outcome, count)| OutcomeCount { outcome: outcome.into(), count }).collect()
    };
    let histogram = |histogram: &Histogram| {
        let buckets = histogram.buckets.iter().map(|(&bucket, &count)| BucketCount { bucket, count });
        Some(LatencyHistogram::of_buckets(buckets, histogram.sum_us))
    };
    let feedback = counts.feedback.iter().map(|(metric, scores)| FeedbackSum {
        metric: metric.clone(),
        count: scores.count,
        sum: scores.sum,
    });
    RevisionCounts {
        route: key.route.clone(),
        revision: key.revision.clone(),
        series,
        attempts: counts.attempts,
        outcomes: outcomes(&counts.outcomes),
        requests: outcomes(&counts.requests),
        first_token: histogram(&counts.first_token),
        answer: histogram(&counts.answer),
        prompt_tokens: counts.prompt_tokens,
        completion_tokens: counts.completion_tokens,
        feedback: feedback.collect(),
    }
}

fn only(counts: &[RevisionCounts]) -> Reported<'_> {
    Reported { counts, held: &[] }
}

/// Counts one attempt that ends in some way.
fn count_attempt(counts: &mut [&mut Counts], numbers: &mut Numbers) {
    let outcome = Outcome::ALL[numbers.below(Outcome::ALL.len() as u64) as usize];
    let bits = numbers.below(33);
    let latency = Duration::from_micros(numbers.below(1 << bits));
    let score = numbers.below(5) as f64;
    for counts in counts {
        counts.attempts += 1;
        counts.outcomes.add(outcome, 1);
        counts.requests.add(outcome, 1);
        counts.first_token.observe(latency);
        counts.answer.observe(latency * 2);
        counts.prompt_tokens += 3;
        counts.completion_tokens += 7;
        let scores = counts.feedback.entry("score".to_owned()).or_default();
        *scores = Scores { count: scores.count + 1, sum: scores.sum + score };
    }
}

/// A gateway in the simulation: what its present process has counted.
#[derive(Default)]
struct SimulatedGateway {
    process: u64,
    next_series: u64,
    series: BTreeMap<SeriesKey, (u64, Counts)>,
}

impl SimulatedGateway {
    fn id(&self, index: usize) -> String {
        format!("{index}-{}", self.process)
    }

    fn report(&self, index: usize, store: &mut CountStore, now: Duration) {
        let counts: Vec<_> =
            self.series.iter().map(|(key, (number, counts))| wire(key, *number, counts)).collect();
        store.report(&self.id(index), only(&counts), now);
    }
}

#[test]
fn sums_equal_all_that_was_counted_through_restarts_repeats_and_forgotten_series() {
    for seed in 0..40 {
        let mut numbers = Numbers(seed);
        let (mut store, mut truth) = (CountStore::default(), BTreeMap::<SeriesKey, Counts>::new());
        let mut gateways: [SimulatedGateway; 3] = Default::default();
        let mut now = Duration::ZERO;
        for _ in 0..400 {
            let index = numbers.below(3) as usize;
            let gateway = &mut gateways[index];
            let key = key(numbers.below(2) as usize, numbers.below(3) as usize);
            match numbers.below(20) {
                // The process ends behind its last report, and another one begins.
                0 => {
                    gateway.report(index, &mut store, now);
                    *gateway =
                        SimulatedGateway { process: gateway.process + 1, ..SimulatedGateway::default() };
                }
                // A series is forgotten behind a report of it.
                1 => {
                    gateway.report(index, &mut store, now);
                    gateway.series.remove(&key);
                }
                // A report, perhaps for the second time.
                2..6 => gateway.report(index, &mut store, now),
                6 => {
                    now += Duration::from_secs(numbers.below(20 * 60));
                    for (index, gateway) in gateways.iter().enumerate() {
                        gateway.report(index, &mut store, now);
                    }
                    store.sweep(now);
                }
                _ => {
                    let next = &mut gateway.next_series;
                    let (_, counts) = gateway.series.entry(key.clone()).or_insert_with(|| {
                        *next += 1;
                        (*next, Counts::default())
                    });
                    count_attempt(&mut [counts, truth.entry(key).or_default()], &mut numbers);
                }
            }
        }
        for (index, gateway) in gateways.iter().enumerate() {
            gateway.report(index, &mut store, now);
        }
        // Long after, every process has ended, and the sums are the same.
        for later in [Duration::ZERO, PROCESS_ENDED] {
            store.sweep(now + later);
            assert!(store.keys().iter().eq(truth.keys()), "seed {seed}");
            for (key, counted) in &truth {
                assert_eq!(&store.of(key), counted, "seed {seed}, {key:?}");
                assert_eq!(counted.outcomes.total(), counted.attempts - counted.unfinished());
            }
        }
    }
}

#[test]
fn a_window_is_what_was_counted_in_it() {
    let mut numbers = Numbers(7);
    let (mut earlier, mut window) = (Counts::default(), Counts::default());
    for _ in 0..100 {
        count_attempt(&mut [&mut earlier], &mut numbers);
    }
    let mut later = earlier.clone();
    for _ in 0..50 {
        count_attempt(&mut [&mut later, &mut window], &mut numbers);
    }
    assert_eq!(later.since(&earlier), window);
    earlier.merge(&window);
    assert_eq!(earlier, later);
    assert_eq!(later.since(&later), Counts::default());
}

#[test]
fn a_process_that_comes_back_after_its_end_is_not_counted_twice() {
    let (mut store, key) = (CountStore::default(), key(0, 0));
    let counted = |attempts| wire(&key, 1, &Counts { attempts, ..Counts::default() });
    store.report("p", only(&[counted(10)]), Duration::ZERO);
    store.sweep(PROCESS_ENDED);
    assert_eq!(store.of(&key).attempts, 10);
    let back = PROCESS_ENDED + SECOND;
    store.report("p", only(&[counted(15)]), back);
    assert_eq!(store.of(&key).attempts, 10);
    store.report("p", only(&[counted(18)]), back + SECOND);
    assert_eq!(store.of(&key).attempts, 13);
    store.sweep(back + SECOND + PROCESS_ENDED);
    assert_eq!(store.of(&key).attempts, 13);
}

#[test]
fn only_processes_that_report_have_attempts_in_flight() {
    let (mut store, key) = (CountStore::default(), key(0, 0));
    let mut counts = Counts { attempts: 5, ..Counts::default() };
    counts.outcomes.add(Outcome::Ok, 2);
    store.report("dead", only(&[wire(&key, 1, &counts)]), Duration::ZERO);
    store.report("live", only(&[wire(&key, 1, &counts)]), 10 * SECOND);
    assert_eq!(store.in_flight(&key, 10 * SECOND, 5 * SECOND), 3);
    let held = [HeldRequests { route: "d/m0".to_owned(), count: 4 }];
    store.report("live", Reported { counts: &[], held: &held }, 10 * SECOND);
    assert_eq!(store.held("d/m0", 10 * SECOND, 5 * SECOND), 4);
    assert_eq!(store.held("d/m0", 20 * SECOND, 5 * SECOND), 0);
    assert_eq!(store.of(&key).unfinished(), 6);
}

#[test]
fn quantiles_are_within_a_bucket_of_the_exact_ones() {
    let mut histogram = Histogram::default();
    assert_eq!((histogram.quantile(0.5), histogram.mean()), (None, None));
    let mut latencies: Vec<u64> = (0..1000).map(|index| 40 + index * index * 3).collect();
    for latency_us in &latencies {
        histogram.observe(Duration::from_micros(*latency_us));
    }
    latencies.sort_unstable();
    for (q, rank) in [(0.0, 1), (0.5, 500), (0.95, 950), (0.99, 990), (1.0, 1000)] {
        let exact = Duration::from_micros(latencies[rank - 1]);
        let found = histogram.quantile(q).unwrap();
        let off = found.abs_diff(exact);
        assert!(off <= Duration::from_micros(16).max(exact / 64), "{q}: {found:?} for {exact:?}");
    }
    let mean = Duration::from_micros(latencies.iter().sum::<u64>() / 1000);
    assert_eq!(histogram.mean(), Some(mean));
}

#[test]
fn the_error_rate_counts_failures_of_pods_alone() {
    assert_eq!(Outcomes::default().error_rate(), None);
    let outcomes: Outcomes = [
        (Outcome::Ok, 90),
        (Outcome::PodError, 4),
        (Outcome::ResetInStream, 3),
        (Outcome::Timeout, 3),
        (Outcome::Overloaded, 50),
        (Outcome::CallerError, 500),
        (Outcome::Cancelled, 70),
        (Outcome::Unspecified, 9),
    ]
    .into_iter()
    .collect();
    assert_eq!((outcomes.failures(), outcomes.judged(), outcomes.total()), (10, 100, 720));
    assert_eq!(outcomes.error_rate(), Some(0.1));
}

#[test]
fn each_process_keeps_its_own_sums() {
    let (mut store, key) = (CountStore::default(), key(0, 0));
    let counted = |attempts| wire(&key, 1, &Counts { attempts, ..Counts::default() });
    store.report("one", only(&[counted(10)]), Duration::ZERO);
    store.report("two", only(&[counted(4)]), SECOND);
    store.report("one", only(&[counted(12)]), SECOND);
    let sums: Vec<_> = store.by_process(&key).into_iter().map(|(id, counts)| (id, counts.attempts)).collect();
    assert_eq!(sums, [("one".to_owned(), 12), ("two".to_owned(), 4)]);
}

#[test]
fn buckets_have_their_bounds_in_milliseconds() {
    let mut histogram = Histogram::default();
    for latency in [Duration::from_micros(10), Duration::from_millis(100), Duration::MAX] {
        histogram.observe(latency);
    }
    let buckets: Vec<_> = histogram.buckets().collect();
    assert_eq!((buckets[0].lower_ms, buckets[0].upper_ms, buckets[0].requests), (0.0, 0.032, 1));
    assert!(buckets[1].lower_ms <= 100.0 && 100.0 < buckets[1].upper_ms, "{buckets:?}");
    assert!(buckets[2].upper_ms.is_infinite());
    let again: u64 = histogram.bucket_counts().map(|counted| counted.count).sum();
    assert_eq!(again, histogram.count());
}
