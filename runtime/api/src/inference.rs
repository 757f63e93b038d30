//! What a server of models can do, in the words that both protocols share.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::{Value, json};
use tokio::sync::watch;
use trustformers_proto::v1;

use crate::embed::{EmbedRequest, Embedded};
use crate::error::ApiError;
use crate::fields::Generation;
use crate::health::Health;

/// The models at one moment, in the shape that goes over the wire.
pub type Models = Arc<[v1::ModelStatus]>;

/// A server of models. Implemented over engines in one process; the codecs know nothing else.
pub trait Inference: Health {
    /// Takes a request. The future ends when the request is admitted or refused, not when tokens exist.
    /// Dropping the future or the answer's stream cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>>;

    /// Turns texts into vectors. The future ends when all are there. Dropping it cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>>;

    /// The models now, and after each change. The channel closes when the server ends.
    fn watch_models(&self) -> watch::Receiver<Models>;
}

/// An admitted request.
pub struct Answer {
    /// Unique id of this answer.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the weights that answer, 64 hex digits.
    pub model_digest: String,
    /// Tokens, then exactly one [`Event::Finished`]; or an error, after which nothing follows.
    pub events: BoxStream<'static, Result<Event, ApiError>>,
}

/// One step of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A new token; the end token too.
    Token {
        /// Its id.
        id: u32,
        /// Text that became final with it; may be empty while a character is incomplete or a stop text may
        /// begin.
        text: String,
        /// What the model thinks of it, where the request asked.
        logprobs: Option<Logprobs>,
    },
    /// The end.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What of the request ended it, where that was not the model, its format or a limit.
        stopped_by: Option<StoppedBy>,
        /// What was counted.
        usage: Usage,
    },
}

/// What of a request ended its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoppedBy {
    /// This one of its stop texts.
    Text(String),
    /// This one of its stop tokens.
    Token(u32),
}

impl StoppedBy {
    /// The text or the id.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Token(id) => json!(id),
        }
    }
}

/// What the model thinks of a token, as natural logarithms of probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Ids of the best tokens with theirs, best first.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// `{"logprob", "top": [{"token", "logprob"}]}`.
    pub fn to_json(&self) -> Value {
        // Six places say all that an f32 knows of a logarithm.
        let places = |logprob: f32| (f64::from(logprob) * 1e6).round() / 1e6;
        let top: Vec<Value> = (self.top.iter())
            .map(|(token, logprob)| json!({"token": token, "logprob": places(*logprob)}))
            .collect();
        json!({"logprob": places(self.logprob), "top": top})
    }
}

impl From<Logprobs> for v1::Logprobs {
    fn from(logprobs: Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token, logprob });
        Self { logprob: logprobs.logprob, top: top.collect() }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced its end token, a stop text or a stop token, or the format is complete.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
}

impl FinishReason {
    /// The word in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }

    /// The value on the wire.
    pub fn to_proto(self) -> v1::FinishReason {
        match self {
            Self::Stop => v1::FinishReason::Stop,
            Self::Length => v1::FinishReason::Length,
        }
    }
}

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// New tokens, the end token included.
    pub completion_tokens: u32,
}

impl Usage {
    /// The message on the wire.
    pub fn to_proto(self) -> v1::Usage {
        v1::Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
        }
    }
}
