//! Whole models on every tier beside the scalar oracle: ragged batches, chunked prompts, other threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use half::{bf16, f16};
use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, BackendError, DType, Executable, Hyper, Limits, LoadSpec, LogitsRows, Numerics, Plan,
    PlanBuilder, RopeLayout, RopeSpec, SequenceStep, StepInput, StepOutput, Weight, Weights, oracle::Oracle,
};

const HYPER: Hyper =
    Hyper { width: 96, layers: 2, heads: 6, kv_heads: 2, head_dim: 16, vocab: 107, context: 512 };
const LIMITS: Limits = Limits { rows: 300, sequences: 8, logits_rows: 16 };
const KV_BLOCKS: usize = 80;

/// The types that rows of 96 can be stored as; beside the kernels all are tested.
fn dtypes() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.block_len() <= 32)
}

/// Random weights stored as `dtype` (norms as F32), small enough that two layers stay tame.
fn weights(dtype: DType) -> Arc<Weights> {
    let mut state = 99u64;
    let mut dice = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut weights = Weights::new();
    let mut push = |name: String, dtype: DType, rows: usize, cols: usize| {
        let mut bytes = Vec::new();
        for _ in 0..rows * cols / dtype.block_len() {
            let float = dice() as f32 / 1_073_741_824.0 - 1.0;
            let start = bytes.len();
            match dtype {
                DType::F32 if rows == 1 => bytes.extend((1.0 + float / 4.0).to_le_bytes()),
                DType::F32 => bytes.extend((float * 0.3).to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(float * 0.3).to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(float * 0.3).to_le_bytes()),
                DType::Q8_0 => bytes.extend(f16::from_f32(0.002 + float.abs() * 0.001).to_le_bytes()),
                DType::Q4_0 => bytes.extend(f16::from_f32(0.02 + float.abs() * 0.02).to_le_bytes()),
                DType::Q5_0 => bytes.extend(f16::from_f32(0.01 + float.abs() * 0.01).to_le_bytes()),
                DType::Q4_K | DType::Q5_K | DType::Q6_K => panic!("{dtype} needs rows of 256"),
                DType::Q4_1 => {
                    let scale = 0.02 + float.abs() * 0.02;
                    bytes.extend(f16::from_f32(scale).to_le_bytes());
                    bytes.extend(f16::from_f32(scale * -7.5).to_le_bytes());
                }
            }
            while bytes.len() < start + dtype.block_bytes() {
                bytes.push(dice() as u8);
            }
        }
        let range = 0..bytes.len();
        weights.push(Weight::new(name, dtype, (rows, cols), Arc::new(bytes), range).unwrap()).unwrap();
    };
    push("embedding".into(), if dtype == DType::Q4_1 { DType::Q8_0 } else { dtype }, 107, 96);
    for layer in 0..HYPER.layers {
        push(format!("{layer}.norm1"), DType::F32, 1, 96);
        push(format!("{layer}.norm2"), DType::F32, 1, 96);
        for (name, rows, cols) in [
            ("q", 96, 96),
            ("k", 32, 96),
            ("v", 32, 96),
            ("o", 96, 96),
            ("gate", 160, 96),
            ("up", 160, 96),
            ("down", 96, 160),
        ] {
            push(format!("{layer}.{name}"), dtype, rows, cols);
        }
    }
    push("norm".into(), DType::F32, 1, 96);
    Arc::new(weights)
}

