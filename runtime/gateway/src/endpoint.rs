//! One pod as this gateway sees it: its connections, its requests in flight, and whether it is left out.
//!
//! An endpoint outlives the table that named it first: the next table that names it keeps the counts, the
//! connections and the breaker. Times are those of its own clock, which starts when it comes.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use trustformers_api::answer_end::LOAD_HEADER;

use crate::breaker::{Admission, Breaker, BreakerRules};
use crate::eject::Ejection;
use crate::ewma::PeakEwma;
use crate::health::{CheckState, HealthRules};
use crate::metrics::Protocol;
use crate::pool::Pool;
use crate::table::EndpointSpec;

/// A pod's container.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// Identity, addresses and the pod's name.
    pub(crate) spec: EndpointSpec,
    /// A hash of the pod, the same in every gateway and after a restart.
    pub(crate) identity: u64,
    came_at: Instant,
    in_flight: AtomicUsize,
    /// Requests of other gateways, as the pod told last.
    of_others: AtomicUsize,
    /// Until when that counts, in milliseconds on its clock.
    of_others_until_ms: AtomicU64,
    ejection: Mutex<Ejection>,
    /// Milliseconds on its clock until which it is ejected; 0: it is not.
    ejected_until_ms: AtomicU64,
    /// The same for the time in which it asked to be left alone.
    declined_until_ms: AtomicU64,
    breaker: Mutex<Breaker>,
    /// Whether the breaker is not closed; read by every choice.
    breaker_is_open: AtomicBool,
    checks: Mutex<CheckState>,
    /// Whether its checks failed.
    is_down: AtomicBool,
    latency: Mutex<PeakEwma>,
    http: Pool,
    grpc: Pool,
}

/// An attempt in flight. It is counted until dropped, which is when the body of its answer has ended.
#[derive(Debug)]
pub(crate) struct InFlight {
    endpoint: Arc<Endpoint>,
    began: Instant,
    breaker: Option<BreakerRules>,
    /// Whether it is the breaker's probe and has no outcome yet.
    probe: bool,
    /// Whether the breaker has its outcome.
    counted: bool,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Ordering::AcqRel);
        if self.probe {
            self.endpoint.breaker_lock().probe_cancelled(self.endpoint.now());
        }
    }
}

impl InFlight {
    /// The head of an answer came that is no failure of the pod. `is_success`: the request was computed, so
    /// that the time says something; refusals are fast.
    pub(crate) fn answered(&mut self, is_success: bool) {
        if is_success {
            self.endpoint.observe(self.began.elapsed());
        }
        if self.probe {
            self.ended(false);
            // Its end counts once more, as that of any other attempt.
            self.counted = false;
        }
    }

