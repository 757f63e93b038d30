//! A complete small encoder through builder, passes, arena and oracle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use trustformers_plan::{
    Backend, EncoderScores, FusedOps, Hyper, KvType, Limits, LoadSpec, LogitsRows, Numerics, Plan,
    PlanBuilder, PlanError, Pooling, RowSpace, SequenceStep, StepError, StepInput, StepOutput, Weight,
    Weights, oracle::Oracle, seeded::SeededRng,
};

const HYPER: Hyper =
    Hyper { width: 32, layers: 1, heads: 4, kv_heads: 4, head_dim: 8, vocab: 48, context: 24 };
const LIMITS: Limits = Limits { rows: 40, sequences: 4, logits_rows: 0 };

fn weights() -> Weights {
    let mut rng = SeededRng::new(5);
    let mut weights = Weights::new();
    let mut push = |name: &str, rows: usize, cols: usize| {
        let values: Vec<f32> = (0..rows * cols).map(|_| rng.next_signed() / 2.0).collect();
        weights.push(Weight::from_f32(name, (rows, cols), &values).unwrap()).unwrap();
    };
    push("words", 48, 32);
    push("positions", 24, 32);
    push("types", 1, 32);
    for name in ["q", "k", "v", "o"] {
        push(name, 32, 32);
        push(&format!("{name}.bias"), 1, 32);
    }
    push("up", 64, 32);
    push("up.bias", 1, 64);
    push("down", 32, 64);
    push("down.bias", 1, 32);
    for name in ["norm0", "norm1", "norm2"] {
        push(name, 1, 32);
        push(&format!("{name}.bias"), 1, 32);
    }
    weights
}

fn plan(weights: &Weights, fused: &FusedOps, pooling: Pooling, normalise: bool) -> Plan {
    let w = |name: &str| weights.find(name).unwrap();
    let mut b = PlanBuilder::new(weights, HYPER, LIMITS);
    let dense = |b: &mut PlanBuilder<'_>, x, name: &str| {
        let product = b.matmul(x, w(name));
        b.add_row(product, w(&format!("{name}.bias")))
    };
    let x = b.embed(w("words"));
    let p = b.embed_positions(w("positions"));
    let x = b.add(x, p);
    let x = b.add_row(x, w("types"));
    let x = b.layer_norm(x, w("norm0"), w("norm0.bias"), 1e-12);
    let (q, k, v) = (dense(&mut b, x, "q"), dense(&mut b, x, "k"), dense(&mut b, x, "v"));
    let mixed = if pooling == Pooling::Last {
        b.encoder_attention(q, k, v, EncoderScores { causal: true, ..8f32.powf(-0.5).into() })
    } else {
        b.encoder_attention(q, k, v, 8f32.powf(-0.5))
    };
    let o = dense(&mut b, mixed, "o");
    let x2 = b.add(o, x);
    let x = b.layer_norm(x2, w("norm1"), w("norm1.bias"), 1e-12);
    let up = dense(&mut b, x, "up");
    let up = b.gelu(up);
    let down = dense(&mut b, up, "down");
    let y = b.add(down, x);
    let x = b.layer_norm(y, w("norm2"), w("norm2.bias"), 1e-12);
    b.pool(x, pooling, normalise);
    b.finish(fused).unwrap()
}

fn run(fused: &FusedOps, pooling: Pooling, normalise: bool, sequences: &[&[u32]]) -> Vec<Vec<f32>> {
    let weights = Arc::new(weights());
    let plan = plan(&weights, fused, pooling, normalise);
    answers(weights, &plan, sequences)
}

