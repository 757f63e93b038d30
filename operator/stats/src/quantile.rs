//! Quantiles of latencies, from histograms, with users as the unit.
//!
//! The share of requests up to some latency is a ratio of two sums, so it has a test like any other metric.
//! Two arms have an equal quantile only if there is one latency that is the quantile of both: the evidence
//! against that is the least product of the evidence against each latency. A failure counts as endless.

/// Requests of one arm, in geometric bins that are the same for all arms.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyArm {
    /// Requests up to the upper bound of each bin, ascending. What is above the last bin or failed is
    /// missing.
    pub cumulative: Vec<u64>,
    /// All requests, also those that failed.
    pub requests: u64,
    /// By how much the variance is larger than that of independent requests: at least 1.
    pub design_effect: f64,
}

/// What is tested about a quantile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantileTest {
    /// The quantile, such as 0.95.
    pub p: f64,
    /// Requests of each arm for which the test is tightest.
    pub planned_requests: f64,
    /// Ratio between the bounds of neighbouring bins, above 1.
    pub bin_ratio: f64,
}

/// The design effect: the variance of a share between buckets over that of independent requests.
#[must_use]
pub fn design_effect(share: f64, bucket_variance: f64, requests: u64) -> f64 {
    let independent = share * (1.0 - share) / requests.max(1) as f64;
    if independent > 0.0 { (bucket_variance / independent).max(1.0) } else { 1.0 }
}

impl QuantileTest {
    /// Logarithm of the evidence that the quantile of `arm` is not in the bin `index`. It is there if the
    /// share up to the bin's lower end is below `p` and the share up to its upper end is not: the share that
    /// is farther off counts, and within the bin nothing does.
    fn ln_evidence_at(&self, arm: &LatencyArm, index: usize) -> f64 {
        let all = arm.requests as f64;
        if all <= 0.0 {
            return 0.0;
        }
        let share = |index: usize| arm.cumulative[index] as f64 / all;
        let lower = index.checked_sub(1).map_or(0.0, share);
        let off = (self.p - share(index)).max(lower - self.p).max(0.0);
        let spread = self.p * (1.0 - self.p) * arm.design_effect;
        let variance = spread / all;
        let z = off / variance.sqrt();
        // tau² over se², with tau² = 7.94 · spread / planned requests.
        let u = 7.94 * all / self.planned_requests;
        -0.5 * u.ln_1p() + z * z * u / (2.0 * (1.0 + u))
    }

    /// Logarithm of the evidence against equal quantiles.
    #[must_use]
    pub fn ln_evidence(&self, treatment: &LatencyArm, control: &LatencyArm) -> f64 {
        self.ln_evidence_of_shift(treatment, control, 0)
    }

    /// Logarithm of the evidence against a quantile of the treatment that is `shift` bins above the
    /// control's.
    fn ln_evidence_of_shift(&self, treatment: &LatencyArm, control: &LatencyArm, shift: i64) -> f64 {
        let bins = i64::try_from(control.cumulative.len()).unwrap_or(i64::MAX);
        (0..bins)
            .filter_map(|at| {
                let other =
                    usize::try_from(at + shift).ok().filter(|one| *one < treatment.cumulative.len())?;
                let at = usize::try_from(at).ok()?;
                Some(self.ln_evidence_at(control, at) + self.ln_evidence_at(treatment, other))
            })
            .fold(f64::INFINITY, f64::min)
    }

    /// The ratios of the treatment's quantile to the control's that the evidence does not exclude, as a
    /// closed interval with whole bins, outward. `None` if every ratio is excluded, or none can be.
    #[must_use]
    pub fn ratio_interval(
        &self,
        treatment: &LatencyArm,
        control: &LatencyArm,
        alpha: f64,
    ) -> Option<RatioInterval> {
        let bins = i64::try_from(control.cumulative.len()).ok()?;
        let limit = -alpha.ln();
        let kept = |shift: &i64| self.ln_evidence_of_shift(treatment, control, *shift) < limit;
        let first = (1 - bins..bins).find(kept)?;
        let last = (1 - bins..bins).rev().find(kept)?;
        if first == 1 - bins && last == bins - 1 {
            return None;
        }
        let at = |shift: i64| self.bin_ratio.powf(shift as f64);
        Some(RatioInterval { low: at(first - 1), high: at(last + 1) })
    }
}

/// An interval of ratios.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatioInterval {
    /// The smallest.
    pub low: f64,
    /// The largest.
    pub high: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: QuantileTest = QuantileTest { p: 0.95, planned_requests: 10_000.0, bin_ratio: 1.02 };

    /// Requests whose latency is evenly spread over the bins `from..from + 100`.
    fn arm(requests: u64, from: u64) -> LatencyArm {
        let below = |bin: u64| (bin + 1).saturating_sub(from).min(100);
        LatencyArm {
            cumulative: (0..300).map(|bin| requests * below(bin) / 100).collect(),
            requests,
            design_effect: 1.0,
        }
    }

    #[test]
    fn equal_arms_are_not_told_apart_and_slower_ones_are() {
        assert!(TEST.ln_evidence(&arm(10_000, 50), &arm(10_000, 50)) < 0.0);
        assert!(TEST.ln_evidence(&arm(10_000, 70), &arm(10_000, 50)) > 20_f64.ln());
        let few = TEST.ln_evidence(&arm(50, 70), &arm(50, 50));
        assert!(few < 20_f64.ln(), "{few}");
    }

    #[test]
    fn wide_bins_tell_no_difference_that_is_not_there() {
        // Nine tenths in one bin and one in the next: no share is near 0.95, however many requests there are.
        let wide = |requests: u64| LatencyArm {
            cumulative: vec![0, requests * 9 / 10, requests],
            requests,
            design_effect: 1.0,
        };
        assert!(TEST.ln_evidence(&wide(10_000_000), &wide(10_000_000)) < 0.0);
    }

    #[test]
    fn the_interval_covers_the_true_ratio() {
        let interval = TEST.ratio_interval(&arm(10_000, 70), &arm(10_000, 50), 0.05).unwrap();
        let truth = 1.02_f64.powi(20);
        assert!(interval.low < truth && truth < interval.high && interval.low > 1.0, "{interval:?}");
        assert_eq!(TEST.ratio_interval(&arm(2, 70), &arm(2, 50), 0.05), None);
    }

    #[test]
    fn clustered_requests_count_less() {
        let clustered = LatencyArm { design_effect: 20.0, ..arm(10_000, 56) };
        let control = LatencyArm { design_effect: 20.0, ..arm(10_000, 50) };
        assert!(
            TEST.ln_evidence(&clustered, &control) < TEST.ln_evidence(&arm(10_000, 56), &arm(10_000, 50))
        );
        assert!((design_effect(0.5, 0.25 / 100.0 * 3.0, 100) - 3.0).abs() < 1e-12);
        assert!((design_effect(0.5, 0.0, 100) - 1.0).abs() < 1e-12);
    }
}
