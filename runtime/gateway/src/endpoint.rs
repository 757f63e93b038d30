//! One pod as this gateway sees it: its connections, its requests in flight, and whether it is ejected.
//!
//! An endpoint outlives the table that named it first: the next table that names it keeps the counts and the
//! connections.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::eject::Ejection;
use crate::metrics::Protocol;
use crate::pool::Pool;
use crate::table::EndpointSpec;

/// A pod's container.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// Identity, addresses and the pod's name.
    pub(crate) spec: EndpointSpec,
    in_flight: AtomicUsize,
    ejection: Mutex<Ejection>,
    http: Pool,
    grpc: Pool,
}

/// Counts one request as in flight until dropped, which is when the body of its answer has ended.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Endpoint>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Endpoint {
    /// An endpoint without requests or connections.
    pub(crate) fn new(spec: EndpointSpec) -> Self {
        let (http, grpc) = (Pool::new(spec.id.http), Pool::new(spec.id.grpc));
        Self { spec, in_flight: AtomicUsize::new(0), ejection: Mutex::default(), http, grpc }
    }

    /// Counts a request.
    pub(crate) fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight(Arc::clone(self))
    }

    /// Requests whose answers have not ended.
    pub(crate) fn load(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// The connections for a protocol.
    pub(crate) fn pool(&self, protocol: Protocol) -> &Pool {
        match protocol {
            Protocol::Http => &self.http,
            Protocol::Grpc => &self.grpc,
        }
    }

    /// Whether it is ejected at `now`.
    pub(crate) fn is_ejected(&self, now: Duration) -> bool {
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner).is_ejected(now)
    }

    /// Connecting failed at `now`.
    pub(crate) fn connect_failed(&self, now: Duration) {
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner).failed(now);
    }

    /// The endpoint accepted a request.
    pub(crate) fn connected(&self) {
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner).succeeded();
    }
}
