//! The sums of one metric, its value, and how two variants differ in it.
//!
//! Sums of several epochs, which are times of constant weights, are never simply added: a variant whose share
//! grew has more of its requests in later hours. The difference is that within epochs, weighted by what each
//! epoch can tell. A quantile is that of the last epoch alone.

use trustformers_crds::Metric;
use trustformers_proto::ab_test::{THRESHOLDS_US, latency_cell};
use trustformers_proto::latency::lower_end_us;
use trustformers_stats::buckets::{ArmEstimate, BucketSums, Scale, difference, estimate};
use trustformers_stats::cuped::{EstimateWithHistory, coefficient_of};
use trustformers_stats::quantile::{LatencyArm, QuantileTest, design_effect};
use trustformers_stats::sequential::{student_look, tau_for};

use super::sample::{UserBucket, VariantSums};
use crate::counts::Histogram;

/// Ratio between the ends of neighbouring bins of a quantile's test: 2^(1/16), about the width of the buckets
/// that gateways count in.
const BIN_RATIO: f64 = 1.044_273_782_427_413_8;
/// The end of the first bin.
const FIRST_BIN_US: f64 = 250.0;
/// Twenty doublings: up to 262 s.
const BINS: i32 = 320;

/// A quantile of a latency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyQuantile {
    /// The quantile, 0 to 1.
    pub p: f64,
    /// Of first tokens instead of whole answers.
    pub first_token: bool,
}

/// The quantile that a metric is; none of a ratio of sums.
#[must_use]
pub fn quantile_of(metric: Metric) -> Option<LatencyQuantile> {
    let quantile = |p, first_token| Some(LatencyQuantile { p, first_token });
    match metric {
        Metric::LatencyP50Ms => quantile(0.5, false),
        Metric::LatencyP95Ms => quantile(0.95, false),
        Metric::LatencyP99Ms => quantile(0.99, false),
        Metric::FirstTokenP95Ms => quantile(0.95, true),
        Metric::FeedbackScore | Metric::ErrorRate | Metric::TokensPerSecond | Metric::CostPerRequest => None,
    }
}

/// How two values of a metric are compared: scores may be negative.
#[must_use]
pub fn scale_of(metric: Metric) -> Scale {
    match metric {
        Metric::FeedbackScore => Scale::Difference,
        _ => Scale::LogRatio,
    }
}

impl LatencyQuantile {
    /// The latencies.
    #[must_use]
    pub fn histogram(self, sums: &VariantSums) -> &Histogram {
        if self.first_token { &sums.first_token } else { &sums.answer }
    }

    /// Requests of a bucket: with those that failed, whose latency is endless. Whether a stream that failed
    /// had a first token is not told.
    fn requests(self, bucket: &UserBucket) -> u64 {
        if self.first_token {
            bucket.first_tokens_within.iter().sum()
        } else {
            bucket.answers_within.iter().sum::<u64>() + bucket.errors
        }
    }

    fn within(self, bucket: &UserBucket, cell: usize) -> u64 {
        let cells = if self.first_token { &bucket.first_tokens_within } else { &bucket.answers_within };
        cells.iter().take(cell + 1).sum()
    }

    /// The quantile in ms; none where so many requests failed that it is endless.
    #[must_use]
    pub fn value_ms(self, sums: &VariantSums) -> Option<f64> {
        let requests: u64 = sums.buckets.iter().map(|bucket| self.requests(bucket)).sum();
        let histogram = self.histogram(sums);
        let answered = histogram.count();
        let share = self.p * requests as f64 / answered as f64;
        let quantile = if answered > 0 && share <= 1.0 { histogram.quantile(share) } else { None };
        quantile.map(|latency| latency.as_secs_f64() * 1e3)
    }

