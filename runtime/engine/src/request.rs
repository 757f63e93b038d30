//! What callers ask for and what they are told: the words of the engine, with no machinery.

use crate::priority::Priority;
use std::time::Duration;
use thiserror::Error;

/// Most log probabilities of the best tokens that can be asked for.
pub const MAX_LOGPROBS: usize = 20;

/// Most tokens that can be biased.
pub const MAX_LOGIT_BIASES: usize = 1024;

/// Most stop texts of one request, and the length of each: a byte of an answer is compared with each of them.
pub const MAX_STOPS: usize = 16;

/// Longest stop text. As much text may be held back.
pub const MAX_STOP_BYTES: usize = 1024;

/// Most stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;

/// Longest schema, expression or grammar.
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;

/// Longest name of a tenant.
pub const MAX_TENANT_BYTES: usize = 256;

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
    /// Share of probability that is sampled from, above 0 and at most 1. Like all cuts, ignored when greedy.
    pub top_p: f32,
    /// Samples from this many best tokens only; 0: from all.
    pub top_k: usize,
    /// Samples only from tokens with at least this share of the best one's probability, 0 to 1; 0: from all.
    pub min_p: f32,
    /// Samples from the tokens whose surprise is nearest to the expected one, up to this share of probability, above 0
    /// and at most 1; 1: from all.
    pub typical_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt and answer, above 0 and at most 10;
    /// 1: does nothing, above 1: repeats less.
    pub repetition_penalty: f32,
    /// Taken from the logit of each token of the answer, -2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logit of each token of the answer as often as it came, -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, -100 to 100, each token once, at most [`MAX_LOGIT_BIASES`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Report with each token its log probability and this many of the best, 0 to [`MAX_LOGPROBS`]: those that the
    /// model itself gives, before bias, grammar, penalties and temperature.
    pub logprobs: Option<usize>,
    /// Texts that end the answer and are not part of it: at most [`MAX_STOPS`], of 1 to [`MAX_STOP_BYTES`] bytes.
    pub stop: Vec<String>,
    /// Tokens that end the answer; the token is reported, its text is not. At most [`MAX_STOP_TOKENS`].
    pub stop_token_ids: Vec<u32>,
    /// What the answer must look like. Its end then comes with the last token that the grammar has room for, or with
    /// an end token where the grammar may end.
    pub grammar: Option<Grammar>,
    /// The same seed, prompt and settings give the same tokens, whoever else is in the batch. `None`: a fresh seed.
    pub seed: Option<u64>,
    /// Report with each token how far its step's best logit was above the second best.
    pub margins: bool,
    /// Requests of a more urgent class overtake others, but none is overtaken without end.
    pub priority: Priority,
    /// On whose behalf: whoever was served least is next. At most [`MAX_TENANT_BYTES`]; empty: nobody in particular,
    /// together with all who say so.
    pub tenant: String,
}

impl GenerateParams {
    /// Greedy continuation of a text.
    pub fn greedy(text: impl Into<String>, max_tokens: usize) -> Self {
        Self {
            prompt: Prompt::Text(text.into()),
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            grammar: None,
            seed: None,
            margins: false,
            priority: Priority::Normal,
            tenant: String::new(),
        }
    }

