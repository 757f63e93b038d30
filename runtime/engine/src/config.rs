//! The settings of a generation engine. They are checked once, at start.
//!
//! Every setting bounds the memory or the latency of a running process, so one that cannot be honoured is
//! refused at start: a server that silently serves a shorter context than configured is harder to operate
//! than one that says what it needs.

use crate::adapters::{MAX_ADAPTER_RANK, MAX_ADAPTERS};
use crate::generation::ANSWER_BUFFER_BYTES;
use crate::grammar::DEFAULT_GRAMMAR_MEMORY_BYTES;
use crate::prefix_cache::BlockNeeds;
use crate::request::MAX_LOGIT_BIASES;
use crate::speculation::MAX_VERIFY_ROWS;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use trustformers_model::{Model, ModelFacts, PlanRequest};
use trustformers_plan::{
    AdapterRoom, Caps, FusedOps, KV_BLOCK_TOKENS, KvType, LayerClasses, Limits, Numerics, Plan,
};

/// Default context in tokens, where the model's own is longer.
pub const DEFAULT_CONTEXT_TOKENS: usize = 8192;

/// KV tokens that the default memory rule adds for each sequence of a batch after the first.
const DEFAULT_FURTHER_SEQUENCE_TOKENS: usize = 256;

/// A request that arrives waits for the step that runs and then for its own. Two such steps stay below 100
/// ms, which people perceive as immediate.
const DEFAULT_STEP_TARGET_MS: u64 = 40;

/// Requests that a full queue admits beyond its limit because they have precedence over others in it. As many
/// others are removed before the next step.
pub(crate) const MAX_DISPLACING: usize = 16;

/// How draft tokens are proposed, several of which one step verifies. The model chooses every token itself,
/// so answers are the same with and without speculation, in `exact` bit for bit. They come sooner where few
/// requests run at once.
#[derive(Debug, Clone)]
pub enum Speculation {
    /// The tokens that followed the same tokens earlier in the prompt or the answer: for code, quotations,
    /// forms.
    Ngram,
    /// The tokens of a smaller model with the same vocabulary, on the same device. It takes memory for its
    /// weights and a share of the KV memory.
    Draft(Arc<Model>),
}

/// Where the costs of draft tokens come from, which decide how many are worth it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum SpeculationCosts {
    /// From the times of steps: speculation ends where it loses.
    #[default]
    Measured,
    /// Given, in steps of the model without draft tokens: for devices whose times say nothing, such as the
    /// reference backend, and for tests that must not depend on a clock.
    Assumed {
        /// A further row of a step.
        row: f64,
        /// A step of the draft model.
        draft_step: f64,
    },
}

/// Settings of one engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The `model` label of this engine's metrics, usually the first name that the model is served under.
    pub model_label: String,
    /// Most sequences that run at once, 1 to 256.
    pub max_batch_size: usize,
    /// Most requests that may wait beyond those that run, at least 1. When `max_batch_size + max_queue`
    /// requests are in flight the next one is refused as overloaded.
    pub max_queue: usize,
    /// Longest sequence (prompt and answer together) in tokens. `None`: the model's own context, at most
    /// [`DEFAULT_CONTEXT_TOKENS`].
    pub context_tokens: Option<usize>,
    /// Most token rows of one step: decode rows of all running sequences and chunks of prompts. A smaller
    /// value gives smoother streams while prompts are read, a larger one gives faster prompts. At least
    /// `max_batch_size`.
    pub token_budget: usize,
    /// Target time of a step while other requests wait for it, in milliseconds, 1 to 10000. Prompts are
    /// chunked to meet it. `None`: as long as `token_budget` rows take.
    pub step_target_ms: Option<u64>,
    /// Whether priority classes count. Otherwise all requests are of class normal.
    pub priority: bool,
    /// Memory for the KV cache in bytes. `None`: one sequence of full context and 256 tokens for each further
    /// sequence of a batch.
    pub kv_memory_bytes: Option<u64>,
    /// Memory for compiled grammars and for those of running requests, in bytes. A request beyond it is
    /// refused.
    pub grammar_memory_bytes: u64,
    /// The type in which keys and values are cached. `None`: the type with which the device is fastest in
    /// [`Numerics::Fast`], f32 in `Exact`.
    pub kv_cache: Option<KvType>,
    /// How closely the device must follow f32 arithmetic.
    pub numerics: Numerics,
    /// How draft tokens are proposed. `None`: no speculation.
    pub speculation: Option<Speculation>,
    /// What draft tokens cost.
    pub speculation_costs: SpeculationCosts,
    /// How many adapters may be on the device at once, at most 256, and their highest rank, at most 1024. An
    /// adapter takes its memory when it is added, scratch space for the rank when the model is loaded.
    pub adapters: AdapterRoom,
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
            kv_cache: None,
            numerics: Numerics::Fast,
            speculation: None,
            speculation_costs: SpeculationCosts::Measured,
            adapters: AdapterRoom::NONE,
        }
    }
}