    /// Requests above a latency in ms, and by how much clustering raises the variance of their share.
    #[must_use]
    pub fn tail(self, sums: &VariantSums, limit_ms: f64) -> Tail {
        let requests: u64 = sums.buckets.iter().map(|bucket| self.requests(bucket)).sum();
        let limit_us = limit_ms * 1e3;
        let within = self.histogram(sums).bucket_counts();
        let within = within.filter(|one| lower_end_us(one.bucket) as f64 <= limit_us);
        let within: u64 = within.map(|one| one.count).sum();
        let limit = std::time::Duration::from_secs_f64((limit_us / 1e6).clamp(0.0, 1e6));
        Tail {
            requests,
            above: requests.saturating_sub(within),
            design_effect: self.design_effect(sums, latency_cell(limit)),
        }
    }

    /// By how much the requests of a user resemble each other, at the end of this cell.
    fn design_effect(self, sums: &VariantSums, cell: usize) -> f64 {
        let cell = cell.min(THRESHOLDS_US.len() - 1);
        let buckets: Vec<BucketSums> = sums
            .buckets
            .iter()
            .map(|bucket| BucketSums { y: self.within(bucket, cell) as f64, n: self.requests(bucket) as f64 })
            .collect();
        let requests = buckets.iter().map(|bucket| bucket.n).sum::<f64>();
        // A float becomes an integer within its range.
        estimate(&buckets).map_or(1.0, |arm| design_effect(arm.ratio, arm.variance, requests as u64))
    }

    fn arm(self, sums: &VariantSums) -> LatencyArm {
        let mut counts = self.histogram(sums).bucket_counts().peekable();
        let mut within = 0;
        let cumulative = (0..BINS).map(|bin| {
            let end_us = FIRST_BIN_US * BIN_RATIO.powi(bin);
            while let Some(one) = counts.next_if(|one| lower_end_us(one.bucket + 1) as f64 <= end_us) {
                within += one.count;
            }
            within
        });
        let cumulative = cumulative.collect();
        let requests = sums.buckets.iter().map(|bucket| self.requests(bucket)).sum();
        let quantile = self.histogram(sums).quantile(self.p).unwrap_or_default();
        LatencyArm { cumulative, requests, design_effect: self.design_effect(sums, latency_cell(quantile)) }
    }

    fn test(self) -> QuantileTest {
        // 1,000 requests beyond the quantile: those of a test that tells 10 % apart.
        QuantileTest { p: self.p, planned_requests: 1000.0 / (1.0 - self.p), bin_ratio: BIN_RATIO }
    }
}

/// Requests above a latency.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tail {
    /// All requests.
    pub requests: u64,
    /// Those above.
    pub above: u64,
    /// At least 1.
    pub design_effect: f64,
}

/// The two sums of a ratio, by bucket of users.
#[must_use]
pub fn ratio_sums(metric: Metric, sums: &VariantSums) -> Vec<BucketSums> {
    let of = |bucket: &UserBucket| match metric {
        Metric::FeedbackScore => BucketSums { y: bucket.score_sum, n: bucket.scores as f64 },
        Metric::TokensPerSecond => {
            BucketSums { y: bucket.completion_tokens as f64, n: bucket.token_us as f64 / 1e6 }
        }
        Metric::CostPerRequest => BucketSums { y: bucket.cost(&sums.cost), n: bucket.requests as f64 },
        // Quantiles are no ratios of sums.
        Metric::ErrorRate
        | Metric::LatencyP50Ms
        | Metric::LatencyP95Ms
        | Metric::LatencyP99Ms
        | Metric::FirstTokenP95Ms => BucketSums { y: bucket.errors as f64, n: bucket.requests as f64 },
    };
    sums.buckets.iter().map(of).collect()
}

/// The value of a metric over all that was counted.
#[must_use]
pub fn value(metric: Metric, sums: &VariantSums) -> Option<f64> {
    match quantile_of(metric) {
        Some(quantile) => quantile.value_ms(sums),
        None => estimate(&ratio_sums(metric, sums)).map(|arm| arm.ratio),
    }
}

