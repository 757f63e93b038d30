//! BERT as an encoder of texts. The embeddings of words, positions and one token type are added and normed.
//! Blocks follow: attention over the whole text and a GELU feed-forward, each normed after its residual. A
//! text's rows are pooled into one vector.

use super::tensors::{TensorFinder, TensorProblem};
use super::{ArchSizes, Architecture};
use crate::checkpoint::{BertConfig, StoredTensors};
use crate::model::PlanRequest;
use std::sync::Arc;
use trustformers_plan::{Hyper, Plan, PlanBuilder, PlanError, Pooling, Value, Weight, WeightId, Weights};

/// The prefix of tensor names where the encoder is a part of a larger class.
const PREFIX: &str = "bert.";

/// Tensors that no embedding depends on: the pooler and the heads of pre-training.
const UNUSED: [&str; 2] = ["pooler.", "cls."];

/// Buffers that PyTorch keeps beside the weights: the numbers 0, 1, 2, ... and zeros.
const BUFFERS: [&str; 2] = ["embeddings.position_ids", "embeddings.token_type_ids"];

/// The table of token types. Texts come one at a time, so all tokens have type 0, and only that row is kept.
const TYPES: &str = "embeddings.token_type_embeddings.weight";

/// How an encoder's rows become its answer, and how long its texts may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) pooling: Pooling,
    pub(crate) normalise: bool,
    /// At most the table's positions.
    pub(crate) max_tokens: usize,
}

/// A checked BERT.
#[derive(Debug)]
struct Bert {
    hyper: Hyper,
    eps: f32,
    head: Head,
    words: WeightId,
    positions: WeightId,
    types: WeightId,
    norm: Affine,
    layers: Vec<EncoderLayer>,
}

#[derive(Debug)]
struct EncoderLayer {
    query: Affine,
    key: Affine,
    value: Affine,
    attention_output: Affine,
    attention_norm: Affine,
    up: Affine,
    down: Affine,
    output_norm: Affine,
}

/// A projection or a norm with its bias.
#[derive(Debug, Clone, Copy)]
struct Affine {
    weight: WeightId,
    bias: WeightId,
}

/// Weights of a BERT under the names of a plain `BertModel`.
pub(crate) fn weights(config: &BertConfig, stored: &StoredTensors) -> Result<Weights, TensorProblem> {
    let mut weights = Weights::new();
    for (name, tensor) in &stored.tensors {
        let plain = plain_name(name);
        if UNUSED.iter().any(|unused| plain.starts_with(unused)) || BUFFERS.contains(&plain.as_str()) {
            continue;
        }
        let wrong = |why: String| TensorProblem { name: name.clone(), why };
        let Some(dtype) = tensor.dtype else {
            let why = format!("it is stored as {}; F32, F16 and BF16 are supported", tensor.stored_as);
            return Err(wrong(why));
        };
        let (mut matrix, mut range) = (tensor.matrix, tensor.range.clone());
        if plain == TYPES {
            if matrix != (config.type_vocab_size, config.hidden_size) {
                let (rows, cols) = (config.type_vocab_size, config.hidden_size);
                let why = format!(
                    "it is {} x {}, config.json asks for {rows} x {cols}; download the model again",
                    matrix.0, matrix.1
                );
                return Err(wrong(why));
            }
            range.end = range.start + range.len() / matrix.0;
            matrix.0 = 1;
        }
        let weight = Weight::new(plain, dtype, matrix, Arc::clone(&stored.source), range);
        let pushed = weight.and_then(|weight| weights.push(weight));
        pushed.map_err(|problem| wrong(problem.to_string()))?;
    }
    Ok(weights)
}

/// The name without the prefix, and with the current names of a norm's parts: old checkpoints have `gamma`
/// and `beta`.
fn plain_name(name: &str) -> String {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    match name.rsplit_once('.') {
        Some((norm, "gamma")) => format!("{norm}.weight"),
        Some((norm, "beta")) => format!("{norm}.bias"),
        _ => name.to_owned(),
    }
}

/// Finds every tensor of the encoder that `config`, which was checked, describes.
pub(crate) fn resolve(
    config: &BertConfig,
    head: Head,
    weights: &mut Weights,
) -> Result<Box<dyn Architecture>, TensorProblem> {
    let mut tensors = TensorFinder::new(weights);
    let width = config.hidden_size;
    let heads = config.num_attention_heads;
    let hyper = Hyper {
        width,
        layers: config.num_hidden_layers,
        heads,
        kv_heads: heads,
        head_dim: width / heads,
        vocab: config.vocab_size,
        context: head.max_tokens,
    };
    let words = tensors.matrix("embeddings.word_embeddings.weight", config.vocab_size, width)?;
    let positions =
        tensors.matrix("embeddings.position_embeddings.weight", config.max_position_embeddings, width)?;
    let types = tensors.matrix(TYPES, 1, width)?;
    let norm = norm(&mut tensors, "embeddings.LayerNorm", width)?;
    // Layers are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, config, &mut tensors)?);
    }
    tensors.all_used("bert")?;
    Ok(Box::new(Bert { hyper, eps: config.layer_norm_eps, head, words, positions, types, norm, layers }))
}

