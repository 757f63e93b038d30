//! A model on the processor: repacked weights, cache, arena and scratch, and the executables that share them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use trustformers_plan::{
    Activation, BackendError, Executable, Hyper, KV_BLOCK_TOKENS, Limits, LoadProgress, LoadSpec, Loaded,
    MemoryReport, Numerics, Op, Plan, RopeSpec, StepInput, StepOutput, WeightId, WeightUse, Weights,
    rope::RopeTable,
};

use crate::{
    Tier, hazards,
    kernels::{
        Kernels,
        attention::{CHUNK_TOKENS, partial_len},
        encoder,
        quantise::QuantBuffer,
    },
    memory::SharedF32,
    pack::{BLOCK_COLS, GROUP_ROWS, Packed},
    pool::Pool,
    step::{ITEMS_PER_THREAD, PRIVATE_ROWS, Step},
};

/// What all executables of a model share.
pub(crate) struct Shared {
    pub(crate) kernels: Kernels,
    pub(crate) numerics: Numerics,
    pub(crate) hyper: Hyper,
    limits: Limits,
    pub(crate) kv_blocks: usize,
    /// As stored, for single rows of the embedding table.
    pub(crate) weights: Arc<Weights>,
    pub(crate) matrices: HashMap<WeightId, Packed>,
    pub(crate) vectors: HashMap<WeightId, Vec<f32>>,
    pub(crate) ropes: Vec<(RopeSpec, RopeTable)>,
    pub(crate) cache: SharedF32,
    pub(crate) arena: SharedF32,
    arena_bytes: usize,
    pub(crate) scratch: Scratch,
}

/// Room for intermediate results that are no buffers of the plan.
pub(crate) struct Scratch {
    /// Quantised rows of the whole step.
    pub(crate) quantised: SharedF32,
    /// Partial attention of the few rows that are split by chunks.
    pub(crate) partials: SharedF32,
    /// Each thread's own: a panel, a few quantised rows, one row's partial attention.
    pub(crate) threads: Vec<ThreadScratch>,
}

/// One thread's room.
pub(crate) struct ThreadScratch {
    pub(crate) panel: SharedF32,
    pub(crate) quantised: SharedF32,
    pub(crate) partials: SharedF32,
    /// One head of a sequence in an encoder's attention.
    pub(crate) encoder: SharedF32,
}

impl Scratch {
    fn new(plan: &Plan, matrices: &HashMap<WeightId, Packed>, threads: usize) -> Result<Self, BackendError> {
        let what = "scratch space";
        let hyper = plan.hyper();
        let cols = matrices.values().map(|m| m.blocks() * BLOCK_COLS).max().unwrap_or(0);
        let words = |rows| QuantBuffer::bytes(rows, cols).div_ceil(size_of::<f32>());
        let shape = trustformers_plan::AttentionShape {
            heads: hyper.heads,
            kv_heads: hyper.kv_heads,
            head_dim: hyper.head_dim,
        };
        let item = hyper.heads / hyper.kv_heads * hyper.context.div_ceil(CHUNK_TOKENS) * partial_len(&shape);
        let encoder = if plan.ops().iter().any(|op| matches!(op, Op::EncoderAttention { .. })) {
            encoder::scratch_len(hyper.context.min(plan.limits().rows), hyper.head_dim)
        } else {
            0
        };
        let own = || {
            Ok(ThreadScratch {
                panel: SharedF32::new(what, cols * GROUP_ROWS)?,
                quantised: SharedF32::new(what, words(PRIVATE_ROWS))?,
                partials: SharedF32::new(what, item)?,
                encoder: SharedF32::new(what, encoder)?,
            })
        };
        Ok(Self {
            quantised: SharedF32::new(what, words(plan.limits().rows.max(plan.limits().logits_rows)))?,
            partials: SharedF32::new(what, item * ITEMS_PER_THREAD * threads)?,
            threads: (0..threads).map(|_| own()).collect::<Result<_, BackendError>>()?,
        })
    }

    fn bytes(&self) -> u64 {
        let own = |t: &ThreadScratch| {
            t.panel.bytes() + t.quantised.bytes() + t.partials.bytes() + t.encoder.bytes()
        };
        self.quantised.bytes() + self.partials.bytes() + self.threads.iter().map(own).sum::<u64>()
    }
}

/// A loaded model.
pub(crate) struct CpuModel {
    shared: Arc<Shared>,
    pool: Arc<Mutex<Pool>>,
}

impl CpuModel {
    pub(crate) fn load(spec: LoadSpec<'_>, tier: Tier, pool: Arc<Mutex<Pool>>) -> Result<Self, BackendError> {
        let LoadSpec { weights, plan, kv_blocks, numerics, progress } = spec;
        let hyper = *plan.hyper();
        let threads = pool.lock().unwrap_or_else(PoisonError::into_inner).threads();
        let (matrices, vectors) = take_in(&weights, plan, progress)?;
        let mut ropes: Vec<(RopeSpec, RopeTable)> = Vec::new();
        for op in plan.ops() {
            if let Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } = op
                && !ropes.iter().any(|(known, _)| known == spec)
            {
                ropes.push((*spec, RopeTable::new(spec, hyper.context)));
            }
        }
        let cache_len = [hyper.layers, 2, KV_BLOCK_TOKENS, hyper.kv_heads, hyper.head_dim, kv_blocks]
            .into_iter()
            .try_fold(1usize, usize::checked_mul)
            .ok_or(BackendError::OutOfMemory { what: "the key/value cache", needed_bytes: u64::MAX })?;
        let shared = Shared {
            kernels: Kernels::of(tier),
            numerics,
            hyper,
            limits: *plan.limits(),
            kv_blocks,
            cache: SharedF32::new("the key/value cache", cache_len)?,
            arena: SharedF32::new("the arena", plan.arena_bytes() / size_of::<f32>())?,
            arena_bytes: plan.arena_bytes(),
            scratch: Scratch::new(plan, &matrices, threads)?,
            weights,
            matrices,
            vectors,
            ropes,
        };
        let model = Self { shared: Arc::new(shared), pool };
        tracing::info!(memory = ?model.memory(), %tier, threads, ?numerics, "model loaded");
        Ok(model)
    }
}

