//! What of PEFT's files is read, and what is refused.

use super::*;
use crate::seeded::{SeededAdapter, SeededFamily, SeededModel};
use serde_json::json;
use std::path::Path;

fn load(family: SeededFamily) -> Model {
    let file = SeededModel { family, ..SeededModel::default() }.gguf();
    Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap()
}

/// Writes an adapter, with keys of its configuration added or replaced, and reads it.
fn read_with(adapter: &SeededAdapter, keys: &Value, family: SeededFamily) -> Result<Adapter, String> {
    let folder = tempfile::tempdir().unwrap();
    adapter.write(folder.path()).unwrap();
    let path = folder.path().join(CONFIG);
    let mut config: serde_json::Map<String, Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.extend(keys.as_object().unwrap().clone());
    std::fs::write(path, Value::Object(config).to_string()).unwrap();
    let files = CheckpointFiles::of_folder(folder.path()).unwrap();
    load(family).read_adapter("a", &files).map_err(|error| error.to_string())
}

fn read(keys: &Value) -> Result<Adapter, String> {
    read_with(&SeededAdapter::of(SeededModel::default(), 5), keys, SeededFamily::Llama)
}

#[test]
fn every_projection_of_an_adapter_is_read() {
    let adapter = read(&json!({})).unwrap();
    assert_eq!((adapter.changes.len(), adapter.rank()), (2 * 7, 4));
    let change =
        &adapter.changes[&load(SeededFamily::Llama).weights().find("blk.1.ffn_down.weight").unwrap()];
    assert_eq!((change.down.len(), change.up.len()), (4 * 128, 64 * 4));
    assert!((change.scale - 2.0).abs() < 1e-6, "alpha 8 over rank 4");
}

#[test]
fn a_stabilised_scale_divides_by_the_root_of_the_rank() {
    let adapter = SeededAdapter { stabilised: true, ..SeededAdapter::of(SeededModel::default(), 5) };
    let adapter = read_with(&adapter, &json!({}), SeededFamily::Llama).unwrap();
    assert!(adapter.changes.values().all(|change| (change.scale - 4.0).abs() < 1e-6), "8 over the root of 4");
}

#[test]
fn queries_and_keys_are_stored_in_the_order_of_the_file() {
    let up_of = |family, part: &str| {
        let adapter = read_with(&SeededAdapter::of(SeededModel::default(), 5), &json!({}), family).unwrap();
        let id = load(family).weights().find(&format!("blk.0.{part}.weight")).unwrap();
        adapter.changes[&id].up.clone()
    };
    // A Qwen's file has the order of transformers, a Llama's has the halves of each head element by element.
    for part in ["attn_q", "attn_k"] {
        let (plain, paired) = (up_of(SeededFamily::Qwen2, part), up_of(SeededFamily::Llama, part));
        let row = |values: &[f32], at: usize| values[at * 4..(at + 1) * 4].to_vec();
        for (stored, original) in [(0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24)] {
            assert_eq!(row(&paired, stored), row(&plain, original), "{part}, row {stored}");
        }
    }
    for part in ["attn_v", "attn_output", "ffn_up"] {
        assert_eq!(up_of(SeededFamily::Qwen2, part), up_of(SeededFamily::Llama, part), "{part}");
    }
}

#[test]
fn what_peft_writes_by_default_is_read() {
    let keys = json!({
        "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "org/name", "bias": "none",
        "corda_config": null, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
        "inference_mode": true, "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.05,
        "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
        "qalora_group_size": 16, "rank_pattern": {}, "revision": null, "target_parameters": null,
        "trainable_token_indices": null, "use_dora": false, "use_qalora": false, "a_key_of_tomorrow": null
    });
    assert_eq!(read(&keys).unwrap(), read(&json!({})).unwrap());
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    for (keys, message) in [
        (json!({"use_dora": true}), "key use_dora is true"),
        (json!({"bias": "all"}), "key bias is \"all\""),
        (json!({"lora_bias": true}), "key lora_bias is true"),
        (json!({"modules_to_save": ["lm_head"]}), "key modules_to_save is [\"lm_head\"]"),
        (json!({"alpha_pattern": {"q_proj": 3}}), "key alpha_pattern"),
        (json!({"layer_replication": [[0, 1]]}), "key layer_replication"),
        (json!({"a_key_of_tomorrow": 3}), "key a_key_of_tomorrow is 3"),
        (json!({"init_lora_weights": "pissa"}), "key init_lora_weights is pissa"),
        (json!({"peft_type": "LOHA"}), "key peft_type is \"LOHA\""),
        (json!({"task_type": "SEQ_CLS"}), "key task_type is SEQ_CLS"),
        (json!({"r": 0}), "key r: it must be a whole number"),
        (json!({"lora_alpha": "much"}), "key lora_alpha: it must be a number"),
        (json!({"r": 8}), "it has rank 4, and r is 8"),
    ] {
        let error = read(&keys).unwrap_err();
        assert!(error.contains(message), "{keys}: {error}");
    }
    // Ranks that differ are those of the tensors.
    assert!(read(&json!({"r": 8, "rank_pattern": {".*": 4}})).is_ok());
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let other = SeededModel { feed_forward: 64, ..SeededModel::default() };
    let error = read_with(&SeededAdapter::of(other, 5), &json!({}), SeededFamily::Llama).unwrap_err();
    assert!(error.contains("mlp.down_proj.lora_A.weight: it is 4 x 64"), "{error}");
    let deeper = SeededModel { layers: 3, ..SeededModel::default() };
    let error = read_with(&SeededAdapter::of(deeper, 5), &json!({}), SeededFamily::Llama).unwrap_err();
    assert!(error.contains("the model has no projection model.layers.2"), "{error}");
}

#[test]
fn a_folder_without_an_adapter_says_what_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::of_folder(folder.path()).unwrap();
    let error = load(SeededFamily::Llama).read_adapter("a", &files).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json: it is missing"), "{error}");
}
