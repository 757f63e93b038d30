//! The closed set of operations that plans consist of.
//!
//! An op is one step of a transformer's formulas (a norm, a projection, an attention). So a backend has few
//! kernels, each worth tuning, and a plan is short enough to read. `B` is the type of the operands: a
//! [`crate::Value`] while a model is lowered, a [`Buf`] with a fixed offset once the arena is planned. Every
//! match over the set lists all ops without a wildcard, so that a new op does not compile until every backend
//! implements it.

use std::ops::Range;

use crate::{Experts, WeightId};

/// Which rows of a step a buffer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowSpace {
    /// One row per token of the step.
    Tokens,
    /// One row per requested row of logits.
    Logits,
    /// One row per sequence of the step.
    Sequences,
}

/// A matrix of f32 in the arena: row `r` starts at byte `offset + r * stride * 4` and has `cols` values.
///
/// `stride` exceeds `cols` where several values share one allocation side by side (the output of a
/// concatenated projection); the first row of an allocation is aligned to [`crate::arena::ALIGN_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buf {
    /// Byte offset of the first value in the arena.
    pub offset: usize,
    /// Values per row.
    pub cols: usize,
    /// Distance between rows, in values.
    pub stride: usize,
    /// Which rows it has.
    pub rows: RowSpace,
}

/// How rotary embedding pairs the elements of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// Elements `2i` and `2i + 1` form a pair (Llama weights as GGUF stores them; GGUF calls it "norm").
    Interleaved,
    /// Elements `i` and `i + dims/2` form a pair (GPT-NeoX, Qwen, Gemma; Llama in safetensors).
    Neox,
}

/// A rotary position embedding: pair `i` rotates by `position * base^(-2i/dims)` radians, or by another
/// frequency where the rotation is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// How elements are paired.
    pub layout: RopeLayout,
    /// The base of the frequencies ("theta").
    pub base: f32,
    /// Elements of a head that are rotated, from its first; even and at most `head_dim`.
    pub dims: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How the rotation differs from that of its base.
    pub scaling: RopeScaling,
}

/// What the methods that extend a model's context change in its rotary embedding: linear and YaRN scaling,
/// that of Llama 3, and LongRoPE all come down to other frequencies and a factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeScaling {
    /// 1 × dims/2: the frequency of each pair, in place of the power of the base.
    pub frequencies: Option<WeightId>,
    /// Multiplies cosines and sines, and so the length of what is rotated.
    pub magnitude: f32,
}

impl RopeScaling {
    /// The frequencies of the base.
    pub const NONE: Self = Self { frequencies: None, magnitude: 1.0 };
}

/// How the products of a query with keys become scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Multiplies the products, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Where set, each scaled product `s` becomes `cap * tanh(s / cap)`.
    pub soft_cap: Option<f32>,
    /// Where set, a row attends to at most this many positions: its own and those before it. At least 1.
    pub window: Option<usize>,
}

impl From<f32> for Scores {
    /// Scaled products, of all positions.
    fn from(scale: f32) -> Self {
        Self { scale, soft_cap: None, window: None }
    }
}

impl Scores {
    /// The first position that the row at `position` attends to.
    #[must_use]
    pub fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// How the products of a query with keys become scores where a row sees its whole sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderScores {
    /// Multiplies the products, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Where set, a row attends to its own position and to at most this many on either side of it.
    pub window: Option<usize>,
    /// Whether no row attends to rows after it; queries are of all tokens then.
    pub causal: bool,
    /// Where set, 1 × heads · (2 · reach + 1), one head after the other: the scaled product of a query with
    /// the key `d` positions after it gets the value `reach + d` of its head added; `d` is negative for
    /// keys before it. `reach` is at least the largest distance in a sequence.
    pub distances: Option<WeightId>,
}

impl From<f32> for EncoderScores {
    /// Scaled products, of all positions.
    fn from(scale: f32) -> Self {
        Self { scale, window: None, causal: false, distances: None }
    }
}

impl EncoderScores {
    /// The positions that the row at `position` of a sequence of `len` rows attends to.
    #[must_use]
    pub fn attended(&self, position: usize, len: usize) -> Range<usize> {
        let window = self.window.unwrap_or(usize::MAX);
        let after = if self.causal { 0 } else { window };
        position.saturating_sub(window)..position.saturating_add(after).saturating_add(1).min(len)
    }
}

