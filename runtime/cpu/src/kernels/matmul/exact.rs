//! Weights as f32 times f32 activations.
//!
//! Sums are formed over [`CHUNK_BLOCKS`] blocks of columns at a time, in the columns' order, and added up chunk by chunk.
//! A chunk of a unit's weights stays in the nearest cache while the rows pass.

use super::{Floats, MatMul, Rows, finish, forms::Unpack};
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
const TILE: usize = super::MOST_ROWS;
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
    let x = Rows { ptr: x.ptr.wrapping_add(first), ..x };
    let most = if S::WIDE { TILE } else { SMALL_TILE };
    // SAFETY: blocks lie inside the groups; a panel has room for a chunk.
    unsafe {
        if U::IS_F32 || U::HAS_COLUMNS && rows <= most {
            let weights = Chunk { values: [sides[0].values, sides[1].values], first, columns };
            return tiles::<S, U>(job, &weights, (x, rows), first_block == 0);
        }
        let panels = job.scratch.add(ROW_BLOCK * 2 * LANES);
        let panels = [panels, panels.add(CHUNK_COLS * LANES)];
        for g in 0..2 {
            for b in 0..columns.div_ceil(BLOCK_COLS) {
                let columns = BLOCK_COLS.min(columns - b * BLOCK_COLS);
                let out = panels[g].add(b * BLOCK_COLS * LANES);
                U::block::<S>(sides[g].values, sides[g].scales, (first_block + b, columns), out);
            }
        }
        let values = panels.map(|panel| panel.cast_const().cast());
        tiles::<S, Floats>(job, &Chunk { values, first: 0, columns }, (x, rows), first_block == 0);
    }
}

/// Some columns of a unit.
struct Chunk {
    /// Of both groups.
    values: [*const u8; 2],
    first: usize,
    columns: usize,
}

/// Adds a chunk to the sums of rows that begin with its first column.
#[inline(always)]
unsafe fn tiles<S: Simd, U: Unpack>(
    job: &MatMul<'_>,
    weights: &Chunk,
    (x, rows): (Rows, usize),
    is_first: bool,
) {
    let most = if S::WIDE { TILE } else { SMALL_TILE };
    let mut row = 0;
    while row < rows {
        let x = Rows { ptr: x.ptr.wrapping_add(row * x.stride), ..x };
        let sums = (job.sums(row), is_first);
        // SAFETY: the rows of a tile are below the count.
        row += unsafe { by_rows!((rows - row).min(most), tile::<S, U>(weights, x, sums)) };
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, U: Unpack, const R: usize>(
    weights: &Chunk,
    x: Rows,
    (totals, is_first): (*mut f32, bool),
) -> usize {
    let Chunk { values, first, columns } = *weights;
    // SAFETY: weights and rows have the columns, the totals room for `R` rows.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        let rows: [*const f32; R] = std::array::from_fn(|r| x.ptr.add(r * x.stride));
        for c in 0..columns {
            let weights = [U::column::<S>(values[0], first + c), U::column::<S>(values[1], first + c)];
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
