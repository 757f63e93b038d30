//! The prefix cache: the bookkeeping of the paged KV cache. It says which blocks of 16 tokens each sequence
//! uses, and which content can be reused.
//!
//! A sequence allocates blocks as it grows. A full block is *cached*: it is registered under its tokens and
//! the cached block before it, so that two sequences with the same prefix share the blocks of that prefix.
//! The key is the whole content (tokens, and the number of the block before, which is never reused), not a
//! hash of it: a match is equal, not merely likely to be.
//!
//! The first block of a sequence comes after a root: one of the model, and one of each adapter.
//!
//! A cached block without users is *evictable*: it keeps its content until the block is needed. The block
//! that was released first is evicted first, and since a sequence releases its last block first, a block is
//! always evicted before the one that precedes it. Blocks without content are allocated lowest first, so that
//! a process with few sequences touches little of its memory.

use crate::metrics::BlockGauges;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use trustformers_plan::KV_BLOCK_TOKENS;

/// Blocks that `tokens` positions need.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_TOKENS)
}

/// All blocks of one cache.
#[derive(Debug)]
pub(crate) struct BlockPool {
    state: Arc<Mutex<PoolState>>,
    /// The most blocks that it may have, which the gauge shows.
    limit: usize,
}

/// The key of a full block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct BlockContent {
    /// Number of the block before it, or the sequence's root for its first block.
    parent: u64,
    tokens: [u32; KV_BLOCK_TOKENS],
}

/// The parent of the first block of a sequence. Sequences of different roots share no block: what is computed
/// with an adapter is valid for that adapter alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PrefixRoot(u64);

impl PrefixRoot {
    /// Of sequences without an adapter.
    pub(crate) const MODEL: Self = Self(0);
}

/// How a cached block is registered.
#[derive(Debug, Clone, Copy)]
struct Registration {
    content: BlockContent,
    /// The block's own number: the parent of its successors.
    number: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Sequences that use it.
    users: usize,
    /// `None` while it is not cached.
    registration: Option<Registration>,
    /// When it became evictable.
    released_at: u64,
}

#[derive(Debug)]
struct PoolState {
    blocks: Vec<Block>,
    /// Blocks without users and without content.
    free: BinaryHeap<Reverse<u32>>,
    cached: HashMap<BlockContent, u32>,
    /// Cached blocks without users, by the time of their release.
    evictable: BTreeMap<u64, u32>,
    /// Counts releases, registrations and roots.
    clock: u64,
    /// Incremented when everything is invalidated.
    epoch: u64,
    gauges: BlockGauges,
}

impl BlockPool {
    /// A pool of `count` blocks that updates the gauges while it lives.
    pub(crate) fn new(count: usize, gauges: BlockGauges) -> Self {
        let ids = 0..u32::try_from(count).unwrap_or(u32::MAX);
        gauges.total.add(signed(count));
        Self {
            limit: count,
            state: Arc::new(Mutex::new(PoolState {
                blocks: vec![Block::default(); count],
                free: ids.map(Reverse).collect(),
                cached: HashMap::new(),
                evictable: BTreeMap::new(),
                clock: PrefixRoot::MODEL.0,
                epoch: 0,
                gauges,
            })),
        }
    }

    /// The same pool, which may grow to `limit` blocks.
    pub(crate) fn with_limit(mut self, limit: usize) -> Self {
        let more = limit.saturating_sub(self.limit);
        self.lock().gauges.total.add(signed(more));
        self.limit += more;
        self
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        lock(&self.state)
    }

    /// How many blocks there are.
    pub(crate) fn total(&self) -> usize {
        self.lock().blocks.len()
    }

    /// Blocks without users and without content.
    pub(crate) fn free(&self) -> usize {
        self.lock().free.len()
    }

    /// Adds blocks until there are `total`.
    pub(crate) fn grow(&self, total: usize) {
        let mut state = self.lock();
        let before = state.blocks.len();
        let numbers = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        state.blocks.resize(total.max(before), Block::default());
        state.free.extend((numbers(before)..numbers(total)).map(Reverse));
    }

    /// Removes the blocks from number `total` on, with their content. False, and nothing is changed, where
    /// one of them is in use.
    pub(crate) fn shrink(&self, total: usize) -> bool {
        let mut state = self.lock();
        let before = state.blocks.len();
        if total >= before || state.blocks[total..].iter().any(|block| block.users > 0) {
            return total >= before;
        }
        for block in state.blocks.split_off(total) {
            if let Some(registration) = block.registration {
                state.cached.remove(&registration.content);
                state.evictable.remove(&block.released_at);
                state.gauges.evictable.dec();
            }
        }
        state.free.retain(|Reverse(id)| (*id as usize) < total);
        true
    }

    /// Blocks that can be allocated now.
    pub(crate) fn available(&self) -> usize {
        let state = self.lock();
        state.free.len() + state.evictable.len()
    }

    /// A root that no sequence has or had.
    pub(crate) fn new_root(&self) -> PrefixRoot {
        let mut state = self.lock();
        state.clock += 1;
        PrefixRoot(state.clock)
    }

