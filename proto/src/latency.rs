//! The buckets of latency histograms in reports.
//!
//! They are fixed: histograms of many gateways, of many versions, are added bucket by bucket, and the sum is
//! what one gateway would have counted. They are computed with integers alone, so that no rounding puts one
//! latency into two buckets.
//!
//! Up to 1.024 ms a bucket is 32 µs wide. From there each doubling of the latency has 32 buckets of equal
//! width, so that a bucket is at most 1/32 (3.1 %) of its latency wide, and its middle is at most 1.6 % off.
//! A rollout that compares two quantiles by a ratio of 1.2 needs a few times less than that 20 %. 22
//! doublings reach 4,295 s, longer than any answer; 32 + 22 × 32 = 736 buckets of 8 bytes are 5.9 KB.

use std::time::Duration;

use crate::control::v1::LatencyHistogram;

/// Width of the narrowest buckets.
const UNIT_US: u64 = 32;
/// Buckets up to the first doubling, and of each doubling.
const STEPS: u64 = 32;
/// Binary logarithm of [`STEPS`].
const STEPS_LOG2: u32 = STEPS.trailing_zeros();
const DOUBLINGS: u64 = 22;
/// How many buckets there are. The last one also has what is longer.
pub const BUCKETS: usize = (STEPS + DOUBLINGS * STEPS) as usize;

/// The bucket of a latency.
#[must_use]
pub fn bucket_of(latency: Duration) -> usize {
    let units = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX) / UNIT_US;
    if units < STEPS {
        return usize::try_from(units).unwrap_or(BUCKETS - 1);
    }
    let doubling = units.ilog2() - STEPS_LOG2;
    let step = (units >> doubling) - STEPS;
    let index = STEPS + u64::from(doubling) * STEPS + step;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// Where a bucket begins, in µs. It ends where the next one begins.
#[must_use]
pub fn lower_end_us(bucket: usize) -> u64 {
    let index = bucket as u64;
    if index < STEPS {
        return index * UNIT_US;
    }
    let (doubling, step) = ((index - STEPS) / STEPS, (index - STEPS) % STEPS);
    ((STEPS + step) << doubling) * UNIT_US
}

/// The middle of a bucket.
#[must_use]
pub fn middle(bucket: usize) -> Duration {
    Duration::from_micros(lower_end_us(bucket).midpoint(lower_end_us(bucket + 1)))
}

/// A count of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketCount {
    /// The bucket.
    pub bucket: usize,
    /// Latencies in it.
    pub count: u64,
}

impl LatencyHistogram {
    /// A histogram on the wire, from ascending buckets.
    #[must_use]
    pub fn of_buckets(buckets: impl IntoIterator<Item = BucketCount>, sum_us: u64) -> Self {
        let mut histogram = Self { sum_us, ..Self::default() };
        let mut before = 0;
        for BucketCount { bucket, count } in buckets {
            // There are fewer than 2^32 buckets.
            histogram.buckets.push(u32::try_from(bucket.saturating_sub(before)).unwrap_or(u32::MAX));
            histogram.counts.push(count);
            before = bucket;
        }
        histogram
    }

    /// Its buckets, ascending. A bucket beyond the last counts in the last.
    pub fn bucket_counts(&self) -> impl Iterator<Item = BucketCount> {
        let indices = self.buckets.iter().scan(0_usize, |index, distance| {
            *index = index.saturating_add(*distance as usize);
            Some((*index).min(BUCKETS - 1))
        });
        indices.zip(&self.counts).map(|(bucket, count)| BucketCount { bucket, count: *count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap_and_are_narrow() {
        for bucket in 0..BUCKETS {
            let (from, to) = (lower_end_us(bucket), lower_end_us(bucket + 1));
            assert!(from < to, "{bucket}");
            assert_eq!(bucket_of(Duration::from_micros(from)), bucket);
            assert_eq!(bucket_of(Duration::from_micros(to - 1)), bucket);
            assert!(to - from == UNIT_US || (to - from) * STEPS <= from, "{bucket}: {from} to {to}");
            assert_eq!(bucket_of(middle(bucket)), bucket);
        }
        assert_eq!(lower_end_us(STEPS as usize), 1024);
        assert_eq!(lower_end_us(BUCKETS), 1 << 32);
        assert_eq!(bucket_of(Duration::MAX), BUCKETS - 1);
        assert_eq!(bucket_of(Duration::ZERO), 0);
    }

    #[test]
    fn a_histogram_on_the_wire_is_read_as_it_was_written() {
        let buckets = [(0, 3), (40, 1), (735, u64::MAX)].map(|(bucket, count)| BucketCount { bucket, count });
        let wire = LatencyHistogram::of_buckets(buckets, 9);
        assert_eq!(wire.buckets, [0, 40, 695]);
        assert!(wire.bucket_counts().eq(buckets));
        let beyond = LatencyHistogram { buckets: vec![u32::MAX, u32::MAX], counts: vec![1, 2], sum_us: 0 };
        assert!(beyond.bucket_counts().all(|counted| counted.bucket == BUCKETS - 1));
    }
}
