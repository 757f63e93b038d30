//! The recent latency of one endpoint: an average that follows a rise at once and a fall slowly.
//!
//! Without answers it fades, so that a pod that was slow is tried again after a while.

use std::time::Duration;

/// Time in which an old value loses 63 % of its weight.
const DECAY: Duration = Duration::from_secs(10);

/// A peak-sensitive moving average. Times are durations since any fixed moment.
#[derive(Debug, Default)]
pub struct PeakEwma {
    last: Option<Observed>,
}

#[derive(Debug, Clone, Copy)]
struct Observed {
    average_ms: f64,
    at: Duration,
}

impl PeakEwma {
    /// An answer took this long.
    pub fn observe(&mut self, latency: Duration, now: Duration) {
        let latency_ms = latency.as_secs_f64() * 1e3;
        let average_ms = match self.last {
            Some(last) if latency_ms < last.average_ms => {
                let weight = remaining(last.at, now);
                last.average_ms * weight + latency_ms * (1.0 - weight)
            }
            _ => latency_ms,
        };
        self.last = Some(Observed { average_ms, at: now });
    }

    /// The average in milliseconds at `now`; `None` before the first answer.
    #[must_use]
    pub fn average_ms(&self, now: Duration) -> Option<f64> {
        self.last.map(|last| last.average_ms * remaining(last.at, now))
    }
}

fn remaining(at: Duration, now: Duration) -> f64 {
    (-now.saturating_sub(at).as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let mut latency = PeakEwma::default();
        assert_eq!(latency.average_ms(Duration::ZERO), None);
        let mut now = Duration::ZERO;
        let mut observe = |latency: &mut PeakEwma, ms: u64, after_ms: u64| {
            now += Duration::from_millis(after_ms);
            latency.observe(Duration::from_millis(ms), now);
            latency.average_ms(now).unwrap()
        };
        assert!((observe(&mut latency, 20, 0) - 20.0).abs() < 1e-9);
        assert!((observe(&mut latency, 400, 1) - 400.0).abs() < 1e-9);
        let after_one = observe(&mut latency, 20, 100);
        assert!((390.0..400.0).contains(&after_one), "{after_one}");
        let after_long = observe(&mut latency, 20, 60_000);
        assert!((20.0..25.0).contains(&after_long), "{after_long}");
    }

    #[test]
    fn without_answers_it_fades() {
        let mut latency = PeakEwma::default();
        latency.observe(Duration::from_secs(1), Duration::ZERO);
        let faded = latency.average_ms(Duration::from_secs(10)).unwrap();
        assert!((faded - 1000.0 / std::f64::consts::E).abs() < 1e-6, "{faded}");
    }
}
