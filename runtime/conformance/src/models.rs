//! Two small models that together use every op: a decoder like Llama and Qwen, and an encoder like BERT.

use std::sync::Arc;

use trustformers_plan::{
    AdapterRoom, DType, EncoderScores, FusedOps, Hyper, Limits, Plan, PlanBuilder, Pooling, RopeLayout,
    RopeScaling, RopeSpec, Value, Weight, WeightId, Weights, seeded::SeededRng,
};

use crate::CaseError;
use crate::seeds::bytes;

/// The largest steps of the decoder that [`crate::harness`] makes.
pub const DECODER_LIMITS: Limits = Limits { rows: 300, sequences: 8, logits_rows: 16 };
/// The largest steps of the encoder.
pub const ENCODER_LIMITS: Limits = Limits { rows: 160, sequences: 5, logits_rows: 0 };
/// Tokens in the vocabulary of both models. Odd, so that the rows of a matrix are no multiple of any kernel's
/// tile.
pub const VOCABULARY: usize = 107;

/// A decoder of two layers.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    /// The stored type of its matrices. Norms and biases are always F32.
    pub dtype: DType,
    /// The stored type of the value and up projections, where it differs from that of the others.
    pub mixed_with: Option<DType>,
    /// How rotary embedding pairs the elements of a head.
    pub layout: RopeLayout,
    /// Whether queries, keys and values have biases, as Qwen's do.
    pub biased: bool,
}

impl Decoder {
    /// Its sizes: rows are whole blocks of the type, the hidden width is no power of two, and heads share
    /// keys.
    #[must_use]
    pub fn hyper(&self) -> Hyper {
        let (width, heads, head_dim) = if self.dtype.block_len() > 32 { (256, 4, 64) } else { (96, 6, 16) };
        Hyper { width, layers: 2, heads, kv_heads: 2, head_dim, vocab: VOCABULARY, context: 512 }
    }

    fn hidden(&self) -> usize {
        if self.dtype.block_len() > 32 { 512 } else { 160 }
    }

    /// Its weights; equal decoders have equal weights.
    ///
    /// # Errors
    /// Only by a fault of this crate.
    pub fn weights(&self) -> Result<Arc<Weights>, CaseError> {
        let Hyper { width, layers, kv_heads, head_dim, .. } = self.hyper();
        let (keys, hidden) = (kv_heads * head_dim, self.hidden());
        let mut made = Maker::seeded(99);
        made.matrix("embedding", self.dtype, VOCABULARY, width)?;
        for layer in 0..layers {
            let shapes = [
                ("q", width, width),
                ("k", keys, width),
                ("v", keys, width),
                ("o", width, width),
                ("gate", hidden, width),
                ("up", hidden, width),
                ("down", width, hidden),
            ];
            for (name, rows, cols) in shapes {
                let dtype = if ["v", "up"].contains(&name) { self.mixed_with } else { None };
                made.matrix(&format!("{layer}.{name}"), dtype.unwrap_or(self.dtype), rows, cols)?;
            }
            for (name, cols) in [("q.bias", width), ("k.bias", keys), ("v.bias", keys)] {
                made.vector(&format!("{layer}.{name}"), cols, 0.0, 0.2)?;
            }
            made.vector(&format!("{layer}.norm1"), width, 1.0, 0.25)?;
            made.vector(&format!("{layer}.norm2"), width, 1.0, 0.25)?;
        }
        made.vector("norm", width, 1.0, 0.25)?;
        Ok(Arc::new(made.weights))
    }

    /// Its plan with these fused forms.
    ///
    /// # Errors
    /// The plan that a pass made is wrong.
    pub fn plan(&self, weights: &Weights, fused: &FusedOps) -> Result<Plan, CaseError> {
        self.lower(weights, fused, false)
    }

