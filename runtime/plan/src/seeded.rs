//! The one generator of random numbers whose values are fixed: for seeded checkpoints, golden files and
//! tests.
//!
//! It is SplitMix64 ("Fast splittable pseudorandom number generators", Steele, Lea, Flood, 2014). The numbers
//! depend on nothing but the seed and must never change: stored expectations rest on them. Code that may take
//! any random numbers uses `fastrand`.

/// The distance between two states, 2^64 divided by the golden ratio.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// A sequence of random numbers that its seed determines.
#[derive(Debug, Clone)]
pub struct SeededRng {
    state: u64,
}

impl SeededRng {
    /// The sequence of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Number `index` of the sequence of `seed`, without the numbers before it.
    #[must_use]
    pub const fn nth(seed: u64, index: u64) -> u64 {
        let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Next 64 random bits.
    pub const fn next_u64(&mut self) -> u64 {
        let bits = Self::nth(self.state, 0);
        self.state = self.state.wrapping_add(GAMMA);
        bits
    }

    /// Next 8 random bits.
    pub const fn next_u8(&mut self) -> u8 {
        (self.next_u64() >> 56) as u8
    }

    /// Next number in -1..1.
    pub const fn next_signed(&mut self) -> f32 {
        signed(self.next_u64())
    }
}

/// The number in -1..1 that the upper 24 bits stand for, which is as many as an f32 holds.
#[must_use]
pub const fn signed(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_are_those_of_splitmix64() {
        // The first outputs of the reference implementation for the seed 1234567.
        let mut rng = SeededRng::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        assert_eq!(SeededRng::nth(1_234_567, 2), first[2]);
    }

    #[test]
    fn signed_numbers_cover_minus_one_to_one() {
        assert_eq!((signed(0), signed(1 << 63)), (-1.0, 0.0));
        assert!(signed(u64::MAX) < 1.0);
    }
}
