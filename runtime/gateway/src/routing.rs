//! The table in force, joined with what is known about its endpoints.
//!
//! Built when a table is taken and never changed after: a request reads it through one pointer, so that it sees one
//! table from its first step to its last.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::balance::least_of_two;
use crate::dice::Dice;
use crate::endpoint::Endpoint;
use crate::metrics::{Metrics, RevisionMetrics};
use crate::split::Split;
use crate::table::{EndpointId, Route, Table};

/// A table with its endpoints.
#[derive(Debug)]
pub(crate) struct Routing {
    /// What the operator said.
    pub(crate) table: Table,
    /// When it was received.
    pub(crate) received_at: SystemTime,
    routes: Vec<LiveRoute>,
    endpoints: HashMap<EndpointId, Arc<Endpoint>>,
}

#[derive(Debug)]
struct LiveRoute {
    backends: Vec<LiveBackend>,
    split: Split,
    /// Goes on counting from table to table.
    tickets: Arc<AtomicU64>,
}

#[derive(Debug)]
struct LiveBackend {
    weight: u32,
    metrics: Arc<RevisionMetrics>,
    endpoints: Vec<Arc<Endpoint>>,
}

/// What decides where a request goes.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    /// The request's share of the split.
    pub(crate) ticket: u64,
    /// The revision that an earlier attempt chose; it is kept where it still has an endpoint to offer.
    pub(crate) revision: Option<&'a str>,
    /// Endpoints that were asked already.
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
        (metrics, dice): (&Metrics, &Dice),
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
                    let known = before.and_then(|before| before.endpoints.get(&spec.id));
                    let endpoint = endpoints.entry(spec.id.clone()).or_insert_with(|| {
                        known.map_or_else(|| Arc::new(Endpoint::new(spec.clone())), Arc::clone)
                    });
                    Arc::clone(endpoint)
                });
                let members: Vec<_> = members.collect();
                let metrics = Arc::clone(&series[&(route.name.clone(), backend.revision.clone())]);
                // A revision without pods has no share: its requests could only fail.
                let weight = if members.is_empty() { 0 } else { backend.weight };
                backends.push(LiveBackend { weight, metrics, endpoints: members });
            }
            let weights: Vec<u32> = backends.iter().map(|backend| backend.weight).collect();
            let tickets = before
                .and_then(|before| before.tickets(&route.name))
                // Gateways start at different places of the split, so that together they are even sooner.
                .unwrap_or_else(|| Arc::new(AtomicU64::new(dice.roll() >> 1)));
            routes.push(LiveRoute { backends, split: Split::new(&weights), tickets });
        }
        Self { table, received_at, routes, endpoints }
    }

    fn tickets(&self, route: &str) -> Option<Arc<AtomicU64>> {
        let index = self.table.find(route).ok()?;
        (self.table.routes[index].name == route).then(|| Arc::clone(&self.routes[index].tickets))
    }

    /// The route at an index that `table.find` gave.
    pub(crate) fn route(&self, index: usize) -> &Route {
        &self.table.routes[index]
    }

    /// Draws a request's place in the route's split.
    pub(crate) fn draw(&self, route: usize) -> u64 {
        self.routes[route].tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// Chooses an endpoint that was not tried. The revision comes first and its ejected endpoints last: a request
    /// goes to another revision before it goes to a pod that refuses connections, and to such a pod before it fails.
    pub(crate) fn choose(&self, route: usize, ask: &Ask<'_>, dice: &Dice) -> Option<Choice> {
        let route = &self.routes[route];
        let kept = ask.revision.and_then(|revision| {
            route
                .backends
                .iter()
                .position(|backend| backend.metrics.revision == revision && backend.weight > 0)
        });
        let first = kept.or_else(|| route.split.choose(ask.ticket))?;
        let others =
            (0..route.backends.len()).filter(|&index| index != first && route.backends[index].weight > 0);
        let order: Vec<usize> = std::iter::once(first).chain(others).collect();
        [false, true].into_iter().find_map(|with_ejected| {
            order.iter().find_map(|&index| pick(&route.backends[index], ask, with_ejected, dice))
        })
    }

    /// The endpoint of an identity, for tests.
    #[cfg(test)]
    pub(crate) fn endpoint(&self, id: &EndpointId) -> Option<Arc<Endpoint>> {
        self.endpoints.get(id).cloned()
    }
}

