//! Weights in the layout of the kernels: sixteen output features side by side, one per vector lane.
//!
//! A *group* is 16 rows of the matrix (the last is filled up with zeros), a *block* 32 columns. Reading a
//! group is one forward stream, and a dot product needs no sum across lanes. Floats are stored as
//! `[column][row]`, but bf16 in pairs `[column / 2][row][column % 2]`, as the instructions that multiply them
//! require. Quants are stored in planes, so that a step of four columns is a vector of `[row][column]`, one
//! byte each:
//!
//! * eight bits: 512 bytes `[column / 4][row][column % 4]`
//! * low four bits: 256 bytes, where step `k` of the eight is the low (`k < 4`) or high half of vector
//!   `k % 4`
//! * a fifth bit: 64 bytes, bit `k` of each for step `k`
//! * fifth and sixth: 128 bytes, bits `2 (k % 4)` of vector `k / 4` for step `k`
//!
//! Quants are unsigned, as the dot-product instructions require their first operand. The number that is
//! subtracted from them is the form's centre (`CENTRE` in the forms of [`crate::kernels::matmul`]). A second
//! stream has the scales as they are stored. Packing rounds nothing, except where a matrix of floats becomes
//! [`Form::Int8`] on purpose.

mod stored;

use std::ops::Range;

use trustformers_plan::{DType, Weight};

use crate::memory::{Piece, Store};

/// Rows per group: the lanes of the widest register.
pub(crate) const GROUP_ROWS: usize = 16;
/// Columns per block, as in the stored formats.
pub(crate) const BLOCK_COLS: usize = 32;
/// Blocks that share a scale of scales in the K quants.
pub(crate) const SUPER_BLOCKS: usize = 8;

/// A layout of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    F16,
    Bf16,
    /// Eight bits; f16 scales `[row]` per block.
    Q8,
    /// Four bits; scales as `Q8`.
    Q4,
    /// Five bits; scales as `Q8`.
    Q5,
    /// Four bits; f16 scales `[row]`, then f16 minima `[row]` per block.
    Q4Min,
    /// Four bits; per eight blocks f16 `d` and `dmin` `[row]`, then for each block bytes `scale[row]`,
    /// `min[row]`.
    Q4K,
    /// Five bits; scales as `Q4K`.
    Q5K,
    /// Six bits; per eight blocks f16 `d[row]`, then for each half block signed bytes `scale[row]`.
    Q6K,
    /// Eight bits; one f32 scale per row. The only form that rounds: see [`Packed::fill`].
    Int8,
}

impl Form {
    /// The form that keeps the values of this stored type.
    pub(crate) const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            DType::Q8_0 => Self::Q8,
            DType::Q4_1 => Self::Q4Min,
            DType::Q4_0 => Self::Q4,
            DType::Q5_0 => Self::Q5,
            DType::Q4_K => Self::Q4K,
            DType::Q5_K => Self::Q5K,
            DType::Q6_K => Self::Q6K,
        }
    }

    /// Whether it can be multiplied by activations that are quantised by blocks.
    pub(crate) const fn has_block_scales(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::Int8)
    }

    /// Bytes of a block in the first stream (a full block, for floats).
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 2048,
            Self::F16 | Self::Bf16 => 1024,
            Self::Q8 | Self::Int8 => 512,
            Self::Q4 | Self::Q4Min | Self::Q4K => 256,
            Self::Q5 | Self::Q5K => 320,
            Self::Q6K => 384,
        }
    }

    /// Bytes of the first stream. Tile registers load two blocks of [`Self::Int8`] together. Where the last
    /// block has no partner, the bytes after it are multiplied by zeros: any values will do, but the memory
    /// must exist.
    const fn value_bytes(self, groups: usize, blocks: usize) -> usize {
        let padding = match self {
            Self::Int8 => blocks % 2,
            _ => 0,
        };
        (groups * blocks + padding) * self.block_bytes()
    }

    /// 16-bit words of a group of `blocks` blocks in the second stream.
    const fn scale_words(self, blocks: usize) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Q8 | Self::Q4 | Self::Q5 => blocks * GROUP_ROWS,
            Self::Q4Min => blocks * 2 * GROUP_ROWS,
            Self::Q4K | Self::Q5K => blocks.div_ceil(SUPER_BLOCKS) * Self::SUPER_WORDS_AFFINE,
            Self::Q6K => blocks.div_ceil(SUPER_BLOCKS) * Self::SUPER_WORDS_SIGNED,
            Self::Int8 => 2 * GROUP_ROWS,
        }
    }

    /// Words of eight blocks' scales in `Q4K` and `Q5K`.
    pub(crate) const SUPER_WORDS_AFFINE: usize = 2 * GROUP_ROWS + SUPER_BLOCKS * GROUP_ROWS;
    /// Words of eight blocks' scales in `Q6K`.
    pub(crate) const SUPER_WORDS_SIGNED: usize = GROUP_ROWS + SUPER_BLOCKS * GROUP_ROWS;
}