fn answers(weights: Arc<Weights>, plan: &Plan, sequences: &[&[u32]]) -> Vec<Vec<f32>> {
    assert!(!plan.uses_cache());
    assert_eq!((plan.answer().rows, plan.answer().cols), (RowSpace::Sequences, 32));
    let numerics = Numerics::Exact;
    let spec =
        LoadSpec { weights, plan, kv_blocks: 0, kv_type: KvType::F32, numerics, progress: &mut |_| {} };
    let mut loaded = Oracle::new().load(spec).unwrap();
    assert_eq!(loaded.memory().kv_bytes, 0);
    let mut executable = loaded.compile(plan).unwrap();
    executable.submit(&step(sequences)).unwrap();
    let mut output = StepOutput::new();
    executable.wait(&mut output).unwrap();
    assert_eq!((output.rows(), output.width), (sequences.len(), 32));
    (0..output.rows()).map(|r| output.row(r).to_vec()).collect()
}

fn step(sequences: &[&[u32]]) -> StepInput {
    let mut input = StepInput::new();
    for tokens in sequences {
        input.push_sequence(SequenceStep { tokens, cached_tokens: 0, blocks: &[], logits: LogitsRows::None });
    }
    input
}

#[test]
fn the_dump_is_stable() {
    let weights = weights();
    let dump = |fused| plan(&weights, fused, Pooling::Mean, true).dump();
    insta::assert_snapshot!("encoder_plain", dump(&FusedOps::NONE));
    insta::assert_snapshot!("encoder_fused", dump(&FusedOps::ALL));
}

#[test]
fn a_head_may_follow_pooled_rows() {
    let weights = Arc::new(weights());
    let w = |name: &str| weights.find(name).unwrap();
    let head = |b: &mut PlanBuilder<'_>, x| {
        let product = b.matmul(x, w("q"));
        b.add_row(product, w("q.bias"))
    };
    let sequences: [&[u32]; 2] = [&[1, 2, 3], &[4]];
    let rows = |pooled_first: bool| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        let words = b.embed(w("words"));
        if pooled_first {
            let mean = b.pool_rows(words, Pooling::Mean);
            let out = head(&mut b, mean);
            b.pool(out, Pooling::Cls, false);
        } else {
            let out = head(&mut b, words);
            b.pool(out, Pooling::Mean, false);
        }
        answers(Arc::clone(&weights), &b.finish(&FusedOps::NONE).unwrap(), &sequences)
    };
    // The head is linear, so that it may come before or after the mean.
    for (found, wanted) in rows(true).iter().zip(rows(false)) {
        assert!(found.iter().zip(&wanted).all(|(one, other)| (one - other).abs() < 1e-5), "{found:?}");
    }
}

/// The rows of labels of all tokens in a step of these sequences.
fn labels_of_tokens(sequences: &[&[u32]]) -> Vec<f32> {
    let weights = Arc::new(weights());
    let w = |name: &str| weights.find(name).unwrap();
    let mut b = PlanBuilder::new(&weights, HYPER, Limits { logits_rows: 8, ..LIMITS });
    let words = b.embed(w("words"));
    let mixed = b.encoder_attention(words, words, words, 0.3_f32);
    let rows = b.gather_rows(mixed);
    b.label_logits(rows, w("up"));
    let plan = b.finish(&FusedOps::NONE).unwrap();
    assert_eq!((plan.answer().rows, plan.answer().cols), (RowSpace::Logits, 64));
    let numerics = Numerics::Exact;
    let weights = Arc::clone(&weights);
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: 0,
        kv_type: KvType::F32,
        numerics,
        progress: &mut |_| {},
    };
    let mut loaded = Oracle::new().load(spec).unwrap();
    let mut executable = loaded.compile(&plan).unwrap();
    let mut input = StepInput::new();
    for tokens in sequences {
        input.push_sequence(SequenceStep { tokens, cached_tokens: 0, blocks: &[], logits: LogitsRows::All });
    }
    executable.submit(&input).unwrap();
    let mut output = StepOutput::new();
    executable.wait(&mut output).unwrap();
    assert_eq!((output.rows(), output.width), (sequences.concat().len(), 64));
    output.values
}

