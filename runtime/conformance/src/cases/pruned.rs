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
    for dtype in [DType::F32, DType::Q4_1].into_iter().filter(|dtype| claims(open, *dtype)) {
        let decoder = Decoder { dtype, mixed_with: None, layout: RopeLayout::Interleaved, biased: true };
        let weights = decoder.weights()?;
        for numerics in [Numerics::Exact, Numerics::Fast] {
            for fused in [open()?.caps().fused, FusedOps::NONE] {
                let answers = |plan| {
                    let weights = Arc::clone(&weights);
                    let case = LoadCase { weights, plan, kv_type: KvType::F32, numerics };
                    decode(&mut *load_plan(&mut *open()?, &case)?)
                };
                let whole = answers(decoder.plan(&weights, &fused)?)?;
                let pruned = answers(decoder.pruned_plan(&weights, &fused)?)?;
                let what = format!("{decoder:?} {numerics:?}, pruned");
                match numerics {
                    Numerics::Exact => same_bits(&what, &pruned, &whole)?,
                    // The rows of a prompt may be computed in another way than those that need logits.
                    Numerics::Fast => alike(&what, &pruned, &whole, FAST_COSINE)?,
                }
            }
        }
    }
    Ok(())
}

pub(super) fn encoder(open: Open<'_>) -> Result<(), CaseError> {
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Cls, normalise: true };
    let weights = encoder.weights()?;
    for numerics in [Numerics::Exact, Numerics::Fast] {
        for fused in [open()?.caps().fused, FusedOps::NONE] {
            let answers = |plan| {
                let weights = Arc::clone(&weights);
                let case = LoadCase { weights, plan, kv_type: KvType::F32, numerics };
                encode(&mut *load_plan(&mut *open()?, &case)?, &LENGTHS)
            };
            let whole = answers(encoder.plan(&weights, &fused)?)?;
            let pruned = answers(encoder.pruned_plan(&weights, &fused)?)?;
            let what = format!("{encoder:?} {numerics:?}, pruned");
            match numerics {
                Numerics::Exact => same_bits(&what, &pruned, &whole)?,
                Numerics::Fast => alike(&what, &pruned, &whole, FAST_COSINE)?,
            }
        }
    }
    Ok(())
}

fn claims(open: Open<'_>, dtype: DType) -> bool {
    open().is_ok_and(|backend| backend.caps().dtypes.contains(&dtype))
}
