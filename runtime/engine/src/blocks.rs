//! The paged KV cache's book-keeping: which blocks of 16 tokens belong to whom, and what they hold.
//!
//! A sequence takes blocks as it grows. A full block is *known* by its tokens and by the known block before it, so two
//! sequences that begin alike share the blocks of their beginning. The key is the whole content (tokens, and a number
//! of the block before that is never given twice), not a hash of it: what is found is equal, never only probably.
//!
//! A known block that nobody holds any more keeps its content until its place is needed. The one that was given back
//! first goes first, and since sequences give back their last block first, a block never outlives the one before it.
//! Blocks without content are handed out lowest first: a process that serves few sequences touches little of its memory.

use crate::metrics::BlockGauges;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use trustformers_plan::KV_BLOCK_TOKENS;

/// Blocks that `tokens` positions take.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_TOKENS)
}

/// All blocks of one cache.
#[derive(Debug)]
pub(crate) struct BlockPool {
    shared: Arc<Mutex<Inner>>,
}

/// What a full block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Content {
    /// Number of the block before it, [`ROOT`] for the first of a sequence.
    parent: u64,
    tokens: [u32; KV_BLOCK_TOKENS],
}

/// Stands before the first block of a sequence.
const ROOT: u64 = 0;

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Sequences that hold it.
    holders: usize,
    /// What it is known by, and its own number.
    known: Option<(Content, u64)>,
    /// When it was given back, while nobody holds it and it is known.
    given_back: u64,
}

#[derive(Debug)]
struct Inner {
    blocks: Vec<Block>,
    /// Blocks that nobody holds and that hold nothing of use.
    free: BinaryHeap<Reverse<u32>>,
    known: HashMap<Content, u32>,
    /// Known blocks that nobody holds, by the time at which they were given back.
    kept: BTreeMap<u64, u32>,
    /// Counts both what is given back and what becomes known.
    clock: u64,
    /// Rises when everything is forgotten.
    epoch: u64,
    gauges: BlockGauges,
}

