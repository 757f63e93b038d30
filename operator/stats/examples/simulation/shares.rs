//! Tests of shares of requests and users: quantiles, guardrails and the division of users.

use fastrand::Rng;
use trustformers_stats::buckets::{ArmDifference, BucketSums, estimate};
use trustformers_stats::quantile::{LatencyArm, QuantileTest, design_effect};
use trustformers_stats::sequential::{ln_evidence_above, tau_for};
use trustformers_stats::split_check::{self, SplitEpoch};

use super::ratios::normal;
use super::{ALPHA, BUCKETS, LOOKS};

/// Requests of each arm between two looks.
const REQUESTS: u32 = 200;
/// Standard deviation of the logarithm of a user's latencies.
const SPREAD: f64 = 0.5;
/// Ratio between the ends of neighbouring bins.
const BIN_RATIO: f64 = 1.05;
/// Bins reach from the median divided by e³ to the median times e³.
const REACH: f64 = 3.0;

/// Equal lognormal latencies of both arms.
pub(super) struct Latencies {
    /// The quantile.
    pub(super) p: f64,
    /// Standard deviation of the level of a bucket of users, of the logarithm.
    pub(super) returning: f64,
}

/// Latencies of one arm.
struct Arm {
    levels: Vec<f64>,
    bins: Vec<u64>,
    /// By bucket of users: requests up to the true quantile, and all.
    within: Vec<BucketSums>,
}

impl Latencies {
    /// Whether the test of the quantile ever concludes.
    pub(super) fn concludes(&self, random: &mut Rng) -> bool {
        let test =
            QuantileTest { p: self.p, planned_requests: 1000.0 / (1.0 - self.p), bin_ratio: BIN_RATIO };
        let bins = (2.0 * REACH / BIN_RATIO.ln()) as usize;
        // The true quantile of the logarithm.
        let z = trustformers_stats::special::normal_quantile(self.p);
        let quantile = z * (SPREAD * SPREAD + self.returning * self.returning).sqrt();
        let mut arms = [(); 2].map(|()| Arm {
            levels: (0..BUCKETS).map(|_| self.returning * normal(random)).collect(),
            bins: vec![0; bins + 1],
            within: vec![BucketSums::default(); BUCKETS],
        });
        (0..LOOKS).any(|_| {
            for arm in &mut arms {
                for _ in 0..REQUESTS {
                    let bucket = random.usize(..BUCKETS);
                    let logarithm = arm.levels[bucket] + SPREAD * normal(random);
                    let bin = ((logarithm + REACH) / BIN_RATIO.ln()).clamp(0.0, bins as f64);
                    arm.bins[bin as usize] += 1;
                    arm.within[bucket].n += 1.0;
                    arm.within[bucket].y += f64::from(u8::from(logarithm <= quantile));
                }
            }
            test.ln_evidence(&arms[0].latencies(), &arms[1].latencies()) >= -ALPHA.ln()
        })
    }
}

impl Arm {
    fn latencies(&self) -> LatencyArm {
        let mut sum = 0;
        let cumulative = self.bins.iter().map(|count| {
            sum += count;
            sum
        });
        let cumulative: Vec<u64> = cumulative.collect();
        let requests = cumulative.last().copied().unwrap_or(0);
        let clustering =
            estimate(&self.within).map_or(1.0, |arm| design_effect(arm.ratio, arm.variance, requests));
        LatencyArm { cumulative, requests, design_effect: clustering }
    }
}

/// Whether a guardrail of 5 % ever ends a test whose error rate is exactly that, with users who return.
pub(super) fn guardrail_stops(random: &mut Rng) -> bool {
    let limit: f64 = 0.05;
    let levels: Vec<f64> = (0..BUCKETS).map(|_| (1.0 + 0.3 * normal(random)).clamp(0.05, 1.95)).collect();
    let mut sums = vec![BucketSums::default(); BUCKETS];
    (0..LOOKS).any(|_| {
        for (level, sums) in levels.iter().zip(&mut sums) {
            for _ in 0..4 {
                sums.y += f64::from(u8::from(random.f64() < limit * *level));
                sums.n += 1.0;
            }
        }
        let Some(arm) = estimate(&sums).filter(|arm| arm.variance > 0.0) else { return false };
        let excess = ArmDifference {
            estimate: arm.ratio - limit,
            standard_error: arm.variance.sqrt(),
            degrees_of_freedom: f64::INFINITY,
            skewness: arm.skewness,
        };
        ln_evidence_above(&excess, tau_for(0.25 * limit)) > -ALPHA.ln()
    })
}

/// A division of users between two arms.
pub(super) struct Divided {
    /// Share of the second arm as configured.
    pub(super) configured: f64,
    /// Share that it gets.
    pub(super) served: f64,
}

impl Divided {
    /// Whether the check of the division ever raises an alarm, with 100 new users between two looks.
    pub(super) fn alarms(&self, random: &mut Rng) -> bool {
        let weights = vec![1.0 - self.configured, self.configured];
        let mut epoch = SplitEpoch { weights, users: vec![0, 0] };
        (0..LOOKS).any(|_| {
            for _ in 0..100 {
                epoch.users[usize::from(random.f64() < self.served)] += 1;
            }
            split_check::is_broken(std::slice::from_ref(&epoch))
        })
    }
}
