//! Harness of the stories: a real Kubernetes, the Helm release under test, callers outside the cluster.
//!
//! The stories themselves are in `tests/stories`. They run only when asked for, because they need a cluster:
//! `cargo test --profile ci -p trustformers-e2e --test stories -- --test-threads=1`, with the variables that
//! [`settings`] names. Each has a namespace of its own and leaves nothing behind.

pub mod ask;
pub mod cluster;
pub mod command;
pub mod forward;
pub mod gateway;
pub mod load;
pub mod metrics;
pub mod model;
pub mod process;
pub mod reference;
pub mod registry;
pub mod release;
pub mod settings;
pub mod sse;
pub mod story;
pub mod wait;
