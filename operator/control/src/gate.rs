//! When a pod counts as routable, from what gateways have acknowledged: a state machine whose inputs carry
//! the time.
//!
//! A pod's readiness gate becomes true when every live gateway has acknowledged a table with this start of
//! this pod. Otherwise a rolling update could end the last pod that a gateway has in its table. A gateway is
//! live while its last report is younger than [`FRESH`]. Until it is older than [`LEFT_OUT`], gates wait for
//! it. After that the gateway is left out, so that one lost gateway cannot block every rollout. A broken
//! stream changes nothing by itself: the gateway may be reconnecting, or serving from its last table.
//!
//! A new leader opens no gate before [`SETTLE`] has passed since gateways can find it, because they need time
//! to connect. Without any gateway, the warm-up alone decides.
//!
//! Times are durations since the leader started to lead.

use std::collections::BTreeMap;
use std::time::Duration;

use trustformers_proto::control::v1::{Route, TableVersion};

use crate::pods::PodView;

/// A gateway whose last report is younger than this is live.
pub const FRESH: Duration = Duration::from_secs(3);
/// A gateway that does not report for this long is left out.
pub const LEFT_OUT: Duration = Duration::from_secs(5);
/// No gate opens within this time after gateways can find the leader: a gateway disconnects from a silent
/// leader after 2 s and waits up to 1 s before it connects again, and two such rounds must fit: 2 × (2 s + 1
/// s).
pub const SETTLE: Duration = Duration::from_secs(6);
/// The state of a gateway that does not report for this long is dropped.
const DROPPED: Duration = Duration::from_secs(300);

/// Reports of gateways, and the pods in the published tables.
#[derive(Debug)]
pub struct Gates {
    term: u64,
    /// Since when the feed's Service selects this leader.
    found_since: Option<Duration>,
    counter: u64,
    /// Each start of a pod (UID, restarts) in the table, with the first table since which it has been in
    /// every one.
    listed: BTreeMap<(String, u32), u64>,
    /// Each route and revision with requests, with the last table that gave it some.
    routed: BTreeMap<(String, String), u64>,
    gateways: BTreeMap<String, Gateway>,
}

#[derive(Debug)]
struct Gateway {
    reported: Duration,
    acknowledged: u64,
    draining: bool,
}

/// One report of a gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The gateway's identity.
    pub instance: String,
    /// The table that it routes with.
    pub acknowledged: Option<TableVersion>,
    /// It is shutting down.
    pub draining: bool,
}

/// How many gateways are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GatewayCounts {
    /// Reported within [`FRESH`].
    pub live: usize,
    /// Reported within [`LEFT_OUT`]: gates wait for them.
    pub late: usize,
    /// Silent for longer: gates do not wait for them.
    pub left_out: usize,
}

/// What to do with a pod's readiness gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateChange {
    /// Set it to true, for this restart of the container.
    Open {
        /// Restarts of the container that the acknowledgement holds for.
        restarts: u32,
    },
    /// Set it to false.
    Close,
}

impl Gates {
    /// The state of a leader that starts to lead.
    #[must_use]
    pub fn new(term: u64) -> Self {
        Self {
            term,
            found_since: None,
            counter: 0,
            listed: BTreeMap::new(),
            routed: BTreeMap::new(),
            gateways: BTreeMap::new(),
        }
    }

    /// Records that gateways can find this leader from now on.
    pub fn can_be_found(&mut self, now: Duration) {
        self.found_since.get_or_insert(now);
    }

    /// When gateways have had enough time to find this leader.
    fn settled(&self) -> Option<Duration> {
        self.found_since.map(|since| since + SETTLE)
    }

    /// Records that a table with these routes is published, and returns its version.
    pub fn publish(&mut self, routes: &[Route]) -> TableVersion {
        self.counter += 1;
        let endpoints =
            routes.iter().flat_map(|route| &route.backends).flat_map(|backend| &backend.endpoints);
        let now_listed = endpoints.map(|one| {
            let start = (one.pod_uid.clone(), one.restart_count);
            let since = self.listed.get(&start).copied().unwrap_or(self.counter);
            (start, since)
        });
        self.listed = now_listed.collect();
        // Revisions of models that are gone, and those that no gateway can route to any more.
        let oldest = self.gateways.values().map(|gateway| gateway.acknowledged).min().unwrap_or(0);
        self.routed.retain(|_, last| *last >= oldest);
        for route in routes {
            for backend in route.backends.iter().filter(|one| one.weight > 0 && !one.endpoints.is_empty()) {
                self.routed.insert((route.name.clone(), backend.revision.clone()), self.counter);
            }
        }
        TableVersion { term: self.term, counter: self.counter }
    }

