//! What the engine's thread and its callers both see: a handful of atomics.
//!
//! Admission, liveness and draining must work while the device thread is busy or hung, so none of them sends it a
//! message and waits for an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Whether an engine makes progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Time since the last finished step, or since work arrived if none was finished after that. Meaningful for
    /// liveness only together with `work_pending`.
    pub last_step_age: Duration,
    /// Whether any request waits or is computed.
    pub work_pending: bool,
    /// Whether the engine's thread still runs. False after a stop or a panic.
    pub alive: bool,
    /// Steps that failed since the last one that did not. Such a step is no progress: its age goes on.
    pub failed_steps: u64,
}

/// State that both sides read and write without waiting.
#[derive(Debug)]
pub(crate) struct Shared {
    born: Instant,
    /// Most places that are taken: those of one batch plus the queue.
    limit: usize,
    /// Taken places. As many as are in flight, but for what a long list has beyond the last place.
    places: AtomicUsize,
    /// Requests, or texts of requests, that wait or are computed.
    in_flight: AtomicUsize,
    running: AtomicUsize,
    /// Microseconds from `born` to the last sign of progress.
    progress_us: AtomicU64,
    /// Failed steps since the last good one.
    failed_steps: AtomicU64,
    /// Microseconds of work for one request, as the last ones took; 0 while none has ended.
    request_us: AtomicU64,
    accepting: AtomicBool,
    stopping: AtomicBool,
    alive: AtomicBool,
    /// Told whenever `in_flight` reaches zero or the thread ends.
    changed: Notify,
}

impl Shared {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            born: Instant::now(),
            limit,
            places: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            progress_us: AtomicU64::new(0),
            failed_steps: AtomicU64::new(0),
            request_us: AtomicU64::new(0),
            accepting: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            alive: AtomicBool::new(true),
            changed: Notify::new(),
        }
    }

    /// A place among the requests in flight, or `None` when all are taken.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Ticket> {
        self.enter_many(1, 0)
    }

    /// Places for so many at once, or `None` when all are taken already, `beyond` more than there are otherwise. While one
    /// is free all are let in: what comes together is taken together, or a request of many texts would be refused for
    /// ever. It then has all places that are left.
    pub(crate) fn enter_many(self: &Arc<Self>, many: usize, beyond: usize) -> Option<Ticket> {
        let limit = self.limit + beyond;
        let given = |before: usize| many.min(limit.saturating_sub(before));
        let before = self
            .places
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (given(n) > 0).then_some(n + given(n)))
            .ok()?;
        Some(self.ticket(given(before), many))
    }

    /// A place whatever the limit, for the engine's own requests.
    pub(crate) fn enter_unbounded(self: &Arc<Self>) -> Ticket {
        self.places.fetch_add(1, Ordering::SeqCst);
        self.ticket(1, 1)
    }

    fn ticket(self: &Arc<Self>, places: usize, many: usize) -> Ticket {
        if self.in_flight.fetch_add(many, Ordering::SeqCst) == 0 {
            // The clock of liveness starts when work arrives, not when the engine last had some.
            self.step_done();
        }
        Ticket { shared: Arc::clone(self), places, many }
    }

    pub(crate) fn step_done(&self) {
        let us = u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.progress_us.store(us, Ordering::SeqCst);
    }

    /// A step did what it should.
    pub(crate) fn step_succeeded(&self) {
        self.failed_steps.store(0, Ordering::SeqCst);
        self.step_done();
    }

    pub(crate) fn step_failed(&self) {
        self.failed_steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes note of the work that requests took which have ended, or an encoder's texts: so much for each.
    pub(crate) fn requests_took(&self, each: Duration) {
        let us = u64::try_from(each.as_micros()).unwrap_or(u64::MAX).max(1);
        let before = self.request_us.load(Ordering::Relaxed);
        // The last eight count most. Only the device thread writes.
        let now = if before == 0 { us } else { before - before / 8 + us / 8 };
        self.request_us.store(now, Ordering::Relaxed);
    }

    /// The time in which those that wait will probably have been served, in whole seconds from 1 to 60.
    pub(crate) fn retry_after(&self) -> Duration {
        let work_us = self.request_us.load(Ordering::Relaxed).saturating_mul(self.waiting() as u64);
        Duration::from_secs(work_us.div_ceil(1_000_000).clamp(1, 60))
    }

    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let progress = Duration::from_micros(self.progress_us.load(Ordering::SeqCst));
        Heartbeat {
            last_step_age: self.born.elapsed().saturating_sub(progress),
            work_pending: self.in_flight() > 0,
            alive: self.alive.load(Ordering::SeqCst),
            failed_steps: self.failed_steps.load(Ordering::SeqCst),
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.in_flight().saturating_sub(self.running.load(Ordering::SeqCst))
    }

    pub(crate) fn set_running(&self, running: usize) {
        self.running.store(running, Ordering::SeqCst);
    }

    pub(crate) fn accepting(&self) -> bool {
        self.accepting.load(Ordering::SeqCst) && self.alive.load(Ordering::SeqCst)
    }

    pub(crate) fn refuse_new(&self) {
        self.accepting.store(false, Ordering::SeqCst);
    }

    pub(crate) fn stop(&self) {
        self.refuse_new();
        self.stopping.store(true, Ordering::SeqCst);
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn thread_ended(&self) {
        self.alive.store(false, Ordering::SeqCst);
        self.set_running(0);
        self.changed.notify_waiters();
    }

    /// Waits until `done` holds; `done` is asked again after every change.
    async fn until(&self, done: impl Fn(&Self) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if done(self) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until nothing is in flight or the thread has ended.
    pub(crate) async fn until_idle(&self) {
        self.until(|s| s.in_flight() == 0 || !s.alive.load(Ordering::SeqCst)).await;
    }

    /// Waits until the thread has ended.
    pub(crate) async fn until_ended(&self) {
        self.until(|s| !s.alive.load(Ordering::SeqCst)).await;
    }
}

/// A request's place in flight. It travels with the request and is given back wherever the request is dropped, so no
/// path can forget it.
#[derive(Debug)]
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    places: usize,
    /// Requests, or texts of one request.
    many: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.shared.places.fetch_sub(self.places, Ordering::SeqCst);
        if self.shared.in_flight.fetch_sub(self.many, Ordering::SeqCst) == self.many {
            self.shared.changed.notify_waiters();
        }
    }
}

