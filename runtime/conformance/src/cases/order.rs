//! Which errors refuse invalid calls, and what a backend promises about memory and progress.

use std::sync::Arc;

use trustformers_plan::{
    BackendError, DType, FusedOps, KvType, LoadSpec, LogitsRows, Numerics, PlanBuilder, RopeLayout,
    SequenceStep, StepInput, StepOutput, Weight, Weights, shard::shard,
};

use crate::compare::wrong;
use crate::harness::{KV_BLOCKS, load_decoder, run};
use crate::models::{DECODER_LIMITS, Decoder, VOCABULARY};
use crate::{CaseError, Open};

const DECODER: Decoder =
    Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };

/// Submit and wait alternate, and a refused step does not affect the next one.
pub(super) fn steps(open: Open<'_>) -> Result<(), CaseError> {
    let mut backend = open()?;
    let (fused, in_flight) = (backend.caps().fused, backend.caps().steps_in_flight);
    let executable = &mut *load_decoder(&mut *backend, DECODER, &fused, Numerics::Exact)?;
    let step = |tokens| SequenceStep { tokens, cached_tokens: 0, blocks: &[0], logits: LogitsRows::Last };
    let want = run(executable, &[step(&[1, 2])])?;
    let output = &mut StepOutput::new();
    expect("wait without submit", executable.wait(output), |e| matches!(e, BackendError::Order(_)))?;
    let empty = executable.submit(&StepInput::new());
    expect("a step without rows", empty, |e| matches!(e, BackendError::Step(_)))?;
    let mut unknown = StepInput::new();
    unknown.push_sequence(step(&[VOCABULARY as u32]));
    expect("a token outside the vocabulary", executable.submit(&unknown), |e| {
        matches!(e, BackendError::Step(_))
    })?;
    let mut input = StepInput::new();
    input.push_sequence(step(&[1, 2]));
    for _ in 0..in_flight {
        executable.submit(&input)?;
    }
    expect("one step too many", executable.submit(&input), |e| matches!(e, BackendError::Order(_)))?;
    for _ in 0..in_flight {
        executable.wait(output)?;
    }
    if output.row(0) != want[0] {
        return wrong("the step after refused steps gives another answer");
    }
    Ok(())
}

/// A plan of other weights is not compiled.
pub(super) fn plans(open: Open<'_>) -> Result<(), CaseError> {
    let mut backend = open()?;
    let weights = DECODER.weights()?;
    let plan = DECODER.plan(&weights, &backend.caps().fused)?;
    let width = DECODER.hyper().width;
    let mut other = Weights::new();
    let table =
        other.push(Weight::from_f32("other", (VOCABULARY, width), &vec![0.0; VOCABULARY * width])?)?;
    let mut b = PlanBuilder::new(&other, DECODER.hyper(), DECODER_LIMITS);
    let x = b.embed(table);
    let x = b.gather_rows(x);
    b.logits(x, table);
    let foreign = b.finish(&backend.caps().fused)?;
    let numerics = Numerics::Exact;
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: 1,
        kv_type: KvType::F32,
        numerics,
        progress: &mut |_| {},
    };
    let compiled = backend.load(spec)?.compile(&foreign).map(drop);
    expect("a plan of other weights", compiled, |e| matches!(e, BackendError::Mismatch(_)))
}

/// A device that is not a group refuses a plan that sums over devices.
pub(super) fn groups(open: Open<'_>) -> Result<(), CaseError> {
    let mut backend = open()?;
    let weights = DECODER.weights()?;
    let plan = DECODER.plan(&weights, &FusedOps::NONE)?;
    let shards = match shard(&plan, &weights, 2, &backend.caps().fused) {
        Ok(shards) => shards,
        Err(error) => return wrong(format!("the decoder cannot be divided: {error}")),
    };
    let spec = LoadSpec {
        weights: Arc::clone(&shards[0].weights),
        plan: &shards[0].plan,
        kv_blocks: 1,
        kv_type: KvType::F32,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let estimated = backend.estimate(&spec.estimate_spec()).map(drop);
    let is_group = |error: &BackendError| matches!(error, BackendError::OneDevice { .. });
    expect("an estimate for a plan of a group", estimated, is_group)?;
    expect("a plan of a group", backend.load(spec).map(drop), is_group)
}

/// Progress never falls and ends at the total; the memory report and the estimate are right, with each type
/// of the cache; a cache that cannot fit is refused.
pub(super) fn memory(open: Open<'_>) -> Result<(), CaseError> {
    open()?.caps().kv_types.iter().try_for_each(|kv_type| memory_of(open, *kv_type))
}

fn memory_of(open: Open<'_>, kv_type: KvType) -> Result<(), CaseError> {
    let mut backend = open()?;
    let weights = DECODER.weights()?;
    let plan = DECODER.plan(&weights, &backend.caps().fused)?;
    let mut reported = Vec::new();
    let numerics = Numerics::Fast;
    let spec = LoadSpec {
        weights: Arc::clone(&weights),
        plan: &plan,
        kv_blocks: KV_BLOCKS,
        kv_type,
        numerics,
        progress: &mut |progress| reported.push((progress.done_bytes, progress.total_bytes)),
    };
    let estimate = backend.estimate(&spec.estimate_spec())?;
    let memory = backend.load(spec)?.memory();
    let all = reported.last().is_some_and(|(done, total)| done == total && *total > 0);
    if !reported.is_sorted() || !all {
        return wrong(format!("progress fell or did not end at the total: {reported:?}"));
    }
    let kv_bytes = KV_BLOCKS as u64 * kv_type.block_bytes(plan.hyper());
    if memory.kv_bytes != kv_bytes || memory.arena_bytes < plan.arena_bytes() as u64 {
        return wrong(format!("{memory:?}: the cache takes {kv_bytes}, the arena {}", plan.arena_bytes()));
    }
    // `Backend::estimate` promises to be at most 1 % off.
    for (what, estimated, taken) in [
        ("weights", estimate.weights_bytes, memory.weights_bytes),
        ("cache", estimate.kv_bytes, memory.kv_bytes),
        ("arena", estimate.arena_bytes, memory.arena_bytes),
        ("all", estimate.total_bytes(), memory.total_bytes()),
    ] {
        if estimated.abs_diff(taken) > taken / 100 {
            return wrong(format!("{what}: {estimated} bytes were estimated, {taken} are reported"));
        }
    }
    let huge = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: usize::MAX / 1024,
        kv_type,
        numerics,
        progress: &mut |_| {},
    };
    let refused = backend.load(huge).map(drop);
    expect("a cache larger than any memory", refused, |e| matches!(e, BackendError::OutOfMemory { .. }))
}

pub(super) fn expect(
    what: &str,
    outcome: Result<(), BackendError>,
    matches: impl Fn(&BackendError) -> bool,
) -> Result<(), CaseError> {
    match outcome {
        Err(error) if matches(&error) => Ok(()),
        Err(error) => wrong(format!("{what} gave another error: {error}")),
        Ok(()) => wrong(format!("{what} was not refused")),
    }
}
