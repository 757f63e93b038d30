//! Attention of a few queries over their sequence's cache, chunk by chunk.
//!
//! A *query* is one head of one row. A *tile* is up to [`TILE`] queries of one sequence that share a
//! key/value head, so that each loaded key and value is used for all of them. A *chunk* is [`CHUNK_TOKENS`]
//! positions; its softmax has its own maximum and sum, and chunks are merged in order. Chunks begin at
//! multiples of their size for every batch and number of threads, and each query is summed in the order of
//! elements and positions. So the result does not depend on how work is split or batched.
//!
//! Cache layout per layer: `[KV block][kv head]`, then keys `[element][slot]` (sixteen positions are the
//! lanes of a score) and values `[slot][element]`, so that both are read forward. Elements are f32, f16 or
//! bf16 ([`super::kv`]); all arithmetic is f32. The blocks of a sequence lie apart, and the
//! processor's own prefetcher starts again at each. So while keys are read, the values of the same block are
//! prefetched, and while values are read, the keys of the next chunk.

#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays, as in the formulas")]

use std::ops::Range;

use trustformers_plan::{AttentionShape, KV_BLOCK_TOKENS, KvType};

use super::{
    kv::{KvElement, cache_index},
    rows::exp,
    simd::{LANES, Simd, tree_sum},
};

/// Positions per chunk: few enough to split one long sequence over several threads, enough to make the merge
/// cheap.
pub(crate) const CHUNK_TOKENS: usize = 128;
const CHUNK_BLOCKS: usize = CHUNK_TOKENS / KV_BLOCK_TOKENS;
/// Queries of a tile.
pub(crate) const TILE: usize = 12;
/// Queries of a tile with 16 registers.
const SMALL_TILE: usize = 3;

/// One query.
#[derive(Clone, Copy)]
pub(crate) struct Query {
    /// Its `head_dim` elements.
    pub(crate) ptr: *const f32,
    /// The first position that it attends to.
    pub(crate) first: usize,
    /// The one after the last: its row's own is the last.
    pub(crate) positions: usize,
}

/// The entries of one group of layers in a sequence's block table.
#[derive(Clone, Copy)]
pub(crate) struct BlockEntries<'a> {
    /// One for each group, for each block of tokens.
    pub(crate) entries: &'a [u32],
    pub(crate) groups: usize,
    pub(crate) group: usize,
}

impl BlockEntries<'_> {
    /// The entry of a block of tokens, if the table has it.
    #[inline(always)]
    fn get(&self, block: usize) -> Option<u32> {
        self.entries.get(block * self.groups + self.group).copied()
    }
}

/// A tile's view of the cache.
#[derive(Clone, Copy)]
pub(crate) struct Attend<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) scale: f32,
    /// Where set, scaled scores `s` become `cap * tanh(s / cap)`.
    pub(crate) soft_cap: Option<f32>,
    /// The layer's cache, and the type of its elements.
    pub(crate) cache: *const u8,
    pub(crate) kv_type: KvType,
    /// Those before the first position of the queries may be absent.
    pub(crate) table: BlockEntries<'a>,
    pub(crate) kv_head: usize,
    /// At most [`TILE`], in the order of their positions.
    pub(crate) queries: &'a [Query],
    /// Room for the queries' elements.
    pub(crate) scratch: *mut f32,
}

impl Attend<'_> {
    /// Chunks that the last query attends to.
    #[cfg(test)]
    pub(crate) fn chunks(&self) -> usize {
        self.queries.last().map_or(0, |query| query.positions.div_ceil(CHUNK_TOKENS))
    }

    /// Keys of the KV block that a later chunk has at the same place, if the sequence has it.
    fn keys_of_next_chunk<K: KvElement>(&self, block: usize) -> Option<*const K> {
        self.table.get(block + CHUNK_BLOCKS).map(|entry| self.keys_of(entry))
    }

    /// Keys of a KV block; its values follow after `head_dim * 16`.
    fn keys<K: KvElement>(&self, block: usize) -> *const K {
        self.keys_of(self.table.entries[block * self.table.groups + self.table.group])
    }

    /// Keys of the block of an entry.
    fn keys_of<K: KvElement>(&self, entry: u32) -> *const K {
        let index = cache_index(&self.shape, entry as usize, self.kv_head);
        self.cache.cast::<K>().wrapping_add(index)
    }
}