    /// The same without what the last layer computes for rows without logits, except keys and values.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn pruned_plan(&self, weights: &Weights, fused: &FusedOps) -> Result<Plan, CaseError> {
        self.lower(weights, fused, true)
    }

    /// The plan with room for adapters.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn plan_with_adapters(
        &self,
        weights: &Weights,
        fused: &FusedOps,
        room: AdapterRoom,
    ) -> Result<Plan, CaseError> {
        Ok(self.plan(weights, &fused.without_activations())?.with_adapters(room)?)
    }

    fn lower(&self, weights: &Weights, fused: &FusedOps, pruned: bool) -> Result<Plan, CaseError> {
        let hyper = self.hyper();
        // The biased decoder rotates half of each head only, as some models do.
        let dims = if self.biased { hyper.head_dim / 2 } else { hyper.head_dim };
        let scaling = RopeScaling::NONE;
        let rope = RopeSpec { layout: self.layout, base: 10_000.0, dims, head_dim: hyper.head_dim, scaling };
        // Random queries and keys give scores far apart. The softmax of such scores is sharper than that of
        // any trained model and amplifies the rounding of `fast`, so the scale is smaller than usual: half of
        // it for heads of 16, a quarter for heads of 64.
        let scale = 2.0 / hyper.head_dim as f32;
        let mut b = PlanBuilder::new(weights, hyper, DECODER_LIMITS);
        let mut x = b.embed(named(weights, "embedding")?);
        for layer in 0..hyper.layers {
            let at = |name: &str| named(weights, &format!("{layer}.{name}"));
            let n = b.rms_norm(x, at("norm1")?, 1e-5);
            let mut asking = n;
            if pruned && layer + 1 == hyper.layers {
                x = b.gather_rows(x);
                asking = b.rms_norm(x, at("norm1")?, 1e-5);
            }
            let (mut q, mut k, mut v) =
                (b.matmul(asking, at("q")?), b.matmul(n, at("k")?), b.matmul(n, at("v")?));
            if self.biased {
                q = b.add_row(q, at("q.bias")?);
                k = b.add_row(k, at("k.bias")?);
                v = b.add_row(v, at("v.bias")?);
            }
            let (q, k) = (b.rope(q, rope), b.rope(k, rope));
            b.kv_write(layer, k, v);
            let mixed = b.attention(layer, q, scale);
            let o = b.matmul(mixed, at("o")?);
            x = b.add(x, o);
            let n = b.rms_norm(x, at("norm2")?, 1e-5);
            let (gate, up) = (b.matmul(n, at("gate")?), b.matmul(n, at("up")?));
            let hidden = b.silu_mul(gate, up);
            let down = b.matmul(hidden, at("down")?);
            x = b.add(x, down);
        }
        if !pruned {
            x = b.gather_rows(x);
        }
        let x = b.rms_norm(x, named(weights, "norm")?, 1e-5);
        b.logits(x, named(weights, "embedding")?);
        Ok(b.finish(fused)?)
    }
}

/// An encoder of two layers.
#[derive(Debug, Clone, Copy)]
pub struct Encoder {
    /// The stored type of its matrices: a float type, as in published encoders.
    pub dtype: DType,
    /// How the rows of a sequence become one. With [`Pooling::Last`] attention is causal.
    pub pooling: Pooling,
    /// Whether answers are divided by their length.
    pub normalise: bool,
}

impl Encoder {
    /// Its sizes.
    pub const HYPER: Hyper =
        Hyper { width: 96, layers: 2, heads: 4, kv_heads: 4, head_dim: 24, vocab: VOCABULARY, context: 90 };
    const HIDDEN: usize = 200;
    /// Positions on either side of a row that the last layer sees.
    const WINDOW: usize = 5;

    /// Its weights; equal encoders have equal weights.
    ///
    /// # Errors
    /// Only by a fault of this crate.
    pub fn weights(&self) -> Result<Arc<Weights>, CaseError> {
        let Hyper { width, layers, context, .. } = Self::HYPER;
        let mut made = Maker::seeded(11);
        made.matrix("words", self.dtype, VOCABULARY, width)?;
        made.matrix("positions", self.dtype, context, width)?;
        made.vector("types", width, 0.0, 0.1)?;
        made.vector("norm", width, 1.0, 0.25)?;
        made.vector("norm.bias", width, 0.0, 0.2)?;
        for layer in 0..layers {
            let hidden = Self::HIDDEN;
            let square = ["q", "k", "v", "o"].map(|name| (name, width, width));
            for (name, rows, cols) in
                square.into_iter().chain([("up", hidden, width), ("down", width, hidden)])
            {
                made.matrix(&format!("{layer}.{name}"), self.dtype, rows, cols)?;
                made.vector(&format!("{layer}.{name}.bias"), rows, 0.0, 0.2)?;
            }
            for name in ["norm1", "norm2"] {
                made.vector(&format!("{layer}.{name}"), width, 1.0, 0.25)?;
                made.vector(&format!("{layer}.{name}.bias"), width, 0.0, 0.2)?;
            }
        }
        made.vector("distances", Self::HYPER.heads * (2 * context - 1), 0.0, 0.5)?;
        Ok(Arc::new(made.weights))
    }

