//! Each fused form by itself, and all that are claimed, beside the oracle's plain ops.

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{DType, FusedOps, Numerics, Pooling, RopeLayout};

use super::numerics::LENGTHS;
use crate::compare::near;
use crate::models::{Decoder, Encoder};
use crate::story::{decode, encode, load_decoder, load_encoder};
use crate::{CaseError, Open};

/// None, each claimed form alone, and all that are claimed.
fn choices(claimed: FusedOps) -> Vec<FusedOps> {
    // No `..`: a new form that is not tried here does not compile.
    let FusedOps {
        concat_matmul,
        bias_epilogue,
        gelu_epilogue,
        silu_mul_epilogue,
        add_epilogue,
        norm_matmul,
        rope_kv_write,
    } = claimed;
    let none = FusedOps::NONE;
    let alone = [
        FusedOps { concat_matmul, ..none },
        FusedOps { bias_epilogue, ..none },
        // Where there is a bias, what follows it is folded only with it.
        FusedOps { bias_epilogue, gelu_epilogue, ..none },
        FusedOps { silu_mul_epilogue, ..none },
        FusedOps { bias_epilogue, add_epilogue, ..none },
        FusedOps { norm_matmul, ..none },
        FusedOps { concat_matmul, norm_matmul, ..none },
        FusedOps { rope_kv_write, ..none },
    ];
    let mut choices = vec![none, claimed];
    choices.extend(alone);
    choices
}

/// What the backend claims of floats and of one quantised type.
fn dtypes(open: Open<'_>) -> Result<Vec<DType>, CaseError> {
    let known = open()?.caps().dtypes.clone();
    Ok([DType::F32, DType::Q8_0].into_iter().filter(|dtype| known.contains(dtype)).collect())
}

pub(super) fn decoder(open: Open<'_>) -> Result<(), CaseError> {
    for dtype in dtypes(open)? {
        for biased in [false, true] {
            let decoder = Decoder { dtype, layout: RopeLayout::Neox, biased };
            let oracle = &mut Oracle::new();
            let want = decode(&mut *load_decoder(oracle, decoder, &FusedOps::NONE, Numerics::Exact)?)?;
            let mut backend = open()?;
            for fused in choices(backend.caps().fused) {
                let got = decode(&mut *load_decoder(&mut *backend, decoder, &fused, Numerics::Exact)?)?;
                near(&format!("{decoder:?} {fused:?}"), &got, &want)?;
            }
        }
    }
    Ok(())
}

pub(super) fn encoder(open: Open<'_>) -> Result<(), CaseError> {
    let encoder = Encoder { dtype: DType::F32, pooling: Pooling::Mean, normalise: true };
    let oracle = &mut Oracle::new();
    let want = encode(&mut *load_encoder(oracle, encoder, &FusedOps::NONE, Numerics::Exact)?, &LENGTHS)?;
    let mut backend = open()?;
    for fused in choices(backend.caps().fused) {
        let got = encode(&mut *load_encoder(&mut *backend, encoder, &fused, Numerics::Exact)?, &LENGTHS)?;
        near(&format!("{fused:?}"), &got, &want)?;
    }
    Ok(())
}
