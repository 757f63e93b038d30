//! Activations to 8 bits, laid out for the tiles that will read them.
//!
//! The rows of a tile lie interleaved by four columns, so that one pointer runs through all of them. Blocks of 32 columns
//! share a scale in [`BlockRows`], whole rows in [`Int8Rows`].

use super::simd::{LANES, Simd};
use crate::pack::BLOCK_COLS;

/// Rows of a stored tile of [`BlockRows`].
pub(crate) const BLOCK_TILE: usize = 6;
/// Rows of a stored tile of [`Int8Rows`].
pub(crate) const INT8_TILE: usize = 12;

/// Where the parts of a tile's record of one block begin, in bytes. Values lie first, `[column / 4][row][column % 4]`.
#[derive(Clone, Copy)]
pub(crate) struct Record {
    /// f32 scale of each row.
    pub(crate) scale: usize,
    /// f32 scale times the sum of the quants.
    pub(crate) scaled_sum: usize,
    /// i32 sum of the quants, negated.
    pub(crate) minus: usize,
    /// The same of columns 0..16.
    pub(crate) minus_first: usize,
    /// And of columns 16..32.
    pub(crate) minus_second: usize,
}

/// The places in a record.
pub(crate) const RECORD: Record = {
    let first = BLOCK_COLS * BLOCK_TILE;
    let each = 4 * BLOCK_TILE;
    Record {
        scale: first,
        scaled_sum: first + each,
        minus: first + 2 * each,
        minus_first: first + 3 * each,
        minus_second: first + 4 * each,
    }
};

/// Bytes of a record.
pub(crate) const BLOCK_RECORD_BYTES: usize = RECORD.minus_second + 4 * BLOCK_TILE;

/// Rows quantised by blocks.
pub(crate) struct BlockRows {
    memory: *mut u8,
    blocks: usize,
}

impl BlockRows {
    /// Bytes that `rows` rows of `cols` columns (whole blocks) take.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        rows.div_ceil(BLOCK_TILE) * (cols / BLOCK_COLS) * BLOCK_RECORD_BYTES
    }

    /// Lays rows out in memory of [`Self::bytes`].
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the rows.
    pub(crate) const unsafe fn new(memory: *mut u8, cols: usize) -> Self {
        Self { memory, blocks: cols / BLOCK_COLS }
    }

    /// The first record of a row's tile, moved so that the row is the tile's first.
    pub(crate) const fn record(&self, row: usize) -> *const u8 {
        let tile = row / BLOCK_TILE * self.blocks * BLOCK_RECORD_BYTES;
        self.memory.wrapping_add(tile + row % BLOCK_TILE * 4).cast_const()
    }

    /// Quantises one row: `scale = max |x| / 127`, nearest integers, halves to even.
    ///
    /// # Safety
    /// The tier's instructions exist; `input` has the columns; no other thread uses row `row` meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn fill<S: Simd>(&self, row: usize, input: *const f32) {
        for b in 0..self.blocks {
            // SAFETY: the block lies inside the row, its record inside the memory.
            unsafe {
                let record = self.record(row).cast_mut().add(b * BLOCK_RECORD_BYTES);
                let x = input.add(b * BLOCK_COLS);
                let x = [S::load(x), S::load(x.add(LANES))];
                let largest = S::largest(S::max(magnitude::<S>(x[0]), magnitude::<S>(x[1])));
                let inverse = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
                let quants = [S::round_i(S::mul(x[0], inverse)), S::round_i(S::mul(x[1], inverse))];
                let mut bytes = [0i8; BLOCK_COLS];
                S::store_i8(bytes.as_mut_ptr(), quants[0]);
                S::store_i8(bytes.as_mut_ptr().add(LANES), quants[1]);
                for k in 0..BLOCK_COLS / 4 {
                    let four = bytes.as_ptr().add(4 * k).cast::<i32>().read_unaligned();
                    *record.add(4 * k * BLOCK_TILE).cast::<i32>() = four;
                }
                let (scale, sums) = (largest / 127.0, [S::sum_i(quants[0]), S::sum_i(quants[1])]);
                *record.add(RECORD.scale).cast::<f32>() = scale;
                *record.add(RECORD.scaled_sum).cast::<f32>() = scale * (sums[0] + sums[1]) as f32;
                *record.add(RECORD.minus).cast::<i32>() = -sums[0] - sums[1];
                *record.add(RECORD.minus_first).cast::<i32>() = -sums[0];
                *record.add(RECORD.minus_second).cast::<i32>() = -sums[1];
            }
        }
    }
}

