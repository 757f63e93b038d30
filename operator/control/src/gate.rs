//! When a pod counts as routable: what gateways have acknowledged, as a state machine fed with instants.
//!
//! A pod's readiness gate turns true once every live gateway has said that it routes by a table with this start of
//! this pod. Otherwise a rolling update could end the last pod that a gateway knows. A gateway is live while its last
//! report is younger than [`FRESH`]; between that and [`LEFT_OUT`] it is waited for; after that it is left out, so that
//! one lost gateway cannot hold up every rollout. A stream that breaks changes nothing by itself: the gateway may be
//! on its way back, or serving from its last table.
//!
//! A new leader waits for [`SETTLE`] from the moment that it can be found before it opens a gate, since gateways need a
//! moment to find it, and no gateway at all means that the warm-up alone decides.
//!
//! Instants are lengths of time since the leader began to lead.

use std::collections::BTreeMap;
use std::time::Duration;

use trustformers_proto::control::v1::{Route, TableVersion};

use crate::pods::PodView;

/// A gateway whose last report is younger than this is live.
pub const FRESH: Duration = Duration::from_secs(3);
/// A gateway silent for this long is left out.
pub const LEFT_OUT: Duration = Duration::from_secs(5);
/// Nothing is opened this soon after the leader can be found: a gateway gives up on a silent leader after 2 s, waits up to
/// 1 s before it tries again, and another such round must fit.
pub const SETTLE: Duration = Duration::from_secs(6);
/// A gateway silent for this long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(300);

/// What gateways have said, and what the published tables held.
#[derive(Debug)]
pub struct Gates {
    term: u64,
    /// When the feed's Service began to lead here.
    found_since: Option<Duration>,
    counter: u64,
    /// Each listed start of a pod (UID, restarts), with the first table that has held it ever since.
    listed: BTreeMap<(String, u32), u64>,
    gateways: BTreeMap<String, Gateway>,
}

#[derive(Debug)]
struct Gateway {
    reported: Duration,
    acknowledged: u64,
    draining: bool,
}

/// What one gateway has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The gateway's identity.
    pub instance: String,
    /// The table that it routes by.
    pub acknowledged: Option<TableVersion>,
    /// It was asked to end.
    pub draining: bool,
}

