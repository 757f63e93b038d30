//! Measures steps of models with synthetic weights: decode, decode with a long context, eight sequences, and
//! prefill.
//!
//! `cargo run --profile ci -p trustformers-cpu --example steps -- [MODEL] [all] [unfused]
//! [deep | sample | load] [THREADS]`.
//! `sample` measures steps of 32 sequences whose tokens are chosen: on all threads from where the logits are,
//! and from a copy of them on one thread. `deep` measures long contexts instead: a sequence at depth 4096,
//! and four of which one is long. `load` measures loading instead, beside loading on one thread. MODEL is
//! `smollm2` (the default: SmolLM2-135M, Q4_1), `smollm2-wide` (the same with a vocabulary of 151,936),
//! `smollm2-bf16`, `qwen-0.5b` or `qwen-1.5b` (with the mixed types of their Q4_K_M files). `all` measures
//! every tier in both numerics instead of the best tier in fast numerics, and `unfused` adds plans
//! without fused ops. Decoding reads all repacked weights once per step, so the speed is printed with the
//! time that reading this much memory takes at the bandwidth measured in the same run. All entries run
//! alternately for [`ROUNDS`] rounds, so that other load on the machine affects all of them. It prints the
//! fastest and the median round.

use std::{hint::black_box, sync::Arc, time::Instant};

use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, DType, Executable, Filters, FusedOps, Hyper, KV_BLOCK_TOKENS, Limits, LoadSpec, LogitsRows,
    Numerics, Plan, PlanBuilder, RopeLayout, RopeScaling, RopeSpec, SampleInput, SampleScratch, SampleSpec,
    SequenceStep, StepInput, StepOutput, Weight, Weights, sample,
};

type AnyError = Box<dyn std::error::Error>;

/// A model's sizes and the types of its matrices.
struct Shape {
    name: &'static str,
    hyper: Hyper,
    feed_forward: usize,
    head: DType,
    query_key_output: DType,
    /// Types in even and in odd layers.
    value: [DType; 2],
    gate_up: DType,
    /// Types in even and in odd layers.
    down: [DType; 2],
}

const SMOLLM2: Shape = Shape {
    name: "smollm2",
    hyper: Hyper {
        width: 576,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
        context: 2048,
    },
    feed_forward: 1536,
    head: DType::Q8_0,
    query_key_output: DType::Q4_1,
    value: [DType::Q4_1; 2],
    gate_up: DType::Q4_1,
    down: [DType::Q4_1; 2],
};

const SHAPES: [Shape; 5] = [
    SMOLLM2,
    Shape { name: "smollm2-wide", hyper: Hyper { vocab: 151_936, ..SMOLLM2.hyper }, ..SMOLLM2 },
    Shape {
        name: "smollm2-bf16",
        head: DType::BF16,
        query_key_output: DType::BF16,
        value: [DType::BF16; 2],
        gate_up: DType::BF16,
        down: [DType::BF16; 2],
        ..SMOLLM2
    },
    Shape {
        name: "qwen-0.5b",
        hyper: Hyper {
            width: 896,
            layers: 24,
            heads: 14,
            kv_heads: 2,
            head_dim: 64,
            vocab: 151_936,
            context: 2048,
        },
        feed_forward: 4864,
        head: DType::Q8_0,
        query_key_output: DType::Q5_0,
        value: [DType::Q8_0, DType::Q5_0],
        gate_up: DType::Q5_0,
        down: [DType::Q6_K, DType::Q4_K],
    },
    Shape {
        name: "qwen-1.5b",
        hyper: Hyper {
            width: 1536,
            layers: 28,
            heads: 12,
            kv_heads: 2,
            head_dim: 128,
            vocab: 151_936,
            context: 2048,
        },
        feed_forward: 8960,
        head: DType::Q6_K,
        query_key_output: DType::Q4_K,
        value: [DType::Q6_K, DType::Q4_K],
        gate_up: DType::Q4_K,
        down: [DType::Q6_K, DType::Q4_K],
    },
];

/// A block with quants of every value and scales of about 0.008. The values do not affect the time.
fn block(dtype: DType, seed: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..dtype.block_bytes()).map(|i| (((seed + i) * 37) >> 3) as u8).collect();
    let small = [0x10, 0x20];
    match dtype {
        DType::F32 => bytes.copy_from_slice(&1f32.to_le_bytes()),
        DType::F16 | DType::BF16 | DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => {
            bytes[..2].copy_from_slice(&small);
        }
        DType::Q4_1 => bytes[..4].copy_from_slice(&[0x10, 0x20, 0x80, 0xab]),
        DType::Q4_K | DType::Q5_K => bytes[..4].copy_from_slice(&[0x10, 0x0c, 0x10, 0x0c]),
        DType::Q6_K => bytes[208..].copy_from_slice(&[0x10, 0x0c]),
    }
    bytes
}

