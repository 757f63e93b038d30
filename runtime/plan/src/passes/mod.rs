//! Fusion: short rewrites of a model that is written down but not yet placed.
//!
//! Matching is written once, here, and not per backend. A pass runs only where the device claims the fused op in its
//! [`FusedOps`], so the unfused sequence always exists and is what the oracle runs.
//!
//! * *epilogue* (vertical): a projection followed by a bias, a gelu or the addition of a residual does it while storing.
//! * *gate* (horizontal and vertical): two projections of one input whose gated product is all that is wanted become one.
//! * *concat* (horizontal): projections of one input become one op with several parts. The input is read (and on a CPU
//!   quantised) once and the threads meet once.
//! * *norm* (producer and consumer): a norm that one projection alone reads is taken while that reads its input.
//! * *rope* (several at once): turning queries, turning keys and writing the cache become one op.

mod concat;
mod epilogue;
mod gate;
mod norm;
mod rope;

use std::collections::HashMap;

use crate::{Activation, FusedOps, Op, Part, Value, Weights, builder::Draft};

/// Runs every pass that the device claims. Epilogues come first: a projection that does more is not concatenated, nor does
/// it lose its norm.
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
        gate::fold_silu_mul(draft);
    }
    if fused.concat_matmul {
        concat::concat_matmuls(draft, weights);
    }
    if fused.norm_matmul {
        norm::fold_norm(draft);
    }
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
            if let Some(out) = op.output() {
                made_at.insert(out, index);
            }
        }
        Self { readers, made_at }
    }

    /// The op that makes `value`, if exactly one op reads it.
    fn only_for_one(&self, value: Value) -> Option<usize> {
        (self.readers.get(&value) == Some(&1)).then(|| self.made_at.get(&value).copied())?
    }
}

