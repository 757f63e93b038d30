//! Rows that nobody reads are left out of the last layer: in a decoder those without logits, which still need
//! keys and values, in an encoder all but the first of each sequence. The other rows keep their bits in
//! `exact`.

use std::sync::Arc;

use trustformers_plan::{DType, FusedOps, KvType, Numerics, Pooling, RopeLayout};

use super::numerics::LENGTHS;
use crate::compare::{FAST_COSINE, alike, same_bits};
use crate::harness::{LoadCase, decode, encode, load_plan};
use crate::models::{Decoder, Encoder};
use crate::{CaseError, Open};

pub(super) fn decoder(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    // Unfused in exact, fused in fast numerics: each costs several runs of a model.
    let choices = [(DType::F32, Numerics::Exact, FusedOps::NONE), (DType::Q4_1, Numerics::Fast, caps.fused)];
    for (dtype, numerics, fused) in choices.into_iter().filter(|(dtype, ..)| caps.dtypes.contains(dtype)) {
        let decoder = Decoder { dtype, mixed_with: None, layout: RopeLayout::Interleaved, biased: true };
        let weights = decoder.weights()?;
        let answers = |plan| {
            let weights = Arc::clone(&weights);
            let case = LoadCase { weights, plan, kv_type: KvType::F32, numerics };
            decode(&mut *load_plan(&mut *open()?, &case)?)
        };
        let whole = answers(decoder.plan(&weights, &fused)?)?;
        let pruned = answers(decoder.pruned_plan(&weights, &fused)?)?;
        compare(&format!("{decoder:?}, pruned"), numerics, &pruned, &whole)?;
    }
    Ok(())
}

pub(super) fn encoder(open: Open<'_>) -> Result<(), CaseError> {
    let claimed = open()?.caps().fused;
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Cls, normalise: true };
    let weights = encoder.weights()?;
    for (numerics, fused) in [(Numerics::Exact, FusedOps::NONE), (Numerics::Fast, claimed)] {
        let answers = |plan| {
            let weights = Arc::clone(&weights);
            let case = LoadCase { weights, plan, kv_type: KvType::F32, numerics };
            encode(&mut *load_plan(&mut *open()?, &case)?, &LENGTHS)
        };
        let whole = answers(encoder.plan(&weights, &fused)?)?;
        let pruned = answers(encoder.pruned_plan(&weights, &fused)?)?;
        compare(&format!("{encoder:?}, pruned"), numerics, &pruned, &whole)?;
    }
    Ok(())
}

/// In fast numerics the rows of a prompt may be computed in another way than those that need logits.
fn compare(what: &str, numerics: Numerics, got: &[Vec<f32>], want: &[Vec<f32>]) -> Result<(), CaseError> {
    match numerics {
        Numerics::Exact => same_bits(what, got, want),
        Numerics::Fast => alike(what, got, want, FAST_COSINE),
    }
}
