//! The route feed: sends tables to gateways, receives their acknowledgements, and writes the readiness gates
//! of pods.
//!
//! What gateways report of their requests is summed in [`counts::GatewaySums`].
//!
//! Four tasks of the leader share one [`FeedState`]: `publish` creates tables, `service` sends them to
//! gateways and receives reports, `gateways` watches which gateways there are, `gates` writes readiness
//! gates. `trustformers_control::gate` decides what counts as acknowledged.

pub mod counts;
pub mod gates;
pub mod gateways;
pub mod identity;
pub mod publish;
pub mod service;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use trustformers_control::causes::Cause;
use trustformers_control::gate::{GateChange, Gates, GatewayCounts, GatewayPod, Report};
use trustformers_control::pods::PodView;
use trustformers_proto::control::v1::{Route, RouteTable};

/// What the tasks of the feed share for one term of a leader.
#[derive(Debug)]
pub struct FeedState {
    began: Instant,
    gates: Mutex<Gates>,
    tables: watch::Sender<Option<Arc<RouteTable>>>,
}

impl FeedState {
    /// The feed of a leader that starts to lead now.
    #[must_use]
    pub fn new(term: u64) -> Self {
        Self { began: Instant::now(), gates: Mutex::new(Gates::new(term)), tables: watch::Sender::new(None) }
    }

    /// Records that the feed's Service selects this leader from now on.
    pub fn set_reachable(&self) {
        self.lock().can_be_found(self.now());
    }

    /// Publishes a table with these routes.
    pub fn publish(&self, routes: Vec<Route>) {
        let version = self.lock().publish(&routes, self.now());
        self.tables.send_replace(Some(Arc::new(RouteTable { version: Some(version), routes })));
    }

    /// The present table, and every later one. `None` before the first.
    #[must_use]
    pub fn tables(&self) -> watch::Receiver<Option<Arc<RouteTable>>> {
        self.tables.subscribe()
    }

    /// Records which gateway pods exist. True if readiness gates may change.
    pub fn set_gateway_pods(&self, pods: impl IntoIterator<Item = GatewayPod>) -> bool {
        self.lock().set_pods(pods)
    }

    /// The pod of a gateway, by its identity.
    #[must_use]
    pub fn gateway_pod(&self, instance: &str) -> Option<GatewayPod> {
        self.lock().pod(instance).cloned()
    }

    /// Why no readiness gate opens, if gateways are the cause.
    #[must_use]
    pub fn hold(&self) -> Option<Cause> {
        self.lock().hold(self.now())
    }

    /// The gateways that were left out since the last call because they acknowledge nothing.
    #[must_use]
    pub fn newly_behind(&self) -> Vec<String> {
        self.lock().newly_behind(self.now())
    }

    /// Records a gateway's report. True if readiness gates may change.
    pub fn report(&self, report: Report) -> bool {
        self.lock().report(report, self.now())
    }

    /// The change that the readiness gate of `pod` needs, if any.
    #[must_use]
    pub fn change(&self, pod: &PodView) -> Option<GateChange> {
        self.lock().change(pod, self.now())
    }

    /// Whether no gateway sends requests to this revision of the route any more.
    #[must_use]
    pub fn is_unrouted(&self, route: &str, revision: &str) -> bool {
        let now = self.now();
        self.lock().is_unrouted(route, revision, now)
    }

    /// How many gateways there are.
    #[must_use]
    pub fn counts(&self) -> GatewayCounts {
        self.lock().counts(self.now())
    }

    /// When time alone may change a gate next.
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
