//! A decoder and an encoder divided among oracles answer as the undivided ones; what cannot be divided is
//! refused by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use trustformers_plan::{
    Backend, BackendError, DType, EncoderScores, Executable, FusedOps, Hyper, KvType, Limits, LoadSpec,
    LogitsRows, Numerics, Op, Plan, PlanBuilder, Pooling, RopeLayout, RopeScaling, RopeSpec, SequenceStep,
    StepInput, StepOutput, Value, Weight, WeightError, Weights,
    oracle::{Oracle, OracleGroup},
    seeded::SeededRng,
    shard::{Shard, ShardError, shard},
};

const HYPER: Hyper =
    Hyper { width: 32, layers: 2, heads: 8, kv_heads: 4, head_dim: 8, vocab: 48, context: 64 };
const LIMITS: Limits = Limits { rows: 24, sequences: 4, logits_rows: 8 };
const KV_BLOCKS: usize = 4;

/// The model of the tests; both kinds have the same weights.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Decoder,
    Encoder,
}

fn weights(hidden: usize) -> Weights {
    let mut rng = SeededRng::new(3);
    let mut weights = Weights::new();
    let mut push = |name: String, rows: usize, cols: usize| {
        let scale = if rows == 1 { 0.5 } else { 0.3 };
        let values: Vec<f32> = (0..rows * cols).map(|_| rng.next_signed() * scale).collect();
        weights.push(Weight::from_f32(name, (rows, cols), &values).unwrap()).unwrap();
    };
    push("embedding".into(), 48, 32);
    for layer in 0..HYPER.layers {
        for (name, rows, cols) in [
            ("q", 64, 32),
            ("k", 32, 32),
            ("v", 32, 32),
            ("o", 32, 64),
            ("gate", hidden, 32),
            ("up", hidden, 32),
            ("down", 32, hidden),
        ] {
            push(format!("{layer}.{name}"), rows, cols);
            push(format!("{layer}.{name}.bias"), 1, rows);
        }
        push(format!("{layer}.norm"), 1, 32);
    }
    // A value for each head and distance; only the encoder adds them.
    push("distances".into(), 1, HYPER.heads * (2 * HYPER.context - 1));
    weights
}

fn plan(kind: Kind, weights: &Weights, hyper: Hyper) -> Plan {
    let w = |name: &str| weights.find(name).unwrap();
    let scaling = RopeScaling::NONE;
    let rope = RopeSpec { layout: RopeLayout::Neox, base: 10_000.0, dims: 8, head_dim: 8, scaling };
    let mut b = PlanBuilder::new(weights, hyper, LIMITS);
    let dense = |b: &mut PlanBuilder<'_>, x: Value, name: &str| {
        let product = b.matmul(x, w(name));
        b.add_row(product, w(&format!("{name}.bias")))
    };
    let mut x = b.embed(w("embedding"));
    for layer in 0..hyper.layers {
        let at = |name: &str| format!("{layer}.{name}");
        let n = b.rms_norm(x, w(&at("norm")), 1e-5);
        let (q, k, v) = (dense(&mut b, n, &at("q")), dense(&mut b, n, &at("k")), dense(&mut b, n, &at("v")));
        let mixed = if kind == Kind::Decoder {
            let (q, k) = (b.rope(q, rope), b.rope(k, rope));
            b.kv_write(layer, k, v);
            b.attention(layer, q, 0.3)
        } else {
            let distances = Some(w("distances"));
            b.encoder_attention(q, k, v, EncoderScores { distances, ..0.3.into() })
        };
        let o = dense(&mut b, mixed, &at("o"));
        x = b.add(x, o);
        let up = dense(&mut b, x, &at("up"));
        let hidden = if kind == Kind::Decoder {
            let gate = b.matmul(x, w(&at("gate")));
            b.silu_mul(gate, up)
        } else {
            b.gelu(up)
        };
        let down = dense(&mut b, hidden, &at("down"));
        x = b.add(x, down);
    }
    if kind == Kind::Decoder {
        let x = b.gather_rows(x);
        b.logits(x, w("embedding"));
    } else {
        b.pool(x, Pooling::Mean, true);
    }
    b.finish(&FusedOps::NONE).unwrap()
}

fn run(executable: &mut dyn Executable, kind: Kind) -> Vec<f32> {
    let decodes = kind == Kind::Decoder;
    let (first, second): (&[u32], &[u32]) = if decodes { (&[0, 1], &[2]) } else { (&[], &[]) };
    let logits = if decodes { LogitsRows::Last } else { LogitsRows::None };
    let tokens: Vec<u32> = (0..23).map(|i| i * 7 % 48).collect();
    let mut input = StepInput::new();
    input.push_sequence(SequenceStep { tokens: &tokens[..18], cached_tokens: 0, blocks: first, logits });
    input.push_sequence(SequenceStep { tokens: &tokens[18..22], cached_tokens: 0, blocks: second, logits });
    let (mut output, mut answers) = (StepOutput::new(), Vec::new());
    let mut step = |input: &StepInput| {
        executable.submit(input).unwrap();
        executable.wait(&mut output).unwrap();
        answers.extend_from_slice(&output.values);
    };
    step(&input);
    if decodes {
        // Each device reads its own heads from its own cache.
        let mut next = StepInput::new();
        next.push_sequence(SequenceStep { tokens: &tokens[22..], cached_tokens: 18, blocks: first, logits });
        step(&next);
    }
    answers
}