    /// The attempt failed through the pod's fault, or ended well. The first word counts.
    pub(crate) fn ended(&mut self, failed: bool) {
        let probe = std::mem::take(&mut self.probe);
        if std::mem::replace(&mut self.counted, true) {
            return;
        }
        let Some(rules) = &self.breaker else { return };
        self.endpoint.count(rules, failed, probe);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Endpoint {
    /// An endpoint without requests or connections.
    pub(crate) fn new(spec: EndpointSpec) -> Self {
        let (http, grpc) = (Pool::new(spec.id.http), Pool::new(spec.id.grpc));
        // Without a random state: the same in every process.
        let mut hasher = DefaultHasher::new();
        spec.id.pod_uid.hash(&mut hasher);
        Self {
            identity: hasher.finish(),
            spec,
            came_at: Instant::now(),
            in_flight: AtomicUsize::new(0),
            of_others: AtomicUsize::new(0),
            of_others_until_ms: AtomicU64::new(0),
            ejection: Mutex::default(),
            ejected_until_ms: AtomicU64::new(0),
            declined_until_ms: AtomicU64::new(0),
            breaker: Mutex::default(),
            breaker_is_open: AtomicBool::new(false),
            checks: Mutex::default(),
            is_down: AtomicBool::new(false),
            latency: Mutex::default(),
            http,
            grpc,
        }
    }

    /// Time on its clock.
    fn now(&self) -> Duration {
        self.came_at.elapsed()
    }

    /// Time since it came.
    pub(crate) fn age(&self) -> Duration {
        self.now()
    }

    /// Counts an attempt. `probe`: whether it is the breaker's.
    pub(crate) fn enter(self: &Arc<Self>, breaker: Option<BreakerRules>, probe: bool) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight { endpoint: Arc::clone(self), began: Instant::now(), breaker, probe, counted: false }
    }

    /// Requests whose answers have not ended, with those of other gateways as far as the pod told of them.
    pub(crate) fn load(&self) -> usize {
        let is_fresh = self.is_before(&self.of_others_until_ms);
        let of_others = if is_fresh { self.of_others.load(Ordering::Relaxed) } else { 0 };
        self.in_flight.load(Ordering::Acquire) + of_others
    }

    /// The pod told in the head of an answer how many requests it has.
    pub(crate) fn reported(&self, headers: &HeaderMap) {
        let told = headers.get(LOAD_HEADER).and_then(|load| load.to_str().ok()?.parse::<usize>().ok());
        let Some(load) = told else { return };
        let of_others = load.saturating_sub(self.in_flight.load(Ordering::Acquire));
        self.of_others.store(of_others, Ordering::Relaxed);
        self.of_others_until_ms.store(milliseconds(self.now() + LOAD_IS_FRESH), Ordering::Release);
    }

    /// It took this long to begin an answer, or longer.
    pub(crate) fn observe(&self, latency: Duration) {
        lock(&self.latency).observe(latency, self.now());
    }

    /// What it recently took to begin an answer, in milliseconds.
    pub(crate) fn latency_ms(&self) -> Option<f64> {
        lock(&self.latency).average_ms(self.now())
    }

    /// The connections for a protocol.
    pub(crate) fn pool(&self, protocol: Protocol) -> &Pool {
        match protocol {
            Protocol::Http => &self.http,
            Protocol::Grpc => &self.grpc,
        }
    }

    /// Whether it is left out where there is another: it is ejected, its checks failed, or its breaker is
    /// open. Takes a lock only while the breaker is not closed.
    pub(crate) fn is_left_out(&self, breaker: Option<&BreakerRules>) -> bool {
        self.is_down.load(Ordering::Relaxed)
            || self.is_before(&self.ejected_until_ms)
            || self.is_before(&self.declined_until_ms)
            || (breaker.is_some() && self.admission() == Admission::Open)
    }

    fn is_before(&self, until_ms: &AtomicU64) -> bool {
        let until_ms = until_ms.load(Ordering::Acquire);
        until_ms > 0 && milliseconds(self.now()) < until_ms
    }

    /// What the breaker says of the next attempt.
    pub(crate) fn admission(&self) -> Admission {
        if self.breaker_is_open.load(Ordering::Acquire) {
            self.breaker_lock().admission(self.now())
        } else {
            Admission::Closed
        }
    }

    /// Makes the next attempt the breaker's probe; false where another one is it.
    pub(crate) fn start_probe(&self, rules: &BreakerRules) -> bool {
        self.breaker_lock().start_probe(self.now(), rules)
    }

    fn breaker_lock(&self) -> MutexGuard<'_, Breaker> {
        lock(&self.breaker)
    }

    /// An attempt ended. Used directly for one whose count was dropped before its outcome was certain.
    pub(crate) fn count(&self, rules: &BreakerRules, failed: bool, probe: bool) {
        let now = self.now();
        let mut breaker = self.breaker_lock();
        if failed {
            if breaker.failed(now, rules, probe) {
                tracing::warn!(
                    pod = self.spec.pod_name,
                    open_ms = milliseconds(rules.open),
                    "the circuit breaker of a pod opens"
                );
            }
        } else {
            breaker.succeeded(now, rules, probe);
        }
        self.breaker_is_open.store(breaker.admission(now) != Admission::Closed, Ordering::Release);
    }

    /// Connecting failed.
    pub(crate) fn connect_failed(&self) {
        let now = self.now();
        let mut ejection = lock(&self.ejection);
        ejection.failed(now);
        let until = ejection.until().map_or(0, milliseconds);
        self.ejected_until_ms.store(until, Ordering::Release);
    }

    /// The pod asked, with `Retry-After`, to be left alone.
    pub(crate) fn declined_for(&self, pause: Duration) {
        let until_ms = milliseconds(self.now() + pause.min(LONGEST_DECLINE));
        self.declined_until_ms.fetch_max(until_ms, Ordering::AcqRel);
    }

