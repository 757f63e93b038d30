//! Measures the steps of an encoder: the shape of MiniLM with synthetic f32 weights, batches of 1 and 32
//! sequences of 128 tokens.
//!
//! `cargo run --profile ci -p trustformers-cpu --example encoder -- [THREADS] [fast] [unfused] [all]`
//! measures both numerics. `fast` excludes exact numerics, `unfused` adds plans without fused ops, and `all`
//! measures every tier instead of the best one. All entries run alternately for [`ROUNDS`] rounds. It prints
//! the fastest and the median round, and products per second.

use std::{sync::Arc, time::Instant};

use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, Executable, FusedOps, Hyper, Limits, LoadSpec, LogitsRows, Numerics, Plan, PlanBuilder, Pooling,
    SequenceStep, StepInput, StepOutput, Weight, Weights,
};

const HYPER: Hyper =
    Hyper { width: 384, layers: 6, heads: 12, kv_heads: 12, head_dim: 32, vocab: 30_522, context: 512 };
const FEED_FORWARD: usize = 1536;
const TOKENS: usize = 128;
const BATCHES: [usize; 2] = [1, 32];
/// Measurements of each entry.
const ROUNDS: usize = 7;

fn weights() -> Result<Arc<Weights>, Box<dyn std::error::Error>> {
    let mut weights = Weights::new();
    let mut push = |name: String, rows: usize, cols: usize| {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 1000.0).collect();
        weights
            .push(Weight::from_f32(name, (rows, cols), &values)?)
            .map_err(|error| -> Box<dyn std::error::Error> { error.into() })
    };
    push("words".into(), HYPER.vocab, HYPER.width)?;
    push("positions".into(), HYPER.context, HYPER.width)?;
    for name in ["norm", "norm.bias"] {
        push(name.into(), 1, HYPER.width)?;
    }
    for layer in 0..HYPER.layers {
        for (name, rows, cols) in [
            ("q", HYPER.width, HYPER.width),
            ("k", HYPER.width, HYPER.width),
            ("v", HYPER.width, HYPER.width),
            ("o", HYPER.width, HYPER.width),
            ("up", FEED_FORWARD, HYPER.width),
            ("down", HYPER.width, FEED_FORWARD),
        ] {
            push(format!("{layer}.{name}"), rows, cols)?;
            push(format!("{layer}.{name}.bias"), 1, rows)?;
        }
    }
    Ok(Arc::new(weights))
}

fn plan(weights: &Weights, fused: &FusedOps) -> Result<Plan, Box<dyn std::error::Error>> {
    let find = |name: String| weights.find(&name).ok_or(name);
    let (norm, norm_bias) = (find("norm".into())?, find("norm.bias".into())?);
    let limits = Limits { rows: TOKENS * BATCHES[1], sequences: BATCHES[1], logits_rows: 0 };
    let mut b = PlanBuilder::new(weights, HYPER, limits);
    let (words, positions) = (b.embed(find("words".into())?), b.embed_positions(find("positions".into())?));
    let mut x = b.add(words, positions);
    for layer in 0..HYPER.layers {
        let dense = |b: &mut PlanBuilder<'_>, x, name: &str| {
            let product = b.matmul(x, find(format!("{layer}.{name}"))?);
            Ok::<_, String>(b.add_row(product, find(format!("{layer}.{name}.bias"))?))
        };
        let (q, k, v) = (dense(&mut b, x, "q")?, dense(&mut b, x, "k")?, dense(&mut b, x, "v")?);
        let mixed = b.encoder_attention(q, k, v, 32f32.powf(-0.5));
        let o = dense(&mut b, mixed, "o")?;
        let sum = b.add(o, x);
        x = b.layer_norm(sum, norm, norm_bias, 1e-12);
        let up = dense(&mut b, x, "up")?;
        let up = b.gelu(up);
        let down = dense(&mut b, up, "down")?;
        let sum = b.add(down, x);
        x = b.layer_norm(sum, norm, norm_bias, 1e-12);
    }
    b.pool(x, Pooling::Mean, true);
    Ok(b.finish(fused)?)
}

fn step(sequences: usize) -> StepInput {
    let mut input = StepInput::new();
    for s in 0..sequences {
        let tokens: Vec<u32> = (0..TOKENS).map(|i| ((i * 91 + s) % HYPER.vocab) as u32).collect();
        input.push_sequence(SequenceStep {
            tokens: &tokens,
            cached_tokens: 0,
            blocks: &[],
            logits: LogitsRows::None,
        });
    }
    input
}

fn seconds(e: &mut dyn Executable, input: &StepInput) -> Result<f64, Box<dyn std::error::Error>> {
    let (mut output, start) = (StepOutput::new(), Instant::now());
    e.submit(input)?;
    e.wait(&mut output)?;
    Ok(start.elapsed().as_secs_f64())
}

/// An entry: its name, and the executable of its steps.
fn entry(
    mut backend: CpuBackend,
    weights: &Arc<Weights>,
    numerics: Numerics,
    unfused: bool,
) -> Result<(String, Box<dyn Executable>), Box<dyn std::error::Error>> {
    let fused = if unfused { FusedOps::NONE } else { backend.caps().fused };
    let plan = plan(weights, &fused)?;
    let spec = LoadSpec {
        weights: weights.clone(),
        plan: &plan,
        kv_blocks: 0,
        kv_type: backend.caps().default_kv_type(numerics),
        numerics,
        progress: &mut |_| {},
    };
    let executable = backend.load(spec)?.compile(&plan)?;
    let name =
        format!("{} {numerics:?}{}", backend.caps().description, if unfused { ", unfused" } else { "" });
    Ok((name, executable))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let threads: Option<usize> = args.iter().find_map(|arg| arg.parse().ok());
    let has = |word: &str| args.iter().any(|arg| arg == word);
    let weights = weights()?;
    let tiers: Vec<Tier> = if has("all") {
        Tier::ALL.into_iter().filter(|tier| tier.is_available()).collect()
    } else {
        vec![Tier::best()]
    };
    let mut entries = Vec::new();
    for tier in tiers {
        for (numerics, unfused) in [Numerics::Fast, Numerics::Exact].map(|n| [(n, false), (n, true)]).concat()
        {
            if (numerics == Numerics::Exact && has("fast")) || (unfused && !has("unfused")) {
                continue;
            }
            let backend = CpuBackend::new(CpuConfig { tier: Some(tier), threads, ..CpuConfig::default() })?;
            entries.push(entry(backend, &weights, numerics, unfused)?);
        }
    }
    let width = HYPER.width;
    let products = (HYPER.layers * (4 * width * width + 2 * width * FEED_FORWARD) * TOKENS) as f64;
    for batch in BATCHES {
        let input = step(batch);
        let mut times = vec![Vec::new(); entries.len()];
        for _ in 0..ROUNDS {
            for ((_, executable), times) in entries.iter_mut().zip(&mut times) {
                times.push(seconds(&mut **executable, &input)?);
            }
        }
        for ((name, _), times) in entries.iter().zip(&mut times) {
            times.sort_by(f64::total_cmp);
            let speed = |seconds: f64| batch as f64 / seconds;
            println!(
                "{name:<43} | {batch:2} x {TOKENS}: {:7.1} (median {:7.1}) sequences/s, {:.0} G products/s",
                speed(times[0]),
                speed(times[times.len() / 2]),
                speed(times[0]) * products / 1e9
            );
        }
    }
    Ok(())
}
