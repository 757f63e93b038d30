//! The engine: scheduler, paged KV cache and sampling behind one thread that owns the device.
//!
//! An [`Engine`] is started from a loaded model and a backend. Callers submit requests through a handle that never
//! waits for the device and read a [`Generation`], a stream of tokens that cancels its work when dropped. Inside, one
//! thread runs steps: each is the decode rows of all running sequences plus chunks of waiting prompts up to a token
//! budget, so sequences join and leave between any two steps.
//!
//! Everything is bounded: requests in flight, rows per step, KV blocks and the events of a request. Refusals are
//! immediate and typed. Sequences take KV blocks as they grow and share those of equal beginnings; where blocks run out
//! the latest sequence gives its own up and computes them again later, which its caller sees only as time.
//!
//! ```no_run
//! # async fn example(model: std::sync::Arc<trustformers_model::Model>) -> Result<(), Box<dyn std::error::Error>> {
//! use futures::StreamExt;
//! use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, GenerationEvent};
//!
//! let metrics = EngineMetrics::register(&prometheus::Registry::new())?;
//! let backend = Box::new(trustformers_plan::oracle::Oracle::new());
//! let engine = Engine::start(model, backend, &EngineConfig::default(), &metrics)?;
//! let mut generation = engine.submit(&GenerateParams::greedy("Hello", 16))?;
//! while let Some(event) = generation.next().await {
//!     if let GenerationEvent::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod answer;
mod blocks;
mod census;
mod config;
mod contest;
mod device;
pub mod encoder;
mod generation;
mod grammar;
mod handle;
mod metrics;
mod priority;
mod queue;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod shared;
mod speculation;
mod stop;
mod tenants;
mod thread;

pub use config::{DEFAULT_CONTEXT_TOKENS, EngineConfig, Speculation, StartError};
pub use generation::Generation;
pub use grammar::{DEFAULT_GRAMMAR_MEMORY_BYTES, max_grammar_bytes};
pub use handle::{Engine, EngineInfo};
pub use metrics::EngineMetrics;
pub use priority::Priority;
pub use request::{
    FinishReason, GenerateError, GenerateParams, GenerationEvent, Grammar, MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOP_TOKENS, MAX_STOPS, MAX_TENANT_BYTES, Prompt,
    StopCause, SubmitError, Timings, TokenLogprobs,
};
pub use shared::Heartbeat;
pub use trustformers_plan::{LoadProgress, MemoryReport, Numerics};
