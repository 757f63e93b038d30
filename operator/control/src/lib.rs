//! The pure part of the control plane: no I/O and no clock, so that it cannot fail for reasons outside its
//! inputs.
//!
//! Inputs are stored objects, reports of pods and the time of the caller's clock. Outputs are objects to
//! apply, a status to write and a route table to publish. The operator does the requests in between.

pub mod ab_test;
pub mod adapters;
pub mod affinity;
pub mod build;
pub mod causes;
pub mod counts;
pub mod drift;
pub mod duration;
pub mod ending;
pub mod events;
pub mod exposure;
pub mod gate;
pub mod hash;
pub mod kinds;
pub mod lease;
pub mod names;
pub mod pods;
pub mod rollout;
pub mod routes;
pub mod scaling;
pub mod status;
pub mod traffic;
pub mod validate;
pub mod versions;