/// Values of one query's partial result: maximum, sum, and the weighted sum of values.
pub(crate) const fn partial_len(shape: &AttentionShape) -> usize {
    2 + shape.head_dim
}

/// Values of one chunk's partial results of a tile.
pub(crate) const fn chunk_len(shape: &AttentionShape) -> usize {
    TILE * partial_len(shape)
}

/// Writes the queries' partial results over each of `chunks` to `out`, [`chunk_len`] apart. The partial
/// result of a chunk before or after a query's positions is undefined.
///
/// # Safety
/// The tier's instructions exist; the table's blocks lie in the cache, whose elements are `K`; queries,
/// scratch and `out` are as large as said.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, K: KvElement>(a: &Attend<'_>, chunks: Range<usize>, out: *mut f32) {
    let most = if S::WIDE { TILE } else { SMALL_TILE };
    let mut first = 0;
    while first < a.queries.len() {
        // SAFETY: the queries and the room for their results exist.
        unsafe {
            let out = out.add(first * partial_len(&a.shape));
            let (chunks, queries) = (chunks.clone(), &a.queries[first..]);
            first += match queries.len().min(most) {
                1 => query_tile::<S, K, 1>(a, queries, chunks, out),
                2 => query_tile::<S, K, 2>(a, queries, chunks, out),
                3 => query_tile::<S, K, 3>(a, queries, chunks, out),
                4 => query_tile::<S, K, 4>(a, queries, chunks, out),
                5 => query_tile::<S, K, 5>(a, queries, chunks, out),
                6 => query_tile::<S, K, 6>(a, queries, chunks, out),
                7 => query_tile::<S, K, 7>(a, queries, chunks, out),
                8 => query_tile::<S, K, 8>(a, queries, chunks, out),
                9 => query_tile::<S, K, 9>(a, queries, chunks, out),
                10 => query_tile::<S, K, 10>(a, queries, chunks, out),
                11 => query_tile::<S, K, 11>(a, queries, chunks, out),
                _ => query_tile::<S, K, TILE>(a, queries, chunks, out),
            };
        }
    }
}

/// Computes the first `H` queries.
#[inline(always)]
unsafe fn query_tile<S: Simd, K: KvElement, const H: usize>(
    a: &Attend<'_>,
    queries: &[Query],
    chunks: Range<usize>,
    out: *mut f32,
) -> usize {
    // SAFETY: the queries have `head_dim` elements, the scratch room for all of them.
    unsafe {
        for (h, query) in queries[..H].iter().enumerate() {
            for d in 0..a.shape.head_dim {
                *a.scratch.add(d * H + h) = *query.ptr.add(d);
            }
        }
        for (i, chunk) in chunks.enumerate() {
            let first = chunk * CHUNK_TOKENS;
            let within = |position: usize| position.saturating_sub(first).min(CHUNK_TOKENS);
            let attended = Attended {
                starts: std::array::from_fn(|h| within(queries[h].first)),
                counts: std::array::from_fn(|h| within(queries[h].positions)),
            };
            one_chunk::<S, K, H>(a, chunk * CHUNK_BLOCKS, &attended, out.add(i * chunk_len(&a.shape)));
        }
    }
    H
}

/// The positions of a chunk that each query attends to: `starts[h]..counts[h]`, both in rising order.
struct Attended<const H: usize> {
    starts: [usize; H],
    counts: [usize; H],
}

