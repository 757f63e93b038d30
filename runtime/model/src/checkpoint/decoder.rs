//! `config.json` of a decoder, brought into the keys that GGUF files of the same architecture have, so that
//! an architecture reads one kind of keys. Every key of the file is read, harmless, or refused by name.

mod rotation;

use super::CheckpointProblem;
use crate::arch::ConfigKeys;
use crate::gguf::Metadata;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// What a key of the configuration is.
#[derive(Clone, Copy)]
enum Meaning {
    /// A count, under this key of GGUF.
    Size(&'static str),
    /// A number, under this key of GGUF.
    Number(&'static str),
    /// A truth value that must be this one.
    Must(bool),
    /// A text that must be one of these.
    OneOf(&'static [&'static str]),
    /// A count that must be 1.
    MustBeOne,
    /// A list that must be empty.
    MustBeEmpty,
    /// Without effect at inference, or without effect here because of another key that is checked.
    Harmless,
}
use Meaning::{Harmless, Must, MustBeEmpty, MustBeOne, Number, OneOf, Size};

/// Keys of every library that writes configurations, which no answer depends on.
const HARMLESS: [&str; 38] = [
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "n_ctx",
    "no_rope_layer_interval",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
];

/// Keys of all decoders with rotary positions.
static SHARED: [(&str, Meaning); 12] = [
    ("hidden_size", Size("embedding_length")),
    ("num_hidden_layers", Size("block_count")),
    ("num_attention_heads", Size("attention.head_count")),
    ("num_key_value_heads", Size("attention.head_count_kv")),
    ("head_dim", Size("attention.key_length")),
    ("intermediate_size", Size("feed_forward_length")),
    ("max_position_embeddings", Size("context_length")),
    ("rms_norm_eps", Number("attention.layer_norm_rms_epsilon")),
    ("attention_bias", Must(false)),
    ("mlp_bias", Must(false)),
    ("hidden_act", OneOf(&["silu"])),
    ("is_decoder", Must(false)),
];

/// A `model_type` that can be read.
struct DecoderType {
    name: &'static str,
    /// Its name in GGUF files.
    architecture: &'static str,
    /// Its keys beside, or instead of, the shared ones.
    own: &'static [(&'static str, Meaning)],
    /// Whether the tensors of a block have the names of Gemma and OLMo 2, whose `post_attention_layernorm`
    /// norms what the attention adds.
    norms_after: bool,
}

const WINDOW: &str = "attention.sliding_window";

const GEMMA: &[(&str, Meaning)] = &[
    ("hidden_act", OneOf(&["gelu_pytorch_tanh"])),
    ("hidden_activation", OneOf(&["gelu_pytorch_tanh"])),
    ("attn_logit_softcapping", Number("attn_logit_softcapping")),
    ("final_logit_softcapping", Number("final_logit_softcapping")),
    ("sliding_window", Size(WINDOW)),
    ("use_bidirectional_attention", Must(false)),
];

/// A window that the settings switch off.
const NO_WINDOW: &[(&str, Meaning)] =
    &[("use_sliding_window", Must(false)), ("sliding_window", Harmless), ("max_window_layers", Harmless)];

/// Settings of training beside experts.
const ROUTED: [(&str, Meaning); 5] = [
    ("num_local_experts", Size("expert_count")),
    ("num_experts_per_tok", Size("expert_used_count")),
    ("router_aux_loss_coef", Harmless),
    ("router_jitter_noise", Harmless),
    ("output_router_logits", Harmless),
];

