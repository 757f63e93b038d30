//! Tiny checkpoints through the loader: values that are read, refusals, and the plan.

use crate::seeded::SeededEncoder;
use crate::{CheckpointFiles, Model, PlanRequest};
use std::ops::ControlFlow;
use std::path::Path;
use trustformers_plan::{DType, FusedOps, Limits, Pooling};
use trustformers_proto::Task;

const TINY: SeededEncoder = SeededEncoder {
    seed: 7,
    layers: 1,
    heads: 2,
    head_dim: 4,
    feed_forward: 16,
    positions: 24,
    max_tokens: Some(16),
    pooling: Some(Pooling::Mean),
    normalised: true,
    dtype: DType::F32,
};

/// Writes the checkpoint, lets `change` at its folder, and loads it.
fn load(encoder: SeededEncoder, change: impl Fn(&Path)) -> Result<Model, String> {
    let folder = tempfile::tempdir().unwrap();
    encoder.write(folder.path()).unwrap();
    change(folder.path());
    Model::load(folder.path(), &mut |_| {}).map_err(|error| {
        assert!(!error.is_transient(), "{error}");
        error.to_string().replace(&format!("{}/", folder.path().display()), "")
    })
}

fn dump(fused: FusedOps) -> String {
    let limits = Limits { rows: 8, sequences: 2, logits_rows: 0 };
    let model = load(TINY, |_| {}).unwrap();
    model.plan(&PlanRequest { context_tokens: 12, limits, fused }).unwrap().dump()
}

#[test]
fn the_plan_of_a_tiny_model() {
    insta::assert_snapshot!("tiny_bert", dump(FusedOps::NONE));
    insta::assert_snapshot!("tiny_bert_fused", dump(FusedOps::ALL));
}

#[test]
fn facts_describe_the_embedding() {
    let model = load(TINY, |_| {}).unwrap();
    let facts = model.facts();
    assert_eq!((model.task(), facts.architecture.as_str(), facts.context_tokens), (Task::Embed, "bert", 16));
    let embedding = facts.embedding.as_ref().unwrap();
    assert_eq!((embedding.width, embedding.max_tokens), (8, 16));
    assert_eq!((embedding.pooling, embedding.normalised), (Pooling::Mean, true));
    assert_eq!(embedding.pooling_note, None);
    let vocabulary = facts.vocabulary as u64;
    let (dense, inner) = (8 * 8 + 8, 8 * 16);
    let layer = 4 * dense + 2 * inner + 16 + 8 + 2 * 16;
    assert_eq!(facts.parameters, vocabulary * 8 + 24 * 8 + 8 + 16 + layer);
    let text = "the cat ".repeat(20);
    let encoded = model.encode(&text).unwrap();
    assert_eq!((encoded.ids.len(), encoded.cut), (16, true));
}

#[test]
fn pooling_is_read_or_defaults_to_the_mean() {
    for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max, Pooling::Last] {
        let encoder = SeededEncoder { pooling: Some(pooling), normalised: false, ..TINY };
        let facts = load(encoder, |_| {}).unwrap().facts().clone();
        let embedding = facts.embedding.unwrap();
        assert_eq!((embedding.pooling, embedding.normalised), (pooling, false));
    }
    let plain = SeededEncoder { pooling: None, max_tokens: None, ..TINY };
    let embedding = load(plain, |_| {}).unwrap().facts().embedding.clone().unwrap();
    assert_eq!((embedding.pooling, embedding.normalised, embedding.max_tokens), (Pooling::Mean, false, 24));
    assert!(embedding.pooling_note.unwrap().contains("the mean over the text's tokens is used"));
}

#[test]
fn half_precision_loads() {
    for dtype in [DType::F16, DType::BF16] {
        let model = load(SeededEncoder { dtype, ..TINY }, |_| {}).unwrap();
        assert!(model.weights().iter().all(|(_, weight)| weight.dtype() == dtype));
    }
}

/// Changes one key of a JSON file.
fn set(folder: &Path, file: &str, key: &str, value: serde_json::Value) {
    let path = folder.join(file);
    let mut content: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    content[key] = value;
    std::fs::write(path, content.to_string()).unwrap();
}

