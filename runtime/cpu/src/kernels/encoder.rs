//! Kernels of encoders: layer norm, gelu, and attention of a whole sequence to itself.
//!
//! *Attention* computes one key/value head at a time. It copies the keys, with positions side by side (the
//! lanes of a score), and the values, without the gaps of their buffer, to the thread's scratch memory, where
//! they stay in the first-level cache. Then it computes tiles of rows: scores of all positions, or of those
//! that some row of the tile attends to, softmax, weighted sum of values. A row's result depends on its own
//! sequence only, and the order of operations is the same in every tile.

#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays, as in the formulas")]

#[cfg(test)]
mod tests;

use trustformers_plan::EncoderScores;

use super::{
    rows::exp,
    simd::{LANES, Simd, tree_sum},
};

/// Positions whose scores are computed together: two vectors.
const SCORE_POSITIONS: usize = 2 * LANES;
/// Rows of a tile with 32 registers.
pub(crate) const TILE: usize = 8;

/// The parameters of a layer norm.
#[derive(Clone, Copy)]
pub(crate) struct LayerNorm<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

/// `out = (input - mean) / sqrt(variance + eps) * weight + bias`; sums are in f64.
///
/// # Safety
/// `input` and `out` are as long as `weight` and `bias` and do not overlap.
#[inline(always)]
pub(crate) unsafe fn layer_norm(input: *const f32, norm: &LayerNorm<'_>, out: *mut f32) {
    let LayerNorm { weight, bias, eps } = *norm;
    // SAFETY: the caller's pointers have these lengths.
    let (input, out) = unsafe {
        (std::slice::from_raw_parts(input, weight.len()), std::slice::from_raw_parts_mut(out, weight.len()))
    };
    let mean = sum(input, |v| v) / input.len() as f64;
    let variance = sum(input, |v| (v - mean) * (v - mean)) / input.len() as f64;
    let (mean, factor) = (mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32);
    for (out, (v, (w, b))) in out.iter_mut().zip(input.iter().zip(weight.iter().zip(bias))) {
        *out = (v - mean) * factor * w + b;
    }
}

/// Sixteen interleaved partial sums. Indices of whole chunks are constants, so that the sums stay in
/// registers.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            sums[i] += f(f64::from(chunk[i]));
        }
    }
    for (sum, v) in sums.iter_mut().zip(rest) {
        *sum += f(f64::from(*v));
    }
    let mut count = LANES;
    while count > 1 {
        count /= 2;
        for i in 0..count {
            sums[i] += sums[i + count];
        }
    }
    sums[0]
}

/// `out = input * (1 + erf(input / sqrt(2))) / 2` for `len` values.
///
/// # Safety
/// The tier's instructions exist and the pointers have `len` values.
#[inline(always)]
pub(crate) unsafe fn gelu<S: Simd>(input: *const f32, out: *mut f32, len: usize) {
    let mut at = 0;
    while at < len {
        let lanes = LANES.min(len - at);
        // SAFETY: full vectors lie inside; the rest is computed in an array of a full vector.
        unsafe {
            if lanes == LANES {
                S::store(out.add(at), gelu_of::<S>(S::load(input.add(at))));
            } else {
                let mut rest = [0.0; LANES];
                std::ptr::copy_nonoverlapping(input.add(at), rest.as_mut_ptr(), lanes);
                S::store(rest.as_mut_ptr(), gelu_of::<S>(S::load(rest.as_ptr())));
                std::ptr::copy_nonoverlapping(rest.as_ptr(), out.add(at), lanes);
            }
        }
        at += lanes;
    }
}

