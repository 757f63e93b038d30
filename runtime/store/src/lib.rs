//! Model sources: which files a model is made of, how they come here, and their digest.
//!
//! A [`Source`] is where a model lies; [`Resolved`] is the files that were picked from it;
//! [`Resolved::digest`] is the name of exactly these bytes. Everything later (status, routes, rollouts)
//! speaks of a model by that digest, so it is computed from what was read here and is never taken from a
//! file's name or a manifest.
//!
//! A model of another machine is fetched by a [`Store`] into a cache directory that several processes may
//! share. Files of this machine are read where they lie, with plain blocking reads: callers run those on a
//! thread of their own.

mod cache;
mod digest;
mod error;
mod fetch;
mod fetched;
mod http;
mod lock;
mod origin;
mod partial;
mod progress;
mod ranges;
mod retry;
mod select;
mod settings;
mod source;
mod transfer;
mod unpack;
mod written;

pub use digest::{Digest, HashProgress};
pub use error::StoreError;
pub use fetch::{FetchRequest, Store};
pub use fetched::Fetched;
pub use progress::{FetchPhase, FetchProgress, ProgressMeter};
pub use select::{ModelFile, Resolved, are_parts};
pub use settings::{Environment, FetchLimits, StoreSettings};
pub use source::{RemoteSource, SUPPORTED, Scheme, Source};
