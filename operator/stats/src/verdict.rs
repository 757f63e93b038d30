//! What a test says of its variants, and why it ends.

use crate::buckets::{ArmDifference, ArmEstimate};

/// Least users of an arm.
const MIN_USERS: u64 = 500;
/// Least effective number of buckets of an arm.
const MIN_EFFECTIVE_BUCKETS: f64 = 100.0;
/// Largest share of one bucket.
const MAX_BUCKET_SHARE: f64 = 0.05;
/// Least events of an arm, such as errors, where the metric counts events.
const MIN_EVENTS: f64 = 50.0;
/// Skewness of the difference above which one tail of the interval is too short.
const MAX_SKEWNESS: f64 = 0.03;

/// What an arm has.
#[derive(Debug, Clone, Copy)]
pub struct ArmSample<'a> {
    /// Distinct users.
    pub users: u64,
    /// Events, where the metric counts some.
    pub events: Option<f64>,
    /// Its estimate.
    pub estimate: &'a ArmEstimate,
}

/// Why an arm says too little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shortfall {
    /// Fewer than 500 users.
    Users,
    /// Fewer than 50 events.
    Events,
    /// Few buckets have most of the requests.
    EffectiveBuckets,
    /// One bucket has more than 5 % of the requests.
    LargestBucket,
}

/// Why an arm says too little; empty if it does not.
#[must_use]
pub fn shortfalls(arm: &ArmSample<'_>) -> Vec<Shortfall> {
    let too_little = [
        (arm.users < MIN_USERS, Shortfall::Users),
        (arm.events.is_some_and(|events| events < MIN_EVENTS), Shortfall::Events),
        (arm.estimate.effective_buckets < MIN_EFFECTIVE_BUCKETS, Shortfall::EffectiveBuckets),
        (arm.estimate.largest_share > MAX_BUCKET_SHARE, Shortfall::LargestBucket),
    ];
    too_little.into_iter().filter(|(applies, _)| *applies).map(|(_, shortfall)| shortfall).collect()
}

/// Whether the difference is so skewed that one tail of its interval is too short.
#[must_use]
pub fn is_skewed(difference: &ArmDifference) -> bool {
    difference.skewness.abs() > MAX_SKEWNESS
}

/// Which direction of the metric is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// The interval of the effect, and what it is compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EffectInterval {
    /// Treatment minus control.
    pub estimate: f64,
    /// Half the width of the interval.
    pub half_width: f64,
    /// Effects up to this size do not matter; 0: every effect does.
    pub margin: f64,
}

/// What a test says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestVerdict {
    /// The treatment is better.
    TreatmentWins,
    /// The control is better.
    ControlWins,
    /// The arms differ by less than the margin.
    Equivalent,
    /// More has to be observed.
    Inconclusive,
    /// The split is broken: nothing can be said.
    Invalid,
}

/// The verdict of one goal.
#[must_use]
pub fn verdict(interval: EffectInterval, direction: Direction, split_is_broken: bool) -> TestVerdict {
    let EffectInterval { estimate, half_width, margin } = interval;
    let (low, high) = (estimate - half_width, estimate + half_width);
    match direction {
        _ if split_is_broken => TestVerdict::Invalid,
        _ if margin > 0.0 && -margin < low && high < margin => TestVerdict::Equivalent,
        Direction::Higher if low > 0.0 => TestVerdict::TreatmentWins,
        Direction::Lower if high < 0.0 => TestVerdict::TreatmentWins,
        Direction::Higher if high < 0.0 => TestVerdict::ControlWins,
        Direction::Lower if low > 0.0 => TestVerdict::ControlWins,
        _ => TestVerdict::Inconclusive,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_follow_the_interval() {
        let of = |estimate: f64, half_width: f64, margin: f64, direction| {
            verdict(EffectInterval { estimate, half_width, margin }, direction, false)
        };
        assert_eq!(of(0.1, 0.05, 0.0, Direction::Higher), TestVerdict::TreatmentWins);
        assert_eq!(of(0.1, 0.05, 0.0, Direction::Lower), TestVerdict::ControlWins);
        assert_eq!(of(-0.1, 0.05, 0.0, Direction::Lower), TestVerdict::TreatmentWins);
        assert_eq!(of(-0.1, 0.05, 0.0, Direction::Higher), TestVerdict::ControlWins);
        assert_eq!(of(0.1, 0.2, 0.0, Direction::Higher), TestVerdict::Inconclusive);
        assert_eq!(of(0.001, 0.005, 0.01, Direction::Higher), TestVerdict::Equivalent);
        let broken = EffectInterval { estimate: 0.1, half_width: 0.05, margin: 0.0 };
        assert_eq!(verdict(broken, Direction::Higher, true), TestVerdict::Invalid);
    }

    #[test]
    fn an_arm_with_one_large_tenant_says_too_little() {
        let arm = ArmEstimate {
            ratio: 1.0,
            variance: 1.0,
            effective_buckets: 20.0,
            largest_share: 0.4,
            skewness: 0.0,
            influences: Vec::new(),
        };
        let sample = ArmSample { users: 1000, events: Some(10.0), estimate: &arm };
        assert_eq!(
            shortfalls(&sample),
            [Shortfall::Events, Shortfall::EffectiveBuckets, Shortfall::LargestBucket]
        );
    }
}
