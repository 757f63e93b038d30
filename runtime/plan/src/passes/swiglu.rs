//! The two projections of a gated feed-forward and their product become one op (SwiGLU).

use super::{Uses, changed_between, plain_matmul, remove};
use crate::{Activation, Op, Weights, builder::Draft};

/// `g = a·x; u = b·x; y = silu(g) * u` becomes one op where no other op reads `g` and `u`, and `a` and `b`
/// are stored in one type.
///
/// The fused kernel reads both matrices side by side, so both need one layout. Matrices of different types
/// have no common layout except f32, which takes up to eight times the memory of the stored types. So they
/// stay two projections.
pub(super) fn fold_silu_mul(draft: &mut Draft, weights: &Weights) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        let Op::SiluMul { gate, up, out } = draft.ops[index] else { continue };
        let (Some(gate_at), Some(up_at)) = (uses.made_for_one_reader(gate), uses.made_for_one_reader(up))
        else {
            continue;
        };
        let (Some((input, gate, _)), Some((other, up, _))) =
            (plain_matmul(&draft.ops[gate_at]), plain_matmul(&draft.ops[up_at]))
        else {
            continue;
        };
        let (first, last) = (gate_at.min(up_at), gate_at.max(up_at));
        let same_type = weights.get(gate.weight).dtype() == weights.get(up.weight).dtype();
        if input != other || !same_type || changed_between(draft, input, first..last) {
            continue;
        }
        draft.ops[first] = Op::MatMul {
            input,
            norm: None,
            normed: None,
            segments: vec![gate, up],
            activation: Activation::SiluMul,
            residual: None,
            out,
        };
        folded.extend([last, index]);
    }
    folded.sort_unstable();
    remove(draft, &folded);
}
