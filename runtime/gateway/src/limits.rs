//! Bounds on what callers can make the gateway hold.
//!
//! Memory at worst:
//!
//! | what | bound | memory |
//! |---|---|---|
//! | request bodies | 128 MiB | 128 MiB |
//! | requests in flight | 10,240, each with 24 KiB of unsent answer | 240 MiB |
//! | connections | 10,240, each with 16 KiB of unread head | 160 MiB |
//! | listings | 32, each of about 1 MiB | 32 MiB |
//! | requests that are held | 512, with 16 MiB of bodies | 16 MiB |
//! | compressed bodies that are looked into | 2, each with 16 MiB | 32 MiB |
//! | requests for another revision (`shadow`) | 128 answered, 64 that wait, 4 compared | 62 MiB |
//!
//! Together 670 MiB of the 768 MiB that the chart allows; 98 MiB remain for the routing table, the program
//! and the allocator. The 24 KiB of one answer are the window towards the pod, whose frames are no longer (8
//! KiB, `pool`), and the send buffer towards the caller (16 KiB, `connection`). These are the worst of all
//! callers: 10,240 streams of tokens whose callers read hold some 4 KiB each, and each connection of its own
//! some 10 KiB.
//!
//! The sum is printed at the start ([`WORST_BYTES`]).
//!
//! Each bound is shared fairly ([`FairBudget`]): one caller gets at most half of it.

use std::net::IpAddr;
use std::sync::Arc;

use trustformers_api::budget::{Caller, FairBudget, Share};

use crate::connection::{HEAD_BYTES, SEND_BUFFER_BYTES};
use crate::gateway::DECODERS;
use crate::pool::STREAM_WINDOW_BYTES;
use crate::shadow::SHADOW_BYTES;

/// Bodies of all requests together: 32 of the longest (4 MiB each), or some ten thousand ordinary prompts.
const BODY_BYTES: usize = 128 << 20;
/// Requests that wait for a pod or whose answer has not ended. A pod queues 512 and computes 256 at a time,
/// so this fills thirteen pods; at 2 s per answer it is 5120 requests per second.
const REQUESTS: usize = 10_240;
/// Open connections. Proxies use a few; clients that connect directly use one for each HTTP/1.1 request in
/// flight.
const CONNECTIONS: usize = 10_240;
/// Requests that are held for models without a pod: a second of 512 requests per second.
const HELD_REQUESTS: usize = 512;
/// The most of them for one route whose policy says nothing, so that a model without a pod leaves room for
/// others.
pub(crate) const HELD_REQUESTS_OF_ROUTE: usize = HELD_REQUESTS / 2;
/// Bodies of those: 32 KiB for each, or four of the longest.
const HELD_BYTES: usize = 16 << 20;
/// Answers that list every model or every metric. Each takes some 200 bytes for a model: 1 MiB for 5000
/// models.
const LISTINGS: usize = 32;

/// Unsent answer of one request: the window towards the pod and the send buffer towards the caller.
const ANSWER_BYTES: usize = STREAM_WINDOW_BYTES as usize + SEND_BUFFER_BYTES;
/// Room of one listing.
const LISTING_BYTES: usize = 1 << 20;
/// What a decoder of a compressed body takes.
const DECODER_BYTES: usize = 16 << 20;

/// What all callers together can make the gateway hold at worst, as in the table above.
pub(crate) const WORST_BYTES: usize = BODY_BYTES
    + REQUESTS * ANSWER_BYTES
    + CONNECTIONS * HEAD_BYTES
    + LISTINGS * LISTING_BYTES
    + HELD_BYTES
    + DECODERS * DECODER_BYTES
    + SHADOW_BYTES;

/// The longest `--body-limit-bytes`: a longer body would never fit into the share of one caller.
pub(crate) const MAX_BODY_LIMIT_BYTES: usize = BODY_BYTES / 2;

/// What is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Bytes of request bodies.
    BodyBytes,
    /// Requests in flight.
    Requests,
    /// Connections.
    Connections,
    /// Answers that list every model or every metric.
    Listings,
    /// Requests that wait for a pod of their model.
    HeldRequests,
    /// Bytes of their bodies.
    HeldBytes,
}

/// The bound of each resource, for all callers together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Bytes of request bodies.
    pub(crate) body_bytes: usize,
    /// Requests in flight.
    pub(crate) requests: usize,
    /// Connections.
    pub(crate) connections: usize,
    /// Answers that list every model or every metric.
    pub(crate) listings: usize,
    /// Requests that wait for a pod of their model.
    pub(crate) held_requests: usize,
    /// Bytes of their bodies.
    pub(crate) held_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            body_bytes: BODY_BYTES,
            requests: REQUESTS,
            connections: CONNECTIONS,
            listings: LISTINGS,
            held_requests: HELD_REQUESTS,
            held_bytes: HELD_BYTES,
        }
    }
}

/// The budgets of all resources.
#[derive(Debug)]
pub(crate) struct Limits {
    body_bytes: Arc<FairBudget>,
    requests: Arc<FairBudget>,
    connections: Arc<FairBudget>,
    listings: Arc<FairBudget>,
    held_requests: Arc<FairBudget>,
    held_bytes: Arc<FairBudget>,
}

impl Limits {
    /// Nothing is used.
    pub(crate) fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            body_bytes: FairBudget::new(bounds.body_bytes),
            requests: FairBudget::new(bounds.requests),
            connections: FairBudget::new(bounds.connections),
            listings: FairBudget::new(bounds.listings),
            held_requests: FairBudget::new(bounds.held_requests),
            held_bytes: FairBudget::new(bounds.held_bytes),
        })
    }

    /// The limits of the caller at an address.
    pub(crate) fn of_caller(self: &Arc<Self>, address: IpAddr) -> CallerLimits {
        CallerLimits { caller: Caller::at(address), limits: Arc::clone(self) }
    }

    fn budget(&self, resource: Resource) -> &Arc<FairBudget> {
        match resource {
            Resource::BodyBytes => &self.body_bytes,
            Resource::Requests => &self.requests,
            Resource::Connections => &self.connections,
            Resource::Listings => &self.listings,
            Resource::HeldRequests => &self.held_requests,
            Resource::HeldBytes => &self.held_bytes,
        }
    }

    /// How much of a resource is used.
    #[cfg(test)]
    pub(crate) fn used(&self, resource: Resource) -> usize {
        self.budget(resource).used()
    }
}

/// The limits as they apply to one caller.
#[derive(Debug)]
pub(crate) struct CallerLimits {
    caller: Caller,
    limits: Arc<Limits>,
}

impl CallerLimits {
    /// Reserves an amount of a resource until the share is dropped.
    ///
    /// # Errors
    /// The resource, if the bound or the caller's part of it is reached.
    pub(crate) fn reserve(&self, resource: Resource, amount: usize) -> Result<Share, Resource> {
        self.limits.budget(resource).try_acquire(self.caller, amount).ok_or(resource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_fit_the_memory_limit_of_the_chart() {
        // The chart allows 768 MiB.
        assert_eq!(WORST_BYTES >> 20, 670);
    }
}
