//! Loops over a whole row of logits. They are written so that the compiler emits vector instructions: fixed
//! blocks, no branch inside a block, and an own exponential function.
//!
//! All of them are inlined into their callers, so that a backend compiles them for the instructions of its
//! processor ([`super::choose`]). Their results do not depend on these: no sum changes its order.
//!
//! The exponential has a second reason: that of the C library differs between versions, and with it the token
//! that a seed draws.

use std::ops::Range;

/// Values that are compared together.
const BLOCK: usize = 64;

/// Weights that are summed in f32 before they are added to an f64. Also the step of [`draw`].
const SUM_BLOCK: usize = 512;

const LANES: usize = 16;

/// How many sums [`draw`] keeps for a row.
pub(super) const fn sums_of(vocabulary: usize) -> usize {
    vocabulary.div_ceil(SUM_BLOCK)
}

/// The largest value; `None` where there are no values or one is not finite.
#[inline(always)]
pub(super) fn finite_max(row: &[f32]) -> Option<f32> {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    // Becomes and stays NaN where a value is infinite or NaN.
    let mut zero = [0.0_f32; LANES];
    for block in blocks {
        for ((value, best), zero) in block.iter().zip(&mut best).zip(&mut zero) {
            *best = if *value > *best { *value } else { *best };
            *zero += *value * 0.0;
        }
    }
    let finite = zero.iter().all(|zero| *zero == 0.0) && rest.iter().all(|value| value.is_finite());
    let max = best.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    (finite && !row.is_empty()).then_some(max)
}

/// The largest value of a row that may contain minus infinity.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for (value, best) in block.iter().zip(&mut best) {
            *best = if *value > *best { *value } else { *best };
        }
    }
    best.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Calls `each` with the index and value of every value that is at least `floor`, in order. A block without
/// one costs a few instructions.
#[inline(always)]
pub(super) fn at_least(row: &[f32], floor: f32, mut each: impl FnMut(usize, f32)) {
    for (block, start) in row.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
        // Without a short circuit this is a loop of vector comparisons.
        let any = block.iter().fold(false, |any, value| any | (*value >= floor));
        if any {
            for (value, index) in block.iter().zip(start..) {
                if *value >= floor {
                    each(index, *value);
                }
            }
        }
    }
}

/// The first index of a value; 0 where it is missing.
#[inline(always)]
pub(super) fn index_of(row: &[f32], wanted: f32) -> usize {
    for (block, start) in row.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
        let any = block.iter().fold(false, |any, value| any | (*value == wanted));
        if let (true, Some(inside)) = (any, block.iter().position(|value| *value == wanted)) {
            return start + inside;
        }
    }
    0
}

/// The second best value; it equals the best one where two tokens have it.
#[inline(always)]
pub(super) fn second_max(row: &[f32], best: usize) -> f32 {
    max(&row[..best]).max(max(&row[best + 1..]))
}

/// e to the power of `x`, which is at most 0, with an error below one part in four million. Values below -87
/// give about 1e-38.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 as a sum, the first term exact in few bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = x - power * LN2_HIGH - power * LN2_LOW;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // `power` is between -126 and 0, so its exponent bits are between 1 and 127.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

/// Weight of a logit: 1 for the best. `scale` is the inverse temperature.
#[inline(always)]
pub(super) fn weight(logit: f32, max: f32, scale: f32) -> f32 {
    exp((logit - max) * scale)
}

/// The sum of a block's weights.
#[inline(always)]
fn block_mass(block: &[f32], max: f32, scale: f32) -> f64 {
    let (chunks, rest) = block.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for chunk in chunks {
        for (logit, sum) in chunk.iter().zip(&mut sums) {
            *sum += weight(*logit, max, scale);
        }
    }
    let rest: f32 = rest.iter().map(|logit| weight(*logit, max, scale)).sum();
    f64::from(sums.iter().sum::<f32>()) + f64::from(rest)
}

/// The sum of all weights.
#[inline(always)]
pub(super) fn mass(row: &[f32], max: f32, scale: f32) -> f64 {
    row.chunks(SUM_BLOCK).map(|block| block_mass(block, max, scale)).sum()
}

/// Draws from all values by weight; `uniform` is in [0, 1). `sums` is scratch space.
#[inline(always)]
pub(super) fn draw(row: &[f32], max: f32, scale: f32, uniform: f64, sums: &mut Vec<f64>) -> usize {
    sums.clear();
    sums.extend(row.chunks(SUM_BLOCK).map(|block| block_mass(block, max, scale)));
    let mut left = uniform * sums.iter().sum::<f64>();
    let mut chosen = index_of(row, max);
    for (sum, start) in sums.iter().zip((0..).step_by(SUM_BLOCK)) {
        if left < *sum {
            let range: Range<usize> = start..row.len().min(start + SUM_BLOCK);
            for (logit, index) in row[range.clone()].iter().zip(range) {
                if logit.is_finite() {
                    chosen = index;
                    left -= f64::from(weight(*logit, max, scale));
                    if left < 0.0 {
                        break;
                    }
                }
            }
            return chosen;
        }
        left -= sum;
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values without a pattern, between -20 and 20.
    fn row(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + 13) % 4001) as f32 / 100.0 - 20.0).collect()
    }

    #[test]
    fn maxima_equal_those_of_plain_loops_for_any_length() {
        for len in [1, 2, 15, 16, 17, 63, 64, 65, 1000] {
            let row = row(len);
            let plain = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!((finite_max(&row), max(&row)), (Some(plain), plain));
            let at = index_of(&row, plain);
            assert_eq!(Some(at), row.iter().position(|value| *value == plain));
            let others = row.iter().enumerate().filter(|(index, _)| *index != at);
            assert_eq!(second_max(&row, at), others.map(|(_, v)| *v).fold(f32::NEG_INFINITY, f32::max));
            let mut found = Vec::new();
            at_least(&row, 3.0, |index, value| found.push((index, value)));
            let plain = row.iter().copied().enumerate().filter(|(_, value)| *value >= 3.0);
            assert_eq!(found, plain.collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_found_at_any_index() {
        for len in [1, 16, 40] {
            for at in 0..len {
                for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = row(len);
                    row[at] = broken;
                    assert_eq!(finite_max(&row), None, "{broken} at {at} of {len}");
                }
            }
        }
        assert_eq!(finite_max(&[]), None);
    }

    #[test]
    fn the_exponential_is_accurate_to_single_precision() {
        assert_eq!(exp(0.0), 1.0);
        let mut worst = 0.0_f64;
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let wanted = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - wanted).abs() / wanted);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1e30) > 0.0);
    }

    #[test]
    fn masses_equal_plain_sums() {
        let row = row(1300);
        let top = max(&row);
        for scale in [0.1, 1.0, 3.0] {
            let plain: f64 = row.iter().map(|l| f64::from((l - top) * scale).exp()).sum();
            assert!((mass(&row, top, scale) / plain - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn a_draw_reaches_both_ends_and_never_a_masked_token() {
        let mut flat = vec![f32::NEG_INFINITY; 1300];
        for index in [0, 700, 1299] {
            flat[index] = 2.0;
        }
        let mut sums = Vec::new();
        let mut at = |uniform| draw(&flat, 2.0, 1.0, uniform, &mut sums);
        assert_eq!([at(0.0), at(0.34), at(0.99), at(1.0 - f64::EPSILON)], [0, 700, 1299, 1299]);
    }
}
