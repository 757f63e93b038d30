//! Fusion: short rewrites of a draft, before its buffers are placed.
//!
//! The passes are shared by all backends. A pass runs only where the device claims the fused op in its
//! [`FusedOps`], so the unfused sequence always exists; the oracle runs that one.
//!
//! * *epilogue* (vertical): a projection adds the bias, applies the gelu or adds the residual while it stores
//!   its output.
//! * *swiglu* (horizontal and vertical): two projections of one input and the gated product of their outputs
//!   become one.
//! * *concat* (horizontal): projections of one input become one op with several segments. The input is read
//!   (and on a CPU quantised) once, and threads synchronise once.
//! * *norm* (producer and consumer): a norm is computed by the first projection that reads it, while it reads
//!   its input (and on a CPU quantises it, row by row). Where other ops read the normed rows too, the
//!   projection writes them for these.
//! * *rope* (several at once): the rotation of queries, the rotation of keys and the write to the cache
//!   become one op.
//!
//! The horizontal passes look at the types of the weights that they join: a fusion must never change how a
//! weight is stored on the device.

mod concat;
mod epilogue;
mod norm;
mod rope;
mod swiglu;

use std::{collections::HashMap, ops::Range};

use crate::{Activation, FusedOps, Op, Segment, Value, Weights, builder::Draft};

/// Runs every pass that the device claims. Epilogues come first, because a projection with an epilogue is
/// neither concatenated nor loses its norm.
pub(crate) fn run(draft: &mut Draft, fused: &FusedOps, weights: &Weights) {
    if fused.bias_epilogue {
        epilogue::fold_bias(draft);
    }
    if fused.gelu_epilogue {
        epilogue::fold_gelu(draft);
    }
    if fused.add_epilogue {
        epilogue::fold_add(draft);
    }
    if fused.silu_mul_epilogue {
        swiglu::fold_silu_mul(draft, weights);
    }
    if fused.concat_matmul {
        concat::concat_matmuls(draft, weights, fused);
    }
    norm::fold_norms(draft, weights, fused);
    if fused.rope_kv_write {
        rope::fold_rope_kv_write(draft);
    }
}

/// How often each value is read, and by which op it is made.
struct Uses {
    readers: HashMap<Value, usize>,
    made_at: HashMap<Value, usize>,
}

impl Uses {
    fn of(draft: &Draft) -> Self {
        let (mut readers, mut made_at) = (HashMap::new(), HashMap::new());
        for (index, op) in draft.ops.iter().enumerate() {
            for value in op.inputs() {
                *readers.entry(value).or_default() += 1;
            }
            made_at.extend(op.outputs().into_iter().map(|out| (out, index)));
        }
        Self { readers, made_at }
    }

    /// The op that makes `value`, if exactly one op reads it.
    fn made_for_one_reader(&self, value: Value) -> Option<usize> {
        (self.readers.get(&value) == Some(&1)).then(|| self.made_at.get(&value).copied())?
    }
}

/// The operands (input, segment, output) of a projection without norm, activation and residual; it may have a
/// bias.
fn plain_matmul(op: &Op<Value>) -> Option<(Value, Segment, Value)> {
    match op {
        Op::MatMul {
            input, norm: None, segments, activation: Activation::None, residual: None, out, ..
        } => match segments[..] {
            [segment] => Some((*input, segment, *out)),
            _ => None,
        },
        _ => None,
    }
}

/// Whether an op in `range` changes `value` in place.
fn changed_between(draft: &Draft, value: Value, range: Range<usize>) -> bool {
    draft.ops[range].iter().any(|op| op.changes() == Some(value))
}