fn plan(weights: &Weights, backend: &dyn Backend, layout: RopeLayout) -> Plan {
    let w = |name: &str| weights.find(name).unwrap();
    let rope = RopeSpec { layout, base: 10_000.0, dims: 16, head_dim: 16 };
    let mut b = PlanBuilder::new(weights, HYPER, LIMITS);
    let mut x = b.embed(w("embedding"));
    for layer in 0..HYPER.layers {
        let at = |name: &str| w(&format!("{layer}.{name}"));
        let n = b.rms_norm(x, at("norm1"), 1e-5);
        let (q, k, v) = (b.matmul(n, at("q")), b.matmul(n, at("k")), b.matmul(n, at("v")));
        let (q, k) = (b.rope(q, rope), b.rope(k, rope));
        b.kv_write(layer, k, v);
        let mixed = b.attention(layer, q, 0.25);
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
    b.finish(&backend.caps().fused).unwrap()
}

fn load(
    backend: &mut dyn Backend,
    dtype: DType,
    numerics: Numerics,
    layout: RopeLayout,
) -> Box<dyn Executable> {
    let weights = weights(dtype);
    let plan = plan(&weights, backend, layout);
    let spec = LoadSpec { weights, plan: &plan, kv_blocks: KV_BLOCKS, numerics, progress: &mut |_| {} };
    backend.load(spec).unwrap().compile(&plan).unwrap()
}

fn cpu(tier: Tier, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuConfig { tier: Some(tier), threads: Some(threads) }).unwrap()
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

fn run(executable: &mut dyn Executable, sequences: &[SequenceStep<'_>]) -> Vec<Vec<f32>> {
    let mut input = StepInput::new();
    sequences.iter().for_each(|s| input.push_sequence(*s));
    let mut output = StepOutput::new();
    executable.submit(&input).unwrap();
    executable.wait(&mut output).unwrap();
    (0..output.rows()).map(|r| output.row(r).to_vec()).collect()
}

/// Three sequences of different lengths over three steps: prompts (one in two chunks), then a token each, in other
/// company. Blocks lie in no order.
fn story(e: &mut dyn Executable) -> Vec<Vec<f32>> {
    let tokens: Vec<u32> = (0..290).map(|i| (i * 31 + i / 7) % 107).collect();
    let blocks: Vec<Vec<u32>> = (0..3).map(|s| (0..20).map(|b| (b * 3 + s) * 7 % 80).collect()).collect();
    let seq = |s: usize, from: usize, to: usize, logits| SequenceStep {
        tokens: &tokens[from + s..to + s],
        cached_tokens: from,
        blocks: &blocks[s],
        logits,
    };
    let mut rows = run(
        e,
        &[seq(0, 0, 5, LogitsRows::All), seq(1, 0, 200, LogitsRows::None), seq(2, 0, 17, LogitsRows::Last)],
    );
    rows.extend(run(e, &[seq(1, 200, 280, LogitsRows::Last), seq(0, 5, 6, LogitsRows::Last)]));
    rows.extend(run(
        e,
        &[
            seq(2, 17, 18, LogitsRows::Last),
            seq(1, 280, 281, LogitsRows::Last),
            seq(0, 6, 7, LogitsRows::Last),
        ],
    ));
    rows.extend(run(e, &[seq(1, 281, 282, LogitsRows::Last)]));
    rows
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn exact_tiers_follow_the_oracle_for_every_type() {
    for (dtype, layout) in dtypes().zip([RopeLayout::Neox, RopeLayout::Interleaved].into_iter().cycle()) {
        let want = story(&mut *load(&mut Oracle::new(), dtype, Numerics::Exact, layout));
        for tier in tiers() {
            let got = story(&mut *load(&mut cpu(tier, 2), dtype, Numerics::Exact, layout));
            assert_eq!(got.len(), want.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let size = want.iter().fold(0f32, |a, v| a.max(v.abs()));
                let error = got.iter().zip(want).fold(0f32, |a, (g, w)| a.max((g - w).abs()));
                assert!(error < 2e-5 * size, "{tier} {dtype} row {i}: error {error} in logits up to {size}");
                assert_eq!(argmax(got), argmax(want), "{tier} {dtype} row {i}");
            }
        }
    }
}

#[test]
fn fast_tiers_stay_close_to_the_oracle() {
    for dtype in [DType::Q8_0, DType::Q4_1, DType::Q4_0, DType::Q5_0] {
        let want = story(&mut *load(&mut Oracle::new(), dtype, Numerics::Exact, RopeLayout::Interleaved));
        for tier in tiers() {
            let got = story(&mut *load(&mut cpu(tier, 2), dtype, Numerics::Fast, RopeLayout::Interleaved));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let cosine = cosine(got, want);
                // The design's bar for fast numerics. What a projection may err by is held tightly beside the kernels;
                // here it has been through a sharp softmax, in heads of only 16 elements.
                assert!(cosine > 0.997, "{tier} {dtype} row {i}: cosine {cosine}");
                assert!(got != want, "{tier} {dtype}: fast is expected to differ, or it is not what ran");
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for tier in tiers() {
        for numerics in [Numerics::Exact, Numerics::Fast] {
            let one = story(&mut *load(&mut cpu(tier, 1), DType::Q4_1, numerics, RopeLayout::Interleaved));
            for threads in [2, 5] {
                let many = story(&mut *load(
                    &mut cpu(tier, threads),
                    DType::Q4_1,
                    numerics,
                    RopeLayout::Interleaved,
                ));
                assert!(one == many, "{tier} {numerics:?} differs with {threads} threads");
            }
        }
    }
}

#[test]
fn alone_batched_and_chunked_give_the_same_bits() {
    let tokens: Vec<u32> = (0..150).map(|i| (i * 13 + 5) % 107).collect();
    let blocks: Vec<u32> = (10..20).collect();
    let others: Vec<u32> = (30..50).collect();
    let seq = |from: usize, to: usize, blocks| SequenceStep {
        tokens: &tokens[from..to],
        cached_tokens: from,
        blocks,
        logits: LogitsRows::Last,
    };
    // Fast numerics keep the promise too, though nobody asks them to: few rows are quantised by each thread for itself,
    // many together, and both must come to the same.
    let fast = [DType::Q8_0, DType::Q4_1].map(|dtype| (dtype, Numerics::Fast));
    let cases: Vec<_> = dtypes().map(|dtype| (dtype, Numerics::Exact)).chain(fast).collect();
    for tier in tiers() {
        for &(dtype, numerics) in &cases {
            let mut backend = cpu(tier, 2);
            let mut e = load(&mut backend, dtype, numerics, RopeLayout::Neox);
            let whole = run(&mut *e, &[seq(0, 150, &blocks)]);
            for cut in [1, 3, 130, 147] {
                run(
                    &mut *e,
                    &[seq(0, 60, &others), SequenceStep { logits: LogitsRows::None, ..seq(0, cut, &blocks) }],
                );
                let rest = run(&mut *e, &[seq(60, 63, &others), seq(cut, 150, &blocks)]);
                assert!(rest[1] == whole[0], "{tier} {dtype} {numerics:?} cut at {cut}");
            }
            for i in 0..150 {
                let last = run(&mut *e, &[seq(i, i + 1, &blocks)]);
                assert!(i < 149 || last == whole, "{tier} {dtype} {numerics:?} token by token");
            }
        }
    }
}

#[test]
fn a_poisoned_sequence_does_not_reach_its_successor() {
    // Blocks are reused without being cleared: what a sequence of not-a-numbers left behind must not matter.
    let mut backend = cpu(Tier::best(), 2);
    let values = vec![f32::NAN; 107 * 96];
    let clean = load(&mut backend, DType::F32, Numerics::Exact, RopeLayout::Neox);
    drop(clean);
    let mut weights = Weights::clone(&weights(DType::F32));
    let poison = weights.push(Weight::from_f32("poison", (107, 96), &values).unwrap()).unwrap();
    let good = weights.find("embedding").unwrap();
    let weights = Arc::new(weights);
    let write = |table| {
        let mut b = PlanBuilder::new(&weights, HYPER, LIMITS);
        let x = b.embed(table);
        let (k, v) = (weights.find("0.k").unwrap(), weights.find("0.v").unwrap());
        let (k, v) = (b.matmul(x, k), b.matmul(x, v));
        b.kv_write(0, k, v);
        let x = b.attention(0, x, 0.25);
        let x = b.gather_rows(x);
        b.logits(x, good);
        b.finish(&backend.caps().fused).unwrap()
    };
    let (poisoned, plain) = (write(poison), write(good));
    let numerics = Numerics::Exact;
    let spec =
        LoadSpec { weights: weights.clone(), plan: &plain, kv_blocks: 2, numerics, progress: &mut |_| {} };
    let mut loaded = backend.load(spec).unwrap();
    let (mut poisoned, mut plain) = (loaded.compile(&poisoned).unwrap(), loaded.compile(&plain).unwrap());
    let step = |tokens| SequenceStep { tokens, cached_tokens: 0, blocks: &[1], logits: LogitsRows::Last };
    let before = run(&mut *plain, &[step(&[1, 2, 3])]);
    assert!(before[0].iter().all(|v| v.is_finite()));
    let bad = run(&mut *poisoned, &[step(&[5; 16])]);
    assert!(bad[0].iter().all(|v| v.is_nan()));
    assert_eq!(run(&mut *plain, &[step(&[1, 2, 3])]), before);
}

#[test]
fn refusals_name_the_reason() {
    let threads = CpuBackend::new(CpuConfig { tier: None, threads: Some(0) });
    assert!(matches!(threads, Err(BackendError::Device(_))));
    for tier in Tier::ALL.into_iter().filter(|tier| !tier.is_available()) {
        let error = CpuBackend::new(CpuConfig { tier: Some(tier), threads: Some(1) }).err().unwrap();
        assert!(error.to_string().contains(tier.name()));
    }
    let mut backend = cpu(Tier::best(), 1);
    assert_eq!(backend.tier(), Tier::best());
    let weights = weights(DType::F16);
    let plan = plan(&weights, &backend, RopeLayout::Neox);
    let mut seen = Vec::new();
    let spec = LoadSpec {
        weights: weights.clone(),
        plan: &plan,
        kv_blocks: 3,
        numerics: Numerics::Fast,
        progress: &mut |p| seen.push((p.done_bytes, p.total_bytes)),
    };
    let mut loaded = backend.load(spec).unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&(weights.stored_bytes(), weights.stored_bytes())));
    let memory = loaded.memory();
    assert_eq!(memory.kv_bytes, 3 * backend.caps().kv_block_bytes(&HYPER));
    assert!(memory.weights_bytes >= weights.stored_bytes() && memory.total_bytes() > memory.weights_bytes);
    let mut e = loaded.compile(&plan).unwrap();
    assert!(matches!(e.wait(&mut StepOutput::new()), Err(BackendError::Order(_))));
    assert!(matches!(e.submit(&StepInput::new()), Err(BackendError::Step(_))));
    let huge = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: usize::MAX / 64,
        numerics: Numerics::Fast,
        progress: &mut |_| {},
    };
    assert!(matches!(backend.load(huge), Err(BackendError::OutOfMemory { .. })));
}
