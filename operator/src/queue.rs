//! Requests for passes over objects, in lanes: what is new goes before what echoes.
//!
//! A burst of new models must not wait for the events of models that exist already. Each lane is first in,
//! first out. A request that waits is moved up one lane every [`AGEING`], so that none starves. Requests of
//! one object are one, and no object has two passes at the same time.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// From a request for an object that exists to its pass: events of one object within this time are one pass.
/// Short, because every step of a pod's start passes here.
pub const DELAY: Duration = Duration::from_millis(20);

/// A request that has waited for this long moves up one lane.
pub const AGEING: Duration = Duration::from_secs(5);

/// Number of lanes.
const LANES: usize = 5;

/// How urgent a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// The object has no children yet.
    New,
    /// Its spec changed.
    Spec,
    /// One of its children or pods changed.
    Child,
    /// Its status changed, or a time has come.
    Status,
    /// Something was published about it.
    Events,
}

impl Lane {
    fn delay(self) -> Duration {
        match self {
            Self::New | Self::Spec => Duration::ZERO,
            Self::Child | Self::Status | Self::Events => DELAY,
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

/// What to do after a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action {
    /// When to pass again without a change.
    after: Option<Duration>,
}

impl Action {
    /// Pass again after this time, or at the next change.
    #[must_use]
    pub fn requeue(after: Duration) -> Self {
        Self { after: Some(after) }
    }

    /// Pass again at the next change.
    #[must_use]
    pub fn await_change() -> Self {
        Self { after: None }
    }

    /// When to pass again without a change.
    #[must_use]
    pub fn after(self) -> Option<Duration> {
        self.after
    }
}

/// When a request is served. Numbers order requests of one instant.
type Ready = (Instant, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueuedRequest {
    lane: Lane,
    ready: Ready,
}

/// What an object with a pass in progress needs afterwards.
#[derive(Debug, Clone, Copy)]
struct Again {
    lane: Lane,
    at: Instant,
}

/// At most one entry for each object that exists, so its bound is their number.
#[derive(Debug)]
struct QueueState<K> {
    waiting: HashMap<K, QueuedRequest>,
    lanes: [BTreeMap<Ready, K>; LANES],
    in_progress: HashMap<K, Option<Again>>,
    number: u64,
}

impl<K: Clone + Eq + Hash> QueueState<K> {
    fn insert(&mut self, key: &K, wanted: Again) {
        let mut ready = wanted.at;
        let mut lane = wanted.lane;
        if let Some(earlier) = self.waiting.get(key).copied() {
            if earlier.lane <= lane && earlier.ready.0 <= ready {
                return;
            }
            lane = lane.min(earlier.lane);
            ready = ready.min(earlier.ready.0);
            self.lanes[earlier.lane.index()].remove(&earlier.ready);
        }
        self.number += 1;
        let ready = (ready, self.number);
        self.lanes[lane.index()].insert(ready, key.clone());
        self.waiting.insert(key.clone(), QueuedRequest { lane, ready });
    }

    /// The lane in which the first request of `lane` counts now, with the time since which it is ready.
    fn head(&self, lane: usize, now: Instant) -> Option<(usize, Ready)> {
        let (ready, _) = self.lanes[lane].first_key_value()?;
        let waited = now.checked_duration_since(ready.0)?;
        let steps = usize::try_from(waited.as_millis() / AGEING.as_millis()).unwrap_or(LANES);
        Some((lane.saturating_sub(steps), *ready))
    }

    /// Removes the most urgent request that is ready.
    fn pop(&mut self, now: Instant) -> Option<K> {
        let urgency = |lane: usize| self.head(lane, now).map(|head| (head, lane));
        let (_, lane) = (0..LANES).filter_map(urgency).min()?;
        let (_, key) = self.lanes[lane].pop_first()?;
        self.waiting.remove(&key);
        self.in_progress.insert(key.clone(), None);
        Some(key)
    }

    /// When the next request becomes ready.
    fn next_ready(&self) -> Option<Instant> {
        self.lanes.iter().filter_map(|lane| lane.first_key_value()).map(|(ready, _)| ready.0).min()
    }
}

/// A queue of objects that need a pass. `K` identifies an object.
#[derive(Debug)]
pub struct Queue<K> {
    state: Mutex<QueueState<K>>,
    changed: Notify,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        let state = QueueState {
            waiting: HashMap::new(),
            lanes: std::array::from_fn(|_| BTreeMap::new()),
            in_progress: HashMap::new(),
            number: 0,
        };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }
}

impl<K: Clone + Eq + Hash> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, QueueState<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests a pass.
    pub fn request(&self, key: &K, lane: Lane) {
        self.request_after(key, lane, lane.delay());
    }

    /// Requests a pass after a time. If one is requested for an earlier time, that one stays.
    pub fn request_after(&self, key: &K, lane: Lane, pause: Duration) {
        let wanted = Again { lane, at: Instant::now() + pause };
        {
            let mut state = self.lock();
            match state.in_progress.get_mut(key) {
                Some(again) => {
                    let earlier = again.unwrap_or(wanted);
                    *again = Some(Again { lane: lane.min(earlier.lane), at: wanted.at.min(earlier.at) });
                }
                None => state.insert(key, wanted),
            }
        }
        self.changed.notify_one();
    }

    /// Waits for the most urgent object that needs a pass. It has no other pass until [`Queue::finish`]. One
    /// task at a time may wait.
    pub async fn next(&self) -> K {
        loop {
            let next_ready = {
                let mut state = self.lock();
                if let Some(key) = state.pop(Instant::now()) {
                    return key;
                }
                state.next_ready()
            };
            let ripe = async {
                match next_ready {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = ripe => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Records the end of a pass. What was requested meanwhile is queued.
    pub fn finish(&self, key: &K) {
        {
            let mut state = self.lock();
            if let Some(Some(again)) = state.in_progress.remove(key) {
                state.insert(key, again);
            }
        }
        self.changed.notify_one();
    }

    /// Whether a request of this lane waits.
    #[must_use]
    pub fn has_waiting(&self, lane: Lane) -> bool {
        !self.lock().lanes[lane.index()].is_empty()
    }

    /// Number of objects that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Whether no object waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use proptest::prelude::*;
    use tokio::time::{advance, sleep, timeout};

    #[tokio::test(start_paused = true)]
    async fn requests_of_one_object_within_the_delay_are_one() {
        let queue = Queue::default();
        for name in ["a", "b", "a", "a"] {
            queue.request(&name, Lane::Child);
        }
        assert_eq!(queue.next().await, "a");
        assert_eq!(queue.next().await, "b");
        queue.finish(&"a");
        assert!(timeout(DELAY * 5, queue.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_object_with_endless_events_still_gets_its_pass() {
        let queue = Arc::new(Queue::default());
        let events = Arc::clone(&queue);
        tokio::spawn(async move {
            loop {
                events.request(&"busy", Lane::Child);
                sleep(DELAY / 4).await;
            }
        });
        let started = Instant::now();
        for _ in 0..10 {
            let key = queue.next().await;
            queue.finish(&key);
        }
        assert!(started.elapsed() <= DELAY * 2 * 10, "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn new_objects_go_before_echoes_and_each_lane_is_first_in_first_out() {
        let queue = Queue::default();
        for (name, lane) in [
            ("event", Lane::Events),
            ("status", Lane::Status),
            ("child", Lane::Child),
            ("spec", Lane::Spec),
            ("new 1", Lane::New),
            ("new 2", Lane::New),
        ] {
            queue.request(&name, lane);
        }
        advance(DELAY).await;
        let mut order = Vec::new();
        for _ in 0..6 {
            order.push(queue.next().await);
        }
        assert_eq!(order, ["new 1", "new 2", "spec", "child", "status", "event"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_echo_that_has_aged_goes_before_new_objects() {
        let queue = Queue::default();
        queue.request(&1000, Lane::Child);
        advance(DELAY + AGEING * 2).await;
        queue.request(&1, Lane::New);
        assert_eq!(queue.next().await, 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn an_object_has_one_pass_at_a_time_and_forgets_no_request() {
        let queue = Queue::default();
        queue.request(&"a", Lane::New);
        assert_eq!(queue.next().await, "a");
        queue.request(&"a", Lane::Status);
        queue.request(&"a", Lane::Spec);
        assert!(timeout(DELAY * 5, queue.next()).await.is_err(), "its first pass is not over");
        queue.finish(&"a");
        assert_eq!(queue.next().await, "a");
        queue.finish(&"a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_for_later_waits_unless_an_earlier_one_comes() {
        let queue = Queue::default();
        queue.request_after(&"a", Lane::Status, Duration::from_secs(60));
        assert!(timeout(Duration::from_secs(59), queue.next()).await.is_err());
        assert_eq!(timeout(Duration::from_secs(2), queue.next()).await.ok(), Some("a"));
        queue.finish(&"a");
        queue.request_after(&"a", Lane::Status, Duration::from_secs(60));
        queue.request(&"a", Lane::New);
        assert_eq!(timeout(DELAY, queue.next()).await.ok(), Some("a"));
    }

    /// A stream of new objects at the rate at which passes are made, beside requests in other lanes.
    fn waits_of_old_requests(lanes: &[usize], pass_ms: u64) -> Vec<Duration> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            const ALL: [Lane; LANES] = [Lane::New, Lane::Spec, Lane::Child, Lane::Status, Lane::Events];
            let queue = Queue::default();
            let started = Instant::now();
            for (number, lane) in lanes.iter().enumerate() {
                queue.request(&number, ALL[*lane]);
            }
            let mut waits = Vec::new();
            let mut new = 1_000_000;
            while waits.len() < lanes.len() {
                queue.request(&new, Lane::New);
                new += 1;
                let key = queue.next().await;
                if key < 1_000_000 {
                    waits.push(started.elapsed());
                }
                advance(Duration::from_millis(pass_ms)).await;
                queue.finish(&key);
            }
            waits
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// The queue is never empty of new objects. An old request waits at most until it has aged through
        /// all lanes, plus one pass for each request that is as old, plus one for each new one before.
        #[test]
        fn no_request_starves(lanes in prop::collection::vec(0..LANES, 1..20), pass_ms in 1_u64..50) {
            let waits = waits_of_old_requests(&lanes, pass_ms);
            let ageing = AGEING * u32::try_from(LANES).unwrap();
            let passes = Duration::from_millis(pass_ms) * u32::try_from(2 * lanes.len() + 2).unwrap();
            for wait in waits {
                prop_assert!(wait <= ageing + passes + DELAY, "{wait:?}");
            }
        }
    }
}