/// Computes one chunk.
#[inline(always)]
unsafe fn one_chunk<S: Simd, K: KvElement, const H: usize>(
    a: &Attend<'_>,
    first_block: usize,
    attended: &Attended<H>,
    out: *mut f32,
) {
    let Attended { starts, counts } = attended;
    let (first, blocks) = (starts[0] / KV_BLOCK_TOKENS, counts[H - 1].div_ceil(KV_BLOCK_TOKENS));
    let mut shares = [[f32::NEG_INFINITY; CHUNK_TOKENS]; H];
    // SAFETY: every block that a query sees is in the table and the cache.
    unsafe {
        let mut i = first;
        while i < blocks {
            // As many sums as fit in registers and hide the latency of a multiplication.
            i += match blocks - i {
                4.. if H <= 3 && S::WIDE => scores::<S, K, H, 4>(a, first_block + i, &mut shares, i),
                2.. => scores::<S, K, H, 2>(a, first_block + i, &mut shares, i),
                _ => scores::<S, K, H, 1>(a, first_block + i, &mut shares, i),
            };
        }
        for h in 0..H {
            if let Some(cap) = a.soft_cap {
                let own = shares[h].as_mut_ptr().add(first * LANES);
                super::rows::soft_cap::<S>(own, cap, blocks.saturating_sub(first) * LANES);
            }
            // Slots after the row's own position belong to later tokens, or are unused.
            shares[h][counts[h]..].fill(f32::NEG_INFINITY);
            // Those before its window are not its own either.
            shares[h][..starts[h]].fill(f32::NEG_INFINITY);
            let (max, sum) = softmax::<S>(&mut shares[h], blocks);
            let partial = out.add(h * partial_len(&a.shape));
            *partial = max;
            *partial.add(1) = sum;
        }
        let chunk = ChunkShares { first_block, attended, shares: &shares };
        let (mut at, dim) = (0, a.shape.head_dim);
        while at < dim {
            at += match (dim - at) / LANES {
                4.. if H <= 6 && S::WIDE => mix::<S, K, H, 4>(a, &chunk, at, out),
                2.. => mix::<S, K, H, 2>(a, &chunk, at, out),
                1 => mix::<S, K, H, 1>(a, &chunk, at, out),
                _ => mix_one::<K, H>(a, &chunk, at, out),
            };
        }
    }
}

/// Scores of `B` KV blocks.
#[inline(always)]
unsafe fn scores<S: Simd, K: KvElement, const H: usize, const B: usize>(
    a: &Attend<'_>,
    first_block: usize,
    shares: &mut [[f32; CHUNK_TOKENS]; H],
    at: usize,
) -> usize {
    let keys: [*const K; B] = std::array::from_fn(|b| a.keys(first_block + b));
    // SAFETY: keys are `head_dim` rows of sixteen, and values follow them; queries lie interleaved.
    unsafe {
        let mut sums = [[S::splat(0.0); B]; H];
        for d in 0..a.shape.head_dim {
            let mut key = [S::splat(0.0); B];
            for b in 0..B {
                key[b] = K::load::<S>(keys[b].add(d * LANES));
                S::prefetch(keys[b].add((a.shape.head_dim + d) * LANES).cast());
            }
            for h in 0..H {
                let query = S::splat(*a.scratch.add(d * H + h));
                for b in 0..B {
                    sums[h][b] = S::fma(query, key[b], sums[h][b]);
                }
            }
        }
        for h in 0..H {
            for b in 0..B {
                let out = shares[h].as_mut_ptr().add((at + b) * LANES);
                S::store(out, S::mul(sums[h][b], S::splat(a.scale)));
            }
        }
    }
    B
}

/// Replaces scores by `exp(score - max)` in the first `vectors` vectors; returns the maximum and the sum. The
/// vectors after them would add less than the sum, which is at least one, can represent.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32; CHUNK_TOKENS], vectors: usize) -> (f32, f32) {
    let ptr = scores.as_mut_ptr();
    let mut lanes = [0.0f32; LANES];
    // SAFETY: a chunk is whole vectors.
    unsafe {
        let mut max = S::load(ptr);
        for i in 1..vectors {
            max = S::max(max, S::load(ptr.add(i * LANES)));
        }
        let max = S::largest(max);
        let mut sum = S::splat(0.0);
        for i in 0..vectors {
            let share = exp::<S>(S::sub(S::load(ptr.add(i * LANES)), S::splat(max)));
            S::store(ptr.add(i * LANES), share);
            sum = S::add(sum, share);
        }
        S::store(lanes.as_mut_ptr(), sum);
        (max, tree_sum(&lanes))
    }
}

/// A chunk whose shares are computed.
struct ChunkShares<'a, const H: usize> {
    /// Its first block in the sequence's block table.
    first_block: usize,
    attended: &'a Attended<H>,
    /// `exp(score - max)` of each query and position.
    shares: &'a [[f32; CHUNK_TOKENS]; H],
}