fn weights(shape: &Shape) -> Result<Arc<Weights>, AnyError> {
    let mut weights = Weights::new();
    let mut push = |name: String, dtype: DType, rows: usize, cols: usize| {
        let bytes: Vec<u8> = (0..rows * cols / dtype.block_len()).flat_map(|i| block(dtype, i)).collect();
        let len = bytes.len();
        weights.push(Weight::new(name, dtype, (rows, cols), Arc::new(bytes), 0..len)?)
    };
    let (hyper, ff) = (&shape.hyper, shape.feed_forward);
    let kv = hyper.kv_heads * hyper.head_dim;
    push("embedding".into(), shape.head, hyper.vocab, hyper.width)?;
    push("norm".into(), DType::F32, 1, hyper.width)?;
    for layer in 0..hyper.layers {
        let half = layer % 2;
        for (name, dtype, rows, cols) in [
            ("q", shape.query_key_output, hyper.width, hyper.width),
            ("k", shape.query_key_output, kv, hyper.width),
            ("v", shape.value[half], kv, hyper.width),
            ("o", shape.query_key_output, hyper.width, hyper.width),
            ("gate", shape.gate_up, ff, hyper.width),
            ("up", shape.gate_up, ff, hyper.width),
            ("down", shape.down[half], hyper.width, ff),
        ] {
            push(format!("{layer}.{name}"), dtype, rows, cols)?;
        }
    }
    Ok(Arc::new(weights))
}

fn plan(shape: &Shape, weights: &Weights, fused: &FusedOps) -> Result<Plan, AnyError> {
    let find = |name: String| weights.find(&name).ok_or(name);
    let head_dim = shape.hyper.head_dim;
    let scaling = RopeScaling::NONE;
    let rope = RopeSpec { layout: RopeLayout::Interleaved, base: 1e5, dims: head_dim, head_dim, scaling };
    let mut b = PlanBuilder::new(weights, shape.hyper, Limits { rows: 512, sequences: 32, logits_rows: 32 });
    let norm = find("norm".into())?;
    let mut x = b.embed(find("embedding".into())?);
    for layer in 0..shape.hyper.layers {
        let at = |name: &str| find(format!("{layer}.{name}"));
        let n = b.rms_norm(x, norm, 1e-5);
        let (q, k, v) = (b.matmul(n, at("q")?), b.matmul(n, at("k")?), b.matmul(n, at("v")?));
        let (q, k) = (b.rope(q, rope), b.rope(k, rope));
        b.kv_write(layer, k, v);
        let mixed = b.attention(layer, q, 0.125);
        let o = b.matmul(mixed, at("o")?);
        x = b.add(x, o);
        let n = b.rms_norm(x, norm, 1e-5);
        let (gate, up) = (b.matmul(n, at("gate")?), b.matmul(n, at("up")?));
        let hidden = b.silu_mul(gate, up);
        let down = b.matmul(hidden, at("down")?);
        x = b.add(x, down);
    }
    let x = b.gather_rows(x);
    let x = b.rms_norm(x, norm, 1e-5);
    b.logits(x, find("embedding".into())?);
    Ok(b.finish(fused)?)
}

/// Measurements of each entry.
const ROUNDS: usize = 7;

/// Who chooses the tokens of a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ChosenBy {
    Nobody,
    /// The caller's thread, from a copy of the logits.
    Caller,
    /// The backend.
    Device,
}

