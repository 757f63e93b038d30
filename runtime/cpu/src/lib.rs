//! CPU backend: run-time dispatch over SIMD tiers.
//!
//! Decoding reads every weight once per step, so memory bandwidth limits its speed. Weights are repacked at
//! load into one forward stream per thread ([`pack`]), which the kernels ([`kernels`]) read at full
//! bandwidth. In a step all threads run the whole plan ([`step`]), each on its static share of every op, and
//! synchronise at barriers where an op reads what another thread wrote ([`hazards`]). [`footprint`] computes
//! the memory of a model before it is loaded.
//!
//! In [`Numerics::Exact`](trustformers_plan::Numerics) activations stay f32, and the order in which a row is
//! summed depends on the tier only. In `Fast` activations are quantised to 8 bits per 32 columns where the
//! weights are quantised, and rounded to bf16 where the weights are bf16 and the processor can multiply bf16.
//!
//! One word has one meaning here: a *block* is 32 columns of a weight matrix, the unit of quantisation; a *KV
//! block* is 16 positions of the key/value cache; a *group* is 16 rows of a packed matrix; a *tile* is a few
//! rows of activations whose sums stay in registers; a *strip* is as many rows as share weights that are in a
//! cache of the processor.

mod adapter;
#[cfg(target_arch = "x86_64")]
mod amx;
mod arbiter;
mod executable;
mod footprint;
mod hazards;
mod kernels;
mod kv_memory;
mod machine;
mod memory;
mod model;
mod pack;
mod pool;
mod shared_pool;
mod step;
mod tier;

use std::sync::Arc;

use trustformers_plan::{
    Backend, BackendError, Caps, DType, DeviceKind, EstimateSpec, FusedOps, KvType, LoadSpec, Loaded,
    MemoryReport,
};

use crate::{footprint::Footprint, kernels::Kernels, model::CpuModel, pool::Pool, shared_pool::SharedPool};
pub use kernels::choice::{PromptProducts, TileRule};
pub use tier::Tier;

/// How to use the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// Kernels to use; `None` for the fastest that the processor has.
    pub tier: Option<Tier>,
    /// When the kernels on tile registers are used, on tiers that have them.
    pub tiles: TileRule,
    /// How the projections of prompts are computed in fast numerics.
    pub prompts: PromptProducts,
    /// Threads per step; `None` for as many as the affinity mask and the cgroup's processor quota allow.
    pub threads: Option<usize>,
}

/// Most threads: more would not make steps faster on any supported machine.
const MAX_THREADS: usize = 1024;

/// The processor as a device. Its threads serve every model loaded on it, one step at a time, and fair by
/// time.
pub struct CpuBackend {
    caps: Caps,
    tier: Tier,
    kernels: Kernels,
    pool: Arc<SharedPool>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`BackendError::Device`] when the processor lacks the tier, the number of threads is out of range, or
    /// the system refuses a thread.
    pub fn new(config: CpuConfig) -> Result<Self, BackendError> {
        let tier = config.tier.unwrap_or_else(Tier::best);
        if !tier.is_available() {
            let best = Tier::best();
            return Err(BackendError::Device(format!(
                "this processor has no {tier}; its best tier is {best}"
            )));
        }
        let threads = config.threads.unwrap_or_else(machine::threads);
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(BackendError::Device(format!(
                "{threads} threads: choose between 1 and {MAX_THREADS}"
            )));
        }
        let pool = Pool::new(threads).map_err(|error| {
            BackendError::Device(format!("cannot start {threads} threads: {error}; lower --threads"))
        })?;
        let kernels = Kernels::of(tier).chosen_by(config.tiles).with_prompts(config.prompts);
        let caps = Caps {
            kind: DeviceKind::Cpu,
            description: format!("cpu {tier}, {threads} threads{}", kernels.described()),
            memory_bytes: machine::memory_bytes(),
            dtypes: DType::ALL.to_vec(),
            fused: FusedOps::ALL,
            kv_types: KvType::ALL.to_vec(),
            fast_kv_type: tier.fast_kv_type(),
            steps_in_flight: 1,
            rows_are_invariant: true,
            row_buckets: Vec::new(),
            kv_resizes: true,
            adapters: true,
        };
        Ok(Self { caps, tier, kernels, pool: SharedPool::new(pool) })
    }

    /// The tier in use.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// For which numbers of rows projections use tile registers, form by form, such as `Q4 16-64`; `None` on
    /// tiers without them.
    #[must_use]
    pub fn tiles(&self) -> Option<String> {
        (self.tier == Tier::Amx).then(|| self.kernels.tiles.to_string())
    }
}

impl Backend for CpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        Ok(Footprint::of(spec, &self.kernels, self.pool.threads())?.report())
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(CpuModel::load(spec, self.kernels, &self.pool)?))
    }
}
