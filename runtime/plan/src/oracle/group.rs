//! Several oracles as the devices of a group: each runs its share, and sums over devices are made between
//! ops.

use std::sync::Arc;

use super::{KvCache, Memory, answer::PendingAnswer, memory, ops::Step, rope_tables, zeros};
use crate::{
    BackendError, Buf, Executable, KvType, MemoryReport, Op, Plan, RopeSpec, SampleInput, StepInput,
    StepOutput, Weights, rope::RopeTable, shard::Shard,
};

/// A divided model on as many oracles as it has shards.
pub struct OracleGroup {
    devices: Vec<Device>,
    kv_blocks: usize,
    kv_type: KvType,
    answer: PendingAnswer,
}

struct Device {
    plan: Plan,
    weights: Arc<Weights>,
    memory: Memory,
    ropes: Vec<(RopeSpec, RopeTable)>,
}

impl OracleGroup {
    /// Loads each shard on a device with a cache of `kv_blocks` blocks.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] where a cache or an arena cannot be allocated, and
    /// [`BackendError::Mismatch`] for shards of different plans, or for none.
    pub fn load(shards: &[Shard], kv_blocks: usize, kv_type: KvType) -> Result<Self, BackendError> {
        let is_one_plan = shards.first().is_some_and(|first| shards.iter().all(|s| s.plan == first.plan));
        if !is_one_plan {
            return Err(BackendError::Mismatch("the devices of a group run one plan"));
        }
        let load = |Shard { plan, weights }: &Shard| {
            let cache = KvCache::new(plan, kv_blocks, kv_type)?;
            let arena = zeros("the arena", plan.arena_bytes() / size_of::<f32>())?;
            let ropes = rope_tables(plan, weights);
            Ok(Device {
                plan: plan.clone(),
                weights: weights.clone(),
                memory: Memory { arena, cache },
                ropes,
            })
        };
        let devices = shards.iter().map(load).collect::<Result<_, BackendError>>()?;
        Ok(Self { devices, kv_blocks, kv_type, answer: PendingAnswer::default() })
    }

    /// What each device takes.
    #[must_use]
    pub fn memory(&self) -> Vec<MemoryReport> {
        let of = |device: &Device| {
            let block_bytes = device.plan.kv_block_bytes(self.kv_type);
            memory(device.plan.arena_bytes(), self.kv_blocks, block_bytes)
        };
        self.devices.iter().map(of).collect()
    }

    /// Adds up what the devices have in a buffer; all of them receive the sum.
    fn all_reduce(&mut self, input: &StepInput, ids: &[u32], data: Buf) {
        let mut sums: Vec<Vec<f64>> = Vec::new();
        for device in &mut self.devices {
            let rows = device.step(input, ids).all_rows(data);
            sums.resize_with(rows.len(), || vec![0.0; data.cols]);
            for (sum, value) in sums.iter_mut().flatten().zip(rows.iter().flatten()) {
                *sum += f64::from(*value);
            }
        }
        for device in &mut self.devices {
            let mut step = device.step(input, ids);
            for (r, row) in sums.iter().enumerate() {
                let row: Vec<f32> = row.iter().map(|sum| *sum as f32).collect();
                step.store(data, r, &row);
            }
        }
    }
}

impl Device {
    fn step<'a>(&'a mut self, input: &'a StepInput, ids: &'a [u32]) -> Step<'a> {
        // A divided plan has no room for adapters.
        let (weights, ropes, memory) = (&self.weights, &self.ropes, &mut self.memory);
        Step { input, ids, weights, ropes, memory, adapters: &[] }
    }
}

impl Executable for OracleGroup {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.answer.is_in_flight() {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        let plan = self.devices[0].plan.clone();
        input.validate(&plan, self.kv_blocks)?;
        let ids = self.answer.resolve(input)?.to_vec();
        for op in plan.ops() {
            if let Op::AllReduce { data } = op {
                self.all_reduce(input, &ids, *data);
            } else {
                self.devices.iter_mut().for_each(|device| device.step(input, &ids).run(op));
            }
        }
        let values = self.devices[0].step(input, &ids).read(plan.answer());
        self.answer.finish(input, values, plan.answer().cols);
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.answer.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.answer.wait(output)
    }
}