/// Which approximation of the Gaussian error linear unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GeluForm {
    /// `x * (1 + erf(x / sqrt(2))) / 2`.
    Erf,
    /// `x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) / 2`.
    Tanh,
}

/// Heads of an attention; `heads` is a multiple of `kv_heads`, and query head `h` reads key/value head
/// `h / (heads / kv_heads)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// How the rows of a sequence become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first row (BERT's `[CLS]`).
    Cls,
    /// The last row, which alone has read the whole text where attention is causal.
    Last,
    /// The largest of each column.
    Max,
}

/// One matrix of a projection; its outputs are a range of the projection's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Features out × features in.
    pub weight: WeightId,
    /// 1 × features out, added to the product.
    pub bias: Option<WeightId>,
}

/// A norm of a projection's input: [`Op::LayerNorm`] where it has a bias, [`Op::RmsNorm`] of whole rows where
/// it has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// 1 × features in.
    pub weight: WeightId,
    /// 1 × features in.
    pub bias: Option<WeightId>,
    /// Added to the mean of squares, or to the variance.
    pub eps: f32,
}

/// What a projection does to its products, biases included, before the residual is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    None,
    /// [`Op::Gelu`] of each.
    Gelu,
    /// [`Op::SiluMul`] of the first segment's products (gate) and the second's (up). There are two segments,
    /// of one shape and one weight type, and the output is as wide as one of them.
    SiluMul,
}

