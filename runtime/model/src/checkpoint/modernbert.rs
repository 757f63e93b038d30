//! `config.json` of a ModernBERT. Every key is read, without effect on answers, or refused by name.

use super::CheckpointProblem;
use super::encoder_checks::{
    OnlyValue, check_base, check_class, check_eps, check_heads, check_only, check_sizes, check_unread,
};
use crate::arch::encoder_family::EncoderFamily;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use trustformers_plan::Pooling;

/// The classes that can be served. The head that guesses words gives no embedding.
const CLASSES: &str = "ModernBertModel, ModernBertForMaskedLM, ModernBertForSequenceClassification, \
    ModernBertForTokenClassification";

/// Layers that see the whole text, in `layer_types`.
const FULL: &str = "full_attention";
/// Layers that see a window.
const SLIDING: &str = "sliding_attention";

/// Keys that no answer depends on: training, other tasks, names, and those that `HeadConfig` reads.
const HARMLESS: [&str; 40] = [
    "_name_or_path",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cls_token_id",
    "decoder_bias",
    "deterministic_flash_attn",
    "dtype",
    "embedding_dropout",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_cutoff_factor",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "layer_norm_eps",
    "mlp_dropout",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "position_embedding_type",
    "problem_type",
    "reference_compile",
    "repad_logits_with_grad",
    "return_dict",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "sep_token_id",
    "sparse_pred_ignore_index",
    "sparse_prediction",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unpad_inputs",
    "use_cache",
];

/// Keys with the only value that is computed.
const ONLY: [OnlyValue; 5] = [
    ("norm_bias", "false"),
    ("attention_bias", "false"),
    ("mlp_bias", "false"),
    ("is_decoder", "false"),
    ("add_cross_attention", "false"),
];
/// The same for a key that only matters to a classifier.
const CLASSIFIER_BIAS: OnlyValue = ("classifier_bias", "false");

