//! What is reported of a revision beside its metrics: cumulative sums that only grow.
//!
//! Requests add to them without a lock. A report reads how attempts ended before it reads how many began, so
//! that it never has more ends than beginnings.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use trustformers_proto::control::v1::{LatencyHistogram, Outcome, OutcomeCount};
use trustformers_proto::latency::{BUCKETS, BucketCount, bucket_of};

/// Latencies, counted in the fixed buckets of reports. Nothing is allocated before the first one; then it
/// takes 736 × 8 bytes, 5.9 KB.
#[derive(Debug, Default)]
pub(crate) struct LatencyCounts {
    buckets: OnceLock<Box<[AtomicU64]>>,
    sum_us: AtomicU64,
}

impl LatencyCounts {
    /// Counts a latency.
    pub(crate) fn observe(&self, latency: Duration) {
        let buckets = self.buckets.get_or_init(|| (0..BUCKETS).map(|_| AtomicU64::new(0)).collect());
        if let Some(bucket) = buckets.get(bucket_of(latency)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(latency_us, Ordering::Relaxed);
    }

    fn to_wire(&self) -> Option<LatencyHistogram> {
        let counts = self.buckets.get()?.iter().enumerate().filter_map(|(bucket, count)| {
            let count = count.load(Ordering::Relaxed);
            (count > 0).then_some(BucketCount { bucket, count })
        });
        Some(LatencyHistogram::of_buckets(counts, self.sum_us.load(Ordering::Relaxed)))
    }
}

/// A count for each outcome.
#[derive(Debug, Default)]
pub(crate) struct OutcomeCounts([AtomicU64; Outcome::ALL.len()]);

impl OutcomeCounts {
    /// Counts an end.
    pub(crate) fn add(&self, outcome: Outcome) {
        if let Some(count) = outcome.index().and_then(|index| self.0.get(index)) {
            // Whoever sees this end also sees the beginning of its attempt.
            count.fetch_add(1, Ordering::Release);
        }
    }

    fn to_wire(&self) -> Vec<OutcomeCount> {
        let counts = Outcome::ALL.into_iter().zip(&self.0).filter_map(|(outcome, count)| {
            let count = count.load(Ordering::Acquire);
            (count > 0).then_some(OutcomeCount { outcome: outcome.into(), count })
        });
        counts.collect()
    }
}

/// The sums of one revision.
#[derive(Debug, Default)]
pub(crate) struct RevisionSums {
    /// Attempts that began.
    pub(crate) attempts: AtomicU64,
    /// How attempts ended.
    pub(crate) outcomes: OutcomeCounts,
    /// How requests ended for their callers.
    pub(crate) requests: OutcomeCounts,
    /// From an attempt to the first bytes of its stream.
    pub(crate) first_token: LatencyCounts,
    /// From an attempt to the end of its answer.
    pub(crate) answer: LatencyCounts,
    /// Tokens of prompts.
    pub(crate) prompt_tokens: AtomicU64,
    /// Tokens that were produced.
    pub(crate) completion_tokens: AtomicU64,
    /// Whether something was added since the last report.
    changed: AtomicBool,
}

impl RevisionSums {
    /// The next report has these sums.
    pub(crate) fn set_changed(&self) {
        // Whoever takes the mark also sees what was added before it was set.
        self.changed.store(true, Ordering::Release);
    }

    /// Whether the next report has these sums.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// The sums, if they are to be reported.
    pub(crate) fn take_changed(&self) -> Option<trustformers_proto::control::v1::RevisionCounts> {
        // Before the sums are read: what is added meanwhile sets it again.
        if !self.changed.swap(false, Ordering::AcqRel) {
            return None;
        }
        let outcomes = self.outcomes.to_wire();
        Some(trustformers_proto::control::v1::RevisionCounts {
            outcomes,
            attempts: self.attempts.load(Ordering::Acquire),
            requests: self.requests.to_wire(),
            first_token: self.first_token.to_wire(),
            answer: self.answer.to_wire(),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            completion_tokens: self.completion_tokens.load(Ordering::Relaxed),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_has_at_most_as_many_ends_as_attempts_and_the_last_has_all() {
        let sums = RevisionSums::default();
        let threads = 4;
        let each = 20_000;
        let mut last = None;
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..threads)
                .map(|thread| {
                    let sums = &sums;
                    scope.spawn(move || {
                        for index in 0..each {
                            sums.attempts.fetch_add(1, Ordering::Relaxed);
                            sums.outcomes.add(Outcome::ALL[(thread + index) % Outcome::ALL.len()]);
                            sums.set_changed();
                        }
                    })
                })
                .collect();
            loop {
                let finished = writers.iter().all(std::thread::ScopedJoinHandle::is_finished);
                if let Some(report) = sums.take_changed() {
                    let ended: u64 = report.outcomes.iter().map(|counted| counted.count).sum();
                    assert!(ended <= report.attempts, "{ended} of {}", report.attempts);
                    last = Some((ended, report.attempts));
                }
                if finished {
                    break;
                }
            }
        });
        let all = (threads * each) as u64;
        assert_eq!(last, Some((all, all)));
        assert!(sums.take_changed().is_none());
    }

    #[test]
    fn latencies_allocate_nothing_before_the_first() {
        let latencies = LatencyCounts::default();
        assert_eq!(latencies.to_wire(), None);
        latencies.observe(Duration::from_millis(3));
        latencies.observe(Duration::from_millis(3));
        let wire = latencies.to_wire().unwrap();
        let bucket = bucket_of(Duration::from_millis(3));
        assert!(wire.bucket_counts().eq([BucketCount { bucket, count: 2 }]));
        assert_eq!(wire.sum_us, 6000);
    }
}
