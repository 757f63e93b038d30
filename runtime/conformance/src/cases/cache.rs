//! The cache: its types, and blocks that are reused without being cleared, so that NaNs which an earlier
//! sequence left in one must not matter.

use std::sync::Arc;

use trustformers_plan::{
    Backend, DType, FusedOps, KvType, LoadSpec, LogitsRows, Numerics, Plan, PlanBuilder, RopeLayout,
    SequenceStep, Weight, WeightId, Weights, oracle::Oracle,
};

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
    let (mut poisoned, mut plain) = (loaded.compile(&poisoned)?, loaded.compile(&plain)?);
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
