//! Leaving without cutting anyone off.
//!
//! After SIGTERM the gateway is still in others' address lists for a moment, so it goes on accepting: readiness and
//! reports say that it leaves, and it ends when nothing new has come for a while. A timer alone would be too short
//! for a slow load balancer and too long for a quick one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// No new request for this long, and whoever sent them has learnt that this gateway leaves.
pub const QUIET: Duration = Duration::from_secs(5);

/// Whether the gateway is leaving, and what keeps it.
#[derive(Debug)]
pub struct Drain {
    started: Instant,
    leaving: watch::Sender<bool>,
    in_flight: AtomicUsize,
    /// Milliseconds after `started` at which the last request came.
    last_arrival_ms: AtomicU64,
    ended: Notify,
}

/// A request that the gateway stays for, until dropped.
#[derive(Debug)]
pub struct Busy(Arc<Drain>);

impl Drop for Busy {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl Drain {
    /// Not leaving, nothing in flight.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            leaving: watch::Sender::new(false),
            in_flight: AtomicUsize::new(0),
            last_arrival_ms: AtomicU64::new(0),
            ended: Notify::new(),
        })
    }

    /// Counts a request that was just received. Probes are not counted: they never stop.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Busy {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.last_arrival_ms.store(self.now_ms(), Ordering::Release);
        Busy(Arc::clone(self))
    }

    /// From now on the gateway is leaving.
    pub fn leave(&self) {
        if !self.leaving.send_replace(true) {
            tracing::info!(
                in_flight = self.in_flight(),
                "leaving: still answering until no request comes any more"
            );
        }
    }

    /// Whether it is leaving.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    /// Tells when it begins to leave.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// Requests whose answers have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Returns once it is leaving.
    pub async fn left(&self) {
        let mut leaving = self.watch();
        // The sender lives in `self`, so waiting can't fail.
        let _leaving = leaving.wait_for(|leaving| *leaving).await;
    }

    /// Returns once no request has come for [`QUIET`], counted from now at the earliest, or at the deadline.
    pub async fn quiet(&self, deadline: Instant) {
        let from_ms = self.now_ms();
        loop {
            let last_ms = self.last_arrival_ms.load(Ordering::Acquire).max(from_ms);
            let quiet_at = self.started + Duration::from_millis(last_ms) + QUIET;
            if Instant::now() >= quiet_at.min(deadline) {
                return;
            }
            tokio::time::sleep_until(quiet_at.min(deadline)).await;
        }
    }

    /// Returns true once nothing is in flight, false at the deadline.
    pub async fn idle(&self, deadline: Instant) -> bool {
        loop {
            // Asked for before looking, so that an end in between is not missed.
            let ended = self.ended.notified();
            if self.in_flight() == 0 {
                return true;
            }
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                return self.in_flight() == 0;
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_is_five_seconds_after_the_last_request() {
        let drain = Drain::new();
        sleep(Duration::from_secs(100)).await;
        drain.leave();
        let began = Instant::now();
        let visitor = Arc::clone(&drain);
        let visits = tokio::spawn(async move {
            for _ in 0..3 {
                sleep(Duration::from_secs(4)).await;
                drop(visitor.enter());
            }
        });
        drain.quiet(far()).await;
        assert_eq!(began.elapsed(), Duration::from_secs(12) + QUIET);
        visits.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_it() {
        let drain = Drain::new();
        let deadline = Instant::now() + Duration::from_secs(2);
        let busy = drain.enter();
        drain.quiet(deadline).await;
        assert_eq!(Instant::now(), deadline);
        assert!(!drain.idle(deadline).await);
        drop(busy);
        assert!(drain.idle(deadline).await);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_waits_for_the_last_answer() {
        let drain = Drain::new();
        let (one, two) = (drain.enter(), drain.enter());
        tokio::spawn(async move {
            sleep(Duration::from_secs(1)).await;
            drop(one);
            sleep(Duration::from_secs(30)).await;
            drop(two);
        });
        let began = Instant::now();
        assert!(drain.idle(far()).await);
        assert_eq!(began.elapsed(), Duration::from_secs(31));
    }

    #[tokio::test]
    async fn leaving_is_told_to_all() {
        let drain = Drain::new();
        assert!(!drain.is_leaving());
        let waiting = Arc::clone(&drain);
        let told = tokio::spawn(async move { waiting.left().await });
        drain.leave();
        told.await.unwrap();
        assert!(drain.is_leaving());
    }
}
