//! Holds requests for a model that has no pod at the moment, where its route says so: while the only pod is
//! drained for another revision, or while the first one starts.
//!
//! What waits is bounded by number and bytes, both shared fairly between callers and apart from what serves
//! other models (`limits`), by a number of the route's own, and by the route's time. Every table wakes all of
//! them. A caller that leaves takes its request with it, because its future is dropped.

use std::sync::Arc;

use http::HeaderMap;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tokio::time::{Instant, timeout_at};
use trustformers_api::budget::Share;
use trustformers_proto::control::v1::HeldRequests;

use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, HELD_REQUESTS_OF_ROUTE, Resource};
use crate::routing::{Routing, SplitKey};
use crate::table::Route;

/// How many requests are held: the demand for routes that nothing serves.
#[derive(Debug)]
pub(crate) struct Hold {
    now: IntGaugeVec,
    total: IntCounterVec,
}

/// A request that is held. Dropping it frees its place.
#[derive(Debug)]
struct HeldRequest {
    now: IntGauge,
    _requests: Share,
    _bytes: Share,
}

impl Drop for HeldRequest {
    fn drop(&mut self) {
        self.now.dec();
    }
}

impl Hold {
    /// Holds nothing yet.
    ///
    /// # Errors
    /// When the registry has a collector of one of these names already.
    pub(crate) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let now = Opts::new("trustformers_gateway_held", "Requests that wait for a pod of their route.");
        let total = Opts::new(
            "trustformers_gateway_held_total",
            "Requests that have waited for a pod of their route.",
        );
        let hold =
            Self { now: IntGaugeVec::new(now, &["route"])?, total: IntCounterVec::new(total, &["route"])? };
        registry.register(Box::new(hold.now.clone()))?;
        registry.register(Box::new(hold.total.clone()))?;
        Ok(hold)
    }

    /// How many requests are held now, by route.
    pub(crate) fn held(&self) -> Vec<HeldRequests> {
        let families = self.now.collect();
        let gauges = families.iter().flat_map(MetricFamily::get_metric);
        let counted = gauges.filter_map(|gauge| {
            let route = gauge.get_label().first()?.value().to_owned();
            // A gauge of integers, written as a float.
            let count = gauge.get_gauge().get_value() as u64;
            (count > 0).then_some(HeldRequests { route, count })
        });
        counted.collect()
    }

    fn enter(&self, waiting: &Waiting<'_>, route: &Route) -> Result<HeldRequest, GatewayError> {
        let reserve =
            |resource, amount| waiting.limits.reserve(resource, amount).map_err(GatewayError::Overloaded);
        let (requests, bytes) =
            (reserve(Resource::HeldRequests, 1)?, reserve(Resource::HeldBytes, waiting.body_bytes)?);
        let now = self.now.with_label_values(&[route.name.as_str()]);
        now.inc();
        let held = HeldRequest { now, _requests: requests, _bytes: bytes };
        let of_route = route.policy.hold_requests.map_or(HELD_REQUESTS_OF_ROUTE, |most| most as usize);
        if usize::try_from(held.now.get()).is_ok_and(|now| now > of_route) {
            return Err(GatewayError::Overloaded(Resource::HeldRequests));
        }
        self.total.with_label_values(&[route.name.as_str()]).inc();
        Ok(held)
    }
}

/// The table in force and a route of it.
#[derive(Debug, Clone)]
pub(crate) struct RoutePlace {
    /// The table.
    pub(crate) routing: Arc<Routing>,
    /// The route's index in it.
    pub(crate) route: usize,
    /// Decides the request's backend.
    pub(crate) key: SplitKey,
}

/// What a request that may be held brings.
pub(crate) struct Waiting<'a> {
    /// The caller's limits.
    pub(crate) limits: &'a CallerLimits,
    /// Bytes of its body that are kept meanwhile.
    pub(crate) body_bytes: usize,
    /// Its headers, which may decide its backend.
    pub(crate) headers: &'a HeaderMap,
}