#[test]
fn each_row_of_whole_sequences_may_be_projected_to_labels() {
    let together = labels_of_tokens(&[&[1, 2, 3], &[4, 5]]);
    assert_eq!(together[..3 * 64], labels_of_tokens(&[&[1, 2, 3]]));
    assert_eq!(together[3 * 64..], labels_of_tokens(&[&[4, 5]]));
    assert_ne!(together[..64], together[64..2 * 64]);
}

/// The largest values of what each row gets from its window, `None`: from its whole sequence.
fn attended(window: Option<usize>, sequences: &[&[u32]]) -> Vec<Vec<f32>> {
    let weights = Arc::new(weights());
    let words = weights.find("words").unwrap();
    let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
    let (query, keys, values) = (b.embed(words), b.embed(words), b.embed(words));
    let mixed = b.encoder_attention(query, keys, values, EncoderScores { window, ..0.3.into() });
    b.pool(mixed, Pooling::Max, false);
    let plan = b.finish(&FusedOps::NONE).unwrap();
    answers(weights, &plan, sequences)
}

#[test]
fn a_row_sees_its_window_on_both_sides() {
    let weights = weights();
    let row = |token: u32| {
        let words = weights.get(weights.find("words").unwrap());
        let mut row = vec![0.0; words.cols()];
        words.dequantise_row(token as usize, &mut row);
        row
    };
    // Without neighbours a row gets its own values.
    let largest = |tokens: &[u32]| -> Vec<f32> {
        let rows: Vec<Vec<f32>> = tokens.iter().map(|token| row(*token)).collect();
        (0..32).map(|c| rows.iter().map(|row| row[c]).fold(f32::NEG_INFINITY, f32::max)).collect()
    };
    let (first, second): (&[u32], &[u32]) = (&[3, 9, 4, 7, 1], &[8, 2]);
    assert_eq!(attended(Some(0), &[first, second]), [largest(first), largest(second)]);
    // A window that reaches both ends is none, and a shorter one is another answer.
    let whole = attended(None, &[first, second]);
    assert_eq!(attended(Some(4), &[first, second]), whole);
    let near = attended(Some(1), &[first, second]);
    assert_ne!(near[0], whole[0]);
    assert_eq!(near[1], whole[1]);
}

#[test]
fn a_value_for_each_head_and_distance_is_added_to_scores() {
    let mut weights = weights();
    // Of each head's distances from -23 to 23, one is so large that a row gets the values of that key alone.
    let own = 2 * HYPER.context - 1;
    let mut table = vec![0.0; HYPER.heads * own];
    for (head, distance) in [(0, -1_isize), (1, 0), (2, 2)] {
        table[head * own + (23 + distance) as usize] = 1e4;
    }
    weights.push(Weight::from_f32("distances", (1, table.len()), &table).unwrap()).unwrap();
    weights.push(Weight::from_f32("short", (1, 4 * 45), &table[..4 * 45]).unwrap()).unwrap();
    let weights = Arc::new(weights);
    let of = |distances: Option<&str>| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        let x = b.embed(weights.find("words").unwrap());
        let distances = distances.map(|name| weights.find(name).unwrap());
        let mixed = b.encoder_attention(x, x, x, EncoderScores { distances, ..0.3.into() });
        b.pool(mixed, Pooling::Last, false);
        b.finish(&FusedOps::NONE)
    };
    let row = |token: u32| {
        let words = weights.get(weights.find("words").unwrap());
        let mut row = vec![0.0; words.cols()];
        words.dequantise_row(token as usize, &mut row);
        row
    };
    let plan = of(Some("distances")).unwrap();
    assert!(plan.dump().contains("scale 0.3 distances distances"), "{}", plan.dump());
    let plain = answers(Arc::clone(&weights), &of(None).unwrap(), &[&[3, 9, 4]]);
    let found = answers(Arc::clone(&weights), &plan, &[&[8], &[3, 9, 4]]);
    assert_eq!(found[0], row(8), "a row alone has no other key");
    let (before, itself) = (row(9), row(4));
    assert_eq!(found[1][..8], before[..8], "the first head takes the row before");
    assert_eq!(found[1][8..16], itself[8..16], "the second head takes the row itself");
    // No key is two positions after the last row, and the fourth head has no large value.
    assert_eq!(found[1][16..], plain[0][16..]);
    let error = of(Some("short")).unwrap_err().to_string();
    assert!(error.contains("short is 1 x 180, 4 times an odd number from 24 * 2 - 1 on was"), "{error}");
}

