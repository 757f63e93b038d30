//! GPT-2: learned positions, layer norms, biases everywhere, and a feed-forward part without a gate whose
//! activation is GELU by the hyperbolic tangent. Checkpoints store matrices as features in × features out.

use super::decoder::{EMBEDDING, HEAD, hyper};
use super::keys::ArchKeys;
use super::tensors::TensorFinder;
use super::{ArchSizes, Architecture};
use crate::gguf::GgufProblem;
use crate::model::PlanRequest;
use trustformers_plan::{Hyper, Plan, PlanBuilder, PlanError, Value, WeightId, WeightView, Weights};

/// Added to the variance of every norm.
const EPSILON: &str = "attention.layer_norm_epsilon";

/// The table of learned positions.
const POSITIONS: &str = "position_embd.weight";

/// A checked model.
#[derive(Debug)]
struct Gpt2 {
    hyper: Hyper,
    eps: f32,
    embedding: WeightId,
    positions: WeightId,
    layers: Vec<Gpt2Layer>,
    output_norm: BiasedWeight,
    /// The embedding itself where the head is tied.
    output: WeightId,
}

#[derive(Debug)]
struct Gpt2Layer {
    attention_norm: BiasedWeight,
    query: BiasedWeight,
    key: BiasedWeight,
    value: BiasedWeight,
    attention_output: BiasedWeight,
    feed_forward_norm: BiasedWeight,
    up: BiasedWeight,
    down: BiasedWeight,
}

/// A projection or a norm with its bias.
#[derive(Debug, Clone, Copy)]
struct BiasedWeight {
    weight: WeightId,
    bias: WeightId,
}

/// Reads sizes and tensors.
pub(super) fn resolve(
    keys: &ArchKeys<'_>,
    tensors: &mut TensorFinder<'_>,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    keys.refuse_effects(&[])?;
    let hyper = hyper(keys, tensors)?;
    let feed_forward = keys.size("feed_forward_length")?;
    let eps = keys.float(EPSILON)?;
    if eps < 0.0 {
        return Err(keys.invalid(EPSILON, format!("{eps} is negative")));
    }
    let Hyper { width, vocab, context, .. } = hyper;
    let embedding = tensors.matrix(EMBEDDING, vocab, width)?;
    let positions = tensors.matrix(POSITIONS, context, width)?;
    let mut finder = BiasedWeights { tensors: &mut *tensors, is_transposed: keys.config().is_some() };
    let mut layers = Vec::new();
    for index in 0..hyper.layers {
        layers.push(layer(index, &hyper, feed_forward, &mut finder)?);
    }
    let output_norm = finder.norm("output_norm", width)?;
    let output = tensors.optional_matrix(HEAD, vocab, width)?.unwrap_or(embedding);
    Ok(Box::new(Gpt2 { hyper, eps, embedding, positions, layers, output_norm, output }))
}

fn layer(
    index: usize,
    hyper: &Hyper,
    feed_forward: usize,
    finder: &mut BiasedWeights<'_, '_>,
) -> Result<Gpt2Layer, GgufProblem> {
    let Hyper { width, heads, kv_heads, head_dim, .. } = *hyper;
    let name = |part: &str| format!("blk.{index}.{part}");
    let (query, kv) = (heads * head_dim, kv_heads * head_dim);
    let joined = finder.projection(&name("attn_qkv"), query + 2 * kv, width)?;
    let mut first = 0;
    let mut part = |finder: &mut BiasedWeights<'_, '_>, part: &str, rows: usize| {
        let range = first..first + rows;
        first += rows;
        let name = name(part);
        let weight = WeightView::Rows(range.clone());
        let weight = finder.tensors.part(joined.weight, format!("{name}.weight"), &weight)?;
        let bias = finder.tensors.part(joined.bias, format!("{name}.bias"), &WeightView::Cols(range))?;
        Ok::<BiasedWeight, GgufProblem>(BiasedWeight { weight, bias })
    };
    let query_part = part(finder, "attn_q", query)?;
    let key = part(finder, "attn_k", kv)?;
    let value = part(finder, "attn_v", kv)?;
    Ok(Gpt2Layer {
        attention_norm: finder.norm(&name("attn_norm"), width)?,
        query: query_part,
        key,
        value,
        attention_output: finder.projection(&name("attn_output"), width, query)?,
        feed_forward_norm: finder.norm(&name("ffn_norm"), width)?,
        up: finder.projection(&name("ffn_up"), feed_forward, width)?,
        down: finder.projection(&name("ffn_down"), width, feed_forward)?,
    })
}

