//! Quantised weights times activations that are quantised by blocks.

use super::{MatMul, Side, finish, forms::Quant};
use crate::{
    kernels::{
        quantise::{BLOCK_RECORD_BYTES, BLOCK_TILE, BlockRows, Layout, RECORD},
        simd::{LANES, Simd},
    },
    pack::Form,
};

/// How far ahead a stream of weights is asked for, in bytes.
const PREFETCH_BYTES: usize = 2048;

/// Runs a share.
///
/// # Safety
/// The tier's instructions exist; pointers cover the rows and the matrix's features; no other thread touches the outputs
/// of these units.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, Q: Quant>(job: &MatMul<'_>, x: &BlockRows) {
    debug_assert!(x.layout() == Layout::Interleaved);
    // With 16 registers there is room for three rows' sums, half a stored tile.
    let most = if S::WIDE { BLOCK_TILE } else { BLOCK_TILE / 2 };
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        let mut row = 0;
        while row < job.rows {
            let (at, x) = ((unit, row), x.record(row));
            // SAFETY: the rows of a tile are below the count and in one stored tile.
            row += unsafe {
                match (job.rows - row).min(most) {
                    1 => tile::<S, Q, 1>(job, at, &sides, x),
                    2 => tile::<S, Q, 2>(job, at, &sides, x),
                    3 => tile::<S, Q, 3>(job, at, &sides, x),
                    4 => tile::<S, Q, 4>(job, at, &sides, x),
                    5 => tile::<S, Q, 5>(job, at, &sides, x),
                    _ => tile::<S, Q, BLOCK_TILE>(job, at, &sides, x),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, Q: Quant, const R: usize>(
    job: &MatMul<'_>,
    (unit, row): (usize, usize),
    sides: &[Side; 2],
    x: *const u8,
) -> usize {
    // SAFETY: blocks lie inside the groups and the row's records.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        for b in 0..job.matrix.blocks() {
            let x = x.add(b * BLOCK_RECORD_BYTES);
            let values = [0, 1].map(|g| sides[g].values.add(b * Q::FORM.block_bytes()));
            // The first tile finds a unit's weights in memory, those after it in the caches.
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
                scaled::<S, Q, R>(sides, (b, 0), (x, &dots), &mut sums);
                let mut dots = start::<S, Q, R>(x, RECORD.minus_second);
                step::<S, Q, R, 4>(values, x, &mut dots);
                step::<S, Q, R, 5>(values, x, &mut dots);
                step::<S, Q, R, 6>(values, x, &mut dots);
                step::<S, Q, R, 7>(values, x, &mut dots);
                scaled::<S, Q, R>(sides, (b, 1), (x, &dots), &mut sums);
            } else {
                // Steps that share a vector of nibbles follow each other.
                let mut dots = start::<S, Q, R>(x, RECORD.minus);
                step::<S, Q, R, 0>(values, x, &mut dots);
                step::<S, Q, R, 4>(values, x, &mut dots);
                step::<S, Q, R, 1>(values, x, &mut dots);
                step::<S, Q, R, 5>(values, x, &mut dots);
                step::<S, Q, R, 2>(values, x, &mut dots);
                step::<S, Q, R, 6>(values, x, &mut dots);
                step::<S, Q, R, 3>(values, x, &mut dots);
                step::<S, Q, R, 7>(values, x, &mut dots);
                scaled::<S, Q, R>(sides, (b, 0), (x, &dots), &mut sums);
            }
        }
        for r in 0..R {
            S::store(job.sums(r), sums[0][r]);
            S::store(job.sums(r).add(LANES), sums[1][r]);
        }
        finish::<S>(job, unit, (row, R));
    }
    R
}

/// What a block's integer sums begin with: minus the quants' centre times the activations' sum, which the record keeps
/// negated at `minus`.
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

/// Adds a block's integer sums to the rows' sums.
#[inline(always)]
unsafe fn scaled<S: Simd, Q: Quant, const R: usize>(
    sides: &[Side; 2],
    (b, half): (usize, usize),
    (x, dots): (*const u8, &[[S::I; R]; 2]),
    sums: &mut [[S::F; R]; 2],
) {
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
