//! A model on the processor: repacked weights, cache, arena and scratch, and the executables that share them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use trustformers_plan::{
    Activation, BackendError, Executable, Hyper, KV_BLOCK_TOKENS, Limits, LoadProgress, LoadSpec, Loaded,
    MemoryReport, Numerics, Op, Part, Plan, RopeSpec, StepInput, StepOutput, WeightId, WeightUse, Weights,
    rope::RopeTable,
};

use crate::{
    Tier, hazards,
    kernels::{
        Kernels,
        attention::{self, CHUNK_TOKENS, chunk_len},
        encoder,
        quantise::{Bf16Rows, BlockRows, Int8Rows},
    },
    memory::{SharedF32, Store},
    pack::{BLOCK_COLS, Form, GROUP_ROWS, Packed},
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
    /// Biases of projections, filled up to whole groups.
    pub(crate) biases: HashMap<WeightId, Vec<f32>>,
    pub(crate) ropes: Vec<(RopeSpec, RopeTable)>,
    pub(crate) cache: SharedF32,
    pub(crate) arena: SharedF32,
    arena_bytes: usize,
    /// Of the loaded plan's largest answer, for which each executable has room.
    answer_bytes: u64,
    pub(crate) scratch: Scratch,
}

/// Room for intermediate results that are no buffers of the plan.
pub(crate) struct Scratch {
    /// Quantised rows of the whole step.
    pub(crate) quantised: SharedF32,
    /// Normed rows of the whole step, where kernels read them as they are.
    pub(crate) normed: SharedF32,
    /// Partial attention of the few tiles that are split by chunks.
    pub(crate) partials: SharedF32,
    /// Each thread's own: room for projections, a few rows of their input, one tile's partial attention and queries.
    pub(crate) threads: Vec<ThreadScratch>,
}

/// One thread's room.
pub(crate) struct ThreadScratch {
    pub(crate) matmul: SharedF32,
    pub(crate) quantised: SharedF32,
    /// Normed rows.
    pub(crate) normed: SharedF32,
    pub(crate) partials: SharedF32,
    pub(crate) queries: SharedF32,
    /// One head of a sequence in an encoder's attention.
    pub(crate) encoder: SharedF32,
}

/// Columns of the rows that a projection norms.
fn normed_cols(op: &Op) -> Option<usize> {
    match op {
        Op::MatMul { input, norm: Some(_), .. } => Some(input.cols),
        _ => None,
    }
}

impl Scratch {
    fn new(
        plan: &Plan,
        (kernels, numerics): (&Kernels, Numerics),
        matrices: &HashMap<WeightId, Packed>,
        threads: usize,
    ) -> Result<Self, BackendError> {
        let what = "scratch space";
        let hyper = plan.hyper();
        let cols = matrices.values().map(|m| m.blocks() * BLOCK_COLS).max().unwrap_or(0);
        let rounds = numerics == Numerics::Fast
            && kernels.quantise_bf16.is_some()
            && matrices.values().any(|m| m.form == Form::Bf16);
        let words = |rows| {
            let halves = if rounds { Bf16Rows::bytes(rows, cols) } else { 0 };
            (BlockRows::bytes(rows, cols) + Int8Rows::bytes(rows, cols) + halves).div_ceil(size_of::<f32>())
        };
        let normed_cols = plan.ops().iter().filter_map(normed_cols).max().unwrap_or(0);
        let rows = plan.limits().rows.max(plan.limits().logits_rows);
        let shape = trustformers_plan::AttentionShape {
            heads: hyper.heads,
            kv_heads: hyper.kv_heads,
            head_dim: hyper.head_dim,
        };
        let item = hyper.context.div_ceil(CHUNK_TOKENS) * chunk_len(&shape);
        let encoder = if plan.ops().iter().any(|op| matches!(op, Op::EncoderAttention { .. })) {
            encoder::scratch_len(hyper.context.min(plan.limits().rows), hyper.head_dim)
        } else {
            0
        };
        let own = || {
            Ok(ThreadScratch {
                matmul: SharedF32::new(what, kernels.matmul_scratch_len(cols))?,
                quantised: SharedF32::new(what, words(PRIVATE_ROWS))?,
                normed: SharedF32::new(what, PRIVATE_ROWS * normed_cols)?,
                partials: SharedF32::new(what, item)?,
                queries: SharedF32::new(what, attention::TILE * hyper.head_dim)?,
                encoder: SharedF32::new(what, encoder)?,
            })
        };
        Ok(Self {
            quantised: SharedF32::new(what, words(rows))?,
            normed: SharedF32::new(what, rows * normed_cols)?,
            partials: SharedF32::new(what, item * ITEMS_PER_THREAD * threads)?,
            threads: (0..threads).map(|_| own()).collect::<Result<_, BackendError>>()?,
        })
    }