/// Finds weights with their biases.
struct BiasedWeights<'t, 'a> {
    tensors: &'t mut TensorFinder<'a>,
    /// Whether matrices are stored as features in × features out.
    is_transposed: bool,
}

impl BiasedWeights<'_, '_> {
    fn projection(&mut self, name: &str, rows: usize, cols: usize) -> Result<BiasedWeight, GgufProblem> {
        let weight = format!("{name}.weight");
        let weight = if self.is_transposed {
            self.tensors.transposed(&weight, rows, cols)?
        } else {
            self.tensors.matrix(&weight, rows, cols)?
        };
        Ok(BiasedWeight { weight, bias: self.tensors.vector(&format!("{name}.bias"), rows)? })
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<BiasedWeight, GgufProblem> {
        let weight = self.tensors.vector(&format!("{name}.weight"), width)?;
        Ok(BiasedWeight { weight, bias: self.tensors.vector(&format!("{name}.bias"), width)? })
    }
}

impl Architecture for Gpt2 {
    fn sizes(&self) -> ArchSizes {
        ArchSizes::from(&self.hyper)
    }

    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError> {
        let hyper = Hyper { context: request.context_tokens.min(self.hyper.context), ..self.hyper };
        let mut plan = PlanBuilder::new(weights, hyper, request.limits);
        let words = plan.embed(self.embedding);
        let positions = plan.embed_positions(self.positions);
        let mut stream = plan.add(words, positions);
        for (index, layer) in self.layers.iter().enumerate() {
            let input = self.norm(&mut plan, stream, layer.attention_norm);
            // Every row's keys and values are cached; of the last layer only the rows that need logits are
            // computed beyond that.
            let is_last = index + 1 == self.layers.len();
            let asking = if is_last {
                stream = plan.gather_rows(stream);
                self.norm(&mut plan, stream, layer.attention_norm)
            } else {
                input
            };
            let query = project(&mut plan, asking, layer.query);
            let key = project(&mut plan, input, layer.key);
            let value = project(&mut plan, input, layer.value);
            plan.kv_write(index, key, value);
            let mixed = plan.attention(index, query, 1.0 / (self.hyper.head_dim as f32).sqrt());
            let attended = project(&mut plan, mixed, layer.attention_output);
            stream = plan.add(stream, attended);
            let input = self.norm(&mut plan, stream, layer.feed_forward_norm);
            let up = project(&mut plan, input, layer.up);
            let up = plan.gelu_tanh(up);
            let fed = project(&mut plan, up, layer.down);
            stream = plan.add(stream, fed);
        }
        let last = self.norm(&mut plan, stream, self.output_norm);
        plan.logits(last, self.output);
        plan.finish(&request.fused)
    }
}

impl Gpt2 {
    fn norm(&self, plan: &mut PlanBuilder<'_>, value: Value, by: BiasedWeight) -> Value {
        plan.layer_norm(value, by.weight, by.bias, self.eps)
    }
}

fn project(plan: &mut PlanBuilder<'_>, input: Value, by: BiasedWeight) -> Value {
    let product = plan.matmul(input, by.weight);
    plan.add_row(product, by.bias)
}

#[cfg(test)]
mod tests {
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{FusedOps, Limits};

    #[test]
    fn the_plan_of_a_tiny_model() {
        let file = SeededModel { family: SeededFamily::Gpt2, layers: 1, ..SeededModel::default() }.gguf();
        let model = Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).unwrap();
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::NONE };
        insta::assert_snapshot!("tiny_gpt2", model.plan(&request).unwrap().dump());
    }
}
