//! Llama and everything built like it: RMS norms, rotary positions, grouped-query attention, a SwiGLU feed-forward
//! and a vocabulary head that may be tied to the embedding.

use super::tensors::TensorFinder;
use super::{ArchSizes, Architecture};
use crate::gguf::{GgufProblem, Metadata};
use crate::model::PlanRequest;
use trustformers_plan::{
    Hyper, Plan, PlanBuilder, PlanError, RopeLayout, RopeSpec, Value, WeightId, Weights,
};

/// The base of rotary frequencies where a file does not say, as in the first Llama.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// A checked Llama.
#[derive(Debug)]
struct Llama {
    hyper: Hyper,
    eps: f32,
    rope: RopeSpec,
    embedding: WeightId,
    layers: Vec<Layer>,
    output_norm: WeightId,
    /// The embedding itself where the head is tied.
    output: WeightId,
}

#[derive(Debug)]
struct Layer {
    attention_norm: WeightId,
    query: WeightId,
    key: WeightId,
    value: WeightId,
    attention_output: WeightId,
    feed_forward_norm: WeightId,
    gate: WeightId,
    up: WeightId,
    down: WeightId,
}

/// Reads sizes and tensors from a file that says it is a Llama.
pub(super) fn resolve(
    meta: &Metadata,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    refuse_unknown_behaviour(meta)?;
    let hyper = hyper(meta, tensors)?;
    let feed_forward = meta.size("llama.feed_forward_length")?;
    let eps = meta.float("llama.attention.layer_norm_rms_epsilon")?;
    if eps < 0.0 {
        return Err(bad("llama.attention.layer_norm_rms_epsilon", format!("{eps} is negative")));
    }
    let Hyper { width, vocab, .. } = hyper;
    let embedding = tensors.matrix("token_embd.weight", vocab, width)?;
    // Layers are pushed one by one, so a claimed count is met by a missing tensor before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, &hyper, feed_forward, tensors)?);
    }
    let output_norm = tensors.vector("output_norm.weight", width)?;
    let output = tensors.optional_matrix("output.weight", vocab, width)?.unwrap_or(embedding);
    Ok(Box::new(Llama { hyper, eps, rope: rope(meta, &hyper)?, embedding, layers, output_norm, output }))
}

fn bad(key: &str, why: String) -> GgufProblem {
    GgufProblem::BadValue { key: key.to_owned(), why }
}

/// Keys that change what the model computes in ways that are not built here.
fn refuse_unknown_behaviour(meta: &Metadata) -> Result<(), GgufProblem> {
    if let Some(kind) = meta.opt_string("llama.rope.scaling.type")?.filter(|kind| *kind != "none") {
        return Err(bad("llama.rope.scaling.type", format!("{kind:?} is not supported; only \"none\" is")));
    }
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        if let Some(factor) = meta.opt_float(key)?.filter(|factor| *factor != 1.0 && *factor != 0.0) {
            return Err(bad(key, format!("{factor} is not supported; only 1 is")));
        }
    }
    for key in ["llama.expert_count", "llama.attention.sliding_window"] {
        if let Some(count) = meta.opt_unsigned(key)?.filter(|count| *count != 0) {
            return Err(bad(key, format!("{count} is not supported; only 0 is")));
        }
    }
    Ok(())
}

fn hyper(meta: &Metadata, tensors: &TensorFinder<'_>) -> Result<Hyper, GgufProblem> {
    let width = meta.size("llama.embedding_length")?;
    let heads = meta.size("llama.attention.head_count")?;
    let kv_heads = optional_size(meta, "llama.attention.head_count_kv")?.unwrap_or(heads);
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide the {heads} of llama.attention.head_count");
        return Err(bad("llama.attention.head_count_kv", why));
    }
    let head_dim = match optional_size(meta, "llama.attention.key_length")? {
        Some(len) => len,
        None if width.is_multiple_of(heads) => width / heads,
        None => {
            let why = format!("{heads} does not divide the {width} of llama.embedding_length");
            return Err(bad("llama.attention.head_count", why));
        }
    };
    if let Some(len) = optional_size(meta, "llama.attention.value_length")?.filter(|len| *len != head_dim) {
        let why = format!("{len} differs from the key length {head_dim}, which is not supported");
        return Err(bad("llama.attention.value_length", why));
    }
    let vocab = tensors.rows_of("token_embd.weight").unwrap_or(0);
    if let Some(said) = optional_size(meta, "llama.vocab_size")?.filter(|said| *said != vocab) {
        let why = format!("{said} differs from the {vocab} rows of tensor token_embd.weight");
        return Err(bad("llama.vocab_size", why));
    }
    Ok(Hyper {
        width,
        layers: meta.size("llama.block_count")?,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: meta.size("llama.context_length")?,
    })
}

