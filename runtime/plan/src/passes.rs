//! Fusion: short rewrites of a model that is written down but not yet placed.
//!
//! Matching is written once, here, and not per backend. A pass runs only where the device claims the fused op in its
//! [`FusedOps`], so the unfused sequence always exists and is what the oracle runs.
//!
//! * *concat*: projections of one input become one op with several weights. The input is read (and on a CPU
//!   quantised) once and the threads meet once.
//! * *epilogue*: a projection followed by the addition of a residual adds it while storing.

use std::collections::HashMap;

use crate::{Epilogue, FusedOps, Op, Value, WeightId, Weights, builder::Draft};

/// Runs every pass that the device claims. The epilogue comes first: a projection that adds is not concatenated.
pub(crate) fn run(draft: &mut Draft, fused: &FusedOps, weights: &Weights) {
    if fused.add_epilogue {
        fold_add_into_matmul(draft);
    }
    if fused.concat_matmul {
        concat_matmuls(draft, weights);
    }
}

/// `t = w·x; y = t + r` (either order) becomes `y = w·x + r` where nothing else reads `t` and `r` exists before `t`.
fn fold_add_into_matmul(draft: &mut Draft) {
    let mut readers: HashMap<Value, usize> = HashMap::new();
    for value in draft.ops.iter().flat_map(Op::inputs) {
        *readers.entry(value).or_default() += 1;
    }
    let mut made_at: HashMap<Value, usize> = HashMap::new();
    let mut folded = Vec::new();
    for index in 0..draft.ops.len() {
        if let Some(out) = draft.ops[index].output() {
            made_at.insert(out, index);
        }
        let Op::Add { a, b, out } = draft.ops[index] else { continue };
        // The projection must be the op's other operand, made after the residual, so that it can add it at once.
        let Some((product, residual)) = [(b, a), (a, b)].into_iter().find(|(product, residual)| {
            let (Some(&at), Some(&before)) = (made_at.get(product), made_at.get(residual)) else {
                return false;
            };
            let plain = matches!(draft.ops[at], Op::MatMul { epilogue: Epilogue::None, .. });
            plain && before < at && readers[product] == 1 && !turned_between(draft, *residual, at, index)
        }) else {
            continue;
        };
        let at = made_at[&product];
        if let Op::MatMul { epilogue, out: target, .. } = &mut draft.ops[at] {
            *epilogue = Epilogue::Add(residual);
            *target = out;
            made_at.insert(out, at);
            folded.push(index);
        }
    }
    let mut index = 0;
    draft.ops.retain(|_| {
        index += 1;
        folded.binary_search(&(index - 1)).is_err()
    });
}

/// Projections of one input, with nothing changing it in between, become one; their outputs become its columns.
fn concat_matmuls(draft: &mut Draft, weights: &Weights) {
    let mut index = 0;
    while index < draft.ops.len() {
        let group = concat_group(draft, index);
        if group.len() > 1 {
            merge(draft, &group, weights);
        }
        index += 1;
    }
}

fn plain_matmul(op: &Op<Value>) -> Option<(Value, WeightId, Value)> {
    match op {
        Op::MatMul { input, weights, epilogue: Epilogue::None, out } if weights.len() == 1 => {
            Some((*input, weights[0], *out))
        }
        _ => None,
    }
}

fn concat_group(draft: &Draft, first: usize) -> Vec<usize> {
    let Some((input, ..)) = plain_matmul(&draft.ops[first]) else { return vec![] };
    (first..draft.ops.len())
        .filter(|&at| plain_matmul(&draft.ops[at]).is_some_and(|(other, ..)| other == input))
        .take_while(|&at| !turned_between(draft, input, first, at))
        .collect()
}

fn merge(draft: &mut Draft, group: &[usize], weights: &Weights) {
    let parts: Vec<(Value, WeightId, Value)> =
        group.iter().filter_map(|&at| plain_matmul(&draft.ops[at])).collect();
    let (input, rows) = (parts[0].0, draft.info(parts[0].2).rows);
    let whole = draft.new_value(parts.iter().map(|(_, w, _)| weights.get(*w).rows()).sum(), rows);
    let mut first_col = 0;
    for (_, weight, out) in &parts {
        draft.values[out.0 as usize].part_of = Some((whole, first_col));
        first_col += weights.get(*weight).rows();
    }
    let weights = parts.iter().map(|(_, weight, _)| *weight).collect();
    draft.ops[group[0]] = Op::MatMul { input, weights, epilogue: Epilogue::None, out: whole };
    for &at in group[1..].iter().rev() {
        draft.ops.remove(at);
    }
}

