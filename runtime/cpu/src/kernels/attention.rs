//! Attention of one row over its sequence's cache, a fixed number of positions at a time.
//!
//! A *chunk* is [`CHUNK_TOKENS`] positions: its softmax has its own maximum and sum, and chunks are merged in order.
//! Chunks begin at multiples of their size whatever the batch or the threads, so the result never depends on who
//! computed which. All query heads that share a key/value head read it together.
//!
//! Cache layout per layer: `[block][kv head]`, then keys `[element][slot]` (sixteen positions are the lanes of a score)
//! and values `[slot][element]`, so that both are read forward.

#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays, as in the formulas")]

use trustformers_plan::{AttentionShape, KV_BLOCK_TOKENS};

use super::{
    rows::exp,
    simd::{LANES, Simd},
};

/// Positions per chunk: small enough that one long sequence feeds several threads, large enough that merging is cheap.
pub(crate) const CHUNK_TOKENS: usize = 128;
const CHUNK_BLOCKS: usize = CHUNK_TOKENS / KV_BLOCK_TOKENS;
/// Query heads that share one pass over keys and values.
const HEADS_AT_ONCE: usize = 4;

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "sixteen positions of a block are the lanes of a score");

/// One row's view of the cache.
#[derive(Clone, Copy)]
pub(crate) struct Attend<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) scale: f32,
    /// The layer's cache.
    pub(crate) cache: *const f32,
    pub(crate) table: &'a [u32],
    /// The row's queries, all heads.
    pub(crate) query: *const f32,
    /// Positions the row sees: its own and all before.
    pub(crate) positions: usize,
}

impl Attend<'_> {
    /// Chunks that the row sees.
    pub(crate) const fn chunks(&self) -> usize {
        self.positions.div_ceil(CHUNK_TOKENS)
    }

    const fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Keys of a block; its values follow after `head_dim * 16`.
    fn keys(&self, block: usize, kv_head: usize) -> *const f32 {
        self.cache.wrapping_add(cache_index(&self.shape, self.table[block] as usize, kv_head))
    }
}

/// First value of a block's key/value head in its layer.
pub(crate) const fn cache_index(shape: &AttentionShape, block: usize, kv_head: usize) -> usize {
    (block * shape.kv_heads + kv_head) * 2 * KV_BLOCK_TOKENS * shape.head_dim
}

/// Values of one head's partial result: maximum, sum, and the weighted sum of values.
pub(crate) const fn partial_len(shape: &AttentionShape) -> usize {
    2 + shape.head_dim
}

/// Writes the partial results of all query heads of `kv_head` over one chunk, one after the other, to `out`.
///
/// # Safety
/// The tier's instructions exist; the table's blocks lie in the cache; `out` has room for the heads' partials.
#[inline(always)]
pub(crate) unsafe fn chunk<S: Simd>(a: &Attend<'_>, kv_head: usize, chunk: usize, out: *mut f32) {
    let mut head = 0;
    while head < a.group() {
        let first = (kv_head * a.group() + head, kv_head);
        // SAFETY: the heads exist, and so does their room.
        unsafe {
            let out = out.add(head * partial_len(&a.shape));
            head += match a.group() - head {
                1 => heads::<S, 1>(a, first, chunk, out),
                2 => heads::<S, 2>(a, first, chunk, out),
                3 => heads::<S, 3>(a, first, chunk, out),
                _ => heads::<S, HEADS_AT_ONCE>(a, first, chunk, out),
            };
        }
    }
}

#[inline(always)]
unsafe fn heads<S: Simd, const H: usize>(
    a: &Attend<'_>,
    (head, kv_head): (usize, usize),
    chunk: usize,
    out: *mut f32,
) -> usize {
    let dim = a.shape.head_dim;
    let blocks = chunk * CHUNK_BLOCKS..a.positions.div_ceil(KV_BLOCK_TOKENS).min((chunk + 1) * CHUNK_BLOCKS);
    let count = a.positions.min((chunk + 1) * CHUNK_TOKENS) - chunk * CHUNK_TOKENS;
    let mut shares = [[f32::NEG_INFINITY; CHUNK_TOKENS]; H];
    // SAFETY: every block is in the table and the cache, every head in the row.
    unsafe {
        for (i, block) in blocks.clone().enumerate() {
            let keys = a.keys(block, kv_head);
            let scores = score::<S, H>(a.query.add(head * dim), keys, dim);
            for h in 0..H {
                S::store(shares[h].as_mut_ptr().add(i * LANES), S::mul(scores[h], S::splat(a.scale)));
            }
        }
        for h in 0..H {
            // Slots past the row's own position belong to later tokens, or to nobody.
            shares[h][count..].fill(f32::NEG_INFINITY);
            let (max, sum) = softmax::<S>(&mut shares[h]);
            let partial = out.add(h * partial_len(&a.shape));
            *partial = max;
            *partial.add(1) = sum;
        }
        let mut at = 0;
        while at < dim {
            let width = match dim - at {
                n if n >= 2 * LANES => mix::<S, H, 2>(a, (&blocks, count, kv_head), &shares, (at, out)),
                n if n >= LANES => mix::<S, H, 1>(a, (&blocks, count, kv_head), &shares, (at, out)),
                _ => mix_one::<H>(a, (&blocks, count, kv_head), &shares, (at, out)),
            };
            at += width;
        }
    }
    H
}

