//! A complete small model: built, dumped, fused and run by the oracle; and every step that must be refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use trustformers_plan::{
    Backend, BackendError, Executable, FusedOps, Hyper, KvType, Limits, LoadSpec, LogitsRows, Numerics, Plan,
    PlanBuilder, PlanError, RopeLayout, RopeScaling, RopeSpec, SequenceStep, StepError, StepInput,
    StepOutput, Token, Weight, Weights, oracle::Oracle, seeded::SeededRng,
};

const HYPER: Hyper =
    Hyper { width: 32, layers: 2, heads: 4, kv_heads: 2, head_dim: 8, vocab: 48, context: 64 };
const LIMITS: Limits = Limits { rows: 24, sequences: 4, logits_rows: 8 };
const KV_BLOCKS: usize = 12;

fn weights() -> Weights {
    let mut rng = SeededRng::new(1);
    let mut weights = Weights::new();
    let mut push = |name: String, rows: usize, cols: usize| {
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| rng.next_signed())
            .map(|v| if rows == 1 { 1.0 + v / 4.0 } else { v / 3.0 })
            .collect();
        weights.push(Weight::from_f32(name, (rows, cols), &values).unwrap()).unwrap();
    };
    push("embedding".into(), 48, 32);
    for layer in 0..HYPER.layers {
        let shapes = [
            ("norm1", 1, 32),
            ("q", 32, 32),
            ("k", 16, 32),
            ("v", 16, 32),
            ("o", 32, 32),
            ("norm2", 1, 32),
            ("gate", 64, 32),
            ("up", 64, 32),
            ("down", 32, 64),
        ];
        for (name, rows, cols) in shapes {
            push(format!("{layer}.{name}"), rows, cols);
        }
    }
    push("norm".into(), 1, 32);
    weights
}

fn plan(weights: &Weights, fused: &FusedOps) -> Plan {
    let w = |name: &str| weights.find(name).unwrap();
    let scaling = RopeScaling::NONE;
    let rope = RopeSpec { layout: RopeLayout::Interleaved, base: 10_000.0, dims: 8, head_dim: 8, scaling };
    let mut b = PlanBuilder::new(weights, HYPER, LIMITS);
    let mut x = b.embed(w("embedding"));
    for layer in 0..HYPER.layers {
        let at = |name: &str| w(&format!("{layer}.{name}"));
        let n = b.rms_norm(x, at("norm1"), 1e-5);
        let (q, k, v) = (b.matmul(n, at("q")), b.matmul(n, at("k")), b.matmul(n, at("v")));
        let (q, k) = (b.rope(q, rope), b.rope(k, rope));
        b.kv_write(layer, k, v);
        let mixed = b.attention(layer, q, 8f32.powf(-0.5));
        let o = b.matmul(mixed, at("o"));
        x = b.add(x, o);
        let n = b.rms_norm(x, at("norm2"), 1e-5);
        let (gate, up) = (b.matmul(n, at("gate")), b.matmul(n, at("up")));
        let hidden = b.silu_mul(gate, up);
        let down = b.matmul(hidden, at("down"));
        x = b.add(x, down);
    }
    let x = b.gather_rows(x);
    let x = b.rms_norm(x, w("norm"), 1e-5);
    b.logits(x, w("embedding"));
    b.finish(fused).unwrap()
}

fn executable(fused: &FusedOps) -> Box<dyn Executable> {
    let weights = Arc::new(weights());
    let plan = plan(&weights, fused);
    let mut last = 0;
    let mut progress = |p: trustformers_plan::LoadProgress| last = p.done_bytes;
    let numerics = Numerics::Exact;
    let spec = LoadSpec {
        weights: weights.clone(),
        plan: &plan,
        kv_blocks: KV_BLOCKS,
        kv_type: KvType::F32,
        numerics,
        progress: &mut progress,
    };
    let executable = Oracle::new().load(spec).unwrap().compile(&plan).unwrap();
    assert_eq!(last, weights.stored_bytes());
    executable
}

fn run(executable: &mut dyn Executable, input: &StepInput) -> Vec<Vec<f32>> {
    let mut output = StepOutput::new();
    executable.submit(input).unwrap();
    executable.wait(&mut output).unwrap();
    (0..output.rows()).map(|r| output.row(r).to_vec()).collect()
}

fn sequence<'a>(
    tokens: &'a [u32],
    cached_tokens: usize,
    blocks: &'a [u32],
    logits: LogitsRows,
) -> SequenceStep<'a> {
    SequenceStep { tokens, cached_tokens, blocks, logits }
}