    /// Checks everything that needs no model.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] that names the first field out of its range.
    pub fn check(&self) -> Result<(), SubmitError> {
        if self.max_tokens == 0 {
            return invalid("max_tokens", "0 tokens were asked for; at least 1 is needed".to_owned());
        }
        between("temperature", self.temperature, 0.0, 100.0)?;
        share("top_p", self.top_p)?;
        between("min_p", self.min_p, 0.0, 1.0)?;
        share("typical_p", self.typical_p)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0) {
            let why = format!("{} is not above 0 and at most 10", self.repetition_penalty);
            return invalid("repetition_penalty", why);
        }
        between("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if let Some(count) = self.logprobs.filter(|count| *count > MAX_LOGPROBS) {
            return invalid("logprobs", format!("{count} is not between 0 and {MAX_LOGPROBS}"));
        }
        self.check_lists()?;
        at_most("tenant", "bytes", self.tenant.len(), MAX_TENANT_BYTES)?;
        self.grammar.as_ref().map_or(Ok(()), Grammar::check)
    }

    fn check_lists(&self) -> Result<(), SubmitError> {
        at_most("logit_bias", "tokens", self.logit_bias.len(), MAX_LOGIT_BIASES)?;
        for (index, (id, bias)) in self.logit_bias.iter().enumerate() {
            if !(-100.0..=100.0).contains(bias) {
                let why = format!("{bias} for token {id} is not between -100 and 100");
                return invalid("logit_bias", why);
            }
            if self.logit_bias[..index].iter().any(|(other, _)| other == id) {
                return invalid("logit_bias", format!("token {id} is named twice; name each once"));
            }
        }
        at_most("stop", "texts", self.stop.len(), MAX_STOPS)?;
        for stop in &self.stop {
            if stop.is_empty() {
                return invalid("stop", "one of its texts is empty; each must have a character".to_owned());
            }
            at_most("stop", "bytes in one text", stop.len(), MAX_STOP_BYTES)?;
        }
        at_most("stop_token_ids", "tokens", self.stop_token_ids.len(), MAX_STOP_TOKENS)
    }

    /// Checks the ids against the number of tokens that a model knows.
    pub(crate) fn check_ids(&self, vocabulary: usize) -> Result<(), SubmitError> {
        let biased = self.logit_bias.iter().map(|(id, _)| ("logit_bias", *id));
        let stops = self.stop_token_ids.iter().map(|id| ("stop_token_ids", *id));
        match biased.chain(stops).find(|(_, id)| *id as usize >= vocabulary) {
            Some((field, id)) => {
                invalid(field, format!("token id {id} is outside the model's vocabulary of {vocabulary}"))
            }
            None => Ok(()),
        }
    }
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema (as text) describes.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole, in the syntax of Rust's `regex` crate without
    /// look-around.
    Regex(String),
    /// Text of this context-free grammar, in llguidance's variant of the Lark syntax; it begins at `start`.
    Lark(String),
}

impl Grammar {
    /// What it is, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::JsonObject | Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
        }
    }

    fn check(&self) -> Result<(), SubmitError> {
        match self {
            Self::JsonObject => Ok(()),
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) if text.trim().is_empty() => {
                invalid("response_format", format!("the {} is empty", self.kind()))
            }
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => {
                at_most("response_format", "bytes", text.len(), MAX_GRAMMAR_BYTES)
            }
        }
    }
}

fn invalid(field: &'static str, why: String) -> Result<(), SubmitError> {
    Err(SubmitError::Invalid { field, why })
}

fn between(field: &'static str, value: f32, low: f32, high: f32) -> Result<(), SubmitError> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        invalid(field, format!("{value} is not between {low} and {high}"))
    }
}

fn share(field: &'static str, value: f32) -> Result<(), SubmitError> {
    if value > 0.0 && value <= 1.0 {
        Ok(())
    } else {
        invalid(field, format!("{value} is not above 0 and at most 1"))
    }
}

fn at_most(field: &'static str, of: &str, count: usize, limit: usize) -> Result<(), SubmitError> {
    if count <= limit {
        Ok(())
    } else {
        invalid(field, format!("{count} {of} are more than the {limit} that are allowed"))
    }
}

