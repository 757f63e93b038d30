//! When a pod counts as routable, from what gateways have acknowledged: a state machine whose inputs carry
//! the time.
//!
//! A pod's readiness gate becomes true when every expected gateway has acknowledged a table with this start
//! of this pod. Otherwise a rolling update could end the last pod that a gateway has in its table. Expected
//! are the gateway pods that the API server shows as ready, and whoever reports. A report younger than
//! [`FRESH`] is needed of each. A broken stream changes nothing by itself: the gateway may be reconnecting,
//! or serving from its last table.
//!
//! Left out are: a gateway that is silent for [`LEFT_OUT`] while its pod is not ready, so that one lost
//! gateway cannot block every rollout; one that reports, but acknowledges nothing for [`BEHIND`]; and one
//! that is about to end. If all are left out, gates stay closed: a blocked port must not end the pods that
//! serve. Only where no gateway is installed does the warm-up alone decide.
//!
//! A new leader opens no gate before [`SETTLE`] has passed since gateways can find it, because they need time
//! to connect, nor before it has the list of gateway pods.
//!
//! Times are durations since the leader started to lead.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trustformers_proto::control::v1::{Backend, Route, TableVersion};

use crate::causes::Cause;
use crate::pods::PodView;

/// A gateway whose last report is younger than this is live.
pub const FRESH: Duration = Duration::from_secs(3);
/// A gateway that does not report for this long is silent: it is left out unless its pod is ready.
pub const LEFT_OUT: Duration = Duration::from_secs(5);
/// A gateway that reports, but acknowledges nothing for this long while there is a newer table, is left out.
pub const BEHIND: Duration = Duration::from_secs(10);
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
    /// The pods in the table, by UID.
    listed: BTreeMap<String, ListedStart>,
    /// The revisions with requests, by route, each with the last table that gave it some.
    routed: BTreeMap<String, BTreeMap<String, u64>>,
    /// Those that have reported, by identity.
    gateways: BTreeMap<String, Gateway>,
    /// The gateway pods that exist, by UID; none until they are listed.
    pods: Option<BTreeMap<String, GatewayPod>>,
}

/// One start of a pod in the table.
#[derive(Debug, Clone, Copy)]
struct ListedStart {
    /// Restarts of its container.
    restarts: u32,
    /// The first table since which this start has been in every one.
    since: u64,
    /// The last table that it is in.
    table: u64,
}

#[derive(Debug)]
struct Gateway {
    reported: Duration,
    acknowledged: u64,
    draining: bool,
    /// Since when there is a newer table, and nothing was acknowledged.
    behind_since: Option<Duration>,
    /// Whether [`Gates::newly_behind`] has named it.
    announced: bool,
}

impl Gateway {
    fn is_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.reported) >= LEFT_OUT
    }

    fn is_fresh(&self, now: Duration) -> bool {
        now.saturating_sub(self.reported) < FRESH
    }

    fn is_behind(&self, now: Duration) -> bool {
        !self.is_silent(now) && self.behind_since.is_some_and(|since| now.saturating_sub(since) >= BEHIND)
    }
}

/// A pod of a gateway that is not about to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayPod {
    /// Its UID, which the gateway reports as its identity.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Whether the API server shows it as ready.
    pub ready: bool,
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
    /// Silent for longer: gates wait for them.
    pub late: usize,
    /// Gates do not wait for them.
    pub left_out: usize,
}

