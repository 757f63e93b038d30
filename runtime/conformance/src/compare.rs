//! How close an answer must be to the oracle's.

use crate::CaseError;

/// The largest difference allowed in `exact`, as a share of the largest element of the row.
///
/// A sum of `n` products in f32 errs by √n · 2⁻²⁴ of its size when the signs of the errors are random and n ·
/// 2⁻²⁴ at worst. The longest sum here has 290 terms (attention over 290 tokens): 1e-6, and 1.7e-5 at worst.
/// A row passes through some twenty sums, whose errors add up: √20 · 1e-6 is 5e-6, and a sharp softmax
/// multiplies that by up to four.
pub const EXACT_SHARE: f32 = 2e-5;

/// Least cosine between `fast` and the oracle where weights are quantised: the design's objective.
pub const FAST_COSINE: f64 = 0.997;

/// Least cosine between `fast` and the oracle where weights are floats: activations may be rounded to 16 or 8
/// bits.
pub const FAST_FLOAT_COSINE: f64 = 0.999;

/// Least cosine in `exact` where both caches round keys and values alike. They round the same numbers, but a
/// number that f32 sums place on the other side of the middle between two neighbours is off by the distance
/// of these, 2⁻⁸ of its size in bf16: one in some hundreds of them.
pub const ROUNDED_KV_COSINE: f64 = 0.999_99;

/// The cosine of two vectors.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Checks that each row is within [`EXACT_SHARE`] of the oracle's and has its largest element in the same
/// place.
///
/// # Errors
/// The first row that is not, with its figures.
pub fn near(what: &str, got: &[Vec<f32>], want: &[Vec<f32>]) -> Result<(), CaseError> {
    same_count(what, got, want)?;
    for (row, (got, want)) in got.iter().zip(want).enumerate() {
        let size = want.iter().fold(0f32, |most, value| most.max(value.abs()));
        let error = got.iter().zip(want).fold(0f32, |most, (g, w)| most.max(nan_to_infinity((g - w).abs())));
        if error >= EXACT_SHARE * size {
            return wrong(format!("{what}, row {row}: off by {error} where the largest is {size}"));
        }
        let (found, expected) = (largest(got), largest(want));
        if found != expected {
            return wrong(format!("{what}, row {row}: the largest is at {found:?}, not at {expected:?}"));
        }
    }
    Ok(())
}

/// Checks that each row has nearly the oracle's direction.
///
/// # Errors
/// The first row that does not, with its cosine.
pub fn alike(what: &str, got: &[Vec<f32>], want: &[Vec<f32>], least: f64) -> Result<(), CaseError> {
    same_count(what, got, want)?;
    for (row, (got, want)) in got.iter().zip(want).enumerate() {
        let cosine = cosine(got, want);
        if cosine.is_nan() || cosine < least {
            return wrong(format!("{what}, row {row}: the cosine is {cosine}, at least {least} is needed"));
        }
    }
    Ok(())
}

/// Checks that two answers have the same bits.
///
/// # Errors
/// The first row that differs.
pub fn same_bits(what: &str, got: &[Vec<f32>], want: &[Vec<f32>]) -> Result<(), CaseError> {
    same_count(what, got, want)?;
    let bits = |row: &[f32]| row.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    match got.iter().zip(want).position(|(got, want)| bits(got) != bits(want)) {
        Some(row) => wrong(format!("{what}, row {row}: the bits differ")),
        None => Ok(()),
    }
}

/// A failed case.
///
/// # Errors
/// Always.
pub fn wrong<T>(why: impl Into<String>) -> Result<T, CaseError> {
    Err(CaseError::Wrong(why.into()))
}

fn same_count(what: &str, got: &[Vec<f32>], want: &[Vec<f32>]) -> Result<(), CaseError> {
    let widths = |rows: &[Vec<f32>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
    if widths(got) != widths(want) || want.is_empty() {
        return wrong(format!("{what}: {} rows where {} were expected", got.len(), want.len()));
    }
    Ok(())
}

fn nan_to_infinity(error: f32) -> f32 {
    if error.is_nan() { f32::INFINITY } else { error }
}

fn largest(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]))
}
