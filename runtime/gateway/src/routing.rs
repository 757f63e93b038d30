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
use http::{HeaderMap, HeaderValue};
use trustformers_api::revision::REVISION_HEADER;
use trustformers_proto::buckets::{BUCKETS, BucketOwners};

use crate::ab_test::{
    LiveTest, Observation, ScoredBucket, TestBackend, TestUser, VariantChoice, VariantRegistry, VariantSeries,
};
use crate::balance::{self, Balance, Candidate, slow_start_factor};
use crate::breaker::{Admission, BreakerRules};
use crate::call::CallerRules;
use crate::endpoint::{Endpoint, InFlight};
use crate::headers::ONLY_MODEL;
use crate::health::HealthRules;
use crate::hedge::RouteHedges;
use crate::metrics::{Metrics, RevisionMetrics};
use crate::policy::{BalanceRules, SplitBy};
use crate::retry::RetryBudget;
use crate::split::{Split, bucket_of};
use crate::table::{EndpointId, Route, Table};
use crate::user::KnownUser;

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
    /// By bucket of users the index of the backend that owns it; `u16::MAX` where none does.
    owners: Option<Box<[u16]>>,
    /// Decides instead, where variants share the route.
    test: Option<LiveTest>,
    balance: BalanceRules,
    breaker: Option<BreakerRules>,
    counters: RouteCounters,
}

/// What of a route outlives a table.
#[derive(Debug, Clone)]
struct RouteCounters {
    /// The next sequence number of the split.
    sequence: Arc<AtomicU64>,
    retries: Arc<RetryBudget>,
    hedges: Arc<RouteHedges>,
    /// Number of the next request that may be mirrored.
    shadowed: Arc<AtomicU64>,
}

impl Default for RouteCounters {
    fn default() -> Self {
        // Gateways start at different positions of the split, so that their sum is exact sooner.
        let sequence = Arc::new(AtomicU64::new(fastrand::u64(..) >> 1));
        Self { sequence, retries: Arc::default(), hedges: Arc::default(), shadowed: Arc::default() }
    }
}

#[derive(Debug)]
struct LiveBackend {
    weight: u32,
    /// Whether it takes its share of the split: it has an endpoint, or its requests wait for one.
    takes_share: bool,
    metrics: Arc<RevisionMetrics>,
    /// Its variant, as answers name it.
    variant: Option<HeaderValue>,
    /// What requests are told to mean, where the route's name is not that of the model.
    routed: Option<HeaderValue>,
    members: Vec<Member>,
    /// Number of its next choice, for round robin.
    sequence: AtomicU64,
}

/// An endpoint of a backend.
#[derive(Debug)]
struct Member {
    endpoint: Arc<Endpoint>,
    weight: u32,
    /// Whether requests name the backend's revision.
    by_revision: bool,
}

/// What decides which backend of its route a request gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SplitKey {
    /// The request's number in the split.
    sequence: u64,
    /// The bucket of its user, where the split is by user and the request names one.
    bucket: Option<u16>,
    /// The revision that it demands and may demand.
    forced: Option<String>,
    /// Its user, where the route has a test and the request names one.
    user: Option<TestUser>,
    /// The same user, to be recognised when the answer is scored.
    known_user: Option<KnownUser>,
    /// The variant that its user gets whatever the bucket.
    forced_variant: Option<String>,
    /// Whether the request itself names the revision that must answer, so that it says nothing about the
    /// variant that it is assigned to.
    names_revision: bool,
}

impl SplitKey {
    fn variant_choice(&self) -> VariantChoice<'_> {
        VariantChoice {
            sequence: self.sequence,
            bucket: self.bucket,
            forced: self.forced_variant.as_deref(),
            names_revision: self.names_revision,
        }
    }
}

/// What decides where a request goes.
#[derive(Debug)]
pub(crate) struct Criteria<'a> {
    /// Decides the backend of the first attempt.
    pub(crate) key: &'a SplitKey,
    /// The key of the consistent hash, where the route balances by one and the request has it.
    pub(crate) hash: Option<u64>,
    /// The revision that an earlier attempt chose; it stays the first choice while it has an endpoint to
    /// offer.
    pub(crate) revision: Option<&'a str>,
    /// Endpoints of earlier attempts.
    pub(crate) tried: &'a [Arc<Endpoint>],
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    /// The pod.
    pub(crate) endpoint: Arc<Endpoint>,
    /// The series of its revision.
    pub(crate) metrics: Arc<RevisionMetrics>,
    /// The variant that answers, where the route has a test.
    pub(crate) variant: Option<HeaderValue>,
    routed: Option<HeaderValue>,
    breaker: Option<BreakerRules>,
    /// Whether the attempt is the probe of the endpoint's breaker.
    probe: bool,
    /// Whether the pod holds other revisions too.
    by_revision: bool,
}

