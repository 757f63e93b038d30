//! A norm is computed by the first projection that reads it.

use super::{Uses, changed_between, remove};
use crate::{FusedOps, Norm, Op, Value, Weights, builder::Draft};

/// `n = norm(x); y = w·n` becomes one op where the device claims that norm and no op between them reads `n`
/// or changes `x`. Where other ops read `n` later, the projection writes it too, if the device claims that. A
/// norm of groups of columns stays as it is.
pub(super) fn fold_norms(draft: &mut Draft, weights: &Weights, fused: &FusedOps) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        let Op::MatMul { input: rows, norm: None, residual, .. } = draft.ops[index] else { continue };
        let Some(&at) = uses.made_at.get(&rows) else { continue };
        let Some(Folded { raw, norm }) = claimed(&draft.ops[at], fused) else { continue };
        let is_grouped = weights.get(norm.weight).cols() != draft.info(raw).cols;
        if is_grouped || folded.contains(&at) || changed_between(draft, raw, at..index) {
            continue;
        }
        // Whoever reads the rows before this projection, or as its residual, needs them before it has run.
        let is_first = !draft.ops[at..index].iter().any(|op| op.inputs().contains(&rows));
        let is_alone = uses.readers.get(&rows) == Some(&1);
        let may_write_rows = fused.norm_output && is_first && residual != Some(rows);
        if !is_alone && !may_write_rows {
            continue;
        }
        if let Op::MatMul { input, norm: own, normed, .. } = &mut draft.ops[index] {
            (*input, *own, *normed) = (raw, Some(norm), (!is_alone).then_some(rows));
            folded.push(at);
        }
    }
    folded.sort_unstable();
    remove(draft, &folded);
}

/// A norm that a projection may compute.
struct Folded {
    raw: Value,
    norm: Norm,
}

/// The op as a norm, if the device claims projections with such norms.
fn claimed(op: &Op<Value>, fused: &FusedOps) -> Option<Folded> {
    match *op {
        Op::RmsNorm { input: raw, weight, eps, .. } if fused.norm_matmul => {
            Some(Folded { raw, norm: Norm { weight, bias: None, eps } })
        }
        Op::LayerNorm { input: raw, weight, bias, eps, .. } if fused.layer_norm_matmul => {
            Some(Folded { raw, norm: Norm { weight, bias: Some(bias), eps } })
        }
        _ => None,
    }
}
