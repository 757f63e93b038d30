//! The prefix cache: the bookkeeping of the paged KV cache. It says which blocks of 16 tokens each sequence
//! uses, and which content can be reused.
//!
//! Where a model has several groups of layers ([`trustformers_plan::kv_layout`]), each 16 tokens have a block
//! for each group, and an entry for each in the block table. All groups take their blocks from this one pool.
//!
//! A sequence allocates blocks as it grows. A full block is *cached*: it is registered under its tokens and
//! the cached block before it, so that two sequences with the same prefix share the blocks of that prefix.
//! The key is the whole content (tokens, and the number of the block before, which is never reused), not a
//! hash of it: a match is equal, not merely likely to be. The blocks of all groups are registered under one
//! key, each when it is full.
//!
//! The first block of a sequence comes after a root: one of the model, and one of each adapter.
//!
//! A cached block without users is *evictable*: it keeps its content until the block is needed. The block
//! that was released first is evicted first, and since a sequence releases its last block first, a block of
//! full layers is always evicted before the one that precedes it. Blocks without content are allocated lowest
//! first, so that a process with few sequences touches little of its memory.
//!
//! A sequence releases the blocks of windowed layers that none of its rows can reach any more
//! ([`BlockTable::release_unreachable`]); these are evicted before the later ones. A prefix matches as far as
//! full layers have all of its blocks and windowed layers those that the next row reaches.

use crate::metrics::BlockGauges;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use trustformers_plan::{ABSENT_BLOCK, KV_BLOCK_TOKENS, LayerClasses};

/// Blocks that `tokens` positions need in each group of layers that keeps all of them.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_TOKENS)
}

/// What decides how many blocks a sequence has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockNeeds {
    pub(crate) classes: LayerClasses,
    /// Most rows of one sequence in all steps that were not awaited.
    pub(crate) rows: usize,
}

impl BlockNeeds {
    /// Most blocks that a sequence of `tokens` tokens has at a time.
    pub(crate) const fn most(&self, tokens: usize) -> usize {
        self.classes.most_blocks(tokens, self.rows)
    }
}

/// All blocks of one cache.
#[derive(Debug)]
pub(crate) struct BlockPool {
    state: Arc<Mutex<PoolState>>,
    /// The most blocks that it may have, which the gauge shows.
    limit: usize,
}

/// The key of full blocks.
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
    /// Number of its prefix.
    number: u64,
    /// The group of layers whose keys and values it has.
    group: usize,
}

