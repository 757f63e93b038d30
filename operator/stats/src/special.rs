//! Special functions: logarithms of gamma and beta, and the normal distribution.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Logarithm of the gamma function for positive `x`. The relative error is below 1e-13.
#[must_use]
pub fn ln_gamma(x: f64) -> f64 {
    // Lanczos' approximation with g = 7 and 9 terms.
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        // Reflection.
        return (PI / (PI * x).sin()).ln() - ln_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let terms = TERMS.iter().zip(1_u8..);
    let series = terms.fold(0.999_999_999_999_809_9, |sum, (term, at)| sum + term / (x + f64::from(at)));
    let t = x + 7.5;
    0.5 * (2.0 * PI).ln() + (x + 0.5) * t.ln() - t + series.ln()
}

/// Logarithm of the multivariate beta function of positive `a`.
#[must_use]
pub fn ln_beta(a: &[f64]) -> f64 {
    a.iter().copied().map(ln_gamma).sum::<f64>() - ln_gamma(a.iter().sum())
}

/// Probability that a standard normal variable is at most `z`. The absolute error is below 1e-14; far in the
/// lower tail the relative error is below 1e-10.
#[must_use]
pub fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z * FRAC_1_SQRT_2)
}

/// The value that a standard normal variable exceeds with probability `1 - p`, for `p` between 0 and 1.
#[must_use]
pub fn normal_quantile(p: f64) -> f64 {
    // Between ±40 the distribution function covers every double above 1e-300.
    let (mut low, mut high) = (-40.0, 40.0);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if normal_cdf(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        return 1.0 - erf_series(x);
    }
    // Continued fraction (Lentz' method would do; at this distance 60 terms from behind are exact).
    let mut fraction = 0.0;
    for k in (1..=60_u8).rev() {
        fraction = f64::from(k) / 2.0 / (x + fraction);
    }
    (-x * x).exp() / PI.sqrt() / (x + fraction)
}

/// Series of the error function for 0 ≤ x < 2.5: terms fall below 1e-17 after at most 60.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for k in 1..=80_u8 {
        let k = f64::from(k);
        term *= 2.0 * x * x / (2.0 * k + 1.0);
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_inverts_the_distribution() {
        for p in [1e-9, 0.025, 0.5, 0.9, 0.999_999] {
            assert!((normal_cdf(normal_quantile(p)) / p - 1.0).abs() < 1e-9, "{p}");
        }
        assert!((normal_quantile(0.975) - 1.959_963_984_540_054).abs() < 1e-12);
    }

    #[test]
    fn gamma_and_beta_have_their_values() {
        assert!((ln_gamma(0.5) - PI.sqrt().ln()).abs() < 1e-13);
        assert!((ln_gamma(171.0) - 706.573_062_245_787_4).abs() < 1e-9);
        assert!((ln_beta(&[2.0, 3.0]) - (1.0_f64 / 12.0).ln()).abs() < 1e-13);
    }
}
