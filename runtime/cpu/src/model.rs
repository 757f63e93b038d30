//! A model on the processor: repacked weights, cache, arena and scratch space, which its executables share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
};

use trustformers_plan::{
    Activation, Adapter, AdapterSlot, AdapterTable, BackendError, Executable, Hyper, KvLayout, KvType,
    Limits, LoadProgress, LoadSpec, Loaded, MemoryReport, Numerics, Op, Plan, RopeSpec, Segment, Weight,
    WeightId, WeightUse, Weights, rope::RopeTable,
};

use crate::{
    adapter::CpuAdapter,
    executable::CpuExecutable,
    footprint::{Footprint, ScratchSizes, segments},
    kernels::Kernels,
    kv_memory::KvMemory,
    memory::{SharedF32, Store},
    pack::{GROUP_ROWS, Packed},
    pool::share,
    shared_pool::{PoolClient, SharedPool},
};

/// What all executables of a model share.
pub(crate) struct ModelState {
    pub(crate) kernels: Kernels,
    pub(crate) numerics: Numerics,
    pub(crate) hyper: Hyper,
    limits: Limits,
    pub(crate) kv_type: KvType,
    pub(crate) kv_layout: KvLayout,
    /// As stored, for single rows of the embedding table.
    pub(crate) weights: Arc<Weights>,
    pub(crate) matrices: HashMap<WeightId, Packed>,
    pub(crate) vectors: HashMap<WeightId, Vec<f32>>,
    /// Biases of projections, filled up to whole groups.
    pub(crate) biases: HashMap<WeightId, Vec<f32>>,
    pub(crate) ropes: Vec<(RopeSpec, RopeTable)>,
    pub(crate) cache: KvMemory,
    pub(crate) arena: SharedF32,
    arena_bytes: usize,
    /// Steps that any executable of the model has begun: each overwrites the arena.
    pub(crate) steps: AtomicU64,
    /// Bytes that an executable takes to choose tokens.
    sampling_bytes: u64,
    pub(crate) scratch: Scratch,
    adapters: Mutex<AdapterTable<CpuAdapter>>,
}

/// Memory for intermediate results that are no buffers of the plan.
pub(crate) struct Scratch {
    /// Quantised rows of the whole step.
    pub(crate) quantised: SharedF32,
    /// Normed rows of the whole step, for kernels that read floats.
    pub(crate) normed: SharedF32,
    /// Partial attention of the few tiles that are split by chunks.
    pub(crate) partials: SharedF32,
    /// The first products of adapters: rows × segments × rank.
    pub(crate) low_rank: SharedF32,
    pub(crate) threads: Vec<ThreadScratch>,
}

/// The scratch memory of one thread.
pub(crate) struct ThreadScratch {
    pub(crate) matmul: SharedF32,
    /// Quantised rows of a step of few rows.
    pub(crate) quantised: SharedF32,
    /// Normed rows of a step of few rows.
    pub(crate) normed: SharedF32,
    /// Partial attention of one tile.
    pub(crate) partials: SharedF32,
    /// Queries of one tile.
    pub(crate) queries: SharedF32,
    /// The same, rotated, before they are laid out for the kernel.
    pub(crate) rotated: SharedF32,
    /// One head of a sequence in an encoder's attention.
    pub(crate) encoder: SharedF32,
}

impl Scratch {
    fn new(sizes: &ScratchSizes) -> Result<Self, BackendError> {
        let memory = |len| SharedF32::new("scratch space", len);
        let own = || {
            let sizes = &sizes.thread;
            Ok(ThreadScratch {
                matmul: memory(sizes.matmul)?,
                quantised: memory(sizes.quantised)?,
                normed: memory(sizes.normed)?,
                partials: memory(sizes.partials)?,
                queries: memory(sizes.queries)?,
                rotated: memory(sizes.queries)?,
                encoder: memory(sizes.encoder)?,
            })
        };
        Ok(Self {
            quantised: memory(sizes.quantised)?,
            normed: memory(sizes.normed)?,
            partials: memory(sizes.partials)?,
            low_rank: memory(sizes.low_rank)?,
            threads: (0..sizes.threads).map(|_| own()).collect::<Result<_, BackendError>>()?,
        })
    }

