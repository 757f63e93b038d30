//! Where the threads of a step need a barrier.
//!
//! Ops split their work differently (by rows, features, heads). So a barrier is needed where an op accesses
//! bytes that an op after the last barrier wrote, or writes bytes that one read. This is decided once, when a
//! plan is compiled.

use trustformers_plan::{Buf, Op};

/// Memory that ops share.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Resource {
    /// A part of the arena.
    Arena(Buf),
    /// One layer of the cache.
    Cache(usize),
    /// The scratch memory that projections and attentions share.
    Scratch,
}

/// For each op, whether a barrier must lie before it.
pub(crate) fn barriers(ops: &[Op]) -> Vec<bool> {
    let mut since: Vec<(Resource, bool)> = Vec::new();
    ops.iter()
        .map(|op| {
            let mine = accesses(op);
            let conflicts =
                |(r, w): &(Resource, bool)| since.iter().any(|(q, v)| (*w || *v) && conflict(r, q));
            let barrier = mine.iter().any(conflicts);
            if barrier {
                since.clear();
            }
            since.extend(mine);
            barrier
        })
        .collect()
}

/// The resources that an op accesses, and whether it writes them.
fn accesses(op: &Op) -> Vec<(Resource, bool)> {
    let mut list: Vec<_> = op.inputs().into_iter().map(|buf| (Resource::Arena(buf), false)).collect();
    list.extend(op.changes().into_iter().chain(op.output()).map(|buf| (Resource::Arena(buf), true)));
    match op {
        Op::KvWrite { layer, .. } | Op::RopeKvWrite { layer, .. } => {
            list.push((Resource::Cache(*layer), true));
        }
        Op::Attention { layer, .. } => {
            list.push((Resource::Cache(*layer), false));
            list.push((Resource::Scratch, true));
        }
        Op::MatMul { .. } | Op::Logits { .. } => list.push((Resource::Scratch, true)),
        // An encoder's attention uses scratch memory of each thread only.
        Op::EncoderAttention { .. }
        | Op::Embed { .. }
        | Op::EmbedPositions { .. }
        | Op::AddRow { .. }
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Rope { .. }
        | Op::Gelu { .. }
        | Op::SiluMul { .. }
        | Op::ExpertsUp { .. }
        | Op::ExpertsDown { .. }
        | Op::Mul { .. }
        | Op::Scale { .. }
        | Op::SoftCap { .. }
        | Op::Add { .. }
        | Op::GatherRows { .. }
        | Op::Pool { .. }
        | Op::AllReduce { .. } => {}
    }
    list
}

fn conflict(a: &Resource, b: &Resource) -> bool {
    match (a, b) {
        (Resource::Arena(a), Resource::Arena(b)) => may_overlap(a, b),
        (a, b) => a == b,
    }
}

/// Whether two buffers may share bytes. Column ranges of one allocation are disjoint when their columns are.
/// The number of rows of a step is not known here, so any other buffer is taken to reach to the arena's end.
fn may_overlap(a: &Buf, b: &Buf) -> bool {
    let (low, high) = if a.offset <= b.offset { (a, b) } else { (b, a) };
    let distance = (high.offset - low.offset) / size_of::<f32>();
    let side_by_side = low.stride == high.stride
        && low.rows == high.rows
        && distance >= low.cols
        && distance + high.cols <= low.stride;
    !side_by_side
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_plan::{AttentionShape, RopeLayout, RopeScaling, RopeSpec, RowSpace};

    fn buf(offset: usize, cols: usize, stride: usize) -> Buf {
        Buf { offset, cols, stride, rows: RowSpace::Tokens }
    }

    #[test]
    fn columns_of_one_allocation_are_disjoint() {
        assert!(!may_overlap(&buf(0, 32, 64), &buf(128, 16, 64)));
        assert!(!may_overlap(&buf(192, 16, 64), &buf(128, 16, 64)));
        assert!(may_overlap(&buf(0, 33, 64), &buf(128, 16, 64)));
        assert!(may_overlap(&buf(128, 16, 64), &buf(128, 16, 64)));
        // Its last columns would reach into the next row of the first buffer.
        assert!(may_overlap(&buf(0, 32, 64), &buf(192, 17, 64)));
        assert!(may_overlap(&buf(0, 32, 64), &buf(128, 16, 32)));
    }

    #[test]
    fn rope_of_queries_and_keys_needs_one_barrier() {
        let scaling = RopeScaling::NONE;
        let spec = RopeSpec { layout: RopeLayout::Neox, base: 1e4, dims: 8, head_dim: 8, scaling };
        let (q, k, v) = (buf(0, 32, 64), buf(128, 16, 64), buf(192, 16, 64));
        let ops = [
            Op::Rope { data: q, spec },
            Op::Rope { data: k, spec },
            Op::KvWrite { layer: 0, keys: k, values: v },
            Op::KvWrite { layer: 1, keys: k, values: v },
        ];
        assert_eq!(barriers(&ops), [false, false, true, false]);
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8 };
        let fused = [
            Op::RopeKvWrite { layer: 0, query: q, keys: k, values: v, spec },
            Op::Attention { layer: 0, query: q, shape, scores: 1.0.into(), out: buf(8192, 32, 32) },
        ];
        assert_eq!(barriers(&fused), [false, true]);
    }
}
