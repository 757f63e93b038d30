//! The drain: the gateway ends without failing a request that it could have served.
//!
//! After SIGTERM the gateway is still in address lists for a moment, so it goes on accepting: readiness and
//! reports say that it drains, and it ends when no new request has come for a while. A timer alone would be
//! too short for a slow load balancer and too long for a fast one.
//!
//! HTTP/2 callers and idle WebSockets would never leave by themselves, so they are told to connect again.
//! That helps only once this gateway has left the address lists: before, they may come back to it. New
//! connections show that it is still in one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Without a new request for this long, load balancers have learned that this gateway drains.
pub const QUIET: Duration = Duration::from_secs(5);

/// Without a new connection for this long, load balancers send none here any more. It is also the least time
/// from a connection to its end, so that the caller's first request has been sent.
const UNLISTED: Duration = Duration::from_secs(1);

/// A load balancer that still sends connections this long after the drain began does not look at readiness.
/// With [`QUIET`] it is a third of the default drain's first half, which is 30 s.
const LONGEST_LISTED: Duration = Duration::from_secs(5);

/// Whether the gateway drains, and the requests that it waits for.
#[derive(Debug)]
pub struct Drain {
    created: Instant,
    draining: watch::Sender<bool>,
    /// Whether the listeners close.
    closing: watch::Sender<bool>,
    in_flight: AtomicUsize,
    /// Milliseconds from `created` to the last request.
    last_arrival_ms: AtomicU64,
    /// Milliseconds from `created` to the last new connection.
    last_connection_ms: AtomicU64,
    /// Milliseconds from `created` to the begin of the drain.
    began_ms: AtomicU64,
    ended: Notify,
}

/// A request that the drain waits for until this is dropped.
#[derive(Debug)]
pub struct DrainGuard(Arc<Drain>);

