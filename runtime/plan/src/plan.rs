//! The immutable result of lowering a model: ops in order, the size of their arena, and the model's sizes.

use std::sync::Arc;

use crate::{Activation, AdapterRoom, BackendError, Buf, KvLayout, KvType, Op, RowSpace, WeightId, Weights};

/// Sizes of a model that the cache, the scheduler and validation need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hyper {
    /// Width of the residual stream.
    pub width: usize,
    /// Transformer blocks, each with its own cache.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Tokens a sequence may have.
    pub context: usize,
}

/// The largest step a plan accepts; the arena is sized by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows (tokens) per step.
    pub rows: usize,
    /// Sequences per step.
    pub sequences: usize,
    /// Rows of logits per step; may be zero for a plan that answers by sequence.
    pub logits_rows: usize,
}

impl Limits {
    /// Most rows of this kind.
    #[must_use]
    pub const fn of(&self, rows: RowSpace) -> usize {
        match rows {
            RowSpace::Tokens => self.rows,
            RowSpace::Logits => self.logits_rows,
            RowSpace::Sequences => self.sequences,
        }
    }
}

/// Why a model could not be lowered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Operands whose shapes do not match.
    #[error("op {index} ({op}): {detail}")]
    Shape {
        /// Number of the op, in the order of the builder's calls.
        index: usize,
        /// Its name.
        op: &'static str,
        /// What does not match.
        detail: String,
    },
    /// A size of the model or a limit that is zero or inconsistent.
    #[error("{field} is {value}: {detail}")]
    Size {
        /// Field of [`Hyper`] or [`Limits`].
        field: &'static str,
        /// Its value.
        value: usize,
        /// What it should be.
        detail: &'static str,
    },
    /// The arena's size overflows.
    #[error("the size of an arena for {rows} rows overflows; lower the rows per step")]
    ArenaOverflow {
        /// Rows asked for.
        rows: usize,
    },
}

/// The ops of one step of a model. Immutable; made by [`crate::PlanBuilder`].
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub(crate) ops: Vec<Op>,
    pub(crate) hyper: Hyper,
    pub(crate) limits: Limits,
    pub(crate) adapters: AdapterRoom,
    pub(crate) kv_room: usize,
    pub(crate) kv_layout: KvLayout,
    pub(crate) arena_bytes: usize,
    /// Names by id, for dumps and errors.
    pub(crate) weight_names: Arc<[String]>,
    /// Rows of the table of positions before those of a sequence's second segment, where there may be one.
    pub(crate) second_segment: Option<usize>,
}

impl Plan {
    /// The ops, in the order they run.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Sizes of the model.
    #[must_use]
    pub const fn hyper(&self) -> &Hyper {
        &self.hyper
    }

    /// The largest step it accepts.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The room for adapters that it was made with. In a plan with room no projection has an activation.
    #[must_use]
    pub const fn adapters(&self) -> AdapterRoom {
        self.adapters
    }

    /// The same plan with room for adapters. It must be made with [`crate::FusedOps::without_activations`].
    ///
    /// # Errors
    /// [`PlanError`] for a projection with an activation, and for room of no rank or more than 32 bits.
    pub fn with_adapters(mut self, room: AdapterRoom) -> Result<Self, PlanError> {
        let fused = |op: &Op| matches!(op, Op::MatMul { activation, .. } if *activation != Activation::None);
        if let Some(index) = self.ops.iter().position(fused).filter(|_| !room.is_none()) {
            let detail = "a projection with room for adapters has no activation".to_owned();
            return Err(PlanError::Shape { index, op: self.ops[index].name(), detail });
        }
        let sizes = [("adapters.slots", room.slots), ("adapters.rank", room.rank)];
        let wrong = |value: usize| u32::try_from(value).is_err() || value == 0;
        if let Some(&(field, value)) = sizes.iter().find(|(_, value)| !room.is_none() && wrong(*value)) {
            return Err(PlanError::Size { field, value, detail: "must be above zero and fit 32 bits" });
        }
        self.adapters = room;
        Ok(self)
    }

    /// The same plan for steps of at most `rows` rows, not more than the plan that was lowered. Its buffers
    /// lie where they did.
    #[must_use]
    pub fn for_rows(&self, rows: usize) -> Self {
        let limits = Limits { rows, ..self.limits };
        Self { limits, ..self.clone() }
    }

    /// The same plan for a cache that may grow to so many blocks after it was loaded with fewer
    /// ([`crate::Loaded::resize_kv`]).
    #[must_use]
    pub const fn with_kv_room(mut self, blocks: usize) -> Self {
        self.kv_room = blocks;
        self
    }

    /// The most blocks that the cache may have: those that it is loaded with, or more.
    #[must_use]
    pub const fn kv_room(&self, loaded_blocks: usize) -> usize {
        if self.kv_room > loaded_blocks { self.kv_room } else { loaded_blocks }
    }

    /// The same plan with a cache in which layers with windows keep only the blocks that their windows reach
    /// (see [`mod@crate::kv_layout`]). A plan without such layers stays as it is.
    #[must_use]
    pub fn with_layer_classes(mut self) -> Self {
        let windows: Vec<Option<usize>> = (0..self.hyper.layers).map(|layer| self.window(layer)).collect();
        self.kv_layout = KvLayout::of_windows(&windows, self.hyper.context);
        self
    }

