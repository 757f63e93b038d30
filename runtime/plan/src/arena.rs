//! The arena: one allocation that all intermediate results of a step share.
//!
//! A value is live from the op that makes it to the last op that reads it. Two values may share bytes only
//! when their live ranges do not overlap. Offsets are assigned to the largest value first, each time the
//! lowest free one. The size of the arena is thus known before it is allocated, and addresses never change.

use std::collections::HashMap;

use crate::{
    Buf, Limits, PlanError, Value,
    builder::{ColumnsOf, Draft},
};

/// Every buffer starts at a multiple of this: a cache line, and the widest vector register.
pub const ALIGN_BYTES: usize = 64;

/// The live range of one allocation, ops `first..=last`, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LiveRange {
    value: Value,
    first: usize,
    last: usize,
    bytes: usize,
}

/// The offset of each value.
pub(crate) struct Layout {
    bufs: HashMap<Value, Buf>,
    pub(crate) bytes: usize,
}

impl Layout {
    /// The buffer of a value that an op makes.
    pub(crate) fn buf(&self, value: Value) -> Buf {
        self.bufs[&value]
    }
}

/// Assigns an offset to every value of `draft`, for steps up to `limits`.
pub(crate) fn lay_out(draft: &Draft, limits: &Limits) -> Result<Layout, PlanError> {
    let overflow = PlanError::ArenaOverflow { rows: limits.rows };
    let ranges = ranges(draft, limits).ok_or(overflow)?;
    let offsets = offsets(&ranges);
    let mut bytes = 0;
    let mut bufs = HashMap::new();
    for (range, &offset) in ranges.iter().zip(&offsets) {
        bytes =
            bytes.max(offset.checked_add(range.bytes).ok_or(PlanError::ArenaOverflow { rows: limits.rows })?);
        let info = draft.info(range.value);
        bufs.insert(range.value, Buf { offset, cols: info.cols, stride: info.cols, rows: info.rows });
    }
    for (value, info) in (0..).map(Value).zip(&draft.values) {
        let Some(ColumnsOf { whole, first_col }) = info.columns_of else { continue };
        if let Some(&base) = bufs.get(&whole) {
            let offset = base.offset + first_col * size_of::<f32>();
            bufs.insert(value, Buf { offset, cols: info.cols, ..base });
        }
    }
    Ok(Layout { bufs, bytes })
}

fn ranges(draft: &Draft, limits: &Limits) -> Option<Vec<LiveRange>> {
    let mut ranges: Vec<LiveRange> = Vec::new();
    let mut at: HashMap<Value, usize> = HashMap::new();
    for (index, op) in draft.ops.iter().enumerate() {
        for value in op.inputs().into_iter().chain(op.outputs()) {
            let owner = draft.info(value).columns_of.map_or(value, |columns| columns.whole);
            let range_index = *at.entry(owner).or_insert(ranges.len());
            if range_index == ranges.len() {
                let info = draft.info(owner);
                let bytes = info.cols.checked_mul(limits.of(info.rows))?.checked_mul(size_of::<f32>())?;
                let bytes = bytes.checked_next_multiple_of(ALIGN_BYTES)?;
                ranges.push(LiveRange { value: owner, first: index, last: index, bytes });
            }
            ranges[range_index].last = index;
        }
    }
    Some(ranges)
}

/// An offset for each live range, in their order.
fn offsets(ranges: &[LiveRange]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ranges.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(ranges[i].bytes), ranges[i].first));
    let mut done: Vec<usize> = Vec::with_capacity(ranges.len());
    let mut offsets = vec![0usize; ranges.len()];
    for i in order {
        let mut occupied: Vec<(usize, usize)> = done
            .iter()
            .filter(|&&j| ranges[i].first <= ranges[j].last && ranges[j].first <= ranges[i].last)
            .map(|&j| (offsets[j], offsets[j].saturating_add(ranges[j].bytes)))
            .collect();
        occupied.sort_unstable();
        let mut offset = 0usize;
        for (start, end) in occupied {
            if offset.saturating_add(ranges[i].bytes) <= start {
                break;
            }
            offset = offset.max(end);
        }
        offsets[i] = offset;
        done.push(i);
    }
    offsets
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn live_buffers_never_overlap(raw in prop::collection::vec((0usize..40, 0usize..12, 1usize..9), 1..60)) {
            let ranges: Vec<LiveRange> = raw
                .iter()
                .enumerate()
                .map(|(i, &(first, length, lines))| LiveRange {
                    value: Value(i as u32), first, last: first + length, bytes: lines * ALIGN_BYTES,
                })
                .collect();
            let offsets = offsets(&ranges);
            for i in 0..ranges.len() {
                prop_assert_eq!(offsets[i] % ALIGN_BYTES, 0);
                for j in 0..i {
                    let together = ranges[i].first <= ranges[j].last && ranges[j].first <= ranges[i].last;
                    let apart = offsets[i] + ranges[i].bytes <= offsets[j] || offsets[j] + ranges[j].bytes <= offsets[i];
                    prop_assert!(!together || apart, "{:?} and {:?} overlap", ranges[i], ranges[j]);
                }
            }
            let end = offsets.iter().zip(&ranges).map(|(o, l)| o + l.bytes).max().unwrap_or(0);
            prop_assert!(end <= ranges.iter().map(|l| l.bytes).sum::<usize>(), "reuse must not cost memory");
        }
    }
}