impl Drop for DrainGuard {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl Drain {
    /// Not draining, nothing in flight.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            created: Instant::now(),
            draining: watch::Sender::new(false),
            closing: watch::Sender::new(false),
            in_flight: AtomicUsize::new(0),
            last_arrival_ms: AtomicU64::new(0),
            last_connection_ms: AtomicU64::new(0),
            began_ms: AtomicU64::new(0),
            ended: Notify::new(),
        })
    }

    /// Counts a request that was just received. Probes are not counted, because they never stop.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> DrainGuard {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.last_arrival_ms.store(self.now_ms(), Ordering::Release);
        DrainGuard(Arc::clone(self))
    }

    /// A connection was accepted.
    pub fn connected(&self) {
        self.last_connection_ms.store(self.now_ms(), Ordering::Release);
    }

    /// Begins the drain.
    pub fn start(&self) {
        // Where it has begun already, the first call counts. 0 means that it has not.
        let now_ms = self.now_ms().max(1);
        let _began = self.began_ms.compare_exchange(0, now_ms, Ordering::AcqRel, Ordering::Acquire);
        if !self.draining.send_replace(true) {
            tracing::info!(
                in_flight = self.in_flight(),
                "draining: requests are answered until no more come"
            );
        }
    }

    /// The listeners close: nobody has to wait until new connections go elsewhere.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Whether the drain has begun.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Changes when the drain begins.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// Requests whose answers have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Returns once the drain has begun.
    pub async fn started(&self) {
        let mut draining = self.watch();
        // The sender lives in `self`, so waiting can't fail.
        let _draining = draining.wait_for(|draining| *draining).await;
    }

    /// Returns once the drain has begun and a caller that is told to connect again reaches another gateway,
    /// as far as can be seen from here: no connection has come for a second, or five have passed since the
    /// begin. Not before a second has passed since the call, unless the listeners close.
    pub async fn unlisted(&self) {
        self.started().await;
        let mut closing = self.closing.subscribe();
        let closed = async {
            // The sender lives in `self`, so waiting can't fail.
            let _closed = closing.wait_for(|closing| *closing).await;
        };
        tokio::pin!(closed);
        let own = Instant::now() + UNLISTED;
        let began = self.at_ms(self.began_ms.load(Ordering::Acquire));
        loop {
            let last = self.at_ms(self.last_connection_ms.load(Ordering::Acquire)) + UNLISTED;
            let unlisted_at = last.min(began + LONGEST_LISTED).max(own);
            if Instant::now() >= unlisted_at {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep_until(unlisted_at) => {}
                () = &mut closed => return,
            }
        }
    }

    /// Returns once no request has come for [`QUIET`], counted from now at the earliest, or at the deadline.
    pub async fn quiet(&self, deadline: Instant) {
        let from_ms = self.now_ms();
        loop {
            let last_ms = self.last_arrival_ms.load(Ordering::Acquire).max(from_ms);
            let quiet_at = self.at_ms(last_ms) + QUIET;
            if Instant::now() >= quiet_at.min(deadline) {
                return;
            }
            tokio::time::sleep_until(quiet_at.min(deadline)).await;
        }
    }

    /// Returns true once nothing is in flight, false at the deadline.
    pub async fn idle(&self, deadline: Instant) -> bool {
        loop {
            // Registered before the check, so that an end in between is not missed.
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
        u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn at_ms(&self, ms: u64) -> Instant {
        self.created + Duration::from_millis(ms)
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
    async fn quiet_is_five_seconds_from_the_last_request() {
        let drain = Drain::new();
        sleep(Duration::from_secs(100)).await;
        drain.start();
        let began = Instant::now();
        let entered = Arc::clone(&drain);
        let requests = tokio::spawn(async move {
            for _ in 0..3 {
                sleep(Duration::from_secs(4)).await;
                drop(entered.enter());
            }
        });
        drain.quiet(far()).await;
        assert_eq!(began.elapsed(), Duration::from_secs(12) + QUIET);
        requests.await.unwrap();
    }

    /// When callers are told to connect again, in milliseconds from the drain's begin. Connections come every
    /// 400 ms until `last_ms`.
    async fn told_at(last_ms: u64) -> u128 {
        let drain = Drain::new();
        tokio::time::advance(Duration::from_secs(100)).await;
        drain.connected();
        tokio::time::advance(Duration::from_secs(100)).await;
        let began = Instant::now();
        drain.start();
        let accepting = Arc::clone(&drain);
        let connections = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(400));
            ticks.tick().await;
            for _ in 0..last_ms / 400 {
                ticks.tick().await;
                accepting.connected();
            }
        });
        drain.unlisted().await;
        let told = began.elapsed().as_millis();
        connections.await.unwrap();
        told
    }

    #[tokio::test(start_paused = true)]
    async fn callers_are_told_to_connect_again_when_new_connections_go_elsewhere() {
        assert_eq!(told_at(0).await, 1000);
        assert_eq!(told_at(2000).await, 3000);
        assert_eq!(told_at(60_000).await, 5000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_comes_during_the_drain_has_a_second_for_its_request() {
        let drain = Drain::new();
        drain.start();
        sleep(Duration::from_secs(20)).await;
        drain.connected();
        let began = Instant::now();
        drain.unlisted().await;
        assert_eq!(began.elapsed(), UNLISTED);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_listeners_that_close() {
        let drain = Drain::new();
        drain.start();
        let began = Instant::now();
        let closing = Arc::clone(&drain);
        let closed = tokio::spawn(async move {
            sleep(Duration::from_millis(300)).await;
            closing.close();
        });
        drain.unlisted().await;
        drain.unlisted().await;
        assert_eq!(began.elapsed(), Duration::from_millis(300));
        closed.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_ends_the_drain() {
        let drain = Drain::new();
        let deadline = Instant::now() + Duration::from_secs(2);
        let request = drain.enter();
        drain.quiet(deadline).await;
        assert_eq!(Instant::now(), deadline);
        assert!(!drain.idle(deadline).await);
        drop(request);
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
    async fn the_start_wakes_every_waiter() {
        let drain = Drain::new();
        assert!(!drain.is_draining());
        let waiting = Arc::clone(&drain);
        let woken = tokio::spawn(async move { waiting.started().await });
        drain.start();
        woken.await.unwrap();
        assert!(drain.is_draining());
    }
}
