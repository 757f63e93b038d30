//! The decoder with windows, soft caps, norms of heads and GELU gates: near the oracle in both numerics, and
//! in `exact` the same whatever else is in the step.

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    ABSENT_BLOCK, Backend, BackendError, DType, FusedOps, KV_BLOCK_TOKENS, KvType, LoadSpec, LogitsRows,
    Numerics, SequenceStep, StepError, StepInput,
};

use super::order::expect;
use crate::compare::{FAST_COSINE, FAST_FLOAT_COSINE, alike, near, same_bits, wrong};
use crate::harness::{KV_BLOCKS, LoadCase, decode, load_plan, run};
use crate::models::VOCABULARY;
use crate::windowed::WindowedDecoder;
use crate::{CaseError, Open};

fn case(decoder: WindowedDecoder, fused: &FusedOps, numerics: Numerics) -> Result<LoadCase, CaseError> {
    let weights = decoder.weights()?;
    let plan = decoder.plan(&weights, fused)?;
    Ok(LoadCase { weights, plan, kv_type: KvType::F32, numerics })
}

fn answers(
    backend: &mut dyn Backend,
    decoder: WindowedDecoder,
    numerics: Numerics,
) -> Result<Vec<Vec<f32>>, CaseError> {
    let fused = backend.caps().fused;
    decode(&mut *load_plan(backend, &case(decoder, &fused, numerics)?)?)
}

pub(super) fn numerics(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    for dtype in [DType::F32, DType::Q8_0].into_iter().filter(|dtype| caps.dtypes.contains(dtype)) {
        let routed = WindowedDecoder { dtype, has_experts: true };
        let want = answers(&mut Oracle::new(), routed, Numerics::Exact)?;
        near(&format!("{routed:?}"), &answers(&mut *open()?, routed, Numerics::Exact)?, &want)?;
        let decoder = WindowedDecoder { dtype, has_experts: false };
        let want = answers(&mut Oracle::new(), decoder, Numerics::Exact)?;
        let what = format!("{decoder:?}");
        near(&what, &answers(&mut *open()?, decoder, Numerics::Exact)?, &want)?;
        let least = if dtype.is_quantised() { FAST_COSINE } else { FAST_FLOAT_COSINE };
        alike(&what, &answers(&mut *open()?, decoder, Numerics::Fast)?, &want, least)?;
    }
    Ok(())
}

/// A prompt of 290 tokens, which passes its window many times, in one step and in chunks.
pub(super) fn chunks(open: Open<'_>) -> Result<(), CaseError> {
    let decoder = WindowedDecoder { dtype: DType::F32, has_experts: true };
    let tokens: Vec<u32> = (0..290).map(|i| (i * 31 + i / 7) % VOCABULARY as u32).collect();
    let blocks: Vec<u32> = (0..19).rev().collect();
    let step = |from: usize, to: usize| SequenceStep {
        tokens: &tokens[from..to],
        cached_tokens: from,
        blocks: &blocks,
        logits: LogitsRows::Last,
    };
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let case = case(decoder, &fused, Numerics::Exact)?;
    let mut executable = load_plan(&mut *backend, &case)?;
    let whole = run(&mut *executable, &[step(0, 290)])?;
    for cuts in [vec![0, 40, 290], vec![0, 130, 131, 289, 290]] {
        let mut last = Vec::new();
        for ends in cuts.windows(2) {
            last = run(&mut *executable, &[step(ends[0], ends[1])])?;
        }
        same_bits(&format!("{decoder:?} in chunks {cuts:?}"), &last, &whole)?;
    }
    Ok(())
}

/// The blocks of the classes' case: the layer without a window has the even ones below 40, and the layer with
/// one has 14 others in turn. They hold its window and the 158 rows of a step, `(37 - 1 + 158) / 16 + 1`.
fn class_blocks(case: &LoadCase, from: usize, to: usize) -> Vec<u32> {
    let first = case.plan.kv_layout().classes().first_windowed_block(from);
    let entry = |block: usize| {
        let windowed = if block < first { ABSENT_BLOCK } else { 40 + (block % 14) as u32 };
        [2 * block as u32, windowed]
    };
    (0..to.div_ceil(KV_BLOCK_TOKENS)).flat_map(entry).collect()
}

