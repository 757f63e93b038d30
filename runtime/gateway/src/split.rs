//! Divides a route's requests between its revisions, exactly.
//!
//! Each request takes a sequence number from a counter, and the number alone decides. Over any run of as many
//! requests as the weights add up to (after division by their common factor), every revision gets exactly its
//! weight: a 5 % step is 5 of 100, never "about 5". Inside such a run a stride close to the golden ratio
//! distributes the numbers, so that the shares are nearly exact after a few requests too, instead of coming
//! in blocks.
//!
//! Where a route is split by user, the user alone decides: a salted hash gives one of 10,000 buckets, and the
//! table says who owns the bucket.

use sha2::{Digest, Sha256};
use trustformers_proto::buckets::BUCKETS;

/// The bucket of a user. The salt makes the buckets of one split independent of those of another.
#[must_use]
pub fn bucket_of(salt: &str, user: &[u8]) -> u16 {
    let mut hash = Sha256::new();
    // The length in front keeps a salt and a user apart.
    hash.update((salt.len() as u64).to_be_bytes());
    hash.update(salt.as_bytes());
    hash.update(user);
    let digest = hash.finalize();
    let first = digest.iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte));
    // Of 2^64 values some buckets get one more than others: a difference of one in 10^15.
    (first % u64::from(BUCKETS)) as u16
}

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
    fn every_prefix_is_within_one_and_a_half_of_its_share() {
        for weights in [vec![90_u32, 10], vec![50, 50], vec![95, 5], vec![1, 99]] {
            let split = Split::new(&weights);
            let total = f64::from(weights.iter().sum::<u32>());
            let mut counts = vec![0.0; weights.len()];
            for sequence in 0..2000_u64 {
                counts[split.choose(sequence).unwrap()] += 1.0;
                for (count, &weight) in counts.iter().zip(&weights) {
                    let expected = (sequence + 1) as f64 * f64::from(weight) / total;
                    let off: f64 = count - expected;
                    assert!(off.abs() < 1.5, "{weights:?} after {}: {off}", sequence + 1);
                }
            }
        }
    }

    #[test]
    fn users_are_shared_by_the_weights_and_only_those_that_must_move_do() {
        use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
        let weights = |control: u32, treatment: u32| {
            [("control", control), ("treatment", treatment)]
                .map(|(revision, weight)| RevisionWeight { revision: revision.into(), weight })
        };
        let users: Vec<u16> =
            (0..40_000).map(|user| bucket_of("salt", format!("user-{user}").as_bytes())).collect();
        let share = |owners: &BucketOwners| {
            let of_treatment = users.iter().filter(|&&bucket| owners.owner(bucket) == Some("treatment"));
            of_treatment.count() as f64 / users.len() as f64
        };
        let mut owners = BucketOwners::with_weights(&weights(90, 10)).unwrap();
        assert!((share(&owners) - 0.1).abs() < 0.005, "{}", share(&owners));
        for treatment in [20, 50, 100] {
            let next = owners.changed_to(&weights(100 - treatment, treatment)).unwrap();
            for &bucket in &users {
                let (before, after) = (owners.owner(bucket), next.owner(bucket));
                assert!(before == after || after == Some("treatment"), "bucket {bucket} flipped back");
            }
            let expected = f64::from(treatment) / 100.0;
            assert!((share(&next) - expected).abs() < 0.01, "{} at {treatment}", share(&next));
            owners = next;
        }
        // Another salt distributes them anew.
        let same = (0..40_000)
            .filter(|user| bucket_of("other", format!("user-{user}").as_bytes()) == users[*user as usize]);
        assert!(same.count() < 30);
    }

    #[test]
    fn of_100_000_users_exactly_those_of_the_tenth_that_must_move_move() {
        use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
        let weights = |control: u32, treatment: u32| {
            [("control", control), ("treatment", treatment)]
                .map(|(revision, weight)| RevisionWeight { revision: revision.into(), weight })
        };
        let before = BucketOwners::with_weights(&weights(90, 10)).unwrap();
        let after = before.changed_to(&weights(80, 20)).unwrap();
        let moves = |bucket: u16| before.owner(bucket) != after.owner(bucket);
        assert_eq!((0..BUCKETS).filter(|&bucket| moves(bucket)).count(), 1000, "a tenth of the buckets");
        let users = (0..100_000).map(|user| bucket_of("salt", format!("user-{user}").as_bytes()));
        let moved: Vec<u16> = users.filter(|&bucket| moves(bucket)).collect();
        // 10,000 expected; five standard deviations are 475.
        assert!((9525..=10_475).contains(&moved.len()), "{} users moved", moved.len());
        for bucket in moved {
            let owners = (before.owner(bucket), after.owner(bucket));
            assert_eq!(owners, (Some("control"), Some("treatment")), "bucket {bucket}");
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
