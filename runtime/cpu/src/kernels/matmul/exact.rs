//! Weights as f32 times f32 activations.
//!
//! Sums are formed over [`CHUNK_BLOCKS`] blocks of columns at a time, in the columns' order, and added up chunk by chunk.
//! A chunk of a unit's weights stays in the nearest cache while the rows pass.

use super::{MatMul, Rows, finish, forms::Unpack};
use crate::{
    kernels::simd::{LANES, Simd},
    pack::BLOCK_COLS,
};

/// Rows whose sums are kept while the chunks of columns pass.
pub(crate) const ROW_BLOCK: usize = 48;
const CHUNK_BLOCKS: usize = 8;
const CHUNK_COLS: usize = CHUNK_BLOCKS * BLOCK_COLS;
/// Values of a unit's unpacked chunk.
pub(crate) const PANELS_LEN: usize = 2 * CHUNK_COLS * LANES;
/// Rows of a tile with 32 registers, and with 16.
const TILE: usize = 12;
const SMALL_TILE: usize = 3;

const _: () = assert!(ROW_BLOCK.is_multiple_of(TILE) && ROW_BLOCK.is_multiple_of(SMALL_TILE));

/// Runs a share.
///
/// # Safety
/// As [`super::blocks::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, U: Unpack>(job: &MatMul<'_>, x: Rows) {
    for unit in job.units.clone() {
        let mut first_row = 0;
        while first_row < job.rows {
            let count = ROW_BLOCK.min(job.rows - first_row);
            // SAFETY: rows and columns exist.
            unsafe {
                let x = Rows { ptr: x.ptr.add(first_row * x.stride), ..x };
                for first_block in (0..job.matrix.blocks()).step_by(CHUNK_BLOCKS) {
                    chunk::<S, U>(job, (unit, first_block), (x, count));
                }
                finish::<S>(job, unit, (first_row, count));
            }
            first_row += count;
        }
    }
}

/// Adds one chunk of columns to the sums of a block of rows.
#[inline(always)]
unsafe fn chunk<S: Simd, U: Unpack>(
    job: &MatMul<'_>,
    (unit, first_block): (usize, usize),
    (x, rows): (Rows, usize),
) {
    let first = first_block * BLOCK_COLS;
    let columns = CHUNK_COLS.min(job.matrix.cols - first);
    let sides = job.sides(unit);
    let mut panels = [job.scratch.wrapping_add(ROW_BLOCK * 2 * LANES).cast_const(); 2];
    panels[1] = panels[1].wrapping_add(CHUNK_COLS * LANES);
    // SAFETY: blocks lie inside the groups; a panel has room for a chunk.
    unsafe {
        for g in 0..2 {
            if U::IS_F32 {
                panels[g] = sides[g].values.cast::<f32>().add(first * LANES);
                continue;
            }
            for b in 0..columns.div_ceil(BLOCK_COLS) {
                let columns = BLOCK_COLS.min(columns - b * BLOCK_COLS);
                let out = panels[g].cast_mut().add(b * BLOCK_COLS * LANES);
                U::block::<S>(sides[g].values, sides[g].scales, (first_block + b, columns), out);
            }
        }
        let most = if S::WIDE { TILE } else { SMALL_TILE };
        let mut row = 0;
        while row < rows {
            let x = (x.ptr.add(row * x.stride + first), x.stride);
            let part = (columns, job.sums(row), first_block == 0);
            row += match (rows - row).min(most) {
                1 => tile::<S, 1>(panels, x, part),
                2 => tile::<S, 2>(panels, x, part),
                3 => tile::<S, 3>(panels, x, part),
                4 => tile::<S, 4>(panels, x, part),
                5 => tile::<S, 5>(panels, x, part),
                6 => tile::<S, 6>(panels, x, part),
                7 => tile::<S, 7>(panels, x, part),
                8 => tile::<S, 8>(panels, x, part),
                9 => tile::<S, 9>(panels, x, part),
                10 => tile::<S, 10>(panels, x, part),
                11 => tile::<S, 11>(panels, x, part),
                _ => tile::<S, TILE>(panels, x, part),
            };
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const R: usize>(
    panels: [*const f32; 2],
    (x, stride): (*const f32, usize),
    (columns, totals, is_first): (usize, *mut f32, bool),
) -> usize {
    // SAFETY: panels and rows have `columns` columns, the totals room for `R` rows.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        let rows: [*const f32; R] = std::array::from_fn(|r| x.add(r * stride));
        for c in 0..columns {
            let weights = [S::load(panels[0].add(c * LANES)), S::load(panels[1].add(c * LANES))];
            for r in 0..R {
                let value = S::splat(*rows[r].add(c));
                sums[0][r] = S::fma(weights[0], value, sums[0][r]);
                sums[1][r] = S::fma(weights[1], value, sums[1][r]);
            }
        }
        for r in 0..R {
            for g in 0..2 {
                let total = totals.add((2 * r + g) * LANES);
                let before = if is_first { S::splat(0.0) } else { S::load(total) };
                S::store(total, S::add(before, sums[g][r]));
            }
        }
    }
    R
}
