//! BERT as an encoder of texts, and the families that compute the same. The embeddings of words,
//! positions and token types are added and normed. Blocks follow: attention over the whole text and a
//! GELU feed-forward, each normed after its residual. A text's rows are pooled into one vector; of a
//! classifier the first row goes through the first projection of its head, and the host does the rest
//! (`score_head.rs`).

use super::encoder_family::{EncoderFamily, HeadActivation};
use super::tensors::{TensorFinder, TensorProblem};
use super::{ArchSizes, Architecture};
use crate::checkpoint::{BertConfig, StoredTensor, StoredTensors};
use crate::model::PlanRequest;
use std::sync::Arc;
use trustformers_plan::{Hyper, Plan, PlanBuilder, PlanError, Pooling, Value, Weight, WeightId, Weights};

/// Buffers that PyTorch keeps beside the weights: the numbers 0, 1, 2, ... and zeros.
const BUFFERS: [&str; 2] = ["embeddings.position_ids", "embeddings.token_type_ids"];

/// The table of positions.
const POSITIONS: &str = "embeddings.position_embeddings.weight";
/// The table of token types. Where texts come one at a time all tokens have type 0, and only that row is
/// kept.
const TYPES: &str = "embeddings.token_type_embeddings.weight";
/// The table of positions and token types together, made at load for models that read pairs of texts: the
/// rows of all positions with type 0, then those with type 1.
const SEGMENTS: &str = "embeddings.segments";

/// The first projection of a classifier's head.
const HEAD_DENSE: &str = "head.dense";
/// The second one, which stays on the host.
const HEAD_OUT: &str = "head.out";

/// How an encoder's rows become its answer, and how long its texts may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) pooling: Pooling,
    pub(crate) normalise: bool,
    /// Whether a classifier's head follows; pooling takes the first row then.
    pub(crate) scores: bool,
    /// At most the table's positions.
    pub(crate) max_tokens: usize,
}

/// A checked encoder.
#[derive(Debug)]
struct Bert {
    hyper: Hyper,
    eps: f32,
    head: Head,
    words: WeightId,
    positions: PositionTable,
    types: Option<WeightId>,
    norm: Affine,
    /// From the width of the embeddings to that of the blocks, where they differ.
    project: Option<Affine>,
    layers: Vec<EncoderLayer>,
    head_dense: Option<HeadDense>,
}

/// The table of positions.
#[derive(Debug, Clone, Copy)]
struct PositionTable {
    weight: WeightId,
    /// Rows of a first segment, where the table has those of a second one behind them.
    second_segment: Option<usize>,
}

/// The part of a classifier's head that the device computes.
#[derive(Debug, Clone, Copy)]
struct HeadDense {
    dense: Affine,
    activation: HeadActivation,
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

/// The tensors of an encoder, by the names of a plain `BertModel`.
pub(crate) struct EncoderTensors {
    /// Those of the plan.
    pub(crate) weights: Weights,
    /// The last projection of a classifier, from the head's width to the labels, with its bias.
    pub(crate) head_out: Option<HeadOut>,
}

/// The last projection of a classifier.
#[derive(Debug)]
pub(crate) struct HeadOut {
    /// Labels × width.
    pub(crate) weight: Weight,
    /// 1 × labels.
    pub(crate) bias: Weight,
}

/// A checkpoint's configuration with what it decides about tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EncoderShape<'a> {
    pub(crate) family: &'static EncoderFamily,
    pub(crate) config: &'a BertConfig,
    pub(crate) head: Head,
}