/// Whether gates wait for a gateway.
#[derive(Debug, Clone, Copy)]
enum Standing<'a> {
    /// It reports.
    Reports(&'a Gateway),
    /// Its pod is ready, and it does not report: no gate opens.
    Missing(&'a str),
    /// It is silent and its pod is not ready, or it acknowledges nothing.
    LeftOut,
}

/// The route of the model and the revision of every backend of an A/B test that gets requests: it counts for
/// the models whose pods it names. A test may pin a revision to which the model itself sends none.
fn routed_by_tests(routes: &[Route]) -> BTreeSet<(String, String)> {
    let (tests, models): (Vec<&Route>, Vec<&Route>) = routes.iter().partition(|route| route.test.is_some());
    if tests.is_empty() {
        return BTreeSet::new();
    }
    let mut of_pods: BTreeMap<&str, &str> = BTreeMap::new();
    for route in models {
        let endpoints = route.backends.iter().flat_map(|backend| &backend.endpoints);
        of_pods.extend(endpoints.map(|endpoint| (endpoint.pod_uid.as_str(), route.name.as_str())));
    }
    let mut all = BTreeSet::new();
    for backend in tests.iter().flat_map(|route| &route.backends).filter(gets_requests) {
        let of_variant = format!("{}:", backend.variant);
        let revision = backend.revision.strip_prefix(&of_variant).unwrap_or(&backend.revision);
        let models = backend.endpoints.iter().filter_map(|one| of_pods.get(one.pod_uid.as_str()));
        all.extend(models.map(|model| ((*model).to_owned(), revision.to_owned())));
    }
    all
}

/// Whether a table's row sends requests to this revision.
fn gets_requests(backend: &&Backend) -> bool {
    backend.weight > 0 && !backend.endpoints.is_empty()
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
            pods: None,
        }
    }

    /// Records that gateways can find this leader from now on.
    pub fn can_be_found(&mut self, now: Duration) {
        self.found_since.get_or_insert(now);
    }

    /// Records which gateway pods exist. True if that may change a gate.
    pub fn set_pods(&mut self, pods: impl IntoIterator<Item = GatewayPod>) -> bool {
        let pods = Some(pods.into_iter().map(|pod| (pod.uid.clone(), pod)).collect());
        let changed = self.pods != pods;
        self.pods = pods;
        changed
    }

    /// When gateways have had enough time to find this leader.
    fn settled(&self) -> Option<Duration> {
        self.found_since.map(|since| since + SETTLE)
    }

    fn is_settled(&self, now: Duration) -> bool {
        self.settled().is_some_and(|settled| now >= settled)
    }

    /// Records that a table with these routes is published, and returns its version.
    pub fn publish(&mut self, routes: &[Route], now: Duration) -> TableVersion {
        self.counter += 1;
        for gateway in self.gateways.values_mut() {
            gateway.behind_since.get_or_insert(now);
        }
        self.record_endpoints(routes);
        self.record_revisions(routes);
        TableVersion { term: self.term, counter: self.counter }
    }

    /// Records which pods are in the present table. Nothing is allocated for those that stay: a table may
    /// have thousands, and is made several times a second while models start.
    fn record_endpoints(&mut self, routes: &[Route]) {
        let table = self.counter;
        let endpoints =
            routes.iter().flat_map(|route| &route.backends).flat_map(|backend| &backend.endpoints);
        for one in endpoints {
            let restarts = one.restart_count;
            let new = ListedStart { restarts, since: table, table };
            match self.listed.get_mut(one.pod_uid.as_str()) {
                Some(listed) if listed.restarts == restarts => listed.table = table,
                Some(listed) => *listed = new,
                None => {
                    self.listed.insert(one.pod_uid.clone(), new);
                }
            }
        }
        self.listed.retain(|_, listed| listed.table == table);
    }

    /// Records which revisions get requests by the present table, and forgets those of models that are gone
    /// and those that no gateway can route to any more.
    fn record_revisions(&mut self, routes: &[Route]) {
        let oldest = self.gateways.values().map(|gateway| gateway.acknowledged).min().unwrap_or(0);
        self.routed.retain(|_, revisions| {
            revisions.retain(|_, last| *last >= oldest);
            !revisions.is_empty()
        });
        for route in routes.iter().filter(|route| route.test.is_none()) {
            for backend in route.backends.iter().filter(gets_requests) {
                self.record_revision(&route.name, &backend.revision);
            }
        }
        for (route, revision) in routed_by_tests(routes) {
            self.record_revision(&route, &revision);
        }
    }

    fn record_revision(&mut self, route: &str, revision: &str) {
        let known = self.routed.get_mut(route).and_then(|revisions| revisions.get_mut(revision));
        if let Some(last) = known {
            *last = self.counter;
        } else {
            self.routed.entry(route.to_owned()).or_default().insert(revision.to_owned(), self.counter);
        }
    }

    /// Records a gateway's report. True if it may change a gate.
    pub fn report(&mut self, report: Report, now: Duration) -> bool {
        let of_this_term = report.acknowledged.filter(|version| version.term == self.term);
        let acknowledged = of_this_term.map_or(0, |version| version.counter);
        let previous = self.gateways.remove(&report.instance);
        // Every acknowledgement, and every return, gives it the whole time again.
        let stays = previous.as_ref().filter(|one| one.acknowledged == acknowledged && !one.is_silent(now));
        let behind_since =
            (acknowledged < self.counter).then(|| stays.and_then(|one| one.behind_since).unwrap_or(now));
        let announced = behind_since.is_some() && stays.is_some_and(|one| one.announced);
        let draining = report.draining;
        let gateway = Gateway { reported: now, acknowledged, draining, behind_since, announced };
        self.gateways.insert(report.instance, gateway);
        previous.is_none_or(|before| {
            before.acknowledged != acknowledged
                || before.draining != draining
                || now.saturating_sub(before.reported) >= FRESH
        })
    }

    /// The gateways that are installed, but for those that are about to end.
    fn standings(&self, now: Duration) -> impl Iterator<Item = Standing<'_>> {
        let reporting =
            self.gateways.iter().filter(|(_, gateway)| !gateway.draining).map(move |(id, gateway)| {
                let ready = self.pods.iter().find_map(|pods| pods.get(id)).filter(|pod| pod.ready);
                match ready {
                    _ if gateway.is_behind(now) => Standing::LeftOut,
                    _ if !gateway.is_silent(now) => Standing::Reports(gateway),
                    Some(pod) => Standing::Missing(&pod.name),
                    None => Standing::LeftOut,
                }
            });
        let never = self.pods.iter().flatten().filter(move |(uid, _)| !self.gateways.contains_key(*uid));
        let never = never.map(|(_, pod)| match pod.ready {
            true => Standing::Missing(&pod.name),
            false => Standing::LeftOut,
        });
        reporting.chain(never)
    }

    /// Whether `holds` for every gateway that counts. If gateways are installed and none counts, it is not
    /// certain.
    fn all(&self, now: Duration, holds: impl Fn(&Gateway) -> bool) -> bool {
        if !self.is_settled(now) || self.pods.is_none() {
            return false;
        }
        let (mut installed, mut counted) = (false, false);
        for standing in self.standings(now) {
            installed = true;
            match standing {
                Standing::Reports(gateway) if gateway.is_fresh(now) && holds(gateway) => counted = true,
                Standing::Reports(_) | Standing::Missing(_) => return false,
                Standing::LeftOut => {}
            }
        }
        counted || !installed
    }

    /// Whether every gateway that counts has acknowledged a table with this start of the pod.
    #[must_use]
    pub fn acknowledged(&self, uid: &str, restarts: u32, now: Duration) -> bool {
        let listed = self.listed.get(uid).filter(|listed| listed.restarts == restarts);
        listed.is_some_and(|listed| self.all(now, |gateway| gateway.acknowledged >= listed.since))
    }

    /// Whether no gateway that counts sends requests to this revision of the model with this route any more,
    /// by its own route or by that of an A/B test.
    #[must_use]
    pub fn is_unrouted(&self, route: &str, revision: &str, now: Duration) -> bool {
        // Tables of an earlier leader may have given it requests: one of this leader must be in force.
        let last = self.routed.get(route).and_then(|revisions| revisions.get(revision)).copied().unwrap_or(0);
        last < self.counter && self.all(now, |gateway| gateway.acknowledged > last)
    }

    /// Why no gate opens, whatever gateways that report acknowledge; none if nothing is wrong, or while a new
    /// leader waits.
    #[must_use]
    pub fn hold(&self, now: Duration) -> Option<Cause> {
        if !self.is_settled(now) || self.pods.is_none() {
            return None;
        }
        let standings: Vec<Standing<'_>> = self.standings(now).collect();
        let missing = standings.iter().filter_map(|one| match one {
            Standing::Missing(name) => Some(*name),
            Standing::Reports(_) | Standing::LeftOut => None,
        });
        let mut missing: Vec<&str> = missing.collect();
        missing.sort_unstable();
        let counted = standings.iter().any(|one| matches!(one, Standing::Reports(_)));
        let why = if !missing.is_empty() {
            format!("gateway pods that are ready do not report: {}", missing.join(", "))
        } else if !counted && !standings.is_empty() {
            "no gateway reports, or none acknowledges a route table".to_owned()
        } else {
            return None;
        };
        let message = format!(
            "{why}; no pod becomes ready before they do: check their logs, and that they reach the operator's \
             feed (port 9091)"
        );
        Some(Cause { reason: "GatewaysSilent".to_owned(), message })
    }

    /// The gateways that were left out since the last call because they acknowledge nothing, by identity.
    pub fn newly_behind(&mut self, now: Duration) -> Vec<String> {
        let behind = self.gateways.iter_mut().filter(|(_, one)| !one.draining && one.is_behind(now));
        let new = behind.filter(|(_, gateway)| !gateway.announced).map(|(id, gateway)| {
            gateway.announced = true;
            id.clone()
        });
        new.collect()
    }

    /// The pod of a gateway, by its identity.
    #[must_use]
    pub fn pod(&self, instance: &str) -> Option<&GatewayPod> {
        self.pods.as_ref()?.get(instance)
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
            .flat_map(|one| [Some(one.reported + LEFT_OUT), one.behind_since.map(|since| since + BEHIND)])
            .flatten()
            .chain(self.settled())
            .filter(|instant| *instant > now)
            .min()
    }

    /// Counts the gateways, and drops those that have been silent for minutes.
    pub fn counts(&mut self, now: Duration) -> GatewayCounts {
        self.gateways.retain(|_, gateway| now.saturating_sub(gateway.reported) < DROPPED);
        let mut counts = GatewayCounts::default();
        for standing in self.standings(now) {
            match standing {
                Standing::Reports(gateway) if gateway.is_fresh(now) => counts.live += 1,
                Standing::Reports(_) | Standing::Missing(_) => counts.late += 1,
                Standing::LeftOut => counts.left_out += 1,
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
    use trustformers_proto::control::v1::RouteTest;

    const S: Duration = Duration::from_secs(1);

    fn found(term: u64) -> Gates {
        let mut gates = Gates::new(term);
        gates.can_be_found(Duration::ZERO);
        assert!(gates.set_pods([]));
        gates
    }

    fn gateway_pod(uid: &str, ready: bool) -> GatewayPod {
        GatewayPod { uid: uid.to_owned(), name: format!("gateway-{uid}"), ready }
    }

    fn table(pods: &[PodView]) -> Vec<Route> {
        let model = RouteModel {
            key: ("team".to_owned(), "chat".to_owned()),
            created: None,
            policy: Default::default(),
            shadow: None,
            stored_digest: None,
            stored_task: None,
            adapters: Vec::new(),
            rollout: None,
        };
        routes(&[model], pods, &BTreeMap::new())
    }

    fn report(gates: &mut Gates, instance: &str, counter: u64, at: Duration) -> bool {
        let acknowledged = Some(TableVersion { term: gates.term, counter });
        gates.report(Report { instance: instance.to_owned(), acknowledged, draining: false }, at)
    }

    #[test]
    fn a_revision_that_a_test_pins_is_routed_until_every_gateway_has_a_table_without_the_test() {
        let mut gates = found(1);
        let pod =
            |name: &str, revision: &str| PodView { revision: revision.to_owned(), ..view("chat", name) };
        let mut routes = table(&[pod("a", "r1"), pod("b", "r2")]);
        // The rollout gives all requests to r1, and a test names r2.
        for backend in &mut routes[0].backends {
            backend.weight = u32::from(backend.revision == "r1");
        }
        let pinned = Backend {
            revision: "treatment:r2".to_owned(),
            variant: "treatment".to_owned(),
            weight: 1,
            ..routes[0].backends.iter().find(|one| one.revision == "r2").unwrap().clone()
        };
        let test = Route {
            name: "team/test".to_owned(),
            backends: vec![pinned],
            test: Some(RouteTest::default()),
            ..Route::default()
        };
        let without = routes.clone();
        routes.push(test);
        gates.publish(&routes, 9 * S);
        report(&mut gates, "g1", 1, 9 * S);
        gates.publish(&routes, 9 * S);
        report(&mut gates, "g1", 2, 10 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S));
        gates.publish(&without, 10 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S), "the gateway has the test's route");
        report(&mut gates, "g1", 3, 10 * S);
        assert!(gates.is_unrouted("team/chat", "r2", 10 * S));
    }

    #[test]
    fn a_revision_is_unrouted_when_every_gateway_has_a_table_without_requests_for_it() {
        let mut gates = found(1);
        let pod =
            |name: &str, revision: &str| PodView { revision: revision.to_owned(), ..view("chat", name) };
        gates.publish(&table(&[pod("a", "r1"), pod("b", "r2")]), 9 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S));
        gates.publish(&table(&[pod("a", "r1")]), 9 * S);
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
        gates.publish(&table(&[pod("a", "r1")]), 9 * S);
        report(&mut gates, "g1", 0, 10 * S);
        assert!(!gates.is_unrouted("team/chat", "r2", 10 * S));
        report(&mut gates, "g1", 1, 10 * S);
        assert!(gates.is_unrouted("team/chat", "r2", 10 * S));
    }

    #[test]
    fn a_gate_opens_when_the_last_gateway_has_the_pod() {
        let mut gates = found(7);
        let pod = view("chat", "a");
        assert_eq!(gates.publish(&table(&[]), 9 * S), TableVersion { term: 7, counter: 1 });
        report(&mut gates, "g1", 1, 9 * S);
        report(&mut gates, "g2", 1, 9 * S);
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
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
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        report(&mut gates, "g", 1, 9 * S);
        gates.publish(&table(&[pod.clone(), other.clone()]), 9 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 9 * S));
        assert!(!gates.acknowledged(&other.uid, 0, 9 * S));
    }

    #[test]
    fn gates_wait_for_a_silent_gateway_and_then_leave_it_out() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        report(&mut gates, "lost", 0, 10 * S);
        report(&mut gates, "g", 0, 10 * S);
        gates.publish(&table(std::slice::from_ref(&pod)), 10 * S);
        assert_eq!(gates.next_change(12 * S), Some(15 * S));
        report(&mut gates, "g", 1, 14 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 14 * S));
        assert_eq!(gates.counts(14 * S), GatewayCounts { live: 1, late: 1, left_out: 0 });
        assert!(gates.acknowledged(&pod.uid, 0, 15 * S));
        assert_eq!(gates.counts(15 * S), GatewayCounts { live: 1, late: 0, left_out: 1 });
        assert_eq!(gates.counts(400 * S), GatewayCounts::default());
    }

    #[test]
    fn gates_stay_closed_while_all_gateways_are_silent() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        report(&mut gates, "g1", 1, 10 * S);
        report(&mut gates, "g2", 1, 10 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 10 * S) && gates.hold(10 * S).is_none());
        for at in [15 * S, 100 * S] {
            assert!(!gates.acknowledged(&pod.uid, 0, at));
            assert!(!gates.is_unrouted("team/chat", "r0", at), "no pod ends either");
            let hold = gates.hold(at).unwrap();
            assert_eq!(hold.reason, "GatewaysSilent");
            assert!(hold.message.contains("no gateway reports"), "{}", hold.message);
        }
        report(&mut gates, "g1", 1, 101 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 101 * S) && gates.hold(101 * S).is_none());
    }

    #[test]
    fn a_gateway_whose_pod_is_ready_is_waited_for_though_it_never_reported() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        report(&mut gates, "g1", 1, 10 * S);
        assert!(gates.set_pods([gateway_pod("g1", true), gateway_pod("g2", true)]));
        assert!(!gates.set_pods([gateway_pod("g1", true), gateway_pod("g2", true)]));
        assert!(!gates.acknowledged(&pod.uid, 0, 10 * S));
        let message = gates.hold(10 * S).unwrap().message;
        assert!(message.contains("gateway-g2") && !message.contains("gateway-g1"), "{message}");
        // Its pod is not ready any more, or has not been so far.
        gates.set_pods([gateway_pod("g1", true), gateway_pod("g2", false)]);
        assert!(gates.acknowledged(&pod.uid, 0, 10 * S) && gates.hold(10 * S).is_none());
        // One that reported is waited for while its pod is ready, however long it is silent.
        report(&mut gates, "g2", 1, 60 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 60 * S));
        gates.set_pods([gateway_pod("g1", false), gateway_pod("g2", true)]);
        assert!(gates.acknowledged(&pod.uid, 0, 60 * S));
    }

    #[test]
    fn gates_stay_closed_while_gateways_only_start() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.set_pods([gateway_pod("g1", false)]);
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 100 * S));
        gates.set_pods([]);
        assert!(gates.acknowledged(&pod.uid, 0, 100 * S), "no gateway is installed");
    }

    #[test]
    fn no_gate_opens_before_gateway_pods_are_listed() {
        let mut gates = Gates::new(1);
        gates.can_be_found(Duration::ZERO);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 100 * S) && gates.hold(100 * S).is_none());
        gates.set_pods([]);
        assert!(gates.acknowledged(&pod.uid, 0, 100 * S));
    }

    #[test]
    fn a_gateway_that_reports_and_never_acknowledges_is_left_out_and_named_once() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        for second in 10..=20 {
            let newest = gates.counter;
            report(&mut gates, "good", newest, second * S);
            report(&mut gates, "stuck", 0, second * S);
            if second == 10 {
                gates.publish(&table(std::slice::from_ref(&pod)), 10 * S);
                assert_eq!(gates.next_change(10 * S), Some(15 * S));
            }
            let is_late = second == 20;
            assert_eq!(gates.acknowledged(&pod.uid, 0, second * S), is_late, "{second}");
            let named = if is_late { vec!["stuck".to_owned()] } else { Vec::new() };
            assert_eq!(gates.newly_behind(second * S), named);
        }
        assert_eq!(gates.counts(20 * S), GatewayCounts { live: 1, late: 0, left_out: 1 });
        report(&mut gates, "stuck", 0, 21 * S);
        assert_eq!(gates.newly_behind(21 * S), Vec::<String>::new());
        // It acknowledges at last; then it has the whole time for the next table.
        report(&mut gates, "stuck", 1, 22 * S);
        gates.publish(&table(&[pod.clone(), view("chat", "b")]), 22 * S);
        report(&mut gates, "good", 2, 23 * S);
        report(&mut gates, "stuck", 1, 23 * S);
        assert!(!gates.acknowledged("uid-b", 0, 23 * S));
        // If none acknowledges, no gate opens.
        let mut gates = found(1);
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        for second in 10..30 {
            report(&mut gates, "stuck", 0, second * S);
        }
        assert!(!gates.acknowledged(&pod.uid, 0, 29 * S));
        assert!(gates.hold(29 * S).unwrap().message.contains("none acknowledges"));
    }

    #[test]
    fn a_lost_node_closes_the_gates_of_its_pods() {
        let mut gates = found(1);
        let open = Some(StoredGate { open: true, restarts: Some(0) });
        let pod = PodView { gate: open, node: Some("n1".to_owned()), ..view("chat", "a") };
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        report(&mut gates, "g", 1, 10 * S);
        assert_eq!(gates.change(&pod, 10 * S), None);
        let lost = pod.on_lost_node();
        assert_eq!(gates.change(&lost, 10 * S), Some(GateChange::Close));
        assert!(table(std::slice::from_ref(&lost)).iter().all(|route| route.backends.is_empty()));
    }

    #[test]
    fn a_late_gateway_blocks_gates_that_it_acknowledged() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
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
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        assert_eq!(gates.change(&pod, 2 * S), None);
        assert_eq!(gates.next_change(2 * S), Some(SETTLE));
        assert_eq!(gates.change(&pod, SETTLE), Some(GateChange::Open { restarts: 0 }));
    }

    #[test]
    fn gates_do_not_wait_for_a_draining_gateway() {
        let mut gates = found(1);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        gates.report(Report { instance: "g".to_owned(), acknowledged: None, draining: true }, 10 * S);
        assert!(gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn acknowledgements_of_another_term_do_not_count() {
        let mut gates = found(2);
        let pod = view("chat", "a");
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        let acknowledged = Some(TableVersion { term: 1, counter: 99 });
        gates.report(Report { instance: "g".to_owned(), acknowledged, draining: false }, 10 * S);
        assert!(!gates.acknowledged(&pod.uid, 0, 10 * S));
    }

    #[test]
    fn a_restart_closes_the_gate_until_it_is_acknowledged() {
        let mut gates = found(1);
        let open = Some(StoredGate { open: true, restarts: Some(0) });
        let pod = PodView { gate: open, ..view("chat", "a") };
        gates.publish(&table(std::slice::from_ref(&pod)), 9 * S);
        report(&mut gates, "g", 1, 10 * S);
        assert_eq!(gates.change(&pod, 10 * S), None);
        let restarted = PodView { restarts: 1, containers_ready: false, ..pod.clone() };
        assert_eq!(gates.change(&restarted, 10 * S), Some(GateChange::Close));
        let back = PodView { restarts: 1, gate: Some(StoredGate { open: false, restarts: None }), ..pod };
        assert_eq!(gates.change(&back, 10 * S), None, "no table has the new start yet");
        gates.publish(&table(std::slice::from_ref(&back)), 10 * S);
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