/// A matrix in the kernels' layout.
pub(crate) struct Packed {
    pub(crate) form: Form,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    values: Piece,
    scales: Piece,
}

impl Packed {
    /// Bytes that a weight takes in a form.
    pub(crate) const fn bytes_of(form: Form, rows: usize, cols: usize) -> usize {
        let (groups, blocks) = (rows.div_ceil(GROUP_ROWS), cols.div_ceil(BLOCK_COLS));
        let values = form.value_bytes(groups, blocks);
        let scales = groups * form.scale_words(blocks) * size_of::<u16>();
        values.next_multiple_of(64) + scales.next_multiple_of(64)
    }

    /// A matrix in memory of [`Self::bytes_of`], to be filled by [`Self::fill`]. The form is that of the
    /// weight's type, or [`Form::Int8`].
    pub(crate) fn empty(form: Form, weight: &Weight, store: &mut Store) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (groups, blocks) = (rows.div_ceil(GROUP_ROWS), cols.div_ceil(BLOCK_COLS));
        let values = store.take(form.value_bytes(groups, blocks));
        let scales = store.take(groups * form.scale_words(blocks) * size_of::<u16>());
        Self { form, rows, cols, values, scales }
    }

    /// Repacks some groups of a stored matrix.
    ///
    /// # Safety
    /// No other thread uses these groups now; they are empty; the weight is that of [`Self::empty`].
    pub(crate) unsafe fn fill(&self, groups: Range<usize>, weight: &Weight) {
        // Rounding needs whole rows as floats.
        let is_rounded = self.form != Form::of(weight.dtype());
        let mut floats = vec![0.0; if is_rounded { self.cols } else { 0 }];
        for group in groups {
            // SAFETY: the streams of a group do not overlap those of another; no other thread uses them.
            let mut streams = unsafe { self.streams(group) };
            for lane in 0..GROUP_ROWS.min(self.rows - group * GROUP_ROWS) {
                let row = group * GROUP_ROWS + lane;
                if is_rounded {
                    weight.dequantise_row(row, &mut floats);
                    streams.place_rounded(lane, &floats);
                } else {
                    streams.place(lane, &weight.row(row), weight.dtype());
                }
            }
        }
    }

    /// Both streams of a group, to write.
    ///
    /// # Safety
    /// Nothing else uses them while they live.
    unsafe fn streams(&self, group: usize) -> GroupStreams<'_> {
        let (bytes, words) = (self.group_bytes(), self.group_scales());
        // SAFETY: the streams lie in the memory of this matrix, whose store is zeroed and aligned for words.
        unsafe {
            GroupStreams {
                form: self.form,
                values: std::slice::from_raw_parts_mut(self.values(group).cast_mut(), bytes),
                scales: std::slice::from_raw_parts_mut(self.scales(group).cast_mut(), words),
            }
        }
    }

    pub(crate) const fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }

    pub(crate) const fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    const fn group_bytes(&self) -> usize {
        self.blocks() * self.form.block_bytes()
    }

    const fn group_scales(&self) -> usize {
        self.form.scale_words(self.blocks())
    }

    /// First stream of a group.
    pub(crate) fn values(&self, group: usize) -> *const u8 {
        debug_assert!(group < self.groups());
        self.values.ptr().cast_const().wrapping_add(group * self.group_bytes())
    }

    /// Second stream of a group.
    pub(crate) fn scales(&self, group: usize) -> *const u16 {
        debug_assert!(group < self.groups());
        self.scales.ptr().cast::<u16>().cast_const().wrapping_add(group * self.group_scales())
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        (self.values.bytes() + self.scales.bytes()) as u64
    }
}