/// Seconds of one step, the fastest of its times in this round.
fn seconds(e: &mut dyn Executable, measure: &Measure) -> Result<f64, AnyError> {
    let (mut output, mut scratch) = (StepOutput::new(), SampleScratch::default());
    let sample = sample_of(measure.input.logits_rows.len());
    let mut best = f64::MAX;
    for _ in 0..measure.times {
        let start = Instant::now();
        e.submit(&measure.input)?;
        if measure.chosen_by == ChosenBy::Device {
            e.sample(&sample)?;
        }
        e.wait(&mut output)?;
        if measure.chosen_by == ChosenBy::Caller {
            let choice = |row| sample::choose(output.row(row), &sample.row(row), &mut scratch);
            output.choices = (0..sample.len()).map(choice).collect();
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    black_box(&output);
    Ok(best)
}

/// Every other token the best one, the rest drawn from the best that have nine tenths of the probability.
fn sample_of(rows: usize) -> SampleInput {
    let mut sample = SampleInput::new();
    for row in 0..rows {
        let drawn = SampleSpec {
            temperature: 0.7,
            filters: Filters { top_p: 0.9, ..Filters::NONE },
            uniform: (row * 37 % 100) as f64 / 100.0,
            ..SampleSpec::greedy(row)
        };
        sample.push(&if row % 2 == 0 { drawn } else { SampleSpec::greedy(row) });
    }
    sample
}

fn step(sequences: usize, rows: usize, cached_tokens: usize) -> StepInput {
    step_of(&vec![cached_tokens; sequences], rows)
}

/// A sequence for each number of cached tokens, each with as many blocks as it needs.
fn step_of(cached_tokens: &[usize], rows: usize) -> StepInput {
    let mut input = StepInput::new();
    let mut first_block = 0;
    for &cached_tokens in cached_tokens {
        let end = first_block + (cached_tokens + rows).div_ceil(KV_BLOCK_TOKENS) as u32;
        let blocks: Vec<u32> = (first_block..end).collect();
        first_block = end;
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

/// Bytes per second that `threads` threads read together, each a different chunk of `bytes`.
fn read_bandwidth(bytes: u64, threads: usize) -> f64 {
    let words: Vec<u64> = (0..bytes / 8).collect();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for chunk in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| {
                    let mut sums = [0u64; 32];
                    for line in chunk.chunks_exact(32) {
                        sums.iter_mut().zip(line).for_each(|(sum, word)| *sum ^= word);
                    }
                    black_box(sums);
                });
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes as f64 / best
}

/// One tier's model and its measurements.
struct Entry {
    name: String,
    executable: Box<dyn Executable>,
    /// Per measure, one time per round.
    seconds: Vec<Vec<f64>>,
}

/// Steps that are measured.
struct Measure {
    what: &'static str,
    input: StepInput,
    /// Tokens that a step gives.
    tokens: f64,
    /// Steps of a round, of which the fastest counts.
    times: usize,
    chosen_by: ChosenBy,
}

/// The measures of a run.
fn measures(deep: bool, sampled: bool) -> Vec<Measure> {
    let measure = |what, input, tokens, times| {
        let chosen_by = ChosenBy::Nobody;
        Measure { what, input, tokens, times, chosen_by }
    };
    if sampled {
        let of = |what, chosen_by| Measure { chosen_by, ..measure(what, step(32, 1, 100), 32.0, 6) };
        return vec![
            of("32 sequences", ChosenBy::Nobody),
            of("chosen by the caller", ChosenBy::Caller),
            of("chosen by the device", ChosenBy::Device),
        ];
    }
    if deep {
        return vec![
            measure("at 4096", step(1, 1, 4096), 1.0, 4),
            measure("mixed depths", step_of(&[8000, 512, 512, 512], 1), 4.0, 4),
        ];
    }
    vec![
        measure("decode", step(1, 1, 5), 1.0, 12),
        measure("at 512", step(1, 1, 512), 1.0, 8),
        measure("8 sequences", step(8, 1, 100), 8.0, 6),
        measure("prefill 512", step(1, 512, 0), 512.0, 1),
    ]
}

/// Prints how long loading takes, and how long on one thread.
fn print_load_times(shape: &Shape, weights: &Arc<Weights>, threads: Option<usize>) -> Result<(), AnyError> {
    let load_ms = |threads| -> Result<f64, AnyError> {
        let mut backend = CpuBackend::new(CpuConfig { threads, ..CpuConfig::default() })?;
        let plan = plan(shape, weights, &backend.caps().fused)?;
        let (numerics, start) = (Numerics::Fast, Instant::now());
        drop(backend.load(LoadSpec {
            weights: weights.clone(),
            plan: &plan,
            kv_blocks: KV_BLOCKS,
            kv_type: backend.caps().default_kv_type(numerics),
            numerics,
            progress: &mut |_| {},
        })?);
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let (mut all, mut one) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        all.push(load_ms(threads)?);
        one.push(load_ms(Some(1))?);
    }
    let (all, one) = (ends(&mut all).1, ends(&mut one).1);
    println!("{}: loaded in {all:.1} ms, with 1 thread in {one:.1} ms", shape.name);
    Ok(())
}

/// The fastest and the median.
fn ends(list: &mut [f64]) -> (f64, f64) {
    list.sort_by(f64::total_cmp);
    (list[0], list[list.len() / 2])
}

/// Blocks of the cache: of eight sequences, or of the deepest measure.
const KV_BLOCKS: usize = 640;

/// What is measured beside the defaults.
struct Wanted {
    /// Every tier in both numerics.
    all: bool,
    /// Plans without fused ops too.
    unfused: bool,
    threads: Option<usize>,
}

/// An entry for each tier and kind of plan, and the bytes of the repacked weights.
fn entries(
    shape: &Shape,
    weights: &Arc<Weights>,
    wanted: &Wanted,
    measures: usize,
) -> Result<(Vec<Entry>, u64), AnyError> {
    let (mut entries, mut weight_bytes) = (Vec::new(), 0);
    // The scalar tier is not for serving, and its steps would take most of the run.
    let tiers = Tier::ALL.into_iter().filter(|tier| tier.is_available() && *tier != Tier::Scalar);
    for tier in tiers.filter(|tier| wanted.all || *tier == Tier::best()) {
        for (numerics, unfused) in [Numerics::Fast, Numerics::Exact].map(|n| [(n, false), (n, true)]).concat()
        {
            if (numerics == Numerics::Exact && !wanted.all) || (unfused && !wanted.unfused) {
                continue;
            }
            let config = CpuConfig { tier: Some(tier), threads: wanted.threads, ..CpuConfig::default() };
            let mut backend = CpuBackend::new(config)?;
            let fused = if unfused { FusedOps::NONE } else { backend.caps().fused };
            let plan = plan(shape, weights, &fused)?;
            let start = Instant::now();
            let spec = LoadSpec {
                weights: weights.clone(),
                plan: &plan,
                kv_blocks: KV_BLOCKS,
                kv_type: backend.caps().default_kv_type(numerics),
                numerics,
                progress: &mut |_| {},
            };
            let mut loaded = backend.load(spec)?;
            let unfused = if unfused { ", unfused" } else { "" };
            let name = format!("{} {} {numerics:?}{unfused}", shape.name, backend.caps().description);
            println!("{name}: loaded in {:.2} s, {:?}", start.elapsed().as_secs_f64(), loaded.memory());
            if let Some(tiles) = backend.tiles() {
                println!("tiles for these rows: {tiles}");
            }
            weight_bytes = loaded.memory().weights_bytes;
            let seconds = vec![Vec::new(); measures];
            entries.push(Entry { name, executable: loaded.compile(&plan)?, seconds });
        }
    }
    Ok((entries, weight_bytes))
}

fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| args.iter().any(|arg| arg == word);
    let mut shape = SHAPES.into_iter().find(|shape| has(shape.name)).unwrap_or(SMOLLM2);
    if has("deep") {
        shape.hyper.context = 8192;
    }
    let threads: Option<usize> = args.iter().find_map(|arg| arg.parse().ok());
    let weights = weights(&shape)?;
    if has("load") {
        return print_load_times(&shape, &weights, threads);
    }
    let measures = measures(has("deep"), has("sample"));
    let wanted = Wanted { all: has("all"), unfused: has("unfused"), threads };
    let (mut entries, weight_bytes) = entries(&shape, &weights, &wanted, measures.len())?;
    let bandwidth = read_bandwidth(weight_bytes, threads.unwrap_or(2));
    for _ in 0..ROUNDS {
        for entry in &mut entries {
            for (measure, list) in measures.iter().zip(&mut entry.seconds) {
                list.push(seconds(&mut *entry.executable, measure)?);
            }
        }
    }
    for entry in &mut entries {
        print!("{:<53}", entry.name);
        for (Measure { what, tokens, .. }, list) in measures.iter().zip(&mut entry.seconds) {
            let (best, median) = ends(list);
            print!(" | {what} {:7.1} (median {:7.1}) tok/s", tokens / best, tokens / median);
        }
        println!(" | {} reads {:.1} GB/s", measures[0].what, weight_bytes as f64 / entry.seconds[0][0] / 1e9);
    }
    println!(
        "reading {:.0} MB at {:.1} GB/s would allow {:.1} tok/s",
        weight_bytes as f64 / 1e6,
        bandwidth / 1e9,
        bandwidth / weight_bytes as f64
    );
    Ok(())
}