    /// A block table with the longest prefix of `tokens` that is cached under `root`. At least the last token
    /// is left out, so that there is something to compute.
    pub(crate) fn match_prefix(&self, root: PrefixRoot, tokens: &[u32]) -> BlockTable {
        let mut state = self.lock();
        let mut table = BlockTable {
            ids: Vec::new(),
            cached_blocks: 0,
            last_number: root.0,
            epoch: state.epoch,
            state: Arc::clone(&self.state),
        };
        let max_blocks = tokens.len().saturating_sub(1) / KV_BLOCK_TOKENS;
        for tokens in tokens.as_chunks().0.iter().take(max_blocks) {
            let content = BlockContent { parent: table.last_number, tokens: *tokens };
            let Some(id) = state.cached.get(&content).copied() else { break };
            state.acquire(id);
            table.ids.push(id);
            table.cached_blocks += 1;
            table.last_number = state.number(id);
        }
        table
    }

    /// Invalidates the content of every block: after a device failure none can be trusted.
    pub(crate) fn invalidate(&self) {
        let mut state = self.lock();
        state.epoch += 1;
        state.cached.clear();
        let evictable = std::mem::take(&mut state.evictable);
        state.gauges.evictable.sub(signed(evictable.len()));
        state.free.extend(evictable.into_values().map(Reverse));
        for block in &mut state.blocks {
            block.registration = None;
        }
    }
}

impl Drop for BlockPool {
    fn drop(&mut self) {
        self.invalidate();
        self.lock().gauges.total.sub(signed(self.limit));
    }
}

impl PoolState {
    /// Adds a user to a cached block.
    fn acquire(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        block.users += 1;
        if block.users == 1 {
            self.evictable.remove(&block.released_at);
            self.gauges.evictable.dec();
            self.gauges.used.inc();
        }
    }

    /// The number by which a cached block is the parent of its successors.
    fn number(&self, id: u32) -> u64 {
        self.blocks[id as usize].registration.map_or(PrefixRoot::MODEL.0, |registration| registration.number)
    }

    /// A block without content; where none is free, the one that was released first is evicted.
    fn allocate(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(Reverse(id)) => id,
            None => {
                let (_, id) = self.evictable.pop_first()?;
                self.gauges.evictable.dec();
                if let Some(registration) = self.blocks[id as usize].registration.take() {
                    self.cached.remove(&registration.content);
                }
                id
            }
        };
        self.blocks[id as usize].users = 1;
        self.gauges.used.inc();
        Some(id)
    }

    /// Removes a user from a block.
    fn release(&mut self, id: u32) {
        self.clock += 1;
        let block = &mut self.blocks[id as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        self.gauges.used.dec();
        if block.registration.is_some() {
            block.released_at = self.clock;
            self.evictable.insert(self.clock, id);
            self.gauges.evictable.inc();
        } else {
            self.free.push(Reverse(id));
        }
    }

    /// Registers a full block, or gives the block that is registered under this content already.
    fn register(&mut self, id: u32, content: BlockContent) -> u32 {
        if let Some(other) = self.cached.get(&content) {
            return *other;
        }
        self.clock += 1;
        self.cached.insert(content, id);
        self.blocks[id as usize].registration = Some(Registration { content, number: self.clock });
        id
    }
}

/// The blocks of one sequence, in the order of its positions. Dropping it releases them, however the sequence
/// ends.
#[derive(Debug)]
pub(crate) struct BlockTable {
    ids: Vec<u32>,
    /// How many of them are cached: always the first ones.
    cached_blocks: usize,
    /// Number of the last cached one.
    last_number: u64,
    /// The pool's epoch when this was made. After an invalidation this sequence registers nothing more.
    epoch: u64,
    state: Arc<Mutex<PoolState>>,
}

impl BlockTable {
    /// The ids of the blocks.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Allocates blocks for `tokens` positions in all. Where there are not enough it allocates none and gives
    /// false.
    pub(crate) fn reserve(&mut self, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(self.ids.len());
        if missing == 0 {
            return true;
        }
        let mut state = lock(&self.state);
        if state.free.len() + state.evictable.len() < missing {
            return false;
        }
        self.ids.extend((0..missing).map_while(|_| state.allocate()));
        true
    }

    /// Registers the blocks that have become full. `tokens` are all tokens of the sequence that are in the
    /// cache. Where another sequence has computed the same block, that block replaces this one's.
    pub(crate) fn register(&mut self, tokens: &[u32]) {
        let full = tokens.as_chunks().0;
        if full.len() <= self.cached_blocks {
            return;
        }
        let mut state = lock(&self.state);
        if state.epoch != self.epoch {
            return;
        }
        for (tokens, own) in full.iter().zip(&mut self.ids).skip(self.cached_blocks) {
            let id = state.register(*own, BlockContent { parent: self.last_number, tokens: *tokens });
            if id != *own {
                state.acquire(id);
                state.release(*own);
                *own = id;
            }
            self.last_number = state.number(id);
            self.cached_blocks += 1;
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        for id in self.ids.drain(..).rev() {
            state.release(id);
        }
    }
}

fn lock(state: &Mutex<PoolState>) -> MutexGuard<'_, PoolState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
