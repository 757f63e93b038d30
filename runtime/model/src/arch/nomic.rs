//! Nomic BERT: BERT whose queries and keys are rotated in place of a table of positions, whose projections
//! have no biases, and whose feed-forward part is a SiLU times a second projection.

use super::encoder_family::{BERT, EncoderBlocks, EncoderFamily, rename};

pub(super) const NOMIC: EncoderFamily = EncoderFamily {
    model_type: "nomic_bert",
    // None with a head: it may read pairs, whose types are looked up by positions that a rotation reads too.
    classes: "NomicBertModel, NomicBertForMaskedLM, NomicBertForPreTraining",
    prefix: "nomic_bert.",
    renames: &[
        // Names of the published files.
        rename("bert.", ""),
        rename("emb_ln.", "embeddings.LayerNorm."),
        rename("encoder.layers.", "layers."),
        rename("attn.Wqkv.", "attention.self.joined."),
        rename("attn.out_proj.", "attention.output.dense."),
        rename("norm1.", "attention.output.LayerNorm."),
        rename("mlp.fc11.", "intermediate.dense."),
        rename("mlp.fc12.", "intermediate.gate."),
        rename("mlp.fc2.", "output.dense."),
        rename("norm2.", "output.LayerNorm."),
        // Those of the library's own class.
        rename("self_attn.q_proj.", "attention.self.query."),
        rename("self_attn.k_proj.", "attention.self.key."),
        rename("self_attn.v_proj.", "attention.self.value."),
        rename("self_attn.o_proj.", "attention.output.dense."),
        rename("post_attention_layernorm.", "attention.output.LayerNorm."),
        rename("mlp.up_proj.", "intermediate.dense."),
        rename("mlp.gate_proj.", "intermediate.gate."),
        rename("mlp.down_proj.", "output.dense."),
        rename("post_mlp_layernorm.", "output.LayerNorm."),
        rename("layers.", "encoder.layer."),
    ],
    unused: &["pooler.", "cls."],
    blocks: EncoderBlocks::Rotary,
    ..BERT
};

#[cfg(test)]
mod tests {
    use super::NOMIC;
    use crate::gguf::GgufValue;
    use crate::seeded::{SeededCheckpoint, SeededEncoderFamily};
    use crate::{Model, PlanRequest};
    use serde_json::{Value, json};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{DType, FusedOps, Limits, Pooling};

    fn checkpoint(keys: Value) -> SeededCheckpoint {
        let family = SeededEncoderFamily::Nomic;
        SeededCheckpoint { family, labels: 0, keys, ..SeededCheckpoint::default() }
    }

