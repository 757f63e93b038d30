//! Routed experts by their definitions.

use super::ops::{Step, dot, silu_mul};
use crate::{Buf, ChosenExpert, Experts, WeightId};

/// The first matrices of the experts.
pub(super) struct FirstMatrices {
    pub(super) gate: WeightId,
    pub(super) up: WeightId,
}

impl Step<'_> {
    pub(super) fn experts_up(
        &mut self,
        [input, scores]: [Buf; 2],
        matrices: &FirstMatrices,
        experts: Experts,
        out: Buf,
    ) {
        for r in 0..self.rows(out) {
            let row = self.row(input, r).to_vec();
            let mut values = Vec::with_capacity(out.cols);
            for ChosenExpert { index, .. } in self.chosen(scores, r, experts) {
                for feature in index * experts.hidden..(index + 1) * experts.hidden {
                    let product = |id: WeightId| dot(&self.weight_row(id, feature), &row);
                    values.push(silu_mul(product(matrices.gate), product(matrices.up)));
                }
            }
            self.store(out, r, &values);
        }
    }

    pub(super) fn experts_down(
        &mut self,
        [input, scores]: [Buf; 2],
        down: WeightId,
        experts: Experts,
        out: Buf,
    ) {
        for r in 0..self.rows(out) {
            let row = self.row(input, r).to_vec();
            let mut values = vec![0.0; out.cols];
            for (part, ChosenExpert { index, share }) in
                row.chunks_exact(experts.hidden).zip(self.chosen(scores, r, experts))
            {
                for (col, value) in values.iter_mut().enumerate() {
                    *value += share * dot(&self.weight_row(down, index * out.cols + col), part);
                }
            }
            self.store(out, r, &values);
        }
    }

    fn chosen(&self, scores: Buf, row: usize, experts: Experts) -> Vec<ChosenExpert> {
        let mut chosen = Vec::new();
        experts.choose(self.row(scores, row), &mut chosen);
        chosen
    }

    fn weight_row(&self, id: WeightId, row: usize) -> Vec<f32> {
        let weight = self.weights.get(id);
        let mut values = vec![0.0; weight.cols()];
        weight.dequantise_row(row, &mut values);
        values
    }
}
