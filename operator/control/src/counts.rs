//! What gateways have counted: sums over processes, differences between two times, and what follows of them.
//!
//! A gateway reports the sums since its process began. [`CountStore`] keeps the last report of each process,
//! so a report that comes twice counts once, and a gateway that restarts adds to what it has counted before.
//! [`Counts::since`] of two sums is what was counted between them. A new leader gets the sums of all
//! processes that run, and none of those that ended before: whoever compares over the change of a leader uses
//! the sums of each process ([`CountStore::by_process`]).

mod store;

use std::collections::BTreeMap;
use std::time::Duration;

use trustformers_proto::control::v1::{LatencyHistogram, Outcome, OutcomeCount, RevisionCounts};
use trustformers_proto::latency::{BUCKETS, BucketCount, bucket_of, lower_end_us, middle};

use crate::rollout::analysis::LatencyBucket;

pub use store::{CountStore, PROCESS_ENDED, Reported, SeriesKey};

/// A histogram of latencies. Sums of histograms are exact: the buckets are the same everywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Counts of the buckets of `trustformers_proto::latency` that are not empty.
    buckets: BTreeMap<usize, u64>,
    sum_us: u64,
}

impl Histogram {
    /// Counts a latency.
    pub fn observe(&mut self, latency: Duration) {
        *self.buckets.entry(bucket_of(latency)).or_default() += 1;
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.sum_us = self.sum_us.saturating_add(latency_us);
    }

    /// Adds another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.buckets {
            let sum = self.buckets.entry(*bucket).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
    }

    /// What was counted since an earlier state of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let more = self.buckets.iter().map(|(bucket, count)| {
            let before = earlier.buckets.get(bucket).copied().unwrap_or_default();
            (*bucket, count.saturating_sub(before))
        });
        Self {
            buckets: more.filter(|(_, count)| *count > 0).collect(),
            sum_us: self.sum_us.saturating_sub(earlier.sum_us),
        }
    }

    /// The buckets that are not empty, ascending, by their index in `trustformers_proto::latency`.
    pub fn bucket_counts(&self) -> impl Iterator<Item = BucketCount> {
        self.buckets.iter().map(|(bucket, count)| BucketCount { bucket: *bucket, count: *count })
    }

    /// The buckets that are not empty, ascending, with their bounds in milliseconds. The last bucket of all
    /// has no upper bound.
    pub fn buckets(&self) -> impl Iterator<Item = LatencyBucket> {
        self.bucket_counts().map(|BucketCount { bucket, count }| LatencyBucket {
            lower_ms: lower_end_us(bucket) as f64 / 1000.0,
            upper_ms: match bucket + 1 {
                BUCKETS => f64::INFINITY,
                next => lower_end_us(next) as f64 / 1000.0,
            },
            requests: count,
        })
    }

    /// How many latencies it has.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The latency that a share `q` (0 to 1) of all does not exceed, by the nearest rank: the middle of its
    /// bucket, at most 1.6 % off, or 16 µs below 1 ms. None of an empty histogram.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        // A float becomes an integer within its range.
        let rank = ((q * count as f64).ceil() as u64).max(1);
        let mut below = 0_u64;
        let found = self.buckets.iter().find(|(_, count)| {
            below = below.saturating_add(**count);
            below >= rank
        });
        found.or_else(|| self.buckets.last_key_value()).map(|(bucket, _)| middle(*bucket))
    }

    /// The mean. None of an empty histogram.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.sum_us.checked_div(self.count()).map(Duration::from_micros)
    }
}

impl From<&LatencyHistogram> for Histogram {
    fn from(wire: &LatencyHistogram) -> Self {
        let mut histogram = Self { buckets: BTreeMap::new(), sum_us: wire.sum_us };
        for BucketCount { bucket, count } in wire.bucket_counts().filter(|counted| counted.count > 0) {
            let sum = histogram.buckets.entry(bucket).or_default();
            *sum = sum.saturating_add(count);
        }
        histogram
    }
}

impl From<&Histogram> for LatencyHistogram {
    fn from(histogram: &Histogram) -> Self {
        Self::of_buckets(histogram.bucket_counts(), histogram.sum_us)
    }
}

/// How many attempts or requests ended in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes([u64; Outcome::ALL.len()]);

impl Outcomes {
    /// How many ended so. An outcome of a newer gateway has no count of its own.
    #[must_use]
    pub fn of(&self, outcome: Outcome) -> u64 {
        outcome.index().map_or(0, |index| self.0[index])
    }

    /// Adds to the count of an outcome.
    pub fn add(&mut self, outcome: Outcome, count: u64) {
        if let Some(index) = outcome.index() {
            self.0[index] = self.0[index].saturating_add(count);
        }
    }

    /// How many ended.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How many ended with a failure of the pod ([`Outcome::is_failure`]).
    #[must_use]
    pub fn failures(&self) -> u64 {
        Outcome::ALL.into_iter().filter(|outcome| outcome.is_failure()).map(|outcome| self.of(outcome)).sum()
    }

