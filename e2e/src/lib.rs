//! Harness of the scenarios: a real Kubernetes, the Helm release under test, clients outside the cluster.
//!
//! The scenarios themselves are in `e2e/tests/scenarios`. They run only when named, because they need a
//! cluster:
//! `cargo test --profile ci --workspace --test scenarios -- --test-threads=1`, with the variables that
//! [`settings`] names. Each has a namespace of its own and leaves nothing behind.

pub mod ab_test;
pub mod cluster;
pub mod command;
pub mod faults;
pub mod forward;
pub mod gateway;
pub mod leader;
pub mod load;
pub mod metrics;
pub mod model;
pub mod node;
pub mod objects;
pub mod plugin;
pub mod process;
pub mod reference;
pub mod registry;
pub mod release;
pub mod request;
pub mod scenario;
pub mod settings;
pub mod sources;
pub mod specs;
pub mod sse;
pub mod standard_load;
pub mod wait;
