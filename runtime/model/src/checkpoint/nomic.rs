//! `config.json` of a Nomic BERT, in the form in which the models were published and in the library's own,
//! under the keys of BERT. Every key is read, without effect on answers, or refused by name.

use super::encoder_checks::{OnlyValue, check_only, check_unread};
use super::{BertConfig, CheckpointProblem};
use serde_json::Value;
use std::collections::BTreeMap;

type NomicKeys = BTreeMap<String, Value>;

const MODEL_TYPE: &str = "nomic_bert";

/// A key that the published form has and the library's own has not.
const PUBLISHED: &str = "n_embd";

/// Numbers of the published form, with their keys in the library's own.
const NAMES: [(&str, &str); 5] = [
    (PUBLISHED, "hidden_size"),
    ("n_layer", "num_hidden_layers"),
    ("n_head", "num_attention_heads"),
    ("n_inner", "intermediate_size"),
    ("layer_norm_epsilon", "layer_norm_eps"),
];

/// Keys with the only value, as JSON, that is computed.
const ONLY: [OnlyValue; 17] = [
    ("moe_every_n_layers", "0"),
    ("num_experts", "0"),
    ("activation_function", "\"swiglu\""),
    ("rotary_emb_fraction", "1.0"),
    ("rotary_emb_interleaved", "false"),
    ("rotary_emb_scale_base", "null"),
    ("qkv_proj_bias", "false"),
    ("mlp_fc1_bias", "false"),
    ("mlp_fc2_bias", "false"),
    ("prenorm", "false"),
    ("parallel_block", "false"),
    ("parallel_block_tied_norm", "false"),
    ("use_rms_norm", "false"),
    ("causal", "false"),
    ("scale_attn_weights", "true"),
    ("is_decoder", "false"),
    ("add_cross_attention", "false"),
];

