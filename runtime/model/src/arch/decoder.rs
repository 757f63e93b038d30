//! What Llama and similar decoders share: RMS norms, rotary positions, grouped-query attention, a SwiGLU
//! feed-forward and a vocabulary head that may be tied to the embedding. [`Family`] holds the differences
//! between families.

use super::keys::ArchKeys;
use super::tensors::TensorFinder;
use super::{ArchSizes, Architecture};
use crate::gguf::GgufProblem;
use crate::model::PlanRequest;
use std::ops::Range;
use trustformers_plan::{
    Hyper, Plan, PlanBuilder, PlanError, RopeLayout, RopeSpec, Value, WeightId, WeightView, Weights,
};

/// The base of rotary frequencies where a file has no key for it, as in the first Llama.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

/// Added to the mean of squares of every norm.
const EPSILON: &str = "attention.layer_norm_rms_epsilon";

/// The table of token embeddings; also the vocabulary head where the head is tied.
pub(super) const EMBEDDING: &str = "token_embd.weight";

/// The vocabulary head where it is not tied.
pub(super) const HEAD: &str = "output.weight";

/// Where a family of models differs from the others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    /// How the elements of a head are paired, given how files store queries and keys.
    pub(super) rope: RopeLayout,
    /// The only `tensor_data_layout` that a file may name.
    pub(super) data_layout: Option<&'static str>,
    /// Whether queries, keys and values have biases.
    pub(super) qkv_bias: bool,
}

/// A checked model.
#[derive(Debug)]
struct Decoder {
    hyper: Hyper,
    eps: f32,
    rope: RopeSpec,
    embedding: WeightId,
    layers: Vec<DecoderLayer>,
    output_norm: WeightId,
    /// The embedding itself where the head is tied.
    output: WeightId,
}

#[derive(Debug)]
struct DecoderLayer {
    attention_norm: WeightId,
    query: Projection,
    key: Projection,
    value: Projection,
    attention_output: WeightId,
    feed_forward_norm: WeightId,
    gate: WeightId,
    up: WeightId,
    down: WeightId,
}

#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: WeightId,
    bias: Option<WeightId>,
}

/// Reads sizes and tensors from a file of this family.
pub(super) fn resolve(
    family: &Family,
    keys: &ArchKeys<'_>,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    keys.refuse_effects()?;
    keys.only_text("tensor_data_layout", family.data_layout)?;
    let hyper = hyper(keys, tensors)?;
    let feed_forward = keys.size("feed_forward_length")?;
    let eps = keys.float(EPSILON)?;
    if eps < 0.0 {
        return Err(keys.invalid(EPSILON, format!("{eps} is negative")));
    }
    let Hyper { width, vocab, .. } = hyper;
    let embedding = tensors.matrix(EMBEDDING, vocab, width)?;
    // Layers are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, family, &hyper, feed_forward, tensors)?);
    }
    let output_norm = tensors.vector("output_norm.weight", width)?;
    let output = tensors.optional_matrix(HEAD, vocab, width)?.unwrap_or(embedding);
    let rope = rope(family, keys, &hyper)?;
    Ok(Box::new(Decoder { hyper, eps, rope, embedding, layers, output_norm, output }))
}

fn hyper(keys: &ArchKeys<'_>, tensors: &TensorFinder<'_>) -> Result<Hyper, GgufProblem> {
    let width = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
        let whole = keys.name("attention.head_count");
        let why = format!("{kv_heads} does not divide the {heads} of {whole}");
        return Err(keys.invalid("attention.head_count_kv", why));
    }
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(len) => len,
        None if width.is_multiple_of(heads) => width / heads,
        None => {
            let why = format!("{heads} does not divide the {width} of {}", keys.name("embedding_length"));
            return Err(keys.invalid("attention.head_count", why));
        }
    };
    if let Some(len) = keys.optional_size("attention.value_length")?.filter(|len| *len != head_dim) {
        let why = format!("{len} differs from the key length {head_dim}, which is not supported");
        return Err(keys.invalid("attention.value_length", why));
    }
    let vocab = tensors.rows_of(EMBEDDING).unwrap_or(0);
    let stored = tensors.stored_rows_of(EMBEDDING).unwrap_or(0);
    if let Some(claimed) = keys.optional_size("vocab_size")?.filter(|claimed| *claimed != stored) {
        let why = format!("{claimed} differs from the {stored} rows of tensor {EMBEDDING}");
        return Err(keys.invalid("vocab_size", why));
    }
    Ok(Hyper {
        width,
        layers: keys.size("block_count")?,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: keys.size("context_length")?,
    })
}