impl Choice {
    /// The revision that the request must name, where the pod holds more than one.
    pub(crate) fn revision(&self) -> Option<&str> {
        let revision = self.metrics.revision.as_str();
        // In a test the name of a backend begins with that of its variant.
        let of_pod = self
            .variant
            .as_ref()
            .and_then(|variant| revision.strip_prefix(variant.to_str().ok()?)?.strip_prefix(':'));
        self.by_revision.then_some(of_pod.unwrap_or(revision))
    }

    /// The model that is meant, where the route has the name of a test, which its pods do not know.
    pub(crate) fn routed(&self) -> Option<&HeaderValue> {
        self.routed.as_ref()
    }

    /// Counts the attempt on the endpoint. Every choice is entered, since it may be a probe.
    pub(crate) fn enter(&self) -> InFlight {
        self.endpoint.enter(self.breaker, self.probe)
    }

    /// The attempt ran out of its time, after its count was dropped.
    pub(crate) fn timed_out(&self, limit: Duration) {
        self.endpoint.observe(limit);
        if let Some(rules) = &self.breaker {
            self.endpoint.count(rules, true, self.probe);
        }
    }
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
        metrics.variants.in_force(table.routes.iter().filter_map(|route| route.test.as_ref()));
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
                    Member {
                        endpoint: Arc::clone(endpoint),
                        weight: spec.weight,
                        by_revision: spec.by_revision,
                    }
                });
                let members: Vec<_> = members.collect();
                let metrics = Arc::clone(&series[&(route.name.clone(), backend.revision.clone())]);
                let routed = match backend.model.as_str() {
                    "" => (!backend.variant.is_empty()).then_some(ONLY_MODEL),
                    model => HeaderValue::from_str(model).ok(),
                };
                let has_share = route.test.as_ref().is_none_or(|test| test.weight_of(&backend.variant) > 0);
                backends.push(LiveBackend {
                    weight: if has_share { backend.weight } else { 0 },
                    takes_share: !members.is_empty() || backend.keeps_share,
                    metrics,
                    variant: HeaderValue::from_str(&backend.variant).ok().filter(|name| !name.is_empty()),
                    routed,
                    members,
                    sequence: AtomicU64::new(fastrand::u64(..) >> 1),
                });
            }
            let counters = before.and_then(|before| before.counters(&route.name)).unwrap_or_default();
            routes.push(LiveRoute::new(route, backends, counters, &metrics.variants));
        }
        let routing = Self { table, received_at, models_json: OnceLock::new(), routes, endpoints };
        routing.forget_checks();
        routing
    }

    fn counters(&self, route: &str) -> Option<RouteCounters> {
        let index = self.table.find(route).ok()?;
        (self.table.routes[index].name == route).then(|| self.routes[index].counters.clone())
    }

    /// Endpoints that no route checks any more count as ready again.
    fn forget_checks(&self) {
        for (live, route) in self.routes.iter().zip(&self.table.routes) {
            if route.policy.health.is_none() {
                live.members().for_each(|member| member.endpoint.is_not_checked());
            }
        }
    }

    /// The endpoints whose routes say that they are checked.
    pub(crate) fn checked_endpoints(&self) -> Vec<CheckedEndpoint> {
        let routes = self.routes.iter().zip(&self.table.routes);
        let checked = routes.filter_map(|(live, route)| Some((live, route.policy.health?)));
        let endpoints = checked.flat_map(|(live, rules)| {
            live.members()
                .map(move |member| CheckedEndpoint { endpoint: Arc::clone(&member.endpoint), rules })
        });
        endpoints.collect()
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
        self.routes[route].counters.sequence.fetch_add(1, Ordering::Relaxed)
    }

    /// The retries of a route.
    pub(crate) fn retry_budget(&self, route: usize) -> &RetryBudget {
        &self.routes[route].counters.retries
    }

    /// The second attempts of a route.
    pub(crate) fn hedges(&self, route: usize) -> &Arc<RouteHedges> {
        &self.routes[route].counters.hedges
    }

    /// Whether the next request that can be mirrored is. Of any hundred in a row it is exactly this share.
    pub(crate) fn takes_shadow(&self, route: usize, percent: u32) -> bool {
        let number = self.routes[route].counters.shadowed.fetch_add(1, Ordering::Relaxed) % 100;
        let percent = u64::from(percent);
        (number + 1) * percent / 100 > number * percent / 100
    }

    /// Chooses an endpoint of a revision, whatever its share, without those that are left out.
    pub(crate) fn choose_of(&self, route: usize, revision: &str) -> Option<Choice> {
        let key = SplitKey::default();
        let criteria = Criteria { key: &key, hash: None, revision: Some(revision), tried: &[] };
        self.choose_beside(route, &criteria)
    }

    /// Chooses an endpoint of a route by its shares, for a request that no caller of it waits for.
    pub(crate) fn choose_by_share(&self, route: usize, headers: &HeaderMap) -> Option<Choice> {
        let key = self.split_key(route, headers, fastrand::u64(..));
        self.choose(route, &Criteria { key: &key, hash: None, revision: None, tried: &[] })
    }

    /// What decides the backend of a request with these headers and this number.
    pub(crate) fn split_key(&self, route: usize, headers: &HeaderMap, sequence: u64) -> SplitKey {
        let rule = &self.table.routes[route].split;
        let forced = rule.forced.as_ref().and_then(|forced| {
            let named = headers.get(&forced.header)?.to_str().ok()?;
            forced.revisions.iter().find(|revision| *revision == named).cloned()
        });
        let named = match &rule.by {
            SplitBy::Request | SplitBy::Percentage => None,
            SplitBy::User { user, .. } => user.user(headers).map(|name| (user, name)),
        };
        let bucket = named.as_ref().map(|(user, name)| bucket_of(&user.salt, name));
        let test = self.table.routes[route].test.as_ref();
        let found = named.as_ref().filter(|_| test.is_some());
        let found = found.map(|(rule, name)| (rule, TestUser::of(&rule.salt, name)));
        let user = found.map(|(_, user)| user);
        let known_user = found.map(|(rule, user)| KnownUser::new(rule, user));
        let name = named.as_ref().map(|(_, name)| &**name);
        let forced_variant = name.and_then(|name| rule.forced_users.get(name)).cloned();
        // Users outside the test get its first variant, the control.
        let control = test.and_then(|test| test.variants.first());
        let outside = control.filter(|_| name.is_some_and(|name| rule.excludes(name)));
        let forced_variant = forced_variant.or_else(|| outside.map(|control| control.name.clone()));
        let names_revision = headers.contains_key(REVISION_HEADER);
        // A number that is drawn makes each choice independent of the others.
        let sequence = if rule.by == SplitBy::Percentage { fastrand::u64(..) } else { sequence };
        SplitKey { sequence, bucket, forced, user, known_user, forced_variant, names_revision }
    }

    /// What counts a request of a test; none where the route has none. Its user is counted now.
    pub(crate) fn observe(&self, route: usize, key: &SplitKey) -> Option<Observation> {
        let observation = self.routes[route].test.as_ref()?.observe(key.variant_choice(), key.user)?;
        Some(observation.of_user(key.known_user.clone()))
    }

    /// Where the score of an answer of another gateway counts; none where the token is not of this answer.
    pub(crate) fn scored_elsewhere(
        &self,
        token: &str,
        request_id: &str,
        registry: &VariantRegistry,
    ) -> Option<ScoredBucket> {
        let mut tests = self.table.routes.iter().filter_map(|route| route.test.as_ref());
        tests.find_map(|rule| ScoredBucket::of_token(rule, token, request_id, registry))
    }

    /// What counts the shadow of a route for its test; none where it is no variant of one.
    pub(crate) fn shadow_series(&self, route: usize) -> Option<Arc<VariantSeries>> {
        let rule = self.table.routes[route].shadow.as_ref()?;
        self.routes[route].test.as_ref()?.series_of(&rule.variant)
    }

    /// Whether the backend of a request has a pod.
    pub(crate) fn is_served(&self, route: usize, key: &SplitKey) -> bool {
        let route = &self.routes[route];
        route.assigned(key).is_some_and(|index| !route.backends[index].members.is_empty())
    }

    /// Whether there is an endpoint that was not tried.
    pub(crate) fn has_untried(&self, route: usize, tried: &[Arc<Endpoint>]) -> bool {
        let backends = self.routes[route].backends.iter().filter(|backend| backend.weight > 0);
        backends.flat_map(|backend| &backend.members).any(|member| !is_tried(&member.endpoint, tried))
    }

    /// Chooses an endpoint that was not tried. Those that are left out come last: a request goes to another
    /// revision before it goes to a pod that refuses connections, and to such a pod before it fails.
    pub(crate) fn choose(&self, route: usize, criteria: &Criteria<'_>) -> Option<Choice> {
        let route = &self.routes[route];
        let earlier = criteria.revision.and_then(|revision| route.backend_of(revision));
        let first = earlier.or_else(|| route.assigned(criteria.key))?;
        let variant = &route.backends[first].variant;
        // Of a test the same variant first: the answer of another one says nothing about it.
        let others = |same_variant: bool| {
            let has_share = move |&index: &usize| {
                let other = &route.backends[index];
                index != first && other.weight > 0 && (other.variant == *variant) == same_variant
            };
            (0..route.backends.len()).filter(has_share)
        };
        [false, true].into_iter().find_map(|with_left_out| {
            let mut order = std::iter::once(first).chain(others(true)).chain(others(false));
            order.find_map(|index| route.pick(index, criteria, with_left_out))
        })
    }

    /// Chooses an endpoint of the same revision that was not tried and is not left out.
    pub(crate) fn choose_beside(&self, route: usize, criteria: &Criteria<'_>) -> Option<Choice> {
        let route = &self.routes[route];
        route.pick(route.backend_of(criteria.revision?)?, criteria, false)
    }

    /// The endpoint of an identity, for tests.
    #[cfg(test)]
    pub(crate) fn endpoint(&self, id: &EndpointId) -> Option<Arc<Endpoint>> {
        self.endpoints.get(id).cloned()
    }
}

