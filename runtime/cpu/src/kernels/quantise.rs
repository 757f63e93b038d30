//! Activations to 8 bits: 32 columns share a scale, as in the weights they will meet.

use super::simd::ROUND_MAGIC;
use crate::pack::BLOCK_COLS;

/// Quantised rows, each of whole blocks.
pub(crate) struct QuantBuffer {
    values: *mut i8,
    scales: *mut f32,
    sums: *mut i32,
    blocks: usize,
}

/// The same, to read.
#[derive(Clone, Copy)]
pub(crate) struct QuantRows<'a> {
    buffer: &'a QuantBuffer,
}

impl QuantBuffer {
    /// Bytes that `rows` rows of `cols` columns (whole blocks) take: values, scales and sums.
    pub(crate) const fn bytes(rows: usize, cols: usize) -> usize {
        rows * (cols + 8 * (cols / BLOCK_COLS))
    }

    /// Lays a buffer of [`Self::bytes`] out.
    ///
    /// # Safety
    /// `memory` is aligned to four and lives as long as the buffer.
    pub(crate) unsafe fn new(memory: *mut u8, rows: usize, cols: usize) -> Self {
        let blocks = cols / BLOCK_COLS;
        // SAFETY: all three parts lie inside the memory; the values' part is a multiple of 32 bytes.
        unsafe {
            let scales = memory.add(rows * cols).cast::<f32>();
            Self { values: memory.cast(), scales, sums: scales.add(rows * blocks).cast(), blocks }
        }
    }

    pub(crate) const fn rows(&self) -> QuantRows<'_> {
        QuantRows { buffer: self }
    }

    /// Quantises one row: `scale = max |x| / 127`, nearest integers, halves to even.
    ///
    /// # Safety
    /// `input` is a row of the buffer's columns; no other thread uses row `row` meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn fill(&self, row: usize, input: *const f32) {
        for b in 0..self.blocks {
            // SAFETY: the block lies inside the row.
            let (x, out) = unsafe {
                let at = row * self.blocks + b;
                (
                    &*input.add(b * BLOCK_COLS).cast::<[f32; BLOCK_COLS]>(),
                    &mut *self.values.add(at * BLOCK_COLS).cast::<[i8; BLOCK_COLS]>(),
                )
            };
            let mut largest = 0.0f32;
            for v in x {
                let v = v.abs();
                largest = if v > largest { v } else { largest };
            }
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let mut sum = 0i32;
            for (out, v) in out.iter_mut().zip(x) {
                // The low byte of the sum with the magic number is the rounded value in two's complement.
                let q = (v * inverse + ROUND_MAGIC).to_bits() as i8;
                sum += i32::from(q);
                *out = q;
            }
            // SAFETY: one scale and one sum per block.
            unsafe {
                *self.scales.add(row * self.blocks + b) = largest / 127.0;
                *self.sums.add(row * self.blocks + b) = sum;
            }
        }
    }
}

impl QuantRows<'_> {
    /// Values, scale and sum of values of a block.
    ///
    /// # Safety
    /// Row and block exist, and no thread is writing them.
    #[inline(always)]
    pub(crate) unsafe fn block(&self, row: usize, block: usize) -> (*const i8, f32, i32) {
        let at = row * self.buffer.blocks + block;
        // SAFETY: as above.
        unsafe {
            (self.buffer.values.add(at * BLOCK_COLS), *self.buffer.scales.add(at), *self.buffer.sums.add(at))
        }
    }
}