/// How a variant differs from the control.
#[derive(Debug, Clone, PartialEq)]
pub struct VariantDifference {
    /// The difference: of logarithms, or of scores.
    pub estimate: f64,
    /// The lower end of the interval that holds at every look; infinite while too little is known.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// Logarithm of the evidence that there is a difference.
    pub ln_evidence: f64,
    /// What is known, which must not fall: the inverse of the variance, or requests.
    pub information: f64,
    /// Standard error; none of a quantile.
    pub standard_error: Option<f64>,
    /// The signed skewness of the difference, none of a quantile.
    pub skewness: Option<f64>,
    /// The estimates of variant and control; none of a quantile.
    pub arms: Option<[ArmEstimate; 2]>,
    /// The coefficient of what users did before the test, for the next look; none without such a time.
    pub theta: Option<f64>,
}

/// How sure a comparison has to be, and what it is tuned for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompareSettings {
    /// Probability that the interval ever misses the truth.
    pub alpha: f64,
    /// The smallest effect that matters.
    pub smallest_effect: f64,
}

impl CompareSettings {
    /// Width of the prior on the scale of a metric.
    #[must_use]
    pub fn tau(&self, metric: Metric) -> f64 {
        match scale_of(metric) {
            Scale::LogRatio => tau_for(self.smallest_effect.ln_1p()),
            Scale::Difference => tau_for(self.smallest_effect),
        }
    }
}

/// A variant and the control in one epoch.
#[derive(Debug, Clone, Copy)]
pub struct EpochPair<'a> {
    /// The variant.
    pub treatment: &'a VariantSums,
    /// The control.
    pub control: &'a VariantSums,
}

/// What the users of a variant and the control did before the test.
#[derive(Debug, Clone, Copy)]
pub struct PairHistory<'a> {
    /// What was counted then.
    pub before: EpochPair<'a>,
    /// The coefficient that the look before found.
    pub theta: f64,
}

