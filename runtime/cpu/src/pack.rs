//! Weights laid out for the kernels: sixteen output features side by side, one per vector lane.
//!
//! A *group* is 16 rows of the matrix (the last is filled up with zeros), a *block* 32 columns. Reading a group is one
//! forward stream, and a dot product needs no sum across lanes. Inside a block:
//!
//! * `Q8_0`: 512 bytes `[column / 4][row][column % 4]`, each `q + 128` so that it is unsigned, as the dot-product
//!   instructions want their first operand; f16 scales `[row]` in a second stream.
//! * `Q4_1`: 256 bytes `[(column % 16) / 4][row][column % 4]`, columns 0..16 in the low and 16..32 in the high half of
//!   a byte; f16 scales `[row]`, then minima `[row]`, in the second stream.
//! * `F32`, `F16`: `[column][row]`; the last block may be short.
//!
//! A stored type without a layout of its own takes one that holds its weights exactly ([`Form::of`]).

use trustformers_plan::{BackendError, DType, Weight};

use crate::memory::{Line, lines};

/// Rows per group: the lanes of the widest register.
pub(crate) const GROUP_ROWS: usize = 16;
/// Columns per block, as in the stored formats.
pub(crate) const BLOCK_COLS: usize = 32;

/// A layout of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    F16,
    Q8,
    Q4Min,
}

impl Form {
    /// The layout that holds weights of this type without rounding. Scales of K quants are products of more bits than an
    /// f16 has, so these become f32; blocks of `Q4_0` and `Q5_0` are blocks of `Q8_0` with smaller numbers.
    pub(crate) const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 | DType::BF16 | DType::Q4_K | DType::Q5_K | DType::Q6_K => Self::F32,
            DType::F16 => Self::F16,
            DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => Self::Q8,
            DType::Q4_1 => Self::Q4Min,
        }
    }

    /// Whether it can meet quantised activations.
    pub(crate) const fn is_quantised(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4Min)
    }
}

/// A matrix in the kernels' layout.
pub(crate) struct Packed {
    pub(crate) form: Form,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    values: Vec<Line>,
    scales: Vec<u16>,
}

impl Packed {
    /// Repacks a stored matrix.
    pub(crate) fn new(weight: &Weight) -> Result<Self, BackendError> {
        let (form, rows, cols) = (Form::of(weight.dtype()), weight.rows(), weight.cols());
        let mut packed = Self { form, rows, cols, values: Vec::new(), scales: Vec::new() };
        let groups = packed.groups();
        packed.values = lines("repacked weights", groups * packed.group_bytes())?;
        packed.scales = vec![0; groups * packed.group_scales()];
        for group in 0..groups {
            packed.fill(group, weight);
        }
        Ok(packed)
    }

