//! How fast steps are: decode and prefill of a model with SmolLM2-135M's shape and made-up weights, per tier and numerics.
//!
//! `cargo run --profile ci -p trustformers-cpu --example steps [THREADS]`. Decoding reads all repacked weights once per
//! step; at a hundred megabytes they may come from a cache that is shared with other machines, so its GB/s is no measure of
//! main memory. All tiers take turns for [`ROUNDS`] rounds and the fastest and the median are printed, so that a busy
//! neighbour is seen for what it is instead of slowing one tier.

use std::{hint::black_box, sync::Arc, time::Instant};

use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, DType, Executable, Hyper, Limits, LoadSpec, LogitsRows, Numerics, Plan, PlanBuilder, RopeLayout,
    RopeSpec, SequenceStep, StepInput, StepOutput, Weight, Weights,
};

const HYPER: Hyper =
    Hyper { width: 576, layers: 30, heads: 9, kv_heads: 3, head_dim: 64, vocab: 49_152, context: 2048 };

fn weights() -> Result<Arc<Weights>, Box<dyn std::error::Error>> {
    let mut weights = Weights::new();
    let mut push = |name: String, dtype: DType, rows: usize, cols: usize| {
        let len = dtype.row_bytes(cols).unwrap_or(0) * rows;
        // Scales of about 0.008 (0x2010) and quants of every value; what they are does not change the time.
        let bytes: Vec<u8> = match dtype {
            DType::F32 => (0..rows * cols).flat_map(|_| 1f32.to_le_bytes()).collect(),
            _ => (0..len)
                .map(|i| match i % dtype.block_bytes() {
                    0 => 0x10,
                    1 => 0x20,
                    2 if dtype == DType::Q4_1 => 0x80,
                    3 if dtype == DType::Q4_1 => 0xab,
                    _ => ((i * 37) >> 3) as u8,
                })
                .collect(),
        };
        weights.push(Weight::new(name, dtype, (rows, cols), Arc::new(bytes), 0..len)?)
    };
    push("embedding".into(), DType::Q8_0, HYPER.vocab, 576)?;
    for layer in 0..HYPER.layers {
        push(format!("{layer}.norm"), DType::F32, 1, 576)?;
        for (name, rows, cols) in [
            ("q", 576, 576),
            ("k", 192, 576),
            ("v", 192, 576),
            ("o", 576, 576),
            ("gate", 1536, 576),
            ("up", 1536, 576),
            ("down", 576, 1536),
        ] {
            push(format!("{layer}.{name}"), DType::Q4_1, rows, cols)?;
        }
    }
    Ok(Arc::new(weights))
}

fn plan(weights: &Weights, backend: &dyn Backend) -> Result<Plan, Box<dyn std::error::Error>> {
    let find = |name: String| weights.find(&name).ok_or(name);
    let rope = RopeSpec { layout: RopeLayout::Interleaved, base: 1e5, dims: 64, head_dim: 64 };
    let mut b = PlanBuilder::new(weights, HYPER, Limits { rows: 512, sequences: 32, logits_rows: 32 });
    let mut x = b.embed(find("embedding".into())?);
    for layer in 0..HYPER.layers {
        let at = |name: &str| find(format!("{layer}.{name}"));
        let n = b.rms_norm(x, at("norm")?, 1e-5);
        let (q, k, v) = (b.matmul(n, at("q")?), b.matmul(n, at("k")?), b.matmul(n, at("v")?));
        let (q, k) = (b.rope(q, rope), b.rope(k, rope));
        b.kv_write(layer, k, v);
        let mixed = b.attention(layer, q, 0.125);
        let o = b.matmul(mixed, at("o")?);
        x = b.add(x, o);
        let n = b.rms_norm(x, at("norm")?, 1e-5);
        let (gate, up) = (b.matmul(n, at("gate")?), b.matmul(n, at("up")?));
        let hidden = b.silu_mul(gate, up);
        let down = b.matmul(hidden, at("down")?);
        x = b.add(x, down);
    }
    let x = b.gather_rows(x);
    let x = b.rms_norm(x, find("0.norm".into())?, 1e-5);
    b.logits(x, find("embedding".into())?);
    Ok(b.finish(&backend.caps().fused)?)
}

/// Turns that each tier takes.
const ROUNDS: usize = 7;

/// Seconds of one step, the fastest of `times` in this turn.
fn seconds(
    e: &mut dyn Executable,
    input: &StepInput,
    times: usize,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut output = StepOutput::new();
    let mut best = f64::MAX;
    for _ in 0..times {
        let start = Instant::now();
        e.submit(input)?;
        e.wait(&mut output)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    black_box(&output);
    Ok(best)
}

fn step(sequences: usize, rows: usize, cached_tokens: usize) -> StepInput {
    let mut input = StepInput::new();
    for s in 0..sequences as u32 {
        let blocks: Vec<u32> = (s * 40..(s + 1) * 40).collect();
        let tokens: Vec<u32> = (0..rows as u32).map(|i| i * 91 % 49_152).collect();
        input.push_sequence(SequenceStep {
            tokens: &tokens,
            cached_tokens,
            blocks: &blocks,
            logits: LogitsRows::Last,
        });
    }
    input
}

/// One tier's model and what was measured of it.
struct Entry {
    name: String,
    executable: Box<dyn Executable>,
    /// Per measure, one time per round.
    seconds: [Vec<f64>; 4],
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads: Option<usize> = std::env::args().nth(1).map(|n| n.parse()).transpose()?;
    let weights = weights()?;
    let mut entries = Vec::new();
    let mut weight_bytes = 0;
    // The plain tier is not for serving; its times would only make the others wait.
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available() && *tier != Tier::Scalar) {
        for numerics in [Numerics::Fast, Numerics::Exact] {
            let mut backend = CpuBackend::new(CpuConfig { tier: Some(tier), threads })?;
            let plan = plan(&weights, &backend)?;
            let start = Instant::now();
            let spec = LoadSpec {
                weights: weights.clone(),
                plan: &plan,
                kv_blocks: 40 * 8,
                numerics,
                progress: &mut |_| {},
            };
            let mut loaded = backend.load(spec)?;
            let name = format!("{} {numerics:?}", backend.caps().description);
            println!("{name}: loaded in {:.2} s, {:?}", start.elapsed().as_secs_f64(), loaded.memory());
            weight_bytes = loaded.memory().weights_bytes;
            entries.push(Entry { name, executable: loaded.compile(&plan)?, seconds: Default::default() });
        }
    }
    let inputs = [(step(1, 1, 5), 12), (step(1, 1, 512), 8), (step(8, 1, 100), 6), (step(1, 512, 0), 1)];
    for _ in 0..ROUNDS {
        for entry in &mut entries {
            for ((input, times), list) in inputs.iter().zip(&mut entry.seconds) {
                list.push(seconds(&mut *entry.executable, input, *times)?);
            }
        }
    }
    let ends = |list: &mut Vec<f64>| {
        list.sort_by(f64::total_cmp);
        (list[0], list[list.len() / 2])
    };
    for entry in &mut entries {
        print!("{:<34}", entry.name);
        let tokens = [("decode", 1.0), ("at 512", 1.0), ("8 sequences", 8.0), ("prefill 512", 512.0)];
        for ((what, tokens), list) in tokens.into_iter().zip(&mut entry.seconds) {
            let (best, median) = ends(list);
            print!(" | {what} {:7.1} (median {:7.1}) tok/s", tokens / best, tokens / median);
        }
        println!(" | decode reads {:.1} GB/s", weight_bytes as f64 / entry.seconds[0][0] / 1e9);
    }
    Ok(())
}
