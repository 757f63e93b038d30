//! What an adapter adds to a row of a projection: two thin products in f32.
//!
//! The order of every sum depends on its own length only, so that a row has the same bits whatever else is in
//! the step, and however the columns are shared among threads.

use std::ops::Range;

/// Interleaved partial sums of a product, in vector registers of every tier.
const SUMS: usize = 16;
/// Columns whose sums stay in registers.
const TILE_COLS: usize = 64;

/// The sum of the products of two rows of one length.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; SUMS];
    let (whole_a, whole_b) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let (rest_a, rest_b) = (whole_a.remainder(), whole_b.remainder());
    for (a, b) in whole_a.zip(whole_b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(rest_a.iter().zip(rest_b)) {
        *sum += a * b;
    }
    let mut width = SUMS;
    while width > 1 {
        width /= 2;
        for at in 0..width {
            sums[at] += sums[at + width];
        }
    }
    sums[0]
}

/// A thread's columns of the second product.
pub(crate) struct UpColumns<'a> {
    /// Rank × features out.
    pub(crate) up: &'a [f32],
    /// Features out.
    pub(crate) features: usize,
    /// Features to compute.
    pub(crate) cols: Range<usize>,
    /// The first product; as many as the rank.
    pub(crate) inner: &'a [f32],
    pub(crate) scale: f32,
    /// The first of the features to compute, in the output's row.
    pub(crate) out: *mut f32,
}

/// `out += scale · up · inner` for some columns.
///
/// # Safety
/// `out` has as many values as `cols`, which no other thread accesses.
#[inline(always)]
pub(crate) unsafe fn add_up(job: &UpColumns<'_>) {
    // SAFETY: the caller's pointer has this length.
    let out = unsafe { std::slice::from_raw_parts_mut(job.out, job.cols.len()) };
    for (index, tile) in out.chunks_mut(TILE_COLS).enumerate() {
        let first = job.cols.start + index * TILE_COLS;
        let mut sums = [0.0f32; TILE_COLS];
        for (inner, row) in job.inner.iter().zip(job.up.chunks_exact(job.features)) {
            let values = &row[first..first + tile.len()];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += inner * value;
            }
        }
        for (value, sum) in tile.iter_mut().zip(sums) {
            *value += job.scale * sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_the_sum_of_products() {
        for len in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..len).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| (i % 5) as f32 - 2.0).collect();
            let want: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), want, "{len} values");
        }
    }

    #[test]
    fn columns_have_the_same_bits_however_they_are_shared() {
        let (rank, features) = (5, 150);
        let up: Vec<f32> = (0..rank * features).map(|i| (i as f32 * 0.37).sin()).collect();
        let inner: Vec<f32> = (0..rank).map(|i| (i as f32 * 1.3).cos()).collect();
        let before: Vec<f32> = (0..features).map(|i| i as f32 * 0.01).collect();
        let computed = |cuts: &[usize]| {
            let mut out = before.clone();
            for cols in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
                let pointer = out[cols.start..].as_mut_ptr();
                let job = UpColumns { up: &up, features, cols, inner: &inner, scale: 0.5, out: pointer };
                // SAFETY: the columns lie in `out`.
                unsafe { add_up(&job) };
            }
            out
        };
        let whole = computed(&[0, features]);
        assert_eq!(computed(&[0, 1, 70, 149, features]), whole);
        let product: f32 = (0..rank).map(|k| up[k * features + 9] * inner[k]).sum();
        assert!((whole[9] - (before[9] + 0.5 * product)).abs() < 1e-6);
    }
}
