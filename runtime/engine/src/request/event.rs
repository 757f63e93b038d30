//! The events of a generation.

use super::GenerateError;
use std::time::Duration;
use trustformers_plan::TokenLogprobs;

/// An event on its way from the device thread to a caller.
pub(crate) type EventResult = Result<GenerationEvent, GenerateError>;

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum FinishReason {
    /// The model produced an end token, a stop text or a stop token, or the grammar is complete.
    Stop,
    /// `max_tokens` were produced or the context is full.
    Length,
}

impl FinishReason {
    /// The word that APIs use: `stop` or `length`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// The field of the request that ended an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// This one of [`GenerateParams::stop`](crate::GenerateParams::stop).
    Text(String),
    /// This one of [`GenerateParams::stop_token_ids`](crate::GenerateParams::stop_token_ids).
    Token(u32),
}

/// The time that a finished generation took, by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission until the first step that had rows of this sequence.
    pub queue: Duration,
    /// From there until the first token.
    pub prefill: Duration,
    /// From the first token until the last.
    pub decode: Duration,
}

/// What a generation's stream yields: any number of tokens, then exactly one end.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// One produced token. An end token is reported too, with the text that was still held back.
    Token {
        /// The token's id.
        id: u32,
        /// The text that became final with this token. It never holds half a character or a piece of a stop
        /// text, so it may be empty; at the end, bytes that never became a character turn into U+FFFD.
        text: String,
        /// Best minus second best logit of the step, where
        /// [`GenerateParams::margins`](crate::GenerateParams::margins) asked for it.
        margin: Option<f32>,
        /// Where [`GenerateParams::logprobs`](crate::GenerateParams::logprobs) asked for them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end; nothing follows.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// The field of the request that ended it; `None` where the model, its grammar or a limit did.
        stop: Option<StopCause>,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens produced, the end token included.
        completion_tokens: usize,
        /// The time it took, by phase.
        timings: Timings,
    },
}