#[inline(always)]
unsafe fn magnitude<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe { S::max(x, S::sub(S::splat(0.0), x)) }
}

/// Sixteen values of a row from its column `at`; zeros behind its last.
#[inline(always)]
unsafe fn vector<S: Simd>(row: *const f32, at: usize, cols: usize) -> S::F {
    // SAFETY: full vectors lie inside the row, the rest goes through an array.
    unsafe {
        let n = cols - at;
        if n >= LANES {
            return S::load(row.add(at));
        }
        let mut lanes = [0.0; LANES];
        lanes[..n].copy_from_slice(std::slice::from_raw_parts(row.add(at), n));
        S::load(lanes.as_ptr())
    }
}

/// Rows quantised whole.
pub(crate) struct Int8Rows {
    memory: *mut u8,
    cols: usize,
}

impl Int8Rows {
    /// Bytes that `rows` rows of `cols` columns take.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        rows.div_ceil(INT8_TILE) * Self::tile_bytes(cols)
    }

    const fn tile_bytes(cols: usize) -> usize {
        INT8_TILE * (cols.next_multiple_of(BLOCK_COLS) + 8)
    }

    /// Lays rows out in memory of [`Self::bytes`].
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the rows.
    pub(crate) const unsafe fn new(memory: *mut u8, cols: usize) -> Self {
        Self { memory, cols }
    }

    /// The first four columns of a row; the next four follow [`INT8_TILE`] further.
    pub(crate) const fn fours(&self, row: usize) -> *const i32 {
        let tile = self.memory.wrapping_add(row / INT8_TILE * Self::tile_bytes(self.cols));
        tile.cast::<i32>().wrapping_add(row % INT8_TILE).cast_const()
    }

    /// The row's scale.
    pub(crate) const fn scale(&self, row: usize) -> *const f32 {
        self.fours(row).wrapping_add(INT8_TILE * (self.cols.next_multiple_of(BLOCK_COLS) / 4)).cast()
    }

    /// The sum of the row's quants, negated.
    pub(crate) const fn minus(&self, row: usize) -> *const i32 {
        self.scale(row).wrapping_add(INT8_TILE).cast()
    }

    /// Quantises one row: `scale = max |x| / 127`, nearest integers, halves to even.
    ///
    /// # Safety
    /// The tier's instructions exist; `input` has the columns; no other thread uses row `row` meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn fill<S: Simd>(&self, row: usize, input: *const f32) {
        // SAFETY: the row's places are its own.
        unsafe {
            let mut largest = S::splat(0.0);
            for at in (0..self.cols).step_by(LANES) {
                largest = S::max(largest, magnitude::<S>(vector::<S>(input, at, self.cols)));
            }
            let largest = S::largest(largest);
            let inverse = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let (fours, mut sum) = (self.fours(row).cast_mut(), S::zero_i());
            for at in (0..self.cols.next_multiple_of(BLOCK_COLS)).step_by(LANES) {
                let mut bytes = [0i8; LANES];
                if at < self.cols {
                    let quants = S::round_i(S::mul(vector::<S>(input, at, self.cols), inverse));
                    sum = S::add_i(sum, quants);
                    S::store_i8(bytes.as_mut_ptr(), quants);
                }
                for k in 0..LANES / 4 {
                    let four = bytes.as_ptr().add(4 * k).cast::<i32>().read_unaligned();
                    *fours.add((at / 4 + k) * INT8_TILE) = four;
                }
            }
            *self.scale(row).cast_mut() = largest / 127.0;
            *self.minus(row).cast_mut() = -S::sum_i(sum);
        }
    }
}