#[test]
fn unsupported_behaviour_is_refused_by_its_key() {
    let cases: [(&str, serde_json::Value, &str); 11] = [
        ("model_type", "deberta".into(), "config.json: architecture \"deberta\" is not supported"),
        ("architectures", serde_json::json!(["BertForQuestionAnswering"]), "key architectures is"),
        (
            "hidden_act",
            "relu".into(),
            "key hidden_act is \"relu\", which is not supported; supported: \"gelu\"",
        ),
        ("position_embedding_type", "relative_key".into(), "key position_embedding_type is \"relative_key\""),
        ("is_decoder", true.into(), "key is_decoder is true"),
        ("add_cross_attention", true.into(), "key add_cross_attention is true"),
        ("num_attention_heads", 3.into(), "key num_attention_heads: 3 does not divide the 8 of hidden_size"),
        ("num_hidden_layers", 0.into(), "key num_hidden_layers: 0 is not between 1"),
        ("num_hidden_layers", 2.into(), "tensor encoder.layer.1.attention.self.query.weight: it is missing"),
        ("vocab_size", 5.into(), "key model.vocab: ids up to"),
        ("type_vocab_size", 1.into(), "tensor embeddings.token_type_embeddings.weight: it is 2 x 8"),
    ];
    for (key, value, expected) in cases {
        let error = load(TINY, |folder| set(folder, "config.json", key, value.clone())).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let positions = load(TINY, |folder| set(folder, "sentence_bert_config.json", "max_seq_length", 2.into()));
    assert!(positions.unwrap_err().contains("a text may have 2 tokens"));
}

#[test]
fn unsupported_poolings_are_refused() {
    let cases = [
        ("pooling_mode_mean_tokens", false, "key pooling_mode is \"none\""),
        ("pooling_mode_cls_token", true, "key pooling_mode is cls and mean"),
    ];
    for (key, value, expected) in cases {
        let error = load(TINY, |folder| set(folder, "1_Pooling/config.json", key, value.into())).unwrap_err();
        assert!(error.starts_with("1_Pooling/config.json: ") && error.contains(expected), "{error}");
    }
    let weighted = load(TINY, |folder| {
        set(folder, "1_Pooling/config.json", "pooling_mode_mean_tokens", false.into());
        set(folder, "1_Pooling/config.json", "pooling_mode_weightedmean_tokens", true.into());
    });
    assert!(weighted.unwrap_err().contains("key pooling_mode is \"weightedmean\""));
    let dense = load(TINY, |folder| {
        let modules = std::fs::read_to_string(folder.join("modules.json")).unwrap();
        std::fs::write(folder.join("modules.json"), modules.replace("Normalize", "Dense")).unwrap();
    });
    assert!(dense.unwrap_err().contains("key type is Dense at place 2, which is not supported"));
}

#[test]
fn prefixed_names_and_old_norm_names_load() {
    let plain = load(TINY, |_| {}).unwrap();
    let renamed = load(TINY, |folder| {
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let other = |name: String| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
            format!("bert.{}", name.replace("LayerNorm.bias", "LayerNorm.beta"))
        };
        let head = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &[0; 8]).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| (other(name), view));
        let tensors = tensors.chain([("cls.predictions.bias".to_owned(), head)]);
        let changed = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(path, changed).unwrap();
    })
    .unwrap();
    let names = |model: &Model| -> Vec<String> {
        let mut names: Vec<String> = model.weights().iter().map(|(_, w)| w.name().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&plain), names(&renamed));
}

/// Writes the file of weights again with a buffer of integers beside them.
fn add_buffer(folder: &Path, prefix: &str, name: &str) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let zeros = [0; 8 * 24];
    let buffer = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![1, 24], &zeros).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| (format!("{prefix}{name}"), view));
    let tensors = tensors.chain([(format!("{prefix}{name}"), buffer)]);
    let changed = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(path, changed).unwrap();
}

#[test]
fn integer_buffers_are_ignored() {
    for prefix in ["", "bert."] {
        for name in ["embeddings.position_ids", "embeddings.token_type_ids"] {
            let model = load(TINY, |folder| add_buffer(folder, prefix, name)).unwrap();
            assert_eq!(model.weights().len(), load(TINY, |_| {}).unwrap().weights().len(), "{prefix}{name}");
        }
    }
    let error = load(TINY, |folder| add_buffer(folder, "bert.", "embeddings.other_ids")).unwrap_err();
    assert!(error.contains("bert.embeddings.other_ids: it is stored as I64"), "{error}");
}

fn write_json(folder: &Path, file: &str, value: &serde_json::Value) {
    std::fs::write(folder.join(file), value.to_string()).unwrap();
}

