//! What adapters add to projections, row by row.

use super::ops::{Step, dot};
use crate::{Buf, LowRank, Segment};

impl Step<'_> {
    /// Adds to the outputs of a projection what the adapters of its rows change. `inputs` are its rows,
    /// normed where it norms.
    pub(super) fn adapt(&mut self, inputs: &[Vec<f32>], segments: &[Segment], out: Buf) {
        if self.adapters.is_empty() {
            return;
        }
        for (r, input) in inputs.iter().enumerate() {
            let sequence = self.input.sequence_of(self.input.token_row(out.rows, r));
            let Some(adapter) = self.adapters[sequence].clone() else { continue };
            let mut output = self.row(out, r).to_vec();
            let mut first = 0;
            for segment in segments {
                let features = self.weights.get(segment.weight).rows();
                if let Some(change) = adapter.changes.get(&segment.weight) {
                    let own = &mut output[first..first + features];
                    own.iter_mut().zip(changes(change, input)).for_each(|(value, change)| *value += change);
                }
                first += features;
            }
            self.store(out, r, &output);
        }
    }
}

/// `scale · up · (down · input)`.
fn changes(change: &LowRank, input: &[f32]) -> Vec<f32> {
    let LowRank { rank, scale, down, up } = change;
    let inner: Vec<f32> = down.chunks_exact(input.len()).map(|row| dot(row, input)).collect();
    up.chunks_exact(*rank).map(|row| scale * dot(row, &inner)).collect()
}