impl BlockPool {
    /// A pool of `count` blocks that keeps the gauges true while it lives.
    pub(crate) fn new(count: usize, gauges: BlockGauges) -> Self {
        let ids = 0..u32::try_from(count).unwrap_or(u32::MAX);
        gauges.total.add(signed(count));
        Self {
            shared: Arc::new(Mutex::new(Inner {
                blocks: vec![Block::default(); count],
                free: ids.map(Reverse).collect(),
                known: HashMap::new(),
                kept: BTreeMap::new(),
                clock: ROOT,
                epoch: 0,
                gauges,
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.shared)
    }

    /// Blocks that can be handed out at this moment.
    pub(crate) fn available(&self) -> usize {
        let inner = self.lock();
        inner.free.len() + inner.kept.len()
    }

    /// A sequence's table with the longest beginning of `tokens` that is known. At least the last token is left out,
    /// so that there is something to compute.
    pub(crate) fn matching(&self, tokens: &[u32]) -> Blocks {
        let mut inner = self.lock();
        let mut blocks = Blocks {
            ids: Vec::new(),
            known: 0,
            last: ROOT,
            epoch: inner.epoch,
            shared: Arc::clone(&self.shared),
        };
        let most = tokens.len().saturating_sub(1) / KV_BLOCK_TOKENS;
        for tokens in tokens.as_chunks().0.iter().take(most) {
            let content = Content { parent: blocks.last, tokens: *tokens };
            let Some(id) = inner.known.get(&content).copied() else { break };
            inner.hold(id);
            blocks.ids.push(id);
            blocks.known += 1;
            blocks.last = inner.number(id);
        }
        blocks
    }

    /// Forgets what every block holds: after a failure no content can be trusted.
    pub(crate) fn forget(&self) {
        let mut inner = self.lock();
        inner.epoch += 1;
        inner.known.clear();
        let kept = std::mem::take(&mut inner.kept);
        inner.gauges.kept.sub(signed(kept.len()));
        inner.free.extend(kept.into_values().map(Reverse));
        for block in &mut inner.blocks {
            block.known = None;
        }
    }
}

impl Drop for BlockPool {
    fn drop(&mut self) {
        self.forget();
        let inner = self.lock();
        inner.gauges.total.sub(signed(inner.blocks.len()));
    }
}

impl Inner {
    /// One more holds a block that may be kept.
    fn hold(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        block.holders += 1;
        if block.holders == 1 {
            self.kept.remove(&block.given_back);
            self.gauges.kept.dec();
            self.gauges.used.inc();
        }
    }

    /// The number by which a known block is its successors' parent.
    fn number(&self, id: u32) -> u64 {
        self.blocks[id as usize].known.map_or(ROOT, |(_, number)| number)
    }

    /// A block without content, if need be the longest unused one.
    fn take(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(Reverse(id)) => id,
            None => {
                let (_, id) = self.kept.pop_first()?;
                self.gauges.kept.dec();
                if let Some((content, _)) = self.blocks[id as usize].known.take() {
                    self.known.remove(&content);
                }
                id
            }
        };
        self.blocks[id as usize].holders = 1;
        self.gauges.used.inc();
        Some(id)
    }

    fn give_back(&mut self, id: u32) {
        self.clock += 1;
        let block = &mut self.blocks[id as usize];
        block.holders -= 1;
        if block.holders > 0 {
            return;
        }
        self.gauges.used.dec();
        if block.known.is_some() {
            block.given_back = self.clock;
            self.kept.insert(self.clock, id);
            self.gauges.kept.inc();
        } else {
            self.free.push(Reverse(id));
        }
    }

    /// Makes a full block known, or gives the one that is known by this content already.
    fn learn(&mut self, id: u32, content: Content) -> u32 {
        if let Some(other) = self.known.get(&content) {
            return *other;
        }
        self.clock += 1;
        self.known.insert(content, id);
        self.blocks[id as usize].known = Some((content, self.clock));
        id
    }
}

/// Blocks of one sequence, in the order of its positions. They return to the pool when this is dropped, on whatever
/// path the sequence ends.
#[derive(Debug)]
pub(crate) struct Blocks {
    ids: Vec<u32>,
    /// How many of them are known: always the first.
    known: usize,
    /// Number of the last known one.
    last: u64,
    /// The pool's when this was made; what was forgotten since is not learnt again.
    epoch: u64,
    shared: Arc<Mutex<Inner>>,
}

impl Blocks {
    /// The block table.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Makes room for `tokens` positions; takes no block at all where there are not enough.
    pub(crate) fn make_room(&mut self, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(self.ids.len());
        if missing == 0 {
            return true;
        }
        let mut inner = lock(&self.shared);
        if inner.free.len() + inner.kept.len() < missing {
            return false;
        }
        self.ids.extend((0..missing).map_while(|_| inner.take()));
        true
    }

    /// Makes known what has become full: `tokens` are all of the sequence's that are in the cache. Where another
    /// sequence has computed the same, its block takes the place of this one's.
    pub(crate) fn learn(&mut self, tokens: &[u32]) {
        let full = tokens.as_chunks().0;
        if full.len() <= self.known {
            return;
        }
        let mut inner = lock(&self.shared);
        if inner.epoch != self.epoch {
            return;
        }
        for (tokens, own) in full.iter().zip(&mut self.ids).skip(self.known) {
            let id = inner.learn(*own, Content { parent: self.last, tokens: *tokens });
            if id != *own {
                inner.hold(id);
                inner.give_back(*own);
                *own = id;
            }
            self.last = inner.number(id);
            self.known += 1;
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut inner = lock(&self.shared);
        for id in self.ids.drain(..).rev() {
            inner.give_back(id);
        }
    }
}

fn lock(shared: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::IntGauge;

    fn pool(count: usize) -> (BlockPool, BlockGauges) {
        let gauge = |name| IntGauge::new(name, name).unwrap();
        let gauges = BlockGauges { used: gauge("used"), kept: gauge("kept"), total: gauge("total") };
        (BlockPool::new(count, gauges.clone()), gauges)
    }

    fn tokens(len: usize, salt: u32) -> Vec<u32> {
        (0..len as u32).map(|i| i * 7 + salt).collect()
    }

    /// A sequence that has computed all of these tokens.
    fn computed(pool: &BlockPool, tokens: &[u32]) -> Blocks {
        let mut blocks = pool.matching(tokens);
        assert!(blocks.make_room(tokens.len()));
        blocks.learn(tokens);
        blocks
    }

    #[test]
    fn all_or_nothing_lowest_first_and_all_come_back() {
        let (pool, gauges) = pool(4);
        let mut first = pool.matching(&[]);
        assert!(first.make_room(33));
        assert_eq!(first.ids(), [0, 1, 2]);
        let mut second = pool.matching(&[]);
        assert!(!second.make_room(17));
        assert!(second.ids().is_empty());
        assert!(second.make_room(16));
        assert_eq!((gauges.used.get(), gauges.total.get(), pool.available()), (4, 4, 0));
        drop(first);
        assert!(second.make_room(17));
        assert_eq!(second.ids(), [3, 0]);
        drop(second);
        assert_eq!((gauges.used.get(), pool.available()), (0, 4));
        drop(pool);
        assert_eq!((gauges.total.get(), gauges.kept.get()), (0, 0));
    }

    #[test]
    fn a_partial_block_counts_whole() {
        assert_eq!([0, 1, 16, 17].map(blocks_for), [0, 1, 1, 2]);
    }

    #[test]
    fn a_beginning_is_found_while_it_is_held_and_after() {
        let (pool, gauges) = pool(8);
        let first = computed(&pool, &tokens(40, 1));
        let longer = [tokens(40, 1), tokens(9, 2)].concat();
        let second = pool.matching(&longer);
        assert_eq!(second.ids(), &first.ids()[..2], "a block that is not full is nobody else's");
        assert_eq!(gauges.used.get(), 3);
        drop((first, second));
        assert_eq!((gauges.used.get(), gauges.kept.get(), pool.available()), (0, 2, 8));
        assert_eq!(pool.matching(&longer).ids().len(), 2);
        assert_eq!(pool.matching(&tokens(40, 2)).ids().len(), 0);
        assert_eq!(pool.matching(&tokens(32, 1)).ids().len(), 1, "the last token is left to compute");
    }

    #[test]
    fn the_same_tokens_after_other_ones_are_something_else() {
        let (pool, _gauges) = pool(8);
        let same = tokens(16, 5);
        let one = computed(&pool, &[tokens(16, 1), same.clone(), vec![0]].concat());
        let other = computed(&pool, &[tokens(16, 2), same, vec![0]].concat());
        assert_ne!(one.ids()[1], other.ids()[1]);
    }

    #[test]
    fn two_that_computed_the_same_at_once_share_it_afterwards() {
        let (pool, gauges) = pool(8);
        let all = tokens(33, 1);
        let (mut one, mut other) = (pool.matching(&all), pool.matching(&all));
        assert!(one.make_room(33) && other.make_room(33));
        one.learn(&all);
        other.learn(&all);
        assert_eq!(one.ids()[..2], other.ids()[..2]);
        assert_eq!(gauges.used.get(), 4);
        // What follows is known to both.
        let more = [all, tokens(15, 9)].concat();
        assert!(one.make_room(48) && other.make_room(48));
        other.learn(&more);
        drop(other);
        one.learn(&more);
        assert_eq!(one.ids().len(), 3);
        drop(one);
        assert_eq!((gauges.used.get(), gauges.kept.get(), pool.available()), (0, 3, 8));
    }

    #[test]
    fn what_was_given_back_first_goes_first_and_ends_go_before_beginnings() {
        let (pool, gauges) = pool(4);
        let (old, new) = ([tokens(32, 1), vec![0]].concat(), [tokens(16, 2), vec![0]].concat());
        drop(computed(&pool, &old[..32]));
        drop(computed(&pool, &new[..16]));
        let mut taker = pool.matching(&[]);
        assert!(taker.make_room(32));
        assert_eq!(pool.matching(&old).ids().len(), 1, "the end went, the beginning is there");
        assert_eq!(pool.matching(&new).ids().len(), 1);
        assert!(taker.make_room(64));
        assert_eq!((gauges.used.get(), gauges.kept.get(), pool.available()), (4, 0, 0));
        assert!(pool.matching(&old).ids().is_empty() && pool.matching(&new).ids().is_empty());
    }

    #[test]
    fn what_is_forgotten_is_neither_found_nor_learnt_again() {
        let (pool, gauges) = pool(4);
        let all = tokens(33, 1);
        let mut held = computed(&pool, &all[..16]);
        drop(computed(&pool, &tokens(16, 2)));
        pool.forget();
        assert_eq!((gauges.used.get(), gauges.kept.get(), pool.available()), (1, 0, 3));
        assert!(held.make_room(33));
        held.learn(&all);
        assert!(pool.matching(&all).ids().is_empty());
        drop(held);
        assert_eq!((gauges.used.get(), gauges.kept.get(), pool.available()), (0, 0, 4));
    }

    /// Random takings, learnings and endings: every block is in one place, and nobody's content is anybody else's.
    #[test]
    fn blocks_are_neither_lost_nor_mixed_up() {
        let (pool, gauges) = pool(12);
        let mut holders: Vec<(Vec<u32>, Blocks)> = Vec::new();
        // What each block holds, as a device would have it.
        let mut device = vec![Vec::new(); 12];
        let mut state = 7_u64;
        let mut roll = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..20_000 {
            if holders.len() < 4 && roll(2) == 0 {
                // Few different beginnings, so that they meet.
                let all: Vec<u32> =
                    (0..16 * roll(5) + 1 + roll(16)).map(|i| (i / 16 * roll(2)) as u32).collect();
                let blocks = pool.matching(&all);
                for (block, id) in all.chunks(16).zip(blocks.ids()) {
                    assert_eq!(device[*id as usize], block);
                }
                holders.push((all, blocks));
            } else if !holders.is_empty() {
                let index = roll(holders.len() as u64) as usize;
                let (all, blocks) = &mut holders[index];
                if roll(2) == 0 && blocks.make_room(all.len()) {
                    for (block, id) in all.chunks(16).zip(blocks.ids()) {
                        device[*id as usize] = block.to_vec();
                    }
                    blocks.learn(all);
                } else {
                    holders.swap_remove(index);
                }
            }
            let held: std::collections::HashSet<u32> =
                holders.iter().flat_map(|(_, blocks)| blocks.ids().to_vec()).collect();
            assert_eq!(gauges.used.get() as usize, held.len());
            assert_eq!(pool.available() + held.len(), 12);
        }
        drop(holders);
        assert_eq!((gauges.used.get(), pool.available()), (0, 12));
    }
}