static MODEL_TYPES: [DecoderType; 13] = [
    DecoderType {
        name: "mixtral",
        architecture: "llama",
        own: &[ROUTED[0], ROUTED[1], ROUTED[2], ROUTED[3], ROUTED[4], ("sliding_window", Size(WINDOW))],
        norms_after: false,
    },
    DecoderType {
        name: "qwen3_moe",
        architecture: "qwen3moe",
        own: &[
            ROUTED[0],
            ROUTED[1],
            ROUTED[2],
            ROUTED[3],
            ROUTED[4],
            ("num_experts", Size("expert_count")),
            ("moe_intermediate_size", Size("expert_feed_forward_length")),
            ("norm_topk_prob", Must(true)),
            ("decoder_sparse_step", MustBeOne),
            ("mlp_only_layers", MustBeEmpty),
            ("use_sliding_window", Must(false)),
            ("sliding_window", Harmless),
            ("max_window_layers", Harmless),
        ],
        norms_after: false,
    },
    DecoderType { name: "llama", architecture: "llama", own: &[], norms_after: false },
    DecoderType {
        name: "mistral",
        architecture: "llama",
        own: &[("sliding_window", Size(WINDOW))],
        norms_after: false,
    },
    DecoderType { name: "qwen2", architecture: "qwen2", own: NO_WINDOW, norms_after: false },
    DecoderType { name: "qwen3", architecture: "qwen3", own: NO_WINDOW, norms_after: false },
    DecoderType { name: "smollm3", architecture: "smollm3", own: NO_WINDOW, norms_after: false },
    DecoderType { name: "olmo2", architecture: "olmo2", own: &[], norms_after: true },
    DecoderType {
        name: "granite",
        architecture: "granite",
        own: &[
            ("embedding_multiplier", Number("embedding_scale")),
            ("residual_multiplier", Number("residual_scale")),
            ("attention_multiplier", Number("attention.scale")),
            ("logits_scaling", Number("logit_scale")),
        ],
        norms_after: false,
    },
    DecoderType {
        name: "phi3",
        architecture: "phi3",
        own: &[("sliding_window", Size(WINDOW))],
        norms_after: false,
    },
    DecoderType { name: "gemma2", architecture: "gemma2", own: GEMMA, norms_after: true },
    DecoderType { name: "gemma3_text", architecture: "gemma3", own: GEMMA, norms_after: true },
    DecoderType {
        name: "gpt2",
        architecture: "gpt2",
        own: &[
            ("n_embd", Size("embedding_length")),
            ("n_layer", Size("block_count")),
            ("n_head", Size("attention.head_count")),
            ("n_positions", Size("context_length")),
            ("n_inner", Size("feed_forward_length")),
            ("layer_norm_epsilon", Number("attention.layer_norm_epsilon")),
            ("activation_function", OneOf(&["gelu_new", "gelu_pytorch_tanh"])),
            ("scale_attn_weights", Must(true)),
            ("scale_attn_by_inverse_layer_idx", Must(false)),
            ("add_cross_attention", Must(false)),
        ],
        norms_after: false,
    },
];

/// The classes of a generating model by their ends.
const CLASS_ENDS: [&str; 2] = ["ForCausalLM", "LMHeadModel"];

/// A checked configuration.
#[derive(Debug)]
pub(crate) struct DecoderConfig {
    /// The name of its architecture in GGUF files.
    pub(crate) architecture: &'static str,
    /// Its sizes and settings under the keys of GGUF.
    pub(crate) metadata: Metadata,
    pub(crate) keys: ConfigKeys,
    /// Rows of the embedding as stored.
    pub(crate) vocabulary: usize,
    /// Whether the head is the embedding, or is not used.
    pub(crate) is_tied: bool,
    /// Whether there is a projection to one logit, beside the tensors of a decoder.
    pub(crate) has_score: bool,
    /// Ids that end an answer, where `generation_config.json` names none.
    pub(crate) ends: Vec<u32>,
    /// Whether `post_attention_layernorm` norms what the attention adds.
    pub(crate) norms_after: bool,
    /// The configuration's key for each key of GGUF that was made from it.
    sources: BTreeMap<String, String>,
}

/// Whether this `model_type` generates text and can be read.
pub(crate) fn is_decoder(model_type: &str) -> bool {
    MODEL_TYPES.iter().any(|known| known.name == model_type)
}

/// The model types that can be read, for messages.
pub(crate) fn model_types() -> String {
    MODEL_TYPES.iter().map(|known| known.name).collect::<Vec<_>>().join(", ")
}

