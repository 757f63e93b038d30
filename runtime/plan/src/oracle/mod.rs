//! The scalar oracle: a backend of plain loops that defines the right answers for all others.
//!
//! It has one thread, f32 activations, weights that are dequantised row by row, and sums in f64. Each row of
//! a step is computed by itself, in an order that depends on its own values only, so answers do not depend on
//! the batch. The code is written to be read and is fast enough for tests with small models.

mod adapter;
mod answer;
mod encoder;
mod experts;
mod group;
mod ops;

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use half::{bf16, f16};

use crate::{
    Adapter, AdapterSlot, AdapterTable, Backend, BackendError, Caps, DType, DeviceKind, EstimateSpec,
    Executable, FusedOps, Hyper, KV_BLOCK_TOKENS, KvLayout, KvType, LoadProgress, LoadSpec, Loaded,
    MemoryReport, Op, Plan, RopeSpec, SampleInput, StepInput, StepOutput, Weights, rope::RopeTable,
};

use answer::PendingAnswer;
pub use group::OracleGroup;

/// The backend. It claims no fused op, so plans for it are unfused; it runs fused ones too.
#[derive(Debug)]
pub struct Oracle {
    caps: Caps,
}

impl Oracle {
    /// A new oracle; it needs nothing of the machine.
    #[must_use]
    pub fn new() -> Self {
        Self {
            caps: Caps {
                kind: DeviceKind::Cpu,
                description: "scalar oracle, 1 thread".into(),
                memory_bytes: u64::MAX,
                dtypes: DType::ALL.to_vec(),
                fused: FusedOps::default(),
                kv_types: KvType::ALL.to_vec(),
                fast_kv_type: KvType::F32,
                steps_in_flight: 1,
                rows_are_invariant: true,
                adapters: true,
                row_buckets: Vec::new(),
                kv_resizes: true,
            },
        }
    }
}

impl Default for Oracle {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for Oracle {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        spec.plan.check_one_device(&self.caps.description)?;
        Ok(memory(spec.plan.arena_bytes(), spec.kv_blocks, spec.plan.kv_block_bytes(spec.kv_type)))
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        spec.plan.check_one_device(&self.caps.description)?;
        let hyper = *spec.plan.hyper();
        let cache = KvCache::new(spec.plan, spec.kv_blocks, spec.kv_type)?;
        let arena = zeros("the arena", spec.plan.arena_bytes() / size_of::<f32>())?;
        // Weights are read where they are stored, so the load is complete at once.
        let total_bytes = spec.weights.stored_bytes();
        (spec.progress)(LoadProgress { done_bytes: total_bytes, total_bytes });
        let adapters = AdapterTable::new(spec.plan, &spec.weights);
        Ok(Box::new(OracleModel {
            adapters: Arc::new(Mutex::new(adapters)),
            weights: spec.weights,
            hyper,
            memory: Arc::new(Mutex::new(Memory { arena, cache })),
            kv_room: spec.plan.kv_room(spec.kv_blocks),
            kv_block_bytes: spec.plan.kv_block_bytes(spec.kv_type),
            arena_bytes: spec.plan.arena_bytes(),
        }))
    }
}

/// The memory that a step changes.
struct Memory {
    arena: Vec<f32>,
    cache: KvCache,
}

struct OracleModel {
    adapters: Arc<Mutex<AdapterTable<Adapter>>>,
    weights: Arc<Weights>,
    hyper: Hyper,
    memory: Arc<Mutex<Memory>>,
    /// The most blocks that the cache may have.
    kv_room: usize,
    kv_block_bytes: u64,
    arena_bytes: usize,
}

