//! The operator: makes InferenceModels true, and tells gateways where to find their pods.
//!
//! Watch events fill caches; a reconcile reads the caches, lets `trustformers-control` decide, and sends only what
//! differs. One process leads, by a Lease; only the leader watches, writes and serves the route feed. In steady state
//! the API server hears nothing from it but the renewals of its Lease.

pub mod args;
pub mod crd;
pub mod election;
pub mod feed;
pub mod leader;
pub mod metrics;
pub mod observer;
pub mod permissions;
pub mod reconcile;
pub mod recorder;
pub mod run;
pub mod server;
pub mod watch;
pub mod world;
