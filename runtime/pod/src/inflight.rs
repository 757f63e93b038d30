//! Counts requests in flight and notes the last arrival: a drain waits for both.
//!
//! A model's requests count for the model and for the process: a model that is unloaded waits for its own, a
//! process that ends for all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Counts requests from their arrival until their last byte was made or their caller left.
#[derive(Debug)]
pub struct InflightRequests {
    in_flight: watch::Sender<usize>,
    last_arrival: Mutex<Instant>,
    /// Where these requests count, too.
    whole: Option<Arc<InflightRequests>>,
}

/// One request; it ends when this is dropped.
#[derive(Debug)]
pub struct InflightGuard(Arc<InflightRequests>);

impl Drop for InflightGuard {
    fn drop(&mut self) {
        self.0.count_down();
    }
}

impl InflightRequests {
    /// Nothing has come yet.
    pub fn new() -> Arc<Self> {
        Self::counting_in(None)
    }

    /// A part of these requests: each one of the part counts here, too.
    pub fn part(self: &Arc<Self>) -> Arc<Self> {
        Self::counting_in(Some(Arc::clone(self)))
    }

    fn counting_in(whole: Option<Arc<Self>>) -> Arc<Self> {
        let (in_flight, last_arrival) = (watch::Sender::new(0), Mutex::new(Instant::now()));
        Arc::new(Self { in_flight, last_arrival, whole })
    }

    /// A request has come.
    pub fn register(self: &Arc<Self>) -> InflightGuard {
        self.count_up();
        InflightGuard(Arc::clone(self))
    }

    fn count_up(&self) {
        *self.last_arrival.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.in_flight.send_modify(|count| *count += 1);
        if let Some(whole) = &self.whole {
            whole.count_up();
        }
    }

    fn count_down(&self) {
        self.in_flight.send_modify(|count| *count -= 1);
        if let Some(whole) = &self.whole {
            whole.count_down();
        }
    }

    /// Requests being answered.
    pub fn count(&self) -> usize {
        *self.in_flight.borrow()
    }

    /// Waits until no request has come for `quiet`, counted from this call at the earliest.
    pub async fn until_quiet(&self, quiet: Duration) {
        let begin = Instant::now();
        loop {
            let last = *self.last_arrival.lock().unwrap_or_else(PoisonError::into_inner);
            let until = last.max(begin) + quiet;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }

    /// Waits until nothing is being answered.
    pub async fn until_idle(&self) {
        // The sender lives in this very value, so the channel cannot be closed.
        let _ = self.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn quiet_is_counted_from_the_last_arrival() {
        let inflight = InflightRequests::new();
        let begin = Instant::now();
        let waiting = {
            let inflight = inflight.clone();
            tokio::spawn(async move { inflight.until_quiet(Duration::from_secs(2)).await })
        };
        tokio::time::sleep(Duration::from_millis(1500)).await;
        drop(inflight.register());
        waiting.await.unwrap();
        assert_eq!(begin.elapsed().as_millis(), 3500);
    }

    #[tokio::test(start_paused = true)]
    async fn an_arrival_long_ago_does_not_shorten_the_quiet() {
        let inflight = InflightRequests::new();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let begin = Instant::now();
        inflight.until_quiet(Duration::from_secs(2)).await;
        assert_eq!(begin.elapsed().as_secs(), 2);
    }

    #[tokio::test]
    async fn idle_is_when_the_last_request_is_dropped() {
        let inflight = InflightRequests::new();
        let (one, two) = (inflight.register(), inflight.register());
        drop(one);
        assert_eq!(inflight.count(), 1);
        let waiting = {
            let inflight = inflight.clone();
            tokio::spawn(async move { inflight.until_idle().await })
        };
        drop(two);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn a_part_counts_for_itself_and_for_the_whole() {
        let whole = InflightRequests::new();
        let (a, b) = (whole.part(), whole.part());
        let (of_a, of_b) = (a.register(), b.register());
        assert_eq!((a.count(), b.count(), whole.count()), (1, 1, 2));
        drop(of_a);
        a.until_idle().await;
        assert_eq!((a.count(), b.count(), whole.count()), (0, 1, 1));
        drop(of_b);
        whole.until_idle().await;
    }
}