#[test]
fn fusion_and_batching_change_no_bits() {
    let (a, b): (Vec<u32>, Vec<u32>) = ((0..24).map(|i| i * 7 % 48).collect(), vec![3, 1, 4]);
    for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max, Pooling::Last] {
        let both = run(&FusedOps::ALL, pooling, true, &[&b, &a]);
        assert_eq!(both, run(&FusedOps::NONE, pooling, true, &[&b, &a]));
        assert_eq!(both[1], run(&FusedOps::NONE, pooling, true, &[&a])[0]);
        assert_ne!(both[0], both[1]);
    }
}

#[test]
fn attention_sees_later_tokens_and_no_other_sequence() {
    let first = |tokens: &[u32], other: &[u32]| {
        run(&FusedOps::NONE, Pooling::Cls, false, &[tokens, other])[0].clone()
    };
    assert_ne!(first(&[1, 2, 3], &[9]), first(&[1, 2, 4], &[9]));
    assert_eq!(first(&[1, 2, 3], &[9]), first(&[1, 2, 3], &[8, 8]));
}

#[test]
fn causal_attention_sees_no_later_token() {
    let weights = weights();
    let dump = plan(&weights, &FusedOps::NONE, Pooling::Last, false).dump();
    assert!(dump.contains(" causal") && dump.contains("last "), "{dump}");
    let last = |tokens: &[u32]| run(&FusedOps::NONE, Pooling::Last, false, &[tokens, &[9]])[0].clone();
    assert_ne!(last(&[1, 2, 3]), last(&[4, 2, 3]), "the last row sees the first one");
    // Of one token all poolings and both kinds of attention are equal.
    assert_eq!(last(&[5]), run(&FusedOps::NONE, Pooling::Cls, false, &[&[5]])[0]);
    // The first row of a text sees itself alone, and the last one all.
    let attended = |pooling, tokens: &[u32]| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        let x = b.embed(weights.find("words").unwrap());
        let mixed = b.encoder_attention(x, x, x, EncoderScores { causal: true, ..1.0.into() });
        b.pool(mixed, pooling, false);
        let plan = b.finish(&FusedOps::NONE).unwrap();
        answers(Arc::new(self::weights()), &plan, &[tokens])[0].clone()
    };
    assert_eq!(attended(Pooling::Cls, &[1, 2, 3]), attended(Pooling::Cls, &[1]));
    assert_ne!(attended(Pooling::Last, &[1, 2, 3]), attended(Pooling::Last, &[1, 2, 4]));
    let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
    let x = b.embed(weights.find("words").unwrap());
    let first = b.gather_first_rows(x);
    let mixed = b.encoder_attention(first, x, x, EncoderScores { causal: true, ..1.0.into() });
    b.pool(mixed, Pooling::Cls, false);
    let error = b.finish(&FusedOps::NONE).unwrap_err().to_string();
    assert!(error.contains("causal attention needs the queries of all rows"), "{error}");
}

