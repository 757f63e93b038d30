//! The tensors and keys of the families beside Llama and Qwen2, with the names that GGUF files give them.
//!
//! Norms differ from 1 here, so that a norm that is left out, or applied in another place, shows.

use super::{BIAS_SCALE, SeededFamily, SeededModel, element, fnv1a};
use crate::gguf::GgufValue;

/// Positions that a row of a windowed layer attends to.
const WINDOW: u32 = 16;

/// Tokens of the context that a Phi-3 was trained with before it was extended.
const ORIGINAL_CONTEXT: usize = 32;

/// Experts of the families that have them, and how many of them a row uses.
const EXPERTS: usize = 4;
const EXPERTS_USED: u32 = 2;

/// The values of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Of a matrix with so many rows.
    Matrix {
        /// Rows; the tensor's columns are `TensorRecipe::cols`.
        rows: usize,
    },
    /// A norm's weights: 1 and the sequence times 0.3.
    Norm,
    /// The sequence times 0.3.
    Bias,
    /// Divisors of frequencies: from 1 to 3.
    Divisors,
}

/// A tensor by its name, shape and content.
#[derive(Debug, Clone)]
pub(super) struct TensorRecipe {
    pub(super) name: String,
    pub(super) cols: usize,
    pub(super) content: Content,
}

impl TensorRecipe {
    fn new(name: impl Into<String>, cols: usize, content: Content) -> Self {
        Self { name: name.into(), cols, content }
    }

    /// The values of a vector.
    pub(super) fn vector_values(&self, seed: u64) -> Vec<f32> {
        let start = seed ^ fnv1a(&self.name);
        let value = |i| match self.content {
            Content::Norm => 1.0 + element(start, i) * BIAS_SCALE,
            Content::Divisors => 2.0 + element(start, i),
            Content::Bias | Content::Matrix { .. } => element(start, i) * BIAS_SCALE,
        };
        (0..self.cols as u64).map(value).collect()
    }
}

/// The width of a model whose queries have `query` elements. Some families have fewer, so that a width that
/// is mistaken for the queries' shows.
pub(super) fn width(family: SeededFamily, query: usize) -> usize {
    match family {
        SeededFamily::Qwen3 | SeededFamily::Qwen3Moe | SeededFamily::Gemma2 | SeededFamily::Gemma3 => {
            query / 4 * 3
        }
        _ => query,
    }
}

/// All tensors of a model of one of these families, in the order of the file.
pub(super) fn tensors(model: &SeededModel) -> Vec<TensorRecipe> {
    let (width, vocabulary) = (model.width(), model.vocabulary());
    let is_gpt2 = model.family == SeededFamily::Gpt2;
    let mut list = vec![TensorRecipe::new("token_embd.weight", width, Content::Matrix { rows: vocabulary })];
    if is_gpt2 {
        let rows = model.context_tokens;
        list.push(TensorRecipe::new("position_embd.weight", width, Content::Matrix { rows }));
    }
    if model.family == SeededFamily::Phi3 {
        for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
            list.push(TensorRecipe::new(name, model.rotated_dims() / 2, Content::Divisors));
        }
    }
    for layer in 0..model.layers {
        let block = if is_gpt2 { gpt2_block(model) } else { block(model) };
        list.extend(block.into_iter().map(|recipe| {
            let name = format!("blk.{layer}.{}", recipe.name);
            TensorRecipe { name, ..recipe }
        }));
    }
    list.push(TensorRecipe::new("output_norm.weight", width, Content::Norm));
    if is_gpt2 {
        list.push(TensorRecipe::new("output_norm.bias", width, Content::Bias));
    }
    if !model.tied {
        list.push(TensorRecipe::new("output.weight", width, Content::Matrix { rows: vocabulary }));
    }
    list
}