impl EncoderShape<'_> {
    /// Whether rows of a second segment have an embedding of their own.
    fn has_segments(&self) -> bool {
        self.head.scores && self.family.token_types && self.config.type_vocab_size > 1
    }

    /// The name of a tensor in the plan; `None` where no answer depends on it.
    fn name_in_plan(&self, stored: &str) -> Option<String> {
        let plain = self.family.plain_name(stored);
        let part = |prefix: &str, own: &str| {
            plain
                .strip_prefix(prefix)
                .and_then(|rest| rest.strip_prefix('.'))
                .map(|rest| format!("{own}.{rest}"))
        };
        if self.head.scores {
            let dense = part(self.family.head_dense, HEAD_DENSE);
            if let Some(name) = dense.or_else(|| part(self.family.head_out, HEAD_OUT)) {
                return Some(name);
            }
        }
        let unused = self.family.unused.iter().any(|unused| plain.starts_with(unused));
        (!unused && !BUFFERS.contains(&plain.as_str())).then_some(plain)
    }

    /// The tensors of the file by their names in the plan.
    pub(crate) fn tensors(&self, stored: &StoredTensors) -> Result<EncoderTensors, TensorProblem> {
        let mut weights = Weights::new();
        let (mut out_weight, mut out_bias) = (None, None);
        let (mut positions, mut types) = (None, None);
        for (name, tensor) in &stored.tensors {
            let Some(plain) = self.name_in_plan(name) else { continue };
            let weight = self
                .weight(plain, tensor, stored)
                .map_err(|why| TensorProblem { name: name.clone(), why })?;
            let kept = match weight.name() {
                "head.out.weight" => &mut out_weight,
                "head.out.bias" => &mut out_bias,
                POSITIONS if self.has_segments() => &mut positions,
                TYPES if self.has_segments() => &mut types,
                _ => {
                    weights
                        .push(weight)
                        .map_err(|error| TensorProblem { name: name.clone(), why: error.to_string() })?;
                    continue;
                }
            };
            *kept = Some(weight);
        }
        if self.has_segments() {
            let table = segments(&needed(positions, POSITIONS)?, &needed(types, TYPES)?);
            let table = table.and_then(|table| weights.push(table));
            table.map_err(|error| TensorProblem { name: SEGMENTS.to_owned(), why: error.to_string() })?;
        }
        let head_out = if self.head.scores {
            let (weight, bias) = (self.family.head_out_name("weight"), self.family.head_out_name("bias"));
            Some(HeadOut { weight: needed(out_weight, &weight)?, bias: needed(out_bias, &bias)? })
        } else {
            None
        };
        Ok(EncoderTensors { weights, head_out })
    }

    /// A tensor as a weight: of the tables of positions and types only the rows that texts can have.
    fn weight(&self, plain: String, tensor: &StoredTensor, stored: &StoredTensors) -> Result<Weight, String> {
        let Some(dtype) = tensor.dtype else {
            return Err(format!("it is stored as {}; F32, F16 and BF16 are supported", tensor.stored_as));
        };
        let (mut matrix, mut range) = (tensor.matrix, tensor.range.clone());
        let row_bytes = range.len() / matrix.0.max(1);
        if plain == TYPES {
            let (rows, cols) = (self.config.type_vocab_size, self.config.embedding_width());
            if matrix != (rows, cols) {
                return Err(format!(
                    "it is {} x {}, config.json asks for {rows} x {cols}; download the model again",
                    matrix.0, matrix.1
                ));
            }
            // Two types at most are ever used: a text, and another one beside it.
            matrix.0 = if self.has_segments() { 2 } else { 1 };
            range.end = range.start + matrix.0 * row_bytes;
        }
        let first = self.config.first_position(self.family);
        if plain == POSITIONS && matrix.0 > first {
            range.start += first * row_bytes;
            matrix.0 -= first;
        }
        Weight::new(plain, dtype, matrix, Arc::clone(&stored.source), range)
            .map_err(|error| error.to_string())
    }
}

/// A tensor that must be in the file.
pub(super) fn needed(tensor: Option<Weight>, name: &str) -> Result<Weight, TensorProblem> {
    tensor.ok_or_else(|| TensorProblem {
        name: name.to_owned(),
        why: "it is missing; the file is incomplete: download the model again".to_owned(),
    })
}