/// What the configuration says.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ModernBertConfig {
    /// Classes of the library that wrote it; the first decides what the checkpoint is for.
    #[serde(default)]
    architectures: Vec<String>,
    pub(crate) hidden_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) vocab_size: usize,
    #[serde(default = "default_eps")]
    pub(crate) norm_eps: f32,
    #[serde(default = "gelu")]
    hidden_activation: String,
    #[serde(default = "gelu")]
    classifier_activation: String,
    #[serde(default = "cls")]
    classifier_pooling: String,
    /// The kind of each layer; without it every `global_attn_every_n_layers`-th one sees the whole text.
    layer_types: Option<Vec<String>>,
    #[serde(default = "three")]
    global_attn_every_n_layers: usize,
    /// Positions of a window on both sides together.
    #[serde(default = "default_window")]
    local_attention: usize,
    #[serde(default = "global_base")]
    global_rope_theta: f32,
    #[serde(default = "local_base")]
    local_rope_theta: f32,
    #[serde(default)]
    rope_parameters: RotationOfKinds,
    /// All other keys.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// The rotation of each kind of layer, as newer versions of the library write it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RotationOfKinds {
    full_attention: RotationOfKind,
    sliding_attention: RotationOfKind,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RotationOfKind {
    rope_type: Option<String>,
    rope_theta: Option<f32>,
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LayerAttention {
    /// The base of the rotation's frequencies.
    pub(crate) rope_base: f32,
    /// Positions on either side of a row that it sees; `None`: all of the text.
    pub(crate) window: Option<usize>,
}

fn default_eps() -> f32 {
    1e-5
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn cls() -> String {
    "cls".to_owned()
}

fn three() -> usize {
    3
}

fn default_window() -> usize {
    128
}

fn global_base() -> f32 {
    160_000.0
}

fn local_base() -> f32 {
    10_000.0
}

impl ModernBertConfig {
    /// Refuses what a plan of this crate would not compute.
    pub(crate) fn check(&self) -> Result<(), CheckpointProblem> {
        let unsupported = CheckpointProblem::unsupported;
        self.check_others()?;
        check_class(&self.architectures, CLASSES)?;
        let scores = self.is_classifier();
        let has_head = self.has_head();
        let words = [
            ("hidden_activation", &self.hidden_activation, "gelu", "\"gelu\"", true),
            ("classifier_activation", &self.classifier_activation, "gelu", "\"gelu\"", has_head),
        ];
        for (key, found, only, supported, matters) in words {
            if matters && found != only {
                return Err(unsupported(key, format!("{found:?}"), supported));
            }
        }
        if scores && self.pooling_of_head().is_none() {
            let found = format!("{:?}", self.classifier_pooling);
            return Err(unsupported("classifier_pooling", found, "\"cls\", \"mean\""));
        }
        self.check_sizes()?;
        self.check_layers()
    }

    fn pooling_of_head(&self) -> Option<Pooling> {
        match self.classifier_pooling.as_str() {
            "cls" => Some(Pooling::Cls),
            "mean" => Some(Pooling::Mean),
            _ => None,
        }
    }

    /// How the rows of a text become the one that a classifier's head reads.
    pub(crate) fn classifier_pooling(&self) -> Pooling {
        // A checked classifier has one of the two words.
        self.pooling_of_head().unwrap_or(Pooling::Cls)
    }

    /// Whether the checkpoint is for scores instead of vectors.
    pub(crate) fn is_classifier(&self) -> bool {
        self.architectures.first().is_some_and(|class| EncoderFamily::is_classifier(class))
    }

    /// Whether the checkpoint is for scores of tokens.
    pub(crate) fn is_token_classifier(&self) -> bool {
        self.architectures.first().is_some_and(|class| EncoderFamily::is_token_classifier(class))
    }

    fn has_head(&self) -> bool {
        self.is_classifier() || self.is_token_classifier()
    }

    /// How a layer attends.
    pub(crate) fn attention_of_layer(&self, index: usize) -> LayerAttention {
        let is_full = match &self.layer_types {
            Some(types) => types.get(index).is_some_and(|kind| kind == FULL),
            None => index.is_multiple_of(self.global_attn_every_n_layers),
        };
        let [full, sliding] = self.rope_bases();
        if is_full {
            LayerAttention { rope_base: full, window: None }
        } else {
            LayerAttention { rope_base: sliding, window: Some(self.local_attention / 2) }
        }
    }

    /// Refuses keys that are not read and may change an answer.
    fn check_others(&self) -> Result<(), CheckpointProblem> {
        let classifier_bias = self.has_head().then_some(CLASSIFIER_BIAS);
        check_only(&self.others, ONLY.into_iter().chain(classifier_bias))?;
        check_unread(&self.others, "modernbert", |key| {
            let is_checked = ONLY.iter().chain([&CLASSIFIER_BIAS]).any(|(own, _)| *own == key);
            is_checked || HARMLESS.contains(&key)
        })
    }

    /// The bases of the rotation in layers that see the whole text, and in the others.
    fn rope_bases(&self) -> [f32; 2] {
        let RotationOfKinds { full_attention: full, sliding_attention: sliding } = &self.rope_parameters;
        [
            full.rope_theta.unwrap_or(self.global_rope_theta),
            sliding.rope_theta.unwrap_or(self.local_rope_theta),
        ]
    }

    fn check_sizes(&self) -> Result<(), CheckpointProblem> {
        check_sizes(&[
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
            ("global_attn_every_n_layers", self.global_attn_every_n_layers),
            ("local_attention", self.local_attention),
        ])?;
        check_heads(self.num_attention_heads, self.hidden_size, true)?;
        check_eps("norm_eps", self.norm_eps)
    }

    fn check_layers(&self) -> Result<(), CheckpointProblem> {
        if let Some(types) = &self.layer_types {
            let wrong = |why: String| CheckpointProblem::Malformed { key: "layer_types", why };
            if types.len() != self.num_hidden_layers {
                return Err(wrong(format!("{} kinds for {} layers", types.len(), self.num_hidden_layers)));
            }
            if let Some(kind) = types.iter().find(|kind| ![FULL, SLIDING].contains(&kind.as_str())) {
                return Err(wrong(format!("{kind:?} is neither \"{FULL}\" nor \"{SLIDING}\"")));
            }
        }
        for kind in [&self.rope_parameters.full_attention, &self.rope_parameters.sliding_attention] {
            if let Some(found) = kind.rope_type.as_ref().filter(|found| *found != "default") {
                return Err(CheckpointProblem::unsupported("rope_type", format!("{found:?}"), "\"default\""));
            }
        }
        self.rope_bases().into_iter().try_for_each(|base| check_base("rope_theta", base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(changes: Value) -> Result<ModernBertConfig, String> {
        let mut config = json!({
            "architectures": ["ModernBertModel"], "model_type": "modernbert", "hidden_size": 32,
            "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 48,
            "max_position_embeddings": 64, "vocab_size": 100, "local_attention": 9,
        });
        let Value::Object(changes) = changes else { panic!("an object of keys") };
        for (key, value) in changes {
            config[key] = value;
        }
        let config: ModernBertConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        config.check().map_err(|problem| problem.to_string())?;
        Ok(config)
    }

    #[test]
    fn layers_alternate_as_either_form_of_the_keys_says() {
        let full = |rope_base| LayerAttention { rope_base, window: None };
        let local = |rope_base| LayerAttention { rope_base, window: Some(4) };
        let kinds = |changes| -> Vec<LayerAttention> {
            let config = config(changes).unwrap();
            (0..5).map(|index| config.attention_of_layer(index)).collect()
        };
        let (global, near) = (full(160_000.0), local(10_000.0));
        assert_eq!(kinds(json!({})), [global, near, near, global, near]);
        let old =
            json!({"global_attn_every_n_layers": 2, "global_rope_theta": 5000.0, "local_rope_theta": 70.0});
        assert_eq!(kinds(old), [full(5000.0), local(70.0), full(5000.0), local(70.0), full(5000.0)]);
        let new = json!({
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING],
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 300.0},
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
            },
        });
        assert_eq!(kinds(new), [local(20.0), full(300.0), local(20.0), local(20.0), local(20.0)]);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        let classifier = |key: &str, value: Value| {
            let mut changes = json!({"architectures": ["ModernBertForSequenceClassification"]});
            changes[key] = value;
            changes
        };
        let cases = [
            (json!({"rope_scaling": {"factor": 2}}), "key rope_scaling is not part of modernbert"),
            (json!({"head_dim": 16}), "key head_dim is not part of modernbert"),
            (json!({"architectures": ["ModernBertForQuestionAnswering"]}), "key architectures is"),
            (json!({"hidden_activation": "relu"}), "key hidden_activation is \"relu\""),
            (json!({"norm_bias": true}), "key norm_bias is true"),
            (json!({"attention_bias": true}), "key attention_bias is true"),
            (json!({"mlp_bias": true}), "key mlp_bias is true"),
            (json!({"is_decoder": true}), "key is_decoder is true"),
            (json!({"num_attention_heads": 32}), "key num_attention_heads: 32 does not divide"),
            (json!({"local_attention": 0}), "key local_attention: 0 is not between 1"),
            (json!({"layer_types": [FULL]}), "key layer_types: 1 kinds for 5 layers"),
            (json!({"layer_types": [FULL, FULL, FULL, FULL, "chunked"]}), "key layer_types: \"chunked\""),
            (json!({"rope_parameters": {FULL: {"rope_type": "yarn"}}}), "key rope_type is \"yarn\""),
            (json!({"rope_parameters": {FULL: {"factor": 2.0}}}), "unknown field `factor`"),
            (json!({"global_rope_theta": 0.0}), "key rope_theta: 0 is not a number above 0"),
            (classifier("classifier_pooling", "max".into()), "key classifier_pooling is \"max\""),
            (classifier("classifier_bias", true.into()), "key classifier_bias is true"),
            (classifier("classifier_activation", "relu".into()), "key classifier_activation is \"relu\""),
        ];
        for (changes, wanted) in cases {
            let error = config(changes).unwrap_err();
            assert!(error.starts_with(wanted), "{error}");
        }
        let pooling = |word: &str| config(classifier("classifier_pooling", word.into())).unwrap();
        assert_eq!(pooling("mean").classifier_pooling(), Pooling::Mean);
        assert_eq!(pooling("cls").classifier_pooling(), Pooling::Cls);
        // An embedder has no head.
        config(json!({"classifier_pooling": "max", "classifier_bias": true})).unwrap();
    }
}