impl DecoderConfig {
    /// Reads and checks the content of a `config.json` whose `model_type` [`is_decoder`] accepted.
    pub(crate) fn read(model_type: &str, content: &Map<String, Value>) -> Result<Self, CheckpointProblem> {
        let Some(known) = MODEL_TYPES.iter().find(|known| known.name == model_type) else {
            return Err(CheckpointProblem::unsupported("model_type", model_type, "see the list of models"));
        };
        let reader = Reader { content, read: RefCell::default() };
        check_class(&reader)?;
        let mut config = Self {
            architecture: known.architecture,
            metadata: Metadata::default(),
            keys: rotation::unscaled(),
            vocabulary: reader.size("vocab_size")?,
            is_tied: reader.truth("tie_word_embeddings")?.unwrap_or(tied_by_default(known)),
            has_score: false,
            ends: reader.ids("eos_token_id")?,
            norms_after: known.norms_after,
            sources: BTreeMap::new(),
        };
        let has_rotation = known.architecture != "gpt2";
        let shared = SHARED.iter().filter(|_| has_rotation);
        let shared = shared.filter(|(key, _)| !known.own.iter().any(|(own, _)| own == key));
        for (key, meaning) in shared.chain(known.own) {
            config.apply(&reader, key, *meaning)?;
        }
        if has_rotation {
            config.read_rotation(&reader)?;
        } else if !content.contains_key("n_inner") {
            let width = reader.size("n_embd")?;
            config.set_size("feed_forward_length", "n_embd", 4 * width as u64);
        }
        if known.architecture.starts_with("gemma") {
            let elements = reader.number("query_pre_attn_scalar")?.unwrap_or(256.0);
            config.set_number("attention.scale", "query_pre_attn_scalar", elements.sqrt().recip());
        }
        config.read_layers(&reader)?;
        reader.all_read(model_type)?;
        Ok(config)
    }

    fn apply(&mut self, reader: &Reader<'_>, key: &str, meaning: Meaning) -> Result<(), CheckpointProblem> {
        match meaning {
            Size(own) => {
                if let Some(size) = reader.optional_size(key)? {
                    self.set_size(own, key, size as u64);
                }
            }
            Number(own) => {
                if let Some(number) = reader.number(key)? {
                    self.set_number(own, key, number);
                }
            }
            Must(only) => {
                if reader.truth(key)?.is_some_and(|found| found != only) {
                    return Err(CheckpointProblem::key(
                        key,
                        format!("{} is not supported; only {only} is", !only),
                    ));
                }
            }
            OneOf(texts) => {
                if let Some(found) = reader.text(key)?.filter(|found| !texts.contains(found)) {
                    let supported = texts.join(", ");
                    let why = format!("{found:?} is not supported; supported: {supported}");
                    return Err(CheckpointProblem::key(key, why));
                }
            }
            MustBeOne => {
                if let Some(found) = reader.optional_size(key)?.filter(|found| *found != 1) {
                    return Err(CheckpointProblem::key(key, format!("{found} is not supported; only 1 is")));
                }
            }
            MustBeEmpty => {
                if reader.list(key)?.is_some_and(|list| !list.is_empty()) {
                    return Err(CheckpointProblem::key(key, "only an empty list is supported".to_owned()));
                }
            }
            Harmless => reader.note(key),
        }
        Ok(())
    }

    fn set_size(&mut self, own: &str, key: &str, size: u64) {
        let own = format!("{}.{own}", self.architecture);
        self.sources.insert(own.clone(), key.to_owned());
        self.metadata.set_size(own, size);
    }

    fn set_number(&mut self, own: &str, key: &str, number: f64) {
        let own = format!("{}.{own}", self.architecture);
        self.sources.insert(own.clone(), key.to_owned());
        self.metadata.set_number(own, number);
    }

    /// Which layers have a window, and which rotate.
    fn read_layers(&mut self, reader: &Reader<'_>) -> Result<(), CheckpointProblem> {
        if self.architecture.starts_with("gemma") {
            let types = reader.list("layer_types")?.map(|types| {
                let windowed = |kind: &Value| match kind.as_str() {
                    Some("sliding_attention") => Ok(true),
                    Some("full_attention") => Ok(false),
                    _ => Err(CheckpointProblem::key("layer_types", format!("{kind} is not supported"))),
                };
                types.iter().map(windowed).collect::<Result<Vec<bool>, _>>()
            });
            self.keys.windowed = types.transpose()?;
            // transformers 5 writes the key with an underscore, beside the list.
            let spelled = reader.optional_size("_sliding_window_pattern")?;
            let interval = reader.optional_size("sliding_window_pattern")?.or(spelled);
            if let Some(interval) = interval.filter(|n| *n > 0) {
                let key = "sliding_window_pattern";
                if self.architecture == "gemma3" {
                    self.set_size("attention.sliding_window_pattern", key, interval as u64);
                } else if interval != 2 {
                    return Err(CheckpointProblem::key(
                        key,
                        format!("{interval} is not supported; only 2 is"),
                    ));
                }
            }
        }
        if self.keys.windowed.is_none() {
            let types = reader.list("layer_types")?.into_iter().flatten();
            if let Some(kind) = types.into_iter().find(|kind| kind.as_str() != Some("full_attention")) {
                let why = format!("{kind} is not supported; only \"full_attention\" is");
                return Err(CheckpointProblem::key("layer_types", why));
            }
        }
        if self.architecture == "smollm3"
            && let Some(layers) = reader.list("no_rope_layers")?
        {
            let rotates = |layer: &Value| match layer.as_u64() {
                Some(flag @ 0..=1) => Ok(flag == 1),
                _ => Err(CheckpointProblem::key("no_rope_layers", format!("{layer} is neither 0 nor 1"))),
            };
            self.keys.rotated = Some(layers.iter().map(rotates).collect::<Result<_, _>>()?);
        }
        Ok(())
    }