fn step(sequences: &[SequenceStep<'_>]) -> StepInput {
    let mut input = StepInput::new();
    sequences.iter().for_each(|s| input.push_sequence(*s));
    input
}

#[test]
fn the_dump_is_stable() {
    let weights = weights();
    insta::assert_snapshot!("plain", plan(&weights, &FusedOps::default()).dump());
    insta::assert_snapshot!("fused", plan(&weights, &FusedOps::ALL).dump());
    let some = FusedOps { concat_matmul: true, add_epilogue: true, ..FusedOps::NONE };
    insta::assert_snapshot!("partly_fused", plan(&weights, &some).dump());
}

#[test]
fn fused_and_plain_plans_give_the_same_bits() {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 48).collect();
    let input = step(&[sequence(&tokens, 0, &[3, 1], LogitsRows::Last)]);
    let plain = run(&mut *executable(&FusedOps::default()), &input);
    assert_eq!(plain, run(&mut *executable(&FusedOps::ALL), &input));
    assert!(plain[0].iter().all(|v| v.is_finite()) && plain[0].iter().any(|v| *v != plain[0][0]));
}

#[test]
fn chunks_and_batches_give_the_same_bits() {
    let tokens: Vec<u32> = (0..19).map(|i| (i * 5 + 3) % 48).collect();
    let whole = run(
        &mut *executable(&FusedOps::default()),
        &step(&[sequence(&tokens, 0, &[2, 7], LogitsRows::Last)]),
    );
    let mut one_by_one = executable(&FusedOps::default());
    let mut last = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        last = run(&mut *one_by_one, &step(&[sequence(&[*token], i, &[5, 0], LogitsRows::Last)]));
    }
    assert_eq!(whole, last);

    let mut batched = executable(&FusedOps::default());
    run(&mut *batched, &step(&[sequence(&tokens[..18], 0, &[4, 9], LogitsRows::None)]));
    let both = step(&[
        sequence(&[1, 2, 3], 0, &[6], LogitsRows::All),
        sequence(&tokens[18..], 18, &[4, 9], LogitsRows::Last),
    ]);
    let answers = run(&mut *batched, &both);
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[3], whole[0]);
}

#[test]
fn submit_and_wait_must_alternate() {
    let mut e = executable(&FusedOps::default());
    let input = step(&[sequence(&[1], 0, &[0], LogitsRows::Last)]);
    assert!(matches!(e.wait(&mut StepOutput::new()), Err(BackendError::Order(_))));
    e.submit(&input).unwrap();
    assert!(matches!(e.submit(&input), Err(BackendError::Order(_))));
    e.wait(&mut StepOutput::new()).unwrap();
    // A refused step leaves the executable ready for the next.
    assert!(matches!(e.submit(&StepInput::new()), Err(BackendError::Step(StepError::Empty))));
    e.submit(&input).unwrap();
}

#[test]
fn a_foreign_or_larger_plan_is_refused() {
    let weights = Arc::new(weights());
    let plan = plan(&weights, &FusedOps::default());
    let mut other = Weights::new();
    let table = other.push(Weight::from_f32("other", (48, 32), &[0.0; 48 * 32]).unwrap()).unwrap();
    let mut b = PlanBuilder::new(&other, HYPER, LIMITS);
    let x = b.embed(table);
    let x = b.gather_rows(x);
    b.logits(x, table);
    let foreign = b.finish(&FusedOps::default()).unwrap();
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: 1,
        kv_type: KvType::Bf16,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let mut loaded = Oracle::new().load(spec).unwrap();
    assert!(matches!(loaded.compile(&foreign), Err(BackendError::Mismatch("it names other weights"))));
    assert_eq!(loaded.memory().arena_bytes, plan.arena_bytes() as u64);
    assert_eq!(loaded.memory().kv_bytes, 2 * 2 * 16 * 16 * 2);
}