fn undivided(kind: Kind, plan: &Plan, weights: &Arc<Weights>) -> Vec<f32> {
    let kv_blocks = if kind == Kind::Decoder { KV_BLOCKS } else { 0 };
    let spec = LoadSpec {
        weights: Arc::clone(weights),
        plan,
        kv_blocks,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    run(&mut *Oracle::new().load(spec).unwrap().compile(plan).unwrap(), kind)
}

#[test]
fn divided_models_answer_as_whole_ones() {
    for kind in [Kind::Decoder, Kind::Encoder] {
        let weights = Arc::new(weights(64));
        let plan = plan(kind, &weights, HYPER);
        let want = undivided(kind, &plan, &weights);
        let largest = want.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        assert!(largest > 0.1, "{largest}");
        for (devices, fused) in [(2, FusedOps::NONE), (4, FusedOps::NONE), (2, FusedOps::ALL)] {
            let shards = shard(&plan, &weights, devices, &fused).unwrap();
            assert_eq!(shards.len(), devices);
            let sums = shards[0].plan.ops().iter().filter(|op| matches!(op, Op::AllReduce { .. })).count();
            assert_eq!(sums, 2 * HYPER.layers);
            let kv_blocks = if kind == Kind::Decoder { KV_BLOCKS } else { 0 };
            let mut group = OracleGroup::load(&shards, kv_blocks, KvType::F32).unwrap();
            let kv_bytes = kv_blocks as u64 * KvType::F32.block_bytes(&HYPER);
            for memory in group.memory() {
                assert_eq!(memory.kv_bytes, kv_bytes / devices as u64);
            }
            let found = run(&mut group, kind);
            assert_eq!(found.len(), want.len());
            let off = found.iter().zip(&want).fold(0.0_f32, |off, (a, b)| off.max((a - b).abs()));
            assert!(off <= 1e-5 * largest, "{devices} devices: {off} of {largest}");
        }
    }
}

#[test]
fn each_device_has_its_share_of_the_weights() {
    let weights = weights(64);
    let shards = shard(&plan(Kind::Decoder, &weights, HYPER), &weights, 2, &FusedOps::NONE).unwrap();
    let shape = |Shard { weights, .. }: &Shard, name: &str| {
        let weight = weights.get(weights.find(name).unwrap());
        (weight.rows(), weight.cols())
    };
    for device in &shards {
        for (name, expected) in [
            ("embedding", (48, 32)),
            ("0.q", (32, 32)),
            ("0.q.bias", (1, 32)),
            ("1.v", (16, 32)),
            ("1.up", (32, 32)),
            ("0.o", (32, 32)),
            ("0.o.bias", (1, 32)),
            ("1.down", (32, 32)),
        ] {
            assert_eq!(shape(device, name), expected, "{name}");
        }
    }
    let row = |device: usize, name: &str| {
        let weights = &shards[device].weights;
        weights.get(weights.find(name).unwrap()).row(1).into_owned()
    };
    let whole = |name: &str, row: usize| weights.get(weights.find(name).unwrap()).row(row).into_owned();
    assert_eq!(row(1, "0.q"), whole("0.q", 33));
    assert_eq!(row(1, "1.down"), whole("1.down", 1)[32 * 4..]);
}

#[test]
fn what_cannot_be_divided_is_refused_by_name() {
    let whole = weights(64);
    let divide = |hyper: Hyper, devices: usize| {
        shard(&plan(Kind::Decoder, &whole, hyper), &whole, devices, &FusedOps::NONE).map(drop).unwrap_err()
    };
    assert_eq!(divide(HYPER, 1), ShardError::Devices(1));
    let error = divide(HYPER, 3);
    assert!(error.to_string().contains("3 devices cannot share the 8 heads equally"), "{error}");
    let error = divide(HYPER, 8);
    assert!(error.to_string().contains("cannot share the 4 key/value heads equally"), "{error}");
    let narrow = weights(50);
    let error = shard(&plan(Kind::Decoder, &narrow, HYPER), &narrow, 4, &FusedOps::NONE).unwrap_err();
    assert!(error.to_string().contains("the 50 rows of 0.up equally"), "{error}");
    let shards = shard(&plan(Kind::Decoder, &whole, HYPER), &whole, 2, &FusedOps::NONE).unwrap();
    let again = shard(&shards[0].plan, &shards[0].weights, 2, &FusedOps::NONE).unwrap_err();
    assert!(matches!(again, ShardError::NotPlain { op: "all_reduce", .. }), "{again}");
}

#[test]
fn quantised_blocks_are_not_cut() {
    // The projection that is divided by columns, with rows of one block.
    let mut quantised = Weights::new();
    for (_, weight) in weights(32).iter() {
        quantised
            .push(if weight.name() == "0.down" {
                let block: &[u8] = &[1; 34];
                let bytes = block.repeat(weight.rows());
                let range = 0..bytes.len();
                Weight::new("0.down", DType::Q8_0, (weight.rows(), 32), Arc::new(bytes), range).unwrap()
            } else {
                weight.clone()
            })
            .unwrap();
    }
    let error = shard(&plan(Kind::Decoder, &quantised, HYPER), &quantised, 2, &FusedOps::NONE).unwrap_err();
    assert!(
        matches!(&error, ShardError::Weight(WeightError::CutBlock { tensor, .. }) if tensor == "0.down"),
        "{error}"
    );
}

#[test]
fn one_device_refuses_the_plan_of_a_group() {
    let whole = Arc::new(weights(64));
    let undivided = plan(Kind::Decoder, &whole, HYPER);
    let shards = shard(&undivided, &whole, 2, &FusedOps::NONE).unwrap();
    let spec = LoadSpec {
        weights: Arc::clone(&shards[0].weights),
        plan: &shards[0].plan,
        kv_blocks: KV_BLOCKS,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let error = Oracle::new().load(spec).map(drop).unwrap_err();
    assert!(matches!(&error, BackendError::OneDevice { index, .. } if *index > 0), "{error}");
    assert!(error.to_string().contains("scalar oracle"), "{error}");
}
