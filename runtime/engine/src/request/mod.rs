//! The public vocabulary of generation: requests, events and errors, without any machinery.

mod error;
mod event;
mod observer;
mod params;

pub use error::{GenerateError, SubmitError};
pub(crate) use event::EventResult;
pub use event::{FinishReason, GenerationEvent, StopCause, Timings};
pub use observer::{GenerationObserver, GenerationOutcome, GenerationProgress};
pub use params::{
    GenerateParams, Grammar, MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES,
    MAX_STOP_TOKENS, MAX_STOPS, MAX_TENANT_BYTES, MIN_REPETITION_PENALTY, Prompt,
};
pub use trustformers_plan::TokenLogprobs;