/// Why an engine could not be started.
#[derive(Debug, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum StartError {
    /// A setting is outside its range.
    #[error("{field}: {why}")]
    Invalid {
        /// The setting's name in [`EngineConfig`].
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The draft model does not fit the model.
    #[error("the draft model cannot be used: {why}; take a smaller model of the same family, or none")]
    Draft {
        /// What is wrong with it.
        why: String,
    },
    /// The KV memory does not hold one sequence of full context.
    #[error(
        "kv_memory_bytes: {given_bytes} bytes hold fewer than the {context_tokens} tokens of context_tokens, which \
         need {needed_bytes} bytes; raise the memory or lower the context"
    )]
    KvTooSmall {
        /// Bytes that one sequence of full context needs.
        needed_bytes: u64,
        /// Bytes that were given.
        given_bytes: u64,
        /// The context in tokens.
        context_tokens: usize,
    },
    /// The backend refused the weights or the plan.
    #[error("device {device:?} cannot run this model: {message}")]
    Backend {
        /// The device's description of itself.
        device: String,
        /// The backend's message.
        message: String,
    },
    /// The operating system refused a thread.
    #[error("no thread for the engine: {0}; check the thread limit of the process")]
    Thread(#[from] std::io::Error),
}

/// The sizes of an engine after checking, with all defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineSizes {
    pub(crate) max_batch_size: usize,
    pub(crate) max_queue: usize,
    pub(crate) context_tokens: usize,
    pub(crate) token_budget: usize,
    pub(crate) step_target: Option<Duration>,
    /// The most blocks of the KV cache.
    pub(crate) kv_blocks: usize,
    /// The blocks that it has at first: those of one full context.
    pub(crate) first_kv_blocks: usize,
    /// Bytes of a block, of the draft model as well.
    pub(crate) kv_block_bytes: u64,
    pub(crate) kv_type: KvType,
    /// What decides how many blocks a sequence has.
    pub(crate) needs: BlockNeeds,
    pub(crate) adapters: AdapterRoom,
}

impl EngineSizes {
    /// The plan with the classes of layers that these sizes were computed with.
    pub(crate) fn with_classes(&self, plan: Plan) -> Plan {
        if self.needs.classes == LayerClasses::ONE { plan } else { plan.with_layer_classes() }
    }

    /// The plan for steps of these sizes, with `draft_rows` rows of logits beside one for each sequence.
    pub(crate) fn plan_request(&self, draft_rows: usize, fused: FusedOps) -> PlanRequest {
        let limits = Limits {
            rows: self.token_budget,
            sequences: self.max_batch_size,
            logits_rows: self.max_batch_size + draft_rows,
        };
        PlanRequest { context_tokens: self.context_tokens, limits, fused }
    }
}

impl EngineConfig {
    /// Most bytes that the engine itself takes on the host for a model, beside the memory of the device
    /// (weights, arena, KV cache) and of grammars, which have a budget of their own. It is the sum of
    ///
    /// - the bound on all unread events: 32 MiB;
    /// - the ids of each request in flight, 4 bytes for each token of its context, twice (prompt and
    ///   sequence);
    /// - what a step's choices depend on, for each sequence and draft row: a mask of one bit for each token
    ///   of the vocabulary, and 8 bytes for each bias and for each token of the context that has a count.
    #[must_use]
    pub fn answer_bytes(&self, facts: &ModelFacts) -> u64 {
        let context_tokens = self.context_of(facts.context_tokens);
        let in_flight = self.max_batch_size + self.max_queue + MAX_DISPLACING;
        let rows = self.max_batch_size + if self.speculation.is_some() { MAX_VERIFY_ROWS } else { 0 };
        let id_bytes = (in_flight as u64) * (context_tokens as u64) * 4 * 2;
        let mask_bytes = facts.vocabulary.div_ceil(32) as u64 * 4;
        let row_bytes = mask_bytes + (MAX_LOGIT_BIASES + context_tokens) as u64 * 8;
        ANSWER_BUFFER_BYTES as u64 + id_bytes + rows as u64 * row_bytes
    }