#[test]
fn invalid_steps_are_refused_with_their_reason() {
    let weights = weights();
    let plan = plan(&weights, &FusedOps::default());
    let check = |input: &StepInput| input.validate(&plan, KV_BLOCKS).unwrap_err();
    let good = || {
        step(&[sequence(&[1, 2], 15, &[3, 4], LogitsRows::Last), sequence(&[5], 0, &[6], LogitsRows::Last)])
    };
    assert_eq!(good().validate(&plan, KV_BLOCKS), Ok(()));

    assert_eq!(check(&StepInput::new()), StepError::Empty);
    let long = step(&[sequence(&[0; 25], 0, &[0, 1], LogitsRows::None)]);
    assert_eq!(check(&long), StepError::TooMany { what: "rows", got: 25, max: 24 });
    let many: Vec<[u32; 1]> = (0..5).map(|b| [b]).collect();
    let many: Vec<_> = many.iter().map(|blocks| sequence(&[1], 0, blocks, LogitsRows::None)).collect();
    assert_eq!(check(&step(&many)), StepError::TooMany { what: "sequences", got: 5, max: 4 });
    let all = step(&[sequence(&[0; 9], 0, &[0], LogitsRows::All)]);
    assert_eq!(check(&all), StepError::TooMany { what: "rows of logits", got: 9, max: 8 });

    let change = |f: fn(&mut StepInput)| {
        let mut input = good();
        f(&mut input);
        check(&input)
    };
    assert_eq!(change(|i| i.tokens[1] = Token::Id(48)), StepError::Token { row: 1, token: 48, vocab: 48 });
    assert_eq!(change(|i| i.positions[1] = 15), StepError::Position { row: 1, got: 15, expected: 16 });
    assert_eq!(
        change(|i| i.context_lens[1] = 65),
        StepError::Context { sequence: 1, tokens: 65, context: 64 }
    );
    assert!(matches!(change(|i| i.context_lens[0] = 1), StepError::Inconsistent(_)));
    assert!(matches!(change(|i| i.positions.truncate(1)), StepError::Inconsistent(_)));
    assert!(matches!(change(|i| i.cu_seqlens[1] = 0), StepError::Inconsistent(_)));
    assert!(matches!(change(|i| i.cu_seqlens[1] = 9), StepError::Inconsistent(_)));
    assert!(matches!(change(|i| i.cu_seqlens[2] = 2), StepError::Inconsistent(_)));
    assert!(matches!(change(|i| i.cu_blocks.clear()), StepError::Inconsistent(_)));
    assert_eq!(change(|i| i.cu_blocks[1] = 1), StepError::Blocks { sequence: 0, blocks: 1, tokens: 17 });
    assert_eq!(change(|i| i.blocks[1] = 12), StepError::BlockId { sequence: 0, block: 12, kv_blocks: 12 });
    assert_eq!(change(|i| i.blocks[2] = 4), StepError::SharedWrite(4));
    assert_eq!(change(|i| i.blocks[1] = 3), StepError::SharedWrite(3));
    assert_eq!(change(|i| i.logits_rows[1] = 3), StepError::LogitsRow(3));
    assert_eq!(change(|i| i.logits_rows.swap(0, 1)), StepError::LogitsRow(1));
    // A full block may be shared for reading.
    let shared =
        step(&[sequence(&[1], 16, &[3, 4], LogitsRows::Last), sequence(&[5], 16, &[3, 6], LogitsRows::Last)]);
    assert_eq!(shared.validate(&plan, KV_BLOCKS), Ok(()));
}

#[test]
fn mistakes_in_a_model_are_reported_by_op() {
    let weights = weights();
    let w = |name: &str| weights.find(name).unwrap();
    let finish = |write: &dyn Fn(&mut PlanBuilder<'_>)| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        write(&mut b);
        b.finish(&FusedOps::default()).unwrap_err()
    };
    let wrong_width = finish(&|b| {
        let x = b.embed(w("embedding"));
        b.matmul(x, w("0.down"));
    });
    assert_eq!(wrong_width.to_string(), "op 1 (matmul): 0.down takes 64 columns, the input has 32");
    let unread = finish(&|b| {
        let x = b.embed(w("embedding"));
        b.attention(0, x, 1.0);
    });
    assert!(unread.to_string().contains("read before it is written"), "{unread}");
    assert!(matches!(finish(&|_| {}), PlanError::Shape { op: "answer", .. }));
    let limits = Limits { rows: 0, ..LIMITS };
    let error = PlanBuilder::new(&weights, HYPER, limits).finish(&FusedOps::default()).unwrap_err();
    assert!(matches!(error, PlanError::Size { field: "rows", .. }));
    let limits = Limits { rows: usize::MAX / 8, ..LIMITS };
    let mut b = PlanBuilder::new(&weights, HYPER, limits);
    let x = b.embed(w("embedding"));
    let x = b.gather_rows(x);
    b.logits(x, w("embedding"));
    assert!(matches!(b.finish(&FusedOps::default()), Err(PlanError::ArenaOverflow { .. })));
}