/// Scores of sixteen positions.
#[inline(always)]
unsafe fn score<S: Simd, const H: usize>(query: *const f32, keys: *const f32, dim: usize) -> [S::F; H] {
    // SAFETY: keys are `dim` rows of sixteen; queries of `H` heads follow each other.
    unsafe {
        let (mut even, mut odd) = ([S::splat(0.0); H], [S::splat(0.0); H]);
        let mut d = 0;
        while d + 2 <= dim {
            let (k0, k1) = (S::load(keys.add(d * LANES)), S::load(keys.add((d + 1) * LANES)));
            for h in 0..H {
                let q = query.add(h * dim + d);
                even[h] = S::fma(S::splat(*q), k0, even[h]);
                odd[h] = S::fma(S::splat(*q.add(1)), k1, odd[h]);
            }
            d += 2;
        }
        for h in 0..H {
            if d < dim {
                even[h] = S::fma(S::splat(*query.add(h * dim + d)), S::load(keys.add(d * LANES)), even[h]);
            }
            even[h] = S::add(even[h], odd[h]);
        }
        even
    }
}

/// Replaces scores by `exp(score - max)`; answers the maximum and the sum.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32; CHUNK_TOKENS]) -> (f32, f32) {
    let ptr = scores.as_mut_ptr();
    let mut lanes = [0.0f32; LANES];
    // SAFETY: a chunk is whole vectors.
    unsafe {
        let mut max = S::load(ptr);
        for i in 1..CHUNK_BLOCKS {
            max = S::max(max, S::load(ptr.add(i * LANES)));
        }
        S::store(lanes.as_mut_ptr(), max);
        let max = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sum = S::splat(0.0);
        for i in 0..CHUNK_BLOCKS {
            let share = exp::<S>(S::sub(S::load(ptr.add(i * LANES)), S::splat(max)));
            S::store(ptr.add(i * LANES), share);
            sum = S::add(sum, share);
        }
        S::store(lanes.as_mut_ptr(), sum);
        (max, lanes.iter().sum())
    }
}

/// `Σ share · value` of `16 · W` elements; the slots of tokens that the row does not see are not even read, since what
/// is left in them may not be a number.
#[inline(always)]
unsafe fn mix<S: Simd, const H: usize, const W: usize>(
    a: &Attend<'_>,
    (blocks, count, kv_head): (&std::ops::Range<usize>, usize, usize),
    shares: &[[f32; CHUNK_TOKENS]; H],
    (at, out): (usize, *mut f32),
) -> usize {
    let dim = a.shape.head_dim;
    // SAFETY: elements `at..at + 16 * W` exist.
    unsafe {
        let mut sums = [[S::splat(0.0); W]; H];
        for (i, block) in blocks.clone().enumerate() {
            let values = a.keys(block, kv_head).add(dim * KV_BLOCK_TOKENS + at);
            for slot in 0..KV_BLOCK_TOKENS.min(count - i * KV_BLOCK_TOKENS) {
                for w in 0..W {
                    let value = S::load(values.add(slot * dim + w * LANES));
                    for h in 0..H {
                        sums[h][w] =
                            S::fma(S::splat(shares[h][i * KV_BLOCK_TOKENS + slot]), value, sums[h][w]);
                    }
                }
            }
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
unsafe fn mix_one<const H: usize>(
    a: &Attend<'_>,
    (blocks, count, kv_head): (&std::ops::Range<usize>, usize, usize),
    shares: &[[f32; CHUNK_TOKENS]; H],
    (at, out): (usize, *mut f32),
) -> usize {
    let dim = a.shape.head_dim;
    for h in 0..H {
        let mut sum = 0.0;
        for t in 0..count {
            let values = a.keys(blocks.start + t / KV_BLOCK_TOKENS, kv_head);
            let slot = t % KV_BLOCK_TOKENS;
            // SAFETY: element `at` of the slot exists.
            sum += shares[h][t] * unsafe { *values.add(dim * KV_BLOCK_TOKENS + slot * dim + at) };
        }
        // SAFETY: the partial has room for every element.
        unsafe { *out.add(h * partial_len(&a.shape) + 2 + at) = sum };
    }
    1
}

/// Merges one head's partials, `stride` values apart, in the order of their chunks.
///
/// # Safety
/// There are `chunks` (at least one) partials; `out` has room for a head and overlaps none of them.
#[inline(always)]
pub(crate) unsafe fn merge(
    partials: *const f32,
    stride: usize,
    chunks: usize,
    (out, dim): (*mut f32, usize),
) {
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