fn pick(backend: &LiveBackend, ask: &Ask<'_>, with_ejected: bool, dice: &Dice) -> Option<Choice> {
    let candidates: Vec<&Arc<Endpoint>> = backend
        .endpoints
        .iter()
        .filter(|endpoint| !ask.tried.iter().any(|tried| tried.spec.id == endpoint.spec.id))
        .filter(|endpoint| with_ejected || !endpoint.is_out(ask.now))
        .collect();
    let loads: Vec<usize> = candidates.iter().map(|endpoint| endpoint.load()).collect();
    let chosen = least_of_two(&loads, dice.roll())?;
    Some(Choice { endpoint: Arc::clone(candidates[chosen]), metrics: Arc::clone(&backend.metrics) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};
    use prometheus::Registry;

    struct Bench {
        metrics: Metrics,
        dice: Dice,
    }

    impl Bench {
        fn new() -> Self {
            Self { metrics: Metrics::new(Registry::new()).unwrap(), dice: Dice::seeded(21) }
        }

        fn build(&self, text: &TableText, before: Option<&Routing>) -> Routing {
            let table = Table::parse(text.wire()).unwrap();
            Routing::build(table, SystemTime::now(), before, (&self.metrics, &self.dice))
        }
    }

    fn ask(ticket: u64) -> Ask<'static> {
        Ask { ticket, revision: None, tried: &[], now: Duration::ZERO }
    }

    fn two_revisions(counter: u64) -> TableText {
        TableText::new(1, counter)
            .route("default/a", &["a"])
            .backend("r1", 90, &[endpoint_at("p1", 1), endpoint_at("p2", 2)])
            .backend("r2", 10, &[endpoint_at("p3", 3)])
    }

    #[test]
    fn requests_divide_exactly_between_revisions_and_go_on_over_tables() {
        let bench = Bench::new();
        let mut routing = bench.build(&two_revisions(1), None);
        let mut counts = HashMap::new();
        for counter in 2..=6 {
            for _ in 0..2 {
                let ticket = routing.draw(0);
                let choice = routing.choose(0, &ask(ticket), &bench.dice).unwrap();
                *counts.entry(choice.metrics.revision.clone()).or_insert(0) += 1;
            }
            routing = bench.build(&two_revisions(counter), Some(&routing));
        }
        assert_eq!(counts["r1"], 9);
        assert_eq!(counts["r2"], 1);
    }

    #[test]
    fn an_endpoint_keeps_its_load_over_tables_and_a_restart_begins_anew() {
        let bench = Bench::new();
        let one = bench.build(&two_revisions(1), None);
        let id = Table::parse(two_revisions(1).wire()).unwrap().routes[0].backends[0].endpoints[0].id.clone();
        let _held = one.endpoint(&id).unwrap().enter();
        let two = bench.build(&two_revisions(2), Some(&one));
        assert_eq!(two.endpoint(&id).unwrap().load(), 1);
        let mut restarted = two_revisions(3).wire();
        restarted.routes[0].backends[0].endpoints[0].restart_count = 1;
        let table = Table::parse(restarted).unwrap();
        let three = Routing::build(table, SystemTime::now(), Some(&two), (&bench.metrics, &bench.dice));
        assert!(three.endpoint(&id).is_none());
    }

    #[test]
    fn the_tried_are_left_out_and_then_the_other_revision_helps() {
        let bench = Bench::new();
        let routing = bench.build(&two_revisions(1), None);
        let mut tried = Vec::new();
        let mut revisions = Vec::new();
        for _ in 0..3 {
            let ask = Ask { ticket: 0, revision: Some("r1"), tried: &tried, now: Duration::ZERO };
            let choice = routing.choose(0, &ask, &bench.dice).unwrap();
            revisions.push(choice.metrics.revision.clone());
            tried.push(choice.endpoint);
        }
        assert_eq!(revisions, ["r1", "r1", "r2"]);
        let ask = Ask { ticket: 0, revision: Some("r1"), tried: &tried, now: Duration::ZERO };
        assert!(routing.choose(0, &ask, &bench.dice).is_none());
    }

    #[test]
    fn the_ejected_come_last_but_before_failure() {
        let bench = Bench::new();
        let text = TableText::new(1, 1).route("default/a", &[]).backend(
            "r1",
            1,
            &[endpoint_at("p1", 1), endpoint_at("p2", 2)],
        );
        let routing = bench.build(&text, None);
        let out = routing.choose(0, &ask(0), &bench.dice).unwrap().endpoint;
        out.connect_failed(Duration::ZERO);
        for ticket in 0..50 {
            let choice = routing.choose(0, &ask(ticket), &bench.dice).unwrap();
            assert_ne!(choice.endpoint.spec.id, out.spec.id);
            // The other one goes out as well now and then: somebody is still asked.
        }
        let other = routing.choose(0, &ask(0), &bench.dice).unwrap().endpoint;
        other.connect_failed(Duration::ZERO);
        assert!(routing.choose(0, &ask(0), &bench.dice).is_some());
    }

    #[test]
    fn a_revision_without_pods_has_no_share() {
        let bench = Bench::new();
        let text = TableText::new(1, 1)
            .route("default/a", &[])
            .backend("r1", 50, &[endpoint_at("p1", 1)])
            .backend("r2", 50, &[]);
        let routing = bench.build(&text, None);
        for ticket in 0..100 {
            assert_eq!(routing.choose(0, &ask(ticket), &bench.dice).unwrap().metrics.revision, "r1");
        }
        let none = bench.build(&TableText::new(1, 2).route("default/a", &[]).backend("r1", 1, &[]), None);
        assert!(none.choose(0, &ask(0), &bench.dice).is_none());
    }
}
