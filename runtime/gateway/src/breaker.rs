//! The circuit breaker of one endpoint: a pod that fails again and again gets no requests for a while.
//!
//! Ejection (`eject`) is for pods that can't be connected to; a breaker is for pods that accept a request
//! and then fail it: with a server's error, a broken stream, or no answer in time. A full queue is no
//! failure, because the pod works. After the pause one attempt is admitted as a probe, and its end decides.
//! A probe that never ends (its caller left, or waits for ever) does not keep the breaker open: the next
//! attempt becomes the probe after another pause.

use std::time::Duration;

/// When a breaker opens, and for how long. Either rule can be off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerRules {
    /// Failures in a row that open it; 0: off.
    pub consecutive_failures: u32,
    /// Share of failures in the window that opens it, in percent; 0: off.
    pub failure_percent: u32,
    /// Attempts in the window below which the share says nothing.
    pub min_attempts: u32,
    /// The window of the share.
    pub window: Duration,
    /// Time until a probe is admitted.
    pub open: Duration,
}

/// Intervals of the window. What is older than the window by less than one of them may still count.
const INTERVALS: u64 = 10;

/// What an endpoint's breaker says of the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is an ordinary attempt.
    Closed,
    /// It would be the probe.
    Probe,
    /// It is not admitted.
    Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BreakerState {
    Closed,
    Open {
        until: Duration,
    },
    /// The probe runs; if it does not end, another one is admitted at `until`.
    Probing {
        until: Duration,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Interval {
    number: u64,
    attempts: u32,
    failures: u32,
}

/// The breaker of one endpoint. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Breaker {
    state: BreakerState,
    consecutive: u32,
    intervals: [Interval; INTERVALS as usize],
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: BreakerState::Closed, consecutive: 0, intervals: Default::default() }
    }
}

impl Breaker {
    /// What it says of an attempt at `now`.
    #[must_use]
    pub fn admission(&self, now: Duration) -> Admission {
        match self.state {
            BreakerState::Closed => Admission::Closed,
            BreakerState::Open { until } | BreakerState::Probing { until } if now >= until => {
                Admission::Probe
            }
            BreakerState::Open { .. } | BreakerState::Probing { .. } => Admission::Open,
        }
    }

    /// Makes the attempt at `now` the probe; false where it may not be one.
    pub fn start_probe(&mut self, now: Duration, rules: &BreakerRules) -> bool {
        let admitted = self.admission(now) == Admission::Probe;
        if admitted {
            self.state = BreakerState::Probing { until: now + rules.open };
        }
        admitted
    }

    /// An attempt succeeded. The probe's success closes it.
    pub fn succeeded(&mut self, now: Duration, rules: &BreakerRules, probe: bool) {
        if probe {
            *self = Self::default();
        }
        self.consecutive = 0;
        self.count(now, rules, false);
    }

    /// An attempt failed. True where this opened it. Failures of attempts that began before it opened change
    /// nothing.
    pub fn failed(&mut self, now: Duration, rules: &BreakerRules, probe: bool) -> bool {
        match self.state {
            BreakerState::Closed => {}
            BreakerState::Open { .. } | BreakerState::Probing { .. } if probe => {
                self.state = BreakerState::Open { until: now + rules.open };
                return true;
            }
            BreakerState::Open { .. } | BreakerState::Probing { .. } => return false,
        }
        self.consecutive = self.consecutive.saturating_add(1);
        self.count(now, rules, true);
        let in_a_row = rules.consecutive_failures > 0 && self.consecutive >= rules.consecutive_failures;
        if in_a_row || self.exceeds_share(now, rules) {
            *self = Self { state: BreakerState::Open { until: now + rules.open }, ..Self::default() };
            return true;
        }
        false
    }

    /// The probe ended without an outcome, so that another attempt may be one at once.
    pub fn probe_cancelled(&mut self, now: Duration) {
        if matches!(self.state, BreakerState::Probing { .. }) {
            self.state = BreakerState::Open { until: now };
        }
    }

    fn count(&mut self, now: Duration, rules: &BreakerRules, failure: bool) {
        let number = interval_number(now, rules);
        let interval = &mut self.intervals[(number % INTERVALS) as usize];
        if interval.number != number {
            *interval = Interval { number, attempts: 0, failures: 0 };
        }
        interval.attempts = interval.attempts.saturating_add(1);
        interval.failures = interval.failures.saturating_add(u32::from(failure));
    }

    fn exceeds_share(&self, now: Duration, rules: &BreakerRules) -> bool {
        if rules.failure_percent == 0 {
            return false;
        }
        let number = interval_number(now, rules);
        let recent =
            self.intervals.iter().filter(|interval| number - interval.number.min(number) < INTERVALS);
        let (attempts, failures) = recent.fold((0_u64, 0_u64), |(attempts, failures), interval| {
            (attempts + u64::from(interval.attempts), failures + u64::from(interval.failures))
        });
        attempts >= u64::from(rules.min_attempts.max(1))
            && failures * 100 >= attempts * u64::from(rules.failure_percent)
    }
}

