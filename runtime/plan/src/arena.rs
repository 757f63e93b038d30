//! Placing buffers: how all intermediate results of a step share one block of memory.
//!
//! A value lives from the op that makes it to the last op that reads it; two values may share bytes only when their
//! lives do not meet. Values are placed largest first, each at the lowest free offset. The result is one number that can
//! be printed, exported and compared with the machine, and the addresses never change.

use std::collections::HashMap;

use crate::{Buf, Limits, PlanError, Value, builder::Draft};

/// Every buffer starts at a multiple of this: a cache line, and the widest vector register.
pub const ALIGN_BYTES: usize = 64;

/// One allocation's life: ops `first..=last`, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life {
    value: Value,
    first: usize,
    last: usize,
    bytes: usize,
}

/// Where each value lies.
pub(crate) struct Layout {
    bufs: HashMap<Value, Buf>,
    pub(crate) bytes: usize,
}

impl Layout {
    /// Place of a value that some op makes.
    pub(crate) fn buf(&self, value: Value) -> Buf {
        self.bufs[&value]
    }
}

/// Places every value of `draft` for steps up to `limits`.
pub(crate) fn place(draft: &Draft, limits: &Limits) -> Result<Layout, PlanError> {
    let overflow = PlanError::ArenaOverflow { rows: limits.rows };
    let lives = lives(draft, limits).ok_or(overflow)?;
    let offsets = offsets(&lives);
    let mut bytes = 0;
    let mut bufs = HashMap::new();
    for (life, &offset) in lives.iter().zip(&offsets) {
        bytes =
            bytes.max(offset.checked_add(life.bytes).ok_or(PlanError::ArenaOverflow { rows: limits.rows })?);
        let info = draft.info(life.value);
        bufs.insert(life.value, Buf { offset, cols: info.cols, stride: info.cols, rows: info.rows });
    }
    for (value, info) in (0..).map(Value).zip(&draft.values) {
        let Some((whole, first_col)) = info.part_of else { continue };
        if let Some(&base) = bufs.get(&whole) {
            let offset = base.offset + first_col * size_of::<f32>();
            bufs.insert(value, Buf { offset, cols: info.cols, ..base });
        }
    }
    Ok(Layout { bufs, bytes })
}

fn lives(draft: &Draft, limits: &Limits) -> Option<Vec<Life>> {
    let mut lives: Vec<Life> = Vec::new();
    let mut at: HashMap<Value, usize> = HashMap::new();
    for (index, op) in draft.ops.iter().enumerate() {
        for value in op.inputs().into_iter().chain(op.output()) {
            let owner = draft.info(value).part_of.map_or(value, |(whole, _)| whole);
            let slot = *at.entry(owner).or_insert(lives.len());
            if slot == lives.len() {
                let info = draft.info(owner);
                let bytes = info.cols.checked_mul(limits.of(info.rows))?.checked_mul(size_of::<f32>())?;
                let bytes = bytes.checked_next_multiple_of(ALIGN_BYTES)?;
                lives.push(Life { value: owner, first: index, last: index, bytes });
            }
            lives[slot].last = index;
        }
    }
    Some(lives)
}

/// An offset for each life, in their order.
fn offsets(lives: &[Life]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lives[i].bytes), lives[i].first));
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
    let mut offsets = vec![0usize; lives.len()];
    for i in order {
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| lives[i].first <= lives[j].last && lives[j].first <= lives[i].last)
            .map(|&j| (offsets[j], offsets[j].saturating_add(lives[j].bytes)))
            .collect();
        taken.sort_unstable();
        let mut offset = 0usize;
        for (start, end) in taken {
            if offset.saturating_add(lives[i].bytes) <= start {
                break;
            }
            offset = offset.max(end);
        }
        offsets[i] = offset;
        placed.push(i);
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
            let lives: Vec<Life> = raw
                .iter()
                .enumerate()
                .map(|(i, &(first, length, lines))| Life {
                    value: Value(i as u32), first, last: first + length, bytes: lines * ALIGN_BYTES,
                })
                .collect();
            let offsets = offsets(&lives);
            for i in 0..lives.len() {
                prop_assert_eq!(offsets[i] % ALIGN_BYTES, 0);
                for j in 0..i {
                    let together = lives[i].first <= lives[j].last && lives[j].first <= lives[i].last;
                    let apart = offsets[i] + lives[i].bytes <= offsets[j] || offsets[j] + lives[j].bytes <= offsets[i];
                    prop_assert!(!together || apart, "{:?} and {:?} overlap", lives[i], lives[j]);
                }
            }
            let end = offsets.iter().zip(&lives).map(|(o, l)| o + l.bytes).max().unwrap_or(0);
            prop_assert!(end <= lives.iter().map(|l| l.bytes).sum::<usize>(), "reuse must not cost memory");
        }
    }
}
