//! The execution plan: what a model does in one step, written once, run by every backend.
//!
//! A model is lowered *at load* into a [`Plan`]: a flat list over the closed set of [`Op`]s, whose operands are
//! offsets into an arena that is planned before the first request. Nothing about a plan changes afterwards, so a
//! backend may record it (a CUDA graph, a Vulkan command buffer) or loop over it (a CPU); addresses are fixed, no op
//! allocates and no op waits for the host.
//!
//! The way through the crate: [`Weights`] name the tensors, [`PlanBuilder`] writes the model down, [`passes`] fuse
//! what the backend's [`Caps`] claim, [`arena`] places the buffers, [`Backend`] → [`Loaded`] → [`Executable`] run it on
//! a [`StepInput`]. [`oracle::Oracle`] is the backend that every other one is compared with: plain loops, one thread.

pub mod arena;
pub mod backend;
pub mod builder;
pub mod dtype;
mod dump;
pub mod op;
pub mod oracle;
pub mod passes;
pub mod plan;
pub mod rope;
pub mod step;
pub mod weights;

pub use backend::{
    Backend, BackendError, Caps, DeviceKind, Executable, FusedOps, LoadProgress, LoadSpec, Loaded,
    MemoryReport, Numerics,
};
pub use builder::{PlanBuilder, Value};
pub use dtype::DType;
pub use op::{
    Activation, AttentionShape, Buf, Norm, Op, Part, Pooling, RopeLayout, RopeSpec, RowSpace, WeightUse,
};
pub use plan::{Hyper, Limits, Plan, PlanError};
pub use step::{KV_BLOCK_TOKENS, LogitsRows, SequenceStep, StepError, StepInput, StepOutput};
pub use weights::{Weight, WeightBytes, WeightError, WeightId, Weights};