impl Loaded for OracleModel {
    fn memory(&self) -> MemoryReport {
        let kv_blocks = self.memory.lock().unwrap_or_else(PoisonError::into_inner).cache.blocks;
        let own = memory(self.arena_bytes, kv_blocks, self.kv_block_bytes);
        let weights_bytes = locked(&self.adapters).iter().map(|adapter| adapter.bytes()).sum();
        MemoryReport { weights_bytes, ..own }
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        plan.check_loaded(&self.hyper, self.arena_bytes, &self.weights)?;
        plan.check_cache(&self.memory.lock().unwrap_or_else(PoisonError::into_inner).cache.layout)?;
        locked(&self.adapters).check_plan(plan)?;
        Ok(Box::new(OracleExecutable {
            plan: plan.clone(),
            weights: self.weights.clone(),
            memory: self.memory.clone(),
            ropes: rope_tables(plan, &self.weights),
            adapters: self.adapters.clone(),
            chosen: Vec::new(),
            answer: PendingAnswer::default(),
        }))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        if blocks > self.kv_room {
            return Err(BackendError::Mismatch("more blocks than the plan has room for"));
        }
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.cache = memory.cache.resized(blocks)?;
        Ok(())
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        locked(&self.adapters).put(slot, adapter, |adapter| Ok(adapter.clone())).map(|_| ())
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        Ok(locked(&self.adapters).remove(slot).map(|_| ())?)
    }
}

/// The table, whatever happened to a thread that had it: each change of it is one assignment.
fn locked(table: &Mutex<AdapterTable<Adapter>>) -> MutexGuard<'_, AdapterTable<Adapter>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A table for each rotation of a plan.
fn rope_tables(plan: &Plan, weights: &Weights) -> Vec<(RopeSpec, RopeTable)> {
    let mut tables: Vec<(RopeSpec, RopeTable)> = Vec::new();
    for op in plan.ops() {
        if let Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } = op
            && !tables.iter().any(|(own, _)| own == spec)
        {
            tables.push((*spec, RopeTable::new(spec, weights, plan.hyper().context)));
        }
    }
    tables
}

/// What a model takes: weights are read where they are stored.
fn memory(arena_bytes: usize, kv_blocks: usize, kv_block_bytes: u64) -> MemoryReport {
    MemoryReport {
        weights_bytes: 0,
        arena_bytes: arena_bytes as u64,
        kv_bytes: (kv_blocks as u64).saturating_mul(kv_block_bytes),
        other_bytes: 0,
    }
}

struct OracleExecutable {
    plan: Plan,
    weights: Arc<Weights>,
    memory: Arc<Mutex<Memory>>,
    ropes: Vec<(RopeSpec, RopeTable)>,
    adapters: Arc<Mutex<AdapterTable<Adapter>>>,
    /// The adapter of each sequence of a step.
    chosen: Vec<Option<Arc<Adapter>>>,
    answer: PendingAnswer,
}

impl Executable for OracleExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.answer.is_in_flight() {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        // A step that panicked can have left wrong numbers in the blocks of its own sequences only.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        input.validate(&self.plan, memory.cache.blocks)?;
        locked(&self.adapters).chosen(input, &mut self.chosen)?;
        let ids = self.answer.resolve(input)?;
        let mut step = ops::Step {
            input,
            ids,
            weights: &self.weights,
            ropes: &self.ropes,
            memory: &mut memory,
            adapters: &self.chosen,
        };
        for op in self.plan.ops() {
            step.run(op);
        }
        let out = self.plan.answer();
        let values = step.read(out);
        self.answer.finish(input, values, out.cols);
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.answer.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.answer.wait(output)
    }
}

/// Keys and values, in blocks of [`KV_BLOCK_TOKENS`] positions in some of the layers.
struct KvCache {
    /// `[layer of a block][keys, values][block][slot][kv_heads * head_dim]`
    values: KvValues,
    kv_type: KvType,
    blocks: usize,
    width: usize,
    layout: KvLayout,
}

/// The elements of a cache, in memory of their own size.
enum KvValues {
    Floats(Vec<f32>),
    /// The bits of f16 or bf16.
    Halves(Vec<u16>),
}

impl KvCache {
    fn new(plan: &Plan, blocks: usize, kv_type: KvType) -> Result<Self, BackendError> {
        let width = plan.hyper().kv_heads * plan.hyper().head_dim;
        let none = match kv_type {
            KvType::F32 => KvValues::Floats(Vec::new()),
            KvType::F16 | KvType::Bf16 => KvValues::Halves(Vec::new()),
        };
        let empty = Self { values: none, kv_type, blocks: 0, width, layout: plan.kv_layout().clone() };
        empty.resized(blocks)
    }