/// Gelu with the error function to 1.5e-7 (Abramowitz and Stegun, formula 7.1.26).
///
/// # Safety
/// The tier's instructions exist.
#[inline(always)]
pub(crate) unsafe fn gelu_of<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let zero = S::splat(0.0);
        let size = S::max(x, S::sub(zero, x));
        let z = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::reciprocal(S::fma(z, S::splat(0.327_591_1), S::splat(1.0)));
        let mut p = S::splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            p = S::fma(p, t, S::splat(c));
        }
        // Half the complementary error function.
        let tail = S::mul(S::mul(p, t), S::mul(exp::<S>(S::mul(z, S::sub(zero, z))), S::splat(0.5)));
        // x (1 - tail) where x is positive, x tail where it is negative: the larger of x and 0, minus |x|
        // tail.
        S::sub(S::max(x, zero), S::mul(size, tail))
    }
}

/// The query heads of one key/value head of one sequence, for some of its rows. Pointers are the first value
/// of the first row and head, with the distance to the next row; keys and values begin with the sequence.
pub(crate) struct EncoderAttend<'a> {
    /// Rows of the sequence: keys and values.
    pub(crate) len: usize,
    /// Rows that attend to them.
    pub(crate) rows: usize,
    /// The position of the first of them.
    pub(crate) first: usize,
    pub(crate) head_dim: usize,
    /// Query heads, side by side.
    pub(crate) heads: usize,
    pub(crate) scores: EncoderScores,
    /// What is added to scores by distance, of one query head after the other; as long on either side as the
    /// sequence at least.
    pub(crate) distances: Option<&'a [f32]>,
    pub(crate) query: (*mut f32, usize),
    pub(crate) keys: (*mut f32, usize),
    pub(crate) values: (*mut f32, usize),
    pub(crate) out: (*mut f32, usize),
    /// [`scratch_len`] values that only this thread uses.
    pub(crate) scratch: *mut f32,
}

/// Values of scratch space for a sequence of `len` rows: keys, values, and a tile's scores.
pub(crate) const fn scratch_len(len: usize, head_dim: usize) -> usize {
    let padded = len.next_multiple_of(SCORE_POSITIONS);
    padded * head_dim + padded * head_dim.next_multiple_of(LANES) + TILE * padded
}

/// A head of a sequence in the layout of the tiles.
#[derive(Clone, Copy)]
struct HeadLayout {
    /// `[position / 32][element][position % 32]`, zero after the last position.
    keys: *const f32,
    /// `[position][element]`, `width` apart, zero after the last element.
    values: *const f32,
    width: usize,
    /// `[row of the tile][position]`, `padded` apart.
    scores: *mut f32,
    padded: usize,
    /// The first position that some row of the tile attends to.
    first: usize,
    /// The position after the last of them.
    end: usize,
}

/// Computes all rows and heads.
///
/// # Safety
/// The tier's instructions exist; the pointers cover `len` and `rows` rows; the scratch space is large
/// enough; no other thread uses it or the outputs.
#[inline(always)]
pub(crate) unsafe fn attend<S: Simd>(a: &EncoderAttend<'_>) {
    // SAFETY: tiles end at the last row.
    unsafe {
        let layout = lay_out(a);
        for head in 0..a.heads {
            let mut row = 0;
            while row < a.rows {
                row += match (S::WIDE, a.rows - row) {
                    (true, TILE..) => tile::<S, TILE, 2>(a, &layout, row, head),
                    (_, 4..) if S::WIDE => tile::<S, 4, 2>(a, &layout, row, head),
                    (_, 4..) => tile::<S, 4, 1>(a, &layout, row, head),
                    (_, 2..) => tile::<S, 2, 1>(a, &layout, row, head),
                    _ => tile::<S, 1, 1>(a, &layout, row, head),
                };
            }
        }
    }
}

