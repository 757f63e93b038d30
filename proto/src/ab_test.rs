//! What gateways and the operator agree on about A/B tests: buckets of users, thresholds of latencies, and
//! sets of users that merge exactly.
//!
//! A user has one of [`USER_BUCKETS`] buckets and a fingerprint of 64 bits, both from one salted hash. The
//! bucket is the unit of the analysis. The fingerprint tells whether a user was seen before.

use std::collections::HashSet;
use std::time::Duration;

/// Buckets of users in which a variant's sums are counted.
pub const USER_BUCKETS: usize = 256;

/// Upper ends of the cells of [`latency_cell`], in µs: 1 ms, and each 2^¾ times the one before, rounded. The
/// last one is 156 s. What is longer is in one more cell.
pub const THRESHOLDS_US: [u64; 24] = [
    1_000,
    1_682,
    2_828,
    4_757,
    8_000,
    13_454,
    22_627,
    38_055,
    64_000,
    107_635,
    181_019,
    304_437,
    512_000,
    861_078,
    1_448_155,
    2_435_496,
    4_096_000,
    6_888_623,
    11_585_238,
    19_483_969,
    32_768_000,
    55_108_987,
    92_681_900,
    155_871_755,
];

/// Cells of latencies in a bucket of users.
pub const LATENCY_CELLS: usize = THRESHOLDS_US.len() + 1;

/// The cell of a latency: the first whose threshold it does not exceed.
#[must_use]
pub fn latency_cell(latency: Duration) -> usize {
    let latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    THRESHOLDS_US.partition_point(|threshold| *threshold < latency_us)
}

/// A set of users that never has more than a bound of fingerprints. Above it the set keeps the users whose
/// fingerprints end with one more zero bit, which is a sample of one half of them, whatever they do.
///
/// Merged sets are what one process would have that saw all users: a user is in the result if it is in any of
/// the sets and its fingerprint has the zero bits of the highest level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserSet {
    fingerprints: HashSet<u64>,
    level: u32,
    bound: usize,
}

impl UserSet {
    /// An empty set of at most `bound` fingerprints.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self { fingerprints: HashSet::new(), level: 0, bound: bound.max(1) }
    }

    /// Adds a user. True if the user is new and in the sample.
    pub fn insert(&mut self, fingerprint: u64) -> bool {
        if !is_sampled(fingerprint, self.level) || !self.fingerprints.insert(fingerprint) {
            return false;
        }
        while self.fingerprints.len() > self.bound {
            self.raise_to(self.level + 1);
        }
        is_sampled(fingerprint, self.level)
    }

    /// Keeps the users that a sample of this level has.
    pub fn raise_to(&mut self, level: u32) {
        if level > self.level {
            self.level = level.min(u64::BITS);
            self.fingerprints.retain(|fingerprint| is_sampled(*fingerprint, level));
        }
    }

    /// Adds the users of another set.
    pub fn merge(&mut self, other: &Self) {
        self.raise_to(other.level);
        for fingerprint in &other.fingerprints {
            self.insert(*fingerprint);
        }
    }

    /// Whether the sample has this user.
    #[must_use]
    pub fn contains(&self, fingerprint: u64) -> bool {
        self.fingerprints.contains(&fingerprint)
    }

    /// Zero bits at the end of each fingerprint: the set has one of `2^level` users.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Users in the sample.
    #[must_use]
    pub fn len(&self) -> usize {
        self.fingerprints.len()
    }

    /// Whether there is no user.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fingerprints.is_empty()
    }

    /// All users, as the sample tells: exact at level 0.
    #[must_use]
    pub fn estimate(&self) -> u64 {
        (self.fingerprints.len() as u64).checked_shl(self.level).unwrap_or(u64::MAX)
    }

    /// The fingerprints, in no order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.fingerprints.iter().copied()
    }
}

fn is_sampled(fingerprint: u64, level: u32) -> bool {
    fingerprint.trailing_zeros() >= level
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that looks random (`SplitMix64`).
    fn fingerprint(user: u64) -> u64 {
        let mut z = user.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn thresholds_ascend_by_a_constant_ratio_and_cells_end_at_them() {
        for (index, threshold) in THRESHOLDS_US.into_iter().enumerate() {
            let exact = 1000.0 * 2_f64.powf(0.75 * index as f64);
            assert!((threshold as f64 - exact).abs() < 1.0, "{index}: {threshold} for {exact}");
            assert_eq!(latency_cell(Duration::from_micros(threshold)), index);
            assert_eq!(latency_cell(Duration::from_micros(threshold + 1)), index + 1);
        }
        assert_eq!(latency_cell(Duration::ZERO), 0);
        assert_eq!(latency_cell(Duration::MAX), LATENCY_CELLS - 1);
    }

    #[test]
    fn merged_sets_are_the_set_of_one_process_that_saw_all() {
        for bound in [10_000, 512] {
            let mut whole = UserSet::new(bound);
            let mut sets = [UserSet::new(bound), UserSet::new(bound), UserSet::new(bound)];
            for user in 0..4000 {
                whole.insert(fingerprint(user));
                // Some users are seen by two gateways.
                sets[(user % 3) as usize].insert(fingerprint(user));
                sets[(user % 2) as usize].insert(fingerprint(user));
            }
            let mut merged = UserSet::new(bound);
            sets.iter().for_each(|set| merged.merge(set));
            assert_eq!(merged, whole, "{bound}");
            assert!(whole.len() <= bound);
            let off = whole.estimate() as f64 / 4000.0 - 1.0;
            assert!(off.abs() < 0.15, "{} of 4000", whole.estimate());
        }
    }

    #[test]
    fn a_user_is_new_only_one_time() {
        let mut set = UserSet::new(8);
        assert!(set.insert(fingerprint(1)));
        assert!(!set.insert(fingerprint(1)));
        assert_eq!((set.len(), set.estimate(), set.level()), (1, 1, 0));
        set.raise_to(64);
        assert!(!set.insert(fingerprint(2)) && set.is_empty());
    }
}
