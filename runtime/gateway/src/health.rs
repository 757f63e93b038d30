//! Active health checks: asks pods whether they are ready, on routes whose policy says so.
//!
//! The operator takes a pod that is not ready out of the table, as its kubelet sees it. These checks see what
//! only a gateway can: that the network between it and the pod is cut, or that the pod hangs while the
//! operator is away. A pod that fails them comes last, as an ejected one does; it is still asked where there
//! is no other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use http::StatusCode;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::call::outgoing_check;
use crate::endpoint::Endpoint;
use crate::gateway::Gateway;
use crate::metrics::Protocol;
use crate::routing::CheckedEndpoint;
use crate::table::EndpointId;

/// How pods are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthRules {
    /// Time between two checks of a pod.
    pub interval: Duration,
    /// A pod that does not answer for this long fails the check.
    pub timeout: Duration,
    /// Failed checks in a row after which a pod is left out.
    pub down_after: u32,
    /// Good checks in a row after which it is back.
    pub up_after: u32,
}

/// What the checks of a pod say. It counts as ready before the first one.
#[derive(Debug, Default)]
pub struct CheckState {
    is_down: bool,
    /// Checks in a row that contradict it.
    contrary: u32,
}

impl CheckState {
    /// Records a check. True where it changes whether the pod is down.
    pub fn record(&mut self, ready: bool, rules: &HealthRules) -> bool {
        if ready != self.is_down {
            self.contrary = 0;
            return false;
        }
        self.contrary += 1;
        let needed = if self.is_down { rules.up_after } else { rules.down_after };
        let changes = self.contrary >= needed.max(1);
        if changes {
            *self = Self { is_down: !self.is_down, contrary: 0 };
        }
        changes
    }

    /// Whether the pod is left out.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.is_down
    }
}

/// What every pod answers: whether it can serve.
const READY_PATH: &str = "/health/ready";
/// The shortest interval of a check is a second.
const TICK: Duration = Duration::from_millis(250);
/// Checks at a time: with a pod in two hung, and 2 s until each is noticed, 64 pods are checked per second.
const CONCURRENT: usize = 64;

/// Checks pods until `stop`.
pub(crate) async fn run(gateway: Arc<Gateway>, stop: CancellationToken) {
    let mut next: HashMap<EndpointId, Instant> = HashMap::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(routing) = gateway.routing() else { continue };
        let checked = routing.checked_endpoints();
        next.retain(|id, _| checked.iter().any(|one| one.endpoint.spec.id == *id));
        let now = Instant::now();
        let due: Vec<_> = checked
            .into_iter()
            .filter(|CheckedEndpoint { endpoint, rules }| {
                // The first check is at a random moment, so that neither gateways nor pods go in step.
                let first = || now + rules.interval.mul_f64(fastrand::f64());
                let at = next.entry(endpoint.spec.id.clone()).or_insert_with(first);
                let is_due = *at <= now;
                if is_due {
                    *at = now + rules.interval;
                }
                is_due
            })
            .collect();
        let checks = futures::stream::iter(due).for_each_concurrent(
            CONCURRENT,
            |CheckedEndpoint { endpoint, rules }| async move {
                let ready = timeout(rules.timeout, is_ready(&endpoint)).await.unwrap_or(false);
                endpoint.checked(ready, &rules);
            },
        );
        if stop.run_until_cancelled(checks).await.is_none() {
            return;
        }
    }
}

async fn is_ready(endpoint: &Endpoint) -> bool {
    let address = endpoint.spec.id.http;
    let sent = endpoint.pool(Protocol::Http).send(|| outgoing_check(address, READY_PATH)).await;
    sent.is_ok_and(|answer| answer.response.status() == StatusCode::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: HealthRules = HealthRules {
        interval: Duration::from_secs(30),
        timeout: Duration::from_secs(2),
        down_after: 3,
        up_after: 2,
    };

    #[test]
    fn three_failures_in_a_row_take_a_pod_out_and_two_successes_bring_it_back() {
        let mut state = CheckState::default();
        let mut changes = Vec::new();
        for (check, ready) in
            [false, false, true, false, false, false, false, true, false, true, true, true].iter().enumerate()
        {
            if state.record(*ready, &RULES) {
                changes.push((check, state.is_down()));
            }
        }
        assert_eq!(changes, [(5, true), (10, false)]);
    }
}
