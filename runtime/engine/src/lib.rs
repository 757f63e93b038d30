//! The engine: scheduling, the prefix cache, sampling and speculation on one thread that owns the device.
//!
//! An [`Engine`] is started with a loaded model and a backend. Callers submit requests through a handle that
//! never waits for the device, and read a [`Generation`], a stream of tokens that cancels its work when it is
//! dropped. One device thread runs steps. Each step computes the decode rows of all running sequences and
//! chunks of waiting prompts, up to a token budget, so that sequences start and end between any two steps.
//!
//! Everything is bounded: requests in flight, rows of a step, KV blocks and unread events. Refusals are
//! immediate and typed. Sequences allocate KV blocks as they grow and share those of equal prefixes. Where
//! blocks run out, a sequence is preempted and computed again later, which its caller notices only as time.
//!
//! `docs/engine.md` explains the engine, with a glossary and a code map. Entry points: [`Engine::submit`] and
//! [`encoder::Encoder::submit`] for callers, `generation/device.rs` and `encoder/device.rs` for the loops.
//!
//! ```no_run
//! # async fn example(model: std::sync::Arc<trustformers_model::Model>)
//! # -> Result<(), Box<dyn std::error::Error>> {
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

mod adapters;
mod config;
mod device_thread;
pub mod encoder;
mod estimate;
mod faults;
mod generation;
mod grammar;
mod metrics;
mod prefix_cache;
mod request;
mod sampling;
mod scheduling;
mod speculation;

pub use adapters::{AdapterChangeError, MAX_ADAPTER_NAME_BYTES};
pub use config::{DEFAULT_CONTEXT_TOKENS, EngineConfig, Speculation, SpeculationCosts, StartError};
pub use device_thread::Heartbeat;
pub use estimate::DeviceEstimate;
pub use faults::{DeviceFault, ModelFault, RequestFault};
pub use generation::{Engine, EngineInfo, Generation};
pub use grammar::{DEFAULT_GRAMMAR_MEMORY_BYTES, max_grammar_bytes};
pub use metrics::EngineMetrics;
pub use request::{
    FinishReason, GenerateError, GenerateParams, GenerationEvent, GenerationObserver, GenerationOutcome,
    GenerationProgress, Grammar, MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES,
    MAX_STOP_TOKENS, MAX_STOPS, MAX_TENANT_BYTES, MIN_REPETITION_PENALTY, Prompt, StopCause, SubmitError,
    Timings, TokenLogprobs,
};
pub use scheduling::priority::Priority;
pub use trustformers_plan::{Adapter, AdapterRoom, KvType, LoadProgress, MemoryReport, Numerics};
