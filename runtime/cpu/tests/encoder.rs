//! A whole small encoder on every tier beside the scalar oracle: ragged batches, other threads, fused and plain.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::sync::Arc;

use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, Executable, FusedOps, Hyper, Limits, LoadSpec, LogitsRows, Numerics, Plan, PlanBuilder, Pooling,
    SequenceStep, StepInput, StepOutput, Weight, Weights, oracle::Oracle,
};

const HYPER: Hyper =
    Hyper { width: 96, layers: 2, heads: 4, kv_heads: 4, head_dim: 24, vocab: 61, context: 90 };
const LIMITS: Limits = Limits { rows: 160, sequences: 5, logits_rows: 0 };

fn weights() -> Arc<Weights> {
    let mut state = 11u64;
    let mut weights = Weights::new();
    let mut push = |name: String, rows: usize, cols: usize, scale: f32| {
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 33) as f32 / 1_073_741_824.0 - 1.0) * scale
            })
            .collect();
        weights.push(Weight::from_f32(name, (rows, cols), &values).unwrap()).unwrap();
    };
    push("words".into(), 61, 96, 1.0);
    push("positions".into(), 90, 96, 0.3);
    push("types".into(), 1, 96, 0.1);
    push("norm".into(), 1, 96, 1.0);
    push("norm.bias".into(), 1, 96, 0.2);
    for layer in 0..HYPER.layers {
        for (name, rows, cols) in
            [("q", 96, 96), ("k", 96, 96), ("v", 96, 96), ("o", 96, 96), ("up", 200, 96), ("down", 96, 200)]
        {
            push(format!("{layer}.{name}"), rows, cols, 0.2);
            push(format!("{layer}.{name}.bias"), 1, rows, 0.2);
        }
        for name in ["norm1", "norm2"] {
            push(format!("{layer}.{name}"), 1, 96, 1.0);
            push(format!("{layer}.{name}.bias"), 1, 96, 0.2);
        }
    }
    Arc::new(weights)
}

fn plan(weights: &Weights, fused: &FusedOps, pooling: Pooling) -> Plan {
    let w = |name: &str| weights.find(name).unwrap();
    let mut b = PlanBuilder::new(weights, HYPER, LIMITS);
    let x = b.embed(w("words"));
    let p = b.embed_positions(w("positions"));
    let x = b.add(x, p);
    let x = b.add_row(x, w("types"));
    let mut x = b.layer_norm(x, w("norm"), w("norm.bias"), 1e-12);
    for layer in 0..HYPER.layers {
        let dense = |b: &mut PlanBuilder<'_>, x, name: &str| {
            let product = b.matmul(x, w(&format!("{layer}.{name}")));
            b.add_row(product, w(&format!("{layer}.{name}.bias")))
        };
        let norm = |b: &mut PlanBuilder<'_>, x, name: &str| {
            let name = format!("{layer}.{name}");
            b.layer_norm(x, w(&name), w(&format!("{name}.bias")), 1e-12)
        };
        let (q, k, v) = (dense(&mut b, x, "q"), dense(&mut b, x, "k"), dense(&mut b, x, "v"));
        let mixed = b.encoder_attention(q, k, v, 24f32.powf(-0.5));
        let o = dense(&mut b, mixed, "o");
        let sum = b.add(o, x);
        x = norm(&mut b, sum, "norm1");
        let up = dense(&mut b, x, "up");
        let up = b.gelu(up);
        let down = dense(&mut b, up, "down");
        let sum = b.add(down, x);
        x = norm(&mut b, sum, "norm2");
    }
    b.pool(x, pooling, true);
    b.finish(fused).unwrap()
}

fn load(
    backend: &mut dyn Backend,
    fused: &FusedOps,
    numerics: Numerics,
    pooling: Pooling,
) -> Box<dyn Executable> {
    let weights = weights();
    let plan = plan(&weights, fused, pooling);
    let spec = LoadSpec { weights, plan: &plan, kv_blocks: 0, numerics, progress: &mut |_| {} };
    let mut loaded = backend.load(spec).unwrap();
    assert_eq!(loaded.memory().kv_bytes, 0);
    loaded.compile(&plan).unwrap()
}

fn cpu(tier: Tier, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuConfig { tier: Some(tier), threads: Some(threads) }).unwrap()
}

/// Rows of each sequence of one step of these lengths.
fn run(e: &mut dyn Executable, lengths: &[usize]) -> Vec<Vec<f32>> {
    let mut input = StepInput::new();
    for (s, len) in lengths.iter().enumerate() {
        let tokens: Vec<u32> = (0..*len).map(|i| ((i * 17 + i / 5 + len * 3) % 61) as u32).collect();
        let (blocks, logits) = (&[][..], LogitsRows::None);
        input.push_sequence(SequenceStep { tokens: &tokens, cached_tokens: 0, blocks, logits });
        assert_eq!(input.sequences(), s + 1);
    }
    let mut output = StepOutput::new();
    e.submit(&input).unwrap();
    e.wait(&mut output).unwrap();
    assert_eq!((output.rows(), output.width), (lengths.len(), 96));
    (0..output.rows()).map(|r| output.row(r).to_vec()).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn every_tier_follows_the_oracle_fused_and_plain() {
    let lengths = [1, 90, 33, 7, 16];
    for pooling in [Pooling::Mean, Pooling::First, Pooling::Max] {
        let want = run(&mut *load(&mut Oracle::new(), &FusedOps::NONE, Numerics::Exact, pooling), &lengths);
        for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
            let fused = cpu(tier, 2).caps().fused;
            let exact = run(&mut *load(&mut cpu(tier, 2), &fused, Numerics::Exact, pooling), &lengths);
            for (i, (got, want)) in exact.iter().zip(&want).enumerate() {
                let error = got.iter().zip(want).fold(0f32, |a, (g, w)| a.max((g - w).abs()));
                assert!(error < 3e-6, "{tier} {pooling:?} sequence {i}: error {error}");
            }
            // Fusion moves no bit.
            let plain =
                run(&mut *load(&mut cpu(tier, 2), &FusedOps::NONE, Numerics::Exact, pooling), &lengths);
            assert!(plain == exact, "{tier} {pooling:?}");
            let fast = run(&mut *load(&mut cpu(tier, 2), &fused, Numerics::Fast, pooling), &lengths);
            for (i, (got, want)) in fast.iter().zip(&want).enumerate() {
                let cosine = cosine(got, want);
                assert!(cosine > 0.999, "{tier} {pooling:?} sequence {i}: cosine {cosine}");
            }
        }
    }
}

#[test]
fn company_and_threads_do_not_change_a_bit() {
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
        let fused = cpu(tier, 1).caps().fused;
        for numerics in [Numerics::Exact, Numerics::Fast] {
            let with = |threads| load(&mut cpu(tier, threads), &fused, numerics, Pooling::Mean);
            let mut one = with(1);
            let together = run(&mut *one, &[5, 90, 33, 1]);
            for (i, len) in [5, 90, 33, 1].into_iter().enumerate() {
                let alone = run(&mut *one, &[len]);
                assert!(alone[0] == together[i], "{tier} {numerics:?}: {len} tokens alone and in company");
            }
            for threads in [2, 5] {
                assert!(run(&mut *with(threads), &[5, 90, 33, 1]) == together, "{tier} {threads} threads");
            }
        }
    }
}
