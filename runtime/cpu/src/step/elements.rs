//! Norms of rows or of their heads, and ops on single elements.

use trustformers_plan::{Buf, Norm, WeightId};

use super::{Step, ThreadContext, UNIT_COLS};
use crate::kernels::encoder::LayerNorm;

/// The operands of a [`trustformers_plan::Op::RmsNorm`].
pub(super) struct RmsNormOperands {
    pub(super) input: Buf,
    pub(super) weight: WeightId,
    pub(super) eps: f32,
    pub(super) out: Buf,
}

/// A norm of whole rows, with its vectors.
#[derive(Clone, Copy)]
pub(super) enum RowNorm<'a> {
    RootMeanSquare { weight: &'a [f32], eps: f32 },
    Layer(LayerNorm<'a>),
}

impl Step<'_> {
    /// The norm of a projection's rows.
    pub(super) fn row_norm(&self, norm: Norm) -> RowNorm<'_> {
        let Norm { weight, bias, eps } = norm;
        let weight = &self.shared.vectors[&weight][..];
        match bias {
            Some(bias) => RowNorm::Layer(LayerNorm { weight, bias: &self.shared.vectors[&bias], eps }),
            None => RowNorm::RootMeanSquare { weight, eps },
        }
    }

    /// Norms one row.
    ///
    /// # Safety
    /// `input` and `out` have the columns of the norm's vectors and do not overlap; no other thread uses
    /// `out` now.
    pub(super) unsafe fn norm_row(&self, norm: &RowNorm<'_>, input: *const f32, out: *mut f32) {
        let kernels = &self.shared.kernels;
        // SAFETY: as above, and the processor has the tier's instructions.
        unsafe {
            match norm {
                RowNorm::RootMeanSquare { weight, eps } => (kernels.rms_norm)(input, weight, *eps, out),
                RowNorm::Layer(norm) => (kernels.layer_norm)(input, norm, out),
            }
        }
    }

    pub(super) fn rms_norm(&self, operands: &RmsNormOperands, thread: ThreadContext<'_>) {
        let RmsNormOperands { input, weight, eps, out } = *operands;
        let weight = &self.shared.vectors[&weight];
        let groups = out.cols / weight.len();
        for unit in self.my_share(self.rows(out) * groups, thread) {
            let (row, first) = (unit / groups, unit % groups * weight.len());
            // SAFETY: see the parent module; the group of columns is this thread's.
            unsafe {
                let (input, out) = (self.at(input, row).add(first), self.at(out, row).add(first));
                (self.shared.kernels.rms_norm)(input, weight, eps, out);
            }
        }
    }

    pub(super) fn gelu_tanh(&self, input: Buf, out: Buf, thread: ThreadContext<'_>) {
        self.for_each_unit(out, thread, |row, first, len| {
            // SAFETY: see the parent module; the columns are this thread's.
            unsafe {
                let (input, out) = (self.at(input, row).add(first), self.at(out, row).add(first));
                (self.shared.kernels.gelu_tanh)(input, out, len);
            }
        });
    }

    pub(super) fn scale(&self, input: Buf, factor: f32, out: Buf, thread: ThreadContext<'_>) {
        self.for_each_unit(out, thread, |row, first, len| {
            // SAFETY: see the parent module; the columns are this thread's.
            unsafe {
                let (input, out) = (self.at(input, row).add(first), self.at(out, row).add(first));
                (self.shared.kernels.scale)(input, factor, out, len);
            }
        });
    }

    pub(super) fn soft_cap(&self, data: Buf, cap: f32, thread: ThreadContext<'_>) {
        self.for_each_unit(data, thread, |row, first, len| {
            // SAFETY: see the parent module; the columns are this thread's.
            unsafe { (self.shared.kernels.soft_cap)(self.at(data, row).add(first), cap, len) };
        });
    }

    /// Calls `each` with the row, the first column and the number of columns of this thread's units.
    fn for_each_unit(&self, out: Buf, thread: ThreadContext<'_>, mut each: impl FnMut(usize, usize, usize)) {
        let units = out.cols.div_ceil(UNIT_COLS);
        for unit in self.my_share(self.rows(out) * units, thread) {
            let (row, first) = (unit / units, unit % units * UNIT_COLS);
            each(row, first, UNIT_COLS.min(out.cols - first));
        }
    }
}