/// `Σ share · value` of `16 · W` elements; slots of positions that a query does not attend to are not used
/// for it, because they may hold NaNs.
#[inline(always)]
unsafe fn mix<S: Simd, K: KvElement, const H: usize, const W: usize>(
    a: &Attend<'_>,
    chunk: &ChunkShares<'_, H>,
    at: usize,
    out: *mut f32,
) -> usize {
    let ChunkShares { first_block, attended: Attended { starts, counts }, shares } = *chunk;
    let dim = a.shape.head_dim;
    // SAFETY: elements `at..at + 16 * W` exist.
    unsafe {
        let mut sums = [[S::splat(0.0); W]; H];
        let mut t = starts[0] / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
        while t < counts[H - 1] {
            let block = first_block + t / KV_BLOCK_TOKENS;
            let values = a.keys::<K>(block).add(dim * KV_BLOCK_TOKENS + at);
            let next = a.keys_of_next_chunk::<K>(block);
            let end = (t + KV_BLOCK_TOKENS).min(counts[H - 1]);
            for slot in 0..end - t {
                let mut value = [S::splat(0.0); W];
                for w in 0..W {
                    value[w] = K::load::<S>(values.add(slot * dim + w * LANES));
                }
                if let Some(next) = next {
                    // As many elements as values, so that all keys of the block are prefetched.
                    for w in 0..W {
                        S::prefetch(next.add(slot * dim + at + w * LANES).cast());
                    }
                }
                if (starts[H - 1]..counts[0]).contains(&(t + slot)) {
                    for h in 0..H {
                        let share = S::splat(*shares[h].as_ptr().add(t + slot));
                        for w in 0..W {
                            sums[h][w] = S::fma(share, value[w], sums[h][w]);
                        }
                    }
                } else {
                    for h in 0..H {
                        if (starts[h]..counts[h]).contains(&(t + slot)) {
                            let share = S::splat(*shares[h].as_ptr().add(t + slot));
                            for w in 0..W {
                                sums[h][w] = S::fma(share, value[w], sums[h][w]);
                            }
                        }
                    }
                }
            }
            t = end;
        }
        for h in 0..H {
            for w in 0..W {
                S::store(out.add(h * partial_len(&a.shape) + 2 + at + w * LANES), sums[h][w]);
            }
        }
    }
    W * LANES
}

/// One element, for heads that are no whole number of vectors.
#[inline(always)]
unsafe fn mix_one<K: KvElement, const H: usize>(
    a: &Attend<'_>,
    chunk: &ChunkShares<'_, H>,
    at: usize,
    out: *mut f32,
) -> usize {
    let ChunkShares { first_block, attended: Attended { starts, counts }, shares } = *chunk;
    let dim = a.shape.head_dim;
    for h in 0..H {
        let mut sum = 0.0;
        for t in starts[h]..counts[h] {
            let values = a.keys::<K>(first_block + t / KV_BLOCK_TOKENS);
            let slot = t % KV_BLOCK_TOKENS;
            // SAFETY: element `at` of the slot exists.
            let value = unsafe { *values.add(dim * KV_BLOCK_TOKENS + slot * dim + at) };
            sum += shares[h][t] * value.number();
        }
        // SAFETY: the partial has room for every element.
        unsafe { *out.add(h * partial_len(&a.shape) + 2 + at) = sum };
    }
    1
}

/// Merges one query's partial results, `stride` values apart, in the order of their chunks.
///
/// # Safety
/// There are `chunks` (at least one) partial results; `out` has room for a head and overlaps none of them.
#[inline(always)]
pub(crate) unsafe fn merge(partials: *const f32, stride: usize, chunks: usize, out: *mut f32, dim: usize) {
    // SAFETY: as above.
    unsafe {
        let mut max = f32::NEG_INFINITY;
        for c in 0..chunks {
            let m = *partials.add(c * stride);
            max = if m > max { m } else { max };
        }
        let out = std::slice::from_raw_parts_mut(out, dim);
        out.fill(0.0);
        let mut total = 0.0f32;
        for c in 0..chunks {
            let partial = partials.add(c * stride);
            let factor = (*partial - max).exp();
            total += factor * *partial.add(1);
            for (out, v) in out.iter_mut().zip(std::slice::from_raw_parts(partial.add(2), dim)) {
                *out += factor * v;
            }
        }
        let inverse = 1.0 / total;
        out.iter_mut().for_each(|v| *v *= inverse);
    }
}
