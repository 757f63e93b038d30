//! Where the threads of a step need a barrier.
//!
//! Ops split their work differently (by rows, features, heads). So a barrier is needed where an op accesses
//! bytes that an op after the last barrier wrote, or writes bytes that one read. This is decided once, when a
//! plan is compiled.
//!
//! A step in which each row is alone needs no barrier between the rotation of its queries, with the write of
//! its key and value, and its attention: whoever attends with a query rotates it, and whoever attends to the
//! row's own position writes it. Where the plan allows that, the barrier is [`Fence::Joint`].

use trustformers_plan::{Buf, Limits, Op};

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

/// What must lie before an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fence {
    /// Nothing.
    Open,
    /// A barrier.
    Barrier,
    /// A barrier, except where a step computes the op together with the one before it.
    Joint,
}

/// For each op, what must lie before it in steps up to `limits`.
pub(crate) fn fences(ops: &[Op], limits: &Limits) -> Vec<Fence> {
    // Accesses since the last barrier that every step has; the last ones are those of the op before.
    let mut since: Vec<(Resource, bool)> = Vec::new();
    let mut of_op_before = 0;
    let mut fences = Vec::with_capacity(ops.len());
    for (index, op) in ops.iter().enumerate() {
        let mine = accesses(op);
        let conflicts = |earlier: &[(Resource, bool)]| {
            mine.iter().any(|(r, w)| earlier.iter().any(|(q, v)| (*w || *v) && conflict(r, q)))
        };
        let fence = if !conflicts(&since) {
            Fence::Open
        } else if is_joint(ops, index, limits) && !conflicts(&since[..since.len() - of_op_before]) {
            Fence::Joint
        } else {
            Fence::Barrier
        };
        if fence == Fence::Barrier {
            since.clear();
        }
        of_op_before = mine.len();
        since.extend(mine);
        fences.push(fence);
    }
    fences
}

/// Whether the op is an attention that a step may compute together with the op before it. That op rotates the
/// queries of this attention and writes the same layer of the cache; no later op reads the rotated queries,
/// which the threads then have for themselves; and the results replace nothing that another thread may still
/// read.
fn is_joint(ops: &[Op], index: usize, limits: &Limits) -> bool {
    let Some(before) = index.checked_sub(1) else { return false };
    let (
        &Op::RopeKvWrite { layer, query, keys, values, .. },
        &Op::Attention { layer: own_layer, query: own_query, out, .. },
    ) = (&ops[before], &ops[index])
    else {
        return false;
    };
    let is_free = [query, keys, values].iter().all(|buf| are_apart(&out, buf, limits));
    layer == own_layer && query == own_query && is_free && !is_read(&ops[index + 1..], &query)
}

/// Whether an op reads a value before another one replaces it.
fn is_read(ops: &[Op], value: &Buf) -> bool {
    for op in ops {
        if op.inputs().contains(value) {
            return true;
        }
        if op.outputs().iter().any(|filled| covers(filled, value)) {
            return false;
        }
    }
    false
}

/// Whether all of a buffer's columns are columns of one that is filled.
fn covers(filled: &Buf, buf: &Buf) -> bool {
    let Some(distance) = buf.offset.checked_sub(filled.offset) else { return false };
    filled.rows == buf.rows
        && filled.stride == buf.stride
        && distance / size_of::<f32>() + buf.cols <= filled.cols
}

/// Whether two buffers share no bytes in any step up to `limits`.
fn are_apart(a: &Buf, b: &Buf, limits: &Limits) -> bool {
    let end = |buf: &Buf| {
        let values = limits.of(buf.rows).saturating_sub(1) * buf.stride + buf.cols;
        buf.offset + values * size_of::<f32>()
    };
    !may_overlap(a, b) || end(a) <= b.offset || end(b) <= a.offset
}