#[inline(always)]
unsafe fn lay_out(a: &EncoderAttend<'_>) -> HeadLayout {
    let (dim, padded) = (a.head_dim, a.len.next_multiple_of(SCORE_POSITIONS));
    let width = dim.next_multiple_of(LANES);
    // SAFETY: keys, values and scores are adjacent in the scratch space; positions are below `len`.
    unsafe {
        let keys = a.scratch;
        let values = keys.add(padded * dim);
        let scores = values.add(padded * width);
        for range in 0..padded / SCORE_POSITIONS {
            let out = keys.add(range * SCORE_POSITIONS * dim);
            let count = SCORE_POSITIONS.min(a.len - range * SCORE_POSITIONS);
            let from = a.keys.0.add(range * SCORE_POSITIONS * a.keys.1);
            let (positions, elements) = (count / 4 * 4, dim / 4 * 4);
            for p in (0..positions).step_by(4) {
                for d in (0..elements).step_by(4) {
                    transpose_four(from.add(p * a.keys.1 + d), a.keys.1, out.add(d * SCORE_POSITIONS + p));
                }
            }
            for d in 0..dim {
                let out = out.add(d * SCORE_POSITIONS);
                let first = if d < elements { positions } else { 0 };
                for p in first..SCORE_POSITIONS {
                    *out.add(p) = if p < count { *from.add(p * a.keys.1 + d) } else { 0.0 };
                }
            }
        }
        for p in 0..a.len {
            let out = values.add(p * width);
            std::ptr::copy_nonoverlapping(a.values.0.add(p * a.values.1), out, dim);
            std::slice::from_raw_parts_mut(out.add(dim), width - dim).fill(0.0);
        }
        HeadLayout { keys, values, width, scores, padded, first: 0, end: a.len }
    }
}

/// Writes four elements of four positions, which are `stride` apart, as four positions of four elements.
#[inline(always)]
unsafe fn transpose_four(from: *const f32, stride: usize, out: *mut f32) {
    // SAFETY: the caller's pointers have four times four values.
    unsafe {
        let rows: [[f32; 4]; 4] =
            std::array::from_fn(|p| from.add(p * stride).cast::<[f32; 4]>().read_unaligned());
        for d in 0..4 {
            let column: [f32; 4] = std::array::from_fn(|p| rows[p][d]);
            out.add(d * SCORE_POSITIONS).cast::<[f32; 4]>().write_unaligned(column);
        }
    }
}

/// `R` rows of one head, `W` vectors at a time.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const W: usize>(
    a: &EncoderAttend<'_>,
    layout: &HeadLayout,
    row: usize,
    head: usize,
) -> usize {
    let dim = a.head_dim;
    let position = a.first + row;
    let (first, end) =
        (a.scores.attended(position, a.len).start, a.scores.attended(position + R - 1, a.len).end);
    let layout = &HeadLayout { first, end, ..*layout };
    // Whole groups of positions, of which the last may end in the padding: a position has the same lane in
    // every tile, so that the sums of a row have one order.
    let (from, to) = (first / SCORE_POSITIONS * SCORE_POSITIONS, end.next_multiple_of(SCORE_POSITIONS));
    // SAFETY: rows, positions and elements exist, or are padding of the scratch space.
    unsafe {
        let query: [*const f32; R] =
            std::array::from_fn(|r| a.query.0.add((row + r) * a.query.1 + head * dim).cast_const());
        let mut at = from;
        while at < to {
            score::<S, R, W>(a, layout, &query, at);
            at += W * LANES;
        }
        let mut inverse = [0.0f32; R];
        for r in 0..R {
            let scores = layout.scores.add(r * layout.padded);
            // The row attends to no position outside its own range, and none lies in the padding.
            let own = a.scores.attended(position + r, a.len);
            if let Some(distances) = a.distances {
                let width = distances.len() / a.heads;
                let at = head * width + width / 2 + own.start - (position + r);
                let scores = std::slice::from_raw_parts_mut(scores.add(own.start), own.len());
                for (score, added) in scores.iter_mut().zip(&distances[at..at + own.len()]) {
                    *score += added;
                }
            }
            std::slice::from_raw_parts_mut(scores.add(from), own.start - from).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(scores.add(own.end), to - own.end).fill(f32::NEG_INFINITY);
            inverse[r] = 1.0 / softmax::<S>(scores.add(from), to - from);
            // The least share that `exp` gives is not zero; other rows of the tile need these positions.
            std::slice::from_raw_parts_mut(scores.add(from), own.start - from).fill(0.0);
            std::slice::from_raw_parts_mut(scores.add(own.end), to - own.end).fill(0.0);
        }
        let mut at = 0;
        while at < layout.width {
            let out: [*mut f32; R] =
                std::array::from_fn(|r| a.out.0.add((row + r) * a.out.1 + head * dim + at));
            at += match layout.width - at {
                n if n >= W * LANES => mix::<S, R, W>(a, layout, &inverse, at, &out),
                _ => mix::<S, R, 1>(a, layout, &inverse, at, &out),
            };
        }
    }
    R
}

