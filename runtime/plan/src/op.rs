//! The closed set of operations a plan is made of.
//!
//! Ops are as large as a transformer's own sentences (a norm, a projection, an attention), so that a backend has few
//! kernels, each worth tuning, and a plan is short enough to read. `B` is the operand: a [`crate::Value`] while a
//! model is being written down, a [`Buf`] with a fixed place once the arena is planned. The set is matched without a
//! wildcard everywhere: a new op does not compile until every backend has an answer.

use crate::WeightId;

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
/// `stride` exceeds `cols` where several values share one allocation side by side (the output of a concatenated
/// projection); the first row of an allocation is aligned to [`crate::arena::ALIGN_BYTES`].
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
    /// Elements `2i` and `2i + 1` turn together (Llama weights as GGUF stores them; "norm" there).
    Interleaved,
    /// Elements `i` and `i + dims/2` turn together (GPT-NeoX, Qwen, Gemma; Llama in safetensors).
    Neox,
}

/// A rotary position embedding: pair `i` turns by `position * base^(-2i/dims)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// How elements are paired.
    pub layout: RopeLayout,
    /// The base of the frequencies ("theta").
    pub base: f32,
    /// Elements of a head that turn, from its first; even and at most `head_dim`.
    pub dims: usize,
    /// Elements of a head.
    pub head_dim: usize,
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
    /// The first (BERT's `[CLS]`).
    First,
    /// The largest of each column.
    Max,
}

/// One matrix of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Part {
    /// Features out × features in.
    pub weight: WeightId,
    /// 1 × features out, added to the product.
    pub bias: Option<WeightId>,
}

