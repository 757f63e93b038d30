//! CUPED: less variance, where users were seen before the test.
//!
//! The same ratio of the time before the test is the covariate. Its effect is estimated over all arms, from
//! the previous look, so that the adjustment does not depend on the data that it adjusts.

use crate::buckets::{ArmEstimate, BucketSums, estimate, variance};

/// One arm with its sums before the test, bucket by bucket.
#[derive(Debug, Clone, Copy)]
pub struct ArmWithHistory<'a> {
    /// Sums of the test.
    pub during: &'a [BucketSums],
    /// Sums of the time before, of the same users.
    pub before: &'a [BucketSums],
}

/// The estimate of an arm, and that of the same users before the test.
#[derive(Debug, Clone, PartialEq)]
pub struct EstimateWithHistory {
    /// Of the test.
    pub during: ArmEstimate,
    /// Of the time before.
    pub before: ArmEstimate,
}

impl EstimateWithHistory {
    /// The estimate less `theta` times what the time before explains. `all_before` is the ratio of that time
    /// over all arms.
    #[must_use]
    pub fn adjusted(&self, all_before: f64, theta: f64) -> ArmEstimate {
        let influences = self.during.influences.iter().zip(&self.before.influences);
        let influences: Vec<f64> = influences.map(|(psi, covariate)| psi - theta * covariate).collect();
        ArmEstimate {
            ratio: self.during.ratio - theta * (self.before.ratio - all_before),
            variance: variance(&influences),
            influences,
            ..self.during.clone()
        }
    }
}

/// The coefficient of the covariate over all arms; 0 if it has no variance.
#[must_use]
pub fn coefficient_of(arms: &[EstimateWithHistory]) -> f64 {
    let (mut product, mut square) = (0.0, 0.0);
    for arm in arms {
        for (psi, covariate) in arm.during.influences.iter().zip(&arm.before.influences) {
            product += psi * covariate;
            square += covariate * covariate;
        }
    }
    if square > 0.0 { product / square } else { 0.0 }
}

/// The coefficient of the covariate over all arms; 0 if it has no variance.
#[must_use]
pub fn coefficient(arms: &[ArmWithHistory<'_>]) -> f64 {
    let estimates: Vec<EstimateWithHistory> = arms.iter().filter_map(ArmWithHistory::estimates).collect();
    coefficient_of(&estimates)
}

impl ArmWithHistory<'_> {
    fn estimates(&self) -> Option<EstimateWithHistory> {
        Some(EstimateWithHistory { during: estimate(self.during)?, before: estimate(self.before)? })
    }
}

/// The estimate of `arms[index]`, adjusted with `theta`; `None` where an arm has no estimate.
#[must_use]
pub fn adjusted(arms: &[ArmWithHistory<'_>], index: usize, theta: f64) -> Option<ArmEstimate> {
    let arm = arms.get(index)?.estimates()?;
    let all = arms.iter().flat_map(|arm| arm.before);
    let (y, n) = all.fold((0.0, 0.0), |(y, n), bucket| (y + bucket.y, n + bucket.n));
    Some(arm.adjusted(y / n, theta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_covariate_that_explains_all_removes_all_variance() {
        let sums = |offset: f64| -> Vec<BucketSums> {
            (0..16_u8).map(|at| BucketSums { y: f64::from(at) + offset, n: 1.0 }).collect()
        };
        let (before, control, treatment) = (sums(0.0), sums(1.0), sums(3.0));
        let arms = [
            ArmWithHistory { during: &control, before: &before },
            ArmWithHistory { during: &treatment, before: &before },
        ];
        let theta = coefficient(&arms);
        assert!((theta - 1.0).abs() < 1e-12);
        let arm = adjusted(&arms, 1, theta).unwrap();
        assert!(arm.variance < 1e-20 && (arm.ratio - 10.5).abs() < 1e-12);
    }
}
