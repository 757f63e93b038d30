//! What gateways have counted, for every task of the leader to read.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use trustformers_control::counts::{CountStore, Counts, Reported, SeriesKey};
use trustformers_control::gate::LEFT_OUT;

/// How often processes that ended are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// The sums of all gateways since this operator leads. Those of gateways that ended before are not in them.
pub struct GatewaySums {
    began: Instant,
    sums: Mutex<Sums>,
}

#[derive(Default)]
struct Sums {
    store: CountStore,
    swept: Duration,
}

impl Default for GatewaySums {
    fn default() -> Self {
        Self { began: Instant::now(), sums: Mutex::default() }
    }
}

impl fmt::Debug for GatewaySums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewaySums").field("began", &self.began).finish_non_exhaustive()
    }
}

impl GatewaySums {
    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records what the process of a gateway reports.
    pub fn record(&self, process: &str, report: Reported<'_>) {
        let now = self.began.elapsed();
        let mut sums = self.lock();
        sums.store.report(process, report, now);
        if now.saturating_sub(sums.swept) >= SWEEP_INTERVAL {
            sums.swept = now;
            sums.store.sweep(now);
        }
    }

    /// What was counted of a revision. [`Counts::since`] of two of them is what was counted in between.
    #[must_use]
    pub fn of(&self, key: &SeriesKey) -> Counts {
        self.lock().store.of(key)
    }

    /// What each gateway process has counted of a revision since it started, by its id.
    #[must_use]
    pub fn by_process(&self, key: &SeriesKey) -> BTreeMap<String, Counts> {
        self.lock().store.by_process(key)
    }

    /// Requests that wait for a pod of a route at the gateways that report.
    #[must_use]
    pub fn held(&self, route: &str) -> u64 {
        self.lock().store.held(route, self.began.elapsed(), LEFT_OUT)
    }

    /// Attempts on a revision that run at the gateways that report.
    #[must_use]
    pub fn in_flight(&self, key: &SeriesKey) -> u64 {
        self.lock().store.in_flight(key, self.began.elapsed(), LEFT_OUT)
    }
}
