//! Projections: norming and quantising their input, multiplying, and what is done to the products before they are stored.

use trustformers_plan::{Activation, Buf, Norm, Numerics, Part};

use super::{Me, PRIVATE_ROWS, Step};
use crate::{
    kernels::{
        matmul::{self, Input, MatMul, Rows, Target},
        quantise::{Bf16Rows, BlockRows, Int8Rows},
    },
    pack::{Form, Packed},
    pool::Aborted,
};

/// The operands of a projection; see [`trustformers_plan::Op::MatMul`].
pub(super) struct Projection<'a> {
    pub(super) input: Buf,
    pub(super) norm: Option<Norm>,
    pub(super) parts: &'a [Part],
    pub(super) activation: Activation,
    pub(super) residual: Option<Buf>,
    pub(super) out: Buf,
}

impl<'a> Projection<'a> {
    /// Nothing but products.
    pub(super) const fn plain(input: Buf, parts: &'a [Part], out: Buf) -> Self {
        Self { input, norm: None, parts, activation: Activation::None, residual: None, out }
    }
}

/// A projection's input in every way that its matrices want it.
struct Inputs {
    floats: Rows,
    blocks: BlockRows,
    int8: Int8Rows,
    bf16: Bf16Rows,
}

/// Which ways those are.
#[derive(Clone, Copy)]
struct Wanted {
    floats: bool,
    blocks: bool,
    int8: bool,
    bf16: bool,
}

impl Step<'_> {
    pub(super) fn matmul(&self, p: &Projection<'_>, me: Me<'_>) -> Result<(), Aborted> {
        let rows = self.rows(p.out);
        if rows == 0 {
            return Ok(());
        }
        let inputs = self.inputs(p, rows, me)?;
        let part = |part: &Part| {
            let bias = part.bias.map(|bias| &self.shared.biases[&bias][..]);
            (&self.shared.matrices[&part.weight], bias)
        };
        let (parts, activation) = match (p.activation, p.parts) {
            (Activation::SiluMul, [gate, up]) => {
                let (up, bias) = part(up);
                (std::slice::from_ref(gate), matmul::Activation::Gate(up, bias))
            }
            (Activation::Gelu, parts) => (parts, matmul::Activation::Gelu),
            (Activation::None | Activation::SiluMul, parts) => (parts, matmul::Activation::None),
        };
        let total = parts.iter().map(|p| MatMul::units_of(part(p).0, &activation)).sum();
        let mine = self.my_share(total, me);
        let (mut first_unit, mut first_col) = (0, 0);
        for (matrix, bias) in parts.iter().map(part) {
            let end = first_unit + MatMul::units_of(matrix, &activation);
            let units = mine.start.max(first_unit)..mine.end.min(end);
            if !units.is_empty() {
                let residual =
                    p.residual.map(|r| (self.at(r, 0).wrapping_add(first_col).cast_const(), r.stride));
                let ptr = self.at(p.out, 0).wrapping_add(first_col);
                // SAFETY: see the module above; the units' outputs are this thread's.
                unsafe {
                    (self.shared.kernels.matmul)(&MatMul {
                        matrix,
                        units: units.start - first_unit..units.end - first_unit,
                        rows,
                        input: self.input_for(matrix, &inputs),
                        target: Target { ptr, stride: p.out.stride, bias, activation, residual },
                        scratch: self.shared.scratch.threads[me.number].matmul.ptr(),
                    });
                }
            }
            first_unit = end;
            first_col += matrix.rows;
        }
        Ok(())
    }

    fn wants_blocks(&self, matrix: &Packed) -> bool {
        self.shared.numerics == Numerics::Fast && matrix.form.has_blocks()
    }

    fn wants_bf16(&self, matrix: &Packed) -> bool {
        let can = self.shared.kernels.quantise_bf16.is_some();
        self.shared.numerics == Numerics::Fast && matrix.form == Form::Bf16 && can
    }

    fn input_for<'a>(&self, matrix: &Packed, inputs: &'a Inputs) -> Input<'a> {
        match matrix.form {
            Form::Int8 => Input::Int8(&inputs.int8),
            _ if self.wants_blocks(matrix) => Input::Blocks(&inputs.blocks),
            _ if self.wants_bf16(matrix) => Input::Bf16(&inputs.bf16),
            _ => Input::Floats(inputs.floats),
        }
    }

    /// Norms and quantises what the kernels read: few rows by each thread for itself, many once for all.
    fn inputs(&self, p: &Projection<'_>, rows: usize, me: Me<'_>) -> Result<Inputs, Aborted> {
        let any = |which: &dyn Fn(&Packed) -> bool| {
            p.parts.iter().any(|part| which(&self.shared.matrices[&part.weight]))
        };
        let wanted = Wanted {
            blocks: any(&|m| self.wants_blocks(m)),
            int8: any(&|m| m.form == Form::Int8),
            bf16: any(&|m| self.wants_bf16(m)),
            floats: any(&|m| m.form != Form::Int8 && !self.wants_blocks(m) && !self.wants_bf16(m)),
        };
        let (scratch, private, cols) = (&self.shared.scratch, rows <= PRIVATE_ROWS, p.input.cols);
        let own = &scratch.threads[me.number];
        let memory = if private { &own.quantised } else { &scratch.quantised };
        // A normed row that is only quantised needs to be kept no longer than that.
        let normed = if private || !wanted.floats { &own.normed } else { &scratch.normed };
        let kernels = &self.shared.kernels;
        let int8_at = if wanted.blocks { BlockRows::bytes(rows, cols) } else { 0 };
        let bf16_at = int8_at + if wanted.int8 { Int8Rows::bytes(rows, cols) } else { 0 };
        // SAFETY: loading sized the memory for the widest projection and the number of rows.
        let inputs = unsafe {
            let memory = memory.ptr().cast::<u8>();
            Inputs {
                floats: match p.norm {
                    Some(_) => Rows { ptr: normed.ptr(), stride: cols },
                    None => Rows { ptr: self.at(p.input, 0), stride: p.input.stride },
                },
                blocks: BlockRows::new(memory, cols, kernels.block_layout(rows)),
                int8: Int8Rows::new(memory.add(int8_at), cols, kernels.int8_layout()),
                bf16: Bf16Rows::new(memory.wrapping_add(bf16_at), cols),
            }
        };
        if p.norm.is_none() && !wanted.blocks && !wanted.int8 && !wanted.bf16 {
            return Ok(inputs);
        }
        for row in if private { 0..rows } else { self.my_share(rows, me) } {
            let mut input = self.at(p.input, row).cast_const();
            // SAFETY: see the module above; the row is this thread's, in its own memory or its share of the common one.
            unsafe {
                if let Some(norm) = p.norm {
                    let out = normed.ptr().add(if wanted.floats { row * cols } else { 0 });
                    (kernels.rms_norm)(input, &self.shared.vectors[&norm.weight], norm.eps, out);
                    input = out;
                }
                if wanted.blocks {
                    (kernels.quantise)(&inputs.blocks, row, input);
                    if row + 1 == rows {
                        inputs.blocks.end(rows);
                    }
                }
                if wanted.int8 {
                    (kernels.quantise_int8)(&inputs.int8, row, input);
                }
                if let Some(quantise) = kernels.quantise_bf16.filter(|_| wanted.bf16) {
                    quantise(&inputs.bf16, row, input);
                }
            }
        }
        if !private {
            me.barrier.wait()?;
        }
        Ok(inputs)
    }
}
