//! The boundary between a plan and a device: four calls at load, two per step, none per op.
//!
//! `load` takes the weights once (and repacks, uploads, allocates), `compile` turns a plan into something that runs,
//! `submit` starts a step and `wait` collects it. Splitting the last two lets a scheduler prepare step *n + 1* while
//! step *n* runs. A CUDA executable replays a graph, a Vulkan one resubmits a command buffer, a CPU one loops.

use std::sync::Arc;

use crate::{DType, Hyper, KV_BLOCK_TOKENS, Plan, PlanError, StepError, StepInput, StepOutput, Weights};

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

/// How closely a device must follow f32 arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Numerics {
    /// Activations may be quantised where that is faster.
    #[default]
    Fast,
    /// f32 activations against dequantised weights, and sums whose order does not depend on what else is in the batch
    /// or on the number of threads: a sequence gives the same bits alone and batched.
    Exact,
}

/// Fused forms of ops that a device has kernels for; [`crate::passes`] make only those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FusedOps {
    /// Several projections of one input as one [`crate::Op::MatMul`] (QKV).
    pub concat_matmul: bool,
    /// [`crate::Part::bias`]: the bias added by the projection itself.
    pub bias_epilogue: bool,
    /// [`crate::Activation::Gelu`] by the projection itself.
    pub gelu_epilogue: bool,
    /// [`crate::Activation::SiluMul`]: gate and up as one projection that stores their gated product.
    pub silu_mul_epilogue: bool,
    /// The residual added by the projection itself.
    pub add_epilogue: bool,
    /// [`crate::Norm`]: the root-mean-square norm taken while a projection reads its input.
    pub norm_matmul: bool,
    /// [`crate::Op::RopeKvWrite`].
    pub rope_kv_write: bool,
}

impl FusedOps {
    /// Nothing fused.
    pub const NONE: Self = Self {
        concat_matmul: false,
        bias_epilogue: false,
        gelu_epilogue: false,
        silu_mul_epilogue: false,
        add_epilogue: false,
        norm_matmul: false,
        rope_kv_write: false,
    };

    /// Every fused form there is.
    pub const ALL: Self = Self {
        concat_matmul: true,
        bias_epilogue: true,
        gelu_epilogue: true,
        silu_mul_epilogue: true,
        add_epilogue: true,
        norm_matmul: true,
        rope_kv_write: true,
    };
}

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// Kind of device.
    pub kind: DeviceKind,
    /// For people: the device and the kernels chosen, such as `cpu avx512-vnni, 2 threads`.
    pub description: String,
    /// Bytes that weights, cache and arena may take together.
    pub memory_bytes: u64,
    /// Weight types it has kernels for.
    pub dtypes: Vec<DType>,
    /// Fused ops it has kernels for.
    pub fused: FusedOps,
    /// Bytes per element of its key/value cache.
    pub kv_element_bytes: usize,
}

impl Caps {
    /// Bytes of one cache block (all layers, keys and values, [`KV_BLOCK_TOKENS`] tokens) for a model.
    #[must_use]
    pub const fn kv_block_bytes(&self, hyper: &Hyper) -> u64 {
        (hyper.layers * 2 * KV_BLOCK_TOKENS * hyper.kv_heads * hyper.head_dim * self.kv_element_bytes) as u64
    }
}

/// How far a load is; `done_bytes` never falls and ends at `total_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Stored bytes of weights taken in so far.
    pub done_bytes: u64,
    /// Stored bytes of all weights the plan uses.
    pub total_bytes: u64,
}

/// Everything a device needs to hold a model.
pub struct LoadSpec<'a> {
    /// The tensors; the device keeps the `Arc` only if it reads them after loading.
    pub weights: Arc<Weights>,
    /// The largest plan that will be compiled: it says how weights are used and how large the arena is.
    pub plan: &'a Plan,
    /// Blocks of the key/value cache, each of [`KV_BLOCK_TOKENS`] tokens; zero for a plan that uses none.
    pub kv_blocks: usize,
    /// How closely to follow f32.
    pub numerics: Numerics,
    /// Called after each tensor, on the loading thread.
    pub progress: &'a mut dyn FnMut(LoadProgress),
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
    /// What two models take together.
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

/// Why a device refused or failed.
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
        /// Weights, arena or cache.
        what: &'static str,
        /// Bytes asked for.
        needed_bytes: u64,
    },
    /// A plan that is not the loaded one's.
    #[error("the plan does not belong to the loaded model: {0}")]
    Mismatch(&'static str),
    /// `wait` without `submit`, or `submit` twice.
    #[error("steps are submitted and awaited in turn: {0}")]
    Order(&'static str),
    /// The device cannot be used.
    #[error("device unusable: {0}")]
    Device(String),
}

/// A device that can hold models.
pub trait Backend: Send {
    /// What it is and can do.
    fn caps(&self) -> &Caps;

    /// Takes a model's weights in and allocates its cache and arena.
    ///
    /// # Errors
    /// [`BackendError`] when a weight type has no kernel or memory does not suffice.
    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError>;
}

/// A model on its device. Dropping it and its executables returns the memory.
pub trait Loaded: Send {
    /// Bytes it takes.
    fn memory(&self) -> MemoryReport;

    /// Makes a plan runnable. All executables of one model share its cache and arena, so one step runs at a time.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] when the plan needs more than was loaded.
    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError>;
}

/// A plan that runs.
pub trait Executable: Send {
    /// Checks the step and starts it; a CPU may do all the work here.
    ///
    /// # Errors
    /// [`BackendError::Step`] when the step is invalid (nothing was computed, the next may be submitted),
    /// [`BackendError::Order`] when one is under way.
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError>;

    /// Waits for the step under way and writes its answer.
    ///
    /// # Errors
    /// [`BackendError::Order`] when none is, [`BackendError::Device`] when it failed.
    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError>;
}
