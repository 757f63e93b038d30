//! Divides a route's requests between its revisions, exactly.
//!
//! Each request takes a sequence number from a counter, and the number alone decides. Over any run of as many
//! requests as the weights add up to (after division by their common factor), every revision gets exactly its
//! weight: a 5 % step is 5 of 100, never "about 5". Inside such a run a stride close to the golden ratio
//! distributes the numbers, so that the shares are nearly exact after a few requests too, instead of coming
//! in blocks.

/// The weights of one route, prepared for choices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Upper end (exclusive) of each member's range in `0..total`.
    ends: Vec<u64>,
    total: u64,
    stride: u64,
}

impl Split {
    /// Prepares weights, in the order of the members. A member of weight 0 is never chosen.
    #[must_use]
    pub fn new(weights: &[u32]) -> Self {
        let common =
            weights.iter().fold(0, |all, &weight| greatest_common_divisor(all, u64::from(weight))).max(1);
        let mut total = 0;
        let ends = weights
            .iter()
            .map(|&weight| {
                total += u64::from(weight) / common;
                total
            })
            .collect();
        Self { ends, total, stride: stride(total) }
    }

    /// The member of a sequence number; `None` where every weight is 0.
    #[must_use]
    pub fn choose(&self, sequence: u64) -> Option<usize> {
        if self.total == 0 {
            return None;
        }
        // A stride without a common factor with the total visits each position once per cycle.
        let position = u128::from(sequence % self.total) * u128::from(self.stride) % u128::from(self.total);
        self.ends.iter().position(|&end| position < u128::from(end))
    }

    /// Over this many numbers in a row every member gets exactly its share.
    #[must_use]
    pub fn cycle(&self) -> u64 {
        self.total
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Candidates for a stride on either side of the golden ratio.
const STRIDE_CANDIDATES: u64 = 128;

/// A number near `total / golden ratio` that shares no factor with `total` and is as hard as possible to
/// approximate by a fraction with a small denominator: where such a fraction is close, numbers that far apart
/// land next to each other, and a small share comes in clusters.
fn stride(total: u64) -> u64 {
    // 0.618... as a fraction of 2^32; totals stay below 2^40 for up to 256 weights of 32 bits.
    let golden = ((u128::from(total) * 2_654_435_769) >> 32) as u64;
    let (from, to) =
        (golden.saturating_sub(STRIDE_CANDIDATES).max(1), (golden + STRIDE_CANDIDATES).min(total));
    let coprime = (from..to).filter(|&candidate| greatest_common_divisor(candidate, total) == 1);
    coprime
        .min_by_key(|&candidate| (largest_quotient(total, candidate), candidate.abs_diff(golden)))
        .unwrap_or(1)
}

/// The largest number in the continued fraction of `a / b`; the golden ratio has only ones.
fn largest_quotient(mut a: u64, mut b: u64) -> u64 {
    let mut largest = 0;
    while b != 0 {
        largest = largest.max(a / b);
        (a, b) = (b, a % b);
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(split: &Split, from: u64, length: u64, members: usize) -> Vec<u64> {
        let mut counts = vec![0; members];
        for sequence in from..from + length {
            counts[split.choose(sequence).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn every_cycle_is_exact_from_any_start() {
        let mut rng = fastrand::Rng::with_seed(11);
        for weights in
            [vec![1], vec![90, 10], vec![5, 95], vec![1, 2, 3], vec![7, 0, 13], vec![333, 333, 334]]
        {
            let split = Split::new(&weights);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let factor = total / split.cycle();
            for _ in 0..20 {
                let start = rng.u64(..) >> 8;
                let expected: Vec<u64> = weights.iter().map(|&weight| u64::from(weight) / factor).collect();
                assert_eq!(counts(&split, start, split.cycle(), weights.len()), expected, "{weights:?}");
            }
        }
    }

    #[test]
    fn shares_are_nearly_exact_inside_a_cycle() {
        let split = Split::new(&[5, 95]);
        assert_eq!(split.cycle(), 20);
        let split = Split::new(&[51, 949]);
        for start in 0..1000 {
            let first = counts(&split, start, 100, 2)[0];
            // 5.1 expected; independent draws would give 12 and more somewhere.
            assert!((4..=7).contains(&first), "numbers {start}..{}: {first} of 100", start + 100);
        }
    }

    #[test]
    fn zero_weights_give_no_choice() {
        assert_eq!(Split::new(&[]).choose(3), None);
        assert_eq!(Split::new(&[0, 0]).choose(3), None);
    }

    #[test]
    fn the_largest_weights_do_not_overflow() {
        let split = Split::new(&[u32::MAX, u32::MAX - 1]);
        assert!(split.choose(u64::MAX).is_some());
        assert_eq!(counts(&split, u64::MAX - 1000, 1000, 2).iter().sum::<u64>(), 1000);
    }
}
