//! Projections of one input, side by side.

use super::{plain_matmul, turned_between};
use crate::{Activation, Op, Part, Value, Weights, builder::Draft};

/// Projections of one input, with nothing changing it in between, become one; their outputs become its columns.
pub(super) fn concat_matmuls(draft: &mut Draft, weights: &Weights) {
    let mut index = 0;
    while index < draft.ops.len() {
        let group = group(draft, index);
        if group.len() > 1 {
            merge(draft, &group, weights);
        }
        index += 1;
    }
}

fn group(draft: &Draft, first: usize) -> Vec<usize> {
    let Some((input, ..)) = plain_matmul(&draft.ops[first]) else { return vec![] };
    (first..draft.ops.len())
        .filter(|&at| plain_matmul(&draft.ops[at]).is_some_and(|(other, ..)| other == input))
        .take_while(|&at| !turned_between(draft, input, first, at))
        .collect()
}

fn merge(draft: &mut Draft, group: &[usize], weights: &Weights) {
    let members: Vec<(Value, Part, Value)> =
        group.iter().filter_map(|&at| plain_matmul(&draft.ops[at])).collect();
    let (input, rows) = (members[0].0, draft.info(members[0].2).rows);
    let cols = |part: &Part| weights.get(part.weight).rows();
    let whole = draft.new_value(members.iter().map(|(_, part, _)| cols(part)).sum(), rows);
    let mut first_col = 0;
    for (_, part, out) in &members {
        draft.values[out.0 as usize].part_of = Some((whole, first_col));
        first_col += cols(part);
    }
    let parts = members.iter().map(|(_, part, _)| *part).collect();
    draft.ops[group[0]] =
        Op::MatMul { input, norm: None, parts, activation: Activation::None, residual: None, out: whole };
    for &at in group[1..].iter().rev() {
        draft.ops.remove(at);
    }
}
