//! A request for generated tokens, and the ranges of its settings.
//!
//! Every number has a range in which it cannot turn a finite logit into one that is not: what a caller sends
//! never looks like broken weights. The sampler also limits its results to finite numbers.

use super::SubmitError;
use crate::scheduling::priority::Priority;

/// Most log probabilities of the best tokens that can be asked for.
pub const MAX_LOGPROBS: usize = 20;

/// Most tokens that can be biased.
pub const MAX_LOGIT_BIASES: usize = 1024;

/// Most stop texts of one request. Every byte of an answer is compared with each of them.
pub const MAX_STOPS: usize = 16;

/// Longest stop text in bytes. As much text may be held back.
pub const MAX_STOP_BYTES: usize = 1024;

/// Most stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;

/// Longest schema, regular expression or grammar in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;

/// Longest name of a tenant in bytes.
pub const MAX_TENANT_BYTES: usize = 256;

/// Smallest repetition penalty. The logits of models are below 1000, so that a hundredfold logit already
/// decides everything.
pub const MIN_REPETITION_PENALTY: f32 = 0.01;

/// Largest repetition penalty.
const MAX_REPETITION_PENALTY: f32 = 10.0;

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, tokenised with the model's own tokenizer. Special tokens spelled in it are recognised, and a
    /// begin token is added only where the model's file asks for one.
    Text(String),
    /// Token ids, used as they are. Each must be below the model's vocabulary size.
    Tokens(Vec<u32>),
}

/// One request for generated tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateParams {
    /// What to continue; at least one token.
    pub prompt: Prompt,
    /// Most tokens to produce, at least 1. The end token counts. Fewer are produced when the context ends
    /// first.
    pub max_tokens: usize,
    /// 0 is greedy (the lowest id wins exact ties); up to 100, larger is more random.
    pub temperature: f32,
    /// Share of probability that is sampled from, above 0 and at most 1. Like all filters, ignored when
    /// greedy.
    pub top_p: f32,
    /// Samples from this many best tokens only; 0: from all.
    pub top_k: usize,
    /// Samples only from tokens with at least this share of the best one's probability, 0 to 1; 0: from all.
    pub min_p: f32,
    /// Samples from the tokens whose surprise is nearest to the expected one, up to this share of
    /// probability, above 0 and at most 1; 1: from all.
    pub typical_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt and answer,
    /// [`MIN_REPETITION_PENALTY`] to 10; 1: does nothing, above 1: repeats less.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token of the answer, -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token of the answer once per occurrence, -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, -100 to 100, each token once, at most [`MAX_LOGIT_BIASES`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Report with each token its log probability and those of this many best tokens, 0 to [`MAX_LOGPROBS`]:
    /// the model's own, before bias, grammar, penalties and temperature.
    pub logprobs: Option<usize>,
    /// Texts that end the answer and are excluded from it: at most [`MAX_STOPS`], of 1 to [`MAX_STOP_BYTES`]
    /// bytes.
    pub stop: Vec<String>,
    /// Tokens that end the answer; the token is reported, its text is not. At most [`MAX_STOP_TOKENS`].
    pub stop_token_ids: Vec<u32>,
    /// The format of the answer. The answer then ends with the last token that the grammar allows, or with an
    /// end token where the grammar may end.
    pub grammar: Option<Grammar>,
    /// The same seed, prompt and settings give the same tokens, whatever else is in the batch. `None`: a
    /// fresh seed.
    pub seed: Option<u64>,
    /// Control tokens that are text in this answer, spelled as in a prompt: the tags of tool calls, which its
    /// reader takes apart. All other control tokens have no text.
    pub visible_tokens: Vec<u32>,
    /// Report with each token the difference between the best and the second best logit of its step.
    pub margins: bool,
    /// Requests of a more urgent class precede others, within a bound.
    pub priority: Priority,
    /// The adapter that answers, by the name that it was added under. `None`: the model itself.
    pub adapter: Option<String>,
    /// The tenant that the request is accounted to: the least served tenant is next. At most
    /// [`MAX_TENANT_BYTES`] bytes; all requests with an empty name count as one tenant.
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
            visible_tokens: Vec::new(),
            margins: false,
            priority: Priority::Normal,
            adapter: None,
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
        probability_mass("top_p", self.top_p)?;
        between("min_p", self.min_p, 0.0, 1.0)?;
        probability_mass("typical_p", self.typical_p)?;
        let penalty = self.repetition_penalty;
        between("repetition_penalty", penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)?;
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
                return invalid(
                    "logit_bias",
                    format!("token {id} is given twice; give each token at most one bias"),
                );
            }
        }
        at_most("stop", "texts", self.stop.len(), MAX_STOPS)?;
        for stop in &self.stop {
            if stop.is_empty() {
                return invalid(
                    "stop",
                    "one of its texts is empty; each needs at least one character".to_owned(),
                );
            }
            at_most("stop", "bytes in one text", stop.len(), MAX_STOP_BYTES)?;
        }
        at_most("stop_token_ids", "tokens", self.stop_token_ids.len(), MAX_STOP_TOKENS)
    }

    /// Checks the ids against the size of the model's vocabulary.
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

