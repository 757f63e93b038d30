//! Weights with one scale per feature times activations with one scale per row.
//!
//! Nothing but integer products happens between a row's first column and its last, which is what lets a tile come near
//! the processor's peak.

use super::{MatMul, Side, finish};
use crate::kernels::{
    quantise::{INT8_TILE, Int8Rows},
    simd::{LANES, Simd},
};

/// Runs a share.
///
/// # Safety
/// As [`super::blocks::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(job: &MatMul<'_>, x: &Int8Rows) {
    let most = if S::WIDE { INT8_TILE } else { INT8_TILE / 4 };
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        let mut row = 0;
        while row < job.rows {
            let at = (unit, row);
            // SAFETY: the rows of a tile are below the count and in one stored tile.
            row += unsafe {
                match (job.rows - row).min(most) {
                    1 => tile::<S, 1>(job, at, &sides, x),
                    2 => tile::<S, 2>(job, at, &sides, x),
                    3 => tile::<S, 3>(job, at, &sides, x),
                    4 => tile::<S, 4>(job, at, &sides, x),
                    5 => tile::<S, 5>(job, at, &sides, x),
                    6 => tile::<S, 6>(job, at, &sides, x),
                    7 => tile::<S, 7>(job, at, &sides, x),
                    8 => tile::<S, 8>(job, at, &sides, x),
                    9 => tile::<S, 9>(job, at, &sides, x),
                    10 => tile::<S, 10>(job, at, &sides, x),
                    11 => tile::<S, 11>(job, at, &sides, x),
                    _ => tile::<S, INT8_TILE>(job, at, &sides, x),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const R: usize>(
    job: &MatMul<'_>,
    (unit, row): (usize, usize),
    sides: &[Side; 2],
    x: &Int8Rows,
) -> usize {
    // SAFETY: steps lie inside the groups and the stored tile; each row has a scale and a sum.
    unsafe {
        let mut dots = [[S::zero_i(); R]; 2];
        if S::DOT_IS_OFFSET {
            for r in 0..R {
                let sum = S::splat_i(*x.minus(row + r));
                dots[0][r] = S::shl(sum, 7);
                dots[1][r] = S::shl(sum, 7);
            }
        }
        let fours = x.fours(row);
        for k in 0..job.matrix.blocks() * 8 {
            let weights = [S::load_i(sides[0].values.add(k * 64)), S::load_i(sides[1].values.add(k * 64))];
            let fours = fours.add(k * INT8_TILE);
            for r in 0..R {
                let four = *fours.add(r);
                dots[0][r] = S::dot_i8(dots[0][r], weights[0], four);
                dots[1][r] = S::dot_i8(dots[1][r], weights[1], four);
            }
        }
        for g in 0..2 {
            let scale = S::load(sides[g].scales.cast());
            for r in 0..R {
                let scale = S::mul(scale, S::splat(*x.scale(row + r)));
                S::store(job.sums(r).add(g * LANES), S::mul(S::to_f(dots[g][r]), scale));
            }
        }
        finish::<S>(job, unit, (row, R));
    }
    R
}