fn block(model: &SeededModel) -> Vec<TensorRecipe> {
    use SeededFamily::{Gemma2, Gemma3, Mixtral, Olmo2, Phi3, Qwen3, Qwen3Moe};
    let (width, hidden, family) = (model.width(), model.feed_forward, model.family);
    let (query, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
    let is_gemma = matches!(family, Gemma2 | Gemma3);
    let mut list = Vec::new();
    let norm = |list: &mut Vec<TensorRecipe>, wanted: bool, name: &str, len: usize| {
        if wanted {
            list.push(TensorRecipe::new(format!("{name}.weight"), len, Content::Norm));
        }
    };
    let matrix = |list: &mut Vec<TensorRecipe>, name: &str, rows: usize, cols: usize| {
        list.push(TensorRecipe::new(format!("{name}.weight"), cols, Content::Matrix { rows }));
    };
    norm(&mut list, family != Olmo2, "attn_norm", width);
    if family == Phi3 {
        matrix(&mut list, "attn_qkv", query + 2 * kv, width);
    } else {
        matrix(&mut list, "attn_q", query, width);
        matrix(&mut list, "attn_k", kv, width);
        matrix(&mut list, "attn_v", kv, width);
    }
    let qk_norms = match family {
        Olmo2 => Some((query, kv)),
        Qwen3 | Qwen3Moe | Gemma3 => Some((model.head_dim, model.head_dim)),
        _ => None,
    };
    if let Some((query, key)) = qk_norms {
        norm(&mut list, true, "attn_q_norm", query);
        norm(&mut list, true, "attn_k_norm", key);
    }
    matrix(&mut list, "attn_output", width, query);
    norm(&mut list, family == Olmo2 || is_gemma, "post_attention_norm", width);
    norm(&mut list, family != Olmo2, "ffn_norm", width);
    match family {
        Mixtral | Qwen3Moe => {
            matrix(&mut list, "ffn_gate_inp", EXPERTS, width);
            matrix(&mut list, "ffn_gate_exps", EXPERTS * hidden, width);
            matrix(&mut list, "ffn_up_exps", EXPERTS * hidden, width);
            matrix(&mut list, "ffn_down_exps", EXPERTS * width, hidden);
        }
        Phi3 => matrix(&mut list, "ffn_up", 2 * hidden, width),
        _ => {
            matrix(&mut list, "ffn_gate", hidden, width);
            matrix(&mut list, "ffn_up", hidden, width);
        }
    }
    if !matches!(family, Mixtral | Qwen3Moe) {
        matrix(&mut list, "ffn_down", width, hidden);
    }
    norm(&mut list, family == Olmo2 || is_gemma, "post_ffw_norm", width);
    list
}

fn gpt2_block(model: &SeededModel) -> Vec<TensorRecipe> {
    let (width, hidden) = (model.width(), model.feed_forward);
    let mut list = Vec::new();
    for (name, shape) in [
        ("attn_norm", None),
        ("attn_qkv", Some((3 * width, width))),
        ("attn_output", Some((width, width))),
        ("ffn_norm", None),
        ("ffn_up", Some((hidden, width))),
        ("ffn_down", Some((width, hidden))),
    ] {
        let (cols, bias, content) = match shape {
            Some((rows, cols)) => (cols, rows, Content::Matrix { rows }),
            None => (width, width, Content::Norm),
        };
        list.push(TensorRecipe::new(format!("{name}.weight"), cols, content));
        list.push(TensorRecipe::new(format!("{name}.bias"), bias, Content::Bias));
    }
    list
}

/// The keys that a family has beside those of every model.
pub(super) fn keys(model: &SeededModel) -> Vec<(&'static str, GgufValue)> {
    use GgufValue::{F32, String, U32};
    // Sizes of a test model fit 32 bits by a wide margin.
    let number = |n: usize| U32(n as u32);
    let head_lengths = [
        ("attention.key_length", number(model.head_dim)),
        ("attention.value_length", number(model.head_dim)),
    ];
    let own: Vec<(&'static str, GgufValue)> = match model.family {
        SeededFamily::Llama
        | SeededFamily::Qwen2
        | SeededFamily::SmolLm3
        | SeededFamily::Olmo2
        | SeededFamily::Gpt2
        | SeededFamily::Qwen3 => Vec::new(),
        SeededFamily::Mixtral | SeededFamily::Qwen3Moe => {
            vec![("expert_count", number(EXPERTS)), ("expert_used_count", U32(EXPERTS_USED))]
        }
        SeededFamily::Granite => vec![
            ("attention.scale", F32(0.125)),
            ("embedding_scale", F32(6.0)),
            ("residual_scale", F32(0.25)),
            ("logit_scale", F32(4.0)),
        ],
        SeededFamily::Phi3 => {
            let extended = model.context_tokens as f64 / ORIGINAL_CONTEXT as f64;
            let magnitude = (1.0 + extended.ln() / (ORIGINAL_CONTEXT as f64).ln()).sqrt() as f32;
            vec![
                ("rope.scaling.original_context_length", number(ORIGINAL_CONTEXT)),
                ("rope.scaling.attn_factor", F32(magnitude)),
                ("attention.sliding_window", U32(WINDOW)),
            ]
        }
        SeededFamily::Gemma2 => vec![
            ("attn_logit_softcapping", F32(4.0)),
            ("final_logit_softcapping", F32(6.0)),
            ("attention.sliding_window", U32(WINDOW)),
        ],
        SeededFamily::Gemma3 => vec![
            ("attention.sliding_window", U32(WINDOW)),
            ("rope.scaling.type", String("linear".to_owned())),
            ("rope.scaling.factor", F32(4.0)),
        ],
    };
    let has_lengths = matches!(
        model.family,
        SeededFamily::Qwen3 | SeededFamily::Qwen3Moe | SeededFamily::Gemma2 | SeededFamily::Gemma3
    );
    own.into_iter().chain(head_lengths.into_iter().filter(|_| has_lengths)).collect()
}