/// One table of all positions with the first type, then with the second. Adding the two first changes the
/// last bit of some values of what the library computes, and costs no op.
fn segments(positions: &Weight, types: &Weight) -> Result<Weight, trustformers_plan::WeightError> {
    let (rows, cols) = (positions.rows(), positions.cols());
    let (mut all, mut position, mut of_type) = (Vec::new(), vec![0.0; cols], vec![0.0; types.cols()]);
    for segment in 0..types.rows() {
        types.dequantise_row(segment, &mut of_type);
        for row in 0..rows {
            positions.dequantise_row(row, &mut position);
            all.extend(position.iter().zip(&of_type).map(|(position, of_type)| position + of_type));
        }
    }
    Weight::from_f32(SEGMENTS, (types.rows() * rows, cols), &all)
}

/// Finds every tensor of the encoder that `shape`, which was checked, describes.
pub(crate) fn resolve(
    shape: &EncoderShape<'_>,
    weights: &mut Weights,
) -> Result<Box<dyn Architecture>, TensorProblem> {
    let EncoderShape { family, config, head } = *shape;
    let mut tensors = TensorFinder::new(weights);
    let (width, embedding) = (config.hidden_size, config.embedding_width());
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
    let words = tensors.matrix("embeddings.word_embeddings.weight", config.vocab_size, embedding)?;
    let rows = config.positions(family);
    let positions = if shape.has_segments() {
        let weight = tensors.matrix(SEGMENTS, 2 * rows, embedding)?;
        PositionTable { weight, second_segment: Some(rows) }
    } else {
        PositionTable { weight: tensors.matrix(POSITIONS, rows, embedding)?, second_segment: None }
    };
    let one_type = family.token_types && !shape.has_segments();
    let types = one_type.then(|| tensors.matrix(TYPES, 1, embedding)).transpose()?;
    let norm = norm(&mut tensors, "embeddings.LayerNorm", embedding)?;
    let project = (embedding != width)
        .then(|| affine(&mut tensors, "embeddings_project", (width, embedding).into()))
        .transpose()?;
    // Layers are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, config, &mut tensors)?);
    }
    let head_dense = if head.scores {
        let dense = affine(&mut tensors, HEAD_DENSE, (width, width).into())?;
        Some(HeadDense { dense, activation: family.head_activation })
    } else {
        None
    };
    tensors.all_used(family.model_type)?;
    let eps = config.layer_norm_eps;
    Ok(Box::new(Bert { hyper, eps, head, words, positions, types, norm, project, layers, head_dense }))
}

/// A projection with its bias.
fn affine(
    tensors: &mut TensorFinder<'_>,
    name: &str,
    shape: trustformers_plan::MatrixShape,
) -> Result<Affine, TensorProblem> {
    Ok(Affine {
        weight: tensors.matrix(&format!("{name}.weight"), shape.rows, shape.cols)?,
        bias: tensors.vector(&format!("{name}.bias"), shape.rows)?,
    })
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
        let Hyper { width, context, vocab, layers, kv_heads, head_dim, .. } = self.hyper;
        ArchSizes { width, context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let words = plan.embed(self.words);
        let PositionTable { weight: table, second_segment } = self.positions;
        let positions = match second_segment {
            Some(second) => plan.embed_positions_of_segments(table, second),
            None => plan.embed_positions(table),
        };
        let sum = plan.add(words, positions);
        let sum = self.types.map_or(sum, |types| plan.add_row(sum, types));
        let normed = plan.layer_norm(sum, self.norm.weight, self.norm.bias, self.eps);
        let mut stream = self.project.map_or(normed, |project| dense(&mut plan, normed, project));
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
        if let Some(HeadDense { dense: projection, activation }) = self.head_dense {
            stream = dense(&mut plan, stream, projection);
            // The host computes the other activations: they need no erf.
            if activation == HeadActivation::Gelu {
                stream = plan.gelu(stream);
            }
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
