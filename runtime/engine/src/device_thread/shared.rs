//! The state that the device thread and its callers share: a few atomics.
//!
//! Admission, liveness and draining must work while the device thread is busy or hung. So none of them sends
//! it a message and waits for the answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Whether an engine makes progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Time since the last finished step, or since work arrived if no step has finished after that. For
    /// liveness it counts only together with `work_pending`.
    pub last_step_age: Duration,
    /// Whether a request waits or runs.
    pub work_pending: bool,
    /// Whether the device thread still runs. False after a stop or a panic.
    pub alive: bool,
    /// Steps in a row that the device failed. Such a step is no progress: `last_step_age` keeps growing. A
    /// step that the device refused does not count.
    pub failed_steps: u64,
}

/// State that both sides read and write without blocking.
#[derive(Debug)]
pub(crate) struct Shared {
    created: Instant,
    /// Most permits: those of one batch and of the queue.
    limit: usize,
    /// Permits in use. Equal to `in_flight`, except that a request of many texts may hold fewer permits than
    /// texts.
    permits: AtomicUsize,
    /// Requests, or texts of requests, that wait or run.
    in_flight: AtomicUsize,
    running: AtomicUsize,
    /// Microseconds from `created` to the last sign of progress.
    progress_us: AtomicU64,
    /// Failed steps since the last one that succeeded.
    failed_steps: AtomicU64,
    /// Mean work for one recent request in microseconds; 0 while none has ended.
    request_us: AtomicU64,
    accepting: AtomicBool,
    stopping: AtomicBool,
    alive: AtomicBool,
    /// Notified when `in_flight` reaches zero and when the thread ends.
    changed: Notify,
}

impl Shared {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            created: Instant::now(),
            limit,
            permits: AtomicUsize::new(0),
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

    /// A permit for one request, or `None` when all are in use.
    pub(crate) fn acquire(self: &Arc<Self>) -> Option<Permit> {
        self.acquire_many(1, 0)
    }

    /// Whether a permit is left. Another thread may take it at any moment.
    pub(crate) fn has_permit(&self) -> bool {
        self.permits.load(Ordering::SeqCst) < self.limit
    }

