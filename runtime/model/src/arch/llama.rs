//! Llama, and models that say so, such as SmolLM2.

use super::Architecture;
use super::decoder::{self, Family};
use super::tensors::TensorFinder;
use crate::gguf::{GgufProblem, Metadata};
use trustformers_plan::RopeLayout;

/// Converters store queries and keys so that neighbours turn together.
const FAMILY: Family = Family { name: "llama", rope: RopeLayout::Interleaved, qkv_bias: false };

/// Reads sizes and tensors from a file that says it is a Llama.
pub(super) fn resolve(
    meta: &Metadata,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    decoder::resolve(&FAMILY, meta, tensors)
}

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
    fn missing_and_foreign_tensors_are_named() {
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
    fn sizes_that_do_not_fit_are_named() {
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

    #[test]
    fn behaviour_that_is_not_built_is_refused_by_its_key() {
        let text = |t: &str| GgufValue::String(t.to_owned());
        let cases = [
            ("llama.rope.scaling.type", text("yarn"), "\"yarn\" is not supported"),
            ("llama.rope.scaling.factor", GgufValue::F32(4.0), "4 is not supported"),
            ("llama.expert_count", GgufValue::U32(8), "8 is not supported"),
        ];
        for (key, value, expected) in cases {
            let mut file = GgufWriter::new();
            file.pair("general.architecture", &text("llama")).pair(key, &value);
            let error = load(file.finish()).unwrap_err();
            assert!(error.contains(key) && error.contains(expected), "{error}");
        }
        let mut other = GgufWriter::new();
        other.pair("general.architecture", &text("mamba"));
        let error = load(other.finish()).unwrap_err();
        assert_eq!(error, "tiny.gguf: architecture \"mamba\" is not supported; supported: llama, qwen2");
    }
}
