//! ModernBERT: an encoder without tables of positions and token types and without biases. Queries and keys
//! are rotated; most layers attend within a window, the others to the whole text, with another base of the
//! rotation. Norms come before attention and feed-forward, which is a GELU times a gate.

use super::bert::{EncoderTensors, Head, HeadOut, label_bias, needed, projection_to_labels};
use super::tensors::{TensorFinder, TensorProblem};
use super::{ArchSizes, Architecture};
use crate::checkpoint::{LayerAttention, ModernBertConfig, StoredTensors};
use crate::model::PlanRequest;
use std::sync::Arc;
use trustformers_plan::{
    EncoderScores, Hyper, Plan, PlanBuilder, PlanError, Pooling, RopeLayout, RopeScaling, RopeSpec, Value,
    Weight, WeightId, WeightView, Weights,
};

/// The word in `model_type` of `config.json`.
pub(crate) const MODEL_TYPE: &str = "modernbert";

/// The projection to labels.
const LABELS: &str = "classifier.weight";

/// The prefix of tensor names where the encoder is a part of a larger class.
const PREFIX: &str = "model.";

/// A checkpoint's configuration with how its rows become an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModernBertShape<'a> {
    pub(crate) config: &'a ModernBertConfig,
    pub(crate) head: Head,
}

/// A checked ModernBERT.
#[derive(Debug)]
struct ModernBert {
    hyper: Hyper,
    eps: f32,
    head: Head,
    words: WeightId,
    embedding_norm: WeightId,
    layers: Vec<ModernLayer>,
    final_norm: WeightId,
    head_dense: Option<ModernHead>,
    /// From a row to the labels of its token, where tokens have labels.
    token_head: Option<WeightId>,
    /// The bias of all norms, which have none.
    zeros: WeightId,
}

#[derive(Debug)]
struct ModernLayer {
    attention: LayerAttention,
    /// The first layer has none: its rows were normed just before.
    attention_norm: Option<WeightId>,
    query: WeightId,
    key: WeightId,
    value: WeightId,
    attention_output: WeightId,
    feed_forward_norm: WeightId,
    up: WeightId,
    gate: WeightId,
    down: WeightId,
}

/// The part of a classifier's head that the device computes: projection, GELU, norm.
#[derive(Debug, Clone, Copy)]
struct ModernHead {
    dense: WeightId,
    norm: WeightId,
}

impl ModernBertShape<'_> {
    /// The tensors of the file by their names in the plan.
    pub(crate) fn tensors(&self, stored: &StoredTensors) -> Result<EncoderTensors, TensorProblem> {
        let mut weights = Weights::new();
        let (mut out_weight, mut out_bias) = (None, None);
        for (name, tensor) in &stored.tensors {
            let plain = name.strip_prefix(PREFIX).unwrap_or(name);
            let of_head = plain.starts_with("head.") || plain.starts_with("classifier.");
            // No embedding depends on a head, and no score on the one that guesses words.
            if plain.starts_with("decoder.") || of_head && !self.has_head() {
                continue;
            }
            let wrong = |why: String| TensorProblem { name: name.clone(), why };
            let dtype = tensor.dtype.ok_or_else(|| {
                wrong(format!("it is stored as {}; F32, F16 and BF16 are supported", tensor.stored_as))
            })?;
            let (matrix, range) = (tensor.matrix, tensor.range.clone());
            let weight = Weight::new(plain.to_owned(), dtype, matrix, Arc::clone(&stored.source), range)
                .map_err(|error| wrong(error.to_string()))?;
            match plain {
                LABELS if self.head.scores => out_weight = Some(weight),
                "classifier.bias" => out_bias = Some(weight),
                _ => {
                    weights.push(weight).map_err(|error| wrong(error.to_string()))?;
                }
            }
        }
        let bias = "classifier.bias";
        let label_bias = self
            .head
            .by_token
            .then(|| label_bias(out_bias.take(), bias, weights.find(LABELS).map(|id| weights.get(id))));
        let head_out = if self.head.scores {
            Some(HeadOut { weight: needed(out_weight, LABELS)?, bias: needed(out_bias, bias)? })
        } else {
            None
        };
        Ok(EncoderTensors { weights, head_out, label_bias: label_bias.transpose()? })
    }

    /// Whether a projection with an activation and a norm comes before the labels.
    fn has_head(&self) -> bool {
        self.head.scores || self.head.by_token
    }

    /// Finds every tensor of the encoder, whose configuration was checked.
    pub(crate) fn resolve(&self, weights: &mut Weights) -> Result<Box<dyn Architecture>, TensorProblem> {
        let Self { config, head } = *self;
        let mut tensors = TensorFinder::new(weights);
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        let hyper = Hyper {
            width,
            layers: config.num_hidden_layers,
            heads,
            kv_heads: heads,
            head_dim: width / heads,
            vocab: config.vocab_size,
            context: head.max_tokens,
        };
        let words = tensors.matrix("embeddings.tok_embeddings.weight", config.vocab_size, width)?;
        let embedding_norm = tensors.vector("embeddings.norm.weight", width)?;
        // Layers are pushed one by one, so a missing tensor stops a wrong count before it costs memory.
        let mut layers = Vec::new();
        for index in 0..hyper.layers {
            layers.push(layer(index, config, &mut tensors)?);
        }
        let final_norm = tensors.vector("final_norm.weight", width)?;
        let head_dense = if self.has_head() {
            let dense = tensors.matrix("head.dense.weight", width, width)?;
            Some(ModernHead { dense, norm: tensors.vector("head.norm.weight", width)? })
        } else {
            None
        };
        let token_head =
            head.by_token.then(|| projection_to_labels(&mut tensors, LABELS, width)).transpose()?;
        tensors.all_used(MODEL_TYPE)?;
        let zeros = tensors.made(Weight::from_f32("zeros", (1, width), &vec![0.0; width]))?;
        let eps = config.norm_eps;
        Ok(Box::new(ModernBert {
            hyper,
            eps,
            head,
            words,
            embedding_norm,
            layers,
            final_norm,
            head_dense,
            token_head,
            zeros,
        }))
    }
}