    /// Records a gateway's report. True if it may change a gate.
    pub fn report(&mut self, report: Report, now: Duration) -> bool {
        let of_this_term = report.acknowledged.filter(|version| version.term == self.term);
        let acknowledged = of_this_term.map_or(0, |version| version.counter);
        let previous = self
            .gateways
            .insert(report.instance, Gateway { reported: now, acknowledged, draining: report.draining });
        previous.is_none_or(|before| {
            before.acknowledged != acknowledged
                || before.draining != report.draining
                || now.saturating_sub(before.reported) >= FRESH
        })
    }

    /// Whether every gateway that counts has acknowledged a table with this start of the pod.
    #[must_use]
    pub fn acknowledged(&self, uid: &str, restarts: u32, now: Duration) -> bool {
        let Some(since) = self.listed.get(&(uid.to_owned(), restarts)) else { return false };
        self.settled().is_some_and(|settled| now >= settled)
            && self
                .gateways
                .values()
                .filter(|gateway| !gateway.draining && now.saturating_sub(gateway.reported) < LEFT_OUT)
                .all(|gateway| gateway.acknowledged >= *since && now.saturating_sub(gateway.reported) < FRESH)
    }

    /// Whether no gateway that counts sends requests to this revision of the route any more.
    #[must_use]
    pub fn is_unrouted(&self, route: &str, revision: &str, now: Duration) -> bool {
        // Tables of an earlier leader may have given it requests: one of this leader must be in force.
        let last = self.routed.get(&(route.to_owned(), revision.to_owned())).copied().unwrap_or(0);
        self.settled().is_some_and(|settled| now >= settled)
            && last < self.counter
            && self
                .gateways
                .values()
                .filter(|gateway| !gateway.draining && now.saturating_sub(gateway.reported) < LEFT_OUT)
                .all(|gateway| gateway.acknowledged > last)
    }

    /// The change that the gate of `pod` needs, if any.
    #[must_use]
    pub fn change(&self, pod: &PodView, now: Duration) -> Option<GateChange> {
        if pod.deleting || pod.ended {
            return None;
        }
        match pod.gate {
            Some(gate) if gate.open => {
                let holds = pod.routable() && gate.restarts == Some(pod.restarts);
                (!holds).then_some(GateChange::Close)
            }
            _ => (pod.routable() && self.acknowledged(&pod.uid, pod.restarts, now))
                .then_some(GateChange::Open { restarts: pod.restarts }),
        }
    }

    /// When time alone may change a gate next.
    #[must_use]
    pub fn next_change(&self, now: Duration) -> Option<Duration> {
        let waited_for = self.gateways.values().filter(|gateway| !gateway.draining);
        waited_for
            .map(|gateway| gateway.reported + LEFT_OUT)
            .chain(self.settled())
            .filter(|instant| *instant > now)
            .min()
    }