    /// How many say something about the revision: answered or failed. Requests that their callers got wrong
    /// or gave up, and those for which a pod had no room, say nothing.
    #[must_use]
    pub fn judged(&self) -> u64 {
        self.of(Outcome::Ok).saturating_add(self.failures())
    }

    /// Failures by what was judged, 0 to 1. None before anything was.
    #[must_use]
    pub fn error_rate(&self) -> Option<f64> {
        let judged = self.judged();
        (judged > 0).then(|| self.failures() as f64 / judged as f64)
    }

    fn merge(&mut self, other: &Self) {
        for outcome in Outcome::ALL {
            self.add(outcome, other.of(outcome));
        }
    }

    fn since(&self, earlier: &Self) -> Self {
        let mut more = Self::default();
        for outcome in Outcome::ALL {
            more.add(outcome, self.of(outcome).saturating_sub(earlier.of(outcome)));
        }
        more
    }
}

impl FromIterator<(Outcome, u64)> for Outcomes {
    fn from_iter<I: IntoIterator<Item = (Outcome, u64)>>(counts: I) -> Self {
        let mut outcomes = Self::default();
        for (outcome, count) in counts {
            outcomes.add(outcome, count);
        }
        outcomes
    }
}

/// The scores of answers in one metric.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scores {
    /// How many there are.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
}

/// What was counted of one revision of one route.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counts {
    /// Attempts: a request that was retried has several, at the revisions that they were sent to.
    pub attempts: u64,
    /// How attempts ended.
    pub outcomes: Outcomes,
    /// How requests ended for their callers.
    pub requests: Outcomes,
    /// From the attempt to the first bytes of a successful answer's body.
    pub first_token: Histogram,
    /// From the attempt to the end of a complete answer.
    pub answer: Histogram,
    /// Tokens of prompts, of the answers that tell them.
    pub prompt_tokens: u64,
    /// Tokens that were produced, of the answers that tell them.
    pub completion_tokens: u64,
    /// Scores of answers, by metric.
    pub feedback: BTreeMap<String, Scores>,
}

impl Counts {
    /// Adds what was counted elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.outcomes.merge(&other.outcomes);
        self.requests.merge(&other.requests);
        self.first_token.merge(&other.first_token);
        self.answer.merge(&other.answer);
        self.prompt_tokens = self.prompt_tokens.saturating_add(other.prompt_tokens);
        self.completion_tokens = self.completion_tokens.saturating_add(other.completion_tokens);
        for (metric, scores) in &other.feedback {
            let sum = self.feedback.entry(metric.clone()).or_default();
            *sum = Scores { count: sum.count.saturating_add(scores.count), sum: sum.sum + scores.sum };
        }
    }

    /// What was counted since an earlier state of the same sums.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let feedback = self.feedback.iter().map(|(metric, now)| {
            let before = earlier.feedback.get(metric).copied().unwrap_or_default();
            let scores = Scores { count: now.count.saturating_sub(before.count), sum: now.sum - before.sum };
            (metric.clone(), scores)
        });
        Self {
            attempts: self.attempts.saturating_sub(earlier.attempts),
            outcomes: self.outcomes.since(&earlier.outcomes),
            requests: self.requests.since(&earlier.requests),
            first_token: self.first_token.since(&earlier.first_token),
            answer: self.answer.since(&earlier.answer),
            prompt_tokens: self.prompt_tokens.saturating_sub(earlier.prompt_tokens),
            completion_tokens: self.completion_tokens.saturating_sub(earlier.completion_tokens),
            feedback: feedback.filter(|(_, scores)| scores.count > 0).collect(),
        }
    }

    /// Attempts that have not ended. Those of a process that died with them stay so.
    #[must_use]
    pub fn unfinished(&self) -> u64 {
        self.attempts.saturating_sub(self.outcomes.total())
    }

    /// Attempts that ended with a failure of the pod.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.outcomes.failures()
    }

    /// The share of the judged attempts that failed; see [`Outcomes::error_rate`].
    #[must_use]
    pub fn error_rate(&self) -> Option<f64> {
        self.outcomes.error_rate()
    }
}

fn outcomes(wire: &[OutcomeCount]) -> Outcomes {
    wire.iter().map(|counted| (counted.outcome(), counted.count)).collect()
}

impl From<&RevisionCounts> for Counts {
    fn from(wire: &RevisionCounts) -> Self {
        let histogram = |wire: &Option<LatencyHistogram>| wire.as_ref().map(Histogram::from);
        let feedback = wire
            .feedback
            .iter()
            .map(|scores| (scores.metric.clone(), Scores { count: scores.count, sum: scores.sum }));
        Self {
            attempts: wire.attempts,
            outcomes: outcomes(&wire.outcomes),
            requests: outcomes(&wire.requests),
            first_token: histogram(&wire.first_token).unwrap_or_default(),
            answer: histogram(&wire.answer).unwrap_or_default(),
            prompt_tokens: wire.prompt_tokens,
            completion_tokens: wire.completion_tokens,
            feedback: feedback.collect(),
        }
    }
}

#[cfg(test)]
mod tests;
