//! The operator: runs the pods of InferenceModels and publishes routes to them to the gateways.
//!
//! Watch events fill caches. A reconcile reads the caches, lets `trustformers-control` decide, and writes
//! only what differs. One process leads, by a Lease. Only the leader watches, writes and serves the route
//! feed. In steady state its only requests to the API server are renewals of the Lease.

pub mod ab_tests;
pub mod args;
pub mod changes;
pub mod children;
pub mod cluster_keys;
pub mod context;
pub mod crd;
pub mod decode;
pub mod definitions;
pub mod election;
pub mod extended;
pub mod feed;
pub mod leader;
pub mod metrics;
pub mod models;
pub mod nodes;
pub mod observer;
pub mod permissions;
pub mod pod_admin;
pub mod pod_tokens;
pub mod pods;
pub mod queue;
pub mod reconcile;
pub mod recorder;
pub mod requests;
pub mod run;
pub mod server;
#[cfg(test)]
pub(crate) mod testing;
pub mod unreadable;
pub mod watchers;
