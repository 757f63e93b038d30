//! Why a request was not admitted, and why an admitted one ended without finishing.

use crate::faults::{DeviceFault, ModelFault, RequestFault};
use std::time::Duration;
use thiserror::Error;

/// Why a request was not admitted. Nothing of it is left in the engine.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum SubmitError {
    /// As many requests as allowed are in flight. Retry after a moment or elsewhere.
    #[error("{queue} requests are already waiting for this model; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// Requests that wait at this moment.
        queue: usize,
        /// The estimated time until those have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// A resource that requests share is in full use. Retry after a moment or elsewhere.
    #[error("{what} is in full use; retry in {} s", retry_after.as_secs())]
    Busy {
        /// What is in use.
        what: &'static str,
        /// The time after which it is probably free, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// The prompt leaves no room for even one token.
    #[error("the prompt has {tokens} tokens; this model is served with room for at most {limit}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Most tokens that a prompt may have.
        limit: usize,
    },
    /// A field of the request is wrong.
    #[error("{field}: {why}")]
    Invalid {
        /// The field's name in [`GenerateParams`](crate::GenerateParams).
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The model's files are wrong.
    #[error(transparent)]
    Model(#[from] ModelFault),
    /// The engine is draining, was stopped or died.
    #[error("the engine of this model is stopping or stopped")]
    Stopped,
}

/// Why an admitted generation ended without finishing.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum GenerateError {
    /// The request cannot be completed; others are not affected.
    #[error(transparent)]
    Request(#[from] RequestFault),
    /// The model's files are wrong.
    #[error(transparent)]
    Model(#[from] ModelFault),
    /// The device failed in a step of this sequence.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// It waited in a full queue and was removed for a request of a higher class, or of a tenant with fewer
    /// requests. No token was produced. Retry after a moment or elsewhere.
    #[error("the queue of this model is full and another request had precedence; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// The estimated time until the waiting requests have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// The engine was stopped or died before the end.
    #[error("the engine was stopped before this generation ended")]
    Stopped,
}