/// Finds a request's route in the newest table. Where the route has no pod for the request and says that
/// requests are held, waits for a table in which it has.
///
/// # Errors
/// What `find` says of a table; a bound is reached; the route's time has passed.
pub(crate) async fn find_served(
    gateway: &Gateway,
    waiting: Waiting<'_>,
    find: impl Fn(&Routing) -> Result<usize, GatewayError>,
) -> Result<RoutePlace, GatewayError> {
    // Before the first look, so that no table is missed.
    let mut tables = gateway.watch_version();
    // A request has one number, however many tables it sees.
    let mut numbered = None;
    let mut look = || {
        let routing = gateway.routing().ok_or(GatewayError::NoTable)?;
        let route = find(&routing)?;
        let sequence = *numbered.get_or_insert_with(|| routing.next_sequence(route));
        let key = routing.split_key(route, waiting.headers, sequence);
        Ok::<_, GatewayError>(RoutePlace { routing, route, key })
    };
    let place = look()?;
    let Some(limit) = place.time_to_hold() else { return Ok(place) };
    let began = Instant::now();
    let name = place.route().name.clone();
    let _held = gateway.hold.enter(&waiting, place.route())?;
    drop(place);
    tracing::debug!(route = name, "a request is held until a pod serves its model");
    loop {
        match timeout_at(began + limit, tables.changed()).await {
            // The sender lives as long as the gateway.
            Ok(_changed) => {}
            Err(_elapsed) => {
                return Err(GatewayError::HeldTooLong { route: name, limit_ms: limit.as_millis() });
            }
        }
        let place = look()?;
        if place.time_to_hold().is_none() {
            return Ok(place);
        }
    }
}

impl RoutePlace {
    /// The route.
    pub(crate) fn route(&self) -> &Route {
        self.routing.route(self.route)
    }

