//! The scalar oracle: a backend of plain loops that defines the right answers for all others.
//!
//! It has one thread, f32 activations, weights that are dequantised row by row, and sums in f64. Each row of
//! a step is computed by itself, in an order that depends on its own values only, so answers do not depend on
//! the batch. The code is written to be read and is fast enough for tests with small models.

mod encoder;
mod ops;

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    Backend, BackendError, Caps, DType, DeviceKind, EstimateSpec, Executable, FusedOps, Hyper,
    KV_BLOCK_TOKENS, LoadProgress, LoadSpec, Loaded, MemoryReport, Op, Plan, RopeSpec, StepInput, StepOutput,
    Weights, rope::RopeTable,
};

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
                kv_element_bytes: size_of::<f32>(),
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
        Ok(memory(&self.caps, spec.plan.hyper(), spec.kv_blocks, spec.plan.arena_bytes()))
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let hyper = *spec.plan.hyper();
        let cache = KvCache::new(&hyper, spec.kv_blocks)?;
        let arena = zeros("the arena", spec.plan.arena_bytes() / size_of::<f32>())?;
        // Weights are read where they are stored, so the load is complete at once.
        let total_bytes = spec.weights.stored_bytes();
        (spec.progress)(LoadProgress { done_bytes: total_bytes, total_bytes });
        Ok(Box::new(OracleModel {
            weights: spec.weights,
            hyper,
            memory: Arc::new(Mutex::new(Memory { arena, cache })),
            kv_blocks: spec.kv_blocks,
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
    arena_bytes: usize,
}

impl Loaded for OracleModel {
    fn memory(&self) -> MemoryReport {
        memory(&Oracle::new().caps, &self.hyper, self.kv_blocks, self.arena_bytes)
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        plan.check_loaded(&self.hyper, self.arena_bytes, &self.weights)?;
        let mut ropes: Vec<(RopeSpec, RopeTable)> = Vec::new();
        for op in plan.ops() {
            if let Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } = op
                && !ropes.iter().any(|(own, _)| own == spec)
            {
                ropes.push((*spec, RopeTable::new(spec, self.hyper.context)));
            }
        }
        Ok(Box::new(OracleExecutable {
            plan: plan.clone(),
            weights: self.weights.clone(),
            memory: self.memory.clone(),
            kv_blocks: self.kv_blocks,
            ropes,
            finished: None,
        }))
    }
}

/// What a model takes: weights are read where they are stored.
fn memory(caps: &Caps, hyper: &Hyper, kv_blocks: usize, arena_bytes: usize) -> MemoryReport {
    MemoryReport {
        weights_bytes: 0,
        arena_bytes: arena_bytes as u64,
        kv_bytes: (kv_blocks as u64).saturating_mul(caps.kv_block_bytes(hyper)),
        other_bytes: 0,
    }
}

struct OracleExecutable {
    plan: Plan,
    weights: Arc<Weights>,
    memory: Arc<Mutex<Memory>>,
    kv_blocks: usize,
    ropes: Vec<(RopeSpec, RopeTable)>,
    finished: Option<Vec<f32>>,
}

impl Executable for OracleExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.finished.is_some() {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        input.validate(&self.plan, self.kv_blocks)?;
        // A step that panicked can have left wrong numbers in the blocks of its own sequences only.
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut step = ops::Step { input, weights: &self.weights, ropes: &self.ropes, memory: &mut memory };
        for op in self.plan.ops() {
            step.run(op);
        }
        self.finished = Some(step.read(self.plan.answer()));
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        output.values = self.finished.take().ok_or(BackendError::Order("wait without submit"))?;
        output.width = self.plan.answer().cols;
        Ok(())
    }
}

/// Keys and values of every layer, in blocks of [`KV_BLOCK_TOKENS`] positions.
struct KvCache {
    /// `[layer][keys, values][block][slot][kv_heads * head_dim]`
    values: Vec<f32>,
    blocks: usize,
    width: usize,
}

impl KvCache {
    fn new(hyper: &Hyper, blocks: usize) -> Result<Self, BackendError> {
        let width = hyper.kv_heads * hyper.head_dim;
        let values = zeros("the key/value cache", hyper.layers * 2 * blocks * KV_BLOCK_TOKENS * width)?;
        Ok(Self { values, blocks, width })
    }

    /// First index of one position's keys (`side` 0) or values (`side` 1).
    fn index(&self, layer: usize, side: usize, table: &[u32], position: usize) -> usize {
        let block = table[position / KV_BLOCK_TOKENS] as usize;
        let row = ((layer * 2 + side) * self.blocks + block) * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS;
        row * self.width
    }

    fn slice(&self, layer: usize, side: usize, table: &[u32], position: usize) -> &[f32] {
        let start = self.index(layer, side, table, position);
        &self.values[start..start + self.width]
    }
}

fn zeros(what: &'static str, len: usize) -> Result<Vec<f32>, BackendError> {
    let mut values = Vec::new();
    let needed_bytes = (len as u64).saturating_mul(size_of::<f32>() as u64);
    values.try_reserve_exact(len).map_err(|_| BackendError::OutOfMemory { what, needed_bytes })?;
    values.resize(len, 0.0);
    Ok(values)
}
