//! Weights as f32 times f32 activations.
//!
//! Sums are formed over [`CHUNK_BLOCKS`] blocks of columns at a time, in the columns' order, and added up
//! chunk by chunk. A chunk of a unit's weights stays in the first-level cache while all rows of a strip use
//! it.

use super::{Floats, MatMul, Rows, finish, forms::Unpack};
use crate::{
    kernels::simd::{LANES, Simd},
    pack::BLOCK_COLS,
};

/// Rows of a strip: their sums stay in scratch memory while the chunks of columns are added.
pub(crate) const STRIP_ROWS: usize = 48;
const CHUNK_BLOCKS: usize = 8;
const CHUNK_COLS: usize = CHUNK_BLOCKS * BLOCK_COLS;
/// Values of a unit's unpacked chunk of columns.
pub(crate) const PANELS_LEN: usize = 2 * CHUNK_COLS * LANES;
/// Rows of a tile with 32 vector registers, and with 16.
const TILE: usize = super::MOST_ROWS;
const SMALL_TILE: usize = 3;

const _: () = assert!(STRIP_ROWS.is_multiple_of(TILE) && STRIP_ROWS.is_multiple_of(SMALL_TILE));

/// Computes a share of a projection.
///
/// # Safety
/// As [`super::block_scaled::run`].
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, U: Unpack>(job: &MatMul<'_>, x: Rows) {
    for unit in job.units.clone() {
        let mut first_row = 0;
        while first_row < job.rows {
            let count = STRIP_ROWS.min(job.rows - first_row);
            // SAFETY: rows and columns exist.
            unsafe {
                let x = Rows { ptr: x.ptr.add(first_row * x.stride), ..x };
                for first_block in (0..job.matrix.blocks()).step_by(CHUNK_BLOCKS) {
                    chunk::<S, U>(job, unit, first_block, &Strip { x, rows: count });
                }
                finish::<S>(job, unit, first_row, count);
            }
            first_row += count;
        }
    }
}

/// Consecutive rows of the input, at most [`STRIP_ROWS`].
#[derive(Clone, Copy)]
struct Strip {
    x: Rows,
    rows: usize,
}

/// Adds one chunk of columns to the sums of a strip of rows.
#[inline(always)]
unsafe fn chunk<S: Simd, U: Unpack>(job: &MatMul<'_>, unit: usize, first_block: usize, strip: &Strip) {
    let Strip { x, rows } = *strip;
    let first = first_block * BLOCK_COLS;
    let columns = CHUNK_COLS.min(job.matrix.cols - first);
    let sides = job.sides(unit);
    let strip = Strip { x: Rows { ptr: x.ptr.wrapping_add(first), ..x }, rows };
    let most = if S::WIDE { TILE } else { SMALL_TILE };
    // SAFETY: blocks lie inside the groups; a panel has room for a chunk.
    unsafe {
        if U::IS_F32 || U::HAS_COLUMNS && rows <= most {
            let weights = Chunk { values: [sides[0].values, sides[1].values], first, columns };
            return tiles::<S, U>(job, &weights, &strip, first_block == 0);
        }
        let panels = job.scratch.add(STRIP_ROWS * 2 * LANES);
        let panels = [panels, panels.add(CHUNK_COLS * LANES)];
        for g in 0..2 {
            for b in 0..columns.div_ceil(BLOCK_COLS) {
                let columns = BLOCK_COLS.min(columns - b * BLOCK_COLS);
                let out = panels[g].add(b * BLOCK_COLS * LANES);
                U::block::<S>(sides[g].values, sides[g].scales, first_block + b, columns, out);
            }
        }
        let values = panels.map(|panel| panel.cast_const().cast());
        tiles::<S, Floats>(job, &Chunk { values, first: 0, columns }, &strip, first_block == 0);
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
unsafe fn tiles<S: Simd, U: Unpack>(job: &MatMul<'_>, weights: &Chunk, strip: &Strip, is_first: bool) {
    let Strip { x, rows } = *strip;
    let most = if S::WIDE { TILE } else { SMALL_TILE };
    let mut row = 0;
    while row < rows {
        let x = Rows { ptr: x.ptr.wrapping_add(row * x.stride), ..x };
        // SAFETY: the rows of a tile are below the count.
        row += unsafe { by_rows!((rows - row).min(most), tile::<S, U>(weights, x, job.sums(row), is_first)) };
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, U: Unpack, const R: usize>(
    weights: &Chunk,
    x: Rows,
    totals: *mut f32,
    is_first: bool,
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