    /// How long the request is held. None where it is not: it has a pod, or the route's requests are refused
    /// without one.
    fn time_to_hold(&self) -> Option<std::time::Duration> {
        self.route().policy.hold.filter(|_| !self.routing.is_served(self.route, &self.key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::fixtures::{TableText, endpoint_at};
    use crate::gateway::Source;
    use crate::limits::{Bounds, Limits};
    use crate::metrics::Metrics;
    use futures::FutureExt;
    use trustformers_proto::control::v1::RouteTable;

    const HOLD: Duration = Duration::from_secs(30);

    fn gateway() -> Arc<Gateway> {
        Gateway::new(Metrics::new(Registry::new()).unwrap(), 1 << 20)
    }

    fn table(counter: u64, pods: usize, hold: Duration) -> RouteTable {
        let endpoints: Vec<_> = (0..pods).map(|pod| endpoint_at(&format!("p{pod}"), 1)).collect();
        let mut table = TableText::new(1, counter).route("d/a", &["a"]).backend("r1", 1, &endpoints).wire();
        let policy = table.routes[0].policy.as_mut().unwrap();
        policy.hold_ms = u64::try_from(hold.as_millis()).unwrap();
        table
    }

    fn limits(bounds: Bounds) -> CallerLimits {
        Limits::new(bounds).of_caller([192, 0, 2, 1].into())
    }

    async fn find(
        gateway: &Gateway,
        limits: &CallerLimits,
        body_bytes: usize,
    ) -> Result<RoutePlace, GatewayError> {
        let headers = HeaderMap::new();
        let waiting = Waiting { limits, body_bytes, headers: &headers };
        find_served(gateway, waiting, |routing| routing.table.find("a").map_err(|_| GatewayError::NoTable))
            .await
    }

    /// How many requests are held now, and were held.
    fn demand(gateway: &Gateway) -> [i64; 2] {
        let total = gateway.hold.total.with_label_values(&["d/a"]).get();
        [gateway.hold.now.with_label_values(&["d/a"]).get(), i64::try_from(total).unwrap()]
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_a_table_with_a_pod() {
        let (gateway, limits) = (gateway(), limits(Bounds::default()));
        gateway.apply(table(1, 0, HOLD), Source::Feed).unwrap();
        let mut waiting = std::pin::pin!(find(&gateway, &limits, 100));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(demand(&gateway), [1, 1]);
        // A table that changes nothing for it wakes it in vain.
        gateway.apply(table(2, 0, HOLD), Source::Feed).unwrap();
        assert!(waiting.as_mut().now_or_never().is_none());
        gateway.apply(table(3, 1, HOLD), Source::Feed).unwrap();
        let place = waiting.await.unwrap();
        assert_eq!(place.routing.table.version.counter, 3);
        assert_eq!(demand(&gateway), [0, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_routes_time_ends_the_wait_and_other_routes_do_not_wait() {
        let (gateway, limits) = (gateway(), limits(Bounds::default()));
        gateway.apply(table(1, 0, HOLD), Source::Feed).unwrap();
        let began = Instant::now();
        let error = find(&gateway, &limits, 0).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), ("unavailable", HOLD));
        gateway.apply(table(2, 0, Duration::ZERO), Source::Feed).unwrap();
        let place = find(&gateway, &limits, 0).now_or_never().unwrap().unwrap();
        assert_eq!(place.route().endpoint_count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_leaves_frees_its_place() {
        let gateway = gateway();
        gateway.apply(table(1, 0, HOLD), Source::Feed).unwrap();
        // One caller may have half of each.
        let limits = limits(Bounds { held_requests: 4, held_bytes: 2000, ..Bounds::default() });
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(find(&gateway, &limits, 400))).collect();
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        let full = find(&gateway, &limits, 0).now_or_never().unwrap().unwrap_err();
        assert_eq!(full.kind(), "overloaded");
        drop(waiting.pop());
        let long = find(&gateway, &limits, 700).now_or_never().unwrap().unwrap_err();
        assert_eq!(long.kind(), "overloaded");
        let mut third = Box::pin(find(&gateway, &limits, 600));
        assert!(third.as_mut().now_or_never().is_none());
        assert_eq!(demand(&gateway), [2, 3]);
        drop((waiting, third));
        assert_eq!(demand(&gateway), [0, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_has_a_bound_of_its_own() {
        let (gateway, limits) = (gateway(), limits(Bounds::default()));
        let mut table = table(1, 0, HOLD);
        table.routes[0].policy.as_mut().unwrap().hold_requests = 2;
        gateway.apply(table, Source::Feed).unwrap();
        let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(find(&gateway, &limits, 0))).collect();
        assert!(waiting.iter_mut().all(|one| one.as_mut().now_or_never().is_none()));
        let third = find(&gateway, &limits, 0).now_or_never().unwrap().unwrap_err();
        assert_eq!((third.kind(), demand(&gateway)), ("overloaded", [2, 2]));
        drop(waiting.pop());
        assert!(Box::pin(find(&gateway, &limits, 0)).as_mut().now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_that_disappears_ends_the_wait() {
        let (gateway, limits) = (gateway(), limits(Bounds::default()));
        gateway.apply(table(1, 0, HOLD), Source::Feed).unwrap();
        let mut waiting = std::pin::pin!(find(&gateway, &limits, 0));
        assert!(waiting.as_mut().now_or_never().is_none());
        gateway.apply(TableText::new(1, 2).wire(), Source::Feed).unwrap();
        assert!(waiting.await.is_err());
    }

    /// Callers come and leave, tables and time change, in random order. The model keeps when each held
    /// request came and its bytes; one caller may have half of 8 requests and of 2,000 bytes.
    #[tokio::test(start_paused = true)]
    async fn it_agrees_with_a_plain_model_over_random_histories() {
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let gateway = gateway();
            let limits = limits(Bounds { held_requests: 8, held_bytes: 2000, ..Bounds::default() });
            let (mut counter, mut is_served) = (1, false);
            gateway.apply(table(counter, 0, HOLD), Source::Feed).unwrap();
            let mut held = Vec::new();
            for _ in 0..200 {
                match rng.u8(..6) {
                    0..=2 => {
                        let bytes = rng.usize(..400);
                        let used: usize = held.iter().map(|(_, bytes, _)| *bytes).sum();
                        let fits = held.len() < 4 && used + bytes <= 1000;
                        let mut request = Box::pin(find(&gateway, &limits, bytes));
                        match request.as_mut().now_or_never() {
                            Some(Ok(_place)) => assert!(is_served, "seed {seed}"),
                            Some(Err(error)) => {
                                assert_eq!((error.kind(), fits), ("overloaded", false), "seed {seed}");
                            }
                            None => {
                                assert!(fits && !is_served, "seed {seed}");
                                held.push((Instant::now(), bytes, request));
                            }
                        }
                    }
                    3 if !held.is_empty() => drop(held.swap_remove(rng.usize(..held.len()))),
                    4 => {
                        (counter, is_served) = (counter + 1, rng.bool());
                        gateway.apply(table(counter, usize::from(is_served), HOLD), Source::Feed).unwrap();
                    }
                    _ => tokio::time::advance(Duration::from_millis(rng.u64(..12_000))).await,
                }
                held.retain_mut(|(came, _, request)| {
                    let is_over = came.elapsed() >= HOLD;
                    match request.as_mut().now_or_never() {
                        Some(Ok(_place)) => assert!(is_served, "seed {seed}"),
                        Some(Err(error)) => {
                            assert_eq!((error.kind(), is_over), ("unavailable", true), "seed {seed}");
                        }
                        None => {
                            assert!(!is_served && !is_over, "seed {seed}");
                            return true;
                        }
                    }
                    false
                });
                let now = i64::try_from(held.len()).unwrap();
                assert_eq!(demand(&gateway)[0], now, "seed {seed}");
            }
        }
    }
}