/// One operation on all rows of a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Op<B = Buf> {
    /// `out[r] = table[token[r]]`.
    Embed {
        /// Vocabulary × width.
        table: WeightId,
        /// Tokens × width.
        out: B,
    },
    /// `out[r] = input[r] / sqrt(mean(input[r]²) + eps) * weight`. Where the weight is narrower than the row,
    /// each group of as many columns (a head) is normed by itself.
    RmsNorm {
        /// Rows × width.
        input: B,
        /// 1 × width, or a divisor of the width.
        weight: WeightId,
        /// Added to the mean of squares.
        eps: f32,
        /// Like `input`.
        out: B,
    },
    /// `out[r] = table[position[r]]`.
    EmbedPositions {
        /// Context or more × width.
        table: WeightId,
        /// Tokens × width.
        out: B,
    },
    /// `out[r] = input[r] + weight`.
    AddRow {
        /// Rows × width.
        input: B,
        /// 1 × width.
        weight: WeightId,
        /// Like `input`.
        out: B,
    },
    /// `out[r] = (input[r] - mean) / sqrt(variance + eps) * weight + bias`, the variance being the mean of
    /// squared differences.
    LayerNorm {
        /// Rows × width.
        input: B,
        /// 1 × width.
        weight: WeightId,
        /// 1 × width.
        bias: WeightId,
        /// Added to the variance.
        eps: f32,
        /// Like `input`.
        out: B,
    },
    /// `out = activation(concat(weight · x + bias for each segment)) + residual`, where `x` is the input's
    /// row, normed where a norm is given; then `normed = x`, where it is asked for. Anything beyond one
    /// weight appears only where [`crate::FusedOps`] claims it.
    MatMul {
        /// Rows × features in.
        input: B,
        /// Applied to each row of the input before the products.
        norm: Option<Norm>,
        /// Like `input`: the normed rows, where ops after this one read them too. Only with a norm.
        normed: Option<B>,
        /// Their outputs lie side by side.
        segments: Vec<Segment>,
        /// Applied to the outputs.
        activation: Activation,
        /// Like `out`; added last.
        residual: Option<B>,
        /// Rows × the sum of features out, half of it after [`Activation::SiluMul`].
        out: B,
    },
    /// Rotates every head of `data` by the row's position, in place.
    Rope {
        /// Tokens × (heads · head_dim).
        data: B,
        /// The rotation.
        spec: RopeSpec,
    },
    /// Stores keys and values of each row at the row's position in its sequence's cache.
    KvWrite {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (kv_heads · head_dim), rotated.
        keys: B,
        /// Tokens × (kv_heads · head_dim).
        values: B,
    },
    /// [`Op::Rope`] of queries and keys and [`Op::KvWrite`] in one op: queries are rotated in place, rotated
    /// keys are stored in the cache only. Appears only where [`crate::FusedOps::rope_kv_write`] is claimed.
    RopeKvWrite {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (heads · head_dim), rotated in place.
        query: B,
        /// Tokens × (kv_heads · head_dim), unchanged.
        keys: B,
        /// Tokens × (kv_heads · head_dim).
        values: B,
        /// The rotation of queries and keys.
        spec: RopeSpec,
    },
    /// Causal softmax attention of each row over its sequence's cache, positions
    /// `scores.first(position[r])..=position[r]`.
    Attention {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (heads · head_dim), rotated.
        query: B,
        /// Heads.
        shape: AttentionShape,
        /// Scale, soft cap and window.
        scores: Scores,
        /// Like `query`.
        out: B,
    },
    /// Softmax attention of each row to the rows of its sequence in this step, earlier and later ones: to
    /// all of them, or to the positions `scores.attended(position[r], length)`; no cache.
    EncoderAttention {
        /// Tokens × (heads · head_dim).
        query: B,
        /// Tokens × (kv_heads · head_dim).
        keys: B,
        /// Like `keys`.
        values: B,
        /// Heads.
        shape: AttentionShape,
        /// Scale, window, whether later rows count, and what distances add.
        scores: EncoderScores,
        /// Like `query`.
        out: B,
    },
    /// `out = gelu(input)`.
    Gelu {
        /// Rows × features.
        input: B,
        /// The approximation.
        form: GeluForm,
        /// Like `input`.
        out: B,
    },
    /// `out = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
    SiluMul {
        /// Rows × features.
        gate: B,
        /// Like `gate`.
        up: B,
        /// Like `gate`.
        out: B,
    },
    /// `out[r] = concat(silu(gate_e · input[r]) * (up_e · input[r]) for each expert e that the row uses, best
    /// first)`; see [`Experts::choose`].
    ExpertsUp {
        /// Rows × width.
        input: B,
        /// Rows × experts.
        scores: B,
        /// The experts' matrices of hidden × width, one after the other.
        gate: WeightId,
        /// Like `gate`.
        up: WeightId,
        /// The experts.
        experts: Experts,
        /// Rows × (used · hidden).
        out: B,
    },
    /// `out[r] = sum(share_i * (down_e · hidden_i) for the i-th expert e that the row uses)`, where
    /// `hidden_i` are the `i`-th columns of the row.
    ExpertsDown {
        /// Rows × (used · hidden).
        input: B,
        /// Rows × experts.
        scores: B,
        /// The experts' matrices of width × hidden, one after the other.
        down: WeightId,
        /// The experts.
        experts: Experts,
        /// Rows × width.
        out: B,
    },
    /// `out = a * b`, element by element.
    Mul {
        /// Rows × features.
        a: B,
        /// Like `a`.
        b: B,
        /// Like `a`.
        out: B,
    },
    /// `out = input * factor`.
    Scale {
        /// Rows × features.
        input: B,
        /// Of every element.
        factor: f32,
        /// Like `input`.
        out: B,
    },
    /// `data = cap * tanh(data / cap)`, in place.
    SoftCap {
        /// Rows × features.
        data: B,
        /// The bound that no element exceeds; above 0.
        cap: f32,
    },
    /// `out = a + b`.
    Add {
        /// Rows × features.
        a: B,
        /// Like `a`.
        b: B,
        /// Like `a`.
        out: B,
    },
    /// `out[i] = input[token_row(i)]`: the ops after it compute only the rows whose logits are requested, or
    /// the first row of each sequence. See [`crate::StepInput::token_row`].
    GatherRows {
        /// Tokens × features.
        input: B,
        /// Logits or sequences × features.
        out: B,
    },
    /// `out[i] = weight · input[i]`, returned to the caller as the step's logits. The last op of a generating
    /// plan, but for a [`Op::SoftCap`] of the logits.
    Logits {
        /// Logits × width.
        input: B,
        /// Vocabulary × width, or labels × width.
        weight: WeightId,
        /// Logits × vocabulary, or × labels.
        out: B,
    },
    /// One row per sequence from its rows of this step, divided, if `normalise`, by its length (the root of
    /// the sum of its squares, at least 1e-12). The last op of an encoding plan returns them to the caller;
    /// before it rows may be pooled for a head.
    Pool {
        /// Tokens × width.
        input: B,
        /// How rows become one.
        pooling: Pooling,
        /// Whether to divide by the length.
        normalise: bool,
        /// Sequences × width.
        out: B,
    },
    /// `data = the sum of data over all devices of a group`, in place. Only [`crate::shard::shard`] makes it;
    /// a backend of one device refuses it.
    AllReduce {
        /// Rows × features.
        data: B,
    },
}

