//! Sums of one metric per bucket of users, and the estimate that they give.
//!
//! Every metric is a ratio of two sums: errors per request, tokens per second, score per score given. A mean
//! is the ratio whose lower sum counts the users.

/// The sums of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BucketSums {
    /// Upper sum, such as errors.
    pub y: f64,
    /// Lower sum, such as requests.
    pub n: f64,
}

/// The estimate of one arm.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmEstimate {
    /// The ratio of the sums.
    pub ratio: f64,
    /// Variance of the ratio, from the differences between buckets.
    pub variance: f64,
    /// Number of buckets that would give this precision if all were equally large.
    pub effective_buckets: f64,
    /// Share of the largest bucket in the lower sum.
    pub largest_share: f64,
    /// Sum of the third powers of the influences, by the 3/2 power of the sum of their squares.
    pub skewness: f64,
    /// Influence of each bucket on the ratio, times the number of buckets.
    pub influences: Vec<f64>,
}

/// The estimate of an arm; `None` with fewer than two buckets, or without any lower sum.
#[must_use]
pub fn estimate(buckets: &[BucketSums]) -> Option<ArmEstimate> {
    let count = buckets.len() as f64;
    let y: f64 = buckets.iter().map(|bucket| bucket.y).sum();
    let n: f64 = buckets.iter().map(|bucket| bucket.n).sum();
    if buckets.len() < 2 || n <= 0.0 {
        return None;
    }
    let ratio = y / n;
    let influences: Vec<f64> =
        buckets.iter().map(|bucket| (bucket.y - ratio * bucket.n) * count / n).collect();
    let squares: f64 = influences.iter().map(|psi| psi * psi).sum();
    let cubes: f64 = influences.iter().map(|psi| psi * psi * psi).sum();
    let n_squares: f64 = buckets.iter().map(|bucket| bucket.n * bucket.n).sum();
    let largest = buckets.iter().map(|bucket| bucket.n).fold(0.0, f64::max);
    Some(ArmEstimate {
        ratio,
        variance: variance(&influences),
        effective_buckets: n * n / n_squares,
        largest_share: largest / n,
        skewness: if squares > 0.0 { cubes / squares.powf(1.5) } else { 0.0 },
        influences,
    })
}

/// Variance of the mean of the influences.
pub(crate) fn variance(influences: &[f64]) -> f64 {
    let count = influences.len() as f64;
    let squares: f64 = influences.iter().map(|psi| psi * psi).sum();
    squares / (count * (count - 1.0))
}

/// The scale on which two arms are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Logarithm of the ratio of the arms: 0.02 is about 2 % more. Needs both ratios above 0.
    LogRatio,
    /// Difference of the arms' ratios.
    Difference,
}

/// The difference between two arms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmDifference {
    /// Treatment minus control, on the scale.
    pub estimate: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// Degrees of freedom of the variance (Welch), from the effective number of buckets of each arm.
    pub degrees_of_freedom: f64,
    /// Signed skewness of the difference: an excess widens one tail.
    pub skewness: f64,
}

/// The difference between two arms; `None` without variance, or where the scale has no value.
#[must_use]
pub fn difference(treatment: &ArmEstimate, control: &ArmEstimate, scale: Scale) -> Option<ArmDifference> {
    let (estimate, of_treatment, of_control) = match scale {
        Scale::LogRatio if treatment.ratio > 0.0 && control.ratio > 0.0 => (
            (treatment.ratio / control.ratio).ln(),
            treatment.variance / treatment.ratio.powi(2),
            control.variance / control.ratio.powi(2),
        ),
        Scale::LogRatio => return None,
        Scale::Difference => (treatment.ratio - control.ratio, treatment.variance, control.variance),
    };
    let variance = of_treatment + of_control;
    if variance <= 0.0 || !variance.is_finite() {
        return None;
    }
    let freedom = |arm: &ArmEstimate| (arm.effective_buckets.min(arm.influences.len() as f64) - 1.0).max(1.0);
    let welch = of_treatment.powi(2) / freedom(treatment) + of_control.powi(2) / freedom(control);
    let third = treatment.skewness * of_treatment.powf(1.5) - control.skewness * of_control.powf(1.5);
    Some(ArmDifference {
        estimate,
        standard_error: variance.sqrt(),
        degrees_of_freedom: variance.powi(2) / welch,
        skewness: third / variance.powf(1.5),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variance_of_a_mean_is_the_usual_one() {
        let values = [1.0, 2.0, 4.0, 9.0];
        let buckets: Vec<_> = values.iter().map(|y| BucketSums { y: *y, n: 1.0 }).collect();
        let arm = estimate(&buckets).unwrap();
        assert!((arm.ratio - 4.0).abs() < 1e-12);
        // Sample variance 38 / 3, of a mean of four.
        assert!((arm.variance - 38.0 / 3.0 / 4.0).abs() < 1e-12);
        assert!((arm.effective_buckets - 4.0).abs() < 1e-12);
    }

    #[test]
    fn what_has_no_value_is_none() {
        let arm = |y: f64| estimate(&[BucketSums { y, n: 1.0 }, BucketSums { y: 0.0, n: 1.0 }]).unwrap();
        assert_eq!(estimate(&[BucketSums { y: 1.0, n: 1.0 }]), None);
        assert_eq!(estimate(&[BucketSums::default(); 3]), None);
        assert_eq!(difference(&arm(0.0), &arm(1.0), Scale::LogRatio), None);
        assert!(difference(&arm(0.0), &arm(1.0), Scale::Difference).is_some());
        assert_eq!(difference(&arm(0.0), &arm(0.0), Scale::Difference), None);
    }
}