    pub(crate) const fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP_ROWS)
    }

    pub(crate) const fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_COLS)
    }

    /// Bytes of a block in the first stream (a full block, for floats).
    pub(crate) const fn block_bytes(&self) -> usize {
        GROUP_ROWS
            * match self.form {
                Form::F32 => 4 * BLOCK_COLS,
                Form::F16 => 2 * BLOCK_COLS,
                Form::Q8 => BLOCK_COLS,
                Form::Q4Min => BLOCK_COLS / 2,
            }
    }

    /// f16 numbers of a block in the second stream.
    pub(crate) const fn block_scales(&self) -> usize {
        match self.form {
            Form::F32 | Form::F16 => 0,
            Form::Q8 => GROUP_ROWS,
            Form::Q4Min => 2 * GROUP_ROWS,
        }
    }

    pub(crate) const fn group_bytes(&self) -> usize {
        self.blocks() * self.block_bytes()
    }

    pub(crate) const fn group_scales(&self) -> usize {
        self.blocks() * self.block_scales()
    }

    /// First stream of a group.
    pub(crate) fn values(&self, group: usize) -> *const u8 {
        debug_assert!(group < self.groups());
        self.values.as_ptr().cast::<u8>().wrapping_add(group * self.group_bytes())
    }

    /// Second stream of a group.
    pub(crate) fn scales(&self, group: usize) -> *const u16 {
        debug_assert!(group < self.groups());
        self.scales.as_ptr().wrapping_add(group * self.group_scales())
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        (self.values.len() * 64 + self.scales.len() * 2) as u64
    }

    fn fill(&mut self, group: usize, weight: &Weight) {
        let (group_bytes, group_scales) = (self.group_bytes(), self.group_scales());
        let (block_bytes, block_scales) = (self.block_bytes(), self.block_scales());
        let first_row = group * GROUP_ROWS;
        let scales = &mut self.scales[group * group_scales..(group + 1) * group_scales];
        let values = as_bytes(&mut self.values);
        let values = &mut values[group * group_bytes..(group + 1) * group_bytes];
        if self.form == Form::Q8 {
            // Rows that only fill the group up are zero, which is 128 here.
            values.fill(128);
        }
        for lane in 0..GROUP_ROWS.min(self.rows - first_row) {
            let row = weight.row(first_row + lane);
            match weight.dtype() {
                DType::F32 => scatter::<4>(values, row, lane),
                DType::BF16 | DType::Q4_K | DType::Q5_K | DType::Q6_K => {
                    let mut floats = vec![0.0; self.cols];
                    weight.dequantise_row(first_row + lane, &mut floats);
                    let bytes: Vec<u8> = floats.iter().flat_map(|v| v.to_le_bytes()).collect();
                    scatter::<4>(values, &bytes, lane);
                }
                DType::F16 => scatter::<2>(values, row, lane),
                DType::Q8_0 => {
                    for (b, stored) in row.chunks_exact(34).enumerate() {
                        scales[b * block_scales + lane] = u16::from_le_bytes([stored[0], stored[1]]);
                        place(&mut values[b * block_bytes..], &stored[2..], lane, |q| q ^ 0x80);
                    }
                }
                dtype @ (DType::Q4_0 | DType::Q5_0) => {
                    for (b, stored) in row.chunks_exact(dtype.block_bytes()).enumerate() {
                        scales[b * block_scales + lane] = u16::from_le_bytes([stored[0], stored[1]]);
                        let quants = small_quants(dtype, stored);
                        place(&mut values[b * block_bytes..], &quants, lane, |q| q ^ 0x80);
                    }
                }
                DType::Q4_1 => {
                    for (b, stored) in row.chunks_exact(20).enumerate() {
                        scales[b * block_scales + lane] = u16::from_le_bytes([stored[0], stored[1]]);
                        scales[b * block_scales + 16 + lane] = u16::from_le_bytes([stored[2], stored[3]]);
                        place(&mut values[b * block_bytes..], &stored[4..], lane, |q| q);
                    }
                }
            }
        }
    }
}

/// The signed quants of a `Q4_0` or `Q5_0` block: what its weights are with a scale of one.
fn small_quants(dtype: DType, stored: &[u8]) -> [u8; BLOCK_COLS] {
    let (mut unit, mut weights) = (stored.to_vec(), [0.0; BLOCK_COLS]);
    // 1 as f16.
    unit[..2].copy_from_slice(&0x3c00u16.to_le_bytes());
    dtype.dequantise(&unit, &mut weights);
    weights.map(|q| (q as i8).cast_unsigned())
}

/// Four quants of a row side by side, then the next row's.
fn place(block: &mut [u8], quants: &[u8], lane: usize, f: impl Fn(u8) -> u8) {
    for (k, four) in quants.chunks_exact(4).enumerate() {
        for (j, &q) in four.iter().enumerate() {
            block[(k * GROUP_ROWS + lane) * 4 + j] = f(q);
        }
    }
}

fn scatter<const N: usize>(values: &mut [u8], row: &[u8], lane: usize) {
    for (column, value) in row.chunks_exact(N).enumerate() {
        let at = (column * GROUP_ROWS + lane) * N;
        values[at..at + N].copy_from_slice(value);
    }
}

fn as_bytes(lines: &mut [Line]) -> &mut [u8] {
    let len = size_of_val(lines);
    // SAFETY: a line is 64 plain bytes without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
}
