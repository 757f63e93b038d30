//! Blocks are reused without being cleared: NaNs that an earlier sequence left in one must not matter.

use std::sync::Arc;

use trustformers_plan::{
    DType, LoadSpec, LogitsRows, Numerics, Plan, PlanBuilder, RopeLayout, SequenceStep, Weight, WeightId,
    Weights,
};

use crate::compare::{same_bits, wrong};
use crate::harness::run;
use crate::models::{DECODER_LIMITS, Decoder, VOCABULARY, named};
use crate::{CaseError, Open};

pub(super) fn poison(open: Open<'_>) -> Result<(), CaseError> {
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