fn optional_size(meta: &Metadata, key: &str) -> Result<Option<usize>, GgufProblem> {
    if meta.has(key) { meta.size(key).map(Some) } else { Ok(None) }
}

fn rope(meta: &Metadata, hyper: &Hyper) -> Result<RopeSpec, GgufProblem> {
    let base = meta.opt_float("llama.rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    if base <= 0.0 {
        return Err(bad("llama.rope.freq_base", format!("{base} is not above 0")));
    }
    let dims = optional_size(meta, "llama.rope.dimension_count")?.unwrap_or(hyper.head_dim);
    if dims > hyper.head_dim || !dims.is_multiple_of(2) {
        let why = format!("{dims} is odd or more than the {} elements of a head", hyper.head_dim);
        return Err(bad("llama.rope.dimension_count", why));
    }
    Ok(RopeSpec { layout: RopeLayout::Interleaved, base, dims, head_dim: hyper.head_dim })
}

fn layer(
    index: usize,
    hyper: &Hyper,
    feed_forward: usize,
    tensors: &mut TensorFinder<'_>,
) -> Result<Layer, GgufProblem> {
    let Hyper { width, heads, kv_heads, head_dim, .. } = *hyper;
    let name = |part: &str| format!("blk.{index}.{part}.weight");
    // Sizes are below 2³¹ each, so their products fit 64 bits.
    let (query, kv) = (heads * head_dim, kv_heads * head_dim);
    Ok(Layer {
        attention_norm: tensors.vector(&name("attn_norm"), width)?,
        query: tensors.matrix(&name("attn_q"), query, width)?,
        key: tensors.matrix(&name("attn_k"), kv, width)?,
        value: tensors.matrix(&name("attn_v"), kv, width)?,
        attention_output: tensors.matrix(&name("attn_output"), width, query)?,
        feed_forward_norm: tensors.vector(&name("ffn_norm"), width)?,
        gate: tensors.matrix(&name("ffn_gate"), feed_forward, width)?,
        up: tensors.matrix(&name("ffn_up"), feed_forward, width)?,
        down: tensors.matrix(&name("ffn_down"), width, feed_forward)?,
    })
}

impl Architecture for Llama {
    fn sizes(&self) -> ArchSizes {
        let Hyper { context, vocab, layers, kv_heads, head_dim, .. } = self.hyper;
        ArchSizes { context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let mut stream = plan.embed(self.embedding);
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = self.attention(&mut plan, stream, index, layer);
            stream = plan.add(stream, attended);
            let fed = self.feed_forward(&mut plan, stream, layer);
            stream = plan.add(stream, fed);
        }
        // Norms work row by row, so only the rows whose logits are wanted need the last one.
        let last = plan.gather_rows(stream);
        let last = plan.rms_norm(last, self.output_norm, self.eps);
        plan.logits(last, self.output);
        plan.finish(&request.fused)
    }
}

impl Llama {
    fn attention(&self, plan: &mut PlanBuilder<'_>, stream: Value, index: usize, layer: &Layer) -> Value {
        let input = plan.rms_norm(stream, layer.attention_norm, self.eps);
        let query = plan.matmul(input, layer.query);
        let key = plan.matmul(input, layer.key);
        let value = plan.matmul(input, layer.value);
        let query = plan.rope(query, self.rope);
        let key = plan.rope(key, self.rope);
        plan.kv_write(index, key, value);
        let mixed = plan.attention(index, query, 1.0 / (self.hyper.head_dim as f32).sqrt());
        plan.matmul(mixed, layer.attention_output)
    }

    fn feed_forward(&self, plan: &mut PlanBuilder<'_>, stream: Value, layer: &Layer) -> Value {
        let input = plan.rms_norm(stream, layer.feed_forward_norm, self.eps);
        let gate = plan.matmul(input, layer.gate);
        let up = plan.matmul(input, layer.up);
        let gated = plan.silu_mul(gate, up);
        plan.matmul(gated, layer.down)
    }
}
