//! What an engine is started with, checked once so that nothing later has to doubt it.
//!
//! Every figure here bounds memory or latency of a running process, so each is refused at start when it cannot be
//! honoured: a server that silently serves a shorter context than it was told is harder to operate than one that
//! says what it needs.

use crate::grammar::DEFAULT_GRAMMAR_MEMORY_BYTES;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use trustformers_model::Model;
use trustformers_plan::{KV_BLOCK_TOKENS, Numerics};

/// Context that is used when none is asked for and the model's own is longer, in tokens.
pub const DEFAULT_CONTEXT_TOKENS: usize = 8192;

/// KV room that the default memory rule adds for each sequence of a batch after the first, in tokens.
const DEFAULT_FURTHER_SEQUENCE_TOKENS: usize = 256;

/// An arriving request waits for the step that runs and then for its own; together they should be less than what a person
/// takes for no delay at all.
const DEFAULT_STEP_TARGET_MS: u64 = 40;

/// How tokens are guessed so that one step checks several. The model chooses every token itself, so answers are the same
/// with and without, in `exact` bit for bit; they come sooner where few requests run at once.
#[derive(Debug, Clone)]
pub enum Speculation {
    /// What followed the same words earlier in the prompt or the answer: for code, quotations, forms.
    Ngram,
    /// What a smaller model of the same vocabulary says, on the same device. It takes its own weights' memory, and its
    /// share of the KV memory.
    Draft(Arc<Model>),
}

/// Settings of one engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The `model` label of this engine's metrics, usually the first name that the model is served under.
    pub model_label: String,
    /// Most sequences that are computed at once, 1 to 256.
    pub max_batch_size: usize,
    /// Most requests that may wait beyond those being computed, at least 1. When `max_batch_size + max_queue`
    /// requests are in flight the next one is refused as overloaded.
    pub max_queue: usize,
    /// Longest sequence (prompt and answer together) in tokens. `None`: the model's own context, at most
    /// [`DEFAULT_CONTEXT_TOKENS`].
    pub context_tokens: Option<usize>,
    /// Most token rows of one step: decode rows of all running sequences plus chunks of prompts. Smaller means
    /// smoother streams while others' prompts are read, larger means faster prompts. At least `max_batch_size`.
    pub token_budget: usize,
    /// How long a step should take at most while others wait for it, in milliseconds, 1 to 10000: prompts are cut so
    /// that it does. `None`: as long as `token_budget` rows take.
    pub step_target_ms: Option<u64>,
    /// Whether a request's class decides who goes first. Otherwise all are of class normal.
    pub priority: bool,
    /// Memory for the KV cache in bytes. `None`: one sequence of full context plus 256 tokens for each further
    /// member of a batch.
    pub kv_memory_bytes: Option<u64>,
    /// Memory for compiled grammars and for those of running requests, in bytes. A request beyond it is refused.
    pub grammar_memory_bytes: u64,
    /// How closely the device must follow f32 arithmetic.
    pub numerics: Numerics,
    /// How tokens are guessed. `None`: not at all.
    pub speculation: Option<Speculation>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model_label: "default".to_owned(),
            max_batch_size: 32,
            max_queue: 512,
            context_tokens: None,
            token_budget: 128,
            step_target_ms: Some(DEFAULT_STEP_TARGET_MS),
            priority: true,
            kv_memory_bytes: None,
            grammar_memory_bytes: DEFAULT_GRAMMAR_MEMORY_BYTES,
            numerics: Numerics::Fast,
            speculation: None,
        }
    }
}

/// Why an engine could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// A setting is outside its range.
    #[error("{field}: {why}")]
    Invalid {
        /// The setting's name in [`EngineConfig`].
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The draft model cannot guess for the model.
    #[error("the draft model cannot be used: {why}; take a smaller model of the same family, or none")]
    Draft {
        /// What is wrong with it.
        why: String,
    },
    /// The KV memory does not hold one sequence of the asked context.
    #[error(
        "kv_memory_bytes: {given_bytes} bytes hold fewer than the {context_tokens} tokens of context_tokens, which \
         need {needed_bytes} bytes; raise the memory or lower the context"
    )]
    KvTooSmall {
        /// Bytes that one sequence of full context needs.
        needed_bytes: u64,
        /// Bytes that were given.
        given_bytes: u64,
        /// The context that was asked for, in tokens.
        context_tokens: usize,
    },
    /// The backend refused the weights or the plan.
    #[error("device {device:?} cannot run this model: {message}")]
    Backend {
        /// The device as it describes itself.
        device: String,
        /// The backend's own words.
        message: String,
    },
    /// The operating system refused a thread.
    #[error("no thread for the engine: {0}; check the process's thread limit")]
    Thread(#[from] std::io::Error),
}

/// The figures of an engine after checking: nothing optional is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) max_batch_size: usize,
    pub(crate) max_queue: usize,
    pub(crate) context_tokens: usize,
    pub(crate) token_budget: usize,
    pub(crate) step_target: Option<Duration>,
    pub(crate) kv_blocks: usize,
}

