//! The boundary between a plan and a device: a few calls at load, three per step, none per op.
//!
//! `estimate` tells the memory that a load will take. `load` repacks or uploads the weights and allocates,
//! `compile` makes a plan executable, `submit` starts a step, `sample` chooses tokens from its logits on the
//! device, and `wait` returns its answer. A CUDA executable replays a graph, a Vulkan one resubmits a command
//! buffer, and a CPU one loops over the ops.
//!
//! A device that runs beside the host has two steps in flight ([`Caps::steps_in_flight`]). The host submits
//! step *n + 1* before it has the answer of step *n*: its tokens are then the rows of the sample of step *n*
//! ([`crate::Token::Sampled`]). While step *n + 1* runs, the host reads the choices of step *n* and prepares
//! the sample of step *n + 1* with them, masks and penalties included.

use std::sync::Arc;

use crate::{
    Adapter, AdapterError, AdapterSlot, DType, KvType, Plan, PlanError, SampleInput, StepError, StepInput,
    StepOutput, Weights,
};

/// Which kind of device a backend drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// A GPU through Vulkan.
    Vulkan,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Vulkan => "vulkan",
        })
    }
}

/// How closely a device follows f32 arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Numerics {
    /// Activations may be quantised where that is faster.
    #[default]
    Fast,
    /// f32 activations against dequantised weights, and sums whose order does not depend on what else is in
    /// the batch or on the number of threads. A sequence gives the same bits alone and batched.
    Exact,
}

/// Fused forms of ops that a device has kernels for; [`crate::passes`] make no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FusedOps {
    /// Several projections of one input as one [`crate::Op::MatMul`] (QKV), all of one weight type.
    pub concat_matmul: bool,
    /// With `concat_matmul`: the segments may have different weight types, each stored in its own.
    pub concat_mixed_types: bool,
    /// [`crate::Segment::bias`]: the projection adds the bias.
    pub bias_epilogue: bool,
    /// [`crate::Activation::Gelu`]: the projection applies it.
    pub gelu_epilogue: bool,
    /// [`crate::Activation::SiluMul`]: gate and up, of one weight type, as one projection that stores their
    /// gated product.
    pub silu_mul_epilogue: bool,
    /// The projection adds the residual.
    pub add_epilogue: bool,
    /// [`crate::Norm`] without a bias: the projection computes the root-mean-square norm while it reads its
    /// input.
    pub norm_matmul: bool,
    /// [`crate::Norm`] with a bias: the projection computes the layer norm while it reads its input.
    pub layer_norm_matmul: bool,
    /// With one of these two: the projection also writes the normed rows, for other ops that read them.
    pub norm_output: bool,
    /// [`crate::Op::RopeKvWrite`].
    pub rope_kv_write: bool,
}

impl FusedOps {
    /// No fused form.
    pub const NONE: Self = Self {
        concat_matmul: false,
        concat_mixed_types: false,
        bias_epilogue: false,
        gelu_epilogue: false,
        silu_mul_epilogue: false,
        add_epilogue: false,
        norm_matmul: false,
        layer_norm_matmul: false,
        norm_output: false,
        rope_kv_write: false,
    };

    /// These forms without activations in projections, for plans with room for adapters.
    #[must_use]
    pub const fn without_activations(self) -> Self {
        Self { gelu_epilogue: false, silu_mul_epilogue: false, ..self }
    }

    /// All fused forms.
    pub const ALL: Self = Self {
        concat_matmul: true,
        concat_mixed_types: true,
        bias_epilogue: true,
        gelu_epilogue: true,
        silu_mul_epilogue: true,
        add_epilogue: true,
        norm_matmul: true,
        layer_norm_matmul: true,
        norm_output: true,
        rope_kv_write: true,
    };
}

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// Kind of device.
    pub kind: DeviceKind,
    /// The device and its kernels as text, such as `cpu avx512-vnni, 2 threads`.
    pub description: String,
    /// Bytes that weights, cache and arena may take together.
    pub memory_bytes: u64,
    /// Weight types it has kernels for.
    pub dtypes: Vec<DType>,
    /// Fused ops it has kernels for.
    pub fused: FusedOps,
    /// Types in which it can keep a key/value cache; [`KvType::F32`] is always one of them.
    pub kv_types: Vec<KvType>,
    /// The type with which long contexts are fastest, of those in `kv_types`.
    pub fast_kv_type: KvType,
    /// Steps that one executable takes before the first of them is awaited: 2 for a device that runs beside
    /// the host, 1 for a device that computes a step while it is submitted.
    pub steps_in_flight: usize,
    /// Whether in [`Numerics::Fast`] a row of few has the bits that it has alone, as draft tokens need it to
    /// leave every answer as it is.
    pub rows_are_invariant: bool,
    /// The numbers of rows for which it has executables of their own, ascending; none for a device that
    /// computes as many rows as a step has. See [`mod@crate::buckets`].
    pub row_buckets: Vec<usize>,
    /// Whether the cache of a loaded model can change its size ([`Loaded::resize_kv`]).
    pub kv_resizes: bool,
    /// Whether it runs plans with room for adapters ([`mod@crate::adapter`]).
    pub adapters: bool,
}

