//! Projections: norm and quantisation of the input, products, and the epilogue before they are stored.
//!
//! A row is normed and quantised in one go, while it is in the first-level cache. Normed rows that other ops
//! read too are written for them on the way.

use trustformers_plan::{Activation, Buf, Norm, Numerics, RowSpace, Segment};

use super::{
    PRIVATE_ROWS, PRIVATE_VALUES, Step, ThreadContext,
    prompts::{PromptRows, RowPlace},
};
use crate::{
    kernels::{
        matmul::{self, Input, MatMul, Rows, Target},
        quantise::{Bf16Rows, BlockScaledRows, Int8Rows, Layout},
    },
    pack::{Form, Packed},
    pool::Aborted,
};

/// The operands of a projection; see [`trustformers_plan::Op::MatMul`].
pub(super) struct Projection<'a> {
    pub(super) input: Buf,
    pub(super) norm: Option<Norm>,
    pub(super) normed: Option<Buf>,
    pub(super) segments: &'a [Segment],
    pub(super) activation: Activation,
    pub(super) residual: Option<Buf>,
    pub(super) out: Buf,
}

impl<'a> Projection<'a> {
    /// A projection without norm, activation and residual.
    pub(super) const fn plain(input: Buf, segments: &'a [Segment], out: Buf) -> Self {
        let (activation, residual) = (Activation::None, None);
        Self { input, norm: None, normed: None, segments, activation, residual, out }
    }
}

/// A projection's input in every form that its matrices need.
struct Inputs {
    floats: Rows,
    block_scaled: BlockScaledRows,
    int8: Int8Rows,
    bf16: Bf16Rows,
}

/// The forms of the input that a projection needs.
#[derive(Clone, Copy)]
struct Wanted {
    floats: bool,
    block_scaled: bool,
    int8: bool,
    bf16: bool,
}

/// Where rows are normed.
#[derive(Clone, Copy)]
struct NormedRows {
    ptr: *mut f32,
    /// Distance between rows, in values; 0 where each row replaces the one before.
    stride: usize,
}

/// The memory for a projection's input, for so many rows.
#[derive(Clone, Copy)]
struct InputMemory {
    ptr: *mut u8,
    rows: usize,
    /// Rows that are quantised by blocks.
    block_scaled_rows: usize,
}

/// A row of a projection's input.
#[derive(Clone, Copy)]
struct InputRow {
    row: usize,
    /// In the list of rows that are computed in the same way.
    index: usize,
}