#[test]
fn pooling_follows_its_definition() {
    let tokens: &[u32] = &[5, 6, 7, 8];
    let raw = run(&FusedOps::NONE, Pooling::Mean, false, &[tokens]);
    let unit = run(&FusedOps::NONE, Pooling::Mean, true, &[tokens]);
    let length = raw[0].iter().map(|v| v * v).sum::<f32>().sqrt();
    assert!((length - 1.0).abs() > 0.01, "the test needs a vector that is not of length one: {length}");
    for (unit, raw) in unit[0].iter().zip(&raw[0]) {
        assert!((unit - raw / length).abs() < 1e-6);
    }
    // Mean and CLS pooling of one token are equal; of several tokens they differ.
    let one = |pooling| run(&FusedOps::NONE, pooling, false, &[&tokens[..1]]);
    assert_eq!(one(Pooling::Mean), one(Pooling::Cls));
    assert_eq!(one(Pooling::Mean), one(Pooling::Max));
    let first = run(&FusedOps::NONE, Pooling::Cls, false, &[tokens]);
    assert_ne!(raw, first);
    // The maximum of each column is nowhere below the mean or the first row.
    let most = run(&FusedOps::NONE, Pooling::Max, false, &[tokens]);
    for (most, (mean, first)) in most[0].iter().zip(raw[0].iter().zip(&first[0])) {
        assert!(most >= mean && most >= first);
    }
    assert!(most != raw && most != first);
}

#[test]
fn layer_norm_follows_its_definition() {
    let mut weights = Weights::new();
    let mut push = |name: &str, rows: usize, values: &[f32]| {
        weights.push(Weight::from_f32(name, (rows, 4), values).unwrap()).unwrap()
    };
    let table = push("table", 1, &[1.0, 2.0, 3.0, 6.0]);
    let (scale, shift) = (push("scale", 1, &[2.0, 2.0, 2.0, 1.0]), push("shift", 1, &[0.0, 1.0, 0.0, 0.0]));
    let hyper = Hyper { width: 4, layers: 1, heads: 1, kv_heads: 1, head_dim: 4, vocab: 1, context: 1 };
    let mut b = PlanBuilder::new(&weights, hyper, LIMITS);
    let x = b.embed(table);
    let x = b.layer_norm(x, scale, shift, 0.5);
    b.pool(x, Pooling::Cls, false);
    let plan = b.finish(&FusedOps::NONE).unwrap();
    let (weights, numerics) = (Arc::new(weights), Numerics::Exact);
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: 0,
        kv_type: KvType::F32,
        numerics,
        progress: &mut |_| {},
    };
    let mut executable = Oracle::new().load(spec).unwrap().compile(&plan).unwrap();
    executable.submit(&step(&[&[0]])).unwrap();
    let mut output = StepOutput::new();
    executable.wait(&mut output).unwrap();
    // Mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, so with eps 0.5 the root is 2.
    assert_eq!(output.row(0), [-2.0, 0.0, 0.0, 1.5]);
}

#[test]
fn steps_of_a_plan_without_a_cache_are_checked() {
    let weights = weights();
    let plan = plan(&weights, &FusedOps::ALL, Pooling::Mean, true);
    let tokens: &[u32] = &[1, 2, 3];
    assert_eq!(step(&[tokens, tokens]).validate(&plan, 0), Ok(()));
    let mut cached = StepInput::new();
    let sequence = SequenceStep { tokens, cached_tokens: 2, blocks: &[], logits: LogitsRows::None };
    cached.push_sequence(sequence);
    assert_eq!(cached.validate(&plan, 0), Err(StepError::Uncached { sequence: 0, cached: 2 }));
    let mut logits = StepInput::new();
    logits.push_sequence(SequenceStep { cached_tokens: 0, logits: LogitsRows::Last, ..sequence });
    assert!(matches!(logits.validate(&plan, 0), Err(StepError::TooMany { what: "rows of logits", .. })));
    let limits = Limits { logits_rows: 4, ..LIMITS };
    let mut b = PlanBuilder::new(&weights, HYPER, limits);
    let x = b.embed(weights.find("words").unwrap());
    b.pool(x, Pooling::Mean, true);
    let roomy = b.finish(&FusedOps::NONE).unwrap();
    assert_eq!(logits.validate(&roomy, 0), Err(StepError::NoLogits(1)));
    let long: Vec<u32> = vec![1; 25];
    let error = step(&[&long]).validate(&plan, 0);
    assert_eq!(error, Err(StepError::Context { sequence: 0, tokens: 25, context: 24 }));
}