fn interval_number(now: Duration, rules: &BreakerRules) -> u64 {
    let interval_ms = (rules.window.as_millis() / u128::from(INTERVALS)).max(1);
    u64::try_from(now.as_millis() / interval_ms).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: BreakerRules = BreakerRules {
        consecutive_failures: 5,
        failure_percent: 0,
        min_attempts: 0,
        window: Duration::from_secs(10),
        open: Duration::from_secs(60),
    };

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        let opened: Vec<bool> = (0..5).map(|ms| breaker.failed(at(ms), &RULES, false)).collect();
        assert_eq!(opened, [false, false, false, false, true]);
        breaker
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let mut breaker = Breaker::default();
        for ms in 0..100 {
            assert!(!breaker.failed(at(ms), &RULES, false));
            if ms % 4 == 3 {
                breaker.succeeded(at(ms), &RULES, false);
            }
        }
        assert_eq!(breaker.admission(at(100)), Admission::Closed);
        assert_eq!(opened().admission(at(5)), Admission::Open);
    }

    #[test]
    fn exactly_one_probe_is_admitted_and_its_end_decides() {
        let mut breaker = opened();
        assert_eq!(breaker.admission(at(60_003)), Admission::Open);
        assert!(!breaker.start_probe(at(60_003), &RULES));
        assert_eq!((0..9).filter(|_| breaker.start_probe(at(60_004), &RULES)).count(), 1);
        // An attempt that began before it opened fails late: the probe alone counts.
        assert!(!breaker.failed(at(60_005), &RULES, false));
        assert!(breaker.failed(at(60_010), &RULES, true));
        assert_eq!(breaker.admission(at(120_009)), Admission::Open);
        assert!(breaker.start_probe(at(120_010), &RULES));
        breaker.succeeded(at(120_020), &RULES, true);
        assert_eq!(breaker.admission(at(120_020)), Admission::Closed);
        // It starts from nothing: one failure does not open it again.
        assert!(!breaker.failed(at(120_021), &RULES, false));
    }

    #[test]
    fn a_probe_without_an_end_is_followed_by_another() {
        let mut breaker = opened();
        assert!(breaker.start_probe(at(60_004), &RULES));
        assert!(!breaker.start_probe(at(120_003), &RULES));
        assert!(breaker.start_probe(at(120_004), &RULES));
        breaker.probe_cancelled(at(120_005));
        assert!(breaker.start_probe(at(120_005), &RULES));
    }

    #[test]
    fn the_share_counts_within_the_window_only() {
        let rules = BreakerRules { consecutive_failures: 0, failure_percent: 50, min_attempts: 10, ..RULES };
        let mut breaker = Breaker::default();
        // 4 of 9: too few attempts.
        for ms in 0..9 {
            if ms % 2 == 1 {
                assert!(!breaker.failed(at(ms), &rules, false));
            } else {
                breaker.succeeded(at(ms), &rules, false);
            }
        }
        // 11 s later these are forgotten, and 9 failures alone are too few again.
        for ms in 11_000..11_009 {
            assert!(!breaker.failed(at(ms), &rules, false), "{ms}");
        }
        assert!(breaker.failed(at(11_009), &rules, false));
    }

    /// A model that knows nothing of intervals: it keeps every outcome.
    #[test]
    fn it_agrees_with_a_plain_model_over_random_histories() {
        for seed in 0..300 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut breaker = Breaker::default();
            let (mut in_a_row, mut open_until, mut probing_until) = (0, None, None);
            let mut now_ms = 0;
            for _ in 0..400 {
                now_ms += rng.u64(..20_000);
                let now = at(now_ms);
                let expected = match (open_until, probing_until) {
                    (None, None) => Admission::Closed,
                    (Some(until), _) | (_, Some(until)) if now_ms >= until => Admission::Probe,
                    _ => Admission::Open,
                };
                assert_eq!(breaker.admission(now), expected, "seed {seed} at {now_ms}");
                let probe = expected == Admission::Probe && breaker.start_probe(now, &RULES);
                if probe {
                    (open_until, probing_until) = (None, Some(now_ms + 60_000));
                }
                match rng.u8(..3) {
                    0 if expected != Admission::Open => {
                        breaker.succeeded(now, &RULES, probe);
                        in_a_row = 0;
                        if probe {
                            probing_until = None;
                        }
                    }
                    1 if expected != Admission::Open => {
                        breaker.failed(now, &RULES, probe);
                        in_a_row += 1;
                        if probe || in_a_row == 5 {
                            (in_a_row, open_until, probing_until) = (0, Some(now_ms + 60_000), None);
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}
