//! Weights with one scale per feature times activations with one scale per row.
//!
//! Between the first and the last column of a row there are only integer products, so a tile runs near the
//! processor's peak.

use super::{MatMul, Side, finish};
use crate::kernels::{
    quantise::{INT8_TILE, Int8Rows, Layout},
    simd::{LANES, Simd},
};

/// Rows of a strip, four tiles: all units are computed for them before the next strip. With 384 columns they
/// take 18 KiB and a unit's weights 12 KiB, so both stay in the first-level cache, and outputs that are a row
/// apart use no more pages than the address translations of that cache hold.
const STRIP_ROWS: usize = 4 * INT8_TILE;

const _: () = assert!(INT8_TILE == super::MOST_ROWS);

/// Computes a share of a projection.
///
/// # Safety
/// As [`super::block_scaled::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(job: &MatMul<'_>, x: &Int8Rows) {
    debug_assert!(x.layout() == Layout::Interleaved);
    let mut first = 0;
    while first < job.rows {
        let rows = first..job.rows.min(first + STRIP_ROWS);
        for unit in job.units.clone() {
            // SAFETY: the caller's contract is the same.
            unsafe { unit_rows::<S>(job, unit, rows.clone(), x) };
        }
        first += STRIP_ROWS;
    }
}

/// Computes rows of one unit; the first row is the first of a stored tile.
#[inline(always)]
unsafe fn unit_rows<S: Simd>(job: &MatMul<'_>, unit: usize, rows: std::ops::Range<usize>, x: &Int8Rows) {
    let most = if S::WIDE { INT8_TILE } else { INT8_TILE / 4 };
    let sides = job.sides(unit);
    let mut row = rows.start;
    while row < rows.end {
        // SAFETY: the rows of a tile are below the count and in one stored tile.
        row += unsafe { by_rows!((rows.end - row).min(most), tile::<S>(job, unit, row, &sides, x)) };
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const R: usize>(
    job: &MatMul<'_>,
    unit: usize,
    row: usize,
    sides: &[Side; 2],
    x: &Int8Rows,
) -> usize {
    // SAFETY: steps lie inside the groups and the stored tile; each row has a scale and a sum.
    unsafe {
        let mut dots = [[S::zero_i(); R]; 2];
        if S::DOT_IS_OFFSET {
            each_row!(R, r => {
                let sum = S::splat_i(*x.minus(row + r));
                dots[0][r] = S::shl(sum, 7);
                dots[1][r] = S::shl(sum, 7);
            });
        }
        let fours = x.fours(row);
        for k in 0..job.matrix.blocks() * 8 {
            let weights = [S::load_i(sides[0].values.add(k * 64)), S::load_i(sides[1].values.add(k * 64))];
            let fours = fours.add(k * INT8_TILE);
            each_row!(R, r => {
                let four = *fours.add(r);
                dots[0][r] = S::dot_i8(dots[0][r], weights[0], four);
                dots[1][r] = S::dot_i8(dots[1][r], weights[1], four);
            });
        }
        let scales = [S::load(sides[0].scales.cast()), S::load(sides[1].scales.cast())];
        each_row!(R, r => {
            let own = S::splat(*x.scale(row + r));
            S::store(job.sums(r), S::mul(S::to_f(dots[0][r]), S::mul(scales[0], own)));
            S::store(job.sums(r).add(LANES), S::mul(S::to_f(dots[1][r]), S::mul(scales[1], own)));
        });
        finish::<S>(job, unit, row, R);
    }
    R
}
