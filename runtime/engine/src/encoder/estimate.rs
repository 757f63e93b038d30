//! The estimates of the dynamic window: when the next request may arrive, and the fixed cost of a step.
//!
//! Both adapt quickly. A wrong estimate costs a text at most one window, and estimates err on the side of not
//! waiting.

use std::time::Duration;

/// How many of the last gaps count. The longest of them is the estimate: with one long gap among them, as at
/// the beginning of a burst, no text waits.
const GAPS: usize = 4;

/// Decay of the earlier steps at each new one: about the last twenty count.
const DECAY: f64 = 0.95;

/// Steps that an estimate needs.
const MIN_STEPS: f64 = 3.0;

/// Share of the variance of step times that the line must explain to be used.
const MIN_EXPLAINED: f64 = 0.5;

/// When requests arrived.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    last: Option<Duration>,
    gaps: [Option<Duration>; GAPS],
    next: usize,
}

impl Arrivals {
    /// Records the arrival of a request.
    pub(super) fn record(&mut self, at: Duration) {
        if let Some(last) = self.last {
            // Requests of several threads may be recorded in another order than that of their arrival.
            self.gaps[self.next] = Some(at.saturating_sub(last));
            self.next = (self.next + 1) % GAPS;
        }
        self.last = Some(self.last().max(at));
    }

    /// When the last one arrived.
    pub(super) fn last(&self) -> Duration {
        self.last.unwrap_or_default()
    }

    /// The estimated time between two requests, once a few have arrived.
    pub(super) fn gap(&self) -> Option<Duration> {
        self.gaps.iter().copied().try_fold(Duration::ZERO, |longest, gap| Some(longest.max(gap?)))
    }
}

/// The time of a step as a linear function of its tokens, fitted to the last steps by least squares.
#[derive(Debug, Default)]
pub(super) struct StepTimes {
    warmed_up: bool,
    weight: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
    seconds_seconds: f64,
}

impl StepTimes {
    /// Records a step.
    pub(super) fn record(&mut self, tokens: usize, took: Duration) {
        // The first one also includes the first use of all memory.
        if !std::mem::replace(&mut self.warmed_up, true) {
            return;
        }
        let (x, y) = (tokens as f64, took.as_secs_f64());
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.tokens, x),
            (&mut self.seconds, y),
            (&mut self.tokens_tokens, x * x),
            (&mut self.tokens_seconds, x * y),
            (&mut self.seconds_seconds, y * y),
        ] {
            *sum = *sum * DECAY + new;
        }
    }

    /// The time of a step that does not grow with its tokens; zero while it is not known.
    pub(super) fn fixed_cost(&self) -> Duration {
        if self.weight < MIN_STEPS {
            return Duration::ZERO;
        }
        let (x, y) = (self.tokens / self.weight, self.seconds / self.weight);
        let variance_x = self.tokens_tokens / self.weight - x * x;
        let variance_y = self.seconds_seconds / self.weight - y * y;
        let covariance = self.tokens_seconds / self.weight - x * y;
        // Steps of nearly equal size carry no information about other sizes.
        if variance_x < 0.01 * x * x
            || covariance <= 0.0
            || covariance * covariance < MIN_EXPLAINED * variance_x * variance_y
        {
            return Duration::ZERO;
        }
        let fixed = y - covariance / variance_x * x;
        Duration::try_from_secs_f64(fixed.min(y)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_gap_is_the_longest_of_the_last_four() {
        let mut arrivals = Arrivals::default();
        let mut gaps = Vec::new();
        for at in [0, 100, 101, 103, 104, 105, 900, 901] {
            arrivals.record(ms(at));
            gaps.push(arrivals.gap());
        }
        let wanted = [None, None, None, None, Some(ms(100)), Some(ms(2)), Some(ms(795)), Some(ms(795))];
        assert_eq!(gaps, wanted);
        // One that is recorded late neither moves the time back nor makes the next gap longer.
        arrivals.record(ms(899));
        arrivals.record(ms(902));
        assert_eq!(arrivals.last(), ms(902));
        assert_eq!(arrivals.gaps.iter().flatten().min(), Some(&Duration::ZERO));
    }

    fn fixed(steps: &[(usize, u64)]) -> Duration {
        let mut times = StepTimes::default();
        for (tokens, us) in steps {
            times.record(*tokens, Duration::from_micros(*us));
        }
        times.fixed_cost()
    }

    #[test]
    fn the_fixed_cost_of_a_step_is_found_and_adapts() {
        let line = |tokens: usize, fixed_us: u64| (tokens, fixed_us + 10 * tokens as u64);
        let mut steps = vec![(8, 900_000)];
        steps.extend([8, 64, 8, 64].map(|tokens| line(tokens, 2000)));
        let found = fixed(&steps).as_secs_f64();
        assert!((found - 0.002).abs() < 1e-6, "the first step must not count: {found}");
        steps.extend([8, 64, 32].iter().cycle().take(120).map(|tokens| line(*tokens, 500)));
        let found = fixed(&steps).as_secs_f64();
        assert!((found - 0.0005).abs() < 1e-5, "{found}");
    }

    #[test]
    fn an_unknown_fixed_cost_is_zero() {
        let cases: [(&str, &[(usize, u64)]); 5] = [
            ("no steps", &[]),
            ("too few steps", &[(8, 100), (8, 100), (64, 200)]),
            ("all of one size", &[(9, 90), (64, 100), (64, 100), (64, 101), (64, 99), (64, 100)]),
            ("longer steps are faster", &[(9, 90), (8, 200), (64, 100), (8, 200), (64, 100), (8, 200)]),
            ("noise", &[(9, 90), (8, 900), (64, 150), (9, 100), (64, 990), (32, 20), (33, 990), (8, 30)]),
        ];
        for (what, steps) in cases {
            assert_eq!(fixed(steps), Duration::ZERO, "{what}");
        }
        // A time that is proportional to the tokens has no fixed cost.
        let proportional: Vec<_> = [8, 64, 8, 64, 32, 16].iter().map(|t| (*t, 10 * *t as u64)).collect();
        assert!(fixed(&proportional) < Duration::from_nanos(100));
    }
}
