//! The size of the KV cache. It grows with need up to its limit, and an idle engine gives back what other
//! models of the device need.
//!
//! The engine starts with blocks for one full context, so that any request can run. Where a step or a new
//! sequence needs more blocks than are free, the cache grows before cached content is evicted and before a
//! sequence is preempted. Where the device refuses, these follow as they would at the limit.

use super::device::{DeviceJob, GenerationDevice};
use std::sync::mpsc::{RecvError, RecvTimeoutError};
use std::time::Duration;
use trustformers_plan::BackendError;

/// Bytes by which a cache grows at least: a model with short sequences grows seldom.
const GROWTH_BYTES: u64 = 4 << 20;

/// How often an idle engine with more than its first blocks looks whether others need memory.
const IDLE_CHECK: Duration = Duration::from_secs(1);

impl GenerationDevice {
    /// Lets the cache grow until `wanted` blocks are free, as far as its limit and the device allow.
    pub(super) fn grow_kv(&mut self, wanted: usize) {
        let (total, free, limit) = (self.pool.total(), self.pool.free(), self.sizes.kv_blocks);
        if free >= wanted || total >= limit {
            return;
        }
        let least =
            usize::try_from(GROWTH_BYTES / self.sizes.kv_block_bytes.max(1)).unwrap_or(usize::MAX).max(1);
        let missing = (wanted - free).max(least);
        // Where there is no memory for the usual growth, there may be for what is needed now.
        for more in [missing, wanted - free] {
            let blocks = total.saturating_add(more).min(limit);
            match self.resize_kv(blocks) {
                Ok(()) => return self.pool.grow(blocks),
                Err(error) => tracing::debug!(%error, blocks, "the KV cache did not grow"),
            }
        }
    }

    /// Gives back what the engine did not start with, if another model was refused memory. Nothing runs.
    pub(super) fn release_kv(&mut self) {
        let first = self.sizes.first_kv_blocks;
        if self.pool.total() <= first || !self.loaded.kv_is_wanted() || !self.pool.shrink(first) {
            return;
        }
        // A smaller cache is never refused.
        if let Err(error) = self.resize_kv(first) {
            tracing::error!(%error, "the KV cache did not shrink");
        }
    }

    /// The next job. An idle engine that could give blocks back looks now and then whether others need them.
    pub(super) fn next_job_when_idle(&mut self) -> Result<DeviceJob, RecvError> {
        loop {
            self.release_kv();
            if self.pool.total() <= self.sizes.first_kv_blocks {
                return self.jobs.recv();
            }
            match self.jobs.recv_timeout(IDLE_CHECK) {
                Ok(job) => return Ok(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
            }
        }
    }

    /// Resizes the caches of the model and of its draft model, which have the same blocks.
    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        let before = self.pool.total();
        self.loaded.resize_kv(blocks)?;
        let Some(proposer) = &mut self.proposer else { return Ok(()) };
        proposer.resize_kv(blocks).inspect_err(|_| {
            if let Err(error) = self.loaded.resize_kv(before) {
                tracing::error!(%error, "the KV cache is larger than its draft model's");
            }
        })
    }
}
