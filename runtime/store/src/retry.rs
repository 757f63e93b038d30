//! Pauses between attempts: bounded in number, growing, and spread so that many pods do not ask at once.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::sleep;

use crate::error::StoreError;
use crate::settings::FetchLimits;

/// The most that a server's `Retry-After` is obeyed within one fetch.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The pauses that are left.
#[derive(Debug)]
pub(crate) struct Pauses {
    builder: ExponentialBuilder,
    left: ExponentialBackoff,
}

impl Pauses {
    pub(crate) fn new(limits: &FetchLimits) -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(limits.first_delay)
            .with_max_delay(limits.longest_delay)
            .with_max_times(limits.attempts.saturating_sub(1))
            .with_jitter();
        Self { builder, left: builder.build() }
    }

    /// All pauses again: something arrived.
    pub(crate) fn reset(&mut self) {
        self.left = self.builder.build();
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The error itself, where another attempt brings nothing or none is left.
    pub(crate) async fn after(&mut self, error: StoreError) -> Result<(), StoreError> {
        if !error.is_retried_at_once() {
            return Err(error);
        }
        let Some(delay) = self.left.next() else { return Err(error) };
        let asked = match &error {
            StoreError::Busy { retry_after, .. } => retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER),
            _ => Duration::ZERO,
        };
        tracing::info!(reason = error.reason(), %error, "trying again");
        sleep(delay.max(asked)).await;
        Ok(())
    }
}

/// Runs `attempt` until it succeeds or no attempt is left.
pub(crate) async fn retried<T, F>(
    limits: &FetchLimits,
    mut attempt: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut pauses = Pauses::new(limits);
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => pauses.after(error).await?,
        }
    }
}
