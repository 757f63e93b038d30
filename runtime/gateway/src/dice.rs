//! Random numbers for choices that need no secrecy: which two endpoints to compare, how long to wait.
//!
//! One atomic counter run through the splitmix64 mixing function: no lock, no thread-local, and a seed makes every
//! choice of a test repeatable.

use std::sync::atomic::{AtomicU64, Ordering};

/// The odd constant that splitmix64 steps by (2^64 divided by the golden ratio).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A source of random numbers that any thread may use.
#[derive(Debug)]
pub struct Dice(AtomicU64);

impl Dice {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Seeded from a random UUID, so that gateways that start together do not choose alike.
    #[must_use]
    pub fn random() -> Self {
        Self::seeded(uuid::Uuid::new_v4().as_u64_pair().1)
    }

    /// The next 64 random bits.
    pub fn roll(&self) -> u64 {
        let mut bits = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

/// Scales random bits to `0..bound`; `bound` must not be 0. The bias is below `bound / 2^64`.
#[must_use]
pub(crate) fn below(bits: u64, bound: u64) -> u64 {
    // The high half of the product of two u64 fits a u64.
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let take = |seed| {
            let dice = Dice::seeded(seed);
            [dice.roll(), dice.roll(), dice.roll()]
        };
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
    }

    #[test]
    fn scaled_rolls_cover_the_range_evenly() {
        let dice = Dice::seeded(1);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[usize::try_from(below(dice.roll(), 10)).unwrap()] += 1;
        }
        // 10,000 expected in each; five standard deviations are about 474.
        assert!(counts.iter().all(|count| count.abs_diff(10_000) < 474), "{counts:?}");
    }
}