    /// A cache of another size with the content of the blocks that both have.
    fn resized(&self, blocks: usize) -> Result<Self, BackendError> {
        let Self { kv_type, width, .. } = *self;
        let len = [self.layout.block_layers(), 2, blocks, KV_BLOCK_TOKENS, width]
            .into_iter()
            .try_fold(1, usize::checked_mul);
        let what = "the key/value cache";
        let len = len.ok_or(BackendError::OutOfMemory { what, needed_bytes: u64::MAX })?;
        let (old_len, new_len) = (self.side_len(), blocks * KV_BLOCK_TOKENS * width);
        let values = match &self.values {
            KvValues::Floats(from) => {
                let mut to: Vec<f32> = zeros(what, len)?;
                copy_sides(from, &mut to, old_len, new_len);
                KvValues::Floats(to)
            }
            KvValues::Halves(from) => {
                let mut to: Vec<u16> = zeros(what, len)?;
                copy_sides(from, &mut to, old_len, new_len);
                KvValues::Halves(to)
            }
        };
        Ok(Self { values, kv_type, blocks, width, layout: self.layout.clone() })
    }

    /// Values of the keys, or of the values, of one layer.
    const fn side_len(&self) -> usize {
        self.blocks * KV_BLOCK_TOKENS * self.width
    }

    /// First index of one position's keys (`side` 0) or values (`side` 1).
    fn index(&self, layer: usize, side: usize, table: &[u32], position: usize) -> usize {
        let block = self.layout.block(layer, table, position) as usize;
        let layer = self.layout.layer(layer).index;
        let row = ((layer * 2 + side) * self.blocks + block) * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS;
        row * self.width
    }

    /// Keys or values of one position.
    fn read(&self, layer: usize, side: usize, table: &[u32], position: usize) -> Cow<'_, [f32]> {
        let start = self.index(layer, side, table, position);
        match &self.values {
            KvValues::Floats(values) => Cow::Borrowed(&values[start..start + self.width]),
            KvValues::Halves(bits) => {
                let bits = bits[start..start + self.width].iter();
                Cow::Owned(match self.kv_type {
                    KvType::F16 => bits.map(|bits| f16::from_bits(*bits).to_f32()).collect(),
                    KvType::F32 | KvType::Bf16 => bits.map(|bits| bf16::from_bits(*bits).to_f32()).collect(),
                })
            }
        }
    }

    /// Writes keys or values whose first index is `start`.
    fn write(&mut self, start: usize, row: &[f32]) {
        let kv_type = self.kv_type;
        match &mut self.values {
            KvValues::Floats(values) => values[start..start + row.len()].copy_from_slice(row),
            KvValues::Halves(bits) => {
                for (bits, v) in bits[start..].iter_mut().zip(row) {
                    let rounded = kv_type.rounded(*v);
                    *bits = match kv_type {
                        KvType::F16 => f16::from_f32(rounded).to_bits(),
                        KvType::F32 | KvType::Bf16 => bf16::from_f32(rounded).to_bits(),
                    };
                }
            }
        }
    }
}

/// Copies the beginning of each side of each layer.
fn copy_sides<T: Copy>(from: &[T], to: &mut [T], old_len: usize, new_len: usize) {
    let both = old_len.min(new_len);
    if both == 0 {
        return;
    }
    for (from, to) in from.chunks_exact(old_len).zip(to.chunks_exact_mut(new_len)) {
        to[..both].copy_from_slice(&from[..both]);
    }
}

fn zeros<T: Clone + Default>(what: &'static str, len: usize) -> Result<Vec<T>, BackendError> {
    let mut values = Vec::new();
    let needed_bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    values.try_reserve_exact(len).map_err(|_| BackendError::OutOfMemory { what, needed_bytes })?;
    values.resize(len, T::default());
    Ok(values)
}