impl Caps {
    /// The type of a cache that nobody chose: f32 in [`Numerics::Exact`], the fastest in `Fast`.
    #[must_use]
    pub const fn default_kv_type(&self, numerics: Numerics) -> KvType {
        match numerics {
            Numerics::Exact => KvType::F32,
            Numerics::Fast => self.fast_kv_type,
        }
    }
}

/// Progress of a load; `done_bytes` never falls and ends at `total_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Stored bytes of weights loaded so far.
    pub done_bytes: u64,
    /// Stored bytes of all weights the plan uses.
    pub total_bytes: u64,
}

/// Everything that a device needs to load a model.
pub struct LoadSpec<'a> {
    /// The tensors; the device keeps the `Arc` only if it reads them after loading.
    pub weights: Arc<Weights>,
    /// The largest plan that will be compiled. It determines how weights are used and how large the arena is.
    pub plan: &'a Plan,
    /// Blocks of the key/value cache, each of [`KV_BLOCK_TOKENS`] tokens; zero for a plan that uses none.
    pub kv_blocks: usize,
    /// The type of the cache's elements, one of [`Caps::kv_types`].
    pub kv_type: KvType,
    /// How closely to follow f32.
    pub numerics: Numerics,
    /// Called after each tensor, on the loading thread.
    pub progress: &'a mut dyn FnMut(LoadProgress),
}

impl LoadSpec<'_> {
    /// What [`Backend::estimate`] needs to know of this load.
    #[must_use]
    pub fn estimate_spec(&self) -> EstimateSpec<'_> {
        let Self { weights, plan, kv_blocks, kv_type, numerics, progress: _ } = self;
        EstimateSpec { weights, plan, kv_blocks: *kv_blocks, kv_type: *kv_type, numerics: *numerics }
    }
}

/// What decides how much memory a load takes. The fields are those of [`LoadSpec`].
#[derive(Debug, Clone, Copy)]
pub struct EstimateSpec<'a> {
    /// The tensors; only their types and shapes are read.
    pub weights: &'a Weights,
    /// The largest plan that will be compiled.
    pub plan: &'a Plan,
    /// Blocks of the key/value cache.
    pub kv_blocks: usize,
    /// The type of the cache's elements.
    pub kv_type: KvType,
    /// How closely to follow f32.
    pub numerics: Numerics,
}

/// Bytes that a loaded model takes on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryReport {
    /// Weights owned by the device (repacked); a mapped file is not counted.
    pub weights_bytes: u64,
    /// The arena of activations.
    pub arena_bytes: u64,
    /// The key/value cache.
    pub kv_bytes: u64,
    /// Tables and scratch space.
    pub other_bytes: u64,
}

impl MemoryReport {
    /// The sum of two models.
    #[must_use]
    pub const fn and(&self, other: &Self) -> Self {
        Self {
            weights_bytes: self.weights_bytes + other.weights_bytes,
            arena_bytes: self.arena_bytes + other.arena_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
            other_bytes: self.other_bytes + other.other_bytes,
        }
    }

    /// All of it.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.arena_bytes + self.kv_bytes + self.other_bytes
    }
}

