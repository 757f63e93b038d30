//! What callers ask for and what they are told: the words of the engine, with no machinery.

use std::time::Duration;
use thiserror::Error;

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, tokenised with the model's own tokenizer; special tokens spelled in it are recognised, and a begin
    /// token is put in front only where the model's file asks for one.
    Text(String),
    /// Token ids, taken as they are. Each must be below the model's vocabulary size.
    Tokens(Vec<u32>),
}

/// One request for generated tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateParams {
    /// What to continue; at least one token.
    pub prompt: Prompt,
    /// Most tokens to produce, at least 1. The end token counts. Less is produced when the context ends first.
    pub max_tokens: usize,
    /// 0 is greedy (the lowest id wins exact ties); up to 100, larger is more random.
    pub temperature: f32,
    /// Share of probability that is sampled from, above 0 and at most 1. Ignored when greedy.
    pub top_p: f32,
    /// The same seed, prompt and settings give the same tokens, whoever else is in the batch. `None`: a fresh seed.
    pub seed: Option<u64>,
    /// Report with each token how far its step's best logit was above the second best.
    pub margins: bool,
}

impl GenerateParams {
    /// Greedy continuation of a text.
    pub fn greedy(text: impl Into<String>, max_tokens: usize) -> Self {
        Self {
            prompt: Prompt::Text(text.into()),
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            seed: None,
            margins: false,
        }
    }

    /// Checks everything that does not need the tokenizer.
    pub(crate) fn check(&self) -> Result<(), SubmitError> {
        let invalid = |field, why: String| Err(SubmitError::Invalid { field, why });
        if self.max_tokens == 0 {
            return invalid("max_tokens", "0 tokens were asked for; at least 1 is needed".to_owned());
        }
        if !(0.0..=100.0).contains(&self.temperature) {
            return invalid("temperature", format!("{} is not between 0 and 100", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return invalid("top_p", format!("{} is not above 0 and at most 1", self.top_p));
        }
        Ok(())
    }
}

/// Why a request was not taken. Nothing of it is left in the engine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// As many requests as allowed are in flight. Retry after a moment or elsewhere.
    #[error("{queue} requests are already waiting for this model; retry in a moment")]
    Overloaded {
        /// Requests that wait at this moment.
        queue: usize,
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
        /// The field's name in [`GenerateParams`].
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The engine is draining, was stopped or died.
    #[error("the engine of this model is stopping or stopped")]
    Stopped,
}

/// Why a generation that was taken ended without finishing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GenerateError {
    /// The backend failed in the step that this sequence was part of.
    #[error("the backend failed: {message}")]
    Backend {
        /// The backend's own words.
        message: String,
    },
    /// The model produced logits that are not numbers: broken weights or a broken device.
    #[error("the model produced a logit that is not a finite number; the weights or the device are broken")]
    NotFinite,
    /// The engine was stopped or died before the end.
    #[error("the engine was stopped before this generation ended")]
    Stopped,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced an end token.
    Stop,
    /// `max_tokens` were produced or the context is full.
    Length,
}

impl FinishReason {
    /// The word that APIs use: `stop` or `length`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Where the time of a finished generation went.
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
    /// One produced token; an end token is reported too, with whatever text was still held back.
    Token {
        /// The token's id.
        id: u32,
        /// The text that became final with this token. Never half a character, so it may be empty; at the end,
        /// bytes that never became a character turn into U+FFFD.
        text: String,
        /// Best minus second best logit of the step, where [`GenerateParams::margins`] asked for it.
        margin: Option<f32>,
    },
    /// The end; nothing follows.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens produced, the end token included.
        completion_tokens: usize,
        /// Where the time went.
        timings: Timings,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_out_of_range_are_named() {
        let good = GenerateParams::greedy("x", 1);
        assert_eq!(good.check(), Ok(()));
        let cases = [
            (GenerateParams { max_tokens: 0, ..good.clone() }, "max_tokens"),
            (GenerateParams { temperature: -0.1, ..good.clone() }, "temperature"),
            (GenerateParams { temperature: f32::NAN, ..good.clone() }, "temperature"),
            (GenerateParams { top_p: 0.0, ..good.clone() }, "top_p"),
            (GenerateParams { top_p: 1.1, ..good.clone() }, "top_p"),
            (GenerateParams { top_p: f32::NAN, ..good.clone() }, "top_p"),
        ];
        for (params, name) in cases {
            assert!(
                matches!(params.check(), Err(SubmitError::Invalid { field, .. }) if field == name),
                "{name}"
            );
        }
    }
}
