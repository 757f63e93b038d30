//! What follows a projection becomes part of it.

use super::{Uses, remove, turned_between};
use crate::{Activation, Op, Value, builder::Draft};

/// `t = w·x; y = t + bias` becomes one op where nothing else reads `t`.
pub(super) fn fold_bias(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::AddRow { input, weight, out } = draft.ops[index] else { return None };
        let at = uses.only_for_one(input)?;
        let Op::MatMul { parts, activation: Activation::None, residual: None, out: target, .. } =
            &mut draft.ops[at]
        else {
            return None;
        };
        let [part] = &mut parts[..] else { return None };
        if part.bias.is_some() {
            return None;
        }
        (part.bias, *target) = (Some(weight), out);
        Some((at, out))
    });
}

/// `t = w·x + bias; y = gelu(t)` becomes one op where nothing else reads `t`.
pub(super) fn fold_gelu(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::Gelu { input, out } = draft.ops[index] else { return None };
        let at = uses.only_for_one(input)?;
        let Op::MatMul { activation: activation @ Activation::None, residual: None, out: target, .. } =
            &mut draft.ops[at]
        else {
            return None;
        };
        (*activation, *target) = (Activation::Gelu, out);
        Some((at, out))
    });
}

/// `t = w·x; y = t + r` (either order) becomes `y = w·x + r` where nothing else reads `t` and `r` exists before `t`.
pub(super) fn fold_add(draft: &mut Draft) {
    fold(draft, |draft, index, uses| {
        let Op::Add { a, b, out } = draft.ops[index] else { return None };
        // The projection must be the op's other operand, made after the residual, so that it can add it at once.
        let (at, residual) = [(b, a), (a, b)].into_iter().find_map(|(product, residual)| {
            let (at, before) = (uses.only_for_one(product)?, *uses.made_at.get(&residual)?);
            let plain = matches!(draft.ops[at], Op::MatMul { residual: None, .. });
            let there = before < at && !turned_between(draft, residual, at, index);
            (plain && there).then_some((at, residual))
        })?;
        let Op::MatMul { residual: added, out: target, .. } = &mut draft.ops[at] else { return None };
        (*added, *target) = (Some(residual), out);
        Some((at, out))
    });
}

/// Offers every op to `into`, which folds it into an earlier one and answers that one's number and new output.
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
