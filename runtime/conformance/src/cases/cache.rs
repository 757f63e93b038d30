//! The cache: its types, and blocks that are reused without being cleared, so that NaNs which an earlier
//! sequence left in one must not matter.

use std::sync::Arc;

use trustformers_plan::{
    Backend, BackendError, DType, Executable, FusedOps, KvType, LoadSpec, Loaded, LogitsRows, Numerics, Plan,
    PlanBuilder, RopeLayout, SequenceStep, StepError, StepInput, Weight, WeightId, Weights, buckets,
    oracle::Oracle,
};

use super::order::expect;
use crate::compare::{ROUNDED_KV_COSINE, alike, same_bits, wrong};
use crate::harness::{LoadCase, decode, load_plan, run};
use crate::models::{DECODER_LIMITS, Decoder, VOCABULARY, named};
use crate::{CaseError, Open};

/// Each type of the cache that the backend claims gives the answer of the oracle with a cache of that type,
/// and F32 is one of them.
pub(super) fn types(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    if !caps.kv_types.contains(&KvType::F32) || !caps.kv_types.contains(&caps.fast_kv_type) {
        return wrong(format!("F32 and {} must be among the types {:?}", caps.fast_kv_type, caps.kv_types));
    }
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: true };
    let weights = decoder.weights()?;
    for kv_type in caps.kv_types {
        let answers = |backend: &mut dyn Backend, fused: FusedOps| -> Result<Vec<Vec<f32>>, CaseError> {
            let plan = decoder.plan(&weights, &fused)?;
            let weights = Arc::clone(&weights);
            let case = LoadCase { weights, plan, kv_type, numerics: Numerics::Exact };
            decode(&mut *load_plan(backend, &case)?)
        };
        let want = answers(&mut Oracle::new(), FusedOps::NONE)?;
        let got = answers(&mut *open()?, caps.fused)?;
        alike(&format!("a cache of {kv_type}"), &got, &want, ROUNDED_KV_COSINE)?;
    }
    Ok(())
}

pub(super) fn poison(open: Open<'_>) -> Result<(), CaseError> {
    open()?.caps().kv_types.iter().try_for_each(|kv_type| poison_in(open, *kv_type))
}

fn poison_in(open: Open<'_>, kv_type: KvType) -> Result<(), CaseError> {
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };
    let width = decoder.hyper().width;
    let mut weights = Weights::clone(&*decoder.weights()?);
    let poison = weights.push(Weight::from_f32(
        "poison",
        (VOCABULARY, width),
        &vec![f32::NAN; VOCABULARY * width],
    )?)?;
    let weights = Arc::new(weights);
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let write = |table: WeightId| -> Result<Plan, CaseError> {
        let mut b = PlanBuilder::new(&weights, decoder.hyper(), DECODER_LIMITS);
        let x = b.embed(table);
        let (k, v) = (b.matmul(x, named(&weights, "0.k")?), b.matmul(x, named(&weights, "0.v")?));
        b.kv_write(0, k, v);
        let x = b.attention(0, x, 0.25);
        let x = b.gather_rows(x);
        b.logits(x, named(&weights, "embedding")?);
        Ok(b.finish(&fused)?)
    };
    let (poisoned, plain) = (write(poison)?, write(named(&weights, "embedding")?)?);
    let numerics = Numerics::Exact;
    let spec = LoadSpec {
        weights: Arc::clone(&weights),
        plan: &plain,
        kv_blocks: 2,
        kv_type,
        numerics,
        progress: &mut |_| {},
    };
    let mut loaded = backend.load(spec)?;
    let by_rows = backend.caps().row_buckets.clone();
    let mut compiled = |plan: &Plan| buckets::compile(&mut *loaded, plan, &by_rows);
    let (mut poisoned, mut plain) = (compiled(&poisoned)?, compiled(&plain)?);
    let step = |tokens| SequenceStep { tokens, cached_tokens: 0, blocks: &[1], logits: LogitsRows::Last };
    let before = run(&mut *plain, &[step(&[1, 2, 3])])?;
    if !before[0].iter().all(|value| value.is_finite()) {
        return wrong("a fresh cache gave a logit that is not finite");
    }
    let bad = run(&mut *poisoned, &[step(&[5; 16])])?;
    if !bad[0].iter().all(|value| value.is_nan()) {
        return wrong("NaN weights gave a logit that is a number: something was not computed");
    }
    same_bits("a block that held NaNs", &run(&mut *plain, &[step(&[1, 2, 3])])?, &before)
}

