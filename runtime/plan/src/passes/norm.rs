//! A norm that only one projection reads is computed by that projection.

use super::{Uses, changed_between, remove};
use crate::{Norm, Op, Weights, builder::Draft};

/// `n = rms_norm(x); y = w·n` becomes one op where no other op reads `n` and no op between them changes `x`.
/// A norm of groups of columns stays as it is.
pub(super) fn fold_norm(draft: &mut Draft, weights: &Weights) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        let Op::MatMul { input: normed, norm: None, .. } = draft.ops[index] else { continue };
        let Some(at) = uses.made_for_one_reader(normed) else { continue };
        let Op::RmsNorm { input: raw, weight, eps, .. } = draft.ops[at] else { continue };
        let is_grouped = weights.get(weight).cols() != draft.info(raw).cols;
        if is_grouped || changed_between(draft, raw, at..index) {
            continue;
        }
        if let Op::MatMul { input, norm, .. } = &mut draft.ops[index] {
            (*input, *norm) = (raw, Some(Norm { weight, eps }));
            folded.push(at);
        }
    }
    folded.sort_unstable();
    remove(draft, &folded);
}