    /// A message about keys of GGUF, with the keys of the configuration in their places.
    pub(crate) fn with_own_keys(&self, message: &str) -> String {
        // Longer keys first, because some begin with others.
        let mut sources: Vec<_> = self.sources.iter().collect();
        sources.sort_by_key(|(key, _)| std::cmp::Reverse(key.len()));
        sources.into_iter().fold(message.to_owned(), |text, (key, own)| text.replace(key, own))
    }
}

/// Whether the head is the embedding where no key says it.
fn tied_by_default(known: &DecoderType) -> bool {
    ["gemma2", "gemma3", "gpt2", "smollm3"].contains(&known.architecture)
}

fn check_class(reader: &Reader<'_>) -> Result<(), CheckpointProblem> {
    let Some(classes) = reader.list("architectures")? else { return Ok(()) };
    match classes.first().and_then(Value::as_str) {
        Some(class) if !CLASS_ENDS.iter().any(|end| class.ends_with(end)) => {
            let why = format!("{class:?} is not supported; a class that generates text ends in ForCausalLM");
            Err(CheckpointProblem::key("architectures", why))
        }
        _ => Ok(()),
    }
}

/// The keys of one object of the configuration, with a record of those that were read.
struct Reader<'a> {
    content: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    fn note(&self, key: &str) {
        self.read.borrow_mut().insert(key.to_owned());
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.note(key);
        self.content.get(key)
    }

    fn of_kind<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointProblem> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || CheckpointProblem::key(key, format!("{value} is not {kind}"));
        read(value).map(Some).ok_or_else(wrong)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, CheckpointProblem> {
        // Every number that a plan carries fits 32 bits.
        let size = |value: &Value| value.as_u64().filter(|n| *n <= u64::from(u32::MAX / 2));
        self.of_kind(key, "a count", |value| size(value).and_then(|n| usize::try_from(n).ok()))
    }

    fn size(&self, key: &str) -> Result<usize, CheckpointProblem> {
        let size = self.optional_size(key)?.filter(|size| *size > 0);
        size.ok_or_else(|| CheckpointProblem::key(key, "a count above 0 is needed".to_owned()))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, CheckpointProblem> {
        self.of_kind(key, "a number", Value::as_f64)
    }

    fn truth(&self, key: &str) -> Result<Option<bool>, CheckpointProblem> {
        self.of_kind(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, CheckpointProblem> {
        self.of_kind(key, "a text", Value::as_str)
    }

    fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, CheckpointProblem> {
        self.of_kind(key, "a list", Value::as_array)
    }

    fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, CheckpointProblem> {
        self.of_kind(key, "an object", Value::as_object)
    }

    /// One id or a list of them; none where the key is missing.
    fn ids(&self, key: &str) -> Result<Vec<u32>, CheckpointProblem> {
        self.get(key).map_or_else(|| Ok(Vec::new()), |value| ids_of(key, value))
    }

    fn all_read(&self, model_type: &str) -> Result<(), CheckpointProblem> {
        let read = self.read.borrow();
        let unread = |key: &&String| !read.contains(*key) && !HARMLESS.contains(&key.as_str());
        match self.content.keys().find(unread) {
            None => Ok(()),
            Some(key) => Err(CheckpointProblem::UnreadConfigKey {
                key: key.clone(),
                model_type: model_type.to_owned(),
            }),
        }
    }
}

/// Token ids in a configuration: one, or a list.
pub(crate) fn ids_of(key: &str, value: &Value) -> Result<Vec<u32>, CheckpointProblem> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = match value {
        Value::Array(values) => values.iter().map(id).collect(),
        value => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| CheckpointProblem::key(key, format!("{value} is neither an id nor a list of ids")))
}