/// The operands of a projection that does nothing but multiply, with or without a bias: input, part, output.
fn plain_matmul(op: &Op<Value>) -> Option<(Value, Part, Value)> {
    match op {
        Op::MatMul { input, norm: None, parts, activation: Activation::None, residual: None, out } => {
            match parts[..] {
                [part] => Some((*input, part, *out)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Whether an op in `from..to` changes `value` in place.
fn turned_between(draft: &Draft, value: Value, from: usize, to: usize) -> bool {
    draft.ops[from..to].iter().any(|op| op.changes() == Some(value))
}

/// Takes out the ops at `folded` (ascending).
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
    use crate::{Hyper, Limits, PlanBuilder, RopeLayout, RopeSpec, Weight, WeightId};

    /// Ids of the weights that [`ops`] makes.
    #[derive(Clone, Copy)]
    struct Ids {
        a: WeightId,
        b: WeightId,
        c: WeightId,
        /// A vector.
        v: WeightId,
    }

    /// What remains of the ops of a small model, one text each; embedding and logits surround `write`.
    fn ops(fused: FusedOps, write: impl Fn(&mut PlanBuilder<'_>, Value, Ids) -> Value) -> Vec<String> {
        let mut weights = Weights::new();
        let mut push = |name, rows: usize| {
            let values = vec![0.5; rows * 8];
            weights.push(Weight::from_f32(name, (rows, 8), &values).unwrap()).unwrap()
        };
        let embedding = push("embedding", 8);
        let ids = Ids { a: push("a", 8), b: push("b", 8), c: push("c", 8), v: push("v", 1) };
        let hyper = Hyper { width: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 8, vocab: 8, context: 8 };
        let mut b = PlanBuilder::new(&weights, hyper, Limits { rows: 2, sequences: 1, logits_rows: 1 });
        let x = b.embed(embedding);
        let x = write(&mut b, x, ids);
        let x = b.gather_rows(x);
        b.logits(x, embedding);
        let dump = b.finish(&fused).unwrap().dump();
        let mut lines: Vec<String> = dump.lines().skip(4).map(without_places).collect();
        lines.truncate(lines.len() - 2);
        lines
    }

    /// A line of a dump without numbers of ops and places of buffers.
    fn without_places(line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().skip(1).take_while(|word| *word != "->").collect();
        let line = words.join(" ");
        let mut parts = line.split('@');
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| text + "@" + part.split_once(']').map_or(part, |(_, rest)| rest))
    }

    fn rope() -> RopeSpec {
        RopeSpec { layout: RopeLayout::Neox, base: 1e4, dims: 8, head_dim: 8 }
    }

    const NONE: FusedOps = FusedOps::NONE;

    #[test]
    fn an_addition_is_folded_in_either_order() {
        let add = FusedOps { add_epilogue: true, ..NONE };
        let after = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let t = b.matmul(x, w.a);
            b.add(x, t)
        };
        let before = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let t = b.matmul(x, w.a);
            b.add(t, x)
        };
        assert_eq!(ops(add, after), ["matmul [a] . @ + @"]);
        assert_eq!(ops(add, before), ["matmul [a] . @ + @"]);
        assert_eq!(ops(NONE, after), ["matmul [a] . @", "add @ + @"]);
    }

    #[test]
    fn a_product_that_is_read_again_keeps_what_follows_it() {
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
    fn a_residual_that_is_made_or_turned_later_is_not_folded() {
        let add = FusedOps { add_epilogue: true, ..NONE };
        let made = ops(add, |b, x, w| {
            let t = b.matmul(x, w.a);
            let later = b.add(x, x);
            b.add(later, t)
        });
        assert_eq!(made, ["matmul [a] . @", "add @ + @", "add @ + @"]);
        let turned = ops(add, |b, x, w| {
            let t = b.matmul(x, w.a);
            let x = b.rope(x, rope());
            b.add(x, t)
        });
        assert_eq!(turned, ["matmul [a] . @", "rope @ neox base 10000 dims 8/8", "add @ + @"]);
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
        // Without a claim to the bias, what comes after it stays too: the order of the formula is kept.
        let rest = FusedOps { bias_epilogue: false, ..FusedOps::ALL };
        assert_eq!(ops(rest, write), ["matmul [a] . @", "add_row @ + v", "gelu @", "add @ + @"]);
    }

    #[test]
    fn projections_of_an_input_that_is_turned_between_stay_apart() {
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
    fn a_gated_product_is_folded_with_biases_whichever_projection_comes_first() {
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

    #[test]
    fn a_norm_is_folded_into_its_only_projection() {
        let norm = FusedOps { norm_matmul: true, concat_matmul: true, ..NONE };
        let write = |b: &mut PlanBuilder<'_>, x, w: Ids| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let (p, q) = (b.matmul(n, w.a), b.matmul(n, w.b));
            b.silu_mul(p, q)
        };
        assert_eq!(ops(norm, write), ["matmul [a | b] . rms_norm(@ * v eps 1e-5)", "silu_mul @ * @"]);
        // Two projections would each take it.
        let apart = FusedOps { concat_matmul: false, ..norm };
        let kept = ["rms_norm @ * v eps 1e-5", "matmul [a] . @", "matmul [b] . @", "silu_mul @ * @"];
        assert_eq!(ops(apart, write), kept);
        let turned = ops(norm, |b, x, w| {
            let n = b.rms_norm(x, w.v, 1e-5);
            let x = b.rope(x, rope());
            let p = b.matmul(n, w.a);
            b.silu_mul(p, x)
        });
        assert_eq!(turned[0], "rms_norm @ * v eps 1e-5");
    }

    #[test]
    fn turning_and_writing_the_cache_become_one() {
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
        // Keys that somebody else reads must exist turned.
        let read_again = ops(FusedOps::ALL, |b, x, w| {
            let (q, k) = (b.matmul(x, w.a), b.matmul(x, w.b));
            let (q, k) = (b.rope(q, rope()), b.rope(k, rope()));
            b.kv_write(0, k, x);
            let mixed = b.attention(0, q, 1.0);
            b.add(mixed, k)
        });
        assert!(read_again.iter().any(|line| line.starts_with("kv_write")), "{read_again:?}");
        let other_turn = RopeSpec { base: 5e5, ..rope() };
        let unlike = ops(FusedOps::ALL, |b, x, w| {
            let (q, k) = (b.matmul(x, w.a), b.matmul(x, w.b));
            let (q, k) = (b.rope(q, other_turn), b.rope(k, rope()));
            b.kv_write(0, k, x);
            b.attention(0, q, 1.0)
        });
        assert!(unlike.iter().any(|line| line.starts_with("kv_write")), "{unlike:?}");
    }
}
