//! Tokens that the processor chooses from long rows: those of the reference on every tier, and, on request,
//! how long they take.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::{sync::Arc, time::Instant};

use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_plan::{
    Backend, Executable, Filters, Hyper, KvType, Limits, LoadSpec, LogitsRows, Numerics, Penalties,
    PlanBuilder, SampleInput, SampleResult, SampleScratch, SampleSpec, SequenceStep, StepInput, StepOutput,
    TokenCount, Weight, Weights, sample, seeded::SeededRng,
};

/// Rows of a step: those of the largest default batch.
const ROWS: usize = 32;

/// A model that is only a table: the logits of a token are the products of its row with all rows.
fn table(tier: Tier, vocab: usize) -> Box<dyn Executable> {
    let width = 32;
    let mut rng = SeededRng::new(5);
    let values: Vec<f32> = (0..vocab * width).map(|_| rng.next_signed()).collect();
    let mut weights = Weights::new();
    let id = weights.push(Weight::from_f32("table", (vocab, width), &values).unwrap()).unwrap();
    let hyper = Hyper { width, layers: 1, heads: 1, kv_heads: 1, head_dim: 32, vocab, context: 64 };
    let limits = Limits { rows: ROWS, sequences: ROWS, logits_rows: ROWS };
    let mut backend = CpuBackend::new(CpuConfig { tier: Some(tier), ..CpuConfig::default() }).unwrap();
    let mut b = PlanBuilder::new(&weights, hyper, limits);
    let x = b.embed(id);
    let x = b.gather_rows(x);
    b.logits(x, id);
    let plan = b.finish(&backend.caps().fused).unwrap();
    let spec = LoadSpec {
        weights: Arc::new(weights),
        plan: &plan,
        kv_blocks: 0,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    backend.load(spec).unwrap().compile(&plan).unwrap()
}

fn step(vocab: usize) -> StepInput {
    let mut input = StepInput::new();
    for row in 0..ROWS {
        let tokens = [(row * 7919 % vocab) as u32];
        let logits = LogitsRows::Last;
        input.push_sequence(SequenceStep { tokens: &tokens, cached_tokens: 0, blocks: &[], logits });
    }
    input
}

/// Rows that are chosen in every way.
fn rows_of_every_kind(vocab: usize) -> SampleInput {
    let counts: Vec<TokenCount> =
        (0..200).map(|id| TokenCount { id: id * 17 % vocab as u32, produced: id % 3 }).collect();
    let mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|word| 0xf0f0_1234 >> (word % 7)).collect();
    let penalties = Penalties { repetition: 1.2, presence: 0.3, frequency: 0.1 };
    let filters = [
        Filters::NONE,
        Filters { top_k: 40, ..Filters::NONE },
        Filters { top_p: 0.9, ..Filters::NONE },
        Filters { min_p: 0.02, ..Filters::NONE },
        Filters { typical_p: 0.8, top_p: 0.95, ..Filters::NONE },
    ];
    let mut input = SampleInput::new();
    for row in 0..ROWS {
        let is_plain = row % 3 != 0;
        input.push(&SampleSpec {
            temperature: (row % 4) as f32 * 0.6,
            filters: filters[row % filters.len()],
            uniform: (row * 37 % 100) as f64 / 100.0,
            mask: (row % 5 == 1).then_some(mask.as_slice()),
            penalties: if is_plain { Penalties::NONE } else { penalties },
            counts: &counts,
            margin: row % 2 == 0,
            logprobs: (row % 2 == 1).then_some(5),
            ..SampleSpec::greedy(row)
        });
    }
    input
}

/// The logits of a step.
fn logits(executable: &mut dyn Executable, input: &StepInput) -> StepOutput {
    let mut output = StepOutput::new();
    executable.submit(input).unwrap();
    executable.wait(&mut output).unwrap();
    output
}

fn choose(logits: &StepOutput, sample: &SampleInput, scratch: &mut SampleScratch) -> Vec<SampleResult> {
    let choice = |row| sample::choose(logits.row(row), &sample.row(row), scratch);
    (0..sample.len()).map(choice).collect()
}

#[test]
fn every_tier_chooses_the_tokens_of_the_reference_from_long_rows() {
    let vocab = 5003;
    let (input, sample) = (step(vocab), rows_of_every_kind(vocab));
    for tier in Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
        let executable = &mut *table(tier, vocab);
        let logits = logits(executable, &input);
        let mut output = StepOutput::new();
        executable.submit(&input).unwrap();
        executable.sample(&sample).unwrap();
        executable.wait(&mut output).unwrap();
        assert_eq!(output.choices, choose(&logits, &sample, &mut SampleScratch::default()), "{tier}");
    }
}

/// What 32 tokens of a vocabulary of 152k take beside the products: copied and chosen on one thread, and
/// chosen where the logits are on all threads.
#[test]
#[ignore = "prints figures: cargo test --profile ci -p trustformers-cpu --test sampling -- --ignored"]
fn figures() {
    let vocab = 151_936;
    let executable = &mut *table(Tier::best(), vocab);
    let input = step(vocab);
    for (name, temperature, top_p) in [("greedy", 0.0, 1.0), ("drawn", 0.7, 1.0), ("top_p", 0.3, 0.9)] {
        let mut sample = SampleInput::new();
        for row in 0..ROWS {
            let uniform = (row * 37 % 100) as f64 / 100.0;
            let filters = Filters { top_p, ..Filters::NONE };
            sample.push(&SampleSpec { temperature, filters, uniform, ..SampleSpec::greedy(row) });
        }
        let (mut by_caller, mut by_device) = (Vec::new(), Vec::new());
        let (mut output, mut scratch) = (StepOutput::new(), SampleScratch::default());
        for _ in 0..15 {
            executable.submit(&input).unwrap();
            let started = Instant::now();
            executable.wait(&mut output).unwrap();
            let choices = choose(&output, &sample, &mut scratch);
            by_caller.push(started.elapsed());
            executable.submit(&input).unwrap();
            let started = Instant::now();
            executable.sample(&sample).unwrap();
            executable.wait(&mut output).unwrap();
            by_device.push(started.elapsed());
            assert_eq!(output.choices, choices);
        }
        by_caller.sort_unstable();
        by_device.sort_unstable();
        println!(
            "{name:<8} by the caller {:?}, by the device {:?} for {ROWS} rows",
            by_caller[7], by_device[7]
        );
    }
}
