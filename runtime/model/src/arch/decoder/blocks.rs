//! A decoder's block: its tensors, and its two parts as ops of a plan.

use super::{BlockNorms, Decoder, Family, Gate, QkNorm, scaled};
use crate::arch::tensors::TensorFinder;
use crate::gguf::GgufProblem;
use std::ops::Range;
use trustformers_plan::{
    EncoderScores, ExpertWeights, Experts, Hyper, PlanBuilder, Value, WeightId, WeightView,
};

/// The tensors of a block.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) attention: PartNorms,
    query: Projection,
    key: Projection,
    value: Projection,
    query_norm: Option<WeightId>,
    key_norm: Option<WeightId>,
    attention_output: WeightId,
    pub(super) feed_forward: PartNorms,
    matrices: Matrices,
}

/// The matrices of a feed-forward part.
#[derive(Debug, Clone, Copy)]
enum Matrices {
    Dense {
        gate: WeightId,
        up: WeightId,
        down: WeightId,
    },
    /// Each row uses the experts to which the router gives the highest scores.
    Routed {
        router: WeightId,
        experts: Experts,
        weights: ExpertWeights,
    },
}

/// The norms of what a part of a block reads, and of what it adds to the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartNorms {
    pub(super) before: Option<WeightId>,
    pub(super) after: Option<WeightId>,
}

#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: WeightId,
    bias: Option<WeightId>,
}

/// Finds the tensors of a family's blocks.
pub(super) struct Blocks<'f, 't, 'a> {
    pub(super) family: &'f Family,
    pub(super) hyper: Hyper,
    pub(super) feed_forward: usize,
    /// Of every block, where blocks have experts.
    pub(super) experts: Option<Experts>,
    /// Whether norms are stored less one.
    pub(super) less_one: bool,
    pub(super) tensors: &'t mut TensorFinder<'a>,
}

impl Blocks<'_, '_, '_> {
    pub(super) fn find(&mut self, index: usize) -> Result<Block, GgufProblem> {
        let Hyper { width, heads, kv_heads, head_dim, .. } = self.hyper;
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        // Sizes are below 2³¹ each, so their products fit 64 bits.
        let (query, kv) = (heads * head_dim, kv_heads * head_dim);
        let attention = self.part_norms(&name("attn_norm"), &name("post_attention_norm"))?;
        let joined = self.joined(index)?;
        let query_part = self.projection(joined, &format!("blk.{index}.attn_q"), 0..query)?;
        let key_part = self.projection(joined, &format!("blk.{index}.attn_k"), query..query + kv)?;
        let values = query + kv..query + 2 * kv;
        let value_part = self.projection(joined, &format!("blk.{index}.attn_v"), values)?;
        let query_norm = self.qk_norm(&name("attn_q_norm"), query)?;
        let key_norm = self.qk_norm(&name("attn_k_norm"), kv)?;
        let attention_output = self.tensors.matrix(&name("attn_output"), width, query)?;
        let feed_forward = self.part_norms(&name("ffn_norm"), &name("post_ffw_norm"))?;
        let matrices = self.matrices(index)?;
        Ok(Block {
            attention,
            query: query_part,
            key: key_part,
            value: value_part,
            query_norm,
            key_norm,
            attention_output,
            feed_forward,
            matrices,
        })
    }

    fn matrices(&mut self, index: usize) -> Result<Matrices, GgufProblem> {
        let width = self.hyper.width;
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let Some(experts) = self.experts else {
            let (gate, up) = self.gate_and_up(index)?;
            let down = self.tensors.matrix(&name("ffn_down"), width, self.feed_forward)?;
            return Ok(Matrices::Dense { gate, up, down });
        };
        let Experts { count, hidden, .. } = experts;
        let router = self.tensors.matrix(&name("ffn_gate_inp"), count, width)?;
        // Sizes are below 2³¹ each, so their products fit 64 bits.
        let gate = self.tensors.matrix(&name("ffn_gate_exps"), count * hidden, width)?;
        let up = self.tensors.matrix(&name("ffn_up_exps"), count * hidden, width)?;
        let down = self.tensors.matrix(&name("ffn_down_exps"), count * width, hidden)?;
        Ok(Matrices::Routed { router, experts, weights: ExpertWeights { gate, up, down } })
    }

    /// A norm's weight.
    pub(super) fn norm(&mut self, name: &str, len: usize) -> Result<WeightId, GgufProblem> {
        let found = if self.less_one {
            self.tensors.vector_plus_one(name, len)
        } else {
            self.tensors.vector(name, len)
        };
        Ok(found?)
    }

    fn part_norms(&mut self, before: &str, after: &str) -> Result<PartNorms, GgufProblem> {
        let (width, norms) = (self.hyper.width, self.family.norms);
        let (has_before, has_after) = (norms != BlockNorms::Post, norms != BlockNorms::Pre);
        let before = has_before.then(|| self.norm(before, width)).transpose()?;
        let after = has_after.then(|| self.norm(after, width)).transpose()?;
        Ok(PartNorms { before, after })
    }

    fn qk_norm(&mut self, name: &str, row: usize) -> Result<Option<WeightId>, GgufProblem> {
        let len = match self.family.qk_norm {
            QkNorm::None => return Ok(None),
            QkNorm::Heads => self.hyper.head_dim,
            QkNorm::Rows => row,
        };
        self.norm(name, len).map(Some)
    }

    /// Queries, keys and values where one tensor holds all three, one after the other.
    fn joined(&mut self, index: usize) -> Result<Option<Projection>, GgufProblem> {
        let Hyper { width, heads, kv_heads, head_dim, .. } = self.hyper;
        let rows = (heads + 2 * kv_heads) * head_dim;
        let weight = self.tensors.optional_matrix(&format!("blk.{index}.attn_qkv.weight"), rows, width)?;
        let Some(weight) = weight else { return Ok(None) };
        let bias = self
            .family
            .qkv_bias
            .then(|| self.tensors.vector(&format!("blk.{index}.attn_qkv.bias"), rows))
            .transpose()?;
        Ok(Some(Projection { weight, bias }))
    }

    /// The projection of that name; `rows` are its rows where one tensor holds all three.
    fn projection(
        &mut self,
        joined: Option<Projection>,
        name: &str,
        rows: Range<usize>,
    ) -> Result<Projection, GgufProblem> {
        let name = |kind: &str| format!("{name}.{kind}");
        if let Some(Projection { weight, bias }) = joined {
            let weight = self.tensors.part(weight, name("weight"), &WeightView::Rows(rows.clone()))?;
            let bias = bias.map(|bias| self.tensors.part(bias, name("bias"), &WeightView::Cols(rows)));
            return Ok(Projection { weight, bias: bias.transpose()? });
        }
        let weight = self.tensors.matrix(&name("weight"), rows.len(), self.hyper.width)?;
        let bias = self.family.qkv_bias.then(|| self.tensors.vector(&name("bias"), rows.len()));
        Ok(Projection { weight, bias: bias.transpose()? })
    }

    /// The first projections of the feed-forward part, as two tensors or the halves of one.
    fn gate_and_up(&mut self, index: usize) -> Result<(WeightId, WeightId), GgufProblem> {
        let (width, hidden) = (self.hyper.width, self.feed_forward);
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        if !self.family.joined_gate {
            let gate = self.tensors.matrix(&name("ffn_gate"), hidden, width)?;
            return Ok((gate, self.tensors.matrix(&name("ffn_up"), hidden, width)?));
        }
        let joined = self.tensors.matrix(&name("ffn_up"), 2 * hidden, width)?;
        let gate = self.tensors.part(joined, name("ffn_gate"), &WeightView::Rows(0..hidden))?;
        let up = WeightView::Rows(hidden..2 * hidden);
        Ok((gate, self.tensors.part(joined, name("ffn_up.upper"), &up)?))
    }
}