    /// The context in tokens, for a model with this one.
    pub(crate) fn context_of(&self, model_context: usize) -> usize {
        self.context_tokens.unwrap_or(model_context.min(DEFAULT_CONTEXT_TOKENS))
    }

    /// The type of the KV cache on a device.
    ///
    /// # Errors
    /// [`StartError::Invalid`] where the device has no cache of the chosen type.
    pub(crate) fn kv_type(&self, caps: &Caps) -> Result<KvType, StartError> {
        let Some(chosen) = self.kv_cache else { return Ok(caps.default_kv_type(self.numerics)) };
        if caps.kv_types.contains(&chosen) {
            return Ok(chosen);
        }
        let names: Vec<&str> = caps.kv_types.iter().map(|kv_type| kv_type.name()).collect();
        let why = format!("{chosen} is not supported by {}; use {}", caps.description, names.join(" or "));
        Err(StartError::Invalid { field: "kv_cache", why })
    }

    /// Checks the room for adapters.
    pub(crate) fn check_adapters(&self, caps: &Caps) -> Result<(), StartError> {
        let AdapterRoom { slots, rank } = self.adapters;
        let why = if self.adapters.is_none() {
            return Ok(());
        } else if !caps.adapters {
            format!("{} runs no adapters; choose another device, or none of them", caps.description)
        } else if slots > MAX_ADAPTERS {
            format!("{slots} are more than {MAX_ADAPTERS}")
        } else if !(1..=MAX_ADAPTER_RANK).contains(&rank) {
            format!("rank {rank} is not between 1 and {MAX_ADAPTER_RANK}")
        } else {
            return Ok(());
        };
        Err(StartError::Invalid { field: "adapters", why })
    }

