//! Projections of one input become one op, their outputs side by side.

use super::{changed_between, plain_matmul};
use crate::{
    Activation, FusedOps, Op, Segment, Value, Weights,
    builder::{ColumnsOf, Draft},
};

/// Projections that read one input, which no op between them changes, become one op with several segments.
/// Where the device does not claim [`FusedOps::concat_mixed_types`], only projections whose weights have one
/// type are joined.
pub(super) fn concat_matmuls(draft: &mut Draft, weights: &Weights, fused: &FusedOps) {
    let mut index = 0;
    while index < draft.ops.len() {
        let group = group(draft, index, weights, fused);
        if group.len() > 1 {
            merge(draft, &group, weights);
        }
        index += 1;
    }
}

/// The projections from op `first` on that can be joined with it, itself included.
fn group(draft: &Draft, first: usize, weights: &Weights, fused: &FusedOps) -> Vec<usize> {
    let Some((input, segment, _)) = plain_matmul(&draft.ops[first]) else { return vec![] };
    let dtype_of = |segment: &Segment| weights.get(segment.weight).dtype();
    let fits = |at: usize| {
        plain_matmul(&draft.ops[at]).is_some_and(|(other_input, other, _)| {
            other_input == input && (fused.concat_mixed_types || dtype_of(&other) == dtype_of(&segment))
        })
    };
    (first..draft.ops.len())
        .filter(|&at| fits(at))
        .take_while(|&at| !changed_between(draft, input, first..at))
        .collect()
}

fn merge(draft: &mut Draft, group: &[usize], weights: &Weights) {
    let members: Vec<(Value, Segment, Value)> =
        group.iter().filter_map(|&at| plain_matmul(&draft.ops[at])).collect();
    let (input, rows) = (members[0].0, draft.info(members[0].2).rows);
    let cols = |segment: &Segment| weights.get(segment.weight).rows();
    let whole = draft.new_value(members.iter().map(|(_, segment, _)| cols(segment)).sum(), rows);
    let mut first_col = 0;
    for (_, segment, out) in &members {
        draft.values[out.0 as usize].columns_of = Some(ColumnsOf { whole, first_col });
        first_col += cols(segment);
    }
    let segments = members.iter().map(|(_, segment, _)| *segment).collect();
    let (activation, residual) = (Activation::None, None);
    draft.ops[group[0]] =
        Op::MatMul { input, norm: None, normed: None, segments, activation, residual, out: whole };
    for &at in group[1..].iter().rev() {
        draft.ops.remove(at);
    }
}
