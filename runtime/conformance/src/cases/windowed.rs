//! The decoder with windows, soft caps, norms of heads and GELU gates: near the oracle in both numerics, and
//! in `exact` the same whatever else is in the step.

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{Backend, DType, FusedOps, KvType, LogitsRows, Numerics, SequenceStep};

use crate::compare::{FAST_COSINE, FAST_FLOAT_COSINE, alike, near, same_bits};
use crate::harness::{LoadCase, decode, load_plan, run};
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