/// Where layers with a window have blocks of their own, an answer has the bits that it has with one block for
/// all layers, though the blocks before the window are absent and their memory has other content.
pub(super) fn classes(open: Open<'_>) -> Result<(), CaseError> {
    let decoder = WindowedDecoder { dtype: DType::F32, has_experts: true };
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let one = case(decoder, &fused, Numerics::Exact)?;
    let classed = LoadCase { plan: one.plan.clone().with_layer_classes(), ..one.clone() };
    if classed.plan.kv_layout().classes().groups() != 2 {
        return wrong("the decoder has a layer with a window and one without");
    }
    let tokens: Vec<u32> = (0..290).map(|i| (i * 31 + i / 7) % VOCABULARY as u32).collect();
    let blocks: Vec<u32> = (0..19).rev().collect();
    let (cached_tokens, logits) = (0, LogitsRows::Last);
    let whole = SequenceStep { tokens: &tokens, cached_tokens, blocks: &blocks, logits };
    let want = run(&mut *load_plan(&mut *backend, &one)?, &[whole])?;
    let mut executable = load_plan(&mut *open()?, &classed)?;
    for cuts in [vec![0, 40, 130, 288, 289, 290], vec![0, 1, 17, 33, 150, 290]] {
        let mut last = Vec::new();
        for ends in cuts.windows(2) {
            let (from, to) = (ends[0], ends[1]);
            let blocks = class_blocks(&classed, from, to);
            let step =
                SequenceStep { tokens: &tokens[from..to], cached_tokens: from, blocks: &blocks, logits };
            last = run(&mut *executable, &[step])?;
        }
        same_bits(&format!("{decoder:?} with classes of layers, in chunks {cuts:?}"), &last, &want)?;
    }
    let mut refused = |what: &str, blocks: &[u32], matches: fn(&BackendError) -> bool| {
        let mut input = StepInput::new();
        input.push_sequence(SequenceStep { tokens: &tokens[60..61], cached_tokens: 60, blocks, logits });
        expect(what, executable.submit(&input), matches)
    };
    let is_block = |error: &BackendError| matches!(error, BackendError::Step(StepError::BlockId { .. }));
    // The row at 60 reaches back to position 24, which is in the second block.
    refused("an absent block inside the window", &[0, 9, 2, ABSENT_BLOCK, 4, 41, 6, 42], is_block)?;
    refused("an absent block of a full layer", &[ABSENT_BLOCK, 9, 2, 40, 4, 41, 6, 42], is_block)?;
    let is_list = |error: &BackendError| matches!(error, BackendError::Step(StepError::Inconsistent(_)));
    refused("a table without an entry for each group", &[0, 40, 2, 41, 4, 42, 6], is_list)?;
    let is_shared = |error: &BackendError| matches!(error, BackendError::Step(StepError::SharedWrite(6)));
    refused("one block for two groups", &[0, ABSENT_BLOCK, 2, 40, 4, 41, 6, 6], is_shared)?;
    class_memory(open, &one, &classed)
}

/// A model's memory is that of its blocks, and its plans share them in one way.
fn class_memory(open: Open<'_>, one: &LoadCase, classed: &LoadCase) -> Result<(), CaseError> {
    let mut backend = open()?;
    let LoadCase { weights, plan, kv_type, numerics } = classed.clone();
    let spec =
        LoadSpec { weights, plan: &plan, kv_blocks: KV_BLOCKS, kv_type, numerics, progress: &mut |_| {} };
    let wanted = KV_BLOCKS as u64 * kv_type.block_bytes(plan.hyper()) / 2;
    let estimated = backend.estimate(&spec.estimate_spec())?.kv_bytes;
    let mut loaded = backend.load(spec)?;
    let got = (estimated, loaded.memory().kv_bytes);
    if got != (wanted, wanted) {
        return wrong(format!("{got:?} bytes for {KV_BLOCKS} blocks of half of the layers: {wanted}"));
    }
    let is_mismatch = |error: &BackendError| matches!(error, BackendError::Mismatch(_));
    expect("a plan with other classes of layers", loaded.compile(&one.plan).map(drop), is_mismatch)
}