/// The resources that an op accesses, and whether it writes them.
fn accesses(op: &Op) -> Vec<(Resource, bool)> {
    let mut list: Vec<_> = op.inputs().into_iter().map(|buf| (Resource::Arena(buf), false)).collect();
    list.extend(op.changes().into_iter().chain(op.outputs()).map(|buf| (Resource::Arena(buf), true)));
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
    use trustformers_conformance::models::Decoder;
    use trustformers_plan::{AttentionShape, DType, FusedOps, RopeLayout, RopeScaling, RopeSpec, RowSpace};

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

    const LIMITS: Limits = Limits { rows: 16, sequences: 4, logits_rows: 4 };

    fn rope() -> RopeSpec {
        let scaling = RopeScaling::NONE;
        RopeSpec { layout: RopeLayout::Neox, base: 1e4, dims: 8, head_dim: 8, scaling }
    }

    #[test]
    fn rope_of_queries_and_keys_needs_one_barrier() {
        let (q, k, v) = (buf(0, 32, 64), buf(128, 16, 64), buf(192, 16, 64));
        let ops = [
            Op::Rope { data: q, spec: rope() },
            Op::Rope { data: k, spec: rope() },
            Op::KvWrite { layer: 0, keys: k, values: v },
            Op::KvWrite { layer: 1, keys: k, values: v },
        ];
        assert_eq!(fences(&ops, &LIMITS), [Fence::Open, Fence::Open, Fence::Barrier, Fence::Open]);
    }

    /// Columns of one allocation of 128 columns, whose sixteen rows end at byte 8192.
    fn columns(first: usize, cols: usize) -> Buf {
        buf(first * size_of::<f32>(), cols, 128)
    }

    /// The rotation of queries, with the write of keys and values, and the attention after it.
    fn attention(layers: [usize; 2], out: Buf) -> Vec<Op> {
        let (query, keys, values) = (columns(0, 32), columns(32, 16), columns(48, 16));
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8 };
        vec![
            Op::RopeKvWrite { layer: layers[0], query, keys, values, spec: rope() },
            Op::Attention { layer: layers[1], query, shape, scores: 1.0.into(), out },
        ]
    }

    #[test]
    fn an_attention_joins_the_rotation_of_its_queries() {
        for apart in [buf(8192, 32, 32), columns(64, 32)] {
            assert_eq!(fences(&attention([0, 0], apart), &LIMITS), [Fence::Open, Fence::Joint]);
            assert_eq!(fences(&attention([0, 1], apart), &LIMITS), [Fence::Open, Fence::Barrier]);
        }
        // Results would replace keys that another thread has yet to write to the cache.
        for over_keys in [columns(32, 32), buf(4096, 32, 32)] {
            assert_eq!(fences(&attention([0, 0], over_keys), &LIMITS), [Fence::Open, Fence::Barrier]);
        }
    }

    #[test]
    fn a_layer_that_decodes_has_five_barriers() {
        let decoder =
            Decoder { dtype: DType::Q4_1, mixed_with: None, layout: RopeLayout::Neox, biased: false };
        let weights = decoder.weights().unwrap();
        let plan = decoder.plan(&weights, &FusedOps::ALL).unwrap();
        let fences = fences(plan.ops(), plan.limits());
        let count = |fence| fences.iter().filter(|own| **own == fence).count();
        // Two layers; then the gathered rows, their norm, and the logits.
        assert_eq!((count(Fence::Joint), count(Fence::Barrier)), (2, 2 * 5 + 3));
    }

    #[test]
    fn what_follows_a_joint_attention_waits_for_the_rotation_too() {
        // The op has nothing to do with the attention, but it replaces the keys.
        let mut ops = attention([0, 0], columns(64, 32));
        ops.push(Op::Scale { input: columns(96, 16), factor: 2.0, out: columns(32, 16) });
        assert_eq!(fences(&ops, &LIMITS), [Fence::Open, Fence::Joint, Fence::Barrier]);
    }

    #[test]
    fn rotated_queries_that_are_read_again_are_in_their_buffer() {
        let mut ops = attention([0, 0], columns(64, 32));
        let reader = Op::SoftCap { data: columns(0, 32), cap: 1.0 };
        ops.push(reader.clone());
        assert_eq!(fences(&ops, &LIMITS)[1], Fence::Barrier);
        // Here another value is read, in the same place.
        ops[2] = Op::Scale { input: columns(96, 32), factor: 2.0, out: columns(0, 32) };
        ops.push(reader);
        assert_eq!(fences(&ops, &LIMITS)[1], Fence::Joint);
    }
}