    fn load(checkpoint: &SeededCheckpoint) -> Result<Model, String> {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path()).unwrap();
        Model::load(folder.path(), &mut |_| {}).map_err(|error| error.to_string())
    }

    fn of_file(keys: &[(&str, GgufValue)]) -> Result<Model, String> {
        let file = checkpoint(json!({})).nomic_gguf(DType::F32, keys);
        Model::from_bytes(Path::new("nomic.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    fn dump(model: &Model) -> String {
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 0 };
        let request = PlanRequest { context_tokens: 12, limits, fused: FusedOps::NONE };
        model.plan(&request).unwrap().dump()
    }

    #[test]
    fn names_of_both_forms_become_those_of_bert() {
        for (names, wanted) in [
            (["emb_ln.bias", "embeddings.LayerNorm.bias"], "embeddings.LayerNorm.bias"),
            (
                ["bert.encoder.layers.3.attn.out_proj.weight", "nomic_bert.layers.3.self_attn.o_proj.weight"],
                "encoder.layer.3.attention.output.dense.weight",
            ),
            (
                ["encoder.layers.0.norm1.bias", "layers.0.post_attention_layernorm.bias"],
                "encoder.layer.0.attention.output.LayerNorm.bias",
            ),
            (
                ["encoder.layers.0.mlp.fc11.weight", "layers.0.mlp.up_proj.weight"],
                "encoder.layer.0.intermediate.dense.weight",
            ),
            (
                ["encoder.layers.0.mlp.fc2.weight", "layers.0.mlp.down_proj.weight"],
                "encoder.layer.0.output.dense.weight",
            ),
            (
                ["encoder.layers.0.norm2.bias", "layers.0.post_mlp_layernorm.bias"],
                "encoder.layer.0.output.LayerNorm.bias",
            ),
        ] {
            assert_eq!(names.map(|name| NOMIC.plain_name(name)), [wanted, wanted]);
        }
        let joined = NOMIC.plain_name("encoder.layers.0.attn.Wqkv.weight");
        assert_eq!(joined, "encoder.layer.0.attention.self.joined.weight");
    }

    #[test]
    fn queries_and_keys_are_rotated_and_the_feed_forward_part_is_gated() {
        let count = |dump: &str, op: &str| dump.lines().filter(|line| line.contains(op)).count();
        let embedder = dump(&load(&checkpoint(json!({}))).unwrap());
        assert_eq!((count(&embedder, " rope "), count(&embedder, " silu_mul ")), (4, 2), "{embedder}");
        assert!(embedder.contains("neox base 1000 dims 16/16"), "{embedder}");
        // The row of the first token type is the only one that is added.
        assert_eq!(count(&embedder, " add_row "), 1, "{embedder}");
        assert_eq!(count(&embedder, "embed_positions"), 0, "{embedder}");
        // Where the first row of a text is its vector, the first rows ask alone in the last layer. Their
        // position is 0, which no rotation changes.
        let mut first = checkpoint(json!({}));
        first.shape.pooling = Some(Pooling::Cls);
        let first = dump(&load(&first).unwrap());
        assert_eq!(count(&first, " rope "), 3, "{first}");
    }

    #[test]
    fn the_published_files_are_the_same_model() {
        let own = checkpoint(json!({}));
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in own.published_nomic() {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let published = Model::load(folder.path(), &mut |_| {}).unwrap();
        let own = load(&own).unwrap();
        let file = of_file(&[]).unwrap();
        for other in [&published, &file] {
            assert_eq!(dump(other), dump(&own));
            assert_eq!(other.facts().parameters, own.facts().parameters);
            for name in ["attention.self.query", "attention.self.value", "intermediate.gate"] {
                let row = |model: &Model| {
                    let id = model.weights().find(&format!("encoder.layer.1.{name}.weight")).unwrap();
                    let weight = model.weights().get(id);
                    let mut row = vec![0.0; weight.cols()];
                    weight.dequantise_row(5, &mut row);
                    row
                };
                assert_eq!(row(other), row(&own), "{name}");
            }
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        let cases = [
            (json!({"moe_every_n_layers": 2}), "key moe_every_n_layers is 2"),
            (json!({"activation_function": "gelu"}), "key activation_function is \"gelu\""),
            (json!({"hidden_act": "gelu"}), "key hidden_act is \"gelu\""),
            (json!({"rope_parameters": {"rope_theta": 10.0, "rope_type": "yarn"}}), "key rope_type is"),
            (json!({"rope_parameters": {"rope_type": "default"}}), "key rotary_emb_base: it is missing"),
            (json!({"head_dim": 8}), "key head_dim: 8 is not"),
            (json!({"position_bias": true}), "key position_bias is not part of nomic_bert"),
            (json!({"architectures": ["NomicBertForSequenceClassification"]}), "key architectures is"),
        ];
        for (keys, wanted) in cases {
            let error = load(&checkpoint(keys)).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
        let cases = [
            ("nomic-bert.expert_count", GgufValue::U32(8), "8 is not supported"),
            ("nomic-bert.rope.dimension_count", GgufValue::U32(8), "8 is not supported; only 16 is"),
            ("nomic-bert.rope.scaling.factor", GgufValue::F32(2.0), "is not part of the nomic-bert"),
            ("nomic-bert.rope.freq_base", GgufValue::F32(0.0), "0 is not a number above 0"),
            ("nomic-bert.pooling_type", GgufValue::U32(4), "key nomic-bert.pooling_type: 4 is not supported"),
        ];
        for (key, value, wanted) in cases {
            let error = of_file(&[(key, value)]).unwrap_err();
            assert!(error.contains(wanted), "{key}: {error}");
        }
    }
}