    /// Counts the gateways, and drops those that have been silent for minutes.
    pub fn counts(&mut self, now: Duration) -> GatewayCounts {
        self.gateways.retain(|_, gateway| now.saturating_sub(gateway.reported) < DROPPED);
        let mut counts = GatewayCounts::default();
        for gateway in self.gateways.values().filter(|gateway| !gateway.draining) {
            match now.saturating_sub(gateway.reported) {
                silence if silence < FRESH => counts.live += 1,
                silence if silence < LEFT_OUT => counts.late += 1,
                _ => counts.left_out += 1,
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::StoredGate;
    use crate::pods::tests::view;
    use crate::routes::{RouteModel, routes};

    const S: Duration = Duration::from_secs(1);

    fn found(term: u64) -> Gates {
        let mut gates = Gates::new(term);
        gates.can_be_found(Duration::ZERO);
        gates
    }

    fn table(pods: &[PodView]) -> Vec<Route> {
        let model = RouteModel {
            key: ("team".to_owned(), "chat".to_owned()),
            created: None,
            policy: Default::default(),
            stored_digest: None,
            stored_task: None,
            rollout: None,
        };
        routes(&[model], pods, &BTreeMap::new())
    }

    fn report(gates: &mut Gates, instance: &str, counter: u64, at: Duration) -> bool {
        let acknowledged = Some(TableVersion { term: gates.term, counter });
        gates.report(Report { instance: instance.to_owned(), acknowledged, draining: false }, at)
    }

    #[test]
    fn a_revision_is_unrouted_when_every_gateway_has_a_table_without_requests_for_it() {
        let mut gates = found(1);
        let pod =
            |name: &str, revision: &str| PodView { revision: revision.to_owned(), ..view("chat", name) };
        gates.publish(&table(&[pod("a", "r1"), pod("b", "r2")]));
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S));
        gates.publish(&table(&[pod("a", "r1")]));
        for instance in ["g1", "g2"] {
            report(&mut gates, instance, 1, 9 * S);
        }
        report(&mut gates, "g1", 2, 10 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S), "one gateway has the first table");
        report(&mut gates, "g2", 2, 10 * S);
        assert!(gates.is_unrouted("team/chat", "r2", 10 * S));
        assert!(!gates.is_unrouted("team/chat", "r1", 10 * S));
        // A new leader does not know what the tables of the one before say.
        let mut gates = found(2);
        gates.publish(&table(&[pod("a", "r1")]));
        report(&mut gates, "g1", 0, 10 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S));
        report(&mut gates, "g1", 1, 10 * S);
        assert!(gates.is_unrouted("team/chat", "r2", 10 * S));
    }

    #[test]
    fn a_gate_opens_when_the_last_gateway_has_the_pod() {
        let mut gates = found(7);
        let pod = view("chat", "a");
        assert_eq!(gates.publish(&table(&[])), TableVersion { term: 7, counter: 1 });
        report(&mut gates, "g1", 1, 9 * S);
        report(&mut gates, "g2", 1, 9 * S);
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.change(&pod, 9 * S), None);
        assert!(report(&mut gates, "g1", 2, 10 * S));
        assert_eq!(gates.change(&pod, 10 * S), None);
        report(&mut gates, "g2", 2, 10 * S);
        assert_eq!(gates.change(&pod, 10 * S), Some(GateChange::Open { restarts: 0 }));
    }

    #[test]
    fn later_tables_with_the_pod_need_no_new_acknowledgement() {
        let mut gates = found(1);
        let (pod, other) = (view("chat", "a"), view("chat", "b"));
        gates.publish(&table(std::slice::from_ref(&pod)));
        report(&mut gates, "g", 1, 9 * S);
        gates.publish(&table(&[pod.clone(), other.clone()]));
        assert!(gates.acknowledged(&pod.uid, 0, 9 * S));
        assert!(!gates.acknowledged(&other.uid, 0, 9 * S));
    }

    #[test]
    fn gates_wait_for_a_silent_gateway_and_then_leave_it_out() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        report(&mut gates, "lost", 0, 10 * S);
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.next_change(12 * S), Some(15 * S));
        assert!(!gates.acknowledged(&pod.uid, 0, 14 * S));
        assert_eq!(gates.counts(14 * S), GatewayCounts { late: 1, ..GatewayCounts::default() });
        assert!(gates.acknowledged(&pod.uid, 0, 15 * S));
        assert_eq!(gates.counts(15 * S), GatewayCounts { left_out: 1, ..GatewayCounts::default() });
        assert_eq!(gates.counts(400 * S), GatewayCounts::default());
    }

    #[test]
    fn a_late_gateway_blocks_gates_that_it_acknowledged() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        report(&mut gates, "g", 1, 10 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 12 * S));
        assert!(!gates.acknowledged(&pod.uid, 0, 13 * S));
        assert!(report(&mut gates, "g", 1, 14 * S), "a report after a silence may open gates");
        assert!(gates.acknowledged(&pod.uid, 0, 14 * S));
    }

    #[test]
    fn without_gateways_the_warm_up_decides_after_settling() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.change(&pod, 2 * S), None);
        assert_eq!(gates.next_change(2 * S), Some(SETTLE));
        assert_eq!(gates.change(&pod, SETTLE), Some(GateChange::Open { restarts: 0 }));
    }

    #[test]
    fn gates_do_not_wait_for_a_draining_gateway() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        gates.report(Report { instance: "g".to_owned(), acknowledged: None, draining: true }, 10 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn acknowledgements_of_another_term_do_not_count() {
        let mut gates = found(2);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        let acknowledged = Some(TableVersion { term: 1, counter: 99 });
        gates.report(Report { instance: "g".to_owned(), acknowledged, draining: false }, 10 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn a_restart_closes_the_gate_until_it_is_acknowledged() {
        let mut gates = found(1);
        let open = Some(StoredGate { open: true, restarts: Some(0) });
        let pod = PodView { gate: open, ..view("chat", "a") };
        gates.publish(&table(std::slice::from_ref(&pod)));
        report(&mut gates, "g", 1, 10 * S);
        assert_eq!(gates.change(&pod, 10 * S), None);
        let restarted = PodView { restarts: 1, containers_ready: false, ..pod.clone() };
        assert_eq!(gates.change(&restarted, 10 * S), Some(GateChange::Close));
        let back = PodView { restarts: 1, gate: Some(StoredGate { open: false, restarts: None }), ..pod };
        assert_eq!(gates.change(&back, 10 * S), None, "no table has the new start yet");
        gates.publish(&table(std::slice::from_ref(&back)));
        assert_eq!(gates.change(&back, 10 * S), None, "and no gateway has it");
        report(&mut gates, "g", 2, 10 * S);
        assert_eq!(gates.change(&back, 10 * S), Some(GateChange::Open { restarts: 1 }));
    }

    #[test]
    fn a_new_leader_leaves_open_gates_open() {
        let gates = found(5);
        let pod = PodView { gate: Some(StoredGate { open: true, restarts: Some(0) }), ..view("chat", "a") };
        assert_eq!(gates.change(&pod, Duration::ZERO), None);
        assert_eq!(gates.change(&PodView { deleting: true, restarts: 4, ..pod }, Duration::ZERO), None);
    }
}
