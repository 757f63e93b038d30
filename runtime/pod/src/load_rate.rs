//! How fast a load goes, over its last seconds.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// The rate is that of the bytes within this time: long enough that a stalled range of a download does not
/// make it jump, short enough that it follows a change of the network.
const WINDOW: Duration = Duration::from_secs(10);
/// Progress comes at most five times a second, so that the window holds at most 51 samples.
const MOST_SAMPLES: usize = 64;

/// The bytes at some moments of a load.
#[derive(Debug, Clone, Default)]
pub(crate) struct LoadRate {
    samples: VecDeque<(Instant, u64)>,
}

impl LoadRate {
    /// So many bytes are loaded now. Fewer than before: another attempt begins.
    pub(crate) fn record(&mut self, now: Instant, bytes: u64) {
        if self.samples.back().is_some_and(|(_, last)| bytes < *last) {
            self.samples.clear();
        }
        self.samples.push_back((now, bytes));
        let is_old = |sample: &(Instant, u64)| now.duration_since(sample.0) > WINDOW;
        while self.samples.len() > MOST_SAMPLES
            || (self.samples.len() > 2 && self.samples.front().is_some_and(is_old))
        {
            self.samples.pop_front();
        }
    }

    /// Bytes per second; 0 until two moments are known.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        let (Some((begin, before)), Some((end, after))) = (self.samples.front(), self.samples.back()) else {
            return 0;
        };
        let took_ms = end.duration_since(*begin).as_millis();
        let bytes = u128::from(after.saturating_sub(*before));
        (bytes * 1000).checked_div(took_ms).map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// Milliseconds until `left_bytes` more are loaded, at the present rate.
    pub(crate) fn eta_ms(&self, left_bytes: u64) -> Option<u64> {
        let milliseconds =
            (u128::from(left_bytes) * 1000).checked_div(u128::from(self.bytes_per_second()))?;
        Some(u64::try_from(milliseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_of_this_attempt() {
        let (mut rate, begin) = (LoadRate::default(), Instant::now());
        let mut at = |second: u64, bytes: u64| {
            rate.record(begin + Duration::from_secs(second), bytes);
            (rate.bytes_per_second(), rate.eta_ms(1000))
        };
        assert_eq!(at(0, 0), (0, None));
        assert_eq!(at(1, 1000), (1000, Some(1000)));
        for second in 2..=20 {
            at(second, 1000 + (second - 1) * 100);
        }
        assert_eq!(at(21, 3000), (100, Some(10_000)), "the fast start is over");
        assert_eq!(at(22, 0), (0, None), "another attempt");
        assert_eq!(at(24, 500), (250, Some(4000)));
    }
}
