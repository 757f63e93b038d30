//! Divides a route's requests between its revisions, exactly.
//!
//! Each request draws a ticket from a counter, and the ticket alone decides. Over any run of as many requests as
//! the weights add up to (after dividing by their common factor), every revision gets precisely its weight: a 5 %
//! step is 5 of 100, never "about 5". Inside such a run the tickets are spread by a stride close to the golden
//! ratio, so that the shares are near right after a few requests too, instead of coming in blocks.

/// The weights of one route, ready to be drawn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Upper end (exclusive) of each member's part of `0..total`.
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

    /// The member that a ticket falls to; `None` where every weight is 0.
    #[must_use]
    pub fn choose(&self, ticket: u64) -> Option<usize> {
        if self.total == 0 {
            return None;
        }
        // A stride without a common factor with the total visits each place once per cycle.
        let place = u128::from(ticket % self.total) * u128::from(self.stride) % u128::from(self.total);
        self.ends.iter().position(|&end| place < u128::from(end))
    }

    /// After this many tickets in a row every member has had exactly its share.
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

/// A number near `total / golden ratio` that shares no factor with `total` and is as hard as possible to approximate
/// by a fraction with a small denominator: where such a fraction is close, tickets that far apart fall beside each
/// other, and a small share comes in clumps.
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
    use crate::dice::Dice;

    fn counts(split: &Split, from: u64, tickets: u64, members: usize) -> Vec<u64> {
        let mut counts = vec![0; members];
        for ticket in from..from + tickets {
            counts[split.choose(ticket).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn every_cycle_is_exact_wherever_it_starts() {
        let dice = Dice::seeded(11);
        for weights in
            [vec![1], vec![90, 10], vec![5, 95], vec![1, 2, 3], vec![7, 0, 13], vec![333, 333, 334]]
        {
            let split = Split::new(&weights);
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let factor = total / split.cycle();
            for _ in 0..20 {
                let start = dice.roll() >> 8;
                let expected: Vec<u64> = weights.iter().map(|&weight| u64::from(weight) / factor).collect();
                assert_eq!(counts(&split, start, split.cycle(), weights.len()), expected, "{weights:?}");
            }
        }
    }

    #[test]
    fn shares_are_near_right_long_before_a_cycle_ends() {
        let split = Split::new(&[5, 95]);
        assert_eq!(split.cycle(), 20);
        let split = Split::new(&[51, 949]);
        for start in 0..1000 {
            let first = counts(&split, start, 100, 2)[0];
            // 5.1 expected; independent draws would give 12 and more somewhere.
            assert!((4..=7).contains(&first), "tickets {start}..{}: {first} of 100", start + 100);
        }
    }

    #[test]
    fn no_weight_no_choice() {
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
