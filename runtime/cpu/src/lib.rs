//! CPU backend: run-time dispatch over SIMD tiers.
//!
//! Decoding reads every weight once per step, so its speed is the memory's: weights are repacked at load into one
//! forward stream per thread ([`pack`]), and the kernels ([`kernels`]) only have to keep up. A step is one pass of all
//! threads over the plan ([`step`]), each on its static share, meeting at barriers where an op reads what another wrote
//! ([`hazards`]).
//!
//! In [`Numerics::Exact`](trustformers_plan::Numerics) activations stay f32 and every row is summed in an order that
//! depends on the tier alone. In `Fast` they are quantised to 8 bits per 32 columns where the weights are quantised too, and
//! rounded to bf16 where the weights are bf16 and the processor multiplies it.

#[cfg(target_arch = "x86_64")]
mod amx;
mod hazards;
mod kernels;
mod machine;
mod memory;
mod model;
mod pack;
mod pool;
mod step;
mod tier;

use std::sync::{Arc, Mutex};

use trustformers_plan::{Backend, BackendError, Caps, DType, DeviceKind, FusedOps, LoadSpec, Loaded};

use crate::{model::CpuModel, pool::Pool};
pub use tier::Tier;

/// How to use the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// Kernels to use; the fastest that the processor has where none is named.
    pub tier: Option<Tier>,
    /// Threads per step; where none are named, as many as affinity and the cgroup's processor quota allow.
    pub threads: Option<usize>,
}

/// Threads that no step can use well: more than any machine this was written for has.
const MAX_THREADS: usize = 1024;

/// The processor as a device. Its threads serve every model loaded on it, one step at a time.
pub struct CpuBackend {
    caps: Caps,
    tier: Tier,
    pool: Arc<Mutex<Pool>>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`BackendError::Device`] when the processor lacks a named tier, the number of threads makes no sense, or the
    /// system refuses a thread.
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
        let caps = Caps {
            kind: DeviceKind::Cpu,
            description: format!("cpu {tier}, {threads} threads"),
            memory_bytes: machine::memory_bytes(),
            dtypes: DType::ALL.to_vec(),
            fused: FusedOps::ALL,
            kv_element_bytes: size_of::<f32>(),
        };
        Ok(Self { caps, tier, pool: Arc::new(Mutex::new(pool)) })
    }

    /// The tier in use.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.tier
    }
}

impl Backend for CpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(CpuModel::load(spec, self.tier, self.pool.clone())?))
    }
}