impl EngineConfig {
    /// Checks the settings against a model's context and the bytes that one of its KV blocks takes.
    pub(crate) fn sizes(&self, model_context: usize, kv_block_bytes: u64) -> Result<Sizes, StartError> {
        let invalid = |field, why: String| Err(StartError::Invalid { field, why });
        if !(1..=256).contains(&self.max_batch_size) {
            return invalid("max_batch_size", format!("{} is not between 1 and 256", self.max_batch_size));
        }
        if !(1..=65_536).contains(&self.max_queue) {
            return invalid("max_queue", format!("{} is not between 1 and 65536", self.max_queue));
        }
        if self.token_budget < self.max_batch_size || self.token_budget > 65_536 {
            return invalid(
                "token_budget",
                format!(
                    "{} is not between max_batch_size ({}) and 65536",
                    self.token_budget, self.max_batch_size
                ),
            );
        }
        if let Some(ms) = self.step_target_ms.filter(|ms| !(1..=10_000).contains(ms)) {
            return invalid("step_target_ms", format!("{ms} is not between 1 and 10000"));
        }
        let context_tokens = self.context_tokens.unwrap_or(model_context.min(DEFAULT_CONTEXT_TOKENS));
        if context_tokens < 2 || context_tokens > model_context {
            return invalid(
                "context_tokens",
                format!("{context_tokens} is not between 2 and the model's own context of {model_context}"),
            );
        }
        let blocks_per_sequence = context_tokens.div_ceil(KV_BLOCK_TOKENS);
        let kv_blocks = match self.kv_memory_bytes {
            None => {
                let further = (self.max_batch_size - 1)
                    * DEFAULT_FURTHER_SEQUENCE_TOKENS.min(context_tokens).div_ceil(KV_BLOCK_TOKENS);
                blocks_per_sequence + further
            }
            Some(bytes) => {
                let useful = self.max_batch_size * blocks_per_sequence;
                usize::try_from(bytes / kv_block_bytes.max(1)).unwrap_or(usize::MAX).min(useful)
            }
        };
        if kv_blocks < blocks_per_sequence {
            return Err(StartError::KvTooSmall {
                needed_bytes: blocks_per_sequence as u64 * kv_block_bytes,
                given_bytes: self.kv_memory_bytes.unwrap_or(0),
                context_tokens,
            });
        }
        Ok(Sizes {
            max_batch_size: self.max_batch_size,
            max_queue: self.max_queue,
            context_tokens,
            token_budget: self.token_budget,
            step_target: self.step_target_ms.map(Duration::from_millis),
            kv_blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_gives_one_full_context_and_room_for_the_batch() {
        let sizes = EngineConfig::default().sizes(8192, 1000).unwrap();
        assert_eq!(sizes.context_tokens, 8192);
        assert_eq!(sizes.kv_blocks, 512 + 31 * 16);
    }

    #[test]
    fn a_long_model_is_served_with_the_default_context_unless_asked() {
        assert_eq!(EngineConfig::default().sizes(131_072, 1000).unwrap().context_tokens, 8192);
        let asked = EngineConfig { context_tokens: Some(100_000), ..EngineConfig::default() };
        assert_eq!(asked.sizes(131_072, 1000).unwrap().context_tokens, 100_000);
    }

    #[test]
    fn memory_beyond_what_a_full_batch_can_use_is_not_taken() {
        let config = EngineConfig {
            max_batch_size: 2,
            token_budget: 16,
            context_tokens: Some(32),
            kv_memory_bytes: Some(1 << 40),
            ..EngineConfig::default()
        };
        assert_eq!(config.sizes(64, 1000).unwrap().kv_blocks, 4);
    }

    #[test]
    fn too_little_memory_names_both_figures() {
        let config = EngineConfig { kv_memory_bytes: Some(5000), ..EngineConfig::default() };
        let error = config.sizes(8192, 1000).unwrap_err().to_string();
        assert!(error.contains("5000 bytes") && error.contains("512000 bytes"), "{error}");
    }

    #[test]
    fn every_figure_out_of_range_is_named() {
        let cases = [
            (EngineConfig { max_batch_size: 0, ..EngineConfig::default() }, "max_batch_size"),
            (EngineConfig { max_batch_size: 257, ..EngineConfig::default() }, "max_batch_size"),
            (EngineConfig { max_queue: 0, ..EngineConfig::default() }, "max_queue"),
            (EngineConfig { token_budget: 31, ..EngineConfig::default() }, "token_budget"),
            (EngineConfig { step_target_ms: Some(0), ..EngineConfig::default() }, "step_target_ms"),
            (EngineConfig { context_tokens: Some(1), ..EngineConfig::default() }, "context_tokens"),
            (EngineConfig { context_tokens: Some(9000), ..EngineConfig::default() }, "context_tokens"),
        ];
        for (config, field) in cases {
            let error = config.sizes(8192, 1000).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