/// How many gateways there are, by what they are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Census {
    /// Reported lately.
    pub live: usize,
    /// Waited for.
    pub late: usize,
    /// Silent for too long, no longer waited for.
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
    /// A leader's state at the moment it begins to lead.
    #[must_use]
    pub fn new(term: u64) -> Self {
        Self { term, found_since: None, counter: 0, listed: BTreeMap::new(), gateways: BTreeMap::new() }
    }

    /// Notes that gateways find this leader from now on.
    pub fn can_be_found(&mut self, now: Duration) {
        self.found_since.get_or_insert(now);
    }

    /// When gateways have had their time to find this leader.
    fn settled(&self) -> Option<Duration> {
        self.found_since.map(|since| since + SETTLE)
    }

    /// Notes that a table with these routes is published, and gives it its version.
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
        TableVersion { term: self.term, counter: self.counter }
    }

    /// Notes a gateway's report. True where it changes what may be open.
    pub fn report(&mut self, report: Report, now: Duration) -> bool {
        let of_this_term = report.acknowledged.filter(|version| version.term == self.term);
        let acknowledged = of_this_term.map_or(0, |version| version.counter);
        let known = self
            .gateways
            .insert(report.instance, Gateway { reported: now, acknowledged, draining: report.draining });
        known.is_none_or(|before| {
            before.acknowledged != acknowledged
                || before.draining != report.draining
                || now.saturating_sub(before.reported) >= FRESH
        })
    }

    /// Whether every gateway that counts routes by a table with this start of the pod.
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

    /// What to do with the gate of `pod`, if anything.
    #[must_use]
    pub fn wanted(&self, pod: &PodView, now: Duration) -> Option<GateChange> {
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

    /// When the passing of time alone may change a verdict next.
    #[must_use]
    pub fn next_change(&self, now: Duration) -> Option<Duration> {
        let silences = self.gateways.values().filter(|gateway| !gateway.draining);
        silences
            .map(|gateway| gateway.reported + LEFT_OUT)
            .chain(self.settled())
            .filter(|instant| *instant > now)
            .min()
    }

    /// Counts the gateways, and forgets those that have been silent for minutes.
    pub fn census(&mut self, now: Duration) -> Census {
        self.gateways.retain(|_, gateway| now.saturating_sub(gateway.reported) < FORGOTTEN);
        let mut census = Census::default();
        for gateway in self.gateways.values().filter(|gateway| !gateway.draining) {
            match now.saturating_sub(gateway.reported) {
                silence if silence < FRESH => census.live += 1,
                silence if silence < LEFT_OUT => census.late += 1,
                _ => census.left_out += 1,
            }
        }
        census
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
            first_byte_timeout: S,
            retries: 0,
            known_digest: None,
            known_task: None,
        };
        routes(&[model], pods, &BTreeMap::new())
    }

    fn report(gates: &mut Gates, instance: &str, counter: u64, at: Duration) -> bool {
        let acknowledged = Some(TableVersion { term: gates.term, counter });
        gates.report(Report { instance: instance.to_owned(), acknowledged, draining: false }, at)
    }

    #[test]
    fn a_gate_opens_when_the_last_gateway_has_the_pod() {
        let mut gates = found(7);
        let pod = view("chat", "a");
        assert_eq!(gates.publish(&table(&[])), TableVersion { term: 7, counter: 1 });
        report(&mut gates, "g1", 1, 9 * S);
        report(&mut gates, "g2", 1, 9 * S);
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.wanted(&pod, 9 * S), None);
        assert!(report(&mut gates, "g1", 2, 10 * S));
        assert_eq!(gates.wanted(&pod, 10 * S), None);
        report(&mut gates, "g2", 2, 10 * S);
        assert_eq!(gates.wanted(&pod, 10 * S), Some(GateChange::Open { restarts: 0 }));
    }

    #[test]
    fn a_later_table_that_still_holds_the_pod_needs_no_new_acknowledgement() {
        let mut gates = found(1);
        let (pod, other) = (view("chat", "a"), view("chat", "b"));
        gates.publish(&table(std::slice::from_ref(&pod)));
        report(&mut gates, "g", 1, 9 * S);
        gates.publish(&table(&[pod.clone(), other.clone()]));
        assert!(gates.acknowledged(&pod.uid, 0, 9 * S));
        assert!(!gates.acknowledged(&other.uid, 0, 9 * S));
    }

    #[test]
    fn a_silent_gateway_is_waited_for_then_left_out() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        report(&mut gates, "lost", 0, 10 * S);
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.next_change(12 * S), Some(15 * S));
        assert!(!gates.acknowledged(&pod.uid, 0, 14 * S));
        assert_eq!(gates.census(14 * S), Census { late: 1, ..Census::default() });
        assert!(gates.acknowledged(&pod.uid, 0, 15 * S));
        assert_eq!(gates.census(15 * S), Census { left_out: 1, ..Census::default() });
        assert_eq!(gates.census(400 * S), Census::default());
    }

    #[test]
    fn a_late_gateway_holds_the_gate_even_if_it_had_acknowledged() {
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
    fn with_no_gateway_the_warm_up_decides_once_the_leader_has_settled() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        assert_eq!(gates.wanted(&pod, 2 * S), None);
        assert_eq!(gates.next_change(2 * S), Some(SETTLE));
        assert_eq!(gates.wanted(&pod, SETTLE), Some(GateChange::Open { restarts: 0 }));
    }

    #[test]
    fn a_gateway_that_ends_is_not_waited_for() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        gates.report(Report { instance: "g".to_owned(), acknowledged: None, draining: true }, 10 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn an_acknowledgement_of_another_leaders_table_counts_for_nothing() {
        let mut gates = found(2);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)));
        let acknowledged = Some(TableVersion { term: 1, counter: 99 });
        gates.report(Report { instance: "g".to_owned(), acknowledged, draining: false }, 10 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn a_restart_closes_the_gate_until_the_new_start_is_acknowledged() {
        let mut gates = found(1);
        let open = Some(StoredGate { open: true, restarts: Some(0) });
        let pod = PodView { gate: open, ..view("chat", "a") };
        gates.publish(&table(std::slice::from_ref(&pod)));
        report(&mut gates, "g", 1, 10 * S);
        assert_eq!(gates.wanted(&pod, 10 * S), None);
        let restarted = PodView { restarts: 1, containers_ready: false, ..pod.clone() };
        assert_eq!(gates.wanted(&restarted, 10 * S), Some(GateChange::Close));
        let back = PodView { restarts: 1, gate: Some(StoredGate { open: false, restarts: None }), ..pod };
        assert_eq!(gates.wanted(&back, 10 * S), None, "no table holds the new start yet");
        gates.publish(&table(std::slice::from_ref(&back)));
        assert_eq!(gates.wanted(&back, 10 * S), None, "and no gateway has it");
        report(&mut gates, "g", 2, 10 * S);
        assert_eq!(gates.wanted(&back, 10 * S), Some(GateChange::Open { restarts: 1 }));
    }

    #[test]
    fn a_new_leader_leaves_open_gates_open() {
        let gates = found(5);
        let pod = PodView { gate: Some(StoredGate { open: true, restarts: Some(0) }), ..view("chat", "a") };
        assert_eq!(gates.wanted(&pod, Duration::ZERO), None);
        assert_eq!(gates.wanted(&PodView { deleting: true, restarts: 4, ..pod }, Duration::ZERO), None);
    }
}
