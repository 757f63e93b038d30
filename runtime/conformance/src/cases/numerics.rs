//! Whole models in both numerics, compared with the oracle.

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{DType, FusedOps, Numerics, Pooling, RopeLayout};

use crate::compare::{FAST_COSINE, FAST_FLOAT_COSINE, alike, near, wrong};
use crate::harness::{decode, encode, load_decoder, load_encoder};
use crate::models::{Decoder, Encoder};
use crate::{CaseError, Open};

/// Lengths of texts in tokens: one, the whole context, and some that fill no tile.
pub(super) const LENGTHS: [usize; 5] = [1, 90, 33, 7, 16];

/// A decoder for each type that the backend has kernels for, with layouts and biases in rotation.
pub(super) fn decoders(dtypes: &[DType]) -> Vec<Decoder> {
    let variants = [
        (RopeLayout::Neox, false),
        (RopeLayout::Interleaved, false),
        (RopeLayout::Neox, true),
        (RopeLayout::Interleaved, true),
    ];
    let variants = variants.into_iter().cycle();
    let decoder = |(&dtype, (layout, biased))| Decoder { dtype, mixed_with: None, layout, biased };
    dtypes.iter().zip(variants).map(decoder).collect()
}

/// Every backend has kernels for F32. The other cases rely on it: without any type they would compare
/// nothing.
pub(super) fn types(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    if !caps.dtypes.contains(&DType::F32) {
        return wrong(format!("it has kernels for {:?}, and F32 is not among them", caps.dtypes));
    }
    Ok(())
}

/// The rows of one model's answers.
type Rows = Vec<Vec<f32>>;

/// Runs every decoder in these numerics and passes it, its answers and the oracle's answers to `compare`.
fn each_decoder(
    open: Open<'_>,
    numerics: Numerics,
    decoders: &[Decoder],
    compare: impl Fn(Decoder, &Rows, &Rows) -> Result<(), CaseError>,
) -> Result<(), CaseError> {
    for &decoder in decoders {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let want =
            decode(&mut *load_decoder(&mut Oracle::new(), decoder, &FusedOps::NONE, Numerics::Exact)?)?;
        let got = decode(&mut *load_decoder(&mut *backend, decoder, &fused, numerics)?)?;
        compare(decoder, &got, &want)?;
    }
    Ok(())
}

pub(super) fn decoder_exact(open: Open<'_>) -> Result<(), CaseError> {
    let decoders = decoders(&open()?.caps().dtypes);
    each_decoder(open, Numerics::Exact, &decoders, |decoder, got, want| {
        near(&format!("{decoder:?}"), got, want)
    })
}

pub(super) fn decoder_fast(open: Open<'_>) -> Result<(), CaseError> {
    let decoders = decoders(&open()?.caps().dtypes);
    each_decoder(open, Numerics::Fast, &decoders, |decoder, got, want| {
        let least = if decoder.dtype.is_quantised() { FAST_COSINE } else { FAST_FLOAT_COSINE };
        alike(&format!("{decoder:?}"), got, want, least)
    })
}

/// Projections that a plan may join have weights of two types, as in files whose quantisation differs by
/// tensor.
pub(super) fn decoder_mixed_types(open: Open<'_>) -> Result<(), CaseError> {
    let dtypes = open()?.caps().dtypes.clone();
    let pairs = [
        (DType::Q4_K, DType::Q6_K),
        (DType::Q8_0, DType::F16),
        (DType::F32, DType::BF16),
        (DType::BF16, DType::Q4_0),
    ];
    let decoders: Vec<Decoder> = pairs
        .into_iter()
        .filter(|(dtype, other)| dtypes.contains(dtype) && dtypes.contains(other))
        .map(|(dtype, other)| Decoder {
            dtype,
            mixed_with: Some(other),
            layout: RopeLayout::Neox,
            biased: true,
        })
        .collect();
    each_decoder(open, Numerics::Exact, &decoders, |decoder, got, want| {
        near(&format!("{decoder:?}"), got, want)
    })?;
    each_decoder(open, Numerics::Fast, &decoders, |decoder, got, want| {
        alike(&format!("{decoder:?}"), got, want, FAST_COSINE)
    })
}

fn encoders(dtypes: &[DType]) -> impl Iterator<Item = Encoder> {
    let kinds = [
        (Pooling::Mean, true),
        (Pooling::Cls, false),
        (Pooling::Max, true),
        (Pooling::Mean, false),
        (Pooling::Last, true),
    ];
    let floats: Vec<DType> = dtypes.iter().copied().filter(|dtype| !dtype.is_quantised()).collect();
    floats.into_iter().flat_map(move |dtype| {
        kinds.into_iter().map(move |(pooling, normalise)| Encoder { dtype, pooling, normalise })
    })
}

/// As [`each_decoder`], for encoders.
fn each_encoder(
    open: Open<'_>,
    numerics: Numerics,
    compare: impl Fn(Encoder, &Rows, &Rows) -> Result<(), CaseError>,
) -> Result<(), CaseError> {
    for encoder in encoders(&open()?.caps().dtypes.clone()) {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let oracle = &mut Oracle::new();
        let want = encode(&mut *load_encoder(oracle, encoder, &FusedOps::NONE, Numerics::Exact)?, &LENGTHS)?;
        let got = encode(&mut *load_encoder(&mut *backend, encoder, &fused, numerics)?, &LENGTHS)?;
        compare(encoder, &got, &want)?;
    }
    Ok(())
}

pub(super) fn encoder_exact(open: Open<'_>) -> Result<(), CaseError> {
    each_encoder(open, Numerics::Exact, |encoder, got, want| {
        near(&format!("{encoder:?}"), got, want)?;
        let length = got[0].iter().map(|value| value * value).sum::<f32>().sqrt();
        // The sum of 96 squares, each rounded by 2^-24 of its size at most, is off by less than 6e-6.
        if encoder.normalise && (length - 1.0).abs() > 1e-5 {
            return wrong(format!("{encoder:?}: an answer of length {length}, not 1"));
        }
        Ok(())
    })
}

pub(super) fn encoder_fast(open: Open<'_>) -> Result<(), CaseError> {
    each_encoder(open, Numerics::Fast, |encoder, got, want| {
        // Weights of encoders are rounded to 8 bits, too, whatever the file has.
        alike(&format!("{encoder:?}"), got, want, FAST_COSINE)
    })
}