/// An endpoint whose route says that it is checked.
#[derive(Debug)]
pub(crate) struct CheckedEndpoint {
    /// The endpoint.
    pub(crate) endpoint: Arc<Endpoint>,
    /// How it is checked.
    pub(crate) rules: HealthRules,
}

fn is_tried(endpoint: &Endpoint, tried: &[Arc<Endpoint>]) -> bool {
    tried.iter().any(|tried| tried.spec.id == endpoint.spec.id)
}

impl LiveRoute {
    fn new(
        route: &Route,
        backends: Vec<LiveBackend>,
        counters: RouteCounters,
        variants: &VariantRegistry,
    ) -> Self {
        // Without this, the share of a revision without pods could only fail.
        let share = |backend: &LiveBackend| if backend.takes_share { backend.weight } else { 0 };
        let weights: Vec<u32> = backends.iter().map(share).collect();
        let owners = match &route.split.by {
            SplitBy::Request | SplitBy::Percentage => None,
            SplitBy::User { owners, .. } => Some(owners),
        };
        let test = route.test.as_ref().map(|rule| {
            let own = route.backends.iter().zip(&weights);
            let own = own.map(|(backend, weight)| TestBackend { variant: &backend.variant, weight: *weight });
            LiveTest::new(rule, owners, &own.collect::<Vec<_>>(), variants)
        });
        // Of a test the owners are variants.
        let owners = owners.filter(|_| test.is_none()).map(|owners| live_owners(owners, &backends));
        Self {
            backends,
            split: Split::new(&weights),
            owners,
            test,
            balance: route.policy.balance.clone(),
            breaker: route.policy.breaker,
            counters,
        }
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        self.backends.iter().flat_map(|backend| &backend.members)
    }

