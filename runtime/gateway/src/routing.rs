//! The table in force, joined with the live state of its endpoints.
//!
//! Built when a table is applied and never changed after. A request that has a choice to make reads it
//! through one pointer, so that all of the choice comes from one table.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fastrand::Rng;

use crate::balance::least_of_two;
use crate::call::CallerRules;
use crate::endpoint::Endpoint;
use crate::metrics::{Metrics, RevisionMetrics};
use crate::split::Split;
use crate::table::{EndpointId, Route, Table};

/// A table with its endpoints.
#[derive(Debug)]
pub(crate) struct Routing {
    /// The operator's table.
    pub(crate) table: Table,
    /// When it was received.
    pub(crate) received_at: SystemTime,
    /// The list of models as HTTP callers get it, made at the first use and shared by all callers.
    pub(crate) models_json: OnceLock<Bytes>,
    routes: Vec<LiveRoute>,
    endpoints: HashMap<EndpointId, Arc<Endpoint>>,
}

#[derive(Debug)]
struct LiveRoute {
    backends: Vec<LiveBackend>,
    split: Split,
    /// The next sequence number of the split; it continues from table to table.
    sequence: Arc<AtomicU64>,
}

#[derive(Debug)]
struct LiveBackend {
    weight: u32,
    metrics: Arc<RevisionMetrics>,
    endpoints: Vec<Arc<Endpoint>>,
}

/// What decides where a request goes.
#[derive(Debug)]
pub(crate) struct Criteria<'a> {
    /// The request's number in the split.
    pub(crate) sequence: u64,
    /// The revision that an earlier attempt chose; it stays the first choice while it has an endpoint to
    /// offer.
    pub(crate) revision: Option<&'a str>,
    /// Endpoints of earlier attempts.
    pub(crate) tried: &'a [Arc<Endpoint>],
    /// Time on the gateway's clock.
    pub(crate) now: Duration,
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    /// The pod.
    pub(crate) endpoint: Arc<Endpoint>,
    /// The series of its revision.
    pub(crate) metrics: Arc<RevisionMetrics>,
}

impl Routing {
    /// Joins a table with the endpoints and counters of the one before it.
    pub(crate) fn build(
        table: Table,
        received_at: SystemTime,
        before: Option<&Self>,
        metrics: &Metrics,
    ) -> Self {
        let revisions = table.routes.iter().flat_map(|route| {
            route.backends.iter().map(|backend| (route.name.as_str(), backend.revision.as_str()))
        });
        let series = metrics.in_force(table.version, revisions);
        let mut endpoints: HashMap<EndpointId, Arc<Endpoint>> = HashMap::new();
        let mut routes = Vec::with_capacity(table.routes.len());
        for route in &table.routes {
            let mut backends = Vec::with_capacity(route.backends.len());
            for backend in &route.backends {
                let members = backend.endpoints.iter().map(|spec| {
                    let existing = before.and_then(|before| before.endpoints.get(&spec.id));
                    let endpoint = endpoints.entry(spec.id.clone()).or_insert_with(|| {
                        existing.map_or_else(|| Arc::new(Endpoint::new(spec.clone())), Arc::clone)
                    });
                    Arc::clone(endpoint)
                });
                let members: Vec<_> = members.collect();
                let metrics = Arc::clone(&series[&(route.name.clone(), backend.revision.clone())]);
                // A revision without pods gets no share, since its requests could only fail.
                let weight = if members.is_empty() { 0 } else { backend.weight };
                backends.push(LiveBackend { weight, metrics, endpoints: members });
            }
            let weights: Vec<u32> = backends.iter().map(|backend| backend.weight).collect();
            let sequence = before
                .and_then(|before| before.sequence(&route.name))
                // Gateways start at different positions of the split, so that their sum is exact sooner.
                .unwrap_or_else(|| Arc::new(AtomicU64::new(fastrand::u64(..) >> 1)));
            routes.push(LiveRoute { backends, split: Split::new(&weights), sequence });
        }
        Self { table, received_at, models_json: OnceLock::new(), routes, endpoints }
    }

    fn sequence(&self, route: &str) -> Option<Arc<AtomicU64>> {
        let index = self.table.find(route).ok()?;
        (self.table.routes[index].name == route).then(|| Arc::clone(&self.routes[index].sequence))
    }

    /// The route at an index that `table.find` gave.
    pub(crate) fn route(&self, index: usize) -> &Route {
        &self.table.routes[index]
    }

    /// What of a caller's own headers counts on the route at an index that `table.find` gave.
    pub(crate) fn caller_rules(&self, index: usize) -> CallerRules {
        let policy = &self.route(index).policy;
        CallerRules { own_tenant: policy.accept_tenant, own_priority: policy.accept_priority }
    }

