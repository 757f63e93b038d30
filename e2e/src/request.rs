//! A scenario's request to a model and its answer, in terms that fit every protocol.

use std::time::Duration;

use thiserror::Error;

/// One request for text. Greedy, so that its tokens can be compared.
#[derive(Debug, Clone)]
pub struct Request {
    /// `namespace/name` or a bare name.
    pub model: String,
    /// The prompt.
    pub prompt: String,
    /// At most this many new tokens.
    pub max_tokens: u32,
}

impl Request {
    /// A request to `model` for at most `max_tokens` tokens after `prompt`.
    #[must_use]
    pub fn new(model: &str, prompt: &str, max_tokens: u32) -> Self {
        Self { model: model.to_owned(), prompt: prompt.to_owned(), max_tokens }
    }
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The new text.
    pub text: String,
    /// The new tokens' ids.
    pub tokens: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: String,
    /// From the request's start to the first token, or to the whole answer where there is no stream.
    pub first_token: Duration,
}

/// Why there is no whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Failure {
    /// The request was answered with an error: an HTTP status, or the HTTP status that stands for a gRPC
    /// code.
    #[error("refused with {status}: {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The body of the answer.
        message: String,
    },
    /// The answer began and did not end as answers do, or the connection failed.
    #[error("broken after {} tokens: {message}", tokens.len())]
    Broken {
        /// The tokens that came before.
        tokens: Vec<u32>,
        /// What happened instead.
        message: String,
    },
}

impl Failure {
    /// A connection that failed before any token.
    pub fn connection(error: &dyn std::fmt::Display) -> Self {
        Self::Broken { tokens: Vec::new(), message: error.to_string() }
    }

    /// The HTTP status, where there was one.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::Broken { .. } => None,
        }
    }
}