/// Why a device refused a call or failed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The plan itself is wrong.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The step was refused before anything was computed.
    #[error("step refused: {0}")]
    Step(#[from] StepError),
    /// The device has no kernel for that.
    #[error(
        "{device} has no kernel for {what}; convert the model to a supported type or choose another device"
    )]
    Unsupported {
        /// The device.
        device: String,
        /// Op and type.
        what: String,
    },
    /// The model does not fit.
    #[error(
        "the model needs {needed_bytes} bytes for {what}, which could not be allocated; lower the context, the cache or the batch"
    )]
    OutOfMemory {
        /// The memory that could not be allocated: weights, arena or cache.
        what: &'static str,
        /// Bytes asked for.
        needed_bytes: u64,
    },
    /// A plan for a group of devices, given to one device.
    #[error(
        "op {index} of the plan sums over the devices of a group, and {device} is one device; load the undivided plan"
    )]
    OneDevice {
        /// The device.
        device: String,
        /// Number of the op.
        index: usize,
    },
    /// An adapter that cannot be put or dropped; the others are as they were.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A plan that does not belong to the loaded model.
    #[error("the plan does not belong to the loaded model: {0}")]
    Mismatch(&'static str),
    /// `wait` without `submit`, or `submit` twice.
    #[error("submit and wait must alternate: {0}")]
    Order(&'static str),
    /// The device cannot be used.
    #[error("device unusable: {0}")]
    Device(String),
}

/// A device that can hold models.
pub trait Backend: Send {
    /// Its kind and capabilities.
    fn caps(&self) -> &Caps;

    /// What [`Loaded::memory`] will report after a load with this specification, at most 1 % less or more.
    /// Nothing is allocated: callers compare the sum with the memory there is and refuse the model where it
    /// does not fit.
    ///
    /// # Errors
    /// [`BackendError`] where the load would be refused in any case.
    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError>;

    /// Loads a model's weights and allocates its cache and arena.
    ///
    /// # Errors
    /// [`BackendError`] when a weight type has no kernel or memory does not suffice.
    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError>;
}

/// A model on its device. Dropping it and its executables frees the memory.
pub trait Loaded: Send {
    /// Bytes it takes.
    fn memory(&self) -> MemoryReport;

    /// Makes a plan executable. All executables of one model share its cache, its arena and the latest
    /// sample, so one step runs at a time. A device with [`Caps::row_buckets`] is asked for one executable
    /// for each.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] when the plan needs more than was loaded.
    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError>;

    /// Changes how many blocks the key/value cache has, up to the room of the loaded plan
    /// ([`Plan::with_kv_room`]). Blocks below both numbers keep their content. The memory of blocks that are
    /// gone is free for others when this returns. It may be called while steps are in flight: they have no
    /// rows in blocks that are gone or new.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] above the room, [`BackendError::OutOfMemory`], and
    /// [`BackendError::Unsupported`] where [`Caps::kv_resizes`] is not claimed. The cache is as it was then.
    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError>;

    /// Whether another model was refused memory since the cache of this one last shrank. Blocks that nothing
    /// needs should then be given back.
    fn kv_is_wanted(&self) -> bool {
        false
    }

    /// Puts an adapter into an empty slot: every step that is submitted afterwards may choose it. It may be
    /// called while steps are in flight; they have no rows of this slot. [`Self::memory`] counts it as
    /// weights.
    ///
    /// # Errors
    /// [`BackendError::Adapter`] where it does not fit the model or the plan's room,
    /// [`BackendError::OutOfMemory`], and [`BackendError::Unsupported`] where [`Caps::adapters`] is not
    /// claimed.
    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        let what = format!("adapters (slot {slot}, {})", adapter.name);
        Err(BackendError::Unsupported { device: "this device".to_owned(), what })
    }

    /// Takes the adapter out of a slot and frees its memory. Every step that chose it was awaited before.
    ///
    /// # Errors
    /// [`BackendError::Adapter`] where the slot holds none.
    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        Err(AdapterError::Empty(slot).into())
    }
}

/// A plan that can run.
///
/// Steps are computed in the order in which they are submitted. `submit`, then at most one `sample` of that
/// step, then the next `submit`: a sample reads logits that the next step overwrites.
pub trait Executable: Send {
    /// Checks the step and starts it; a CPU may compute all of it here.
    ///
    /// # Errors
    /// [`BackendError::Step`] when the step is invalid (nothing was computed, the next may be submitted),
    /// [`BackendError::Order`] when [`Caps::steps_in_flight`] steps were not awaited yet.
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError>;

    /// Chooses tokens from the logits of the step that was submitted last, exactly as
    /// [`crate::sample::choose`] does. The logits of this step then stay on the device, those of rows without
    /// a choice too.
    ///
    /// # Errors
    /// [`BackendError::Step`] when a row does not exist, [`BackendError::Order`] when no step is in flight or
    /// the last one was sampled already.
    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError>;

    /// Waits for the oldest step in flight and writes its answer: the choices of a step that was sampled,
    /// otherwise all values.
    ///
    /// # Errors
    /// [`BackendError::Order`] without a submitted step, [`BackendError::Device`] when it failed.
    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError>;
}
