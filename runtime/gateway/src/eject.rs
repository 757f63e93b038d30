//! Passive ejection: an endpoint that refuses connections is left out for a short while.
//!
//! Only connecting counts. A pod that answers badly is still there and its own readiness speaks for it; a pod that
//! can't be connected to has usually been gone for a moment that the operator's next table will make up for. The
//! pause is short and grows, and the first success ends it, so that a wrong guess costs little. Where every
//! endpoint of a route is out, the choice is made as if none were.

use std::time::Duration;

/// Pause after the first failure.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer: a pod that came back must not wait for a timer.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What is known about connecting to one endpoint. Times are durations since any fixed moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ejection {
    failures: u32,
    until: Option<Duration>,
}

impl Ejection {
    /// Connecting failed at `now`. Failures within a pause count once: they are the same event seen by several
    /// requests.
    pub fn failed(&mut self, now: Duration) {
        if self.is_out(now) {
            return;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.until = Some(now + pause);
    }

    /// Connecting worked.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether the endpoint is to be left out at `now`.
    #[must_use]
    pub fn is_out(&self, now: Duration) -> bool {
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
        assert!(!state.is_out(start.elapsed()));
        for expected_ms in [250, 500, 1000, 2000, 4000, 5000, 5000] {
            state.failed(start.elapsed());
            advance(Duration::from_millis(expected_ms - 1)).await;
            assert!(state.is_out(start.elapsed()), "{expected_ms}");
            advance(Duration::from_millis(1)).await;
            assert!(!state.is_out(start.elapsed()), "{expected_ms}");
        }
        state.failed(start.elapsed());
        state.succeeded();
        assert!(!state.is_out(start.elapsed()));
        state.failed(start.elapsed());
        advance(Duration::from_millis(250)).await;
        assert!(!state.is_out(start.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_inside_a_pause_do_not_lengthen_it() {
        let start = Instant::now();
        let mut state = Ejection::default();
        for _ in 0..100 {
            state.failed(start.elapsed());
        }
        advance(FIRST_PAUSE).await;
        assert!(!state.is_out(start.elapsed()));
    }
}
