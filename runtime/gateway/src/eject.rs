//! Passive ejection: an endpoint that refuses connections is left out for a short while.
//!
//! Only connecting counts. A pod that answers badly is still there, and its own readiness reports that; a pod
//! that can't be connected to is usually gone already, and the operator's next table removes it. The pause is
//! short, grows, and ends at the first success, so that a wrong ejection costs little. Where every endpoint
//! of a route is ejected, the choice ignores ejection.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Pause after the first failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer: a pod that is back has to wait for the end of a pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Failures to connect to one endpoint. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Ejection {
    pauses: ExponentialBackoff,
    until: Option<Duration>,
}

impl Default for Ejection {
    fn default() -> Self {
        let pauses = ExponentialBuilder::new()
            .with_min_delay(FIRST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times()
            .build();
        Self { pauses, until: None }
    }
}

impl Ejection {
    /// Connecting failed at `now`. Failures within a pause count once: several requests met the same event.
    pub fn failed(&mut self, now: Duration) {
        if self.is_ejected(now) {
            return;
        }
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE);
        self.until = Some(now + pause);
    }

    /// Connecting worked.
    pub fn succeeded(&mut self) {
        if self.until.is_some() {
            *self = Self::default();
        }
    }

    /// When the pause ends; `None` where there is none.
    #[must_use]
    pub fn until(&self) -> Option<Duration> {
        self.until
    }

    /// Whether the endpoint is left out at `now`.
    #[must_use]
    pub fn is_ejected(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Instant, advance};

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_a_success_ends_them() {
        let start = Instant::now();
        let mut state = Ejection::default();
        assert!(!state.is_ejected(start.elapsed()));
        for expected_ms in [250, 500, 1000, 2000, 4000, 5000, 5000] {
            state.failed(start.elapsed());
            advance(Duration::from_millis(expected_ms - 1)).await;
            assert!(state.is_ejected(start.elapsed()), "{expected_ms}");
            advance(Duration::from_millis(1)).await;
            assert!(!state.is_ejected(start.elapsed()), "{expected_ms}");
        }
        state.failed(start.elapsed());
        state.succeeded();
        assert!(!state.is_ejected(start.elapsed()));
        state.failed(start.elapsed());
        advance(Duration::from_millis(250)).await;
        assert!(!state.is_ejected(start.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_inside_a_pause_do_not_lengthen_it() {
        let start = Instant::now();
        let mut state = Ejection::default();
        for _ in 0..100 {
            state.failed(start.elapsed());
        }
        advance(FIRST_PAUSE).await;
        assert!(!state.is_ejected(start.elapsed()));
    }
}
