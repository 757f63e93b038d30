//! A small decoder with what Gemma, Granite and Qwen3 add to a Llama: windows and soft caps of attention,
//! norms of heads, norms after a block's parts, other rotary frequencies, GELU gates, and factors.

use std::sync::Arc;

use trustformers_plan::{
    DType, ExpertWeights, Experts, FusedOps, Hyper, Plan, PlanBuilder, RopeLayout, RopeScaling, RopeSpec,
    Scores, Value, Weights,
};

use crate::CaseError;
use crate::models::{DECODER_LIMITS, Maker, VOCABULARY, named};

/// The decoder.
#[derive(Debug, Clone, Copy)]
pub struct WindowedDecoder {
    /// The stored type of its matrices. Norms are always F32.
    pub dtype: DType,
    /// Whether its second layer has experts. In `fast` a score that is nearly another's chooses other experts
    /// than the oracle, so such a decoder is for `exact`.
    pub has_experts: bool,
}

/// The experts of the second layer: a hidden width that is no multiple of any kernel's tile.
const EXPERTS: Experts = Experts { count: 5, used: 2, hidden: 96 };

/// A window that ends inside a block of the cache, and inside the chunks of positions that kernels compute
/// together.
const WINDOW: usize = 37;

impl WindowedDecoder {
    /// Its sizes: heads are wider than the width divided by their number.
    #[must_use]
    pub fn hyper(&self) -> Hyper {
        let (width, head_dim) = if self.dtype.block_len() > 32 { (256, 64) } else { (96, 32) };
        Hyper { width, layers: 2, heads: 4, kv_heads: 2, head_dim, vocab: VOCABULARY, context: 512 }
    }

    /// Its weights.
    ///
    /// # Errors
    /// Only by a fault of this crate.
    pub fn weights(&self) -> Result<Arc<Weights>, CaseError> {
        let Hyper { width, layers, heads, kv_heads, head_dim, .. } = self.hyper();
        let (queries, keys, hidden) = (heads * head_dim, kv_heads * head_dim, 256);
        let mut made = Maker::seeded(41);
        made.matrix("embedding", self.dtype, VOCABULARY, width)?;
        made.vector("frequencies", head_dim / 2, 0.5, 0.25)?;
        for layer in 0..layers {
            let shapes = [
                ("q", queries, width),
                ("k", keys, width),
                ("v", keys, width),
                ("o", width, queries),
                ("gate", hidden, width),
                ("up", hidden, width),
                ("down", width, hidden),
            ];
            for (name, rows, cols) in shapes {
                made.matrix(&format!("{layer}.{name}"), self.dtype, rows, cols)?;
            }
            for name in ["norm1", "after1", "norm2", "after2"] {
                made.vector(&format!("{layer}.{name}"), width, 1.0, 0.25)?;
            }
            for name in ["q.norm", "k.norm"] {
                made.vector(&format!("{layer}.{name}"), head_dim, 1.0, 0.25)?;
            }
        }
        made.matrix("router", DType::F32, EXPERTS.count, width)?;
        for name in ["gate_experts", "up_experts"] {
            made.matrix(name, self.dtype, EXPERTS.count * EXPERTS.hidden, width)?;
        }
        made.matrix("down_experts", self.dtype, EXPERTS.count * width, EXPERTS.hidden)?;
        made.vector("norm", width, 1.0, 0.25)?;
        Ok(Arc::new(made.weights))
    }

    /// Its plan with these fused forms.
    ///
    /// # Errors
    /// The plan that a pass made is wrong.
    pub fn plan(&self, weights: &Weights, fused: &FusedOps) -> Result<Plan, CaseError> {
        let hyper = self.hyper();
        let mut b = PlanBuilder::new(weights, hyper, DECODER_LIMITS);
        let x = b.embed(named(weights, "embedding")?);
        let mut x = b.scale(x, (hyper.width as f32).sqrt());
        for layer in 0..hyper.layers {
            x = self.layer(&mut b, weights, layer, x)?;
        }
        let x = b.gather_rows(x);
        let x = b.rms_norm(x, named(weights, "norm")?, 1e-5);
        b.capped_logits(x, named(weights, "embedding")?, Some(15.0));
        Ok(b.finish(fused)?)
    }

    fn layer(
        &self,
        b: &mut PlanBuilder<'_>,
        weights: &Weights,
        layer: usize,
        x: Value,
    ) -> Result<Value, CaseError> {
        let hyper = self.hyper();
        let at = |name: &str| named(weights, &format!("{layer}.{name}"));
        let n = b.rms_norm(x, at("norm1")?, 1e-5);
        let (q, k, v) = (b.matmul(n, at("q")?), b.matmul(n, at("k")?), b.matmul(n, at("v")?));
        let (q, k) = (b.rms_norm(q, at("q.norm")?, 1e-6), b.rms_norm(k, at("k.norm")?, 1e-6));
        // The first layer has a window and the frequencies of its base, the second stored ones.
        let frequencies = if layer == 0 { None } else { Some(named(weights, "frequencies")?) };
        let magnitude = if layer == 0 { 1.0 } else { 1.2 };
        let scaling = RopeScaling { frequencies, magnitude };
        let dims = hyper.head_dim;
        let rope = RopeSpec { layout: RopeLayout::Neox, base: 10_000.0, dims, head_dim: dims, scaling };
        let (q, k) = (b.rope(q, rope), b.rope(k, rope));
        b.kv_write(layer, k, v);
        let window = (layer == 0).then_some(WINDOW);
        let scores = Scores { scale: 2.0 / dims as f32, soft_cap: Some(5.0), window };
        let mixed = b.attention(layer, q, scores);
        let o = b.matmul(mixed, at("o")?);
        let o = b.rms_norm(o, at("after1")?, 1e-5);
        let o = b.scale(o, 0.7);
        let x = b.add(x, o);
        let n = b.rms_norm(x, at("norm2")?, 1e-5);
        let down = if self.has_experts && layer == 1 {
            let scores = b.matmul(n, named(weights, "router")?);
            let [gate, up, down] = [
                named(weights, "gate_experts")?,
                named(weights, "up_experts")?,
                named(weights, "down_experts")?,
            ];
            b.experts(n, scores, EXPERTS, ExpertWeights { gate, up, down })
        } else {
            let (gate, up) = (b.matmul(n, at("gate")?), b.matmul(n, at("up")?));
            let gate = b.gelu_tanh(gate);
            let hidden = b.mul(gate, up);
            b.matmul(hidden, at("down")?)
        };
        let down = b.rms_norm(down, at("after2")?, 1e-5);
        Ok(b.add(x, down))
    }
}
