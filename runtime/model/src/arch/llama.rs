//! Llama, and models whose files name it, such as SmolLM2, Mistral and Mixtral. Those of Mistral may have a
//! window in every layer, and Mixtral has experts.

use super::decoder::{EXPERTS, EXPERTS_USED, Family, LayerKinds, LayerPattern, WINDOW};
use trustformers_plan::RopeLayout;

/// Converters store queries and keys so that neighbouring elements rotate together.
pub(super) const FAMILY: Family = Family {
    rope: RopeLayout::Interleaved,
    data_layout: Some("Meta AI original pth"),
    honoured: &[EXPERTS, EXPERTS_USED, WINDOW],
    layers: |keys| LayerKinds::windowed(keys, LayerPattern::All),
    ..Family::PLAIN
};

#[cfg(test)]
mod tests {
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{DType, FusedOps, Limits};

    const TINY: SeededModel = SeededModel {
        family: SeededFamily::Llama,
        seed: 7,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        feed_forward: 16,
        context_tokens: 64,
        dtype: DType::F32,
        tied: false,
    };

    fn load(file: Vec<u8>) -> Result<Model, String> {
        Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    fn dump(fused: FusedOps) -> String {
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        load(TINY.gguf()).unwrap().plan(&PlanRequest { context_tokens: 32, limits, fused }).unwrap().dump()
    }

    #[test]
    fn the_plan_of_a_tiny_model() {
        insta::assert_snapshot!("tiny_llama", dump(FusedOps::default()));
        insta::assert_snapshot!(
            "tiny_llama_fused",
            dump(FusedOps { concat_matmul: true, add_epilogue: true, ..FusedOps::NONE })
        );
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let tied = load(SeededModel { tied: true, ..TINY }.gguf()).unwrap();
        assert!(tied.weights().find("output.weight").is_none());
        let untied = load(TINY.gguf()).unwrap();
        assert_eq!(untied.facts().parameters - tied.facts().parameters, (271 * 8) as u64);
    }

    /// The tiny model's file with something replaced in its bytes; both texts have one length.
    fn replaced(from: &str, to: &str) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut file = TINY.gguf();
        let at = file.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
        file
    }

    #[test]
    fn missing_and_unused_tensors_are_named() {
        let error = load(replaced("blk.0.ffn_gate.weight", "blk.0.ffn_gone.weight")).unwrap_err();
        assert!(
            error.starts_with("tiny.gguf: tensor blk.0.ffn_gate.weight: it is missing (16 x 8"),
            "{error}"
        );
        let mut file = GgufWriter::new();
        file.pair("general.architecture", &GgufValue::String("llama".to_owned()));
        let error = load(file.finish()).unwrap_err();
        assert!(error.contains("key llama.embedding_length is missing"), "{error}");
        // The optional head under another name is a tensor that nothing asks for.
        let mut file = TINY.gguf();
        let at = file.windows(13).rposition(|window| window == b"output.weight").unwrap();
        file[at..at + 13].copy_from_slice(b"outdoo.weight");
        let error = load(file).unwrap_err();
        assert!(error.starts_with("tiny.gguf: tensor outdoo.weight: it is not part of the llama"), "{error}");
    }

    /// A key of the tiny model, set to another count.
    fn with_count(key: &str, count: u32) -> Vec<u8> {
        let mut file = TINY.gguf();
        let at = file.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        let value = at + key.len() + 4;
        file[value..value + 4].copy_from_slice(&count.to_le_bytes());
        file
    }

    #[test]
    fn sizes_that_do_not_match_are_named() {
        let cases = [
            ("llama.embedding_length", 0, "llama.embedding_length: 0 is not between 1"),
            ("llama.embedding_length", 16, "tensor token_embd.weight: it is 271 x 8"),
            ("llama.feed_forward_length", 32, "tensor blk.0.ffn_gate.weight: it is 16 x 8"),
            ("llama.block_count", 2, "tensor blk.1.attn_norm.weight: it is missing"),
            ("llama.block_count", u32::MAX, "llama.block_count: 4294967295 is not between"),
            ("llama.attention.head_count_kv", 3, "3 does not divide the 2 of llama.attention.head_count"),
            ("llama.rope.dimension_count", 3, "llama.rope.dimension_count: 3 is odd"),
            ("llama.rope.dimension_count", 6, "llama.rope.dimension_count: 6 is odd or more"),
            ("llama.vocab_size", 5, "llama.vocab_size: 5 differs from the 271 rows"),
            ("llama.context_length", 0, "llama.context_length: 0 is not between 1"),
        ];
        for (key, count, expected) in cases {
            let error = load(with_count(key, count)).unwrap_err();
            assert!(error.starts_with("tiny.gguf: ") && error.contains(expected), "{error}");
        }
    }

    fn text(text: &str) -> GgufValue {
        GgufValue::String(text.to_owned())
    }