/// Why a request was not taken. Nothing of it is left in the engine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// As many requests as allowed are in flight. Retry after a moment or elsewhere.
    #[error("{queue} requests are already waiting for this model; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// Requests that wait at this moment.
        queue: usize,
        /// The time in which those will probably have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// Something that requests share is in full use. Retry after a moment or elsewhere.
    #[error("{what} is in full use; retry in {} s", retry_after.as_secs())]
    Busy {
        /// What is in use.
        what: &'static str,
        /// The time after which it probably is not, in whole seconds from 1 to 60.
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
    /// The grammar that was asked for became too complex on the way, or leads where the model has no token for.
    #[error("response_format: the answer cannot go on: {message}")]
    Grammar {
        /// What went wrong.
        message: String,
    },
    /// It waited in a full queue and gave its place to a request of a higher class, or of a tenant that had fewer
    /// there. It has said nothing yet. Retry after a moment or elsewhere.
    #[error("the queue of this model is full and another request had precedence; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// The time in which those that wait will probably have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// The engine was stopped or died before the end.
    #[error("the engine was stopped before this generation ended")]
    Stopped,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced an end token, a stop text or a stop token, or the grammar is complete.
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

/// What of the request ended an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// This one of [`GenerateParams::stop`].
    Text(String),
    /// This one of [`GenerateParams::stop_token_ids`].
    Token(u32),
}

/// What the model thinks of a token, as natural logarithms of probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was produced.
    pub logprob: f32,
    /// The best tokens with theirs, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
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
        /// The text that became final with this token. Never half a character and never a part of a stop text, so it
        /// may be empty; at the end, bytes that never became a character turn into U+FFFD.
        text: String,
        /// Best minus second best logit of the step, where [`GenerateParams::margins`] asked for it.
        margin: Option<f32>,
        /// Where [`GenerateParams::logprobs`] asked for them.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end; nothing follows.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What of the request ended it, where that was not the model, its grammar or a limit.
        stop: Option<StopCause>,
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
            (GenerateParams { min_p: -0.1, ..good.clone() }, "min_p"),
            (GenerateParams { min_p: 1.1, ..good.clone() }, "min_p"),
            (GenerateParams { typical_p: 0.0, ..good.clone() }, "typical_p"),
            (GenerateParams { repetition_penalty: 0.0, ..good.clone() }, "repetition_penalty"),
            (GenerateParams { repetition_penalty: f32::INFINITY, ..good.clone() }, "repetition_penalty"),
            (GenerateParams { presence_penalty: 2.1, ..good.clone() }, "presence_penalty"),
            (GenerateParams { frequency_penalty: f32::NAN, ..good.clone() }, "frequency_penalty"),
            (GenerateParams { logprobs: Some(21), ..good.clone() }, "logprobs"),
            (GenerateParams { logit_bias: vec![(1, 100.5)], ..good.clone() }, "logit_bias"),
            (GenerateParams { logit_bias: vec![(1, 1.0), (1, 2.0)], ..good.clone() }, "logit_bias"),
            (GenerateParams { stop: vec![String::new()], ..good.clone() }, "stop"),
            (GenerateParams { stop: vec!["x".into(); 17], ..good.clone() }, "stop"),
            (GenerateParams { stop: vec!["x".repeat(1025)], ..good.clone() }, "stop"),
            (GenerateParams { stop_token_ids: vec![0; 65], ..good.clone() }, "stop_token_ids"),
            (GenerateParams { tenant: "x".repeat(257), ..good.clone() }, "tenant"),
            (GenerateParams { grammar: Some(Grammar::Regex(" ".into())), ..good.clone() }, "response_format"),
            (
                GenerateParams { grammar: Some(Grammar::Lark("x".repeat(300_000))), ..good.clone() },
                "response_format",
            ),
        ];
        for (params, name) in cases {
            assert!(
                matches!(params.check(), Err(SubmitError::Invalid { field, .. }) if field == name),
                "{name}"
            );
        }
    }

    #[test]
    fn a_refusal_says_the_value_and_the_range() {
        let params = GenerateParams { min_p: 1.5, ..GenerateParams::greedy("x", 1) };
        assert_eq!(params.check().unwrap_err().to_string(), "min_p: 1.5 is not between 0 and 1");
        let params = GenerateParams { stop_token_ids: vec![7, 300], ..GenerateParams::greedy("x", 1) };
        assert_eq!(params.check_ids(301), Ok(()));
        let error = params.check_ids(300).unwrap_err().to_string();
        assert_eq!(error, "stop_token_ids: token id 300 is outside the model's vocabulary of 300");
    }
}
