//! Names of a decoder's tensors in a checkpoint, as transformers writes them, and in a GGUF file.

/// Tensors outside of blocks.
const WHOLE: [(&str, &str); 9] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    // Of models without a head, which read texts, and of a head with one logit.
    ("embed_tokens", "token_embd"),
    ("norm", "output_norm"),
    ("score", "cls.output"),
    ("wte", "token_embd"),
    ("wpe", "position_embd"),
    ("ln_f", "output_norm"),
];

/// Parts of a block.
const PARTS: [(&str, &str); 23] = [
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("mlp.gate", "ffn_gate_inp"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("post_attention_layernorm", "ffn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    // GPT-2.
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];

/// The matrices of an expert, behind its number; files of GGUF have those of all experts in one tensor.
const EXPERT_PARTS: [(&str, &str); 6] = [
    ("w1", "ffn_gate_exps"),
    ("w2", "ffn_down_exps"),
    ("w3", "ffn_up_exps"),
    ("gate_proj", "ffn_gate_exps"),
    ("down_proj", "ffn_down_exps"),
    ("up_proj", "ffn_up_exps"),
];

/// The part whose norm is of what the attention adds in some families, and of what the feed-forward part
/// reads in the others.
const AFTER_ATTENTION: &str = "post_attention_layernorm";

/// What a tensor of a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TensorName {
    /// A weight, by its name in GGUF files.
    Weight(String),
    /// One of the matrices that a tensor of GGUF holds for all experts.
    Expert {
        /// The tensor of all experts.
        all: String,
        /// The expert's number.
        index: usize,
    },
    /// A buffer that PyTorch keeps beside the weights and that is computed again.
    Buffer,
}

/// The meaning of a tensor's name; `None` where it has none. `norms_after` as in `DecoderConfig`.
pub(crate) fn tensor_name(name: &str, norms_after: bool) -> Option<TensorName> {
    let name = name.strip_prefix("transformer.").unwrap_or(name);
    if name.ends_with("rotary_emb.inv_freq") {
        return Some(TensorName::Buffer);
    }
    let (stem, kind) = name.rsplit_once('.')?;
    if let Some((_, own)) = WHOLE.iter().find(|(stored, _)| *stored == stem) {
        return Some(TensorName::Weight(format!("{own}.{kind}")));
    }
    let block = ["model.layers.", "layers.", "h."].iter().find_map(|before| name.strip_prefix(*before))?;
    let (layer, rest) = block.split_once('.')?;
    layer.parse::<u32>().ok()?;
    if ["attn.bias", "attn.masked_bias"].contains(&rest) {
        return Some(TensorName::Buffer);
    }
    let (part, kind) = rest.rsplit_once('.')?;
    let routed = part.strip_prefix("block_sparse_moe.experts.").or_else(|| part.strip_prefix("mlp.experts."));
    if let Some((index, matrix)) = routed.and_then(|routed| routed.split_once('.')) {
        let (_, own) = EXPERT_PARTS.iter().find(|(stored, _)| *stored == matrix)?;
        return Some(TensorName::Expert {
            all: format!("blk.{layer}.{own}.{kind}"),
            index: index.parse().ok()?,
        });
    }
    let (_, own) = PARTS.iter().find(|(stored, _)| *stored == part)?;
    let own = if norms_after && part == AFTER_ATTENTION { "post_attention_norm" } else { own };
    Some(TensorName::Weight(format!("blk.{layer}.{own}.{kind}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_checkpoints_are_those_of_gguf_files() {
        let weight = |name: &str| Some(TensorName::Weight(name.to_owned()));
        let cases = [
            ("model.embed_tokens.weight", weight("token_embd.weight")),
            ("model.layers.11.self_attn.q_proj.bias", weight("blk.11.attn_q.bias")),
            ("model.layers.0.post_attention_layernorm.weight", weight("blk.0.ffn_norm.weight")),
            ("transformer.h.3.attn.c_attn.weight", weight("blk.3.attn_qkv.weight")),
            ("h.3.attn.c_proj.bias", weight("blk.3.attn_output.bias")),
            ("wpe.weight", weight("position_embd.weight")),
            (
                "model.layers.0.mlp.experts.12.up_proj.weight",
                Some(TensorName::Expert { all: "blk.0.ffn_up_exps.weight".to_owned(), index: 12 }),
            ),
            ("model.layers.0.mlp.gate.weight", weight("blk.0.ffn_gate_inp.weight")),
            ("layers.1.mlp.up_proj.weight", weight("blk.1.ffn_up.weight")),
            ("norm.weight", weight("output_norm.weight")),
            ("h.3.attn.bias", Some(TensorName::Buffer)),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", Some(TensorName::Buffer)),
            ("model.layers.x.self_attn.q_proj.weight", None),
            ("model.layers.0.self_attn.sinks", None),
            ("vision_tower.weight", None),
        ];
        for (name, expected) in cases {
            assert_eq!(tensor_name(name, false), expected, "{name}");
        }
        let after = tensor_name("model.layers.0.post_attention_layernorm.weight", true);
        assert_eq!(after, weight("blk.0.post_attention_norm.weight"));
    }
}
