//! Routed experts. A unit of work is a feature of every expert that some row uses: its weights are unpacked
//! to floats once and multiplied by all rows that use the expert. The matrices stay as they are stored,
//! because few of them are read in a step, and a packed copy would double the largest part of such a model.
//!
//! Products are the same in both numerics: floats, in an order that depends on the row alone.

use trustformers_plan::{Buf, ChosenExpert, Experts, WeightId};

use super::{Step, ThreadContext};

/// The operands of a [`trustformers_plan::Op::ExpertsUp`].
pub(super) struct ExpertsUp {
    pub(super) input: Buf,
    pub(super) scores: Buf,
    pub(super) gate: WeightId,
    pub(super) up: WeightId,
    pub(super) experts: Experts,
    pub(super) out: Buf,
}

/// The operands of a [`trustformers_plan::Op::ExpertsDown`].
pub(super) struct ExpertsDown {
    pub(super) input: Buf,
    pub(super) scores: Buf,
    pub(super) down: WeightId,
    pub(super) experts: Experts,
    pub(super) out: Buf,
}

/// A row that uses an expert.
#[derive(Clone, Copy)]
struct ExpertRow {
    row: usize,
    /// Which of the row's experts it is, best first.
    rank: usize,
    share: f32,
}

/// Sums that are added at the same time: as many as a vector has lanes.
const LANES: usize = 16;

/// The sum of products.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let mut count = LANES;
    while count > 1 {
        count /= 2;
        for i in 0..count {
            sums[i] += sums[i + count];
        }
    }
    sums[0]
}

impl Step<'_> {
    pub(super) fn experts_up(&self, operands: &ExpertsUp, thread: ThreadContext<'_>) {
        let ExpertsUp { input, scores, gate, up, experts, out } = *operands;
        let (gate, up) = (self.shared.weights.get(gate), self.shared.weights.get(up));
        let (mut gates, mut ups) = (vec![0.0; gate.cols()], vec![0.0; up.cols()]);
        for (expert, rows) in self.rows_by_expert(scores, experts).iter().enumerate() {
            if rows.is_empty() {
                continue;
            }
            for feature in self.my_share(experts.hidden, thread) {
                gate.dequantise_row(expert * experts.hidden + feature, &mut gates);
                up.dequantise_row(expert * experts.hidden + feature, &mut ups);
                for ExpertRow { row, rank, .. } in rows {
                    let x = self.values(input, *row);
                    let g = dot(&gates, x);
                    let value = g / (1.0 + (-g).exp()) * dot(&ups, x);
                    // SAFETY: see the parent module; the feature is this thread's.
                    unsafe { *self.at(out, *row).add(rank * experts.hidden + feature) = value };
                }
            }
        }
    }

    pub(super) fn experts_down(&self, operands: &ExpertsDown, thread: ThreadContext<'_>) {
        let ExpertsDown { input, scores, down, experts, out } = *operands;
        let down = self.shared.weights.get(down);
        let by_expert = self.rows_by_expert(scores, experts);
        let mut downs = vec![0.0; down.cols()];
        for feature in self.my_share(out.cols, thread) {
            for row in 0..self.rows(out) {
                // SAFETY: see the parent module; the feature is this thread's.
                unsafe { *self.at(out, row).add(feature) = 0.0 };
            }
            for (expert, rows) in by_expert.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                down.dequantise_row(expert * out.cols + feature, &mut downs);
                for ExpertRow { row, rank, share } in rows {
                    let hidden = &self.values(input, *row)[rank * experts.hidden..][..experts.hidden];
                    // SAFETY: as above.
                    unsafe { *self.at(out, *row).add(feature) += share * dot(&downs, hidden) };
                }
            }
        }
    }

    /// The rows that use each expert, ascending.
    fn rows_by_expert(&self, scores: Buf, experts: Experts) -> Vec<Vec<ExpertRow>> {
        let mut by_expert = vec![Vec::new(); experts.count];
        let mut chosen: Vec<ChosenExpert> = Vec::new();
        for row in 0..self.rows(scores) {
            chosen.clear();
            experts.choose(self.values(scores, row), &mut chosen);
            for (rank, ChosenExpert { index, share }) in chosen.iter().enumerate() {
                by_expert[*index].push(ExpertRow { row, rank, share: *share });
            }
        }
        by_expert
    }

    /// A row of a buffer that no thread writes during the op.
    fn values(&self, buf: Buf, row: usize) -> &[f32] {
        // SAFETY: see the parent module; the op only reads the buffer.
        unsafe { std::slice::from_raw_parts(self.at(buf, row).cast_const(), buf.cols) }
    }
}