/// A root-mean-square norm of a projection's input; see [`Op::RmsNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// 1 × features in.
    pub weight: WeightId,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// What a projection does to its products, biases included, before the residual is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    None,
    /// [`Op::Gelu`] of each.
    Gelu,
    /// [`Op::SiluMul`] of the first part's (gate) and the second's (up): there are two, of one shape, and the output is as
    /// wide as one of them.
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
    /// `out[r] = input[r] / sqrt(mean(input[r]²) + eps) * weight`.
    RmsNorm {
        /// Rows × width.
        input: B,
        /// 1 × width.
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
    /// `out[r] = (input[r] - mean) / sqrt(variance + eps) * weight + bias`, the variance being the mean of squared
    /// differences.
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
    /// `out = activation(concat(weight · x + bias for each part)) + residual`, where `x` is the input's row, normed where a
    /// norm is given. What is more than one weight appears only where [`crate::FusedOps`] claims it.
    MatMul {
        /// Rows × features in.
        input: B,
        /// Applied to each row of the input first.
        norm: Option<Norm>,
        /// Their outputs lie side by side.
        parts: Vec<Part>,
        /// Applied to the outputs.
        activation: Activation,
        /// Like `out`; added last.
        residual: Option<B>,
        /// Rows × the sum of features out, half of it after [`Activation::SiluMul`].
        out: B,
    },
    /// Turns every head of `data` by the row's position, in place.
    Rope {
        /// Tokens × (heads · head_dim).
        data: B,
        /// How.
        spec: RopeSpec,
    },
    /// Stores keys and values of each row at the row's position in its sequence's cache.
    KvWrite {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (kv_heads · head_dim), turned already.
        keys: B,
        /// Tokens × (kv_heads · head_dim).
        values: B,
    },
    /// [`Op::Rope`] of queries and keys and [`Op::KvWrite`] at once: queries are turned in place, turned keys go to the cache
    /// alone. Appears only where [`crate::FusedOps::rope_kv_write`] is claimed.
    RopeKvWrite {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (heads · head_dim), turned in place.
        query: B,
        /// Tokens × (kv_heads · head_dim), left as they are.
        keys: B,
        /// Tokens × (kv_heads · head_dim).
        values: B,
        /// How queries and keys are turned.
        spec: RopeSpec,
    },
    /// Causal softmax attention of each row over its sequence's cache, positions `0..=position[r]`.
    Attention {
        /// Layer of the cache.
        layer: usize,
        /// Tokens × (heads · head_dim), turned already.
        query: B,
        /// Heads.
        shape: AttentionShape,
        /// Multiplies the scores, usually `1/sqrt(head_dim)`.
        scale: f32,
        /// Like `query`.
        out: B,
    },
    /// Softmax attention of each row to all rows of its sequence in this step, before and after it; no cache.
    EncoderAttention {
        /// Tokens × (heads · head_dim).
        query: B,
        /// Tokens × (kv_heads · head_dim).
        keys: B,
        /// Like `keys`.
        values: B,
        /// Heads.
        shape: AttentionShape,
        /// Multiplies the scores, usually `1/sqrt(head_dim)`.
        scale: f32,
        /// Like `query`.
        out: B,
    },
    /// `out = input * (1 + erf(input / sqrt(2))) / 2`.
    Gelu {
        /// Rows × features.
        input: B,
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
    /// `out = a + b`.
    Add {
        /// Rows × features.
        a: B,
        /// Like `a`.
        b: B,
        /// Like `a`.
        out: B,
    },
    /// `out[i] = input[logits_rows[i]]`: from here on only rows that somebody reads are computed.
    GatherRows {
        /// Tokens × features.
        input: B,
        /// Logits × features.
        out: B,
    },
    /// `out[i] = weight · input[i]`, handed to the caller as the step's logits. The last op of a generating plan.
    Logits {
        /// Logits × width.
        input: B,
        /// Vocabulary × width.
        weight: WeightId,
        /// Logits × vocabulary.
        out: B,
    },
    /// One row per sequence from its rows of this step, then, if wanted, divided by its length (the root of the sum of its
    /// squares, at least 1e-12); handed to the caller. The last op of an encoding plan.
    Pool {
        /// Tokens × width.
        input: B,
        /// How.
        pooling: Pooling,
        /// Whether to divide by the length.
        normalise: bool,
        /// Sequences × width.
        out: B,
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
            Self::Add { .. } => "add",
            Self::GatherRows { .. } => "gather_rows",
            Self::Logits { .. } => "logits",
            Self::Pool { .. } => "pool",
        }
    }

    /// Every buffer the op reads (what it changes in place included).
    #[must_use]
    pub fn inputs(&self) -> Vec<B> {
        match self {
            Self::Embed { .. } | Self::EmbedPositions { .. } => vec![],
            Self::RmsNorm { input, .. }
            | Self::LayerNorm { input, .. }
            | Self::AddRow { input, .. }
            | Self::Gelu { input, .. }
            | Self::GatherRows { input, .. }
            | Self::Logits { input, .. }
            | Self::Pool { input, .. } => vec![*input],
            Self::MatMul { input, residual, .. } => [Some(*input), *residual].into_iter().flatten().collect(),
            Self::Rope { data, .. } => vec![*data],
            Self::KvWrite { keys, values, .. } => vec![*keys, *values],
            Self::RopeKvWrite { query, keys, values, .. }
            | Self::EncoderAttention { query, keys, values, .. } => vec![*query, *keys, *values],
            Self::Attention { query, .. } => vec![*query],
            Self::SiluMul { gate, up, .. } => vec![*gate, *up],
            Self::Add { a, b, .. } => vec![*a, *b],
        }
    }

    /// The buffer the op changes in place, if it does.
    #[must_use]
    pub const fn changes(&self) -> Option<B> {
        match self {
            Self::Rope { data, .. } => Some(*data),
            Self::RopeKvWrite { query, .. } => Some(*query),
            Self::Embed { .. }
            | Self::EmbedPositions { .. }
            | Self::AddRow { .. }
            | Self::RmsNorm { .. }
            | Self::LayerNorm { .. }
            | Self::MatMul { .. }
            | Self::KvWrite { .. }
            | Self::Attention { .. }
            | Self::EncoderAttention { .. }
            | Self::Gelu { .. }
            | Self::SiluMul { .. }
            | Self::Add { .. }
            | Self::GatherRows { .. }
            | Self::Logits { .. }
            | Self::Pool { .. } => None,
        }
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
            Self::MatMul { norm, parts, .. } => {
                let norm = norm.iter().map(|norm| (norm.weight, WeightUse::Vector));
                let matrices = parts.iter().map(|part| (part.weight, WeightUse::Matrix));
                let biases = parts.iter().filter_map(|part| Some((part.bias?, WeightUse::Vector)));
                norm.chain(matrices).chain(biases).collect()
            }
            Self::Rope { .. }
            | Self::KvWrite { .. }
            | Self::RopeKvWrite { .. }
            | Self::Attention { .. }
            | Self::EncoderAttention { .. }
            | Self::Gelu { .. }
            | Self::SiluMul { .. }
            | Self::Add { .. }
            | Self::GatherRows { .. }
            | Self::Pool { .. } => vec![],
        }
    }

    /// The buffer the op fills, if it makes a new one.
    #[must_use]
    pub const fn output(&self) -> Option<B> {
        match self {
            Self::Rope { .. } | Self::KvWrite { .. } | Self::RopeKvWrite { .. } => None,
            Self::Embed { out, .. }
            | Self::EmbedPositions { out, .. }
            | Self::AddRow { out, .. }
            | Self::RmsNorm { out, .. }
            | Self::LayerNorm { out, .. }
            | Self::MatMul { out, .. }
            | Self::Attention { out, .. }
            | Self::EncoderAttention { out, .. }
            | Self::Gelu { out, .. }
            | Self::SiluMul { out, .. }
            | Self::Add { out, .. }
            | Self::GatherRows { out, .. }
            | Self::Logits { out, .. }
            | Self::Pool { out, .. } => Some(*out),
        }
    }

    /// The buffer that is the step's answer, if this op gives it.
    #[must_use]
    pub const fn answer(&self) -> Option<B> {
        match self {
            Self::Logits { out, .. } | Self::Pool { out, .. } => Some(*out),
            _ => None,
        }
    }

    /// The same op on other operands.
    pub fn map<C>(&self, mut f: impl FnMut(B) -> C) -> Op<C> {
        match *self {
            Self::Embed { table, out } => Op::Embed { table, out: f(out) },
            Self::EmbedPositions { table, out } => Op::EmbedPositions { table, out: f(out) },
            Self::AddRow { input, weight, out } => Op::AddRow { input: f(input), weight, out: f(out) },
            Self::RmsNorm { input, weight, eps, out } => {
                Op::RmsNorm { input: f(input), weight, eps, out: f(out) }
            }
            Self::LayerNorm { input, weight, bias, eps, out } => {
                Op::LayerNorm { input: f(input), weight, bias, eps, out: f(out) }
            }
            Self::MatMul { input, norm, ref parts, activation, residual, out } => {
                let (input, residual) = (f(input), residual.map(&mut f));
                Op::MatMul { input, norm, parts: parts.clone(), activation, residual, out: f(out) }
            }
            Self::Rope { data, spec } => Op::Rope { data: f(data), spec },
            Self::KvWrite { layer, keys, values } => Op::KvWrite { layer, keys: f(keys), values: f(values) },
            Self::RopeKvWrite { layer, query, keys, values, spec } => {
                Op::RopeKvWrite { layer, query: f(query), keys: f(keys), values: f(values), spec }
            }
            Self::Attention { layer, query, shape, scale, out } => {
                Op::Attention { layer, query: f(query), shape, scale, out: f(out) }
            }
            Self::EncoderAttention { query, keys, values, shape, scale, out } => {
                let (query, keys, values) = (f(query), f(keys), f(values));
                Op::EncoderAttention { query, keys, values, shape, scale, out: f(out) }
            }
            Self::Gelu { input, out } => Op::Gelu { input: f(input), out: f(out) },
            Self::SiluMul { gate, up, out } => Op::SiluMul { gate: f(gate), up: f(up), out: f(out) },
            Self::Add { a, b, out } => Op::Add { a: f(a), b: f(b), out: f(out) },
            Self::GatherRows { input, out } => Op::GatherRows { input: f(input), out: f(out) },
            Self::Logits { input, weight, out } => Op::Logits { input: f(input), weight, out: f(out) },
            Self::Pool { input, pooling, normalise, out } => {
                Op::Pool { input: f(input), pooling, normalise, out: f(out) }
            }
        }
    }
}

/// How an op reads a weight: a device may keep it in another form for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightUse {
    /// Single rows, picked by the step's tokens or positions.
    Rows,
    /// The one row of a vector.
    Vector,
    /// All of it, multiplied by rows of activations.
    Matrix,
}