    /// Checks the settings against a model's context and its KV blocks.
    pub(crate) fn sizes(&self, model_context: usize, kv: KvBlocks) -> Result<EngineSizes, StartError> {
        let KvBlocks { block_bytes: kv_block_bytes, kv_type, needs } = kv;
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
        let context_tokens = self.context_of(model_context);
        if context_tokens < 2 || context_tokens > model_context {
            return invalid(
                "context_tokens",
                format!("{context_tokens} is not between 2 and the model's own context of {model_context}"),
            );
        }
        let blocks_per_sequence = needs.most(context_tokens);
        let kv_blocks = match self.kv_memory_bytes {
            None => {
                let further = (self.max_batch_size - 1)
                    * needs.most(DEFAULT_FURTHER_SEQUENCE_TOKENS.min(context_tokens));
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
        Ok(EngineSizes {
            max_batch_size: self.max_batch_size,
            max_queue: self.max_queue,
            context_tokens,
            token_budget: self.token_budget,
            step_target: self.step_target_ms.map(Duration::from_millis),
            kv_blocks,
            first_kv_blocks: blocks_per_sequence,
            kv_block_bytes,
            kv_type,
            needs,
            adapters: self.adapters,
        })
    }
}

/// What the size of a cache depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvBlocks {
    /// Bytes of one block, of the draft model as well.
    pub(crate) block_bytes: u64,
    pub(crate) kv_type: KvType,
    pub(crate) needs: BlockNeeds,
}

/// Bytes that a KV block of all layers takes, keys and values together.
pub(crate) fn kv_block_bytes(facts: &ModelFacts, kv_type: KvType) -> u64 {
    let per_token = facts.layers as u64 * 2 * facts.kv_heads as u64 * facts.head_dim as u64;
    per_token * (KV_BLOCK_TOKENS * kv_type.bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_plan::KvLayout;

    /// Blocks of 1000 bytes.
    const KV: KvBlocks = KvBlocks {
        block_bytes: 1000,
        kv_type: KvType::F32,
        needs: BlockNeeds { classes: LayerClasses::ONE, rows: 128 },
    };

    #[test]
    fn a_type_of_the_cache_that_the_device_lacks_is_refused() {
        use trustformers_plan::{Backend, oracle::Oracle};
        let caps = Caps { kv_types: vec![KvType::F32, KvType::Bf16], ..Oracle::new().caps().clone() };
        let fast = Caps { fast_kv_type: KvType::Bf16, ..caps.clone() };
        let of = |kv_cache, numerics, caps| {
            EngineConfig { kv_cache, numerics, ..EngineConfig::default() }.kv_type(caps)
        };
        assert_eq!(of(None, Numerics::Fast, &fast).unwrap(), KvType::Bf16);
        assert_eq!(of(None, Numerics::Fast, &caps).unwrap(), KvType::F32);
        assert_eq!(of(None, Numerics::Exact, &fast).unwrap(), KvType::F32);
        assert_eq!(of(Some(KvType::Bf16), Numerics::Exact, &caps).unwrap(), KvType::Bf16);
        let error = of(Some(KvType::F16), Numerics::Fast, &caps).unwrap_err().to_string();
        assert!(error.starts_with("kv_cache") && error.contains("use f32 or bf16"), "{error}");
    }

    #[test]
    fn the_default_memory_is_one_full_context_and_a_batch() {
        let sizes = EngineConfig::default().sizes(8192, KV).unwrap();
        assert_eq!(sizes.context_tokens, 8192);
        assert_eq!(sizes.kv_blocks, 512 + 31 * 16);
    }

    #[test]
    fn layers_with_windows_take_the_blocks_that_they_reach() {
        // One full group and three windowed ones, which reach 64 - 1 + 128 positions.
        let classes = KvLayout::of_windows(&[Some(64), Some(64), Some(64), None], 8192).classes();
        let kv = KvBlocks { needs: BlockNeeds { classes, rows: 128 }, ..KV };
        let sizes = EngineConfig::default().sizes(8192, kv).unwrap();
        assert_eq!(sizes.first_kv_blocks, 512 + 3 * 13);
        assert_eq!(sizes.kv_blocks, sizes.first_kv_blocks + 31 * (16 + 3 * 13));
        let least = EngineConfig { kv_memory_bytes: Some(551_000), ..EngineConfig::default() };
        assert_eq!(least.sizes(8192, kv).unwrap().kv_blocks, 551);
        let less = EngineConfig { kv_memory_bytes: Some(550_999), ..EngineConfig::default() };
        assert!(less.sizes(8192, kv).unwrap_err().to_string().contains("551000 bytes"));
    }

    #[test]
    fn a_long_context_is_limited_unless_it_is_configured() {
        assert_eq!(EngineConfig::default().sizes(131_072, KV).unwrap().context_tokens, 8192);
        let asked = EngineConfig { context_tokens: Some(100_000), ..EngineConfig::default() };
        assert_eq!(asked.sizes(131_072, KV).unwrap().context_tokens, 100_000);
    }

    #[test]
    fn memory_that_a_full_batch_cannot_use_is_not_allocated() {
        let config = EngineConfig {
            max_batch_size: 2,
            token_budget: 16,
            context_tokens: Some(32),
            kv_memory_bytes: Some(1 << 40),
            ..EngineConfig::default()
        };
        assert_eq!(config.sizes(64, KV).unwrap().kv_blocks, 4);
    }

    #[test]
    fn too_little_memory_is_refused_with_both_sizes() {
        let config = EngineConfig { kv_memory_bytes: Some(5000), ..EngineConfig::default() };
        let error = config.sizes(8192, KV).unwrap_err().to_string();
        assert!(error.contains("5000 bytes") && error.contains("512000 bytes"), "{error}");
    }

    #[test]
    fn every_setting_out_of_range_is_refused_by_name() {
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
            let error = config.sizes(8192, KV).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn answer_bytes_add_up_what_the_engine_allocates() {
        use trustformers_model::seeded::SeededModel;
        let file = Arc::new(SeededModel::default().gguf());
        let model = Model::from_bytes(std::path::Path::new("seeded.gguf"), file).unwrap();
        let (facts, config) = (model.facts(), EngineConfig::default());
        let ids = (32 + 512 + 16) * 256 * 4 * 2;
        let row = facts.vocabulary.div_ceil(32) as u64 * 4 + (256 + MAX_LOGIT_BIASES as u64) * 8;
        assert_eq!(config.answer_bytes(facts), (32 << 20) + ids + 32 * row);
        let drafted =
            EngineConfig { speculation: Some(Speculation::Draft(Arc::new(model))), ..config.clone() };
        let Some(Speculation::Draft(draft)) = &drafted.speculation else { unreachable!() };
        assert_eq!(drafted.answer_bytes(draft.facts()), config.answer_bytes(draft.facts()) + 8 * row);
    }
}