#[test]
fn mistakes_in_an_encoder_are_reported_by_op() {
    let weights = weights();
    let w = |name: &str| weights.find(name).unwrap();
    let finish = |write: &dyn Fn(&mut PlanBuilder<'_>)| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        write(&mut b);
        b.finish(&FusedOps::NONE).unwrap_err().to_string()
    };
    let bias = finish(&|b| {
        let x = b.embed(w("words"));
        let _ = b.layer_norm(x, w("norm1"), w("up.bias"), 1e-5);
    });
    assert_eq!(bias, "op 1 (layer_norm): up.bias is 1 x 64, the input has 32 columns");
    let short = finish(&|b| {
        let _ = b.embed_positions(w("types"));
    });
    assert_eq!(short, "op 0 (embed_positions): a table of 1 rows for a context of 24");
    let two = finish(&|b| {
        let x = b.embed(w("words"));
        b.pool(x, Pooling::Mean, true);
        b.pool(x, Pooling::Cls, true);
    });
    assert!(two.contains("has one of them: found 2"), "{two}");
    let cached = finish(&|b| {
        let x = b.embed(w("words"));
        b.kv_write(0, x, x);
        b.pool(x, Pooling::Mean, true);
    });
    assert!(cached.contains("has no cache"), "{cached}");
    let logits = finish(&|b| {
        let x = b.embed(w("words"));
        let x = b.gather_rows(x);
        b.logits(x, w("words"));
    });
    assert_eq!(logits, "logits_rows is 0: must be above zero where a plan ends in logits");
    let zero = Limits { sequences: 0, ..LIMITS };
    let error = PlanBuilder::new(&weights, HYPER, zero).finish(&FusedOps::NONE).unwrap_err();
    assert!(matches!(error, PlanError::Size { field: "sequences", .. }));
}

#[test]
fn rows_of_a_second_segment_take_the_second_half_of_the_table() {
    let mut weights = weights();
    let mut rng = SeededRng::new(6);
    let values: Vec<f32> = (0..2 * 24 * 32).map(|_| rng.next_signed()).collect();
    weights.push(Weight::from_f32("segments", (48, 32), &values).unwrap()).unwrap();
    let weights = Arc::new(weights);
    let w = |name: &str| weights.find(name).unwrap();
    let plan = |second: usize| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        let positions = b.embed_positions_of_segments(w("segments"), second);
        b.pool(positions, Pooling::Max, false);
        b.finish(&FusedOps::NONE)
    };
    assert!(matches!(plan(23), Err(PlanError::Shape { op: "embed_positions", .. })));
    assert!(matches!(plan(25), Err(PlanError::Shape { op: "embed_positions", .. })));
    let plan = plan(24).unwrap();
    let mut input = step(&[&[1, 2, 3]]);
    input.begin_second_segment(2, 24);
    assert_eq!(input.positions, [0, 1, 26]);
    assert_eq!(input.validate(&plan, 0), Ok(()));
    // A second segment does not end before its sequence, and not every plan has one.
    let mut back = input.clone();
    back.positions[1] = 25;
    back.positions[2] = 2;
    assert_eq!(back.validate(&plan, 0), Err(StepError::Position { row: 2, got: 2, expected: 26 }));
    let one = self::plan(&weights, &FusedOps::NONE, Pooling::Mean, true);
    assert_eq!(input.validate(&one, 0), Err(StepError::Position { row: 2, got: 26, expected: 2 }));
    let spec = LoadSpec {
        weights: Arc::clone(&weights),
        plan: &plan,
        kv_blocks: 0,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let mut loaded = Oracle::new().load(spec).unwrap();
    let mut executable = loaded.compile(&plan).unwrap();
    executable.submit(&input).unwrap();
    let mut output = StepOutput::new();
    executable.wait(&mut output).unwrap();
    let of = |row: usize, col: usize| values[row * 32 + col];
    let wanted: Vec<f32> = (0..32).map(|col| of(0, col).max(of(1, col)).max(of(26, col))).collect();
    assert_eq!(output.row(0), wanted);
}