/// The streams of a group that is filled.
struct GroupStreams<'a> {
    form: Form,
    values: &'a mut [u8],
    scales: &'a mut [u16],
}

impl GroupStreams<'_> {
    /// One row in the form of its stored type.
    fn place(&mut self, lane: usize, row: &[u8], dtype: DType) {
        let Self { form, values, scales } = self;
        let form = *form;
        match form {
            Form::F32 => scatter::<4>(values, row, lane),
            Form::F16 => scatter::<2>(values, row, lane),
            // A pair of columns takes the place of a column; the last may be single.
            Form::Bf16 => scatter::<4>(values, row, lane),
            _ => {
                let blocks_in_one = dtype.block_len() / BLOCK_COLS;
                for (i, stored) in row.chunks_exact(dtype.block_bytes()).enumerate() {
                    let scales = &mut scales[form.scale_words(i * blocks_in_one)..];
                    stored::scales(form, stored, scales, lane);
                    for sub_block in 0..blocks_in_one {
                        let block = (i * blocks_in_one + sub_block) * form.block_bytes();
                        let block = &mut values[block..block + form.block_bytes()];
                        place_quants(form, block, &stored::quants(form, stored, sub_block), lane);
                    }
                }
            }
        }
    }

    /// One row rounded to [`Form::Int8`]: `q = round(w / scale) + 128`, `scale = max |w| / 127`.
    fn place_rounded(&mut self, lane: usize, floats: &[f32]) {
        debug_assert!(self.form == Form::Int8, "{:?} is made of stored blocks only", self.form);
        let Self { values, scales, .. } = self;
        let largest = floats.iter().fold(0f32, |a, v| a.max(v.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let bits = (largest / 127.0).to_bits();
        scales[2 * lane] = bits as u16;
        scales[2 * lane + 1] = (bits >> 16) as u16;
        for (b, floats) in floats.chunks(BLOCK_COLS).enumerate() {
            let mut quants = [128; BLOCK_COLS];
            for (q, v) in quants.iter_mut().zip(floats) {
                *q = ((v * inverse).round_ties_even() as i8).cast_unsigned() ^ 0x80;
            }
            place_quants(Form::Int8, &mut values[b * Form::Int8.block_bytes()..], &quants, lane);
        }
    }
}

/// Writes the quants of one row into a block's planes, four columns at a time.
fn place_quants(form: Form, block: &mut [u8], quants: &[u8; BLOCK_COLS], lane: usize) {
    let fours: [u32; BLOCK_COLS / 4] =
        std::array::from_fn(|k| u32::from_le_bytes(std::array::from_fn(|j| quants[4 * k + j])));
    let mut put = |plane: usize, four: u32| {
        let at = plane * 64 + lane * 4;
        block[at..at + 4].copy_from_slice(&four.to_le_bytes());
    };
    if matches!(form, Form::Q8 | Form::Int8) {
        fours.into_iter().enumerate().for_each(|(k, four)| put(k, four));
        return;
    }
    // Each of the four bytes of a word keeps some of its bits.
    let bits = |four: u32, mask: u8| four & u32::from_ne_bytes([mask; 4]);
    for k in 0..4 {
        put(k, bits(fours[k], 15) | bits(fours[k + 4], 15) << 4);
    }
    match form {
        Form::Q5 | Form::Q5K => {
            put(4, (0..8).fold(0, |plane, k| plane | bits(fours[k] >> 4, 1) << k));
        }
        Form::Q6K => {
            for half in 0..2 {
                let four = |k: usize| bits(fours[4 * half + k] >> 4, 3);
                put(4 + half, (0..4).fold(0, |plane, k| plane | four(k) << (2 * k)));
            }
        }
        _ => {}
    }
}

fn scatter<const N: usize>(values: &mut [u8], row: &[u8], lane: usize) {
    for (column, value) in row.chunks(N).enumerate() {
        let at = (column * GROUP_ROWS + lane) * N;
        values[at..at + value.len()].copy_from_slice(value);
    }
}