    /// The positions that every attention of a layer attends to at most; `None` where that is all of them.
    fn window(&self, layer: usize) -> Option<usize> {
        let of_layer = |op: &Op| match op {
            Op::Attention { layer: own, scores, .. } if *own == layer => Some(scores.window),
            _ => None,
        };
        let mut windows = self.ops.iter().filter_map(of_layer);
        let first = windows.next()??;
        windows.try_fold(first, |most, window| Some(most.max(window?)))
    }

    /// Which layers share the blocks of the cache.
    #[must_use]
    pub const fn kv_layout(&self) -> &KvLayout {
        &self.kv_layout
    }

    /// Bytes of one block of a cache of this type.
    #[must_use]
    pub const fn kv_block_bytes(&self, kv_type: KvType) -> u64 {
        self.kv_layout.block_bytes(kv_type, &self.hyper)
    }

    /// Whether steps need blocks of the key/value cache. Without a cache, all tokens of a sequence come in
    /// one step.
    #[must_use]
    pub fn uses_cache(&self) -> bool {
        self.ops
            .iter()
            .any(|op| matches!(op, Op::KvWrite { .. } | Op::RopeKvWrite { .. } | Op::Attention { .. }))
    }

    /// The step's answer: one row per requested row of logits, or one per sequence.
    ///
    /// # Panics
    /// Never: the builder refuses a plan without an answer.
    #[must_use]
    pub fn answer(&self) -> Buf {
        self.ops.iter().rev().find_map(Op::answer).expect("the builder refuses a plan without an answer")
    }

    /// What is added to the positions of a sequence's second segment: the table of positions has its own rows
    /// for them. None where sequences have one segment.
    #[must_use]
    pub const fn second_segment(&self) -> Option<usize> {
        self.second_segment
    }

    /// Bytes of the arena, which holds all buffers.
    #[must_use]
    pub const fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Name of a weight of this plan.
    ///
    /// # Panics
    /// When the id belongs to another model.
    #[must_use]
    pub fn weight_name(&self, id: WeightId) -> &str {
        &self.weight_names[id.index()]
    }

    /// Checks that this plan can run on a model that was loaded with another: same sizes, same weights, no
    /// larger arena.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] naming what differs.
    pub fn check_loaded(
        &self,
        hyper: &Hyper,
        arena_bytes: usize,
        weights: &Weights,
    ) -> Result<(), BackendError> {
        let same_weights = self.weight_names.len() == weights.len()
            && self.weight_names.iter().zip(weights.iter()).all(|(name, (_, weight))| name == weight.name());
        let is_divided = self.ops.iter().any(|op| matches!(op, Op::AllReduce { .. }));
        let checks = [
            (!is_divided, "it sums over the devices of a group"),
            (self.hyper == *hyper, "it has other sizes"),
            (self.arena_bytes <= arena_bytes, "it needs a larger arena: load with the largest plan"),
            (same_weights, "it names other weights"),
        ];
        checks.into_iter().find(|(ok, _)| !ok).map_or(Ok(()), |(_, what)| Err(BackendError::Mismatch(what)))
    }

    /// Checks that this plan uses the cache of a loaded model as the plan does that it was loaded with.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] where its layers share blocks in another way.
    pub fn check_cache(&self, loaded: &KvLayout) -> Result<(), BackendError> {
        if self.kv_layout == *loaded {
            return Ok(());
        }
        Err(BackendError::Mismatch("its layers share the blocks of the cache in another way"))
    }

    /// Refuses a plan that sums over the devices of a group.
    ///
    /// # Errors
    /// [`BackendError::OneDevice`] with the name of the device that was asked.
    pub fn check_one_device(&self, device: &str) -> Result<(), BackendError> {
        match self.ops.iter().position(|op| matches!(op, Op::AllReduce { .. })) {
            Some(index) => Err(BackendError::OneDevice { device: device.to_owned(), index }),
            None => Ok(()),
        }
    }

    /// A stable text form, one line per op, for golden files and for people.
    #[must_use]
    pub fn dump(&self) -> String {
        crate::dump::dump(self)
    }
}

impl Hyper {
    /// # Errors
    /// [`PlanError::Size`] when a size is zero, or the heads do not divide.
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        let Self { width, layers, heads, kv_heads, head_dim, vocab, context } = *self;
        let sizes = [
            ("width", width),
            ("layers", layers),
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("vocab", vocab),
            ("context", context),
        ];
        above_zero(&sizes)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(PlanError::Size {
                field: "heads",
                value: heads,
                detail: "must be a multiple of kv_heads",
            });
        }
        // Every number that a step carries is a u32.
        match sizes.iter().find(|(_, value)| u32::try_from(*value).is_err()) {
            Some(&(field, value)) => Err(PlanError::Size { field, value, detail: "must fit 32 bits" }),
            None => Ok(()),
        }
    }
}

impl Limits {
    /// # Errors
    /// [`PlanError::Size`] when a limit is zero.
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        let Self { rows, sequences, logits_rows: _ } = *self;
        above_zero(&[("rows", rows), ("sequences", sequences)])
    }
}

fn above_zero(sizes: &[(&'static str, usize)]) -> Result<(), PlanError> {
    match sizes.iter().find(|(_, value)| *value == 0) {
        Some(&(field, value)) => Err(PlanError::Size { field, value, detail: "must be above zero" }),
        None => Ok(()),
    }
}