/// Removes the ops at `folded` (ascending).
fn remove(draft: &mut Draft, folded: &[usize]) {
    let mut index = 0;
    draft.ops.retain(|_| {
        index += 1;
        folded.binary_search(&(index - 1)).is_err()
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Hyper, Limits, PlanBuilder, RopeLayout, RopeScaling, RopeSpec, Weight, WeightId};

    /// Ids of the weights that [`ops`] makes.
    #[derive(Clone, Copy)]
    struct Ids {
        a: WeightId,
        b: WeightId,
        c: WeightId,
        /// A vector.
        v: WeightId,
    }

    /// The ops of a small model after the passes, as text; embedding and logits surround `write`.
    fn ops(fused: FusedOps, write: impl Fn(&mut PlanBuilder<'_>, Value, Ids) -> Value) -> Vec<String> {
        ops_of_types([DType::F32; 3], fused, write)
    }

    /// As [`ops`]; the weights `a`, `b` and `c` have these types.
    fn ops_of_types(
        dtypes: [DType; 3],
        fused: FusedOps,
        write: impl Fn(&mut PlanBuilder<'_>, Value, Ids) -> Value,
    ) -> Vec<String> {
        let mut weights = Weights::new();
        let mut push = |name, dtype: DType, rows: usize| {
            let bytes = vec![0u8; rows * dtype.row_bytes(8).unwrap()];
            let range = 0..bytes.len();
            let weight = Weight::new(name, dtype, (rows, 8), std::sync::Arc::new(bytes), range);
            weights.push(weight.unwrap()).unwrap()
        };
        let embedding = push("embedding", DType::F32, 8);
        let [a, b, c] = dtypes;
        let v = push("v", DType::F32, 1);
        let ids = Ids { a: push("a", a, 8), b: push("b", b, 8), c: push("c", c, 8), v };
        let hyper = Hyper { width: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 8, vocab: 8, context: 8 };
        let mut b = PlanBuilder::new(&weights, hyper, Limits { rows: 2, sequences: 1, logits_rows: 1 });
        let x = b.embed(embedding);
        let x = write(&mut b, x, ids);
        let x = b.gather_rows(x);
        b.logits(x, embedding);
        let dump = b.finish(&fused).unwrap().dump();
        let mut lines: Vec<String> = dump.lines().skip(4).map(without_offsets).collect();
        lines.truncate(lines.len() - 2);
        lines
    }

    /// A line of a dump without numbers of ops and offsets of buffers.
    fn without_offsets(line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().skip(1).take_while(|word| *word != "->").collect();
        let line = words.join(" ");
        let mut pieces = line.split('@');
        let first = pieces.next().unwrap_or_default().to_owned();
        pieces.fold(first, |text, piece| text + "@" + piece.split_once(']').map_or(piece, |(_, rest)| rest))
    }

    fn rope() -> RopeSpec {
        let scaling = RopeScaling::NONE;
        RopeSpec { layout: RopeLayout::Neox, base: 1e4, dims: 8, head_dim: 8, scaling }
    }

    const NONE: FusedOps = FusedOps::NONE;

    #[test]
    fn an_addition_is_fused_in_either_order() {
        let add = FusedOps { add_epilogue: true, ..NONE };
        let residual_first = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let t = b.matmul(x, w.a);
            b.add(x, t)
        };
        let product_first = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let t = b.matmul(x, w.a);
            b.add(t, x)
        };
        assert_eq!(ops(add, residual_first), ["matmul [a] . @ + @"]);
        assert_eq!(ops(add, product_first), ["matmul [a] . @ + @"]);
        assert_eq!(ops(NONE, residual_first), ["matmul [a] . @", "add @ + @"]);
    }

    #[test]
    fn a_product_with_two_readers_is_not_fused() {
        let names = ops(FusedOps::ALL, |b, x, w| {
            let t = b.matmul(x, w.a);
            let y = b.add(x, t);
            b.add(y, t)
        });
        assert_eq!(names, ["matmul [a] . @", "add @ + @", "add @ + @"]);
        let names = ops(FusedOps::ALL, |b, x, w| {
            let t = b.matmul(x, w.a);
            let (y, z) = (b.add_row(t, w.v), b.gelu(t));
            b.silu_mul(y, z)
        });
        assert_eq!(names, ["matmul [a] . @", "add_row @ + v", "gelu @", "silu_mul @ * @"]);
    }

    #[test]
    fn a_residual_made_or_changed_later_is_not_fused() {
        let add = FusedOps { add_epilogue: true, ..NONE };
        let made = ops(add, |b, x, w| {
            let t = b.matmul(x, w.a);
            let later = b.add(x, x);
            b.add(later, t)
        });
        assert_eq!(made, ["matmul [a] . @", "add @ + @", "add @ + @"]);
        let rotated = ops(add, |b, x, w| {
            let t = b.matmul(x, w.a);
            let x = b.rope(x, rope());
            b.add(x, t)
        });
        assert_eq!(rotated, ["matmul [a] . @", "rope @ neox base 10000 dims 8/8", "add @ + @"]);
    }

    #[test]
    fn bias_gelu_and_residual_become_one_epilogue() {
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let t = b.matmul(x, w.a);
            let t = b.add_row(t, w.v);
            let t = b.gelu(t);
            b.add(t, x)
        };
        assert_eq!(ops(FusedOps::ALL, write), ["matmul gelu([a + v] . @) + @"]);
        let bias = FusedOps { bias_epilogue: true, ..NONE };
        assert_eq!(ops(bias, write), ["matmul [a + v] . @", "gelu @", "add @ + @"]);
        // Where the bias is not claimed, the ops after it are not fused either: the order of the formula
        // stays.
        let rest = FusedOps { bias_epilogue: false, ..FusedOps::ALL };
        assert_eq!(ops(rest, write), ["matmul [a] . @", "add_row @ + v", "gelu @", "add @ + @"]);
    }

    #[test]
    fn projections_with_a_change_of_input_between_stay_apart() {
        let concat = FusedOps { concat_matmul: true, ..NONE };
        let together = ops(concat, |b, x, w| {
            let (p, q, r) = (b.matmul(x, w.a), b.matmul(x, w.b), b.matmul(x, w.c));
            let y = b.silu_mul(p, q);
            b.silu_mul(y, r)
        });
        assert_eq!(together, ["matmul [a | b | c] . @", "silu_mul @ * @", "silu_mul @ * @"]);
        for fused in [concat, FusedOps { silu_mul_epilogue: true, ..NONE }] {
            let apart = ops(fused, |b, x, w| {
                let p = b.matmul(x, w.a);
                let x = b.rope(x, rope());
                let q = b.matmul(x, w.b);
                b.silu_mul(p, q)
            });
            let rope = "rope @ neox base 10000 dims 8/8";
            assert_eq!(apart, ["matmul [a] . @", rope, "matmul [b] . @", "silu_mul @ * @"]);
        }
    }

    #[test]
    fn swiglu_with_biases_is_fused_in_either_order() {
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let up = b.matmul(x, w.a);
            let gate = b.matmul(x, w.b);
            let gate = b.add_row(gate, w.v);
            b.silu_mul(gate, up)
        };
        assert_eq!(ops(FusedOps::ALL, write), ["matmul silu_mul([b + v | a] . @)"]);
        let other_input = ops(FusedOps::ALL, |b, x, w| {
            let gate = b.matmul(x, w.a);
            let up = b.matmul(gate, w.b);
            b.silu_mul(gate, up)
        });
        assert_eq!(other_input, ["matmul [a] . @", "matmul [b] . @", "silu_mul @ * @"]);
    }

    /// Both gates read one input; only the types of the weights differ.
    fn swiglu(b: &mut PlanBuilder<'_>, x: Value, w: Ids) -> Value {
        let (gate, up) = (b.matmul(x, w.a), b.matmul(x, w.b));
        b.silu_mul(gate, up)
    }

    #[test]
    fn swiglu_of_two_weight_types_is_not_fused() {
        let silu_mul = FusedOps { silu_mul_epilogue: true, ..NONE };
        let fused = ["matmul silu_mul([a | b] . @)"];
        assert_eq!(ops_of_types([DType::F16; 3], silu_mul, swiglu), fused);
        let mixed = [DType::F16, DType::BF16, DType::F16];
        assert_eq!(
            ops_of_types(mixed, silu_mul, swiglu),
            ["matmul [a] . @", "matmul [b] . @", "silu_mul @ * @"]
        );
        // The projections can still be joined: a segment keeps its own type.
        let joined = ["matmul [a | b] . @", "silu_mul @ * @"];
        assert_eq!(ops_of_types(mixed, FusedOps::ALL, swiglu), joined);
    }

    #[test]
    fn weights_of_two_types_are_concatenated_only_where_claimed() {
        let qkv = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let (q, k, v) = (b.matmul(x, w.a), b.matmul(x, w.b), b.matmul(x, w.c));
            let y = b.silu_mul(q, k);
            b.silu_mul(y, v)
        };
        let mixed = [DType::F16, DType::BF16, DType::F16];
        let one_type = FusedOps { concat_matmul: true, ..NONE };
        assert_eq!(ops_of_types(mixed, one_type, qkv)[..2], ["matmul [a | c] . @", "matmul [b] . @"]);
        let any_type = FusedOps { concat_mixed_types: true, ..one_type };
        assert_eq!(ops_of_types(mixed, any_type, qkv)[0], "matmul [a | b | c] . @");
    }

    #[test]
    fn a_norm_is_fused_into_its_only_projection() {
        let norm = FusedOps { norm_matmul: true, concat_matmul: true, ..NONE };
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let (p, q) = (b.matmul(n, w.a), b.matmul(n, w.b));
            b.silu_mul(p, q)
        };
        assert_eq!(ops(norm, write), ["matmul [a | b] . rms_norm(@ * v eps 1e-5)", "silu_mul @ * @"]);
        // Without concatenation two projections read the norm, so it stays.
        let apart = FusedOps { concat_matmul: false, ..norm };
        let unfused = ["rms_norm @ * v eps 1e-5", "matmul [a] . @", "matmul [b] . @", "silu_mul @ * @"];
        assert_eq!(ops(apart, write), unfused);
        let rotated = ops(norm, |b, x, w| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let x = b.rope(x, rope());
            let p = b.matmul(n, w.a);
            b.silu_mul(p, x)
        });
        assert_eq!(rotated[0], "rms_norm @ * v eps 1e-5");
    }

    #[test]
    fn a_layer_norm_is_fused_only_where_it_is_claimed() {
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let n = b.layer_norm(x, w.v, w.v, 1e-5);
            b.matmul(n, w.a)
        };
        let layer_norm = FusedOps { layer_norm_matmul: true, ..NONE };
        assert_eq!(ops(layer_norm, write), ["matmul [a] . layer_norm(@ * v eps 1e-5 + v)"]);
        let other = FusedOps { layer_norm_matmul: false, ..FusedOps::ALL };
        assert_eq!(ops(other, write), ["layer_norm @ * v eps 1e-5 + v", "matmul [a] . @"]);
    }

    #[test]
    fn a_projection_writes_normed_rows_for_those_who_read_them_later() {
        let norm = FusedOps { norm_matmul: true, norm_output: true, ..NONE };
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let (p, q) = (b.matmul(n, w.a), b.matmul(n, w.b));
            b.silu_mul(p, q)
        };
        let kept = ["matmul [a] . rms_norm(@ * v eps 1e-5) = @", "matmul [b] . @", "silu_mul @ * @"];
        assert_eq!(ops(norm, write), kept);
        // Whoever reads the rows earlier, or as the projection's own residual, needs them before it has run.
        let unfused = "rms_norm @ * v eps 1e-5";
        let earlier = ops(FusedOps::ALL, |b, x, w| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let gated = b.gelu(n);
            let p = b.matmul(n, w.a);
            b.silu_mul(p, gated)
        });
        assert_eq!(earlier[0], unfused);
        let residual = ops(FusedOps::ALL, |b, x, w| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let p = b.matmul(n, w.a);
            b.add(p, n)
        });
        assert_eq!(residual, [unfused, "matmul [a] . @ + @"]);
    }

    #[test]
    fn rope_and_kv_write_become_one_op() {
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let (q, k) = (b.matmul(x, w.a), b.matmul(x, w.b));
            let (q, k) = (b.rope(q, rope()), b.rope(k, rope()));
            b.kv_write(0, k, x);
            b.attention(0, q, 1.0)
        };
        let all = ops(FusedOps { rope_kv_write: true, ..NONE }, write);
        assert_eq!(all[2], "rope_kv_write layer 0: q @ k @ v @ neox base 10000 dims 8/8");
        assert_eq!(all.len(), 4);
        assert_eq!(ops(NONE, write).len(), 6);
        // Another op reads the rotated keys, so they must exist.
        let read_again = ops(FusedOps::ALL, |b, x, w| {
            let (q, k) = (b.matmul(x, w.a), b.matmul(x, w.b));
            let (q, k) = (b.rope(q, rope()), b.rope(k, rope()));
            b.kv_write(0, k, x);
            let mixed = b.attention(0, q, 1.0);
            b.add(mixed, k)
        });
        assert!(read_again.iter().any(|line| line.starts_with("kv_write")), "{read_again:?}");
        let other_rope = RopeSpec { base: 5e5, ..rope() };
        let unlike = ops(FusedOps::ALL, |b, x, w| {
            let (q, k) = (b.matmul(x, w.a), b.matmul(x, w.b));
            let (q, k) = (b.rope(q, other_rope), b.rope(k, rope()));
            b.kv_write(0, k, x);
            b.attention(0, q, 1.0)
        });
        assert!(unlike.iter().any(|line| line.starts_with("kv_write")), "{unlike:?}");
    }
}