    /// The backend of a revision, where it takes requests.
    fn backend_of(&self, revision: &str) -> Option<usize> {
        self.backends.iter().position(|backend| backend.metrics.revision == revision && backend.takes_share)
    }

    /// The backend that the split gives to a request.
    fn assigned(&self, key: &SplitKey) -> Option<usize> {
        if let Some(forced) = key.forced.as_deref().and_then(|revision| self.backend_of(revision)) {
            return Some(forced);
        }
        if let Some(test) = &self.test {
            // The requests of a variant that has no pods are answered by the others.
            let number = key.bucket.map_or(key.sequence, u64::from);
            return test.backend(key.variant_choice()).or_else(|| self.split.choose(number));
        }
        let Some(bucket) = key.bucket else { return self.split.choose(key.sequence) };
        let owner = self.owners.as_ref().and_then(|owners| owners.get(usize::from(bucket)));
        let owner = owner.map(|&owner| usize::from(owner));
        let takes_share = |&owner: &usize| self.backends.get(owner).is_some_and(|owner| owner.takes_share);
        // The users of a revision that has no pods are shared by the others; each keeps what it gets.
        owner.filter(takes_share).or_else(|| self.split.choose(u64::from(bucket)))
    }

    fn pick(&self, index: usize, criteria: &Criteria<'_>, with_left_out: bool) -> Option<Choice> {
        let backend = &self.backends[index];
        let breaker = self.breaker;
        let mut members: Vec<&Member> = backend
            .members
            .iter()
            .filter(|member| !is_tried(&member.endpoint, criteria.tried))
            .filter(|member| with_left_out || !member.endpoint.is_left_out(breaker.as_ref()))
            .collect();
        let balance = Balance {
            algorithm: self.balance.algorithm,
            sequence: backend.sequence.fetch_add(1, Ordering::Relaxed),
            key: criteria.hash,
        };
        let mut rng = Rng::new();
        loop {
            let candidates: Vec<Candidate> = members.iter().map(|member| self.candidate(member)).collect();
            let chosen = balance::choose(&candidates, balance, &mut rng)?;
            let Member { endpoint, by_revision, .. } = members[chosen];
            let choice = |probe| Choice {
                endpoint: Arc::clone(endpoint),
                metrics: Arc::clone(&backend.metrics),
                variant: backend.variant.clone(),
                routed: backend.routed.clone(),
                breaker,
                probe,
                by_revision: *by_revision,
            };
            let Some(rules) = breaker.filter(|_| endpoint.admission() != Admission::Closed) else {
                return Some(choice(false));
            };
            let probe = endpoint.start_probe(&rules);
            if probe || with_left_out {
                return Some(choice(probe));
            }
            // Another request has just become the probe.
            members.swap_remove(chosen);
        }
    }