type TakenIn = (HashMap<WeightId, Packed>, HashMap<WeightId, Vec<f32>>);

/// Repacks what projections use and expands what norms use. Embedding tables are read as they are stored.
fn take_in(
    weights: &Weights,
    plan: &Plan,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<TakenIn, BackendError> {
    let (mut matrices, mut vectors) = (HashMap::new(), HashMap::new());
    let mut used: BTreeMap<WeightId, BTreeSet<WeightUse>> = BTreeMap::new();
    for (id, how) in plan.ops().iter().flat_map(Op::weights) {
        used.entry(id).or_default().insert(how);
    }
    let total_bytes = used.keys().map(|id| weights.get(*id).bytes().len() as u64).sum();
    let mut done_bytes = 0;
    for (id, uses) in used {
        let weight = weights.get(id);
        if uses.contains(&WeightUse::Matrix) {
            matrices.insert(id, Packed::new(weight)?);
        }
        if uses.contains(&WeightUse::Vector) {
            let mut vector = vec![0.0; weight.cols()];
            weight.dequantise_row(0, &mut vector);
            vectors.insert(id, vector);
        }
        done_bytes += weight.bytes().len() as u64;
        progress(LoadProgress { done_bytes, total_bytes });
    }
    Ok((matrices, vectors))
}

/// Forms of projections that this backend does not claim.
fn refuse_unclaimed(op: &Op) -> Result<(), BackendError> {
    let Op::MatMul { norm, parts, activation, .. } = op else { return Ok(()) };
    let claimed =
        norm.is_none() && *activation == Activation::None && parts.iter().all(|part| part.bias.is_none());
    if claimed {
        return Ok(());
    }
    let what = "a projection with a norm, a bias or an activation of its own; make the plan with the device's fused ops";
    Err(BackendError::Unsupported { device: "cpu".into(), what: what.into() })
}

impl Loaded for CpuModel {
    fn memory(&self) -> MemoryReport {
        let shared = &*self.shared;
        let vectors: usize = shared.vectors.values().map(Vec::len).sum();
        MemoryReport {
            weights_bytes: shared.matrices.values().map(Packed::bytes).sum::<u64>() + vectors as u64 * 4,
            arena_bytes: shared.arena.bytes(),
            kv_bytes: shared.cache.bytes(),
            other_bytes: shared.scratch.bytes()
                + shared.ropes.iter().map(|(_, table)| table.bytes()).sum::<u64>(),
        }
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let shared = &*self.shared;
        plan.check_loaded(&shared.hyper, shared.arena_bytes, &shared.weights)?;
        let (limits, loaded) = (plan.limits(), &shared.limits);
        if limits.rows > loaded.rows
            || limits.logits_rows > loaded.logits_rows
            || limits.sequences > loaded.sequences
        {
            return Err(BackendError::Mismatch("it has larger steps: load with the largest plan"));
        }
        for op in plan.ops() {
            let ready = op.weights().iter().all(|(id, how)| match how {
                WeightUse::Matrix => shared.matrices.contains_key(id),
                WeightUse::Vector => shared.vectors.contains_key(id),
                WeightUse::Rows => true,
            });
            let turns = match op {
                Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } => {
                    shared.ropes.iter().any(|(known, _)| known == spec)
                }
                _ => true,
            };
            if !ready || !turns {
                return Err(BackendError::Mismatch("it uses weights that the loaded plan did not"));
            }
            refuse_unclaimed(op)?;
        }
        Ok(Box::new(CpuExecutable {
            barriers: hazards::barriers(plan.ops()),
            plan: plan.clone(),
            shared: self.shared.clone(),
            pool: self.pool.clone(),
            row_sequences: Vec::new(),
            answer: Vec::new(),
            finished: false,
        }))
    }
}

/// A plan that runs on the pool. The pool's lock is held for a whole step, which is what lets executables share memory.
struct CpuExecutable {
    plan: Plan,
    barriers: Vec<bool>,
    shared: Arc<Shared>,
    pool: Arc<Mutex<Pool>>,
    row_sequences: Vec<u32>,
    answer: Vec<f32>,
    finished: bool,
}

impl Executable for CpuExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.finished {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        input.validate(&self.plan, self.shared.kv_blocks)?;
        self.row_sequences.clear();
        for sequence in 0..input.sequences() {
            self.row_sequences.extend(input.rows_of(sequence).map(|_| sequence as u32));
        }
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let step = Step {
            shared: &self.shared,
            plan: &self.plan,
            barriers: &self.barriers,
            input,
            row_sequences: &self.row_sequences,
            threads: pool.threads(),
        };
        pool.run(&|number, barrier| step.run(number, barrier))
            .map_err(|_| BackendError::Device("a kernel panicked; its message is in the log".into()))?;
        self.answer.clear();
        step.read_answer(&mut self.answer);
        self.finished = true;
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        if !std::mem::take(&mut self.finished) {
            return Err(BackendError::Order("wait without submit"));
        }
        output.width = self.plan.answer().cols;
        // The caller's old buffer becomes the next step's.
        std::mem::swap(&mut self.answer, &mut output.values);
        Ok(())
    }
}