/// The rows that a block's attention reads, normed where the family norms them.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockRows {
    pub(super) index: usize,
    /// All rows, for keys and values.
    pub(super) input: Value,
    /// The rows that attend.
    pub(super) asking: Value,
}

impl Decoder {
    /// `value` normed, where there is a norm.
    pub(super) fn norm(&self, plan: &mut PlanBuilder<'_>, value: Value, by: Option<WeightId>) -> Value {
        by.map_or(value, |weight| plan.rms_norm(value, weight, self.eps))
    }

    /// The stream with what a part adds to it.
    pub(super) fn add_part(
        &self,
        plan: &mut PlanBuilder<'_>,
        stream: Value,
        added: Value,
        norm: Option<WeightId>,
    ) -> Value {
        let added = self.norm(plan, added, norm);
        let added = scaled(plan, added, self.factors.residual);
        plan.add(stream, added)
    }

    pub(super) fn attention(&self, plan: &mut PlanBuilder<'_>, rows: BlockRows, block: &Block) -> Value {
        let BlockRows { index, input, asking } = rows;
        let query = project(plan, asking, block.query);
        let key = project(plan, input, block.key);
        let value = project(plan, input, block.value);
        let mut query = self.norm(plan, query, block.query_norm);
        let mut key = self.norm(plan, key, block.key_norm);
        if self.kinds.rotated.has(index) {
            let is_windowed = self.kinds.window_of(index).is_some();
            let rotation = if is_windowed { &self.window_rotation } else { &self.rotation };
            let spec = rotation.at(plan.context_tokens());
            (query, key) = (plan.rope(query, spec), plan.rope(key, spec));
        }
        let mixed = if self.reads.is_some() {
            let scores = EncoderScores { causal: true, ..self.factors.scores.into() };
            plan.encoder_attention(query, key, value, scores)
        } else {
            plan.kv_write(index, key, value);
            plan.attention(index, query, self.scores(index))
        };
        plan.matmul(mixed, block.attention_output)
    }

    pub(super) fn feed_forward(&self, plan: &mut PlanBuilder<'_>, stream: Value, block: &Block) -> Value {
        let input = self.norm(plan, stream, block.feed_forward.before);
        let (gate, up, down) = match block.matrices {
            Matrices::Dense { gate, up, down } => (gate, up, down),
            Matrices::Routed { router, experts, weights } => {
                let scores = plan.matmul(input, router);
                return plan.experts(input, scores, experts, weights);
            }
        };
        let gate = plan.matmul(input, gate);
        let up = plan.matmul(input, up);
        let gated = match self.gate {
            Gate::Silu => plan.silu_mul(gate, up),
            Gate::Gelu => {
                let gate = plan.gelu_tanh(gate);
                plan.mul(gate, up)
            }
        };
        plan.matmul(gated, down)
    }
}

fn project(plan: &mut PlanBuilder<'_>, input: Value, by: Projection) -> Value {
    let product = plan.matmul(input, by.weight);
    by.bias.map_or(product, |bias| plan.add_row(product, bias))
}