/// Whether an op in `from..to` changes `value` in place.
fn turned_between(draft: &Draft, value: Value, from: usize, to: usize) -> bool {
    draft.ops[from..to].iter().any(|op| matches!(op, Op::Rope { data, .. } if *data == value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Hyper, Limits, Plan, PlanBuilder, RopeLayout, RopeSpec, Weight};

    const FUSED: FusedOps = FusedOps { concat_matmul: true, add_epilogue: true };

    /// The names of the ops that remain of a model of three square weights; embedding and logits surround `write`.
    fn fused(write: impl Fn(&mut PlanBuilder<'_>, Value, [WeightId; 3]) -> Value) -> Vec<&'static str> {
        let mut weights = Weights::new();
        let ids = ["embedding", "a", "b", "c"]
            .map(|name| weights.push(Weight::from_f32(name, (8, 8), &[0.5; 64]).unwrap()).unwrap());
        let hyper = Hyper { width: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 8, vocab: 8, context: 8 };
        let mut b = PlanBuilder::new(&weights, hyper, Limits { rows: 2, sequences: 1, logits_rows: 1 });
        let x = b.embed(ids[0]);
        let x = write(&mut b, x, [ids[1], ids[2], ids[3]]);
        let x = b.gather_rows(x);
        b.logits(x, ids[0]);
        let plan: Plan = b.finish(&FUSED).unwrap();
        let names: Vec<_> = plan.ops().iter().map(Op::name).collect();
        names[1..names.len() - 2].to_vec()
    }

    fn rope() -> RopeSpec {
        RopeSpec { layout: RopeLayout::Neox, base: 1e4, dims: 8, head_dim: 8 }
    }

    #[test]
    fn an_addition_is_folded_in_either_order() {
        let after = |b: &mut PlanBuilder<'_>, x, [a, ..]: [WeightId; 3]| {
            let t = b.matmul(x, a);
            b.add(x, t)
        };
        let before = |b: &mut PlanBuilder<'_>, x, [a, ..]: [WeightId; 3]| {
            let t = b.matmul(x, a);
            b.add(t, x)
        };
        assert_eq!(fused(after), ["matmul"]);
        assert_eq!(fused(before), ["matmul"]);
    }

    #[test]
    fn a_product_that_is_read_again_keeps_its_addition() {
        let names = fused(|b, x, [a, ..]| {
            let t = b.matmul(x, a);
            let y = b.add(x, t);
            b.add(y, t)
        });
        assert_eq!(names, ["matmul", "add", "add"]);
    }

    #[test]
    fn a_residual_that_is_made_or_turned_later_is_not_folded() {
        let made = fused(|b, x, [a, ..]| {
            let t = b.matmul(x, a);
            let later = b.add(x, x);
            b.add(later, t)
        });
        assert_eq!(made, ["matmul", "add", "add"]);
        let turned = fused(|b, x, [a, ..]| {
            let t = b.matmul(x, a);
            let x = b.rope(x, rope());
            b.add(x, t)
        });
        assert_eq!(turned, ["matmul", "rope", "add"]);
    }

    #[test]
    fn projections_of_an_input_that_is_turned_between_stay_apart() {
        let together = fused(|b, x, [a, c, d]| {
            let (p, q, r) = (b.matmul(x, a), b.matmul(x, c), b.matmul(x, d));
            let y = b.silu_mul(p, q);
            b.silu_mul(y, r)
        });
        assert_eq!(together, ["matmul", "silu_mul", "silu_mul"]);
        let apart = fused(|b, x, [a, c, _]| {
            let p = b.matmul(x, a);
            let x = b.rope(x, rope());
            let q = b.matmul(x, c);
            b.silu_mul(p, q)
        });
        assert_eq!(apart, ["matmul", "rope", "matmul", "silu_mul"]);
    }
}
