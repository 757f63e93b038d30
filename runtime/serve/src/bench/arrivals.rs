//! The times at which an open loop sends its requests, independent of the answers to earlier ones.
//!
//! Callers do not wait for each other. A load that asks only after an answer came slows down with the server
//! and hides its worst moments; one with fixed times does not.

use std::time::Duration;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How arrivals are spread in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Spacing {
    /// As independent callers come: exponential gaps, so that some come together.
    Poisson,
    /// Evenly.
    Constant,
    /// Sixteen at once, then none until the rate is kept.
    Bursts,
}

/// Arrivals of one burst: half of what a batch takes by default, so that a burst alone does not fill it.
const BURST: u32 = 16;

/// Due times counted from the start, ascending, without end.
#[derive(Debug)]
pub(super) struct Arrivals {
    spacing: Spacing,
    gap_s: f64,
    due_s: f64,
    /// Arrivals so far.
    count: u32,
    rng: ChaCha12Rng,
}

impl Arrivals {
    /// `rate` arrivals a second (above 0) on average; the same seed gives the same times.
    pub(super) fn new(spacing: Spacing, rate: f64, seed: u64) -> Self {
        Self { spacing, gap_s: 1.0 / rate, due_s: 0.0, count: 0, rng: ChaCha12Rng::seed_from_u64(seed) }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let due = Duration::try_from_secs_f64(self.due_s).ok()?;
        self.count = self.count.wrapping_add(1);
        self.due_s += match self.spacing {
            Spacing::Constant => self.gap_s,
            Spacing::Bursts if self.count.is_multiple_of(BURST) => self.gap_s * f64::from(BURST),
            Spacing::Bursts => 0.0,
            Spacing::Poisson => {
                // 53 random bits make a uniform number in [0, 1); its distance to 1 is never 0.
                let uniform = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
                -(1.0 - uniform).ln() * self.gap_s
            }
        };
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_arrivals_are_evenly_spaced_from_the_start() {
        let due: Vec<f64> =
            Arrivals::new(Spacing::Constant, 4.0, 1).take(4).map(|due| due.as_secs_f64()).collect();
        assert_eq!(due, [0.0, 0.25, 0.5, 0.75]);
    }

    #[test]
    fn bursts_come_at_once_and_keep_the_rate() {
        let due: Vec<f64> =
            Arrivals::new(Spacing::Bursts, 32.0, 1).take(33).map(|due| due.as_secs_f64()).collect();
        assert!(
            due[..16].iter().all(|due| *due == 0.0) && due[16..32].iter().all(|due| *due == 0.5),
            "{due:?}"
        );
        assert_eq!(due[32], 1.0);
    }

    #[test]
    fn poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() {
        let due: Vec<f64> =
            Arrivals::new(Spacing::Poisson, 50.0, 7).take(20_001).map(|due| due.as_secs_f64()).collect();
        assert!(due.is_sorted());
        let gaps: Vec<f64> = due.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let count = gaps.len() as f64;
        let mean = gaps.iter().sum::<f64>() / count;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count).sqrt();
        // The mean of 20,000 exponential gaps strays by 1 / sqrt(20,000) = 0.7 % of itself; four of those are
        // allowed.
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "mean gap {mean}");
        // Deviation equals mean, and their ratio strays by about 1 %.
        assert!((deviation / mean - 1.0).abs() < 0.05, "deviation {deviation} of mean {mean}");
    }

    #[test]
    fn a_seed_repeats_and_another_does_not() {
        let times = |seed| Arrivals::new(Spacing::Poisson, 3.0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(times(1), times(1));
        assert_ne!(times(1), times(2));
    }
}