/// How a variant differs from the control over these epochs, the newest last. None while that has no value.
#[must_use]
pub fn compare(
    metric: Metric,
    epochs: &[EpochPair<'_>],
    settings: CompareSettings,
    history: Option<PairHistory<'_>>,
) -> Option<VariantDifference> {
    if let Some(quantile) = quantile_of(metric) {
        return compare_quantile(quantile, epochs.last()?, settings.alpha);
    }
    let scale = scale_of(metric);
    let pairs: Vec<RatioPair> = epochs.iter().filter_map(|pair| RatioPair::of(metric, pair, scale)).collect();
    let mut arms = combined(&pairs, scale)?;
    let theta = history.and_then(|history| adjust(metric, &mut arms, history));
    let found = difference(&arms[0], &arms[1], scale)?;
    let look = student_look(&found, settings.tau(metric), settings.alpha);
    Some(VariantDifference {
        estimate: found.estimate,
        low: found.estimate - look.half_width,
        high: found.estimate + look.half_width,
        ln_evidence: look.ln_evidence,
        information: look.information,
        standard_error: Some(found.standard_error),
        skewness: Some(found.skewness),
        arms: Some(arms),
        theta,
    })
}

/// Subtracts from both arms what their users did before the test. Gives the coefficient for the next look;
/// none where the time before has no value.
fn adjust(metric: Metric, arms: &mut [ArmEstimate; 2], history: PairHistory<'_>) -> Option<f64> {
    let EpochPair { treatment, control } = history.before;
    let sums = [ratio_sums(metric, treatment), ratio_sums(metric, control)];
    let [treatment, control] = [estimate(&sums[0])?, estimate(&sums[1])?];
    let (y, n) = sums.iter().flatten().fold((0.0, 0.0), |(y, n), one| (y + one.y, n + one.n));
    let both = [
        EstimateWithHistory { during: arms[0].clone(), before: treatment },
        EstimateWithHistory { during: arms[1].clone(), before: control },
    ];
    let adjusted = both.each_ref().map(|arm| arm.adjusted(y / n, history.theta));
    // A ratio that is adjusted to nothing has no logarithm.
    if scale_of(metric) == Scale::Difference || adjusted.iter().all(|arm| arm.ratio > 0.0) {
        *arms = adjusted;
    }
    Some(coefficient_of(&both))
}

fn compare_quantile(
    quantile: LatencyQuantile,
    pair: &EpochPair<'_>,
    alpha: f64,
) -> Option<VariantDifference> {
    let values = quantile.value_ms(pair.treatment).zip(quantile.value_ms(pair.control));
    let (of_treatment, of_control) = values.filter(|(_, control)| *control > 0.0)?;
    let (treatment, control) = (quantile.arm(pair.treatment), quantile.arm(pair.control));
    let test = quantile.test();
    // One bin more on either side, because buckets of gateways do not end where bins do.
    let interval = test.ratio_interval(&treatment, &control, alpha);
    let end = |ratio: f64, outward: f64| ratio.ln() + outward * BIN_RATIO.ln();
    Some(VariantDifference {
        estimate: (of_treatment / of_control).ln(),
        low: interval.map_or(f64::NEG_INFINITY, |interval| end(interval.low, -1.0)),
        high: interval.map_or(f64::INFINITY, |interval| end(interval.high, 1.0)),
        ln_evidence: test.ln_evidence(&treatment, &control),
        information: treatment.requests.min(control.requests) as f64,
        standard_error: None,
        skewness: None,
        arms: None,
        theta: None,
    })
}

/// The estimates of one epoch, and what they weigh.
struct RatioPair {
    arms: [ArmEstimate; 2],
    sums: [Vec<BucketSums>; 2],
    weight: f64,
}

impl RatioPair {
    /// None where an arm has no value on the scale.
    fn of(metric: Metric, pair: &EpochPair<'_>, scale: Scale) -> Option<Self> {
        let sums = [ratio_sums(metric, pair.treatment), ratio_sums(metric, pair.control)];
        let arms = [estimate(&sums[0])?, estimate(&sums[1])?];
        if scale == Scale::LogRatio && arms.iter().any(|arm| arm.ratio <= 0.0) {
            return None;
        }
        let [treatment, control] = [&sums[0], &sums[1]].map(|sums| sums.iter().map(|one| one.n).sum::<f64>());
        Some(Self { arms, sums, weight: treatment * control / (treatment + control) })
    }
}

/// The estimates over all epochs: their difference is the weighted mean of the epochs' differences, and a
/// bucket's influences in all epochs are added, because a user who returns is one user.
fn combined(pairs: &[RatioPair], scale: Scale) -> Option<[ArmEstimate; 2]> {
    if let [only] = pairs {
        return Some(only.arms.clone());
    }
    let all: f64 = pairs.iter().map(|pair| pair.weight).sum();
    if all <= 0.0 {
        return None;
    }
    let arm = |index: usize| -> Option<ArmEstimate> {
        let buckets = pairs.first()?.arms[index].influences.len();
        let (mut mean, mut influences) = (0.0, vec![0.0; buckets]);
        let mut sums = vec![BucketSums::default(); buckets];
        for pair in pairs {
            let (share, arm) = (pair.weight / all, &pair.arms[index]);
            let factor = match scale {
                Scale::LogRatio => share / arm.ratio,
                Scale::Difference => share,
            };
            mean += share * if scale == Scale::LogRatio { arm.ratio.ln() } else { arm.ratio };
            influences.iter_mut().zip(&arm.influences).for_each(|(sum, psi)| *sum += factor * psi);
            for (sum, one) in sums.iter_mut().zip(&pair.sums[index]) {
                *sum = BucketSums { y: sum.y + one.y, n: sum.n + one.n };
            }
        }
        let ratio = if scale == Scale::LogRatio { mean.exp() } else { mean };
        if scale == Scale::LogRatio {
            influences.iter_mut().for_each(|psi| *psi *= ratio);
        }
        let count = buckets as f64;
        let squares: f64 = influences.iter().map(|psi| psi * psi).sum();
        let cubes: f64 = influences.iter().map(|psi| psi * psi * psi).sum();
        let whole = estimate(&sums)?;
        Some(ArmEstimate {
            ratio,
            variance: squares / (count * (count - 1.0)),
            skewness: if squares > 0.0 { cubes / squares.powf(1.5) } else { 0.0 },
            influences,
            ..whole
        })
    };
    Some([arm(0)?, arm(1)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(requests: u64, errors: u64) -> VariantSums {
        let mut sums = VariantSums::default();
        for (number, bucket) in (0_u64..).zip(&mut sums.buckets) {
            bucket.requests = requests + number % 7;
            bucket.errors = errors + number % 3;
        }
        sums
    }

    const SETTINGS: CompareSettings = CompareSettings { alpha: 0.05, smallest_effect: 0.05 };

    #[test]
    fn a_level_that_moves_while_the_shares_change_is_no_effect() {
        // Errors are 10 % at first and 30 % later, in both arms; the treatment has most of its requests
        // later.
        let (early_control, early_treatment) = (sums(900, 90), sums(100, 10));
        let (late_control, late_treatment) = (sums(100, 30), sums(900, 270));
        let epochs = [
            EpochPair { treatment: &early_treatment, control: &early_control },
            EpochPair { treatment: &late_treatment, control: &late_control },
        ];
        let found = compare(Metric::ErrorRate, &epochs, SETTINGS, None).unwrap();
        // 10 of 103 and 11 of 103 errors differ a little; a sum over epochs would differ by a factor of 2.
        assert!(found.estimate.abs() < 0.1, "{found:?}");
        let mut treatment = early_treatment.clone();
        treatment.merge(&late_treatment);
        let mut control = early_control.clone();
        control.merge(&late_control);
        let added = [EpochPair { treatment: &treatment, control: &control }];
        assert!(compare(Metric::ErrorRate, &added, SETTINGS, None).unwrap().estimate > 0.5);
    }

    #[test]
    fn equal_epochs_say_the_same_as_one() {
        let (treatment, control) = (sums(100, 20), sums(100, 10));
        let pair = EpochPair { treatment: &treatment, control: &control };
        let one = compare(Metric::ErrorRate, &[pair], SETTINGS, None).unwrap();
        let two = compare(Metric::ErrorRate, &[pair, pair], SETTINGS, None).unwrap();
        assert!((one.estimate - two.estimate).abs() < 1e-12);
        assert!((one.information - two.information).abs() / one.information < 1e-9);
    }

    #[test]
    fn failures_count_as_endless_latencies() {
        let mut sums = VariantSums::default();
        for _ in 0..95 {
            sums.answer.observe(std::time::Duration::from_millis(10));
        }
        sums.buckets[0].answers_within[latency_cell(std::time::Duration::from_millis(10))] = 95;
        let p95 = quantile_of(Metric::LatencyP95Ms).unwrap();
        sums.buckets[0].errors = 4;
        assert!(p95.value_ms(&sums).is_some_and(|ms| (ms - 10.0).abs() < 0.3));
        sums.buckets[0].errors = 6;
        assert_eq!(p95.value_ms(&sums), None);
        let tail = p95.tail(&sums, 50.0);
        assert_eq!((tail.requests, tail.above), (101, 6));
        assert_eq!(p95.tail(&sums, 5.0).above, 101);
    }

    #[test]
    fn a_slower_variant_has_an_interval_above_the_control() {
        let variant = |ms: u64| {
            let mut sums = VariantSums::default();
            for number in 0..40_000_u64 {
                let latency = std::time::Duration::from_micros(ms * 1000 + (number % 997) * 20);
                sums.answer.observe(latency);
                let bucket = &mut sums.buckets[(number % 256) as usize];
                bucket.answers_within[latency_cell(latency)] += 1;
                bucket.requests += 1;
            }
            sums
        };
        let (slow, fast) = (variant(60), variant(40));
        let found =
            compare(Metric::LatencyP95Ms, &[EpochPair { treatment: &slow, control: &fast }], SETTINGS, None)
                .unwrap();
        // 79 ms by 59 ms.
        let truth = (79.0_f64 / 59.0).ln();
        assert!(found.low > 0.0 && found.low < truth && truth < found.high, "{found:?}");
        let same = [EpochPair { treatment: &fast, control: &fast }];
        let none = compare(Metric::LatencyP95Ms, &same, SETTINGS, None).unwrap();
        assert!(none.low < 0.0 && none.high > 0.0 && none.ln_evidence < 0.0, "{none:?}");
    }
}
