//! Quantised weights times activations that are quantised by blocks of columns.

use super::{MatMul, Side, finish, forms::Quant};
use crate::{
    kernels::{
        quantise::{BLOCK_RECORD_BYTES, BLOCK_TILE, BlockScaledRows, Layout, RECORD},
        simd::{LANES, Simd},
    },
    pack::Form,
};

/// Distance of the prefetch in a stream of weights, in bytes.
const PREFETCH_BYTES: usize = 2048;

/// Computes a share of a projection.
///
/// # Safety
/// The tier's instructions exist; pointers cover the rows and the matrix's features; no other thread touches
/// the outputs of these units.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, Q: Quant>(job: &MatMul<'_>, x: &BlockScaledRows) {
    debug_assert!(x.layout() == Layout::Interleaved);
    // 16 registers hold the sums of three rows, half a stored tile.
    let most = if S::WIDE { BLOCK_TILE } else { BLOCK_TILE / 2 };
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        let mut row = 0;
        while row < job.rows {
            let x = x.record(row);
            // SAFETY: the rows of a tile are below the count and in one stored tile.
            row += unsafe {
                match (job.rows - row).min(most) {
                    1 => tile::<S, Q, 1>(job, unit, row, &sides, x),
                    2 => tile::<S, Q, 2>(job, unit, row, &sides, x),
                    3 => tile::<S, Q, 3>(job, unit, row, &sides, x),
                    4 => tile::<S, Q, 4>(job, unit, row, &sides, x),
                    5 => tile::<S, Q, 5>(job, unit, row, &sides, x),
                    _ => tile::<S, Q, BLOCK_TILE>(job, unit, row, &sides, x),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, Q: Quant, const R: usize>(
    job: &MatMul<'_>,
    unit: usize,
    row: usize,
    sides: &[Side; 2],
    x: *const u8,
) -> usize {
    // SAFETY: blocks lie inside the groups and the row's records.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        for b in 0..job.matrix.blocks() {
            let x = x.add(b * BLOCK_RECORD_BYTES);
            let values = [0, 1].map(|g| sides[g].values.add(b * Q::FORM.block_bytes()));
            // The first tile reads a unit's weights from memory, later tiles read them from a cache.
            if row == 0 {
                for line in 0..Q::FORM.block_bytes() / 64 {
                    S::prefetch(values[0].wrapping_add(line * 64 + PREFETCH_BYTES));
                    S::prefetch(values[1].wrapping_add(line * 64 + PREFETCH_BYTES));
                }
            }
            if Q::HALVES {
                let mut dots = start::<S, Q, R>(x, RECORD.minus_first);
                step::<S, Q, R, 0>(values, x, &mut dots);
                step::<S, Q, R, 1>(values, x, &mut dots);
                step::<S, Q, R, 2>(values, x, &mut dots);
                step::<S, Q, R, 3>(values, x, &mut dots);
                add_scaled::<S, Q, R>(sides, &BlockDots { b, half: 0, x, dots }, &mut sums);
                let mut dots = start::<S, Q, R>(x, RECORD.minus_second);
                step::<S, Q, R, 4>(values, x, &mut dots);
                step::<S, Q, R, 5>(values, x, &mut dots);
                step::<S, Q, R, 6>(values, x, &mut dots);
                step::<S, Q, R, 7>(values, x, &mut dots);
                add_scaled::<S, Q, R>(sides, &BlockDots { b, half: 1, x, dots }, &mut sums);
            } else {
                // Steps that share a vector of nibbles are adjacent.
                let mut dots = start::<S, Q, R>(x, RECORD.minus);
                step::<S, Q, R, 0>(values, x, &mut dots);
                step::<S, Q, R, 4>(values, x, &mut dots);
                step::<S, Q, R, 1>(values, x, &mut dots);
                step::<S, Q, R, 5>(values, x, &mut dots);
                step::<S, Q, R, 2>(values, x, &mut dots);
                step::<S, Q, R, 6>(values, x, &mut dots);
                step::<S, Q, R, 3>(values, x, &mut dots);
                step::<S, Q, R, 7>(values, x, &mut dots);
                add_scaled::<S, Q, R>(sides, &BlockDots { b, half: 0, x, dots }, &mut sums);
            }
        }
        for r in 0..R {
            S::store(job.sums(r), sums[0][r]);
            S::store(job.sums(r).add(LANES), sums[1][r]);
        }
        finish::<S>(job, unit, row, R);
    }
    R
}

/// The initial value of a block's integer sums: minus the quants' centre times the sum of the activations,
/// which the record has negated at `minus`.
#[inline(always)]
unsafe fn start<S: Simd, Q: Quant, const R: usize>(x: *const u8, minus: usize) -> [[S::I; R]; 2] {
    // SAFETY: the record has the sums of `R` rows.
    unsafe {
        let mut dots = [[S::zero_i(); R]; 2];
        let Some(centre) = Q::CENTRE else { return dots };
        if is_bytes::<Q>() && !S::DOT_IS_OFFSET {
            return dots;
        }
        for r in 0..R {
            let sum = S::splat_i(x.add(minus + 4 * r).cast::<i32>().read_unaligned());
            let first = S::shl(sum, centre);
            dots[0][r] = first;
            dots[1][r] = first;
        }
        dots
    }
}

#[inline(always)]
const fn is_bytes<Q: Quant>() -> bool {
    matches!(Q::FORM, Form::Q8)
}

/// Adds columns `4 K .. 4 K + 4`.
#[inline(always)]
unsafe fn step<S: Simd, Q: Quant, const R: usize, const K: usize>(
    values: [*const u8; 2],
    x: *const u8,
    dots: &mut [[S::I; R]; 2],
) {
    // SAFETY: block and record have 32 columns.
    unsafe {
        let weights = [Q::four::<S>(values[0], K), Q::four::<S>(values[1], K)];
        for r in 0..R {
            let four = x.add((K * BLOCK_TILE + r) * 4).cast::<i32>().read_unaligned();
            for g in 0..2 {
                dots[g][r] = if is_bytes::<Q>() {
                    S::dot_i8(dots[g][r], weights[g], four)
                } else {
                    S::dot_u4(dots[g][r], weights[g], four)
                };
            }
        }
    }
}

/// The integer sums of `R` rows over half a block, or over a whole one.
struct BlockDots<S: Simd, const R: usize> {
    b: usize,
    half: usize,
    /// The record of the rows' block.
    x: *const u8,
    dots: [[S::I; R]; 2],
}

/// Scales a block's integer sums and adds them to the rows' sums.
#[inline(always)]
unsafe fn add_scaled<S: Simd, Q: Quant, const R: usize>(
    sides: &[Side; 2],
    block: &BlockDots<S, R>,
    sums: &mut [[S::F; R]; 2],
) {
    let BlockDots { b, half, x, dots } = *block;
    // SAFETY: the block has scales, the record those of `R` rows.
    unsafe {
        for g in 0..2 {
            let scale = Q::scale::<S>(sides[g].scales, b, half);
            for r in 0..R {
                let own = S::splat(x.add(RECORD.scale + 4 * r).cast::<f32>().read_unaligned());
                sums[g][r] = S::fma(S::to_f(dots[g][r]), S::mul(scale, own), sums[g][r]);
            }
            if Q::CENTRE.is_none() {
                let min = Q::min::<S>(sides[g].scales, b);
                for r in 0..R {
                    let sum = S::splat(x.add(RECORD.scaled_sum + 4 * r).cast::<f32>().read_unaligned());
                    sums[g][r] = S::fma(min, sum, sums[g][r]);
                }
            }
        }
    }
}