fn norm(tensors: &mut TensorFinder<'_>, name: &str, width: usize) -> Result<Affine, TensorProblem> {
    Ok(Affine {
        weight: tensors.vector(&format!("{name}.weight"), width)?,
        bias: tensors.vector(&format!("{name}.bias"), width)?,
    })
}

fn layer(
    index: usize,
    config: &BertConfig,
    tensors: &mut TensorFinder<'_>,
) -> Result<EncoderLayer, TensorProblem> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let name = |part: &str| format!("encoder.layer.{index}.{part}");
    let mut dense = |part: &str, rows: usize, cols: usize| -> Result<Affine, TensorProblem> {
        Ok(Affine {
            weight: tensors.matrix(&name(&format!("{part}.weight")), rows, cols)?,
            bias: tensors.vector(&name(&format!("{part}.bias")), rows)?,
        })
    };
    let query = dense("attention.self.query", width, width)?;
    let key = dense("attention.self.key", width, width)?;
    let value = dense("attention.self.value", width, width)?;
    let attention_output = dense("attention.output.dense", width, width)?;
    let up = dense("intermediate.dense", inner, width)?;
    let down = dense("output.dense", width, inner)?;
    let attention_norm = norm(tensors, &name("attention.output.LayerNorm"), width)?;
    let output_norm = norm(tensors, &name("output.LayerNorm"), width)?;
    Ok(EncoderLayer { query, key, value, attention_output, attention_norm, up, down, output_norm })
}

impl Architecture for Bert {
    fn sizes(&self) -> ArchSizes {
        let Hyper { context, vocab, layers, kv_heads, head_dim, .. } = self.hyper;
        ArchSizes { context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let words = plan.embed(self.words);
        let positions = plan.embed_positions(self.positions);
        let sum = plan.add(words, positions);
        let sum = plan.add_row(sum, self.types);
        let mut stream = plan.layer_norm(sum, self.norm.weight, self.norm.bias, self.eps);
        for (index, layer) in self.layers.iter().enumerate() {
            let all = stream;
            // Of the last layer only the first row of each text is read; the others give keys and values.
            if index + 1 == self.layers.len() && self.head.pooling == Pooling::Cls {
                stream = plan.gather_first_rows(stream);
            }
            let attended = self.attention(&mut plan, EncoderRows { asking: stream, all }, layer);
            let sum = plan.add(attended, stream);
            let normed = self.norm(&mut plan, sum, layer.attention_norm);
            let fed = feed_forward(&mut plan, normed, layer);
            let sum = plan.add(fed, normed);
            stream = self.norm(&mut plan, sum, layer.output_norm);
        }
        plan.pool(stream, self.head.pooling, self.head.normalise);
        plan.finish(&request.fused)
    }
}

/// The rows of an encoder's layer.
#[derive(Debug, Clone, Copy)]
struct EncoderRows {
    /// Those that attend.
    asking: Value,
    /// All of them, for keys and values.
    all: Value,
}

impl Bert {
    fn attention(&self, plan: &mut PlanBuilder<'_>, input: EncoderRows, layer: &EncoderLayer) -> Value {
        let EncoderRows { asking, all } = input;
        let query = dense(plan, asking, layer.query);
        let key = dense(plan, all, layer.key);
        let value = dense(plan, all, layer.value);
        let mixed = plan.encoder_attention(query, key, value, 1.0 / (self.hyper.head_dim as f32).sqrt());
        dense(plan, mixed, layer.attention_output)
    }

    fn norm(&self, plan: &mut PlanBuilder<'_>, input: Value, norm: Affine) -> Value {
        plan.layer_norm(input, norm.weight, norm.bias, self.eps)
    }
}

fn feed_forward(plan: &mut PlanBuilder<'_>, input: Value, layer: &EncoderLayer) -> Value {
    let up = dense(plan, input, layer.up);
    let up = plan.gelu(up);
    dense(plan, up, layer.down)
}

fn dense(plan: &mut PlanBuilder<'_>, input: Value, by: Affine) -> Value {
    let product = plan.matmul(input, by.weight);
    plan.add_row(product, by.bias)
}

#[cfg(test)]
mod tests;