    /// Takes the next number in the split of a route.
    pub(crate) fn next_sequence(&self, route: usize) -> u64 {
        self.routes[route].sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// Chooses an endpoint that was not tried. Ejected endpoints come last: a request goes to another
    /// revision before it goes to a pod that refuses connections, and to such a pod before it fails.
    pub(crate) fn choose(&self, route: usize, criteria: &Criteria<'_>) -> Option<Choice> {
        let route = &self.routes[route];
        let earlier = criteria.revision.and_then(|revision| {
            route
                .backends
                .iter()
                .position(|backend| backend.metrics.revision == revision && backend.weight > 0)
        });
        let first = earlier.or_else(|| route.split.choose(criteria.sequence))?;
        let others =
            (0..route.backends.len()).filter(|&index| index != first && route.backends[index].weight > 0);
        let order: Vec<usize> = std::iter::once(first).chain(others).collect();
        [false, true].into_iter().find_map(|with_ejected| {
            order.iter().find_map(|&index| pick(&route.backends[index], criteria, with_ejected))
        })
    }

    /// The endpoint of an identity, for tests.
    #[cfg(test)]
    pub(crate) fn endpoint(&self, id: &EndpointId) -> Option<Arc<Endpoint>> {
        self.endpoints.get(id).cloned()
    }
}

fn pick(backend: &LiveBackend, criteria: &Criteria<'_>, with_ejected: bool) -> Option<Choice> {
    let candidates: Vec<&Arc<Endpoint>> = backend
        .endpoints
        .iter()
        .filter(|endpoint| !criteria.tried.iter().any(|tried| tried.spec.id == endpoint.spec.id))
        .filter(|endpoint| with_ejected || !endpoint.is_ejected(criteria.now))
        .collect();
    let loads: Vec<usize> = candidates.iter().map(|endpoint| endpoint.load()).collect();
    let chosen = least_of_two(&loads, &mut Rng::new())?;
    Some(Choice { endpoint: Arc::clone(candidates[chosen]), metrics: Arc::clone(&backend.metrics) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};
    use prometheus::Registry;

    fn metrics() -> Metrics {
        // Routing draws from the generator of the thread; with a seed each test repeats its choices.
        fastrand::seed(21);
        Metrics::new(Registry::new()).unwrap()
    }

    fn build(metrics: &Metrics, text: &TableText, before: Option<&Routing>) -> Routing {
        Routing::build(Table::parse(text.wire()).unwrap(), SystemTime::now(), before, metrics)
    }

    fn criteria(sequence: u64) -> Criteria<'static> {
        Criteria { sequence, revision: None, tried: &[], now: Duration::ZERO }
    }

    fn two_revisions(counter: u64) -> TableText {
        TableText::new(1, counter)
            .route("default/a", &["a"])
            .backend("r1", 90, &[endpoint_at("p1", 1), endpoint_at("p2", 2)])
            .backend("r2", 10, &[endpoint_at("p3", 3)])
    }

    #[test]
    fn the_split_stays_exact_over_table_changes() {
        let metrics = metrics();
        let mut routing = build(&metrics, &two_revisions(1), None);
        let mut counts = HashMap::new();
        for counter in 2..=6 {
            for _ in 0..2 {
                let sequence = routing.next_sequence(0);
                let choice = routing.choose(0, &criteria(sequence)).unwrap();
                *counts.entry(choice.metrics.revision.clone()).or_insert(0) += 1;
            }
            routing = build(&metrics, &two_revisions(counter), Some(&routing));
        }
        assert_eq!(counts["r1"], 9);
        assert_eq!(counts["r2"], 1);
    }

    #[test]
    fn an_endpoint_outlives_a_table_but_not_a_restart() {
        let metrics = metrics();
        let one = build(&metrics, &two_revisions(1), None);
        let id = Table::parse(two_revisions(1).wire()).unwrap().routes[0].backends[0].endpoints[0].id.clone();
        let _in_flight = one.endpoint(&id).unwrap().enter();
        let two = build(&metrics, &two_revisions(2), Some(&one));
        assert_eq!(two.endpoint(&id).unwrap().load(), 1);
        let mut restarted = two_revisions(3).wire();
        restarted.routes[0].backends[0].endpoints[0].restart_count = 1;
        let table = Table::parse(restarted).unwrap();
        let three = Routing::build(table, SystemTime::now(), Some(&two), &metrics);
        assert!(three.endpoint(&id).is_none());
    }

    #[test]
    fn tried_endpoints_are_left_out_then_the_other_revision_helps() {
        let metrics = metrics();
        let routing = build(&metrics, &two_revisions(1), None);
        let mut tried = Vec::new();
        let mut revisions = Vec::new();
        for _ in 0..3 {
            let criteria = Criteria { sequence: 0, revision: Some("r1"), tried: &tried, now: Duration::ZERO };
            let choice = routing.choose(0, &criteria).unwrap();
            revisions.push(choice.metrics.revision.clone());
            tried.push(choice.endpoint);
        }
        assert_eq!(revisions, ["r1", "r1", "r2"]);
        let criteria = Criteria { sequence: 0, revision: Some("r1"), tried: &tried, now: Duration::ZERO };
        assert!(routing.choose(0, &criteria).is_none());
    }

    #[test]
    fn ejected_endpoints_come_last_but_before_failure() {
        let metrics = metrics();
        let text = TableText::new(1, 1).route("default/a", &[]).backend(
            "r1",
            1,
            &[endpoint_at("p1", 1), endpoint_at("p2", 2)],
        );
        let routing = build(&metrics, &text, None);
        let ejected = routing.choose(0, &criteria(0)).unwrap().endpoint;
        ejected.connect_failed(Duration::ZERO);
        for sequence in 0..50 {
            let choice = routing.choose(0, &criteria(sequence)).unwrap();
            assert_ne!(choice.endpoint.spec.id, ejected.spec.id);
        }
        let other = routing.choose(0, &criteria(0)).unwrap().endpoint;
        other.connect_failed(Duration::ZERO);
        assert!(routing.choose(0, &criteria(0)).is_some());
    }

    #[test]
    fn a_revision_without_pods_has_no_share() {
        let metrics = metrics();
        let text = TableText::new(1, 1)
            .route("default/a", &[])
            .backend("r1", 50, &[endpoint_at("p1", 1)])
            .backend("r2", 50, &[]);
        let routing = build(&metrics, &text, None);
        for sequence in 0..100 {
            assert_eq!(routing.choose(0, &criteria(sequence)).unwrap().metrics.revision, "r1");
        }
        let empty = TableText::new(1, 2).route("default/a", &[]).backend("r1", 1, &[]);
        assert!(build(&metrics, &empty, None).choose(0, &criteria(0)).is_none());
    }
}