    fn with_key(key: &str, value: GgufValue) -> Result<Model, String> {
        load(TINY.gguf_with(&[(&format!("llama.{key}"), value)]))
    }

    #[test]
    fn unsupported_behaviour_is_refused_by_its_key() {
        let (number, count) = (GgufValue::F32, GgufValue::U32);
        let cases = [
            (
                "rope.scaling.type",
                text("dynamic"),
                "\"dynamic\" is not supported; supported: none, linear, yarn",
            ),
            ("rope.scaling.factor", number(4.0), "4 has no rope.scaling.type"),
            ("rope.scaling.attn_factor", number(0.5), "0.5 is not supported beside rope.scaling.type"),
            ("expert_shared_count", count(1), "1 is not supported; only 0 is"),
            ("pooling_type", count(4), "4 is not supported; 0 (none), 1 (mean), 2 (first) and 3 (last) are"),
            ("attention.causal", GgufValue::Bool(false), "false is not supported; only true is"),
            ("use_parallel_residual", GgufValue::Bool(true), "true is not supported; only false is"),
            ("attention.scale", number(0.1), "0.1 is not supported; only 0 is"),
            ("attention.clamp_kqv", number(8.0), "8 is not supported; only 0 is"),
            ("attn_logit_softcapping", number(50.0), "50 is not supported; only 0 is"),
            ("final_logit_softcapping", number(30.0), "30 is not supported; only 0 is"),
            ("logit_scale", number(8.0), "8 is not supported; only 1 is"),
            ("embedding_scale", number(12.0), "12 is not supported; only 1 is"),
            ("residual_scale", number(0.2), "0.2 is not supported; only 1 is"),
            ("tensor_data_layout", text("jploski"), "\"jploski\" is not supported"),
        ];
        for (key, value, expected) in cases {
            let error = with_key(key, value).unwrap_err();
            assert!(error.contains(&format!("key llama.{key}: {expected}")), "{error}");
        }
        let error = with_key("expert_count", count(8)).unwrap_err();
        assert!(error.contains("llama.expert_used_count: a number from 1 to the 8 of"), "{error}");
        let error =
            load(GgufWriter::new().pair("general.architecture", &text("mamba")).finish()).unwrap_err();
        // The list itself is in one place, so that a new architecture does not touch this file.
        let supported = crate::arch::supported();
        assert!(supported.split(", ").any(|name| name == "llama"), "{supported}");
        assert_eq!(
            error,
            format!("tiny.gguf: architecture \"mamba\" is not supported; supported: {supported}")
        );
    }

    #[test]
    fn unread_keys_of_the_architecture_are_refused() {
        let cases = [
            ("rope.freq_base_swa", GgufValue::F32(10_000.0)),
            ("rope.dimension_sections", GgufValue::Integers(vec![1, 1, 2, 0])),
            ("rope.scaling.yarn_log_multiplier", GgufValue::F32(0.1)),
            ("rope.scaling.yarn_ext_factor", GgufValue::F32(1.0)),
            ("attention.sliding_window_pattern", GgufValue::U32(6)),
            ("swin_norm", GgufValue::Bool(false)),
        ];
        for (key, value) in cases {
            let error = with_key(key, value).unwrap_err();
            assert!(
                error.contains(&format!("key llama.{key} is not part of the llama architecture")),
                "{error}"
            );
        }
    }

    #[test]
    fn windows_and_scaled_rotations_are_in_the_plan() {
        let model = load(TINY.gguf_with(&[
            ("llama.attention.sliding_window", GgufValue::U32(24)),
            ("llama.rope.scaling.type", text("yarn")),
            ("llama.rope.scaling.factor", GgufValue::F32(4.0)),
            ("llama.rope.scaling.original_context_length", GgufValue::U32(16)),
        ]));
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::NONE };
        let dump = model.unwrap().plan(&request).unwrap().dump();
        assert!(dump.contains("frequencies rope.frequencies magnitude 1.138"), "{dump}");
        assert!(dump.contains(" window 24"), "{dump}");
        let error = with_key("rope.scaling.type", text("yarn")).unwrap_err();
        assert!(error.contains("key llama.rope.scaling.original_context_length is missing"), "{error}");
    }

    #[test]
    fn keys_without_an_effect_load() {
        let cases = [
            ("attention.sliding_window", GgufValue::U32(0)),
            ("rope.scaling.original_context_length", GgufValue::U32(64)),
            ("rope.scaling.finetuned", GgufValue::Bool(false)),
            ("rope.scaling.factor", GgufValue::F32(1.0)),
            ("attention.causal", GgufValue::Bool(true)),
            ("expert_count", GgufValue::U32(0)),
            ("tensor_data_layout", text("Meta AI original pth")),
        ];
        for (key, value) in cases {
            with_key(key, value).unwrap();
        }
        // Keys of other groups and of other architectures are none of this one's.
        load(TINY.gguf_with(&[("custom.key", GgufValue::U32(1)), ("llamas.key", GgufValue::U32(1))]))
            .unwrap();
    }
}