    fn bytes(&self) -> u64 {
        let own = |t: &ThreadScratch| {
            let ThreadScratch { matmul, quantised, normed, partials, queries, rotated, encoder } = t;
            let memories = [matmul, quantised, normed, partials, queries, rotated, encoder];
            memories.into_iter().map(SharedF32::bytes).sum::<u64>()
        };
        let shared = [&self.quantised, &self.normed, &self.partials, &self.low_rank];
        shared.into_iter().map(SharedF32::bytes).sum::<u64>() + self.threads.iter().map(own).sum::<u64>()
    }
}

/// A loaded model.
pub(crate) struct CpuModel {
    shared: Arc<ModelState>,
    pool: Arc<PoolClient>,
}

impl CpuModel {
    pub(crate) fn load(
        spec: LoadSpec<'_>,
        kernels: Kernels,
        shared_pool: &Arc<SharedPool>,
    ) -> Result<Self, BackendError> {
        // Its own client: the time of the load does not count against the steps.
        let pool = PoolClient::new(shared_pool.clone());
        let threads = pool.threads();
        let footprint = Footprint::of(&spec.estimate_spec(), &kernels, threads)?;
        let LoadSpec { weights, plan, kv_blocks, kv_type, numerics, progress } = spec;
        let hyper = *plan.hyper();
        let Repacked { matrices, vectors, biases } = repack(&weights, &footprint, &pool, progress)?;
        let rope_table = |spec: &RopeSpec| (*spec, RopeTable::new(spec, &weights, hyper.context));
        let ropes = footprint.ropes.iter().map(rope_table).collect();
        let shared = ModelState {
            kernels,
            numerics,
            hyper,
            limits: *plan.limits(),
            kv_type,
            kv_layout: plan.kv_layout().clone(),
            cache: KvMemory::new(footprint.cache, kv_blocks)?,
            arena: SharedF32::new("the arena", footprint.arena_len)?,
            arena_bytes: plan.arena_bytes(),
            steps: AtomicU64::new(0),
            sampling_bytes: footprint.sampling_bytes,
            scratch: Scratch::new(&footprint.scratch)?,
            adapters: Mutex::new(AdapterTable::new(plan, &weights)),
            weights,
            matrices,
            vectors,
            biases,
            ropes,
        };
        on_all_threads(&pool, |number, threads| shared.cache.touch(threads, number))?;
        let model = Self { shared: Arc::new(shared), pool: PoolClient::new(shared_pool.clone()) };
        tracing::info!(memory = ?model.memory(), %kv_type, threads, ?numerics, "model loaded");
        Ok(model)
    }
}

/// A model's weights in the layouts of the kernels.
struct Repacked {
    matrices: HashMap<WeightId, Packed>,
    vectors: HashMap<WeightId, Vec<f32>>,
    biases: HashMap<WeightId, Vec<f32>>,
}

