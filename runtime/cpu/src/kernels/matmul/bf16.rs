//! Weights of bf16 times activations that were rounded to bf16; sums are f32.

use super::{MatMul, Side, finish};
use crate::kernels::{quantise::Bf16Rows, simd::LANES, x86::DotBf16};

/// Rows of a tile with 32 registers.
const TILE: usize = super::MOST_ROWS;

/// Computes a share of a projection.
///
/// # Safety
/// As [`super::block_scaled::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: DotBf16>(job: &MatMul<'_>, x: &Bf16Rows) {
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        let mut row = 0;
        while row < job.rows {
            // SAFETY: the rows of a tile are below the count.
            row += unsafe { by_rows!((job.rows - row).min(TILE), tile::<S>(job, unit, row, &sides, x)) };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: DotBf16, const R: usize>(
    job: &MatMul<'_>,
    unit: usize,
    row: usize,
    sides: &[Side; 2],
    x: &Bf16Rows,
) -> usize {
    // SAFETY: pairs of columns lie inside the groups and the rows.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        let rows: [*const i32; R] = std::array::from_fn(|r| x.row(row + r).cast());
        for k in 0..job.matrix.blocks() * 16 {
            let weights = [S::load_i(sides[0].values.add(k * 64)), S::load_i(sides[1].values.add(k * 64))];
            each_row!(R, r => {
                let pair = rows[r].add(k).read_unaligned();
                sums[0][r] = S::dot_bf16(sums[0][r], weights[0], pair);
                sums[1][r] = S::dot_bf16(sums[1][r], weights[1], pair);
            });
        }
        each_row!(R, r => {
            S::store(job.sums(r), sums[0][r]);
            S::store(job.sums(r).add(LANES), sums[1][r]);
        });
        finish::<S>(job, unit, row, R);
    }
    R
}
