//! The settings of an encoder engine, checked once.

use super::request::MAX_TEXTS;
use super::strategy::{BatchRules, BatchStrategy};
use crate::config::StartError;
use std::ops::RangeInclusive;
use std::time::Duration;
use trustformers_model::{ModelFacts, PlanRequest};
use trustformers_plan::{FusedOps, Limits, Numerics};

/// Bounds of [`EncoderConfig::max_wait_ms`].
pub const MAX_WAIT_MS: RangeInclusive<u32> = 1..=1000;

/// Default tokens of a step: enough for several ordinary texts, few enough that the activations of a step
/// stay near the processor's caches and that a text which arrives during a step waits only a short time.
const DEFAULT_TOKEN_BUDGET: usize = 1024;

/// Settings of one encoder engine.
#[derive(Debug, Clone)]
pub struct EncoderConfig {
    /// The `model` label of this engine's metrics, usually the first name that the model is served under.
    pub model_label: String,
    /// When the waiting texts become a step.
    pub strategy: BatchStrategy,
    /// Most texts of one step, 1 to 256.
    pub max_batch_size: usize,
    /// Longest time that a free device waits for more texts, in milliseconds, within [`MAX_WAIT_MS`].
    pub max_wait_ms: u32,
    /// Whether priority classes count. With [`BatchStrategy::Priority`] they always do.
    pub priority: bool,
    /// Texts that may wait beyond those of one step, at least 1. While `max_batch_size + max_queue` texts are
    /// in flight, requests are refused as overloaded. A request is admitted whole, so that its texts may
    /// exceed the limit. For requests of a higher class, or of a tenant with fewer texts in flight than
    /// another, the limit is `max_queue` higher.
    pub max_queue: usize,
    /// Longest text in tokens, special tokens included; longer ones are truncated. `None`: the model's own
    /// limit.
    pub context_tokens: Option<usize>,
    /// Most tokens of one step. `None`: 1024, or one text where that may be longer.
    pub token_budget: Option<usize>,
    /// How closely the device must follow f32 arithmetic.
    pub numerics: Numerics,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            model_label: "default".to_owned(),
            strategy: BatchStrategy::default(),
            max_batch_size: 32,
            max_wait_ms: 10,
            priority: false,
            max_queue: 512,
            context_tokens: None,
            token_budget: None,
            numerics: Numerics::Fast,
        }
    }
}

/// The sizes of an encoder engine after checking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EncoderSizes {
    pub(crate) rules: BatchRules,
    pub(crate) max_queue: usize,
    pub(crate) context_tokens: usize,
}

impl EncoderSizes {
    /// The plan for steps of these sizes. A model that labels tokens gives a row for each of them.
    pub(crate) fn plan_request(&self, facts: &ModelFacts, fused: FusedOps) -> PlanRequest {
        let (rows, sequences) = (self.rules.max_tokens, self.rules.max_texts);
        let logits_rows = if facts.labels_tokens() { rows } else { 0 };
        let limits = Limits { rows, sequences, logits_rows };
        PlanRequest { context_tokens: self.context_tokens, limits, fused }
    }
}

impl EncoderConfig {
    /// Most bytes that the engine itself takes on the host for a model, beside the device's memory. Each text
    /// in flight takes its ids (4 bytes for each token of its context) and its row (4 bytes for each
    /// value), or a row for each token of its context. The texts in flight are those of a batch and of the
    /// queue, twice the queue for requests with precedence, and the texts of two requests that exceed these
    /// limits. More requests of many texts in a row can exceed it for a moment.
    #[must_use]
    pub fn answer_bytes(&self, facts: &ModelFacts) -> u64 {
        let context_tokens = self.context_tokens.unwrap_or(facts.context_tokens);
        let embedded = facts.embedding.as_ref().map(|embedding| embedding.width);
        let classified = facts.classification.as_ref().map(|classification| classification.width);
        let width = embedded.or(classified).unwrap_or(0);
        let in_flight = self.max_batch_size + 2 * self.max_queue + 2 * MAX_TEXTS;
        let rows = if facts.labels_tokens() { context_tokens } else { 1 };
        (in_flight as u64) * (context_tokens + rows * width) as u64 * 4
    }