    /// Its plan with these fused forms.
    ///
    /// # Errors
    /// The plan that a pass made is wrong.
    pub fn plan(&self, weights: &Weights, fused: &FusedOps) -> Result<Plan, CaseError> {
        self.lower(weights, fused, false)
    }

    /// The same without what the last layer computes for rows after the first of each sequence, except keys
    /// and values. Only for [`Pooling::Cls`].
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn pruned_plan(&self, weights: &Weights, fused: &FusedOps) -> Result<Plan, CaseError> {
        self.lower(weights, fused, true)
    }

    fn lower(&self, weights: &Weights, fused: &FusedOps, pruned: bool) -> Result<Plan, CaseError> {
        let dense = |b: &mut PlanBuilder<'_>, x, name: String| -> Result<Value, CaseError> {
            let product = b.matmul(x, named(weights, &name)?);
            Ok(b.add_row(product, named(weights, &format!("{name}.bias"))?))
        };
        let norm = |b: &mut PlanBuilder<'_>, x, name: String| -> Result<Value, CaseError> {
            Ok(b.layer_norm(x, named(weights, &name)?, named(weights, &format!("{name}.bias"))?, 1e-12))
        };
        let distances = named(weights, "distances")?;
        let mut b = PlanBuilder::new(weights, Self::HYPER, ENCODER_LIMITS);
        let words = b.embed(named(weights, "words")?);
        let positions = b.embed_positions(named(weights, "positions")?);
        let x = b.add(words, positions);
        let x = b.add_row(x, named(weights, "types")?);
        let mut x = norm(&mut b, x, "norm".to_owned())?;
        for layer in 0..Self::HYPER.layers {
            let at = |name: &str| format!("{layer}.{name}");
            let all = x;
            if pruned && layer + 1 == Self::HYPER.layers {
                x = b.gather_first_rows(x);
            }
            let q = dense(&mut b, x, at("q"))?;
            let k = dense(&mut b, all, at("k"))?;
            let v = dense(&mut b, all, at("v"))?;
            // The last layer attends within a window, the first to whole sequences. Both add the same values
            // for distances.
            let window = (layer + 1 == Self::HYPER.layers).then_some(Self::WINDOW);
            let (scale, causal) = (24f32.sqrt().recip(), self.pooling == Pooling::Last);
            let scores = EncoderScores { scale, window, causal, distances: Some(distances) };
            let mixed = b.encoder_attention(q, k, v, scores);
            let o = dense(&mut b, mixed, at("o"))?;
            let sum = b.add(o, x);
            x = norm(&mut b, sum, at("norm1"))?;
            let up = dense(&mut b, x, at("up"))?;
            let up = b.gelu(up);
            let down = dense(&mut b, up, at("down"))?;
            let sum = b.add(down, x);
            x = norm(&mut b, sum, at("norm2"))?;
        }
        b.pool(x, self.pooling, self.normalise);
        Ok(b.finish(fused)?)
    }
}

/// The weight of that name.
///
/// # Errors
/// There is none: a fault of this crate.
pub fn named(weights: &Weights, name: &str) -> Result<WeightId, CaseError> {
    weights.find(name).ok_or_else(|| CaseError::Wrong(format!("the suite has no weight {name}")))
}

/// Makes the weights of a model, in the order of the calls.
pub(crate) struct Maker {
    rng: SeededRng,
    pub(crate) weights: Weights,
}

impl Maker {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self { rng: SeededRng::new(seed), weights: Weights::new() }
    }

    pub(crate) fn matrix(
        &mut self,
        name: &str,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<(), CaseError> {
        let bytes = bytes(dtype, rows * cols, &mut self.rng);
        let range = 0..bytes.len();
        self.weights.push(Weight::new(name, dtype, (rows, cols), Arc::new(bytes), range)?)?;
        Ok(())
    }

    pub(crate) fn vector(
        &mut self,
        name: &str,
        cols: usize,
        middle: f32,
        radius: f32,
    ) -> Result<(), CaseError> {
        let values: Vec<f32> = (0..cols).map(|_| middle + radius * self.rng.next_signed()).collect();
        self.weights.push(Weight::from_f32(name, (1, cols), &values)?)?;
        Ok(())
    }
}