/// Scores of `16 · W` positions from `at` on.
#[inline(always)]
unsafe fn score<S: Simd, const R: usize, const W: usize>(
    a: &EncoderAttend<'_>,
    layout: &HeadLayout,
    query: &[*const f32; R],
    at: usize,
) {
    // SAFETY: the positions are in one range of `SCORE_POSITIONS`.
    unsafe {
        let keys =
            layout.keys.add(at / SCORE_POSITIONS * SCORE_POSITIONS * a.head_dim + at % SCORE_POSITIONS);
        let mut sums = [[S::splat(0.0); W]; R];
        for d in 0..a.head_dim {
            let keys: [S::F; W] = std::array::from_fn(|w| S::load(keys.add(d * SCORE_POSITIONS + w * LANES)));
            for r in 0..R {
                let q = S::splat(*query[r].add(d));
                for w in 0..W {
                    sums[r][w] = S::fma(q, keys[w], sums[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                let score = S::mul(sums[r][w], S::splat(a.scores.scale));
                S::store(layout.scores.add(r * layout.padded + at + w * LANES), score);
            }
        }
    }
}

/// Replaces scores by `exp(score - max)` and returns their sum.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: *mut f32, len: usize) -> f32 {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: `len` is a multiple of the lanes.
    unsafe {
        let mut max = S::load(scores);
        for i in 1..len / LANES {
            max = S::max(max, S::load(scores.add(i * LANES)));
        }
        let max = S::splat(S::largest(max));
        let mut sum = S::splat(0.0);
        for i in 0..len / LANES {
            let share = exp::<S>(S::sub(S::load(scores.add(i * LANES)), max));
            S::store(scores.add(i * LANES), share);
            sum = S::add(sum, share);
        }
        S::store(lanes.as_mut_ptr(), sum);
    }
    tree_sum(&lanes)
}

/// `Σ share · value / Σ share` of `16 · W` elements from `at` on.
#[inline(always)]
unsafe fn mix<S: Simd, const R: usize, const W: usize>(
    a: &EncoderAttend<'_>,
    layout: &HeadLayout,
    inverse: &[f32; R],
    at: usize,
    out: &[*mut f32; R],
) -> usize {
    // SAFETY: elements up to the padded width exist in the scratch space; only the head's elements are
    // stored.
    unsafe {
        let mut sums = [[S::splat(0.0); W]; R];
        for p in layout.first..layout.end {
            let values: [S::F; W] =
                std::array::from_fn(|w| S::load(layout.values.add(p * layout.width + at + w * LANES)));
            for r in 0..R {
                let share = S::splat(*layout.scores.add(r * layout.padded + p));
                for w in 0..W {
                    sums[r][w] = S::fma(share, values[w], sums[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                let value = S::mul(sums[r][w], S::splat(inverse[r]));
                let first = at + w * LANES;
                if first + LANES <= a.head_dim {
                    S::store(out[r].add(w * LANES), value);
                } else {
                    let mut lanes = [0.0f32; LANES];
                    S::store(lanes.as_mut_ptr(), value);
                    let rest = a.head_dim - first;
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), out[r].add(w * LANES), rest);
                }
            }
        }
    }
    W * LANES
}
