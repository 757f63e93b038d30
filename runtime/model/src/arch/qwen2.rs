//! Qwen2 and Qwen2.5: a Llama whose queries, keys and values have biases, and whose heads rotate their two
//! halves against each other.

use super::decoder::Family;

/// Converters store queries and keys as they were trained.
pub(super) const FAMILY: Family = Family { qkv_bias: true, ..Family::PLAIN };

#[cfg(test)]
mod tests {
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{DType, FusedOps, Limits};

    const TINY: SeededModel = SeededModel {
        family: SeededFamily::Qwen2,
        seed: 7,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        feed_forward: 16,
        context_tokens: 64,
        dtype: DType::F32,
        tied: true,
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
        insta::assert_snapshot!("tiny_qwen2", dump(FusedOps::NONE));
        insta::assert_snapshot!("tiny_qwen2_fused", dump(FusedOps::ALL));
    }

    #[test]
    fn tied_heads_and_biases_count_as_parameters() {
        let (tied, untied) =
            (load(TINY.gguf()).unwrap(), load(SeededModel { tied: false, ..TINY }.gguf()).unwrap());
        assert_eq!(untied.facts().parameters - tied.facts().parameters, (271 * 8) as u64);
        let llama = load(SeededModel { family: SeededFamily::Llama, ..TINY }.gguf()).unwrap();
        assert_eq!(tied.facts().parameters - llama.facts().parameters, (8 + 4 + 4) as u64);
        assert_eq!(tied.facts().architecture, "qwen2");
    }

    #[test]
    fn queries_keys_and_values_may_lie_in_one_tensor() {
        for dtype in [DType::F32, DType::Q8_0] {
            let tiny = SeededModel { dtype, head_dim: 16, feed_forward: 32, ..TINY };
            let (apart, joined) = (load(tiny.gguf()).unwrap(), load(tiny.gguf_with_joined_qkv()).unwrap());
            assert_eq!(joined.facts().parameters, apart.facts().parameters);
            let dump = |model: &Model| {
                let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
                let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::ALL };
                model.plan(&request).unwrap().dump()
            };
            assert_eq!(dump(&joined), dump(&apart));
            assert!(apart.weights().find("blk.0.attn_qkv.weight").is_none());
            for (_, expected) in apart.weights().iter() {
                let found = joined.weights().get(joined.weights().find(expected.name()).unwrap());
                assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()));
                for row in 0..found.rows() {
                    assert_eq!(found.row(row), expected.row(row), "row {row} of {}", expected.name());
                }
            }
        }
    }

    #[test]
    fn one_tensor_beside_its_parts_or_of_another_size_is_refused_by_name() {
        let rename = |from: &[u8], to: &[u8]| {
            assert_eq!(from.len(), to.len());
            let mut file = TINY.gguf_with_joined_qkv();
            let at = file.windows(from.len()).position(|window| window == from).unwrap();
            file[at..at + to.len()].copy_from_slice(to);
            load(file).unwrap_err()
        };
        let error = rename(b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight");
        assert!(
            error.starts_with("tiny.gguf: tensor blk.0.attn_q.weight: it was expected inside blk.0.attn_qkv")
        );
        assert!(error.contains("occurs twice"), "{error}");
        let error = rename(b"qwen2.attention.head_count_kv", b"qwen2.attention.head_count_kz");
        assert!(error.starts_with("tiny.gguf: tensor blk.0.attn_qkv.weight: it is 16 x 8"), "{error}");
    }

    #[test]
    fn missing_biases_and_unsupported_keys_are_named() {
        let mut file = TINY.gguf();
        let name = b"blk.0.attn_k.bias";
        let at = file.windows(name.len()).position(|window| window == name).unwrap();
        file[at + name.len() - 1] = b'z';
        let error = load(file).unwrap_err();
        assert!(error.starts_with("tiny.gguf: tensor blk.0.attn_k.bias: it is missing (1 x 4"), "{error}");
        let text = |t: &str| GgufValue::String(t.to_owned());
        let mut file = GgufWriter::new();
        file.pair("general.architecture", &text("qwen2")).pair("qwen2.expert_count", &GgufValue::U32(8));
        let error = load(file.finish()).unwrap_err();
        assert!(error.contains("qwen2.expert_count: 8 is not supported"), "{error}");
    }
}
