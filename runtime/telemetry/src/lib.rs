//! Logs, metrics and traces, the same in every program of the project.
//!
//! A leaf crate: it knows no other part, so that the operator, the gateway and the pod can share one log
//! format, one `/metrics` page and one way to trace without sharing anything else. Scraping reads atomics
//! only; it never enters an engine or a reconciler, so that it can neither slow them down nor hang with them.

pub mod logs;
pub mod metrics;
pub mod traces;