/// A prefix of whole blocks, of which some blocks are cached. It is there while one of its last 16 tokens is,
/// or a longer prefix.
#[derive(Debug)]
struct CachedPrefix {
    content: BlockContent,
    /// The blocks of its last 16 tokens, one for each group of layers.
    blocks: Vec<Option<u32>>,
    /// Prefixes that are one block longer.
    successors: usize,
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
    /// The prefix whose last 16 tokens have this key, by its number: the parent of its successors.
    numbers: HashMap<BlockContent, u64>,
    prefixes: HashMap<u64, CachedPrefix>,
    needs: BlockNeeds,
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
    pub(crate) fn new(count: usize, needs: BlockNeeds, gauges: BlockGauges) -> Self {
        let ids = 0..u32::try_from(count).unwrap_or(u32::MAX);
        gauges.total.add(signed(count));
        Self {
            limit: count,
            state: Arc::new(Mutex::new(PoolState {
                blocks: vec![Block::default(); count],
                free: ids.map(Reverse).collect(),
                numbers: HashMap::new(),
                prefixes: HashMap::new(),
                needs,
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
        for id in total..before {
            let Block { registration, released_at, .. } = state.blocks[id];
            if registration.is_some() {
                state.evictable.remove(&released_at);
                state.gauges.evictable.dec();
                state.unregister(id);
            }
        }
        state.blocks.truncate(total);
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
        let max_blocks = tokens.len().saturating_sub(1) / KV_BLOCK_TOKENS;
        let found = state.longest_prefix(root, &tokens[..max_blocks * KV_BLOCK_TOKENS]);
        let classes = state.needs.classes;
        let (groups, cached_tokens) = (classes.groups(), found.blocks * KV_BLOCK_TOKENS);
        let mut ids = found.ids;
        for (index, entry) in ids.chunks_exact_mut(groups).enumerate() {
            for (group, id) in entry.iter_mut().enumerate() {
                if index < classes.first_block(group, cached_tokens) {
                    *id = ABSENT_BLOCK;
                } else {
                    state.acquire(*id);
                }
            }
        }
        BlockTable {
            ids,
            needs: state.needs,
            first_windowed_block: classes.first_windowed_block(cached_tokens),
            cached_blocks: found.blocks,
            last_number: found.number,
            epoch: state.epoch,
            state: Arc::clone(&self.state),
        }
    }

    /// Invalidates the content of every block: after a device failure none can be trusted.
    pub(crate) fn invalidate(&self) {
        let mut state = self.lock();
        state.epoch += 1;
        state.numbers.clear();
        state.prefixes.clear();
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

    /// The longest prefix of these whole blocks with all that a row after it reads.
    fn longest_prefix(&self, root: PrefixRoot, tokens: &[u32]) -> FoundPrefix {
        let classes = self.needs.classes;
        let mut longest = FoundPrefix { ids: Vec::new(), blocks: 0, number: root.0 };
        let mut parent = root.0;
        // The last blocks so far that windowed layers have without a gap.
        let mut windowed_blocks = 0;
        for (index, tokens) in tokens.as_chunks().0.iter().enumerate() {
            let number = self.numbers.get(&BlockContent { parent, tokens: *tokens }).copied();
            let Some((number, prefix)) = number.and_then(|n| Some((n, self.prefixes.get(&n)?))) else {
                break;
            };
            let (full, windowed) = prefix.blocks.split_at(classes.full_groups());
            if full.iter().any(Option::is_none) {
                break;
            }
            windowed_blocks = if windowed.iter().all(Option::is_some) { windowed_blocks + 1 } else { 0 };
            longest.ids.extend(prefix.blocks.iter().map(|id| id.unwrap_or(ABSENT_BLOCK)));
            parent = number;
            let blocks = index + 1;
            if windowed_blocks + classes.first_windowed_block(blocks * KV_BLOCK_TOKENS) >= blocks {
                (longest.blocks, longest.number) = (blocks, number);
            }
        }
        longest.ids.truncate(longest.blocks * classes.groups());
        longest
    }

    /// A block without content; where none is free, the one that was released first is evicted.
    fn allocate(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(Reverse(id)) => id,
            None => {
                let (_, id) = self.evictable.pop_first()?;
                self.gauges.evictable.dec();
                self.unregister(id as usize);
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

    /// The number of the prefix with this content, which may be new.
    fn prefix(&mut self, content: BlockContent) -> u64 {
        if let Some(number) = self.numbers.get(&content) {
            return *number;
        }
        self.clock += 1;
        let number = self.clock;
        if let Some(parent) = self.prefixes.get_mut(&content.parent) {
            parent.successors += 1;
        }
        let blocks = vec![None; self.needs.classes.groups()];
        self.numbers.insert(content, number);
        self.prefixes.insert(number, CachedPrefix { content, blocks, successors: 0 });
        number
    }

    /// Registers a full block, or gives the block that is registered there already.
    fn register(&mut self, id: u32, registration: Registration) -> u32 {
        let Registration { number, group } = registration;
        let Some(prefix) = self.prefixes.get_mut(&number) else { return id };
        if let Some(other) = prefix.blocks[group] {
            return other;
        }
        prefix.blocks[group] = Some(id);
        self.blocks[id as usize].registration = Some(registration);
        id
    }

    /// Removes a block's content, and the prefixes of which nothing is left.
    fn unregister(&mut self, id: usize) {
        let Some(Registration { mut number, group }) = self.blocks[id].registration.take() else { return };
        if let Some(prefix) = self.prefixes.get_mut(&number) {
            prefix.blocks[group] = None;
        }
        while let Some(prefix) = self.prefixes.get(&number) {
            if prefix.successors > 0 || prefix.blocks.iter().any(Option::is_some) {
                return;
            }
            let content = prefix.content;
            self.prefixes.remove(&number);
            self.numbers.remove(&content);
            number = content.parent;
            if let Some(parent) = self.prefixes.get_mut(&number) {
                parent.successors -= 1;
            }
        }
    }
}

/// What a prefix of some tokens has in the cache.
#[derive(Debug)]
struct FoundPrefix {
    /// Entries of a block table. Those that nothing reaches may be absent.
    ids: Vec<u32>,
    /// Blocks of tokens.
    blocks: usize,
    /// Its number, or that of the root.
    number: u64,
}

/// The blocks of one sequence, in the order of its positions. Dropping it releases them, however the sequence
/// ends.
#[derive(Debug)]
pub(crate) struct BlockTable {
    /// For each 16 tokens an entry for each group of layers.
    ids: Vec<u32>,
    needs: BlockNeeds,
    /// The first block of tokens that windowed layers have; those before are absent.
    first_windowed_block: usize,
    /// How many blocks of tokens are cached: always the first ones.
    cached_blocks: usize,
    /// Number of the last cached one.
    last_number: u64,
    /// The pool's epoch when this was made. After an invalidation this sequence registers nothing more.
    epoch: u64,
    state: Arc<Mutex<PoolState>>,
}

impl BlockTable {
    /// The entries of the table.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Blocks of tokens.
    pub(crate) fn token_blocks(&self) -> usize {
        self.ids.len() / self.groups()
    }

    fn groups(&self) -> usize {
        self.needs.classes.groups()
    }

    /// Blocks that it has to allocate for `tokens` positions in all.
    pub(crate) fn missing_for(&self, tokens: usize) -> usize {
        blocks_for(tokens).saturating_sub(self.token_blocks()) * self.groups()
    }

    /// Blocks that it needs beside those that it has, until it has `tokens` positions. It releases others
    /// meanwhile, so that this is less than [`Self::missing_for`] where layers have windows.
    pub(crate) fn missing_until(&self, tokens: usize) -> usize {
        let BlockNeeds { classes, rows } = self.needs;
        let full = blocks_for(tokens).saturating_sub(self.token_blocks());
        let windowed = self.token_blocks() - self.first_windowed_block.min(self.token_blocks());
        let windowed = classes.most_windowed_blocks(tokens, rows).saturating_sub(windowed);
        classes.full_groups() * full + classes.windowed_groups() * windowed
    }

    /// Releases the blocks of windowed layers that no row can reach when there are `cached_tokens` tokens in
    /// the cache, those of steps in flight not counted: rows of these steps come later and reach less far.
    pub(crate) fn release_unreachable(&mut self, cached_tokens: usize) {
        let classes = self.needs.classes;
        let first = classes.first_windowed_block(cached_tokens).min(self.token_blocks());
        if first <= self.first_windowed_block {
            return;
        }
        let (groups, full) = (classes.groups(), classes.full_groups());
        let mut state = lock(&self.state);
        for entry in self.ids[self.first_windowed_block * groups..first * groups].chunks_exact_mut(groups) {
            for id in &mut entry[full..] {
                state.release(std::mem::replace(id, ABSENT_BLOCK));
            }
        }
        self.first_windowed_block = first;
    }

    /// Allocates blocks for `tokens` positions in all. Where there are not enough it allocates none and gives
    /// false.
    pub(crate) fn reserve(&mut self, tokens: usize) -> bool {
        let missing = self.missing_for(tokens);
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
        let entries = self.ids.chunks_exact_mut(self.needs.classes.groups());
        for (tokens, entry) in full.iter().zip(entries).skip(self.cached_blocks) {
            let number = state.prefix(BlockContent { parent: self.last_number, tokens: *tokens });
            // None of them is absent: a sequence registers its blocks before it releases any.
            for (group, own) in entry.iter_mut().enumerate().filter(|(_, own)| **own != ABSENT_BLOCK) {
                let id = state.register(*own, Registration { number, group });
                if id != *own {
                    state.acquire(id);
                    state.release(*own);
                    *own = id;
                }
            }
            self.last_number = number;
            self.cached_blocks += 1;
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        for id in self.ids.drain(..).rev().filter(|id| *id != ABSENT_BLOCK) {
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
