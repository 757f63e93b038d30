//! The pure part of the control plane: no I/O and no clock, so that it cannot fail for reasons outside its inputs.
//!
//! What comes in is what the API server and the pods said, and the time of the caller's clock; what goes out is
//! objects to apply, a status to write, a table to publish. The operator does the talking in between, and the
//! one-process server uses the same rules without a cluster.

pub mod build;
pub mod causes;
pub mod events;
pub mod gate;
pub mod hash;
pub mod lease;
pub mod names;
pub mod pods;
pub mod routes;
pub mod span;
pub mod status;
pub mod validate;