impl Step<'_> {
    pub(super) fn matmul(&self, p: &Projection<'_>, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        let rows = self.rows(p.out);
        if rows == 0 {
            return Ok(());
        }
        let inputs = self.inputs(p, rows, thread)?;
        let segment = |segment: &Segment| {
            let bias = segment.bias.map(|bias| &self.shared.biases[&bias][..]);
            (&self.shared.matrices[&segment.weight], bias)
        };
        let (segments, activation) = match (p.activation, p.segments) {
            (Activation::SiluMul, [gate, up]) => {
                let (up, bias) = segment(up);
                (std::slice::from_ref(gate), matmul::Activation::Gate(up, bias))
            }
            (Activation::Gelu, segments) => (segments, matmul::Activation::Gelu),
            (Activation::None | Activation::SiluMul, segments) => (segments, matmul::Activation::None),
        };
        let total = segments.iter().map(|p| MatMul::units_of(segment(p).0, &activation)).sum();
        let mine = self.my_share(total, thread);
        let (mut first_unit, mut first_col) = (0, 0);
        for (matrix, bias) in segments.iter().map(segment) {
            let end = first_unit + MatMul::units_of(matrix, &activation);
            let units = mine.start.max(first_unit)..mine.end.min(end);
            if !units.is_empty() {
                let residual =
                    p.residual.map(|r| (self.at(r, 0).wrapping_add(first_col).cast_const(), r.stride));
                let ptr = self.at(p.out, 0).wrapping_add(first_col);
                let job = MatMul {
                    matrix,
                    units: units.start - first_unit..units.end - first_unit,
                    rows,
                    row_map: None,
                    input: self.input_for(matrix, &inputs),
                    target: Target { ptr, stride: p.out.stride, bias, activation, residual },
                    scratch: self.shared.scratch.threads[thread.number].matmul.ptr(),
                };
                self.multiply(p, &inputs, job);
            }
            first_unit = end;
            first_col += matrix.rows;
        }
        Ok(())
    }

    /// Computes this thread's units for all rows: those of prompts apart from the others, where they are.
    fn multiply(&self, p: &Projection<'_>, inputs: &Inputs, job: MatMul<'_>) {
        let kernel = self.shared.kernels.matmul;
        let Some(rows) = self.prompt_rows_of(p) else {
            // SAFETY: see the parent module; the units' outputs are this thread's.
            return unsafe { kernel(&job) };
        };
        let prompts = Some(&rows.prompts[..]);
        // SAFETY: as above; the rows of each list were quantised in their order.
        unsafe {
            if !rows.others.is_empty() {
                let others = Some(&rows.others[..]);
                kernel(&MatMul { rows: rows.others.len(), row_map: others, units: job.units.clone(), ..job });
            }
            let input = Input::Panels(&inputs.bf16);
            kernel(&MatMul { rows: rows.prompts.len(), row_map: prompts, input, ..job });
        }
    }

    /// The rows of the step in two lists, where some are parts of prompts that this projection computes
    /// apart.
    fn prompt_rows_of(&self, p: &Projection<'_>) -> Option<&PromptRows> {
        let has_blocks =
            || p.segments.iter().all(|s| self.wants_block_scaled(&self.shared.matrices[&s.weight]));
        let applies = p.out.rows == RowSpace::Tokens && !self.prompt_rows.prompts.is_empty() && has_blocks();
        applies.then_some(self.prompt_rows)
    }

    fn wants_block_scaled(&self, matrix: &Packed) -> bool {
        self.shared.numerics == Numerics::Fast && matrix.form.has_block_scales()
    }

    fn wants_bf16(&self, matrix: &Packed) -> bool {
        matrix.form == Form::Bf16 && !self.shared.kernels.reads_floats(matrix.form, self.shared.numerics)
    }

    fn input_for<'a>(&self, matrix: &Packed, inputs: &'a Inputs) -> Input<'a> {
        match matrix.form {
            Form::Int8 => Input::Int8(&inputs.int8),
            _ if self.wants_block_scaled(matrix) => Input::BlockScaled(&inputs.block_scaled),
            _ if self.wants_bf16(matrix) => Input::Bf16(&inputs.bf16),
            _ => Input::Floats(inputs.floats),
        }
    }

    /// The forms of the input that a projection needs.
    fn wanted(&self, p: &Projection<'_>) -> Wanted {
        let any = |which: &dyn Fn(&Packed) -> bool| {
            p.segments.iter().any(|segment| which(&self.shared.matrices[&segment.weight]))
        };
        Wanted {
            block_scaled: any(&|m| self.wants_block_scaled(m)),
            int8: any(&|m| m.form == Form::Int8),
            bf16: any(&|m| self.wants_bf16(m)) || self.prompt_rows_of(p).is_some(),
            floats: any(&|m| self.shared.kernels.reads_floats(m.form, self.shared.numerics)),
        }
    }

    /// The layout of a projection's rows that are quantised by blocks: that of its first matrix, because both
    /// layouts give the same bits.
    fn block_scaled_layout(&self, p: &Projection<'_>, rows: usize) -> Layout {
        let mut forms = p.segments.iter().map(|segment| self.shared.matrices[&segment.weight].form);
        let form = forms.find(|form| form.has_block_scales());
        form.map_or(Layout::Interleaved, |form| self.shared.kernels.block_scaled_layout(form, rows))
    }

    /// Where a projection norms its rows: in the buffer that other ops read, or in memory of its own.
    fn normed_rows(
        &self,
        p: &Projection<'_>,
        wanted: Wanted,
        private: bool,
        thread: ThreadContext<'_>,
    ) -> NormedRows {
        let (scratch, cols) = (&self.shared.scratch, p.input.cols);
        let own = scratch.threads[thread.number].normed.ptr();
        match p.normed {
            // A thread that norms all rows for itself must not write those of the others there.
            Some(kept) if !private => NormedRows { ptr: self.at(kept, 0), stride: kept.stride },
            // A normed row that is only quantised is not needed afterwards.
            _ if !wanted.floats => NormedRows { ptr: own, stride: 0 },
            _ if private => NormedRows { ptr: own, stride: cols },
            _ => NormedRows { ptr: scratch.normed.ptr(), stride: cols },
        }
    }

    /// The input's forms in memory that is not filled yet.
    fn unfilled(
        &self,
        p: &Projection<'_>,
        wanted: Wanted,
        normed: NormedRows,
        memory: InputMemory,
    ) -> Inputs {
        let (cols, InputMemory { ptr, rows, block_scaled_rows }) = (p.input.cols, memory);
        let int8_at = if wanted.block_scaled { BlockScaledRows::bytes(rows, cols) } else { 0 };
        let bf16_at = int8_at + if wanted.int8 { Int8Rows::bytes(rows, cols) } else { 0 };
        let layout = self.block_scaled_layout(p, block_scaled_rows);
        let floats = match p.norm {
            Some(_) => Rows { ptr: normed.ptr, stride: normed.stride },
            None => Rows { ptr: self.at(p.input, 0), stride: p.input.stride },
        };
        // SAFETY: the load sized the memory for the widest projection and the largest step.
        unsafe {
            Inputs {
                floats,
                block_scaled: BlockScaledRows::new(ptr, cols, layout),
                int8: Int8Rows::new(ptr.add(int8_at), cols, self.shared.kernels.int8_layout(rows)),
                bf16: Bf16Rows::new(ptr.wrapping_add(bf16_at), cols),
            }
        }
    }

    /// Norms and quantises the input. Each thread does few rows for itself; other rows are shared among the
    /// threads.
    fn inputs(&self, p: &Projection<'_>, rows: usize, thread: ThreadContext<'_>) -> Result<Inputs, Aborted> {
        let (wanted, private) = (self.wanted(p), is_private(rows, p.input.cols));
        let scratch = &self.shared.scratch;
        let own = &scratch.threads[thread.number];
        let memory = if private { &own.quantised } else { &scratch.quantised };
        // Rows of prompts are not quantised by blocks.
        let prompts = self.prompt_rows_of(p);
        let block_scaled_rows = prompts.map_or(rows, |rows| rows.others.len());
        let normed = self.normed_rows(p, wanted, private, thread);
        let memory = InputMemory { ptr: memory.ptr().cast(), rows, block_scaled_rows };
        let inputs = self.unfilled(p, wanted, normed, memory);
        if p.norm.is_none() && !wanted.block_scaled && !wanted.int8 && !wanted.bf16 {
            return Ok(inputs);
        }
        let norm = p.norm.map(|norm| self.row_norm(norm));
        let (mine, copied) = (self.my_share(rows, thread), p.normed.filter(|_| private));
        for row in if private { 0..rows } else { mine.clone() } {
            let mut input = self.at(p.input, row).cast_const();
            if let Some(norm) = &norm {
                let out = normed.ptr.wrapping_add(row * normed.stride);
                // SAFETY: see the parent module; the row is this thread's, in its own memory or its share of
                // what others read.
                unsafe {
                    self.norm_row(norm, input, out);
                    if let Some(copied) = copied.filter(|_| mine.contains(&row)) {
                        std::ptr::copy_nonoverlapping(out, self.at(copied, row), p.input.cols);
                    }
                }
                input = out;
            }
            let place = prompts.map_or(RowPlace { is_prompt: false, index: row }, |rows| rows.place(row));
            let wanted = Wanted {
                block_scaled: wanted.block_scaled && !place.is_prompt,
                bf16: wanted.bf16 && place.is_prompt == prompts.is_some(),
                ..wanted
            };
            // SAFETY: as above.
            unsafe {
                self.quantise_row(&inputs, wanted, InputRow { row, index: place.index }, input);
                if wanted.block_scaled && place.index + 1 == block_scaled_rows {
                    inputs.block_scaled.end(block_scaled_rows);
                }
            }
        }
        if !private {
            thread.barrier.wait()?;
        }
        Ok(inputs)
    }

    /// Quantises one row in the forms that are wanted of it.
    ///
    /// # Safety
    /// `input` has the columns; no other thread uses the row now.
    unsafe fn quantise_row(&self, inputs: &Inputs, wanted: Wanted, at: InputRow, input: *const f32) {
        let kernels = &self.shared.kernels;
        // SAFETY: as above, and the processor has the tier's instructions.
        unsafe {
            if wanted.block_scaled {
                (kernels.quantise)(&inputs.block_scaled, at.index, input);
            }
            if wanted.int8 {
                (kernels.quantise_int8)(&inputs.int8, at.row, input);
            }
            if let Some(quantise) = kernels.quantise_bf16.filter(|_| wanted.bf16) {
                quantise(&inputs.bf16, at.index, input);
            }
        }
    }
}

/// Whether each thread quantises all rows of an input for itself. One row cannot be shared.
const fn is_private(rows: usize, cols: usize) -> bool {
    rows == 1 || rows <= PRIVATE_ROWS && rows * cols <= PRIVATE_VALUES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_rows_are_shared_sooner_than_narrow_ones() {
        // SmolLM2-135M: all projections of four rows. Qwen2.5-1.5B: its widest input is 8,960 columns.
        let limits = [576, 1536, 8960].map(|cols| (1..9).take_while(|rows| is_private(*rows, cols)).count());
        assert_eq!(limits, [4, 4, 1]);
        assert!(is_private(1, 100_000));
    }
}
