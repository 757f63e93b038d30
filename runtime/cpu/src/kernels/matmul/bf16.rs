//! Weights of bf16 times activations that were rounded to bf16; sums are f32.

use super::{MatMul, Side, finish};
use crate::kernels::{quantise::Bf16Rows, simd::LANES, x86::DotBf16};

/// Rows of a tile, with 32 registers.
const TILE: usize = 12;

/// Runs a share.
///
/// # Safety
/// As [`super::blocks::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: DotBf16>(job: &MatMul<'_>, x: &Bf16Rows) {
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        let mut row = 0;
        while row < job.rows {
            let at = (unit, row);
            // SAFETY: the rows of a tile are below the count.
            row += unsafe {
                match (job.rows - row).min(TILE) {
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
                    _ => tile::<S, TILE>(job, at, &sides, x),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: DotBf16, const R: usize>(
    job: &MatMul<'_>,
    (unit, row): (usize, usize),
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
        finish::<S>(job, unit, (row, R));
    }
    R
}