impl<B: Copy> Op<B> {
    /// The op's name in dumps and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::EmbedPositions { .. } => "embed_positions",
            Self::AddRow { .. } => "add_row",
            Self::RmsNorm { .. } => "rms_norm",
            Self::LayerNorm { .. } => "layer_norm",
            Self::MatMul { .. } => "matmul",
            Self::Rope { .. } => "rope",
            Self::KvWrite { .. } => "kv_write",
            Self::RopeKvWrite { .. } => "rope_kv_write",
            Self::Attention { .. } => "attention",
            Self::EncoderAttention { .. } => "encoder_attention",
            Self::Gelu { .. } => "gelu",
            Self::SiluMul { .. } => "silu_mul",
            Self::ExpertsUp { .. } => "experts_up",
            Self::ExpertsDown { .. } => "experts_down",
            Self::Mul { .. } => "mul",
            Self::Scale { .. } => "scale",
            Self::SoftCap { .. } => "soft_cap",
            Self::Add { .. } => "add",
            Self::GatherRows { .. } => "gather_rows",
            Self::Logits { .. } => "logits",
            Self::Pool { .. } => "pool",
            Self::AllReduce { .. } => "all_reduce",
        }
    }

    /// Every buffer the op reads, including one that it changes in place.
    #[must_use]
    pub fn inputs(&self) -> Vec<B> {
        self.operands(|access| access != Access::Write)
    }

    /// The buffer the op changes in place, if it does.
    #[must_use]
    pub fn changes(&self) -> Option<B> {
        self.operands(|access| access == Access::Update).pop()
    }

    /// The buffers the op fills; the last one is its result.
    #[must_use]
    pub fn outputs(&self) -> Vec<B> {
        self.operands(|access| access == Access::Write)
    }

    /// The buffer of the op's result, if it makes a new one.
    #[must_use]
    pub fn output(&self) -> Option<B> {
        self.outputs().pop()
    }

    /// The buffers with an access that `is_wanted` accepts.
    fn operands(&self, is_wanted: impl Fn(Access) -> bool) -> Vec<B> {
        let mut operands = Vec::new();
        let _ = self.map(|access, operand| {
            if is_wanted(access) {
                operands.push(operand);
            }
        });
        operands
    }

    /// Every weight the op reads, and how.
    #[must_use]
    pub fn weights(&self) -> Vec<(WeightId, WeightUse)> {
        match self {
            Self::Embed { table, .. } | Self::EmbedPositions { table, .. } => vec![(*table, WeightUse::Rows)],
            Self::RmsNorm { weight, .. } | Self::AddRow { weight, .. } => vec![(*weight, WeightUse::Vector)],
            Self::LayerNorm { weight, bias, .. } => {
                vec![(*weight, WeightUse::Vector), (*bias, WeightUse::Vector)]
            }
            Self::Logits { weight, .. } => vec![(*weight, WeightUse::Matrix)],
            Self::ExpertsUp { gate, up, .. } => vec![(*gate, WeightUse::Rows), (*up, WeightUse::Rows)],
            Self::ExpertsDown { down, .. } => vec![(*down, WeightUse::Rows)],
            Self::MatMul { norm, segments, .. } => {
                let norm = norm.iter().flat_map(|norm| [Some(norm.weight), norm.bias]).flatten();
                let norm = norm.map(|vector| (vector, WeightUse::Vector));
                let matrices = segments.iter().map(|segment| (segment.weight, WeightUse::Matrix));
                let biases = segments.iter().filter_map(|segment| Some((segment.bias?, WeightUse::Vector)));
                norm.chain(matrices).chain(biases).collect()
            }
            Self::Rope { spec, .. } | Self::RopeKvWrite { spec, .. } => {
                spec.scaling.frequencies.map(|id| (id, WeightUse::Vector)).into_iter().collect()
            }
            Self::EncoderAttention { scores, .. } => {
                scores.distances.map(|id| (id, WeightUse::Vector)).into_iter().collect()
            }
            Self::KvWrite { .. }
            | Self::Attention { .. }
            | Self::Gelu { .. }
            | Self::SiluMul { .. }
            | Self::Mul { .. }
            | Self::Scale { .. }
            | Self::SoftCap { .. }
            | Self::Add { .. }
            | Self::GatherRows { .. }
            | Self::Pool { .. }
            | Self::AllReduce { .. } => vec![],
        }
    }

    /// The buffer that is the step's answer, if this is the last op that makes one.
    #[must_use]
    pub const fn answer(&self) -> Option<B> {
        match self {
            Self::Logits { out, .. } | Self::Pool { out, .. } => Some(*out),
            _ => None,
        }
    }

    /// The same op on other operands. This is the one place that says how an op accesses each of its buffers.
    pub fn map<C>(&self, mut f: impl FnMut(Access, B) -> C) -> Op<C> {
        use Access::{Read, Update, Write};
        match *self {
            Self::Embed { table, out } => Op::Embed { table, out: f(Write, out) },
            Self::EmbedPositions { table, out } => Op::EmbedPositions { table, out: f(Write, out) },
            Self::AddRow { input, weight, out } => {
                Op::AddRow { input: f(Read, input), weight, out: f(Write, out) }
            }
            Self::RmsNorm { input, weight, eps, out } => {
                Op::RmsNorm { input: f(Read, input), weight, eps, out: f(Write, out) }
            }
            Self::LayerNorm { input, weight, bias, eps, out } => {
                Op::LayerNorm { input: f(Read, input), weight, bias, eps, out: f(Write, out) }
            }
            Self::MatMul { input, norm, normed, ref segments, activation, residual, out } => {
                let (input, residual) = (f(Read, input), residual.map(|residual| f(Read, residual)));
                let (normed, out) = (normed.map(|normed| f(Write, normed)), f(Write, out));
                Op::MatMul { input, norm, normed, segments: segments.clone(), activation, residual, out }
            }
            Self::Rope { data, spec } => Op::Rope { data: f(Update, data), spec },
            Self::KvWrite { layer, keys, values } => {
                Op::KvWrite { layer, keys: f(Read, keys), values: f(Read, values) }
            }
            Self::RopeKvWrite { layer, query, keys, values, spec } => {
                let (query, keys, values) = (f(Update, query), f(Read, keys), f(Read, values));
                Op::RopeKvWrite { layer, query, keys, values, spec }
            }
            Self::Attention { layer, query, shape, scores, out } => {
                Op::Attention { layer, query: f(Read, query), shape, scores, out: f(Write, out) }
            }
            Self::EncoderAttention { query, keys, values, shape, scores, out } => {
                let (query, keys, values) = (f(Read, query), f(Read, keys), f(Read, values));
                Op::EncoderAttention { query, keys, values, shape, scores, out: f(Write, out) }
            }
            Self::Gelu { input, form, out } => Op::Gelu { input: f(Read, input), form, out: f(Write, out) },
            Self::SiluMul { gate, up, out } => {
                Op::SiluMul { gate: f(Read, gate), up: f(Read, up), out: f(Write, out) }
            }
            Self::ExpertsUp { input, scores, gate, up, experts, out } => {
                let (input, scores) = (f(Read, input), f(Read, scores));
                Op::ExpertsUp { input, scores, gate, up, experts, out: f(Write, out) }
            }
            Self::ExpertsDown { input, scores, down, experts, out } => {
                let (input, scores) = (f(Read, input), f(Read, scores));
                Op::ExpertsDown { input, scores, down, experts, out: f(Write, out) }
            }
            Self::Mul { a, b, out } => Op::Mul { a: f(Read, a), b: f(Read, b), out: f(Write, out) },
            Self::Scale { input, factor, out } => {
                Op::Scale { input: f(Read, input), factor, out: f(Write, out) }
            }
            Self::SoftCap { data, cap } => Op::SoftCap { data: f(Update, data), cap },
            Self::Add { a, b, out } => Op::Add { a: f(Read, a), b: f(Read, b), out: f(Write, out) },
            Self::GatherRows { input, out } => Op::GatherRows { input: f(Read, input), out: f(Write, out) },
            Self::Logits { input, weight, out } => {
                Op::Logits { input: f(Read, input), weight, out: f(Write, out) }
            }
            Self::Pool { input, pooling, normalise, out } => {
                Op::Pool { input: f(Read, input), pooling, normalise, out: f(Write, out) }
            }
            Self::AllReduce { data } => Op::AllReduce { data: f(Update, data) },
        }
    }
}

/// How an op accesses a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads it.
    Read,
    /// It reads it and changes it in place.
    Update,
    /// It fills it; the buffer has no content before.
    Write,
}

/// How an op reads a weight. A device may store the weight in a different form for each use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightUse {
    /// Single rows, selected by the step's tokens or positions, or those of the experts that its rows use.
    Rows,
    /// The one row of a vector.
    Vector,
    /// All of it, multiplied by rows of activations.
    Matrix,
}