    fn candidate(&self, member: &Member) -> Candidate {
        let Member { endpoint, weight, by_revision: _ } = member;
        let slow_start = self.balance.slow_start;
        let factor = if slow_start.is_zero() { 1.0 } else { slow_start_factor(endpoint.age(), slow_start) };
        let by_latency = self.balance.algorithm == balance::Algorithm::LatencyEwma;
        Candidate {
            load: endpoint.load(),
            weight: f64::from(*weight) * factor,
            latency_ms: if by_latency { endpoint.latency_ms() } else { None },
            identity: endpoint.identity,
        }
    }
}

/// By bucket the index of the backend that owns it. Revisions without a backend own none.
fn live_owners(owners: &BucketOwners, backends: &[LiveBackend]) -> Box<[u16]> {
    let index_of: HashMap<&str, u16> =
        backends.iter().zip(0..).map(|(backend, index)| (backend.metrics.revision.as_str(), index)).collect();
    let owner = |bucket| owners.owner(bucket).and_then(|revision| index_of.get(revision)).copied();
    (0..BUCKETS).map(|bucket| owner(bucket).unwrap_or(u16::MAX)).collect()
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

    fn key(sequence: u64) -> SplitKey {
        SplitKey { sequence, ..SplitKey::default() }
    }

    fn chosen(routing: &Routing, sequence: u64) -> Option<Choice> {
        let criteria = Criteria { key: &key(sequence), hash: None, revision: None, tried: &[] };
        routing.choose(0, &criteria)
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
                let choice = chosen(&routing, sequence).unwrap();
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
        let _in_flight = one.endpoint(&id).unwrap().enter(None, false);
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
            let criteria = Criteria { key: &key(0), hash: None, revision: Some("r1"), tried: &tried };
            let choice = routing.choose(0, &criteria).unwrap();
            revisions.push(choice.metrics.revision.clone());
            tried.push(choice.endpoint);
        }
        assert_eq!(revisions, ["r1", "r1", "r2"]);
        let criteria = Criteria { key: &key(0), hash: None, revision: Some("r1"), tried: &tried };
        assert!(routing.choose(0, &criteria).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn ejected_endpoints_come_last_but_before_failure() {
        let metrics = metrics();
        let text = TableText::new(1, 1).route("default/a", &[]).backend(
            "r1",
            1,
            &[endpoint_at("p1", 1), endpoint_at("p2", 2)],
        );
        let routing = build(&metrics, &text, None);
        let ejected = chosen(&routing, 0).unwrap().endpoint;
        ejected.connect_failed();
        for sequence in 0..50 {
            let choice = chosen(&routing, sequence).unwrap();
            assert_ne!(choice.endpoint.spec.id, ejected.spec.id);
        }
        let other = chosen(&routing, 0).unwrap().endpoint;
        other.connect_failed();
        assert!(chosen(&routing, 0).is_some());
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
            assert_eq!(chosen(&routing, sequence).unwrap().metrics.revision, "r1");
        }
        let empty = TableText::new(1, 2).route("default/a", &[]).backend("r1", 1, &[]);
        assert!(chosen(&build(&metrics, &empty, None), 0).is_none());
    }
}