/// Repacks the matrices of projections and expands vectors to f32. Embedding tables are read as they are
/// stored.
fn repack(
    weights: &Weights,
    footprint: &Footprint,
    pool: &PoolClient,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Repacked, BackendError> {
    let mut repacked = Repacked { matrices: HashMap::new(), vectors: HashMap::new(), biases: HashMap::new() };
    // One allocation for all matrices, so that it can use large pages.
    let mut store = Store::new("repacked weights", footprint.packed_bytes)?;
    let total_bytes = footprint.uses.keys().map(|id| weights.get(*id).stored_bytes()).sum();
    let mut done_bytes = 0;
    for (&id, uses) in &footprint.uses {
        let weight = weights.get(id);
        if let Some(form) = footprint.forms.get(&id) {
            let packed = Packed::empty(*form, weight, &mut store);
            fill(&packed, weight, pool)?;
            repacked.matrices.insert(id, packed);
        }
        if uses.contains(&WeightUse::Vector) {
            let mut vector = vec![0.0; weight.cols()];
            weight.dequantise_row(0, &mut vector);
            if footprint.biases.contains(&id) {
                let mut bias = vec![0.0; vector.len().next_multiple_of(GROUP_ROWS)];
                bias[..vector.len()].copy_from_slice(&vector);
                repacked.biases.insert(id, bias);
            }
            repacked.vectors.insert(id, vector);
        }
        done_bytes += weight.stored_bytes();
        progress(LoadProgress { done_bytes, total_bytes });
    }
    Ok(repacked)
}

/// Repacks a matrix on all threads.
fn fill(packed: &Packed, weight: &Weight, pool: &PoolClient) -> Result<(), BackendError> {
    on_all_threads(pool, |number, threads| {
        // SAFETY: the matrix is new, and the threads' shares of its groups are disjoint.
        unsafe { packed.fill(share(packed.groups(), threads, number), weight) };
    })
}

/// Calls `job` on each thread of the pool with its number and the number of threads. The pool is free for
/// steps of other models between two calls.
fn on_all_threads(pool: &PoolClient, job: impl Fn(usize, usize) + Sync) -> Result<(), BackendError> {
    let mut pool = pool.acquire();
    let threads = pool.threads();
    let run = pool.run(&|number, _| {
        job(number, threads);
        Ok(())
    });
    run.map_err(|_| BackendError::Device("a thread panicked while loading; its message is in the log".into()))
}

impl ModelState {
    /// The adapters of the model. A thread that panicked while it had them left them as they were: each
    /// change is one assignment.
    pub(crate) fn adapters(&self) -> MutexGuard<'_, AdapterTable<CpuAdapter>> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all weights that an op reads were loaded, in a form that its kernel can read.
    fn is_ready_for(&self, op: &Op) -> bool {
        let loaded = op.weights().iter().all(|(id, how)| match how {
            WeightUse::Matrix => self.matrices.contains_key(id),
            WeightUse::Vector => self.vectors.contains_key(id),
            WeightUse::Rows => true,
        });
        let biased =
            segments(op).iter().filter_map(|segment| segment.bias).all(|id| self.biases.contains_key(&id));
        let form = |segment: &Segment| self.matrices.get(&segment.weight).map(|m| m.form);
        match op {
            Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } => {
                self.ropes.iter().any(|(loaded, _)| loaded == spec)
            }
            Op::MatMul { activation: Activation::SiluMul, segments, .. } => {
                loaded && biased && segments.len() == 2 && form(&segments[0]) == form(&segments[1])
            }
            _ => loaded && biased,
        }
    }
}

impl Loaded for CpuModel {
    fn memory(&self) -> MemoryReport {
        let shared = &*self.shared;
        let vectors: usize = shared.vectors.values().chain(shared.biases.values()).map(Vec::len).sum();
        MemoryReport {
            weights_bytes: shared.matrices.values().map(Packed::bytes).sum::<u64>()
                + vectors as u64 * 4
                + shared.adapters().iter().map(|adapter| adapter.bytes()).sum::<u64>(),
            arena_bytes: shared.arena.bytes(),
            kv_bytes: shared.cache.bytes(),
            other_bytes: shared.scratch.bytes()
                + shared.sampling_bytes
                + shared.ropes.iter().map(|(_, table)| table.bytes()).sum::<u64>(),
        }
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let shared = &*self.shared;
        plan.check_loaded(&shared.hyper, shared.arena_bytes, &shared.weights)?;
        plan.check_cache(&shared.kv_layout)?;
        shared.adapters().check_plan(plan)?;
        let (limits, loaded) = (plan.limits(), &shared.limits);
        if limits.rows > loaded.rows
            || limits.logits_rows > loaded.logits_rows
            || limits.sequences > loaded.sequences
        {
            return Err(BackendError::Mismatch("it has larger steps: load with the largest plan"));
        }
        for op in plan.ops() {
            if !shared.is_ready_for(op) {
                return Err(BackendError::Mismatch("it uses weights that the loaded plan did not"));
            }
        }
        Ok(Box::new(CpuExecutable::new(plan.clone(), self.shared.clone(), self.pool.clone())))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        // With the pool no step runs.
        let _pool = self.pool.acquire();
        self.shared.cache.resize(blocks)
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        let bytes = self.shared.adapters().put(slot, adapter, CpuAdapter::new)?.bytes();
        tracing::info!(%slot, adapter = adapter.name, bytes, "adapter put");
        Ok(())
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        let bytes = self.shared.adapters().remove(slot)?.bytes();
        tracing::info!(%slot, bytes, "adapter dropped");
        Ok(())
    }
}
