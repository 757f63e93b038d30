//! Epilogues: the bias, the activation and the residual that follow a projection become part of its op.

use super::{Uses, changed_between, remove};
use crate::{Activation, GeluForm, Op, Value, builder::Draft};

/// `t = w·x; y = t + bias` becomes one op where no other op reads `t`.
pub(super) fn fold_bias(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::AddRow { input, weight, out } = draft.ops[index] else { return None };
        let at = uses.made_for_one_reader(input)?;
        let Op::MatMul { segments, activation: Activation::None, residual: None, out: target, .. } =
            &mut draft.ops[at]
        else {
            return None;
        };
        let [segment] = &mut segments[..] else { return None };
        if segment.bias.is_some() {
            return None;
        }
        (segment.bias, *target) = (Some(weight), out);
        Some((at, out))
    });
}

/// `t = w·x + bias; y = gelu(t)`, by the error function, becomes one op where no other op reads `t`.
pub(super) fn fold_gelu(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::Gelu { input, form: GeluForm::Erf, out } = draft.ops[index] else { return None };
        let at = uses.made_for_one_reader(input)?;
        let Op::MatMul { activation: activation @ Activation::None, residual: None, out: target, .. } =
            &mut draft.ops[at]
        else {
            return None;
        };
        (*activation, *target) = (Activation::Gelu, out);
        Some((at, out))
    });
}

/// `t = w·x; y = t + r` (either order) becomes `y = w·x + r` where no other op reads `t` and `r` exists
/// before `t`.
pub(super) fn fold_add(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::Add { a, b, out } = draft.ops[index] else { return None };
        // One operand is the projection's product, the other the residual, which must exist when the
        // projection runs.
        let (at, residual) = [(b, a), (a, b)].into_iter().find_map(|(product, residual)| {
            let (at, before) = (uses.made_for_one_reader(product)?, *uses.made_at.get(&residual)?);
            let plain = matches!(draft.ops[at], Op::MatMul { residual: None, .. });
            let there = before < at && !changed_between(draft, residual, at..index);
            (plain && there).then_some((at, residual))
        })?;
        let Op::MatMul { residual: added, out: target, .. } = &mut draft.ops[at] else { return None };
        (*added, *target) = (Some(residual), out);
        Some((at, out))
    });
}

/// Calls `into` for every op. `into` may fold the op into an earlier one; it returns the earlier op's index
/// and new output.
fn fold(draft: &mut Draft, into: impl Fn(&mut Draft, usize, &Uses) -> Option<(usize, Value)>) {
    let mut uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        if let Some((at, out)) = into(draft, index, &uses) {
            uses.made_at.insert(out, at);
            folded.push(index);
        }
    }
    remove(draft, &folded);
}
