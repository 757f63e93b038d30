//! Model sources: which files a model is made of, and their digest.
//!
//! A [`Source`] is where a model lies; [`Resolved`] is the files that were picked from it;
//! [`Resolved::digest`] is the name of exactly these bytes. Everything later (status, routes, rollouts)
//! speaks of a model by that digest, so it is computed from what was read here and is never taken from a
//! file's name or a manifest.
//!
//! The crate does plain blocking reads: callers run it on a thread of their own.

mod digest;
mod error;
mod select;
mod source;

pub use digest::{Digest, HashProgress};
pub use error::StoreError;
pub use select::{ModelFile, Resolved};
pub use source::{SUPPORTED, Source};
