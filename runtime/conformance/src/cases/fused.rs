//! Each fused form by itself, and all claimed forms together, compared with the oracle's unfused ops.

use std::iter;

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{Backend, DType, FusedOps, Numerics, Pooling, RopeLayout};

use super::numerics::LENGTHS;
use crate::compare::near;
use crate::harness::{decode, encode, load_decoder, load_encoder, load_plan};
use crate::models::{Decoder, Encoder};
use crate::normed::NormedEncoder;
use crate::{CaseError, Open};

/// No form, each claimed form by itself, and all claimed forms together; each once.
fn choices(claimed: FusedOps) -> Vec<FusedOps> {
    // No `..`, so that a new form does not compile until it is tried here.
    let FusedOps {
        concat_matmul,
        concat_mixed_types,
        bias_epilogue,
        gelu_epilogue,
        silu_mul_epilogue,
        add_epilogue,
        norm_matmul,
        layer_norm_matmul,
        norm_output,
        rope_kv_write,
    } = claimed;
    let none = FusedOps::NONE;
    let alone = [
        FusedOps { concat_matmul, ..none },
        FusedOps { concat_matmul, concat_mixed_types, ..none },
        FusedOps { bias_epilogue, ..none },
        // The ops after a bias are fused only together with it.
        FusedOps { bias_epilogue, gelu_epilogue, ..none },
        FusedOps { silu_mul_epilogue, ..none },
        FusedOps { bias_epilogue, add_epilogue, ..none },
        FusedOps { norm_matmul, ..none },
        FusedOps { concat_matmul, norm_matmul, ..none },
        // Several projections, and residuals, read one norm.
        FusedOps { norm_matmul, norm_output, ..none },
        FusedOps { layer_norm_matmul, ..none },
        FusedOps { layer_norm_matmul, norm_output, ..none },
        FusedOps { rope_kv_write, ..none },
    ];
    let mut choices = vec![none];
    for choice in iter::once(claimed).chain(alone) {
        if !choices.contains(&choice) {
            choices.push(choice);
        }
    }
    choices
}

/// A float type and a quantised type, where the backend claims them.
fn dtypes(open: Open<'_>) -> Result<Vec<DType>, CaseError> {
    let claimed = open()?.caps().dtypes.clone();
    Ok([DType::F32, DType::Q8_0].into_iter().filter(|dtype| claimed.contains(dtype)).collect())
}

pub(super) fn decoder(open: Open<'_>) -> Result<(), CaseError> {
    for dtype in dtypes(open)? {
        for biased in [false, true] {
            let decoder = Decoder { dtype, mixed_with: None, layout: RopeLayout::Neox, biased };
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

/// Norms with one reader and with several, for few rows and for many.
pub(super) fn norms(open: Open<'_>) -> Result<(), CaseError> {
    for dtype in dtypes(open)? {
        let encoder = NormedEncoder { dtype };
        let run = |backend: &mut dyn Backend, fused: &FusedOps| -> Result<Vec<Vec<f32>>, CaseError> {
            let mut executable = load_plan(backend, &encoder.case(fused, Numerics::Exact)?)?;
            let mut rows = encode(&mut *executable, &LENGTHS)?;
            rows.extend(encode(&mut *executable, &[3])?);
            Ok(rows)
        };
        let want = run(&mut Oracle::new(), &FusedOps::NONE)?;
        let mut backend = open()?;
        for fused in choices(backend.caps().fused) {
            let got = run(&mut *backend, &fused)?;
            near(&format!("{encoder:?} {fused:?}"), &got, &want)?;
        }
    }
    Ok(())
}