    fn bytes(&self) -> u64 {
        let own = |t: &ThreadScratch| {
            let parts = [&t.matmul, &t.quantised, &t.normed, &t.partials, &t.queries, &t.encoder];
            parts.into_iter().map(SharedF32::bytes).sum::<u64>()
        };
        let shared = [&self.quantised, &self.normed, &self.partials];
        shared.into_iter().map(SharedF32::bytes).sum::<u64>() + self.threads.iter().map(own).sum::<u64>()
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
        let TakenIn { matrices, vectors, biases } = take_in(&weights, plan, numerics, progress)?;
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
        let kernels = Kernels::of(tier);
        let shared = Shared {
            kernels,
            numerics,
            hyper,
            limits: *plan.limits(),
            kv_blocks,
            cache: SharedF32::new("the key/value cache", cache_len)?,
            arena: SharedF32::new("the arena", plan.arena_bytes() / size_of::<f32>())?,
            arena_bytes: plan.arena_bytes(),
            answer_bytes: (plan.answer_len() * size_of::<f32>()) as u64,
            scratch: Scratch::new(plan, (&kernels, numerics), &matrices, threads)?,
            weights,
            matrices,
            vectors,
            biases,
            ropes,
        };
        let model = Self { shared: Arc::new(shared), pool };
        tracing::info!(memory = ?model.memory(), %tier, threads, ?numerics, "model loaded");
        Ok(model)
    }
}

/// A model's weights as the kernels want them.
struct TakenIn {
    matrices: HashMap<WeightId, Packed>,
    vectors: HashMap<WeightId, Vec<f32>>,
    biases: HashMap<WeightId, Vec<f32>>,
}

