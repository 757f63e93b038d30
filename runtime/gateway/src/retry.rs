//! When a request is sent once more: the delays between attempts, and a budget for all requests of a route.
//!
//! Without a budget, pods that fail get a multiple of the requests that made them fail. The budget is a share
//! of the requests of a window; a few retries are free, so that a route with little traffic has some as well.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;

/// The retries of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryRules {
    /// Delay of the first retry; each further one doubles it.
    pub base_delay: Duration,
    /// Retries may be this share of the requests of the window, in percent.
    pub budget_percent: u32,
    /// This many retries of the window are free.
    pub min_retries: u32,
    /// The window.
    pub window: Duration,
}

/// No delay is longer, whatever is configured.
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// The delay in front of a retry, the first being 1: with a base of 100 ms about 100, 200 and 400 ms. Half of
/// it up or down is random, so that requests that failed together do not come back together.
#[must_use]
pub fn delay(rules: &RetryRules, retry: u32, rng: &mut Rng) -> Duration {
    let doubled = rules.base_delay.saturating_mul(1 << retry.saturating_sub(1).min(16));
    doubled.min(LONGEST_DELAY).mul_f64(0.5 + rng.f64())
}

/// Intervals of the window.
const INTERVALS: u64 = 10;
/// Bits of each count of an interval: a million requests, about 100,000 a second in a window of 100 s. At
/// more the count stays at its largest value, and the budget is smaller than its share.
const COUNT_BITS: u32 = 20;
const LARGEST_COUNT: u64 = (1 << COUNT_BITS) - 1;

/// The requests and retries of a route in its window. Requests count without a lock.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// Per interval: its number (24 bits), requests, retries.
    intervals: [AtomicU64; INTERVALS as usize],
}

impl RetryBudget {
    /// Counts a request at `now`, a duration since any fixed moment.
    pub fn request(&self, now: Duration, rules: &RetryRules) {
        self.add(interval_number(now, rules), 1 << COUNT_BITS);
    }

    /// Counts a retry at `now`, where the budget has one.
    pub fn try_retry(&self, now: Duration, rules: &RetryRules) -> bool {
        let number = interval_number(now, rules);
        let (mut requests, mut retries) = (0, 0);
        for interval in &self.intervals {
            let packed = interval.load(Ordering::Relaxed);
            if number.wrapping_sub(number_of(packed)) & NUMBER_MASK < INTERVALS {
                requests += packed >> COUNT_BITS & LARGEST_COUNT;
                retries += packed & LARGEST_COUNT;
            }
        }
        let allowed = u64::from(rules.min_retries) + requests * u64::from(rules.budget_percent) / 100;
        // Requests that fail at the same moment may exceed it by one for each thread.
        let within = retries < allowed;
        if within {
            self.add(number, 1);
        }
        within
    }

    fn add(&self, number: u64, increment: u64) {
        let interval = &self.intervals[(number % INTERVALS) as usize];
        let count_shift = increment.trailing_zeros();
        let changed = |packed: u64| {
            if number_of(packed) != number {
                return Some(number << (2 * COUNT_BITS) | increment);
            }
            let is_full = packed >> count_shift & LARGEST_COUNT == LARGEST_COUNT;
            (!is_full).then_some(packed + increment)
        };
        // At the largest value it stays.
        let _full = interval.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
    }
}

const NUMBER_MASK: u64 = (1 << 24) - 1;

fn number_of(packed: u64) -> u64 {
    packed >> (2 * COUNT_BITS)
}

/// Starts at [`INTERVALS`], because the number 0 is that of an interval that was never used.
fn interval_number(now: Duration, rules: &RetryRules) -> u64 {
    let interval_ms = (rules.window.as_millis() / u128::from(INTERVALS)).max(1);
    u64::try_from(now.as_millis() / interval_ms).map_or(0, |number| number + INTERVALS) & NUMBER_MASK
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: RetryRules = RetryRules {
        base_delay: Duration::from_millis(100),
        budget_percent: 20,
        min_retries: 10,
        window: Duration::from_secs(10),
    };

    #[test]
    fn delays_double_and_have_jitter_within_a_half() {
        let mut rng = Rng::with_seed(5);
        for (retry, about_ms) in [(1, 100), (2, 200), (3, 400), (4, 800), (40, 10_000)] {
            let delays: Vec<u64> =
                (0..200).map(|_| delay(&RULES, retry, &mut rng).as_millis() as u64).collect();
            assert!(delays.iter().all(|ms| (about_ms / 2..=about_ms * 3 / 2).contains(ms)), "{delays:?}");
            let range = delays.iter().max().unwrap() - delays.iter().min().unwrap();
            assert!(range > about_ms / 2, "{range} of {about_ms}");
        }
    }

    #[test]
    fn retries_are_a_share_of_the_requests_of_the_window() {
        let budget = RetryBudget::default();
        let at = Duration::from_millis;
        let retries = |now| (0..10_000).filter(|_| budget.try_retry(now, &RULES)).count();
        assert_eq!(retries(at(0)), 10);
        for ms in 0..1000 {
            budget.request(at(ms), &RULES);
        }
        // 20 % of 1000 and 10, less the 10 of before.
        assert_eq!(retries(at(999)), 200);
        assert_eq!(retries(at(9_999)), 0);
        // The interval of the first second has left the window.
        assert_eq!(retries(at(10_000)), 10);
        // After a long pause nothing is left of it.
        assert_eq!(retries(at(1_000_000)), 10);
    }

    #[test]
    fn it_agrees_with_a_list_of_everything_over_random_histories() {
        for seed in 0..100 {
            let mut rng = Rng::with_seed(seed);
            let budget = RetryBudget::default();
            let (mut requests, mut retries): (Vec<u64>, Vec<u64>) = Default::default();
            let mut now_ms = 0;
            for _ in 0..2000 {
                now_ms += rng.u64(..200);
                let recent = |list: &[u64]| {
                    list.iter().filter(|&&ms| now_ms / 1000 - ms / 1000 < INTERVALS).count() as u64
                };
                let now = Duration::from_millis(now_ms);
                if rng.u8(..3) > 0 {
                    budget.request(now, &RULES);
                    requests.push(now_ms);
                } else {
                    let expected = recent(&retries) < 10 + recent(&requests) * 20 / 100;
                    assert_eq!(budget.try_retry(now, &RULES), expected, "seed {seed} at {now_ms}");
                    if expected {
                        retries.push(now_ms);
                    }
                }
            }
        }
    }
}
