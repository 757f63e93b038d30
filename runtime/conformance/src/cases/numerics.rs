//! Whole models in both numerics beside the oracle.

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{DType, FusedOps, Numerics, Pooling, RopeLayout};

use crate::compare::{FAST_COSINE, FAST_FLOAT_COSINE, alike, near, wrong};
use crate::models::{Decoder, Encoder};
use crate::story::{decode, encode, load_decoder, load_encoder};
use crate::{CaseError, Open};

/// Lengths of texts: one token, the whole context, and some that fill no tile.
pub(super) const LENGTHS: [usize; 5] = [1, 90, 33, 7, 16];

/// A decoder for each type that the backend has kernels for; layouts and biases take turns.
pub(super) fn decoders(dtypes: &[DType]) -> Vec<Decoder> {
    let variants = [
        (RopeLayout::Neox, false),
        (RopeLayout::Interleaved, false),
        (RopeLayout::Neox, true),
        (RopeLayout::Interleaved, true),
    ];
    let turns = variants.into_iter().cycle();
    dtypes.iter().zip(turns).map(|(&dtype, (layout, biased))| Decoder { dtype, layout, biased }).collect()
}

/// Every backend runs F32, which the other cases rely on: without a type they would compare nothing.
pub(super) fn types(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    if !caps.dtypes.contains(&DType::F32) {
        return wrong(format!("it has kernels for {:?}, and F32 is not among them", caps.dtypes));
    }
    Ok(())
}

/// The rows of one model's answers.
type Rows = Vec<Vec<f32>>;

/// Every decoder's answers in these numerics, judged with the oracle's beside them: the model, what was got, what is
/// wanted.
fn each_decoder(
    open: Open<'_>,
    numerics: Numerics,
    judge: impl Fn(Decoder, &Rows, &Rows) -> Result<(), CaseError>,
) -> Result<(), CaseError> {
    for decoder in decoders(&open()?.caps().dtypes.clone()) {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let want =
            decode(&mut *load_decoder(&mut Oracle::new(), decoder, &FusedOps::NONE, Numerics::Exact)?)?;
        let got = decode(&mut *load_decoder(&mut *backend, decoder, &fused, numerics)?)?;
        judge(decoder, &got, &want)?;
    }
    Ok(())
}

pub(super) fn decoder_exact(open: Open<'_>) -> Result<(), CaseError> {
    each_decoder(open, Numerics::Exact, |decoder, got, want| near(&format!("{decoder:?}"), got, want))
}

pub(super) fn decoder_fast(open: Open<'_>) -> Result<(), CaseError> {
    each_decoder(open, Numerics::Fast, |decoder, got, want| {
        let least = if decoder.dtype.is_quantised() { FAST_COSINE } else { FAST_FLOAT_COSINE };
        alike(&format!("{decoder:?}"), got, want, least)
    })
}

fn encoders(dtypes: &[DType]) -> impl Iterator<Item = Encoder> {
    let kinds =
        [(Pooling::Mean, true), (Pooling::First, false), (Pooling::Max, true), (Pooling::Mean, false)];
    let floats: Vec<DType> = dtypes.iter().copied().filter(|dtype| !dtype.is_quantised()).collect();
    floats.into_iter().flat_map(move |dtype| {
        kinds.into_iter().map(move |(pooling, normalise)| Encoder { dtype, pooling, normalise })
    })
}

/// As [`each_decoder`], for the encoders.
fn each_encoder(
    open: Open<'_>,
    numerics: Numerics,
    judge: impl Fn(Encoder, &Rows, &Rows) -> Result<(), CaseError>,
) -> Result<(), CaseError> {
    for encoder in encoders(&open()?.caps().dtypes.clone()) {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let oracle = &mut Oracle::new();
        let want = encode(&mut *load_encoder(oracle, encoder, &FusedOps::NONE, Numerics::Exact)?, &LENGTHS)?;
        let got = encode(&mut *load_encoder(&mut *backend, encoder, &fused, numerics)?, &LENGTHS)?;
        judge(encoder, &got, &want)?;
    }
    Ok(())
}

pub(super) fn encoder_exact(open: Open<'_>) -> Result<(), CaseError> {
    each_encoder(open, Numerics::Exact, |encoder, got, want| {
        near(&format!("{encoder:?}"), got, want)?;
        let length = got[0].iter().map(|value| value * value).sum::<f32>().sqrt();
        // Of 96 squares, each rounded once: far within 1e-5.
        if encoder.normalise && (length - 1.0).abs() > 1e-5 {
            return wrong(format!("{encoder:?}: an answer of length {length}, not 1"));
        }
        Ok(())
    })
}

pub(super) fn encoder_fast(open: Open<'_>) -> Result<(), CaseError> {
    each_encoder(open, Numerics::Fast, |encoder, got, want| {
        alike(&format!("{encoder:?}"), got, want, FAST_FLOAT_COSINE)
    })
}
