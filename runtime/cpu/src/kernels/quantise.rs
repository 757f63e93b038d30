//! Quantisation of activations to 8 or 16 bits, in the layout of the tiles that read them.
//!
//! A scale covers a block of 32 columns in [`BlockScaledRows`] and a whole row in [`Int8Rows`]; [`Bf16Rows`]
//! have none.

use super::simd::{LANES, Simd};
use crate::pack::BLOCK_COLS;

/// The layout of the rows of a stored tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Interleaved by four columns, so that one pointer runs through all rows; for kernels on vectors.
    Interleaved,
    /// One whole row after the other; for tile registers.
    Stacked,
}

/// Rows of a stored tile whose rows are stacked.
pub(crate) const STACKED_TILE: usize = 16;
/// Rows of a stored tile of interleaved [`BlockScaledRows`].
pub(crate) const BLOCK_TILE: usize = 6;
/// Rows of a stored tile of interleaved [`Int8Rows`].
pub(crate) const INT8_TILE: usize = 12;

/// The offsets of the fields of a tile's record of one block, in bytes. Values are first,
/// `[column / 4][row][column % 4]`.
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

/// The offsets in a record.
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

/// Offset of each row's f32 scale in a stacked tile's record of one block, after its values `[row][column]`.
pub(crate) const STACKED_SCALE: usize = STACKED_TILE * BLOCK_COLS;
/// Offset of the scale times the sum of the quants.
pub(crate) const STACKED_SCALED_SUM: usize = STACKED_SCALE + 4 * STACKED_TILE;
/// Bytes of that record.
pub(crate) const STACKED_RECORD_BYTES: usize = STACKED_SCALED_SUM + 4 * STACKED_TILE;

/// Rows quantised by blocks.
pub(crate) struct BlockScaledRows {
    memory: *mut u8,
    blocks: usize,
    layout: Layout,
}