#[test]
fn the_default_prompt_is_put_before_texts() {
    let prompts = serde_json::json!({
        "prompts": {"query": "the cat: ", "document": ""}, "default_prompt_name": "query", "similarity_fn_name": null,
    });
    let name = "config_sentence_transformers.json";
    let plain = load(TINY, |_| {}).unwrap();
    let prompted = load(TINY, |folder| write_json(folder, name, &prompts)).unwrap();
    assert_eq!(prompted.encode("hello").unwrap(), plain.encode("the cat: hello").unwrap());
    assert_eq!(prompted.facts().embedding.as_ref().unwrap().prompt, "the cat: ");
    let unset = serde_json::json!({"prompts": {"query": "the cat: "}, "default_prompt_name": null});
    let unset = load(TINY, |folder| write_json(folder, name, &unset)).unwrap();
    assert_eq!(unset.encode("hello").unwrap(), plain.encode("hello").unwrap());
    let unknown = serde_json::json!({"prompts": {"query": "x"}, "default_prompt_name": "passage"});
    let error = load(TINY, |folder| write_json(folder, name, &unknown)).unwrap_err();
    assert!(error.contains("default_prompt_name: \"passage\" is not a name in prompts"), "{error}");
    let error = load(TINY, |folder| {
        write_json(folder, name, &prompts);
        set(folder, "1_Pooling/config.json", "include_prompt", false.into());
    });
    assert!(error.unwrap_err().contains("key include_prompt is false"));
}

#[test]
fn nulls_and_python_numbers_in_json_are_read() {
    let unset = ["architectures", "is_decoder", "use_cache", "hidden_act"];
    for key in unset {
        load(TINY, |folder| set(folder, "config.json", key, serde_json::Value::Null)).unwrap();
    }
    let replaced = |from: &'static str, to: &'static str| {
        load(TINY, |folder| {
            let path = folder.join("config.json");
            let config = std::fs::read_to_string(&path).unwrap();
            assert!(config.contains(from), "{config}");
            std::fs::write(path, config.replace(from, to)).unwrap();
        })
    };
    replaced("\"hidden_act\"", "\"hidden_dropout_prob\": NaN, \"hidden_act\"").unwrap();
    let error = replaced("1e-12", "NaN").unwrap_err();
    assert!(error.contains("config.json") && error.contains("NaN"), "{error}");
}

#[test]
fn foreign_files_are_named_in_place_of_their_format() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n";
    for name in ["model.safetensors", "tokenizer.json", "config.json", "modules.json"] {
        let error = load(TINY, |folder| std::fs::write(folder.join(name), pointer).unwrap()).unwrap_err();
        assert!(error.starts_with(&format!("{name}: it is a Git LFS pointer")), "{error}");
        let page = "<!DOCTYPE html><html></html>";
        let error = load(TINY, |folder| std::fs::write(folder.join(name), page).unwrap()).unwrap_err();
        assert!(error.starts_with(&format!("{name}: it is a web page")), "{error}");
        let answer = r#"{"error": "Repository not found"}"#;
        let error = load(TINY, |folder| std::fs::write(folder.join(name), answer).unwrap()).unwrap_err();
        assert!(error.contains("a server's error in JSON (\"Repository not found\")"), "{error}");
    }
}

#[test]
fn files_of_text_have_a_bounded_size() {
    let error = load(TINY, |folder| {
        let file = std::fs::File::create(folder.join("config.json")).unwrap();
        file.set_len(1 << 40).unwrap();
    });
    assert!(error.unwrap_err().contains("config.json: it has 1099511627776 bytes; at most"));
}

#[test]
fn only_selected_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    TINY.write(folder.path()).unwrap();
    let pick = |names: &[&str]| {
        let files = names.iter().map(|name| ((*name).to_owned(), folder.path().join(name)));
        Model::load_checkpoint_while(&CheckpointFiles::new(folder.path(), files), &mut |_| {
            ControlFlow::Continue(())
        })
    };
    let bare = pick(&["config.json", "model.safetensors", "tokenizer.json"]).unwrap();
    assert!(bare.facts().embedding.as_ref().unwrap().pooling_note.is_some());
    let error = pick(&["config.json", "model.safetensors"]).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: it is missing"), "{error}");
    let error = pick(&["config.json", "model.safetensors", "tokenizer.json", "modules.json"]).unwrap_err();
    assert!(error.to_string().contains("1_Pooling/config.json: it is missing"), "{error}");
}
