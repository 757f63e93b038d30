//! The sums of one variant in one epoch of a test: cumulative, by bucket of users.
//!
//! A request takes the lock of its variant two times, for some ten nanoseconds each: at 1,000 requests per
//! second the lock is held for a ten-thousandth of the time.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use prost::Message;
use tokio::time::Instant;
use trustformers_proto::ab_test::{LATENCY_CELLS, USER_BUCKETS, UserSet, latency_cell};
use trustformers_proto::control::v1::{
    LatencyHistogram, Outcome, ScoredAnswer, ShadowCounts, UserBucketCounts, VariantCounts,
};
use trustformers_proto::latency::{BUCKETS, BucketCount, bucket_of};

use super::{ObservedEnd, SplitSkew, TestRule};
use crate::shadow::ShadowResult;

/// Users of one variant and epoch that a process distinguishes: 32,768 × 8 bytes, which a hash table makes
/// 0.6 MB. With more users the set is a sample, which merges with those of other gateways all the same.
const MAX_USERS: usize = 32_768;
/// Scored answers of one variant and epoch that are known: at ten scores a second those of seven minutes.
/// Each takes 24 bytes, here and in a report: 98 KB together.
const MAX_SCORED: usize = 4096;
/// Series of an epoch that is over are kept for this long: requests of it may still run, and scores come.
const SERIES_KEPT: Duration = Duration::from_secs(3600);

/// Which series.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct VariantKey {
    /// UID of the test.
    pub(crate) test: String,
    /// The epoch.
    pub(crate) epoch: u64,
    /// The variant.
    pub(crate) variant: String,
}

/// The series of all tests.
#[derive(Debug, Default)]
pub(crate) struct VariantRegistry {
    registered: Mutex<HashMap<VariantKey, RegisteredVariant>>,
    /// A fault, in tests of the platform.
    skew: OnceLock<SplitSkew>,
}

#[derive(Debug)]
struct RegisteredVariant {
    series: Arc<VariantSeries>,
    /// Since when no table names it.
    left: Option<Instant>,
}

/// Sums to report, and whether more of them wait.
#[derive(Debug, Default)]
pub(crate) struct ChangedVariants {
    /// What changed.
    pub(crate) variants: Vec<VariantCounts>,
    /// Whether further series have changed.
    pub(crate) has_more: bool,
}

impl VariantRegistry {
    fn lock(&self) -> MutexGuard<'_, HashMap<VariantKey, RegisteredVariant>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From the next table on users are not divided as it says.
    pub(crate) fn skew_split(&self, skew: SplitSkew) {
        // It is set once, at the start.
        let _already = self.skew.set(skew);
    }

    /// The fault of the splitter, if it has one.
    pub(super) fn skew(&self) -> Option<SplitSkew> {
        self.skew.get().copied()
    }

    /// The series of a variant of a test, at zero or as it was registered before.
    pub(crate) fn series(&self, rule: &TestRule, variant: &str) -> Arc<VariantSeries> {
        let key = VariantKey { test: rule.uid.clone(), epoch: rule.epoch, variant: variant.to_owned() };
        let mut registered = self.lock();
        let entry = registered.entry(key.clone()).or_insert_with(|| {
            let series = Arc::new(VariantSeries::new(key, rule.feedback_metric.clone()));
            RegisteredVariant { series, left: None }
        });
        entry.left = None;
        Arc::clone(&entry.series)
    }

    /// A table came into force that names these tests. Removes series that nobody can miss.
    pub(crate) fn in_force<'a>(&self, tests: impl Iterator<Item = &'a TestRule>) {
        let named: Vec<(&str, u64)> = tests.map(|rule| (rule.uid.as_str(), rule.epoch)).collect();
        let now = Instant::now();
        self.lock().retain(|key, entry| {
            if named.contains(&(key.test.as_str(), key.epoch)) {
                return true;
            }
            let left = *entry.left.get_or_insert(now);
            now.duration_since(left) < SERIES_KEPT || entry.series.lock().is_changed()
        });
    }

    /// Every series is in the next reports, with all of its buckets and users.
    pub(crate) fn report_all(&self) {
        for entry in self.lock().values() {
            entry.series.lock().report_all();
        }
    }

    /// What changed since it was reported, up to about `limit_bytes` of it. The last series may go beyond
    /// that by 0.5 MB: 32,768 users of 8 bytes, 256 buckets of at most 500, and 4,096 scores of 24.
    pub(crate) fn take_changed(&self, limit_bytes: usize) -> ChangedVariants {
        let mut changed = ChangedVariants::default();
        let mut bytes = 0;
        for entry in self.lock().values() {
            let mut sums = entry.series.lock();
            if !sums.is_changed() {
                continue;
            }
            if bytes >= limit_bytes {
                changed.has_more = true;
                break;
            }
            let counts = sums.take(&entry.series.key);
            bytes += counts.encoded_len();
            changed.variants.push(counts);
        }
        changed
    }
}

