//! Holds requests for a model that has no pod at the moment, where its route says so: while the only pod is
//! drained for another revision, or while the first one starts.
//!
//! What waits is bounded by number and bytes, both shared fairly between callers and apart from what serves
//! other models (`limits`), and by the route's time. Every table wakes all of them. A caller that leaves
//! takes its request with it, because its future is dropped.

use std::sync::Arc;

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tokio::time::{Instant, timeout_at};
use trustformers_api::budget::Share;

use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, Resource};
use crate::routing::Routing;
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

    fn enter(
        &self,
        limits: &CallerLimits,
        route: &str,
        body_bytes: usize,
    ) -> Result<HeldRequest, GatewayError> {
        let reserve = |resource, amount| limits.reserve(resource, amount).map_err(GatewayError::Overloaded);
        let (requests, bytes) =
            (reserve(Resource::HeldRequests, 1)?, reserve(Resource::HeldBytes, body_bytes)?);
        let now = self.now.with_label_values(&[route]);
        now.inc();
        self.total.with_label_values(&[route]).inc();
        Ok(HeldRequest { now, _requests: requests, _bytes: bytes })
    }
}

/// The table in force and a route of it.
#[derive(Debug, Clone)]
pub(crate) struct RoutePlace {
    /// The table.
    pub(crate) routing: Arc<Routing>,
    /// The route's index in it.
    pub(crate) route: usize,
}

/// What a request that may be held brings.
pub(crate) struct Waiting<'a> {
    /// The caller's limits.
    pub(crate) limits: &'a CallerLimits,
    /// Bytes of its body that are kept meanwhile.
    pub(crate) body_bytes: usize,
}

/// Finds a request's route in the newest table. Where the route has no pod and says that requests are held,
/// waits for a table in which it has.
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
    let look = || {
        let routing = gateway.routing().ok_or(GatewayError::NoTable)?;
        let route = find(&routing)?;
        Ok::<_, GatewayError>(RoutePlace { routing, route })
    };
    let place = look()?;
    let Some(limit) = time_to_hold(place.route()) else { return Ok(place) };
    let began = Instant::now();
    let name = place.route().name.clone();
    let _held = gateway.hold.enter(waiting.limits, &name, waiting.body_bytes)?;
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
        if time_to_hold(place.route()).is_none() {
            return Ok(place);
        }
    }
}

impl RoutePlace {
    /// The route.
    pub(crate) fn route(&self) -> &Route {
        self.routing.route(self.route)
    }
}

/// How long a request for this route is held. None where it is not: the route has a pod, or its requests are
/// refused without one.
fn time_to_hold(route: &Route) -> Option<std::time::Duration> {
    let served = route.backends.iter().any(|backend| backend.weight > 0 && !backend.endpoints.is_empty());
    route.policy.hold.filter(|_| !served)
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
        let waiting = Waiting { limits, body_bytes };
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
    async fn a_route_that_disappears_ends_the_wait() {
        let (gateway, limits) = (gateway(), limits(Bounds::default()));
        gateway.apply(table(1, 0, HOLD), Source::Feed).unwrap();
        let mut waiting = std::pin::pin!(find(&gateway, &limits, 0));
        assert!(waiting.as_mut().now_or_never().is_none());
        gateway.apply(TableText::new(1, 2).wire(), Source::Feed).unwrap();
        assert!(waiting.await.is_err());
    }
}