    /// A permit for `count` texts together, or `None` when all permits are in use. `extra` permits exist
    /// beyond the limit for this call. While one permit is free the request is admitted whole, because a
    /// request of many texts would otherwise be refused for ever. It then holds the permits that are left.
    pub(crate) fn acquire_many(self: &Arc<Self>, count: usize, extra: usize) -> Option<Permit> {
        let limit = self.limit + extra;
        let granted = |used: usize| count.min(limit.saturating_sub(used));
        let used = self
            .permits
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (granted(n) > 0).then_some(n + granted(n)))
            .ok()?;
        Some(self.permit(granted(used), count))
    }

    /// A permit regardless of the limit, for the engine's own requests.
    pub(crate) fn acquire_unbounded(self: &Arc<Self>) -> Permit {
        self.permits.fetch_add(1, Ordering::SeqCst);
        self.permit(1, 1)
    }

    fn permit(self: &Arc<Self>, permits: usize, count: usize) -> Permit {
        if self.in_flight.fetch_add(count, Ordering::SeqCst) == 0 {
            // The clock of liveness starts when work arrives, not when the engine last had some.
            self.record_progress();
        }
        Permit { shared: Arc::clone(self), permits, count }
    }

    /// Records that the device thread made progress.
    pub(crate) fn record_progress(&self) {
        let us = u64::try_from(self.created.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.progress_us.store(us, Ordering::SeqCst);
    }

    /// Records a step that succeeded.
    pub(crate) fn step_succeeded(&self) {
        self.failed_steps.store(0, Ordering::SeqCst);
        self.record_progress();
    }

    /// Records a step that the device failed.
    pub(crate) fn step_failed(&self) {
        self.failed_steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Records the mean work of the requests (or an encoder's texts) that have ended.
    pub(crate) fn record_request_time(&self, each: Duration) {
        let us = u64::try_from(each.as_micros()).unwrap_or(u64::MAX).max(1);
        let before = self.request_us.load(Ordering::Relaxed);
        // A running mean of about the last eight. Only the device thread writes.
        let now = if before == 0 { us } else { before - before / 8 + us / 8 };
        self.request_us.store(now, Ordering::Relaxed);
    }

    /// The estimated time until the waiting requests have been served, in whole seconds from 1 to 60.
    pub(crate) fn retry_after(&self) -> Duration {
        let work_us = self.request_us.load(Ordering::Relaxed).saturating_mul(self.waiting() as u64);
        Duration::from_secs(work_us.div_ceil(1_000_000).clamp(1, 60))
    }

    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let progress = Duration::from_micros(self.progress_us.load(Ordering::SeqCst));
        Heartbeat {
            last_step_age: self.created.elapsed().saturating_sub(progress),
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

    /// Waits until `done` holds; it is evaluated again after every change.
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

/// Admits a request. It travels with the request and is released wherever the request is dropped, so that no
/// path can forget it.
#[derive(Debug)]
pub(crate) struct Permit {
    shared: Arc<Shared>,
    permits: usize,
    /// Requests, or texts of one request.
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.permits.fetch_sub(self.permits, Ordering::SeqCst);
        if self.shared.in_flight.fetch_sub(self.count, Ordering::SeqCst) == self.count {
            self.shared.changed.notify_waiters();
        }
    }
}

/// Marks the thread as ended even when it unwinds.
#[derive(Debug)]
pub(crate) struct EndGuard(pub(crate) Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.thread_ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_bounded_and_released() {
        let shared = Arc::new(Shared::new(2));
        let first = shared.acquire().unwrap();
        let second = shared.acquire().unwrap();
        assert!(shared.acquire().is_none() && !shared.has_permit());
        drop(first);
        assert!(shared.has_permit());
        let third = shared.acquire().unwrap();
        assert_eq!(shared.in_flight(), 2);
        drop((second, third));
        assert_eq!(shared.in_flight(), 0);
    }

    #[test]
    fn many_texts_are_admitted_together_while_a_permit_is_free() {
        let shared = Arc::new(Shared::new(2));
        let one = shared.acquire().unwrap();
        let many = shared.acquire_many(5, 0).unwrap();
        assert_eq!(shared.in_flight(), 6);
        assert!(shared.acquire_many(1, 0).is_none());
        // Extra permits are counted from the limit, however many texts a request has.
        let extra = [shared.acquire_many(1, 2).unwrap(), shared.acquire_many(3, 2).unwrap()];
        assert!(shared.acquire_many(1, 2).is_none());
        assert_eq!(shared.in_flight(), 10);
        drop(many);
        assert_eq!(shared.in_flight(), 5);
        assert!(shared.acquire().is_none(), "two extra permits and the first one are still in use");
        drop(extra);
        assert!(shared.acquire().is_some());
        drop(one);
        assert_eq!((shared.in_flight(), shared.permits.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn a_dead_thread_with_work_is_pending_and_not_alive() {
        let shared = Arc::new(Shared::new(1));
        drop(EndGuard(Arc::clone(&shared)));
        let _permit = shared.acquire();
        let beat = shared.heartbeat();
        assert!(beat.work_pending && !beat.alive);
        assert!(!shared.accepting());
    }

    #[test]
    fn failed_steps_in_a_row_are_counted() {
        let shared = Arc::new(Shared::new(1));
        shared.step_failed();
        shared.step_failed();
        assert_eq!(shared.heartbeat().failed_steps, 2);
        shared.step_succeeded();
        assert_eq!(shared.heartbeat().failed_steps, 0);
    }

    #[test]
    fn retry_after_estimates_the_time_of_the_waiting_requests() {
        let shared = Arc::new(Shared::new(100));
        let permits: Vec<_> = (0..20).filter_map(|_| shared.acquire()).collect();
        assert_eq!(shared.retry_after().as_secs(), 1, "no request has ended yet");
        shared.set_running(4);
        shared.record_request_time(Duration::from_millis(250));
        assert_eq!(shared.retry_after().as_secs(), 4, "16 requests wait");
        shared.record_request_time(Duration::from_millis(2250));
        assert_eq!(shared.retry_after().as_secs(), 8, "each takes half a second now");
        for _ in 0..100 {
            shared.record_request_time(Duration::from_secs(1000));
        }
        assert_eq!(shared.retry_after().as_secs(), 60);
        drop(permits);
    }

    #[tokio::test]
    async fn waiting_for_idle_ends_with_the_last_permit() {
        let shared = Arc::new(Shared::new(2));
        let permit = shared.acquire().unwrap();
        let waiter = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move { shared.until_idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(permit);
        waiter.await.unwrap();
    }
}
