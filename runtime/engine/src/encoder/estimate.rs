//! What the dynamic window goes by: how soon the next request may come, and what a step costs whatever is in it.
//!
//! Both forget quickly. A guess that is wrong costs a text at most one window, and the guesses err on the side of not
//! waiting.

use std::time::Duration;

/// How many of the last gaps count. The longest of them is the guess: one long gap among them, as at the beginning of
/// a burst, and nobody waits.
const GAPS: usize = 4;

/// Weight of what was known before, for each new step: about the last twenty count.
const MEMORY: f64 = 0.95;

/// Steps that must have been seen.
const FEWEST_STEPS: f64 = 3.0;

/// Share of the spread of step times that the line must explain before it is believed.
const EXPLAINED: f64 = 0.5;

/// When requests came.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    last: Option<Duration>,
    gaps: [Option<Duration>; GAPS],
    next: usize,
}

impl Arrivals {
    /// A request came.
    pub(super) fn note(&mut self, at: Duration) {
        if let Some(last) = self.last {
            // Requests of several threads may be told in another order than they came.
            self.gaps[self.next] = Some(at.saturating_sub(last));
            self.next = (self.next + 1) % GAPS;
        }
        self.last = Some(self.last().max(at));
    }

    /// When the last one came.
    pub(super) fn last(&self) -> Duration {
        self.last.unwrap_or_default()
    }

    /// The time until the next one, once a few have come.
    pub(super) fn gap(&self) -> Option<Duration> {
        self.gaps.iter().copied().try_fold(Duration::ZERO, |longest, gap| Some(longest.max(gap?)))
    }
}

/// How the time of a step depends on its tokens: a straight line through the last steps, found by least squares.
#[derive(Debug, Default)]
pub(super) struct StepTimes {
    seen_any: bool,
    weight: f64,
    tokens: f64,
    seconds: f64,
    tokens_tokens: f64,
    tokens_seconds: f64,
    seconds_seconds: f64,
}

impl StepTimes {
    /// A step of so many tokens took so long.
    pub(super) fn note(&mut self, tokens: usize, took: Duration) {
        // The first one also pays for touching all memory.
        if !std::mem::replace(&mut self.seen_any, true) {
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
            *sum = *sum * MEMORY + new;
        }
    }

    /// The part of a step's time that does not grow with its tokens; nought while that is not known.
    pub(super) fn fixed(&self) -> Duration {
        if self.weight < FEWEST_STEPS {
            return Duration::ZERO;
        }
        let (x, y) = (self.tokens / self.weight, self.seconds / self.weight);
        let spread_x = self.tokens_tokens / self.weight - x * x;
        let spread_y = self.seconds_seconds / self.weight - y * y;
        let together = self.tokens_seconds / self.weight - x * y;
        // Steps of nearly one size say nothing about the others.
        if spread_x < 0.01 * x * x || together <= 0.0 || together * together < EXPLAINED * spread_x * spread_y
        {
            return Duration::ZERO;
        }
        let fixed = y - together / spread_x * x;
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
        let mut seen = Vec::new();
        for at in [0, 100, 101, 103, 104, 105, 900, 901] {
            arrivals.note(ms(at));
            seen.push(arrivals.gap());
        }
        let wanted = [None, None, None, None, Some(ms(100)), Some(ms(2)), Some(ms(795)), Some(ms(795))];
        assert_eq!(seen, wanted);
        // One that is told late neither goes back in time nor makes the next gap longer.
        arrivals.note(ms(899));
        arrivals.note(ms(902));
        assert_eq!(arrivals.last(), ms(902));
        assert_eq!(arrivals.gaps.iter().flatten().min(), Some(&Duration::ZERO));
    }

    fn fixed(steps: &[(usize, u64)]) -> Duration {
        let mut times = StepTimes::default();
        for (tokens, us) in steps {
            times.note(*tokens, Duration::from_micros(*us));
        }
        times.fixed()
    }

    #[test]
    fn a_steps_fixed_part_is_found_and_follows_the_machine() {
        let line = |tokens: usize, fixed_us: u64| (tokens, fixed_us + 10 * tokens as u64);
        let mut steps = vec![(8, 900_000)];
        steps.extend([8, 64, 8, 64].map(|tokens| line(tokens, 2000)));
        let found = fixed(&steps).as_secs_f64();
        assert!((found - 0.002).abs() < 1e-6, "the first step counts: {found}");
        steps.extend([8, 64, 32].iter().cycle().take(120).map(|tokens| line(*tokens, 500)));
        let found = fixed(&steps).as_secs_f64();
        assert!((found - 0.0005).abs() < 1e-5, "{found}");
    }

    #[test]
    fn what_is_not_known_is_nought() {
        let cases: [(&str, &[(usize, u64)]); 5] = [
            ("nothing was seen", &[]),
            ("too few", &[(8, 100), (8, 100), (64, 200)]),
            ("all of one size", &[(9, 90), (64, 100), (64, 100), (64, 101), (64, 99), (64, 100)]),
            ("longer steps are faster", &[(9, 90), (8, 200), (64, 100), (8, 200), (64, 100), (8, 200)]),
            ("noise", &[(9, 90), (8, 900), (64, 150), (9, 100), (64, 990), (32, 20), (33, 990), (8, 30)]),
        ];
        for (what, steps) in cases {
            assert_eq!(fixed(steps), Duration::ZERO, "{what}");
        }
        // Time that only grows with the tokens has no fixed part.
        let proportional: Vec<_> = [8, 64, 8, 64, 32, 16].iter().map(|t| (*t, 10 * *t as u64)).collect();
        assert!(fixed(&proportional) < Duration::from_nanos(100));
    }
}