    /// The endpoint accepted a request.
    pub(crate) fn connected(&self) {
        if self.ejected_until_ms.load(Ordering::Acquire) > 0 {
            lock(&self.ejection).succeeded();
            self.ejected_until_ms.store(0, Ordering::Release);
        }
    }

    /// A health check ended.
    pub(crate) fn checked(&self, ready: bool, rules: &HealthRules) {
        let mut checks = lock(&self.checks);
        if checks.record(ready, rules) {
            self.is_down.store(checks.is_down(), Ordering::Relaxed);
            let pod = &self.spec.pod_name;
            tracing::warn!(pod, is_down = checks.is_down(), "the health checks of a pod changed");
        }
    }

    /// A route without health checks has this endpoint.
    pub(crate) fn is_not_checked(&self) {
        if self.is_down.swap(false, Ordering::Relaxed) {
            *lock(&self.checks) = CheckState::default();
        }
    }
}

/// What a pod told of its load counts this long; then other gateways may have found another pod.
const LOAD_IS_FRESH: Duration = Duration::from_secs(2);

/// A pod that names a longer time is asked again after this one: it may have been replaced by then.
const LONGEST_DECLINE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};
    use crate::table::Table;
    use tokio::time::advance;

    fn endpoint() -> Arc<Endpoint> {
        let text = TableText::new(1, 1).route("d/a", &[]).backend("r1", 1, &[endpoint_at("p", 1)]);
        let table = Table::parse(text.wire()).unwrap();
        Arc::new(Endpoint::new(table.routes[0].backends[0].endpoints[0].clone()))
    }

    const RULES: BreakerRules = BreakerRules {
        consecutive_failures: 2,
        failure_percent: 0,
        min_attempts: 1,
        window: Duration::from_secs(10),
        open: Duration::from_secs(60),
    };

    #[tokio::test(start_paused = true)]
    async fn requests_of_other_gateways_count_while_the_pods_word_is_fresh() {
        let endpoint = endpoint();
        let _own = [endpoint.enter(None, false), endpoint.enter(None, false)];
        let told = |load: usize| HeaderMap::from_iter([(LOAD_HEADER.parse().unwrap(), load.into())]);
        endpoint.reported(&told(7));
        assert_eq!(endpoint.load(), 7);
        let _third = endpoint.enter(None, false);
        assert_eq!(endpoint.load(), 8);
        advance(LOAD_IS_FRESH).await;
        assert_eq!(endpoint.load(), 3);
        endpoint.reported(&told(1));
        assert_eq!(endpoint.load(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_breaks_counts_as_a_failure_and_its_end_as_a_success() {
        let endpoint = endpoint();
        let run = |failed: bool| {
            let mut attempt = endpoint.enter(Some(RULES), false);
            attempt.answered(true);
            attempt.ended(failed);
        };
        run(true);
        run(false);
        run(true);
        assert!(!endpoint.is_left_out(Some(&RULES)));
        run(true);
        assert!(endpoint.is_left_out(Some(&RULES)));
        // A route without a breaker does not care.
        assert!(!endpoint.is_left_out(None));
        advance(RULES.open).await;
        assert_eq!(endpoint.admission(), Admission::Probe);
        assert!(endpoint.start_probe(&RULES));
        let mut probe = endpoint.enter(Some(RULES), true);
        // Nobody else is admitted meanwhile.
        assert!(endpoint.is_left_out(Some(&RULES)));
        probe.answered(true);
        assert_eq!(endpoint.admission(), Admission::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_whose_caller_leaves_makes_room_for_another() {
        let endpoint = endpoint();
        for _ in 0..2 {
            endpoint.enter(Some(RULES), false).ended(true);
        }
        advance(RULES.open).await;
        assert!(endpoint.start_probe(&RULES));
        drop(endpoint.enter(Some(RULES), true));
        assert_eq!(endpoint.admission(), Admission::Probe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_declines_is_left_alone_for_its_time() {
        let endpoint = endpoint();
        endpoint.declined_for(Duration::from_secs(3));
        advance(Duration::from_millis(2999)).await;
        assert!(endpoint.is_left_out(None));
        advance(Duration::from_millis(1)).await;
        assert!(!endpoint.is_left_out(None));
        endpoint.declined_for(Duration::from_secs(3600));
        advance(LONGEST_DECLINE).await;
        assert!(!endpoint.is_left_out(None));
    }
}