fn rope(family: &Family, keys: &ArchKeys<'_>, hyper: &Hyper) -> Result<RopeSpec, GgufProblem> {
    let base = keys.optional_float("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_BASE);
    if base <= 0.0 {
        return Err(keys.invalid("rope.freq_base", format!("{base} is not above 0")));
    }
    let dims = keys.optional_size("rope.dimension_count")?.unwrap_or(hyper.head_dim);
    if dims > hyper.head_dim || !dims.is_multiple_of(2) {
        let why = format!("{dims} is odd or more than the {} elements of a head", hyper.head_dim);
        return Err(keys.invalid("rope.dimension_count", why));
    }
    Ok(RopeSpec { layout: family.rope, base, dims, head_dim: hyper.head_dim })
}

fn layer(
    index: usize,
    family: &Family,
    hyper: &Hyper,
    feed_forward: usize,
    tensors: &mut TensorFinder<'_>,
) -> Result<DecoderLayer, GgufProblem> {
    let Hyper { width, heads, kv_heads, head_dim, .. } = *hyper;
    let name = |part: &str| format!("blk.{index}.{part}.weight");
    // Sizes are below 2³¹ each, so their products fit 64 bits.
    let (query, kv) = (heads * head_dim, kv_heads * head_dim);
    let attention_norm = tensors.vector(&name("attn_norm"), width)?;
    let mut attention = AttentionTensors::find(index, family, hyper, tensors)?;
    Ok(DecoderLayer {
        attention_norm,
        query: attention.projection("attn_q", 0..query)?,
        key: attention.projection("attn_k", query..query + kv)?,
        value: attention.projection("attn_v", query + kv..query + 2 * kv)?,
        attention_output: tensors.matrix(&name("attn_output"), width, query)?,
        feed_forward_norm: tensors.vector(&name("ffn_norm"), width)?,
        gate: tensors.matrix(&name("ffn_gate"), feed_forward, width)?,
        up: tensors.matrix(&name("ffn_up"), feed_forward, width)?,
        down: tensors.matrix(&name("ffn_down"), width, feed_forward)?,
    })
}

/// The projections to queries, keys and values, which files store as three tensors or, one after the other,
/// as the rows of one.
struct AttentionTensors<'t, 'a> {
    tensors: &'t mut TensorFinder<'a>,
    layer: usize,
    width: usize,
    is_biased: bool,
    /// Where one tensor holds all three.
    whole: Option<Projection>,
}

impl<'t, 'a> AttentionTensors<'t, 'a> {
    fn find(
        layer: usize,
        family: &Family,
        hyper: &Hyper,
        tensors: &'t mut TensorFinder<'a>,
    ) -> Result<Self, GgufProblem> {
        let Hyper { width, heads, kv_heads, head_dim, .. } = *hyper;
        let (rows, is_biased) = ((heads + 2 * kv_heads) * head_dim, family.qkv_bias);
        let whole = match tensors.optional_matrix(&format!("blk.{layer}.attn_qkv.weight"), rows, width)? {
            Some(weight) => {
                let bias = is_biased.then(|| tensors.vector(&format!("blk.{layer}.attn_qkv.bias"), rows));
                Some(Projection { weight, bias: bias.transpose()? })
            }
            None => None,
        };
        Ok(Self { tensors, layer, width, is_biased, whole })
    }

    /// The projection of that name; `rows` are its rows where one tensor holds all three.
    fn projection(&mut self, part: &str, rows: Range<usize>) -> Result<Projection, GgufProblem> {
        let name = |kind: &str| format!("blk.{}.{part}.{kind}", self.layer);
        if let Some(Projection { weight, bias }) = self.whole {
            let weight = self.tensors.part(weight, name("weight"), &WeightView::Rows(rows.clone()))?;
            let bias = bias.map(|bias| self.tensors.part(bias, name("bias"), &WeightView::Cols(rows)));
            return Ok(Projection { weight, bias: bias.transpose()? });
        }
        let weight = self.tensors.matrix(&name("weight"), rows.len(), self.width)?;
        let bias = self.is_biased.then(|| self.tensors.vector(&name("bias"), rows.len()));
        Ok(Projection { weight, bias: bias.transpose()? })
    }
}

impl Architecture for Decoder {
    fn sizes(&self) -> ArchSizes {
        let Hyper { context, vocab, layers, kv_heads, head_dim, .. } = self.hyper;
        ArchSizes { context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let mut stream = plan.embed(self.embedding);
        for (index, layer) in self.layers.iter().enumerate() {
            let input = plan.rms_norm(stream, layer.attention_norm, self.eps);
            // Every row's keys and values are cached. After that all ops work row by row, so of the last
            // layer only the rows that need logits are computed.
            let is_last = index + 1 == self.layers.len();
            let asking = if is_last {
                stream = plan.gather_rows(stream);
                plan.rms_norm(stream, layer.attention_norm, self.eps)
            } else {
                input
            };
            let attended = self.attention(&mut plan, DecoderRows { index, input, asking }, layer);
            stream = plan.add(stream, attended);
            let fed = self.feed_forward(&mut plan, stream, layer);
            stream = plan.add(stream, fed);
        }
        let last = plan.rms_norm(stream, self.output_norm, self.eps);
        plan.logits(last, self.output);
        plan.finish(&request.fused)
    }
}

/// The normed rows of a decoder's layer.
#[derive(Debug, Clone, Copy)]
struct DecoderRows {
    index: usize,
    /// All rows, for keys and values.
    input: Value,
    /// The rows that attend.
    asking: Value,
}

impl Decoder {
    fn attention(&self, plan: &mut PlanBuilder<'_>, input: DecoderRows, layer: &DecoderLayer) -> Value {
        let DecoderRows { index, input, asking } = input;
        let query = project(plan, asking, layer.query);
        let key = project(plan, input, layer.key);
        let value = project(plan, input, layer.value);
        let query = plan.rope(query, self.rope);
        let key = plan.rope(key, self.rope);
        plan.kv_write(index, key, value);
        let mixed = plan.attention(index, query, 1.0 / (self.hyper.head_dim as f32).sqrt());
        plan.matmul(mixed, layer.attention_output)
    }

    fn feed_forward(&self, plan: &mut PlanBuilder<'_>, stream: Value, layer: &DecoderLayer) -> Value {
        let input = plan.rms_norm(stream, layer.feed_forward_norm, self.eps);
        let gate = plan.matmul(input, layer.gate);
        let up = plan.matmul(input, layer.up);
        let gated = plan.silu_mul(gate, up);
        plan.matmul(gated, layer.down)
    }
}

fn project(plan: &mut PlanBuilder<'_>, input: Value, by: Projection) -> Value {
    let product = plan.matmul(input, by.weight);
    by.bias.map_or(product, |bias| plan.add_row(product, bias))
}