/// What is counted of one variant in one epoch.
#[derive(Debug)]
pub(crate) struct VariantSeries {
    pub(super) key: VariantKey,
    /// The variant's name as answers carry it.
    pub(super) header: Option<HeaderValue>,
    feedback_metric: String,
    sums: Mutex<VariantSums>,
}

impl VariantSeries {
    fn new(key: VariantKey, feedback_metric: String) -> Self {
        let header = HeaderValue::from_str(&key.variant).ok();
        Self { key, header, feedback_metric, sums: Mutex::new(VariantSums::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, VariantSums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request of a forced user was assigned.
    pub(super) fn count_forced(&self) {
        let mut sums = self.lock();
        sums.forced += 1;
        sums.totals_changed = true;
    }

    /// A request without a user was assigned, though users are split.
    pub(super) fn count_unidentified(&self) {
        let mut sums = self.lock();
        sums.unidentified += 1;
        sums.totals_changed = true;
    }

    /// A request of a user was assigned.
    pub(super) fn count_user(&self, fingerprint: u64) {
        let mut sums = self.lock();
        if sums.users.insert(fingerprint) {
            sums.new_users.push(fingerprint);
        }
    }

    /// A request ended. What callers do wrong or give up, and full queues, say nothing about a variant.
    pub(super) fn count_end(&self, bucket: Option<u8>, end: &ObservedEnd, is_fallback: bool) {
        let failed = end.outcome.is_failure();
        let Some(bucket) = bucket.filter(|_| failed || end.outcome == Outcome::Ok) else { return };
        let mut sums = self.lock();
        let sums = &mut *sums;
        sums.totals_changed = true;
        sums.fallbacks += u64::from(is_fallback);
        let counts = sums.bucket(bucket);
        counts.requests += 1;
        if failed {
            counts.errors += 1;
            return;
        }
        counts.answers_within[latency_cell(end.took)] += 1;
        if let Some(first_token) = end.first_token {
            counts.first_tokens_within[latency_cell(first_token)] += 1;
        }
        counts.prompt_tokens += end.usage.map_or(0, |usage| u64::from(usage.prompt_tokens));
        if let Some(usage) = end.usage.filter(|usage| usage.completion_tokens > 0) {
            counts.completion_tokens += u64::from(usage.completion_tokens);
            counts.token_us += u64::try_from(end.took.as_micros()).unwrap_or(u64::MAX);
        }
        sums.answer.observe(end.took);
        if let Some(first_token) = end.first_token {
            sums.first_token.observe(first_token);
        }
    }

    /// The variant answered a request as a shadow, or was to.
    pub(crate) fn count_shadow(&self, result: ShadowResult) {
        let mut sums = self.lock();
        sums.totals_changed = true;
        let shadow = &mut sums.shadow;
        let count = match result {
            ShadowResult::Same => &mut shadow.same,
            ShadowResult::Different => &mut shadow.different,
            ShadowResult::Incomparable => &mut shadow.incomparable,
            ShadowResult::Answered => &mut shadow.answered,
            ShadowResult::Failed => &mut shadow.failed,
            ShadowResult::Dropped => &mut shadow.dropped,
        };
        *count += 1;
    }

    /// Whether scores of this metric count.
    pub(super) fn counts_metric(&self, metric: &str) -> bool {
        metric == self.feedback_metric
    }

    /// An answer was scored.
    pub(super) fn count_score(&self, metric: &str, counted: CountedScore) {
        if !self.counts_metric(metric) {
            return;
        }
        let mut sums = self.lock();
        let counts = sums.bucket(counted.bucket);
        counts.scores += 1;
        counts.score_sum += counted.score;
        sums.scored.push(counted);
    }
}

/// Latencies in the buckets of reports; 5.9 KB from the first one.
#[derive(Debug, Default)]
struct Latencies {
    counts: Vec<u64>,
    sum_us: u64,
}

impl Latencies {
    fn observe(&mut self, latency: Duration) {
        self.counts.resize(BUCKETS, 0);
        self.counts[bucket_of(latency)] += 1;
        self.sum_us += u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    }

    fn to_wire(&self) -> Option<LatencyHistogram> {
        let counts = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let counts = counts.map(|(bucket, count)| BucketCount { bucket, count: *count });
        (!self.counts.is_empty()).then(|| LatencyHistogram::of_buckets(counts, self.sum_us))
    }
}

/// The sums of one bucket of users.
#[derive(Debug, Clone, Copy, Default)]
struct BucketSums {
    requests: u64,
    errors: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    token_us: u64,
    scores: u64,
    score_sum: f64,
    answers_within: [u64; LATENCY_CELLS],
    first_tokens_within: [u64; LATENCY_CELLS],
    changed: bool,
}

/// A score that counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct CountedScore {
    /// Fingerprint of its answer.
    pub(super) answer: u64,
    /// The bucket of its user.
    pub(super) bucket: u8,
    /// The score.
    pub(super) score: f64,
}

/// The newest scores, with which the operator finds those that two gateways counted.
#[derive(Debug, Default)]
struct CountedScores {
    newest: VecDeque<CountedScore>,
    /// How many at the end were not reported yet.
    unreported: usize,
}

impl CountedScores {
    fn push(&mut self, counted: CountedScore) {
        self.newest.push_back(counted);
        if self.newest.len() > MAX_SCORED {
            self.newest.pop_front();
        }
        self.unreported = (self.unreported + 1).min(self.newest.len());
    }

    fn report_all(&mut self) {
        self.unreported = self.newest.len();
    }

    fn take(&mut self) -> Vec<ScoredAnswer> {
        let unreported = std::mem::take(&mut self.unreported);
        let of = |&CountedScore { answer, bucket, score }: &CountedScore| ScoredAnswer {
            answer,
            bucket: u32::from(bucket),
            score,
        };
        // At most as many are unreported as there are.
        self.newest.iter().skip(self.newest.len() - unreported).map(of).collect()
    }
}

/// What became of requests that the variant answered as a shadow.
#[derive(Debug, Clone, Copy, Default)]
struct ShadowSums {
    same: u64,
    different: u64,
    incomparable: u64,
    answered: u64,
    failed: u64,
    dropped: u64,
}

impl ShadowSums {
    fn to_wire(self) -> ShadowCounts {
        let Self { same, different, incomparable, answered, failed, dropped } = self;
        ShadowCounts { same, different, incomparable, answered, failed, dropped }
    }
}

/// 256 buckets of 464 bytes, 119 KB, and the users.
#[derive(Debug)]
struct VariantSums {
    buckets: Box<[BucketSums]>,
    unidentified: u64,
    forced: u64,
    fallbacks: u64,
    shadow: ShadowSums,
    scored: CountedScores,
    totals_changed: bool,
    answer: Latencies,
    first_token: Latencies,
    users: UserSet,
    /// Users that were not reported yet. At most as many as users: a set that is sampled anew keeps fewer.
    new_users: Vec<u64>,
}

impl VariantSums {
    fn new() -> Self {
        Self {
            buckets: vec![BucketSums::default(); USER_BUCKETS].into_boxed_slice(),
            unidentified: 0,
            forced: 0,
            fallbacks: 0,
            shadow: ShadowSums::default(),
            scored: CountedScores::default(),
            totals_changed: false,
            answer: Latencies::default(),
            first_token: Latencies::default(),
            users: UserSet::new(MAX_USERS),
            new_users: Vec::new(),
        }
    }

    fn bucket(&mut self, bucket: u8) -> &mut BucketSums {
        let counts = &mut self.buckets[usize::from(bucket)];
        counts.changed = true;
        counts
    }

    fn is_changed(&self) -> bool {
        self.totals_changed || !self.new_users.is_empty() || self.buckets.iter().any(|one| one.changed)
    }

    fn report_all(&mut self) {
        self.totals_changed = true;
        self.new_users = self.users.iter().collect();
        self.scored.report_all();
        for bucket in &mut self.buckets {
            bucket.changed = bucket.requests + bucket.scores > 0;
        }
    }

    fn take(&mut self, key: &VariantKey) -> VariantCounts {
        self.totals_changed = false;
        let users = std::mem::take(&mut self.new_users);
        let users = users.into_iter().filter(|user| self.users.contains(*user)).collect();
        let changed = (0..).zip(&mut self.buckets).filter(|(_, sums)| sums.changed);
        let buckets = changed.map(|(bucket, sums)| {
            sums.changed = false;
            sums.to_wire(bucket)
        });
        VariantCounts {
            test: key.test.clone(),
            epoch: key.epoch,
            variant: key.variant.clone(),
            unidentified: self.unidentified,
            forced: self.forced,
            fallbacks: self.fallbacks,
            answer: self.answer.to_wire(),
            first_token: self.first_token.to_wire(),
            buckets: buckets.collect(),
            users,
            users_level: self.users.level(),
            shadow: Some(self.shadow.to_wire()),
            scored: self.scored.take(),
        }
    }
}

impl BucketSums {
    fn to_wire(self, bucket: u32) -> UserBucketCounts {
        UserBucketCounts {
            bucket,
            requests: self.requests,
            errors: self.errors,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            token_us: self.token_us,
            scores: self.scores,
            score_sum: self.score_sum,
            answers_within: without_zeros(&self.answers_within),
            first_tokens_within: without_zeros(&self.first_tokens_within),
        }
    }
}

/// The counts without the zeros at the end.
fn without_zeros(counts: &[u64]) -> Vec<u64> {
    let used = counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    counts[..used].to_vec()
}
