//! BERT as an encoder of texts, and the families that compute the same. The embeddings of words,
//! positions and token types are added and normed. Blocks follow: attention over the whole text and a
//! feed-forward part, each normed after its residual. A text's rows are pooled into one vector; of a
//! classifier the first row goes through the first projection of its head, and the host does the rest
//! (`score_head.rs`). Where tokens have labels, every row is projected to them.

use super::encoder_family::{EncoderBlocks, EncoderFamily, HeadActivation, TOKEN_HEAD};
use super::mpnet;
use super::tensors::{TensorFinder, TensorProblem};
use super::{ArchSizes, Architecture};
use crate::checkpoint::{BertConfig, StoredTensor, StoredTensors};
use crate::model::PlanRequest;
use std::sync::Arc;
use trustformers_plan::{
    EncoderScores, Hyper, MatrixShape, Plan, PlanBuilder, PlanError, Pooling, RopeLayout, RopeScaling,
    RopeSpec, Value, Weight, WeightError, WeightId, WeightView, Weights,
};

/// Buffers that PyTorch keeps beside the weights: the numbers 0, 1, 2, ... and zeros.
const BUFFERS: [&str; 2] = ["embeddings.position_ids", "embeddings.token_type_ids"];

/// The table of positions.
const POSITIONS: &str = "embeddings.position_embeddings.weight";
/// The table of token types. Where texts come one at a time all tokens have type 0, and only that row is
/// kept.
pub(super) const TYPES: &str = "embeddings.token_type_embeddings.weight";
/// The table of positions and token types together, made at load for models that read pairs of texts: the
/// rows of all positions with type 0, then those with type 1.
const SEGMENTS: &str = "embeddings.segments";

/// The table of what scores get for distances, where there is one.
const DISTANCES: &str = "encoder.relative_attention_bias.weight";

/// The first projection of a classifier's head.
pub(super) const HEAD_DENSE: &str = "head.dense";
/// The second one, which stays on the host, or the only one, of every row, where tokens have labels.
pub(super) const HEAD_OUT: &str = "head.out";
/// The matrix of the latter.
const LABELS: &str = "head.out.weight";

/// How an encoder's rows become its answer, and how long its texts may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) pooling: Pooling,
    pub(crate) normalise: bool,
    /// Whether a classifier's head follows, which reads the pooled row.
    pub(crate) scores: bool,
    /// Whether each token has scores of labels; nothing is pooled then.
    pub(crate) by_token: bool,
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
    positions: Option<PositionTable>,
    types: Option<WeightId>,
    norm: NormWeights,
    /// From the width of the embeddings to that of the blocks, where they differ.
    project: Option<Dense>,
    /// Of queries and keys, where there is no table of positions.
    rotation: Option<RopeSpec>,
    /// What scores get for distances.
    distances: Option<WeightId>,
    layers: Vec<EncoderLayer>,
    head_dense: Option<HeadDense>,
    /// From a row to the labels of its token, where tokens have labels.
    token_head: Option<WeightId>,
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
    dense: Dense,
    activation: HeadActivation,
}

#[derive(Debug)]
struct EncoderLayer {
    query: Dense,
    key: Dense,
    value: Dense,
    attention_output: Dense,
    attention_norm: NormWeights,
    up: Dense,
    /// What is multiplied with `up`, after its activation; where there is none, `up` is activated.
    gate: Option<Dense>,
    down: Dense,
    output_norm: NormWeights,
}

/// A projection.
#[derive(Debug, Clone, Copy)]
struct Dense {
    weight: WeightId,
    bias: Option<WeightId>,
}

/// A norm with its bias.
#[derive(Debug, Clone, Copy)]
struct NormWeights {
    weight: WeightId,
    bias: WeightId,
}

/// The tensors of an encoder, by the names of a plain `BertModel`.
pub(crate) struct EncoderTensors {
    /// Those of the plan.
    pub(crate) weights: Weights,
    /// The last projection of a classifier, from the head's width to the labels, with its bias.
    pub(crate) head_out: Option<HeadOut>,
    /// The bias of the projection to the labels of tokens, 1 × labels.
    pub(crate) label_bias: Option<Weight>,
}

