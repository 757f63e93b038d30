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

/// What a projection does to its result before storing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue<B = Buf> {
    /// Nothing.
    None,
    /// Adds a buffer of the output's shape.
    Add(B),
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
    /// `out[r] = concat(w · input[r] for w in weights)`, then the epilogue. More than one weight appears only where
    /// [`crate::FusedOps::concat_matmul`] is claimed.
    MatMul {
        /// Rows × features in.
        input: B,
        /// Each features out × features in; their outputs lie side by side.
        weights: Vec<WeightId>,
        /// Applied to the whole output.
        epilogue: Epilogue<B>,
        /// Rows × the sum of features out.
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
}

impl<B: Copy> Op<B> {
    /// The op's name in dumps and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::RmsNorm { .. } => "rms_norm",
            Self::MatMul { .. } => "matmul",
            Self::Rope { .. } => "rope",
            Self::KvWrite { .. } => "kv_write",
            Self::Attention { .. } => "attention",
            Self::SiluMul { .. } => "silu_mul",
            Self::Add { .. } => "add",
            Self::GatherRows { .. } => "gather_rows",
            Self::Logits { .. } => "logits",
        }
    }

    /// Every buffer the op reads (what it turns in place included).
    #[must_use]
    pub fn inputs(&self) -> Vec<B> {
        match self {
            Self::Embed { .. } => vec![],
            Self::RmsNorm { input, .. } | Self::GatherRows { input, .. } | Self::Logits { input, .. } => {
                vec![*input]
            }
            Self::MatMul { input, epilogue: Epilogue::None, .. } => vec![*input],
            Self::MatMul { input, epilogue: Epilogue::Add(b), .. } => vec![*input, *b],
            Self::Rope { data, .. } => vec![*data],
            Self::KvWrite { keys, values, .. } => vec![*keys, *values],
            Self::Attention { query, .. } => vec![*query],
            Self::SiluMul { gate, up, .. } => vec![*gate, *up],
            Self::Add { a, b, .. } => vec![*a, *b],
        }
    }

    /// Every weight the op reads.
    #[must_use]
    pub fn weights(&self) -> Vec<WeightId> {
        match self {
            Self::Embed { table, .. } => vec![*table],
            Self::RmsNorm { weight, .. } | Self::Logits { weight, .. } => vec![*weight],
            Self::MatMul { weights, .. } => weights.clone(),
            Self::Rope { .. }
            | Self::KvWrite { .. }
            | Self::Attention { .. }
            | Self::SiluMul { .. }
            | Self::Add { .. }
            | Self::GatherRows { .. } => vec![],
        }
    }

    /// The buffer the op fills, if it makes a new one.
    #[must_use]
    pub const fn output(&self) -> Option<B> {
        match self {
            Self::Rope { .. } | Self::KvWrite { .. } => None,
            Self::Embed { out, .. }
            | Self::RmsNorm { out, .. }
            | Self::MatMul { out, .. }
            | Self::Attention { out, .. }
            | Self::SiluMul { out, .. }
            | Self::Add { out, .. }
            | Self::GatherRows { out, .. }
            | Self::Logits { out, .. } => Some(*out),
        }
    }

    /// The same op on other operands.
    pub fn map<C>(&self, mut f: impl FnMut(B) -> C) -> Op<C> {
        match self {
            Self::Embed { table, out } => Op::Embed { table: *table, out: f(*out) },
            Self::RmsNorm { input, weight, eps, out } => {
                Op::RmsNorm { input: f(*input), weight: *weight, eps: *eps, out: f(*out) }
            }
            Self::MatMul { input, weights, epilogue, out } => Op::MatMul {
                input: f(*input),
                weights: weights.clone(),
                epilogue: match epilogue {
                    Epilogue::None => Epilogue::None,
                    Epilogue::Add(b) => Epilogue::Add(f(*b)),
                },
                out: f(*out),
            },
            Self::Rope { data, spec } => Op::Rope { data: f(*data), spec: *spec },
            Self::KvWrite { layer, keys, values } => {
                Op::KvWrite { layer: *layer, keys: f(*keys), values: f(*values) }
            }
            Self::Attention { layer, query, shape, scale, out } => {
                Op::Attention { layer: *layer, query: f(*query), shape: *shape, scale: *scale, out: f(*out) }
            }
            Self::SiluMul { gate, up, out } => Op::SiluMul { gate: f(*gate), up: f(*up), out: f(*out) },
            Self::Add { a, b, out } => Op::Add { a: f(*a), b: f(*b), out: f(*out) },
            Self::GatherRows { input, out } => Op::GatherRows { input: f(*input), out: f(*out) },
            Self::Logits { input, weight, out } => {
                Op::Logits { input: f(*input), weight: *weight, out: f(*out) }
            }
        }
    }
}
