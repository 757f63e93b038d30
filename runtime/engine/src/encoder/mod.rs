//! The encoder engine: texts in, one row of numbers each out, in batches that a strategy forms.
//!
//! It has the same structure as the generation engine: a handle that never blocks, one device thread, bounds
//! on everything, immediate and typed refusals. A text is computed whole in one step and never comes back, so
//! there is no cache and nothing spans several steps. What remains to decide is when a step begins and which
//! texts are in it; that is the [`BatchStrategy`].
//!
//! | module | what it holds |
//! |---|---|
//! | `strategy`, `estimate` | the pure core: which texts run when, from arrivals and the times of steps |
//! | `config` | settings, checked once |
//! | `request` | requests, results and errors |
//! | `handle` | [`Encoder`], which callers submit requests to |
//! | `device` | the loop of the device thread |
//! | `metrics` | the series |
//!
//! Steps are ragged: texts of different lengths lie one after the other, without padding. In `exact` numerics
//! a text gives the same bits whatever else is in its step.

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
pub use request::{EncodeError, EncodeInput, EncodeParams, EncodeTimings, Encoded, MAX_TEXTS};
pub use strategy::BatchStrategy;
