//! A norm that only one projection reads is taken by that projection.

use super::{Uses, remove, turned_between};
use crate::{Norm, Op, builder::Draft};

/// `n = rms_norm(x); y = w·n` becomes one op where nothing else reads `n` and `x` is still what it was.
pub(super) fn fold_norm(draft: &mut Draft) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        let Op::MatMul { input: normed, norm: None, .. } = draft.ops[index] else { continue };
        let Some(at) = uses.only_for_one(normed) else { continue };
        let Op::RmsNorm { input: raw, weight, eps, .. } = draft.ops[at] else { continue };
        if turned_between(draft, raw, at, index) {
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
