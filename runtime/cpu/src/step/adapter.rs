//! What the adapters of a step's rows add to a projection, after the projection itself.

use trustformers_plan::{Buf, Segment};

use super::{Step, ThreadContext, projection::Projection};
use crate::{adapter::CpuChange, kernels::low_rank::UpColumns, pool::Aborted};

impl Step<'_> {
    /// Adds to each row of a projection what the adapter of its sequence changes. The first products are
    /// shared among the threads by row and rank, the second by columns.
    pub(super) fn adapt(&self, p: &Projection<'_>, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        let mut chosen = self.adapters.iter().flatten();
        if !chosen.any(|adapter| p.segments.iter().any(|s| adapter.change(s.weight).is_some())) {
            return Ok(());
        }
        self.first_products(p, thread);
        // The columns that this thread changes were computed by others.
        thread.barrier.wait()?;
        let mine = self.my_share(p.out.cols, thread);
        for row in 0..self.rows(p.out) {
            let mut first_col = 0;
            for (index, segment) in p.segments.iter().enumerate() {
                let features = self.shared.matrices[&segment.weight].rows;
                let cols = mine.start.max(first_col)..mine.end.min(first_col + features);
                if let Some(change) = self.change(p.out, row, segment).filter(|_| !cols.is_empty()) {
                    let inner = self.inner(p, row, index);
                    // SAFETY: the first products lie in the scratch memory, which was sized for the plan, and
                    // the barrier lies between writing and reading them. The columns are this thread's.
                    unsafe {
                        (self.shared.kernels.low_rank_add)(&UpColumns {
                            up: &change.up,
                            features,
                            inner: std::slice::from_raw_parts(inner, change.rank),
                            scale: change.scale,
                            out: self.at(p.out, row).add(cols.start),
                            cols: cols.start - first_col..cols.end - first_col,
                        });
                    }
                }
                first_col += features;
            }
        }
        Ok(())
    }

    /// This thread's share of `down · x` for all rows.
    fn first_products(&self, p: &Projection<'_>, thread: ThreadContext<'_>) {
        let (rank, segments) = (self.plan.adapters().rank, p.segments.len());
        let mine = self.my_share(self.rows(p.out) * segments * rank, thread);
        let (mut unit, mut normed) = (mine.start, None);
        while unit < mine.end {
            let (row, index, first) = (unit / (segments * rank), unit / rank % segments, unit % rank);
            let end = (unit - first + rank).min(mine.end);
            if let Some(change) = self.change(p.out, row, &p.segments[index]) {
                let cols = p.input.cols;
                let input = self.plain_input(p, row, &mut normed, thread);
                for k in first..change.rank.min(first + (end - unit)) {
                    let down = &change.down[k * cols..(k + 1) * cols];
                    // SAFETY: see the parent module; this value of the scratch memory is this thread's.
                    unsafe {
                        let input = std::slice::from_raw_parts(input, cols);
                        self.inner(p, row, index)
                            .add(k)
                            .write((self.shared.kernels.low_rank_dot)(down, input));
                    }
                }
            }
            unit = end;
        }
    }

    /// The row that a projection multiplies, as floats: normed where it norms. `normed` is the row in this
    /// thread's memory for normed rows.
    fn plain_input(
        &self,
        p: &Projection<'_>,
        row: usize,
        normed: &mut Option<usize>,
        thread: ThreadContext<'_>,
    ) -> *const f32 {
        let input = self.at(p.input, row).cast_const();
        let Some(norm) = p.norm else { return input };
        // The projection has read what it normed there.
        let out = self.shared.scratch.threads[thread.number].normed.ptr();
        if *normed != Some(row) {
            // SAFETY: see the parent module; the memory is this thread's and has a row at least.
            unsafe { self.norm_row(&self.row_norm(norm), input, out) };
            *normed = Some(row);
        }
        out
    }

    /// The first products of a row and segment.
    fn inner(&self, p: &Projection<'_>, row: usize, segment: usize) -> *mut f32 {
        let at = (row * p.segments.len() + segment) * self.plan.adapters().rank;
        self.shared.scratch.low_rank.ptr().wrapping_add(at)
    }

    /// What the adapter of a row's sequence changes of a segment.
    fn change(&self, out: Buf, row: usize, segment: &Segment) -> Option<&CpuChange> {
        let sequence = self.row_sequences[self.input.token_row(out.rows, row)] as usize;
        self.adapters[sequence].as_ref()?.change(segment.weight)
    }
}
