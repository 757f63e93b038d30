//! The execution plan: the ops of one step of a model, lowered once and run by every backend.
//!
//! A model is lowered *at load* into a [`Plan`]: a flat list over the closed set of [`Op`]s, whose operands
//! are offsets into an arena that is planned before the first request. A plan is immutable, so a backend can
//! record it (a CUDA graph, a Vulkan command buffer) or loop over it (a CPU). Addresses are fixed, no op
//! allocates, and no op waits for the host.
//!
//! The steps from model to answer: [`Weights`] name the tensors, [`PlanBuilder`] collects the ops, [`passes`]
//! fuse the forms that the backend's [`Caps`] claim, [`arena`] assigns offsets to the buffers, and
//! [`Backend`] → [`Loaded`] → [`Executable`] run the plan on a [`StepInput`]. [`mod@sample`] chooses tokens.
//! [`Backend::estimate`] tells the memory before a load. [`shard`](mod@shard) divides a model among the
//! devices of a group. [`mod@adapter`] has small changes of a model that sequences choose. The backend
//! [`oracle::Oracle`] defines the right answers: plain loops, one thread. [`seeded`] is the generator for
//! reproducible weights.

pub mod adapter;
pub mod arena;
pub mod backend;
pub mod buckets;
pub mod builder;
pub mod dtype;
mod dump;
pub mod experts;
pub mod kv;
pub mod kv_layout;
pub mod op;
pub mod oracle;
pub mod passes;
pub mod plan;
pub mod rope;
pub mod sample;
pub mod seeded;
pub mod shard;
pub mod step;
pub mod weights;

pub use adapter::{Adapter, AdapterError, AdapterRoom, AdapterSlot, AdapterTable, LowRank};
pub use backend::{
    Backend, BackendError, Caps, DeviceKind, EstimateSpec, Executable, FusedOps, LoadProgress, LoadSpec,
    Loaded, MemoryReport, Numerics,
};
pub use builder::{ExpertWeights, PlanBuilder, Value};
pub use dtype::DType;
pub use experts::{ChosenExpert, Experts};
pub use kv::KvType;
pub use kv_layout::{ABSENT_BLOCK, CacheLayer, KvLayout, LayerClasses};
pub use op::{
    Access, Activation, AttentionShape, Buf, EncoderScores, GeluForm, Norm, Op, Pooling, RopeLayout,
    RopeScaling, RopeSpec, RowSpace, Scores, Segment, WeightUse,
};
pub use plan::{Hyper, Limits, Plan, PlanError};
pub use sample::{
    ChosenToken, Filters, Penalties, SampleFault, SampleInput, SampleResult, SampleScratch, SampleSpec,
    TokenCount, TokenLogprobs,
};
pub use step::{
    KV_BLOCK_TOKENS, LogitsRows, SampledStep, SequenceStep, StepError, StepInput, StepOutput, Token,
};
pub use weights::{MatrixShape, Weight, WeightBytes, WeightError, WeightId, WeightView, Weights};
