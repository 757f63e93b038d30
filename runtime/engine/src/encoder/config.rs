//! What an encoder engine is started with, checked once.

use super::strategy::{BatchStrategy, Rules};
use crate::config::StartError;
use std::ops::RangeInclusive;
use std::time::Duration;
use trustformers_plan::Numerics;

/// Bounds of [`EncoderConfig::max_wait_ms`].
pub const MAX_WAIT_MS: RangeInclusive<u32> = 1..=1000;

/// Tokens of a step where nothing else is asked: enough for several ordinary texts, few enough that the activations of
/// a step stay near the processor's caches and that a text which comes during a step does not wait for long.
const DEFAULT_TOKEN_BUDGET: usize = 1024;

/// Settings of one encoder engine.
#[derive(Debug, Clone)]
pub struct EncoderConfig {
    /// The `model` label of this engine's metrics, usually the first name that the model is served under.
    pub model_label: String,
    /// When the texts that wait become a step.
    pub strategy: BatchStrategy,
    /// Most texts of one step, 1 to 256.
    pub max_batch_size: usize,
    /// Longest time that a free device waits for more texts, in milliseconds, within [`MAX_WAIT_MS`].
    pub max_wait_ms: u32,
    /// Whether a request's class decides who goes first. [`BatchStrategy::Priority`] always does.
    pub priority: bool,
    /// Texts that may wait beyond those of one step, at least 1: while `max_batch_size + max_queue` texts are in flight,
    /// requests are refused as overloaded. The texts of one request come together, so there may be as many more as one
    /// request has; and requests of a higher class, or of a tenant that has fewer texts in flight than another, find
    /// `max_queue` more places.
    pub max_queue: usize,
    /// Longest text in tokens, special tokens included; longer ones are cut. `None`: the model's own limit.
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

/// The figures of an encoder engine after checking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EncoderSizes {
    pub(crate) rules: Rules,
    pub(crate) max_queue: usize,
    pub(crate) context_tokens: usize,
}

impl EncoderConfig {
    /// Checks the settings against the longest text that the model takes, and the tokens that it puts around each.
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
        // Room for one token of the text: otherwise all texts would be the same.
        let least = special_tokens + 1;
        if context_tokens < least || context_tokens > model_context {
            let why = format!(
                "{context_tokens} is not between {least} ({special_tokens} stand around every text) and the model's own \
                 limit of {model_context} tokens"
            );
            return invalid("context_tokens", why);
        }
        let max_tokens = self.token_budget.unwrap_or(DEFAULT_TOKEN_BUDGET.max(context_tokens));
        if max_tokens < context_tokens || max_tokens > 1 << 20 {
            let why =
                format!("{max_tokens} is not between the longest text ({context_tokens}) and 1048576 tokens");
            return invalid("token_budget", why);
        }
        let rules = Rules {
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
    fn a_step_holds_the_longest_text_and_classes_come_with_their_strategy() {
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
    fn every_figure_out_of_range_is_named() {
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