impl BlockScaledRows {
    /// Bytes that `rows` rows of `cols` columns (whole blocks) take in the larger layout.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        let interleaved = rows.div_ceil(BLOCK_TILE) * BLOCK_RECORD_BYTES;
        let stacked = rows.div_ceil(STACKED_TILE) * STACKED_RECORD_BYTES;
        cols / BLOCK_COLS * if interleaved > stacked { interleaved } else { stacked }
    }

    /// Rows in memory of [`Self::bytes`].
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the rows.
    pub(crate) const unsafe fn new(memory: *mut u8, cols: usize, layout: Layout) -> Self {
        Self { memory, blocks: cols / BLOCK_COLS, layout }
    }

    /// The layout of the rows.
    pub(crate) const fn layout(&self) -> Layout {
        self.layout
    }

    /// The first record of a row's interleaved tile, moved so that the row is the tile's first.
    pub(crate) const fn record(&self, row: usize) -> *const u8 {
        let tile = row / BLOCK_TILE * self.blocks * BLOCK_RECORD_BYTES;
        self.memory.wrapping_add(tile + row % BLOCK_TILE * 4).cast_const()
    }

    /// The first record of a row's stacked tile.
    pub(crate) const fn stacked_record(&self, row: usize) -> *const u8 {
        self.memory.wrapping_add(row / STACKED_TILE * self.blocks * STACKED_RECORD_BYTES).cast_const()
    }

    /// Sets the scales of a stacked tile's unused rows, those after row `rows - 1`, to zero. Their results
    /// are never read, but the values there may be subnormal, and computing with subnormal numbers takes a
    /// hundred times as long.
    ///
    /// # Safety
    /// No other thread uses row `rows - 1` during the call.
    pub(crate) unsafe fn end(&self, rows: usize) {
        let used = rows % STACKED_TILE;
        if self.layout == Layout::Interleaved || used == 0 {
            return;
        }
        for b in 0..self.blocks {
            let record = self.stacked_record(rows - 1).cast_mut().wrapping_add(b * STACKED_RECORD_BYTES);
            for at in [STACKED_SCALE, STACKED_SCALED_SUM] {
                // SAFETY: the tile's record has these numbers of sixteen rows.
                unsafe { record.add(at + 4 * used).write_bytes(0, 4 * (STACKED_TILE - used)) };
            }
        }
    }

    /// Quantises one row: `scale = max |x| / 127`, nearest integers, halves to even.
    ///
    /// # Safety
    /// The tier's instructions exist; `input` has the columns; no other thread uses row `row` now.
    #[inline(always)]
    pub(crate) unsafe fn fill<S: Simd>(&self, row: usize, input: *const f32) {
        for b in 0..self.blocks {
            // SAFETY: the block lies inside the row, its record inside the memory.
            unsafe {
                let x = input.add(b * BLOCK_COLS);
                let x = [S::load(x), S::load(x.add(LANES))];
                let largest = S::largest(S::max(magnitude::<S>(x[0]), magnitude::<S>(x[1])));
                let inverse = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
                let quants = [S::round_i(S::mul(x[0], inverse)), S::round_i(S::mul(x[1], inverse))];
                let mut bytes = [0i8; BLOCK_COLS];
                S::store_i8(bytes.as_mut_ptr(), quants[0]);
                S::store_i8(bytes.as_mut_ptr().add(LANES), quants[1]);
                let (scale, sums) = (largest / 127.0, [S::sum_i(quants[0]), S::sum_i(quants[1])]);
                if self.layout == Layout::Stacked {
                    let record = self.stacked_record(row).cast_mut().add(b * STACKED_RECORD_BYTES);
                    let row = row % STACKED_TILE;
                    record.add(row * BLOCK_COLS).cast::<[i8; BLOCK_COLS]>().write(bytes);
                    *record.add(STACKED_SCALE + 4 * row).cast::<f32>() = scale;
                    *record.add(STACKED_SCALED_SUM + 4 * row).cast::<f32>() =
                        scale * (sums[0] + sums[1]) as f32;
                    continue;
                }
                let record = self.record(row).cast_mut().add(b * BLOCK_RECORD_BYTES);
                for k in 0..BLOCK_COLS / 4 {
                    let four = bytes.as_ptr().add(4 * k).cast::<i32>().read_unaligned();
                    *record.add(4 * k * BLOCK_TILE).cast::<i32>() = four;
                }
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

/// Sixteen values of a row from column `at` on; zeros after its last.
#[inline(always)]
unsafe fn vector<S: Simd>(row: *const f32, at: usize, cols: usize) -> S::F {
    // SAFETY: full vectors lie inside the row; the rest is copied to an array.
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
    layout: Layout,
}

/// Columns of one step of a tile register; stacked rows are filled up with zeros to whole steps.
const STACKED_COLS: usize = 64;

impl Int8Rows {
    /// Bytes that `rows` rows of `cols` columns take in the larger layout.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        let interleaved = rows.div_ceil(INT8_TILE) * Self::tile_bytes(cols, Layout::Interleaved);
        let stacked = rows.div_ceil(STACKED_TILE) * Self::tile_bytes(cols, Layout::Stacked);
        if interleaved > stacked { interleaved } else { stacked }
    }

    /// Bytes of a tile: values, then for each row its f32 scale, then for each row the sum of its quants,
    /// negated.
    const fn tile_bytes(cols: usize, layout: Layout) -> usize {
        Self::tile_rows(layout) * (Self::row_bytes(cols, layout) + 8)
    }

    const fn tile_rows(layout: Layout) -> usize {
        match layout {
            Layout::Interleaved => INT8_TILE,
            Layout::Stacked => STACKED_TILE,
        }
    }

    const fn row_bytes(cols: usize, layout: Layout) -> usize {
        cols.next_multiple_of(match layout {
            Layout::Interleaved => BLOCK_COLS,
            Layout::Stacked => STACKED_COLS,
        })
    }

    /// Rows in memory of [`Self::bytes`].
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the rows.
    pub(crate) const unsafe fn new(memory: *mut u8, cols: usize, layout: Layout) -> Self {
        Self { memory, cols, layout }
    }

    /// The layout of the rows.
    pub(crate) const fn layout(&self) -> Layout {
        self.layout
    }

    /// The first value of a row's tile.
    const fn tile(&self, row: usize) -> *mut u8 {
        let tile = row / Self::tile_rows(self.layout);
        self.memory.wrapping_add(tile * Self::tile_bytes(self.cols, self.layout))
    }

    /// The first four columns of an interleaved row; the next four are [`INT8_TILE`] later.
    pub(crate) const fn fours(&self, row: usize) -> *const i32 {
        self.tile(row).cast::<i32>().wrapping_add(row % INT8_TILE).cast_const()
    }

    /// The first column of a stacked row, and the distance to the next row's, in bytes.
    pub(crate) const fn stacked(&self, row: usize) -> (*const u8, usize) {
        let stride = Self::row_bytes(self.cols, Layout::Stacked);
        (self.tile(row).wrapping_add(row % STACKED_TILE * stride).cast_const(), stride)
    }

    /// The row's scale.
    pub(crate) const fn scale(&self, row: usize) -> *const f32 {
        let rows = Self::tile_rows(self.layout);
        let values = rows * Self::row_bytes(self.cols, self.layout);
        self.tile(row).wrapping_add(values).cast::<f32>().wrapping_add(row % rows).cast_const()
    }

    /// The sum of the row's quants, negated.
    pub(crate) const fn minus(&self, row: usize) -> *const i32 {
        self.scale(row).wrapping_add(Self::tile_rows(self.layout)).cast()
    }

    /// Quantises one row: `scale = max |x| / 127`, nearest integers, halves to even.
    ///
    /// # Safety
    /// The tier's instructions exist; `input` has the columns; no other thread uses row `row` now.
    #[inline(always)]
    pub(crate) unsafe fn fill<S: Simd>(&self, row: usize, input: *const f32) {
        // SAFETY: no other row uses these bytes.
        unsafe {
            let mut largest = S::splat(0.0);
            for at in (0..self.cols).step_by(LANES) {
                largest = S::max(largest, magnitude::<S>(vector::<S>(input, at, self.cols)));
            }
            let largest = S::largest(largest);
            let inverse = S::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
            let mut sum = S::zero_i();
            for at in (0..Self::row_bytes(self.cols, self.layout)).step_by(LANES) {
                let mut bytes = [0i8; LANES];
                if at < self.cols {
                    let quants = S::round_i(S::mul(vector::<S>(input, at, self.cols), inverse));
                    sum = S::add_i(sum, quants);
                    S::store_i8(bytes.as_mut_ptr(), quants);
                }
                self.store_lanes(row, at, bytes);
            }
            *self.scale(row).cast_mut() = largest / 127.0;
            *self.minus(row).cast_mut() = -S::sum_i(sum);
        }
    }

    /// Stores sixteen columns of a row, from `at` on.
    #[inline(always)]
    unsafe fn store_lanes(&self, row: usize, at: usize, bytes: [i8; LANES]) {
        // SAFETY: no other row uses these bytes.
        unsafe {
            match self.layout {
                Layout::Interleaved => {
                    let fours = self.fours(row).cast_mut();
                    for k in 0..LANES / 4 {
                        let four = bytes.as_ptr().add(4 * k).cast::<i32>().read_unaligned();
                        *fours.add((at / 4 + k) * INT8_TILE) = four;
                    }
                }
                Layout::Stacked => {
                    let to = self.stacked(row).0.cast_mut().add(at);
                    to.cast::<[i8; LANES]>().write(bytes);
                }
            }
        }
    }
}

/// Rows rounded to bf16, stacked, and filled up with zeros to whole blocks.
pub(crate) struct Bf16Rows {
    memory: *mut u16,
    cols: usize,
}

#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "no other processor's tier reads them yet")
)]
impl Bf16Rows {
    /// Bytes that `rows` rows of `cols` columns take, filled up to whole tile registers.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(STACKED_TILE) * cols.next_multiple_of(BLOCK_COLS) * size_of::<u16>()
    }

    /// Rows in memory of [`Self::bytes`].
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the rows.
    pub(crate) const unsafe fn new(memory: *mut u8, cols: usize) -> Self {
        Self { memory: memory.cast(), cols }
    }

    /// Distance between rows, in values.
    pub(crate) const fn stride(&self) -> usize {
        self.cols.next_multiple_of(BLOCK_COLS)
    }

    /// A row's first value.
    pub(crate) const fn row(&self, row: usize) -> *const u16 {
        self.memory.wrapping_add(row * self.stride()).cast_const()
    }

    /// Rounds one row to nearest, halves to even.
    ///
    /// # Safety
    /// `input` has the columns; no other thread uses row `row` now.
    #[inline(always)]
    pub(crate) unsafe fn fill(&self, row: usize, input: *const f32) {
        // SAFETY: no other row uses these bytes.
        let (out, input) = unsafe {
            let out = std::slice::from_raw_parts_mut(self.row(row).cast_mut(), self.stride());
            (out, std::slice::from_raw_parts(input, self.cols))
        };
        for (out, x) in out.iter_mut().zip(input) {
            *out = bf16_bits(*x);
        }
        out[self.cols..].fill(0);
    }
}

/// The nearest bf16's bits, without a branch.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // Rounding must not turn a NaN into infinity.
    (if x.is_nan() { bits >> 16 | 0x40 } else { nearest }) as u16
}
