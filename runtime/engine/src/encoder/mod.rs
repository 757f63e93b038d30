//! The encoder engine: texts in, one row of numbers each out, in batches that form by a strategy.
//!
//! It is the sibling of the generation engine and built the same way: a handle that never blocks, one thread that owns
//! the device, everything bounded, refusals immediate and typed. What differs is the work. A text is computed whole in
//! one step and never comes back, so there is no cache and nothing runs over several steps; what there is to decide is
//! when a step begins and who is in it, which [`BatchStrategy`] says.
//!
//! | module | what it holds |
//! |---|---|
//! | `strategy`, `estimate` | the pure core: who goes when, from arrivals and times of steps |
//! | `config` | settings, checked once |
//! | `request` | what is asked and answered |
//! | `handle` | [`Encoder`], the callers' side |
//! | `device` | the thread |
//! | `metrics` | the series |
//!
//! Steps are ragged: texts of different lengths lie one after the other, nothing is padded, and in `exact` numerics a
//! text gives the same bits whoever shares its step.

mod config;
mod device;
mod estimate;
mod handle;
mod metrics;
mod request;
mod strategy;

pub use config::{EncoderConfig, MAX_WAIT_MS};
pub use handle::{Encoder, EncoderInfo, Encoding};
pub use metrics::EncoderMetrics;
pub use request::{EncodeError, EncodeParams, EncodeTimings, Encoded, MAX_TEXTS};
pub use strategy::BatchStrategy;