/// The format of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema (as text) describes.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole, in the syntax of Rust's `regex` crate without
    /// look-around.
    Regex(String),
    /// Text of this context-free grammar, in llguidance's variant of the Lark syntax; its root is `start`.
    Lark(String),
}

impl Grammar {
    /// Its kind, for messages.
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

fn probability_mass(field: &'static str, value: f32) -> Result<(), SubmitError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_out_of_range_is_refused_by_name() {
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
            (GenerateParams { repetition_penalty: 1e-38, ..good.clone() }, "repetition_penalty"),
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
    fn no_number_outside_its_range_is_accepted() {
        type Setter = fn(&mut GenerateParams, f32);
        let settings: [(&str, Setter); 8] = [
            ("temperature", |params, value| params.temperature = value),
            ("top_p", |params, value| params.top_p = value),
            ("min_p", |params, value| params.min_p = value),
            ("typical_p", |params, value| params.typical_p = value),
            ("repetition_penalty", |params, value| params.repetition_penalty = value),
            ("presence_penalty", |params, value| params.presence_penalty = value),
            ("frequency_penalty", |params, value| params.frequency_penalty = value),
            ("logit_bias", |params, value| params.logit_bias = vec![(1, value)]),
        ];
        for (name, set) in settings {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
                let mut params = GenerateParams::greedy("x", 1);
                set(&mut params, value);
                let refused = params.check();
                assert!(
                    matches!(refused, Err(SubmitError::Invalid { field, .. }) if field == name),
                    "{name} {value}: {refused:?}"
                );
            }
        }
        // Subnormal and tiny numbers divide in only one place.
        for penalty in [f32::MIN_POSITIVE, f32::MIN_POSITIVE / 4.0, 1e-30, 0.0, -0.0, -1.0, 0.0099] {
            let params = GenerateParams { repetition_penalty: penalty, ..GenerateParams::greedy("x", 1) };
            let error = params.check().unwrap_err().to_string();
            assert!(error.ends_with("is not between 0.01 and 10"), "{error}");
        }
    }

    #[test]
    fn a_refusal_gives_the_value_and_the_range() {
        let params = GenerateParams { min_p: 1.5, ..GenerateParams::greedy("x", 1) };
        assert_eq!(params.check().unwrap_err().to_string(), "min_p: 1.5 is not between 0 and 1");
        let params = GenerateParams { stop_token_ids: vec![7, 300], ..GenerateParams::greedy("x", 1) };
        assert_eq!(params.check_ids(301), Ok(()));
        let error = params.check_ids(300).unwrap_err().to_string();
        assert_eq!(error, "stop_token_ids: token id 300 is outside the model's vocabulary of 300");
    }
}