/// The last projection of a classifier.
#[derive(Debug)]
pub(crate) struct HeadOut {
    /// Labels × width.
    pub(crate) weight: Weight,
    /// 1 × labels.
    pub(crate) bias: Weight,
}

/// A tensor under its name in the plan.
pub(super) struct NamedWeight {
    /// Its name in the file.
    pub(super) stored: String,
    pub(super) weight: Weight,
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
    pub(super) fn has_segments(&self) -> bool {
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
        if self.head.by_token
            && let Some(name) = part(TOKEN_HEAD, HEAD_OUT)
        {
            return Some(name);
        }
        let unused = self.family.unused.iter().any(|unused| plain.starts_with(unused));
        (!unused && !BUFFERS.contains(&plain.as_str())).then_some(plain)
    }

    /// The tensors of the file by their names in the plan.
    pub(crate) fn tensors(&self, stored: &StoredTensors) -> Result<EncoderTensors, TensorProblem> {
        let mut named = Vec::new();
        for (name, tensor) in &stored.tensors {
            let Some(plain) = self.name_in_plan(name) else { continue };
            let weight = self
                .weight(plain, tensor, stored)
                .map_err(|why| TensorProblem { name: name.clone(), why })?;
            named.push(NamedWeight { stored: name.clone(), weight });
        }
        let (family, by_token) = (self.family, self.head.by_token);
        let name = |part| if by_token { format!("{TOKEN_HEAD}.{part}") } else { family.head_out_name(part) };
        let head_out = ["weight", "bias"].map(name);
        self.sorted(named, &head_out)
    }