    /// Checks the settings against the longest text of the model and the special tokens that it adds to each
    /// text.
    pub(crate) fn sizes(
        &self,
        model_context: usize,
        special_tokens: usize,
    ) -> Result<EncoderSizes, StartError> {
        let invalid = |field, why: String| Err(StartError::Invalid { field, why });
        if !(1..=256).contains(&self.max_batch_size) {
            return invalid("max_batch_size", format!("{} is not between 1 and 256", self.max_batch_size));
        }
        if !MAX_WAIT_MS.contains(&self.max_wait_ms) {
            return invalid("max_wait_ms", format!("{} is not between 1 and 1000", self.max_wait_ms));
        }
        if !(1..=65_536).contains(&self.max_queue) {
            return invalid("max_queue", format!("{} is not between 1 and 65536", self.max_queue));
        }
        let context_tokens = self.context_tokens.unwrap_or(model_context);
        // Room for one token of the text: otherwise all texts would be equal.
        let least = special_tokens + 1;
        if context_tokens < least || context_tokens > model_context {
            let why = format!(
                "{context_tokens} is not between {least} (every text has {special_tokens} special tokens) and the \
                 model's own limit of {model_context} tokens"
            );
            return invalid("context_tokens", why);
        }
        let max_tokens = self.token_budget.unwrap_or(DEFAULT_TOKEN_BUDGET.max(context_tokens));
        if max_tokens < context_tokens || max_tokens > 1 << 20 {
            let why =
                format!("{max_tokens} is not between the longest text ({context_tokens}) and 1048576 tokens");
            return invalid("token_budget", why);
        }
        let rules = BatchRules {
            strategy: self.strategy,
            max_wait: Duration::from_millis(u64::from(self.max_wait_ms)),
            by_class: self.priority || self.strategy == BatchStrategy::Priority,
            max_texts: self.max_batch_size,
            max_tokens,
        };
        Ok(EncoderSizes { rules, max_queue: self.max_queue, context_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_room_for_the_longest_text() {
        let sizes = EncoderConfig::default().sizes(256, 2).unwrap();
        assert_eq!((sizes.context_tokens, sizes.rules.max_tokens, sizes.rules.by_class), (256, 1024, false));
        let long = EncoderConfig { strategy: BatchStrategy::Priority, ..EncoderConfig::default() };
        let sizes = long.sizes(8192, 2).unwrap();
        assert_eq!((sizes.context_tokens, sizes.rules.max_tokens, sizes.rules.by_class), (8192, 8192, true));
        let short = EncoderConfig { context_tokens: Some(64), priority: true, ..EncoderConfig::default() };
        let sizes = short.sizes(512, 2).unwrap();
        assert_eq!((sizes.context_tokens, sizes.rules.by_class), (64, true));
    }

    #[test]
    fn every_setting_out_of_range_is_refused_by_name() {
        let good = EncoderConfig::default;
        let cases = [
            (EncoderConfig { max_batch_size: 0, ..good() }, "max_batch_size"),
            (EncoderConfig { max_batch_size: 257, ..good() }, "max_batch_size"),
            (EncoderConfig { max_wait_ms: 0, ..good() }, "max_wait_ms"),
            (EncoderConfig { max_wait_ms: 1001, ..good() }, "max_wait_ms"),
            (EncoderConfig { max_queue: 0, ..good() }, "max_queue"),
            (EncoderConfig { context_tokens: Some(2), ..good() }, "context_tokens"),
            (EncoderConfig { context_tokens: Some(513), ..good() }, "context_tokens"),
            (EncoderConfig { token_budget: Some(511), ..good() }, "token_budget"),
        ];
        for (config, field) in cases {
            let error = config.sizes(512, 2).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
