//! The route feed: publishes tables to gateways, hears what they acknowledge, and opens pods' readiness gates by it.
//!
//! Three tasks of the leader share one [`Hub`]: `publish` makes tables, `service` carries them to gateways and reports
//! back, `gates` writes readiness gates. What counts as acknowledged is decided in `trustformers_control::gate`.

pub mod gates;
pub mod identity;
pub mod publish;
pub mod service;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use trustformers_control::gate::{Census, GateChange, Gates, Report};
use trustformers_control::pods::PodView;
use trustformers_proto::control::v1::{Route, RouteTable};

/// What the tasks of the feed share for one term of a leader.
#[derive(Debug)]
pub struct Hub {
    began: Instant,
    gates: Mutex<Gates>,
    tables: watch::Sender<Option<Arc<RouteTable>>>,
}

impl Hub {
    /// The feed of a leader that begins to lead now.
    #[must_use]
    pub fn new(term: u64) -> Self {
        Self { began: Instant::now(), gates: Mutex::new(Gates::new(term)), tables: watch::Sender::new(None) }
    }

    /// Notes that the feed's Service leads to this leader from now on.
    pub fn can_be_found(&self) {
        self.lock().can_be_found(self.now());
    }

    /// Publishes a table with these routes.
    pub fn publish(&self, routes: Vec<Route>) {
        let version = self.lock().publish(&routes);
        self.tables.send_replace(Some(Arc::new(RouteTable { version: Some(version), routes })));
    }

    /// The table in force, and every later one. `None` before the first.
    #[must_use]
    pub fn tables(&self) -> watch::Receiver<Option<Arc<RouteTable>>> {
        self.tables.subscribe()
    }

    /// Notes a gateway's report. True where readiness gates may change by it.
    pub fn report(&self, report: Report) -> bool {
        self.lock().report(report, self.now())
    }

    /// What to do with the readiness gate of `pod`, if anything.
    #[must_use]
    pub fn wanted(&self, pod: &PodView) -> Option<GateChange> {
        self.lock().wanted(pod, self.now())
    }

    /// How many gateways there are.
    #[must_use]
    pub fn census(&self) -> Census {
        self.lock().census(self.now())
    }

    /// When the passing of time alone may open a gate next.
    #[must_use]
    pub fn next_change(&self) -> Option<Duration> {
        let now = self.now();
        self.lock().next_change(now).map(|instant| instant.saturating_sub(now))
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Gates> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