fn layer(
    index: usize,
    config: &ModernBertConfig,
    tensors: &mut TensorFinder<'_>,
) -> Result<ModernLayer, TensorProblem> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let name = |part: &str| format!("layers.{index}.{part}");
    let attention_norm = (index > 0).then(|| tensors.vector(&name("attn_norm.weight"), width)).transpose()?;
    // Sizes are below 2^31, so that three times one of them fits.
    let joined = tensors.matrix(&name("attn.Wqkv.weight"), 3 * width, width)?;
    let mut third =
        |part: &str, first: usize| tensors.part(joined, name(part), &WeightView::Rows(first..first + width));
    let (query, key, value) =
        (third("attn.query", 0)?, third("attn.key", width)?, third("attn.value", 2 * width)?);
    let attention_output = tensors.matrix(&name("attn.Wo.weight"), width, width)?;
    let feed_forward_norm = tensors.vector(&name("mlp_norm.weight"), width)?;
    let joined = tensors.matrix(&name("mlp.Wi.weight"), 2 * inner, width)?;
    let up = tensors.part(joined, name("mlp.up"), &WeightView::Rows(0..inner))?;
    let gate = tensors.part(joined, name("mlp.gate"), &WeightView::Rows(inner..2 * inner))?;
    let down = tensors.matrix(&name("mlp.Wo.weight"), width, inner)?;
    let attention = config.attention_of_layer(index);
    Ok(ModernLayer {
        attention,
        attention_norm,
        query,
        key,
        value,
        attention_output,
        feed_forward_norm,
        up,
        gate,
        down,
    })
}

impl Architecture for ModernBert {
    fn sizes(&self) -> ArchSizes {
        ArchSizes::from(&self.hyper)
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let words = plan.embed(self.words);
        let mut stream = self.norm(&mut plan, words, self.embedding_norm);
        for (index, layer) in self.layers.iter().enumerate() {
            // Of the last layer only the first row of each text is read; the others give keys and values.
            let first_rows = index + 1 == self.layers.len() && self.head.pooling == Pooling::Cls;
            // Made before the projection that it is added to, so that the two can be one op.
            let before = if first_rows { plan.gather_first_rows(stream) } else { stream };
            let attended = self.attention(&mut plan, stream, layer, first_rows);
            let sum = plan.add(attended, before);
            let normed = self.norm(&mut plan, sum, layer.feed_forward_norm);
            let up = plan.matmul(normed, layer.up);
            let up = plan.gelu(up);
            let gate = plan.matmul(normed, layer.gate);
            let gated = plan.mul(up, gate);
            let fed = plan.matmul(gated, layer.down);
            stream = plan.add(fed, sum);
        }
        stream = self.norm(&mut plan, stream, self.final_norm);
        let Head { mut pooling, normalise, by_token, .. } = self.head;
        if let Some(ModernHead { dense, norm }) = self.head_dense {
            // A head of texts reads one row of each; the first ones were gathered before.
            if !by_token && pooling != Pooling::Cls {
                stream = plan.pool_rows(stream, pooling);
                pooling = Pooling::Cls;
            }
            let projected = plan.matmul(stream, dense);
            let activated = plan.gelu(projected);
            stream = self.norm(&mut plan, activated, norm);
        }
        if let Some(labels) = self.token_head {
            let rows = plan.gather_rows(stream);
            plan.label_logits(rows, labels);
        } else {
            plan.pool(stream, pooling, normalise);
        }
        plan.finish(&request.fused)
    }
}

impl ModernBert {
    /// Attention of all rows, or of the first row of each text, to a layer's rows.
    fn attention(
        &self,
        plan: &mut PlanBuilder<'_>,
        stream: Value,
        layer: &ModernLayer,
        first_rows: bool,
    ) -> Value {
        let head_dim = self.hyper.head_dim;
        let LayerAttention { rope_base: base, window } = layer.attention;
        let (layout, scaling) = (RopeLayout::Neox, RopeScaling::NONE);
        let rotation = RopeSpec { layout, base, dims: head_dim, head_dim, scaling };
        let normed = layer.attention_norm.map_or(stream, |norm| self.norm(plan, stream, norm));
        // The first row has position 0, which no rotation changes.
        let query = if first_rows {
            let asking = plan.gather_first_rows(normed);
            plan.matmul(asking, layer.query)
        } else {
            let query = plan.matmul(normed, layer.query);
            plan.rope(query, rotation)
        };
        let key = plan.matmul(normed, layer.key);
        let key = plan.rope(key, rotation);
        let value = plan.matmul(normed, layer.value);
        let scores = EncoderScores { window, ..(1.0 / (head_dim as f32).sqrt()).into() };
        let mixed = plan.encoder_attention(query, key, value, scores);
        plan.matmul(mixed, layer.attention_output)
    }

    fn norm(&self, plan: &mut PlanBuilder<'_>, input: Value, weight: WeightId) -> Value {
        plan.layer_norm(input, weight, self.zeros, self.eps)
    }
}