/// A cache that grows keeps what it has, and one that shrinks keeps what is below its new end; what is above
/// is refused, and the report is right at any time.
pub(super) fn resize(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    caps.kv_types.iter().filter(|_| caps.kv_resizes).try_for_each(|kv_type| resize_of(open, *kv_type))
}

fn resize_of(open: Open<'_>, kv_type: KvType) -> Result<(), CaseError> {
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };
    let weights = decoder.weights()?;
    let mut backend = open()?;
    let plan = decoder.plan(&weights, &backend.caps().fused)?.with_kv_room(40);
    let spec = LoadSpec {
        weights,
        plan: &plan,
        kv_blocks: 12,
        kv_type,
        numerics: Numerics::Exact,
        progress: &mut |_| {},
    };
    let estimate = backend.estimate(&spec.estimate_spec())?;
    let mut loaded = backend.load(spec)?;
    let mut executable = buckets::compile(&mut *loaded, &plan, &backend.caps().row_buckets)?;
    let tokens: Vec<u32> = (0..300).map(|i| (i * 11 + 2) % VOCABULARY as u32).collect();
    let step = |from: usize, to: usize, blocks| SequenceStep {
        tokens: &tokens[from..to],
        cached_tokens: from,
        blocks,
        logits: LogitsRows::Last,
    };
    let right_size = |loaded: &dyn Loaded, blocks: u64| {
        let (kv_bytes, wanted) = (loaded.memory().kv_bytes, blocks * kv_type.block_bytes(plan.hyper()));
        if kv_bytes == wanted {
            Ok(())
        } else {
            wrong(format!("{kv_bytes} bytes for {blocks} blocks: {wanted}"))
        }
    };
    if estimate.kv_bytes != 12 * kv_type.block_bytes(plan.hyper()) {
        return wrong("the estimate is for the blocks that are loaded, not for the room");
    }
    let short: Vec<u32> = vec![3, 0, 11, 7];
    let whole: Vec<u32> = short.iter().copied().chain(20..36).collect();
    let first = run(&mut *executable, &[step(0, 60, &short)])?;
    let next = run(&mut *executable, &[step(60, 61, &short)])?;
    let is_block = |error: &BackendError| matches!(error, BackendError::Step(StepError::BlockId { .. }));
    let refused = |executable: &mut dyn Executable| {
        let mut input = StepInput::new();
        input.push_sequence(step(0, 60, &[0, 1, 2, 30]));
        expect("a block above the end of the cache", executable.submit(&input), is_block)
    };
    refused(&mut *executable)?;
    let is_room = |error: &BackendError| matches!(error, BackendError::Mismatch(_));
    expect("a cache above the room", loaded.resize_kv(41), is_room)?;
    right_size(&*loaded, 12)?;
    loaded.resize_kv(40)?;
    right_size(&*loaded, 40)?;
    let grown = run(&mut *executable, &[step(60, 61, &whole)])?;
    same_bits(&format!("{kv_type}: content after growth"), &grown, &next)?;
    let long = run(&mut *executable, &[step(60, 300, &whole)])?;
    loaded.resize_kv(12)?;
    right_size(&*loaded, 12)?;
    refused(&mut *executable)?;
    let kept = run(&mut *executable, &[step(60, 61, &short)])?;
    same_bits(&format!("{kv_type}: content below the end after it shrank"), &kept, &next)?;
    let again = run(&mut *executable, &[step(0, 60, &short)])?;
    same_bits(&format!("{kv_type}: computed again"), &again, &first)?;
    loaded.resize_kv(36)?;
    let regrown = run(&mut *executable, &[step(60, 300, &whole)])?;
    same_bits(&format!("{kv_type}: in blocks that were gone for a while"), &regrown, &long)
}
