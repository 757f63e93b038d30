//! When a request is sent to a second endpoint while the first one has not answered: the delay, and a budget.
//!
//! Only requests that encode texts are: each has one answer, and the second attempt costs no more than the
//! first. The delay may follow the route: it is then the time in which 95 % of its recent answers came, so
//! that about one request of twenty is sent twice, and fewer where the budget is smaller.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::retry::{RetryBudget, RetryRules};

/// When a route's requests are sent to a second endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HedgeRules {
    /// Time that the first endpoint has; `None`: what 95 % of the route's recent answers took.
    pub delay: Option<Duration>,
    /// Such requests may be this share of those of the window, in percent.
    pub budget_percent: u32,
}

/// The window of the budget.
const WINDOW: Duration = Duration::from_secs(10);
/// One request of the window may always be sent twice.
const FREE: u32 = 1;

impl HedgeRules {
    /// The budget, in the words of retries.
    #[must_use]
    pub fn budget(&self) -> RetryRules {
        RetryRules {
            base_delay: Duration::ZERO,
            budget_percent: self.budget_percent,
            min_retries: FREE,
            window: WINDOW,
        }
    }
}

/// What of a route's hedging outlives a table.
#[derive(Debug, Default)]
pub struct RouteHedges {
    /// What recent answers took.
    pub tail: TailLatency,
    /// The requests of the route that may be hedged, and those that were.
    pub budget: RetryBudget,
}

/// Answers before an estimate counts.
const MIN_ANSWERS: u32 = 20;
/// An answer moves the estimate by this part of it, times one or nineteen.
const STEP_DIVISOR: u64 = 256;
/// Nineteen of twenty answers are below the 95th percentile.
const BELOW: u64 = 19;
/// The shortest step, in microseconds, so that an estimate near zero moves.
const SHORTEST_STEP_US: u64 = 5;

/// An estimate of the 95th percentile of latencies that follows them. An answer above it moves it up by
/// nineteen steps and one below it moves it down by one, so that it rests where one of twenty is above.
#[derive(Debug, Default)]
pub struct TailLatency {
    estimate_us: AtomicU64,
    answers: AtomicU32,
}

impl TailLatency {
    /// An answer took this long, or longer.
    pub fn observe(&self, latency: Duration) {
        let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX / 2);
        // A lost update of two at once is of no importance to an estimate.
        let estimate_us = self.estimate_us.load(Ordering::Relaxed);
        let answers = self.answers.load(Ordering::Relaxed);
        let step_us = (estimate_us / STEP_DIVISOR).max(SHORTEST_STEP_US);
        let moved_us = if answers < MIN_ANSWERS {
            self.answers.store(answers + 1, Ordering::Relaxed);
            estimate_us.max(latency_us)
        } else if latency_us > estimate_us {
            estimate_us.saturating_add(step_us * BELOW)
        } else {
            estimate_us.saturating_sub(step_us)
        };
        self.estimate_us.store(moved_us, Ordering::Relaxed);
    }

    /// The estimate; `None` while there were too few answers.
    #[must_use]
    pub fn p95(&self) -> Option<Duration> {
        let enough = self.answers.load(Ordering::Relaxed) >= MIN_ANSWERS;
        enough.then(|| Duration::from_micros(self.estimate_us.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fastrand::Rng;

    #[test]
    fn the_estimate_needs_answers_and_then_finds_the_95th_percentile() {
        let tail = TailLatency::default();
        let mut rng = Rng::with_seed(7);
        for answer in 0..20 {
            assert_eq!(tail.p95(), None, "{answer}");
            tail.observe(Duration::from_micros(rng.u64(1000..100_000)));
        }
        for _ in 0..20_000 {
            tail.observe(Duration::from_micros(rng.u64(1000..100_000)));
        }
        let p95_ms = tail.p95().unwrap().as_millis();
        assert!((80..=108).contains(&p95_ms), "{p95_ms} ms, and it is 95");
        // A route that becomes ten times faster is followed.
        for _ in 0..5000 {
            tail.observe(Duration::from_micros(rng.u64(100..10_000)));
        }
        let p95_ms = tail.p95().unwrap().as_millis();
        assert!((8..=11).contains(&p95_ms), "{p95_ms} ms, and it is 9.5");
    }

    #[test]
    fn the_budget_is_a_share_of_the_requests_and_one_is_free() {
        let rules = HedgeRules { delay: None, budget_percent: 5 };
        let hedges = RouteHedges::default();
        let now = Duration::from_secs(100);
        for _ in 0..200 {
            hedges.budget.request(now, &rules.budget());
        }
        let hedged = (0..200).filter(|_| hedges.budget.try_retry(now, &rules.budget())).count();
        assert!((10..=11).contains(&hedged), "{hedged} of 200");
        let quiet = RouteHedges::default();
        quiet.budget.request(now, &rules.budget());
        assert!(quiet.budget.try_retry(now, &rules.budget()));
    }
}