/// Those of them that the published form must have: left out, they stand for another value.
const STATED: [&str; 5] =
    ["activation_function", "rotary_emb_fraction", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"];

/// Keys that are read.
const READ: [&str; 16] = [
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
    "hidden_act",
    "head_dim",
    "type_vocab_size",
    "vocab_size",
    "pad_vocab_size_multiple",
    "rope_parameters",
    "rotary_emb_base",
    "max_position_embeddings",
    "n_positions",
    "max_trained_positions",
];

/// Keys that no answer depends on: training, other tasks, names, how other programs compute, and those that
/// `HeadConfig` reads. The factor for texts longer than those of the training is one of them: such texts
/// are cut.
const HARMLESS: [&str; 45] = [
    "_name_or_path",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "dense_seq_output",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "export_model_type",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "return_dict",
    "rotary_scaling_factor",
    "sbert_ce_default_activation_function",
    "scale_attn_by_inverse_layer_idx",
    "sentence_transformers",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
    "use_flash_attn",
    "use_xentropy",
];

/// Positions of the training where the published form does not say it.
const TRAINED: u64 = 2048;

/// The configuration under the keys of BERT.
pub(crate) fn nomic_config(mut keys: NomicKeys) -> Result<BertConfig, CheckpointProblem> {
    check_only(&keys, ONLY)?;
    check_unread(&keys, MODEL_TYPE, |key| {
        let is_named = ONLY.iter().chain(&NAMES).any(|(own, _)| *own == key);
        is_named || READ.contains(&key) || HARMLESS.contains(&key)
    })?;
    let published = keys.contains_key(PUBLISHED);
    if let Some(key) = STATED.into_iter().find(|key| published && !keys.contains_key(*key)) {
        let why = "it is missing, and what the model computes without it is not supported".to_owned();
        return Err(CheckpointProblem::Malformed { key, why });
    }
    for (key, own) in NAMES {
        join(&mut keys, key, own)?;
    }
    if published {
        keys.entry("hidden_act".to_owned()).or_insert_with(|| "silu".into());
    }
    let base = rotation_base(&mut keys)?;
    keys.insert("rotary_emb_base".to_owned(), base);
    // Longer texts than those of the training would need another rotation.
    let trained = number(&keys, "max_trained_positions")?.or(published.then_some(TRAINED));
    let stated = [number(&keys, "max_position_embeddings")?, number(&keys, "n_positions")?, trained];
    if let Some(positions) = stated.into_iter().flatten().min() {
        keys.insert("max_position_embeddings".to_owned(), positions.into());
    }
    if let (Some(rows), Some(multiple)) =
        (number(&keys, "vocab_size")?, number(&keys, "pad_vocab_size_multiple")?)
    {
        let rows = rows.checked_next_multiple_of(multiple).unwrap_or(rows);
        keys.insert("vocab_size".to_owned(), rows.into());
    }
    let head_dim = number(&keys, "head_dim")?;
    let config: BertConfig = serde_json::from_value(Value::Object(keys.into_iter().collect()))
        .map_err(|error| CheckpointProblem::Json(error.to_string()))?;
    let own = config.hidden_size.checked_div(config.num_attention_heads);
    match head_dim.filter(|found| own.is_some_and(|own| own as u64 != *found)) {
        None => Ok(config),
        Some(found) => {
            let why = format!("{found} is not hidden_size divided by num_attention_heads");
            Err(CheckpointProblem::Malformed { key: "head_dim", why })
        }
    }
}

/// Brings a number under the key that BERT has for it. Files that the library wrote anew may have both keys.
fn join(keys: &mut NomicKeys, key: &'static str, own: &str) -> Result<(), CheckpointProblem> {
    let Some(value) = keys.remove(key) else { return Ok(()) };
    if let Some(other) = keys.get(own).filter(|other| other.as_f64() != value.as_f64()) {
        let why = format!("{value} is not the {other} of {own}");
        return Err(CheckpointProblem::Malformed { key, why });
    }
    keys.insert(own.to_owned(), value);
    Ok(())
}

/// The base of the rotation, from either form. Dynamic scaling begins with texts that are longer than the
/// positions, which none is here.
fn rotation_base(keys: &mut NomicKeys) -> Result<Value, CheckpointProblem> {
    let rotation = keys.remove("rope_parameters").unwrap_or_default();
    for (key, value) in rotation.as_object().into_iter().flatten() {
        match (key.as_str(), value.as_str()) {
            ("rope_theta" | "factor", _) | ("rope_type", Some("default" | "dynamic")) => {}
            ("rope_type", _) => {
                let supported = "\"default\", \"dynamic\"";
                return Err(CheckpointProblem::unsupported("rope_type", value.to_string(), supported));
            }
            _ => {
                let (key, model_type) = (key.clone(), "rope_parameters".to_owned());
                return Err(CheckpointProblem::UnreadConfigKey { key, model_type });
            }
        }
    }
    let wrong = |why: String| Err(CheckpointProblem::Malformed { key: "rotary_emb_base", why });
    match (keys.get("rotary_emb_base"), rotation.get("rope_theta")) {
        (Some(base), Some(other)) if base.as_f64() != other.as_f64() => {
            wrong(format!("{base} is not the {other} of rope_theta in rope_parameters"))
        }
        (Some(base), _) | (None, Some(base)) => Ok(base.clone()),
        (None, None) => wrong("it is missing, and so is rope_theta in rope_parameters".to_owned()),
    }
}

/// A whole number that may be left out.
fn number(keys: &NomicKeys, key: &'static str) -> Result<Option<u64>, CheckpointProblem> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| CheckpointProblem::Malformed {
            key,
            why: format!("{value} is not a whole number"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::encoder_family;
    use serde_json::json;

    /// The configuration of nomic-embed-text-v1.5, smaller, with these changes; keys with null are left out.
    fn published(changes: &Value) -> NomicKeys {
        let config = json!({
            "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
            "causal": false, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": false,
            "mlp_fc2_bias": false, "model_type": "nomic_bert", "n_embd": 32, "n_head": 4, "n_inner": 64,
            "n_layer": 2, "n_positions": 8192, "pad_vocab_size_multiple": 64, "parallel_block": false,
            "prenorm": false, "qkv_proj_bias": false, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": false, "rotary_emb_scale_base": null, "rotary_scaling_factor": 2,
            "scale_attn_weights": true, "type_vocab_size": 2, "use_rms_norm": false, "vocab_size": 100,
        });
        let of = |value: &Value| value.as_object().unwrap().clone();
        let mut keys: NomicKeys = of(&config).into_iter().collect();
        for (key, value) in of(changes) {
            if value.is_null() {
                keys.remove(&key);
            } else {
                keys.insert(key, value);
            }
        }
        keys
    }

    fn read(keys: NomicKeys) -> Result<BertConfig, String> {
        let family = encoder_family::of_model_type(MODEL_TYPE).unwrap();
        let config = nomic_config(keys).map_err(|problem| problem.to_string())?;
        config.check(family).map_err(|problem| problem.to_string())?;
        Ok(config)
    }

    #[test]
    fn both_forms_become_the_keys_of_bert() {
        let config = read(published(&json!({}))).unwrap();
        assert_eq!((config.hidden_size, config.num_hidden_layers, config.num_attention_heads), (32, 2, 4));
        assert_eq!((config.intermediate_size, config.vocab_size), (64, 128));
        assert_eq!((config.max_position_embeddings, config.rope_base()), (2048, Some(1000.0)));
        let positions = |changes: Value| read(published(&changes)).unwrap().max_position_embeddings;
        assert_eq!(positions(json!({"n_positions": 512})), 512);
        assert_eq!(positions(json!({"max_trained_positions": 4096})), 4096);
        assert_eq!(positions(json!({"max_trained_positions": null})), 2048);
        // As the library writes a published configuration anew.
        let rotation = json!({"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0});
        let both = json!({
            "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "hidden_act": "silu", "layer_norm_eps": 1e-12,
            "max_position_embeddings": 2048, "rope_parameters": rotation,
        });
        assert_eq!(positions(both), 2048);
    }

    #[test]
    fn what_differs_or_is_missing_is_refused_by_its_key() {
        let cases = [
            (json!({"hidden_size": 64}), "key n_embd: 32 is not the 64 of hidden_size"),
            (json!({"qkv_proj_bias": null}), "key qkv_proj_bias: it is missing"),
            (json!({"rotary_emb_fraction": null}), "key rotary_emb_fraction: it is missing"),
            (json!({"rotary_emb_fraction": 0.5}), "key rotary_emb_fraction is 0.5"),
            (json!({"rotary_emb_interleaved": true}), "key rotary_emb_interleaved is true"),
            (json!({"prenorm": true}), "key prenorm is true"),
            (json!({"use_rms_norm": true}), "key use_rms_norm is true"),
            (json!({"mlp_fc1_bias": true}), "key mlp_fc1_bias is true"),
            (json!({"activation_function": "gelu"}), "key activation_function is \"gelu\""),
            (json!({"moe_every_n_layers": 2}), "key moe_every_n_layers is 2"),
            (json!({"num_experts": 8}), "key num_experts is 8"),
            (json!({"moe_top_k": 2}), "key moe_top_k is not part of nomic_bert"),
            (json!({"rope_parameters": {"rope_theta": 10.0}}), "key rotary_emb_base: 1000 is not the 10.0"),
            (json!({"rope_parameters": {"beta": 1}}), "key beta is not part of rope_parameters"),
            (json!({"rotary_emb_base": 0}), "key rotary_emb_base: 0 is not a number above 0"),
            (json!({"n_head": 32}), "key num_attention_heads: 32 does not divide the 32"),
            (json!({"n_positions": "long"}), "key n_positions: \"long\" is not a whole number"),
        ];
        for (changes, wanted) in cases {
            let error = read(published(&changes)).unwrap_err();
            assert!(error.starts_with(wanted), "{error}");
        }
    }
}
