//! The paged KV cache's book-keeping: which blocks of 16 tokens belong to whom.
//!
//! A sequence reserves all blocks of its worst case when it is admitted, so a running sequence can never find the
//! cache full. The lowest free block is handed out first: a process that serves few sequences touches little of the
//! memory that it reserved.

use prometheus::IntGauge;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, PoisonError};
use trustformers_plan::KV_BLOCK_TOKENS;

/// Blocks that `tokens` positions take.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_TOKENS)
}

/// All blocks of one engine.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Arc<Mutex<BinaryHeap<Reverse<u32>>>>,
    used: IntGauge,
    total: IntGauge,
    count: usize,
}

impl BlockPool {
    /// A pool of `count` blocks that keeps the two gauges true while it lives.
    pub(crate) fn new(count: usize, used: IntGauge, total: IntGauge) -> Self {
        let ids = 0..u32::try_from(count).unwrap_or(u32::MAX);
        total.add(i64::try_from(count).unwrap_or(i64::MAX));
        Self { free: Arc::new(Mutex::new(ids.map(Reverse).collect())), used, total, count }
    }

    /// Reserves `count` blocks, or none at all when fewer are free.
    pub(crate) fn reserve(&self, count: usize) -> Option<Blocks> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < count {
            return None;
        }
        let ids: Vec<u32> = (0..count).filter_map(|_| free.pop()).map(|Reverse(id)| id).collect();
        self.used.add(i64::try_from(ids.len()).unwrap_or(i64::MAX));
        Some(Blocks { ids, free: Arc::clone(&self.free), used: self.used.clone() })
    }
}

impl Drop for BlockPool {
    fn drop(&mut self) {
        self.total.sub(i64::try_from(self.count).unwrap_or(i64::MAX));
    }
}

/// Blocks of one sequence, in the order of its positions. They return to the pool when this is dropped, on whatever
/// path the sequence ends.
#[derive(Debug)]
pub(crate) struct Blocks {
    ids: Vec<u32>,
    free: Arc<Mutex<BinaryHeap<Reverse<u32>>>>,
    used: IntGauge,
}

impl Blocks {
    /// The block table.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        self.used.sub(i64::try_from(self.ids.len()).unwrap_or(i64::MAX));
        free.extend(self.ids.drain(..).map(Reverse));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(count: usize) -> (BlockPool, IntGauge, IntGauge) {
        let used = IntGauge::new("used", "used").unwrap();
        let total = IntGauge::new("total", "total").unwrap();
        (BlockPool::new(count, used.clone(), total.clone()), used, total)
    }

    #[test]
    fn all_or_nothing_lowest_first_and_all_come_back() {
        let (pool, used, total) = pool(4);
        let first = pool.reserve(3).unwrap();
        assert_eq!(first.ids(), [0, 1, 2]);
        assert!(pool.reserve(2).is_none());
        let second = pool.reserve(1).unwrap();
        assert_eq!((used.get(), total.get()), (4, 4));
        drop(first);
        assert_eq!(pool.reserve(1).unwrap().ids(), [0]);
        drop(second);
        assert_eq!(used.get(), 0);
        drop(pool);
        assert_eq!(total.get(), 0);
    }

    #[test]
    fn a_partial_block_counts_whole() {
        assert_eq!([0, 1, 16, 17].map(blocks_for), [0, 1, 1, 2]);
    }
}
