//! The scalar oracle: a backend of plain loops that defines the right answers for all others.
//!
//! It has one thread, f32 activations, weights that are dequantised row by row, and sums in f64. Each row of
//! a step is computed by itself, in an order that depends on its own values only, so answers do not depend on
//! the batch. The code is written to be read and is fast enough for tests with small models.

mod answer;
mod encoder;
mod group;
mod ops;

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use half::{bf16, f16};

use crate::{
    Backend, BackendError, Caps, DType, DeviceKind, EstimateSpec, Executable, FusedOps, Hyper,
    KV_BLOCK_TOKENS, KvType, LoadProgress, LoadSpec, Loaded, MemoryReport, Op, Plan, RopeSpec, SampleInput,
    StepInput, StepOutput, Weights, rope::RopeTable,
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
        Ok(memory(spec.plan.hyper(), spec.kv_blocks, spec.kv_type, spec.plan.arena_bytes()))
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        spec.plan.check_one_device(&self.caps.description)?;
        let hyper = *spec.plan.hyper();
        let cache = KvCache::new(&hyper, spec.kv_blocks, spec.kv_type)?;
        let arena = zeros("the arena", spec.plan.arena_bytes() / size_of::<f32>())?;
        // Weights are read where they are stored, so the load is complete at once.
        let total_bytes = spec.weights.stored_bytes();
        (spec.progress)(LoadProgress { done_bytes: total_bytes, total_bytes });
        Ok(Box::new(OracleModel {
            weights: spec.weights,
            hyper,
            memory: Arc::new(Mutex::new(Memory { arena, cache })),
            kv_blocks: spec.kv_blocks,
            kv_type: spec.kv_type,
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
    weights: Arc<Weights>,
    hyper: Hyper,
    memory: Arc<Mutex<Memory>>,
    kv_blocks: usize,
    kv_type: KvType,
    arena_bytes: usize,
}

impl Loaded for OracleModel {
    fn memory(&self) -> MemoryReport {
        memory(&self.hyper, self.kv_blocks, self.kv_type, self.arena_bytes)
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        plan.check_loaded(&self.hyper, self.arena_bytes, &self.weights)?;
        Ok(Box::new(OracleExecutable {
            plan: plan.clone(),
            weights: self.weights.clone(),
            memory: self.memory.clone(),
            kv_blocks: self.kv_blocks,
            ropes: rope_tables(plan),
            answer: PendingAnswer::default(),
        }))
    }
}

/// A table for each rotation of a plan.
fn rope_tables(plan: &Plan) -> Vec<(RopeSpec, RopeTable)> {
    let mut tables: Vec<(RopeSpec, RopeTable)> = Vec::new();
    for op in plan.ops() {
        if let Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } = op
            && !tables.iter().any(|(own, _)| own == spec)
        {
            tables.push((*spec, RopeTable::new(spec, plan.hyper().context)));
        }
    }
    tables
}

/// What a model takes: weights are read where they are stored.
fn memory(hyper: &Hyper, kv_blocks: usize, kv_type: KvType, arena_bytes: usize) -> MemoryReport {
    MemoryReport {
        weights_bytes: 0,
        arena_bytes: arena_bytes as u64,
        kv_bytes: (kv_blocks as u64).saturating_mul(kv_type.block_bytes(hyper)),
        other_bytes: 0,
    }
}

struct OracleExecutable {
    plan: Plan,
    weights: Arc<Weights>,
    memory: Arc<Mutex<Memory>>,
    kv_blocks: usize,
    ropes: Vec<(RopeSpec, RopeTable)>,
    answer: PendingAnswer,
}

impl Executable for OracleExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.answer.is_in_flight() {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        input.validate(&self.plan, self.kv_blocks)?;
        let ids = self.answer.resolve(input)?;
        // A step that panicked can have left wrong numbers in the blocks of its own sequences only.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut step =
            ops::Step { input, ids, weights: &self.weights, ropes: &self.ropes, memory: &mut memory };
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

/// Keys and values of every layer, in blocks of [`KV_BLOCK_TOKENS`] positions.
struct KvCache {
    /// `[layer][keys, values][block][slot][kv_heads * head_dim]`
    values: KvValues,
    kv_type: KvType,
    blocks: usize,
    width: usize,
}

/// The elements of a cache, in memory of their own size.
enum KvValues {
    Floats(Vec<f32>),
    /// The bits of f16 or bf16.
    Halves(Vec<u16>),
}

impl KvCache {
    fn new(hyper: &Hyper, blocks: usize, kv_type: KvType) -> Result<Self, BackendError> {
        let width = hyper.kv_heads * hyper.head_dim;
        let len =
            [hyper.layers, 2, blocks, KV_BLOCK_TOKENS, width].into_iter().try_fold(1, usize::checked_mul);
        let what = "the key/value cache";
        let len = len.ok_or(BackendError::OutOfMemory { what, needed_bytes: u64::MAX })?;
        let values = match kv_type {
            KvType::F32 => KvValues::Floats(zeros(what, len)?),
            KvType::F16 | KvType::Bf16 => KvValues::Halves(zeros(what, len)?),
        };
        Ok(Self { values, kv_type, blocks, width })
    }

    /// First index of one position's keys (`side` 0) or values (`side` 1).
    fn index(&self, layer: usize, side: usize, table: &[u32], position: usize) -> usize {
        let block = table[position / KV_BLOCK_TOKENS] as usize;
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

fn zeros<T: Clone + Default>(what: &'static str, len: usize) -> Result<Vec<T>, BackendError> {
    let mut values = Vec::new();
    let needed_bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    values.try_reserve_exact(len).map_err(|_| BackendError::OutOfMemory { what, needed_bytes })?;
    values.resize(len, T::default());
    Ok(values)
}