    /// Keeps what is no weight of the plan apart, and makes the table of segments. `head_out` names the last
    /// projection and its bias, for messages.
    pub(super) fn sorted(
        &self,
        named: Vec<NamedWeight>,
        head_out: &[String; 2],
    ) -> Result<EncoderTensors, TensorProblem> {
        let mut weights = Weights::new();
        let (mut out_weight, mut out_bias) = (None, None);
        let (mut positions, mut types) = (None, None);
        for NamedWeight { stored: name, weight } in named {
            let kept = match weight.name() {
                LABELS if self.head.scores => &mut out_weight,
                "head.out.bias" => &mut out_bias,
                POSITIONS if self.has_segments() => &mut positions,
                TYPES if self.has_segments() => &mut types,
                _ => {
                    weights.push(weight).map_err(|error| TensorProblem { name, why: error.to_string() })?;
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
        let [weight, bias] = head_out;
        let label_bias = self
            .head
            .by_token
            .then(|| label_bias(out_bias.take(), bias, weights.find(LABELS).map(|id| weights.get(id))));
        let head_out = if self.head.scores {
            Some(HeadOut { weight: needed(out_weight, weight)?, bias: needed(out_bias, bias)? })
        } else {
            None
        };
        Ok(EncoderTensors { weights, head_out, label_bias: label_bias.transpose()? })
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

/// The bias of the projection `labels` of every row, which has a value for each label.
pub(super) fn label_bias(
    bias: Option<Weight>,
    name: &str,
    labels: Option<&Weight>,
) -> Result<Weight, TensorProblem> {
    let bias = needed(bias, name)?;
    let count = labels.map_or(bias.cols(), Weight::rows);
    if (bias.rows(), bias.cols()) == (1, count) {
        return Ok(bias);
    }
    let (rows, cols) = (bias.rows(), bias.cols());
    let why = format!("it is {rows} x {cols}, 1 x {count} was expected; download the model again");
    Err(TensorProblem { name: name.to_owned(), why })
}

/// One table of all positions with the first type, then with the second. Adding the two first changes the
/// last bit of some values of what the library computes, and costs no op.
fn segments(positions: &Weight, types: &Weight) -> Result<Weight, WeightError> {
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
    let positions = if family.blocks == EncoderBlocks::Rotary {
        None
    } else if shape.has_segments() {
        let weight = tensors.matrix(SEGMENTS, 2 * rows, embedding)?;
        Some(PositionTable { weight, second_segment: Some(rows) })
    } else {
        Some(PositionTable { weight: tensors.matrix(POSITIONS, rows, embedding)?, second_segment: None })
    };
    let one_type = family.token_types && !shape.has_segments();
    let types = one_type.then(|| tensors.matrix(TYPES, 1, embedding)).transpose()?;
    let norm = norm(&mut tensors, "embeddings.LayerNorm", embedding)?;
    let project = (embedding != width)
        .then(|| dense_weights(&mut tensors, "embeddings_project", (width, embedding).into(), true))
        .transpose()?;
    let distances = family.distances.then(|| distances(&mut tensors, &hyper)).transpose()?;
    // Layers are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, shape, &mut tensors)?);
    }
    let head_dense = if head.scores {
        let dense = dense_weights(&mut tensors, HEAD_DENSE, (width, width).into(), true)?;
        Some(HeadDense { dense, activation: family.head_activation })
    } else {
        None
    };
    let token_head = head.by_token.then(|| projection_to_labels(&mut tensors, LABELS, width)).transpose()?;
    tensors.all_used(family.model_type)?;
    let eps = config.layer_norm_eps;
    let rotation = config.rope_base().filter(|_| family.blocks == EncoderBlocks::Rotary);
    let rotation = rotation.map(|base| rotation_of(base, &hyper));
    Ok(Box::new(Bert {
        hyper,
        eps,
        head,
        words,
        positions,
        types,
        norm,
        project,
        rotation,
        distances,
        layers,
        head_dense,
        token_head,
    }))
}

/// A projection from rows of `width` to labels, of which the file decides the number.
pub(super) fn projection_to_labels(
    tensors: &mut TensorFinder<'_>,
    name: &str,
    width: usize,
) -> Result<WeightId, TensorProblem> {
    let labels = tensors.rows_of(name).unwrap_or(1);
    tensors.matrix(name, labels, width)
}

/// The rotation of whole heads.
fn rotation_of(base: f32, hyper: &Hyper) -> RopeSpec {
    let head_dim = hyper.head_dim;
    RopeSpec { layout: RopeLayout::Neox, base, dims: head_dim, head_dim, scaling: RopeScaling::NONE }
}

/// The values for all distances in a text.
fn distances(tensors: &mut TensorFinder<'_>, hyper: &Hyper) -> Result<WeightId, TensorProblem> {
    let table = tensors.values(DISTANCES, mpnet::BUCKETS, hyper.heads)?;
    let values = mpnet::by_distance(&table, hyper.heads, hyper.context.saturating_sub(1));
    tensors.made(Weight::from_f32("by_distance", (1, values.len()), &values))
}

/// A projection, whose bias must be there where it is `biased`.
fn dense_weights(
    tensors: &mut TensorFinder<'_>,
    name: &str,
    shape: MatrixShape,
    biased: bool,
) -> Result<Dense, TensorProblem> {
    let weight = tensors.matrix(&format!("{name}.weight"), shape.rows, shape.cols)?;
    let bias = biased.then(|| tensors.vector(&format!("{name}.bias"), shape.rows)).transpose()?;
    Ok(Dense { weight, bias })
}

fn norm(tensors: &mut TensorFinder<'_>, name: &str, width: usize) -> Result<NormWeights, TensorProblem> {
    Ok(NormWeights {
        weight: tensors.vector(&format!("{name}.weight"), width)?,
        bias: tensors.vector(&format!("{name}.bias"), width)?,
    })
}

fn layer(
    index: usize,
    shape: &EncoderShape<'_>,
    tensors: &mut TensorFinder<'_>,
) -> Result<EncoderLayer, TensorProblem> {
    let (width, inner) = (shape.config.hidden_size, shape.config.intermediate_size);
    let biased = shape.family.blocks == EncoderBlocks::Biased;
    let name = |part: &str| format!("encoder.layer.{index}.{part}");
    let [query, key, value] = queries_keys_values(tensors, &name("attention.self"), width, biased)?;
    let mut dense = |part: &str, rows: usize, cols: usize| {
        dense_weights(tensors, &name(part), (rows, cols).into(), biased)
    };
    let attention_output = dense("attention.output.dense", width, width)?;
    let up = dense("intermediate.dense", inner, width)?;
    let gate = (!biased).then(|| dense("intermediate.gate", inner, width)).transpose()?;
    let down = dense("output.dense", width, inner)?;
    let attention_norm = norm(tensors, &name("attention.output.LayerNorm"), width)?;
    let output_norm = norm(tensors, &name("output.LayerNorm"), width)?;
    Ok(EncoderLayer { query, key, value, attention_output, attention_norm, up, gate, down, output_norm })
}

/// The projections to queries, keys and values. Without biases they may stand in one tensor.
fn queries_keys_values(
    tensors: &mut TensorFinder<'_>,
    name: &str,
    width: usize,
    biased: bool,
) -> Result<[Dense; 3], TensorProblem> {
    let whole = format!("{name}.joined.weight");
    // Sizes are below 2^31, so that three times one of them fits.
    let joined = if biased { None } else { tensors.optional_matrix(&whole, 3 * width, width)? };
    let mut part = |part: &str, first: usize| -> Result<Dense, TensorProblem> {
        let own = format!("{name}.{part}");
        let Some(joined) = joined else { return dense_weights(tensors, &own, (width, width).into(), biased) };
        let rows = WeightView::Rows(first..first + width);
        Ok(Dense { weight: tensors.part(joined, format!("{own}.weight"), &rows)?, bias: None })
    };
    Ok([part("query", 0)?, part("key", width)?, part("value", 2 * width)?])
}

impl Architecture for Bert {
    fn sizes(&self) -> ArchSizes {
        ArchSizes::from(&self.hyper)
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let words = plan.embed(self.words);
        let sum = match self.positions {
            Some(table) => {
                let positions = table.rows(&mut plan);
                plan.add(words, positions)
            }
            None => words,
        };
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
        if let Some(labels) = self.token_head {
            let rows = plan.gather_rows(stream);
            plan.label_logits(rows, labels);
        } else {
            plan.pool(stream, self.head.pooling, self.head.normalise);
        }
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

impl PositionTable {
    /// The rows of a step's tokens.
    fn rows(self, plan: &mut PlanBuilder<'_>) -> Value {
        match self.second_segment {
            Some(second) => plan.embed_positions_of_segments(self.weight, second),
            None => plan.embed_positions(self.weight),
        }
    }
}

impl Bert {
    fn attention(&self, plan: &mut PlanBuilder<'_>, input: EncoderRows, layer: &EncoderLayer) -> Value {
        let EncoderRows { asking, all } = input;
        let mut query = dense(plan, asking, layer.query);
        // The first row of a text has position 0, which no rotation changes.
        if let Some(spec) = self.rotation.filter(|_| asking == all) {
            query = plan.rope(query, spec);
        }
        let mut key = dense(plan, all, layer.key);
        if let Some(spec) = self.rotation {
            key = plan.rope(key, spec);
        }
        let value = dense(plan, all, layer.value);
        let scale = 1.0 / (self.hyper.head_dim as f32).sqrt();
        let scores = EncoderScores { distances: self.distances, ..scale.into() };
        let mixed = plan.encoder_attention(query, key, value, scores);
        dense(plan, mixed, layer.attention_output)
    }

    fn norm(&self, plan: &mut PlanBuilder<'_>, input: Value, norm: NormWeights) -> Value {
        plan.layer_norm(input, norm.weight, norm.bias, self.eps)
    }
}

fn feed_forward(plan: &mut PlanBuilder<'_>, input: Value, layer: &EncoderLayer) -> Value {
    let gate = layer.gate.map(|gate| dense(plan, input, gate));
    let up = dense(plan, input, layer.up);
    let activated = match gate {
        Some(gate) => plan.silu_mul(gate, up),
        None => plan.gelu(up),
    };
    dense(plan, activated, layer.down)
}

fn dense(plan: &mut PlanBuilder<'_>, input: Value, by: Dense) -> Value {
    let product = plan.matmul(input, by.weight);
    by.bias.map_or(product, |bias| plan.add_row(product, bias))
}

#[cfg(test)]
mod tests;