/// Repacks what projections use and expands what norms use. Embedding tables are read as they are stored.
fn take_in(
    weights: &Weights,
    plan: &Plan,
    numerics: Numerics,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<TakenIn, BackendError> {
    let mut taken = TakenIn { matrices: HashMap::new(), vectors: HashMap::new(), biases: HashMap::new() };
    let mut used: BTreeMap<WeightId, BTreeSet<WeightUse>> = BTreeMap::new();
    for (id, how) in plan.ops().iter().flat_map(Op::weights) {
        used.entry(id).or_default().insert(how);
    }
    let forms = forms(weights, plan, numerics);
    let bytes_of = |(id, form): (&WeightId, &Form)| {
        let weight = weights.get(*id);
        Packed::bytes_of(*form, weight.rows(), weight.cols())
    };
    // One allocation for all matrices, so that it comes in large pages.
    let mut store = Store::new("repacked weights", forms.iter().map(bytes_of).sum())?;
    let total_bytes = used.keys().map(|id| weights.get(*id).bytes().len() as u64).sum();
    let mut done_bytes = 0;
    for (id, uses) in used {
        let weight = weights.get(id);
        if let Some(form) = forms.get(&id) {
            taken.matrices.insert(id, Packed::new(weight, *form, &mut store));
        }
        if uses.contains(&WeightUse::Vector) {
            let mut vector = vec![0.0; weight.cols()];
            weight.dequantise_row(0, &mut vector);
            let mut bias = vector.clone();
            bias.resize(vector.len().next_multiple_of(GROUP_ROWS), 0.0);
            taken.vectors.insert(id, vector);
            taken.biases.insert(id, bias);
        }
        done_bytes += weight.bytes().len() as u64;
        progress(LoadProgress { done_bytes, total_bytes });
    }
    let is_bias = |id: &WeightId| plan.ops().iter().flat_map(parts).any(|part| part.bias == Some(*id));
    taken.biases.retain(|id, _| is_bias(id));
    Ok(taken)
}

/// The form of each matrix. An encoder's floats become eight bits where that is allowed; a gate and what it gates, which one
/// kernel reads side by side, become f32 where their types differ.
fn forms(weights: &Weights, plan: &Plan, numerics: Numerics) -> BTreeMap<WeightId, Form> {
    let rounded = numerics == Numerics::Fast && !plan.uses_cache();
    let form = |id: WeightId| match Form::of(weights.get(id).dtype()) {
        Form::F32 | Form::F16 | Form::Bf16 if rounded => Form::Int8,
        form => form,
    };
    let uses = plan.ops().iter().flat_map(Op::weights);
    let mut forms: BTreeMap<_, _> =
        uses.filter(|(_, how)| *how == WeightUse::Matrix).map(|(id, _)| (id, form(id))).collect();
    for op in plan.ops() {
        if let Op::MatMul { activation: Activation::SiluMul, parts, .. } = op
            && parts.iter().any(|part| form(part.weight) != form(parts[0].weight))
        {
            forms.extend(parts.iter().map(|part| (part.weight, Form::F32)));
        }
    }
    forms
}

/// The parts of a projection.
fn parts(op: &Op) -> &[Part] {
    match op {
        Op::MatMul { parts, .. } => parts,
        _ => &[],
    }
}

impl Shared {
    /// Whether everything that an op reads was taken in, in a form that its kernel can read.
    fn is_ready_for(&self, op: &Op) -> bool {
        let taken = op.weights().iter().all(|(id, how)| match how {
            WeightUse::Matrix => self.matrices.contains_key(id),
            WeightUse::Vector => self.vectors.contains_key(id),
            WeightUse::Rows => true,
        });
        let biased = parts(op).iter().filter_map(|part| part.bias).all(|id| self.biases.contains_key(&id));
        let form = |part: &Part| self.matrices.get(&part.weight).map(|m| m.form);
        match op {
            Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } => {
                self.ropes.iter().any(|(known, _)| known == spec)
            }
            Op::MatMul { activation: Activation::SiluMul, parts, .. } => {
                taken && biased && parts.len() == 2 && form(&parts[0]) == form(&parts[1])
            }
            _ => taken && biased,
        }
    }
}

impl Loaded for CpuModel {
    fn memory(&self) -> MemoryReport {
        let shared = &*self.shared;
        let vectors: usize = shared.vectors.values().chain(shared.biases.values()).map(Vec::len).sum();
        MemoryReport {
            weights_bytes: shared.matrices.values().map(Packed::bytes).sum::<u64>() + vectors as u64 * 4,
            arena_bytes: shared.arena.bytes(),
            kv_bytes: shared.cache.bytes(),
            other_bytes: shared.scratch.bytes()
                + shared.answer_bytes
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
            if !shared.is_ready_for(op) {
                return Err(BackendError::Mismatch("it uses weights that the loaded plan did not"));
            }
        }
        Ok(Box::new(CpuExecutable {
            barriers: hazards::barriers(plan.ops()),
            plan: plan.clone(),
            shared: self.shared.clone(),
            pool: self.pool.clone(),
            row_sequences: Vec::new(),
            answer: StepOutput::with_room_for(plan).values,
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
