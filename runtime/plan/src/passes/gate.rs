//! A gated feed-forward's two projections and their product become one op.

use super::{Uses, plain_matmul, remove, turned_between};
use crate::{Activation, Op, builder::Draft};

/// `g = a·x; u = b·x; y = silu(g) * u` becomes one op where nothing else reads `g` and `u`.
pub(super) fn fold_silu_mul(draft: &mut Draft) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        let Op::SiluMul { gate, up, out } = draft.ops[index] else { continue };
        let (Some(gate_at), Some(up_at)) = (uses.only_for_one(gate), uses.only_for_one(up)) else { continue };
        let (Some((input, gate, _)), Some((other, up, _))) =
            (plain_matmul(&draft.ops[gate_at]), plain_matmul(&draft.ops[up_at]))
        else {
            continue;
        };
        let (first, last) = (gate_at.min(up_at), gate_at.max(up_at));
        if input != other || turned_between(draft, input, first, last) {
            continue;
        }
        draft.ops[first] = Op::MatMul {
            input,
            norm: None,
            parts: vec![gate, up],
            activation: Activation::SiluMul,
            residual: None,
            out,
        };
        folded.extend([last, index]);
    }
    folded.sort_unstable();
    remove(draft, &folded);
}