/// Marks the thread as ended even when it unwinds.
#[derive(Debug)]
pub(crate) struct EndMark(pub(crate) Arc<Shared>);

impl Drop for EndMark {
    fn drop(&mut self) {
        self.0.thread_ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_back() {
        let shared = Arc::new(Shared::new(2));
        let first = shared.enter().unwrap();
        let second = shared.enter().unwrap();
        assert!(shared.enter().is_none());
        drop(first);
        let third = shared.enter().unwrap();
        assert_eq!(shared.in_flight(), 2);
        drop((second, third));
        assert_eq!(shared.in_flight(), 0);
    }

    #[test]
    fn what_comes_together_is_taken_together_while_there_is_a_place() {
        let shared = Arc::new(Shared::new(2));
        let one = shared.enter().unwrap();
        let many = shared.enter_many(5, 0).unwrap();
        assert_eq!(shared.in_flight(), 6);
        assert!(shared.enter_many(1, 0).is_none());
        // What goes beyond is counted from the limit on, however long the list is.
        let beyond = [shared.enter_many(1, 2).unwrap(), shared.enter_many(3, 2).unwrap()];
        assert!(shared.enter_many(1, 2).is_none());
        assert_eq!(shared.in_flight(), 10);
        drop(many);
        assert_eq!(shared.in_flight(), 5);
        assert!(shared.enter().is_none(), "two places beyond and the first one are still taken");
        drop(beyond);
        assert!(shared.enter().is_some());
        drop(one);
        assert_eq!((shared.in_flight(), shared.places.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn work_on_a_dead_thread_shows_as_pending_and_not_alive() {
        let shared = Arc::new(Shared::new(1));
        drop(EndMark(Arc::clone(&shared)));
        let _ticket = shared.enter();
        let beat = shared.heartbeat();
        assert!(beat.work_pending && !beat.alive);
        assert!(!shared.accepting());
    }

    #[test]
    fn failures_in_a_row_are_counted_and_are_no_progress() {
        let shared = Arc::new(Shared::new(1));
        shared.step_failed();
        shared.step_failed();
        assert_eq!(shared.heartbeat().failed_steps, 2);
        shared.step_succeeded();
        assert_eq!(shared.heartbeat().failed_steps, 0);
    }

    #[test]
    fn who_is_refused_is_told_when_those_who_wait_will_have_been_served() {
        let shared = Arc::new(Shared::new(100));
        let tickets: Vec<_> = (0..20).filter_map(|_| shared.enter()).collect();
        assert_eq!(shared.retry_after().as_secs(), 1, "nothing is known yet");
        shared.set_running(4);
        shared.requests_took(Duration::from_millis(250));
        assert_eq!(shared.retry_after().as_secs(), 4, "16 requests wait");
        shared.requests_took(Duration::from_millis(2250));
        assert_eq!(shared.retry_after().as_secs(), 8, "each takes half a second now");
        for _ in 0..100 {
            shared.requests_took(Duration::from_secs(1000));
        }
        assert_eq!(shared.retry_after().as_secs(), 60);
        drop(tickets);
    }

    #[tokio::test]
    async fn waiting_for_idle_ends_with_the_last_ticket() {
        let shared = Arc::new(Shared::new(2));
        let ticket = shared.enter().unwrap();
        let waiter = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move { shared.until_idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(ticket);
        waiter.await.unwrap();
    }
}
