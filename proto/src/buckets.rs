//! The buckets of a route's users: who owns which, and a change of shares that moves the fewest users.
//!
//! A gateway hashes a user to one of [`BUCKETS`] buckets, and the revision that owns the bucket serves the
//! user. Who owns what comes with the routing table and is kept by the operator. A change of the weights
//! moves exactly the buckets by which some revision has too many; every other user stays.

use std::collections::BTreeMap;

use crate::control::v1::BucketRange;

/// Buckets of one route. A share is exact to 0.01 %.
pub const BUCKETS: u16 = 10_000;

/// A revision and its weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionWeight {
    /// The revision.
    pub revision: String,
    /// Its share, relative to the other weights.
    pub weight: u32,
}

/// Who owns each bucket of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketOwners {
    revisions: Vec<String>,
    /// For each bucket an index into `revisions`.
    owners: Vec<u16>,
}

/// Why ranges can't be read as owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BucketsError {
    /// A range ends before the one in front of it, or behind the last bucket.
    #[error("the bucket ranges are not ascending up to {BUCKETS}: one ends at {end}")]
    Order {
        /// Its end.
        end: u32,
    },
    /// The last range ends too early.
    #[error("the bucket ranges end at {end} instead of {BUCKETS}")]
    Incomplete {
        /// The end of the last one.
        end: u32,
    },
}

impl BucketOwners {
    /// Owners with these shares, in the order of the weights: the first revision owns the first buckets.
    /// `None` where every weight is 0, or there are more than 10,000 revisions.
    #[must_use]
    pub fn with_weights(weights: &[RevisionWeight]) -> Option<Self> {
        let unowned = Self { revisions: Vec::new(), owners: Vec::new() };
        unowned.changed_to(weights)
    }

    /// The same users with other shares: no more buckets move than must. `None` as for
    /// [`BucketOwners::with_weights`].
    #[must_use]
    pub fn changed_to(&self, weights: &[RevisionWeight]) -> Option<Self> {
        if weights.len() > usize::from(BUCKETS) {
            return None;
        }
        let index_of: BTreeMap<&str, usize> =
            weights.iter().enumerate().map(|(index, share)| (share.revision.as_str(), index)).collect();
        let before: Vec<Option<usize>> = (0..usize::from(BUCKETS))
            .map(|bucket| {
                let owner = self.owners.get(bucket)?;
                index_of.get(self.revisions[usize::from(*owner)].as_str()).copied()
            })
            .collect();
        let mut owned = vec![0_usize; weights.len()];
        before.iter().flatten().for_each(|&owner| owned[owner] += 1);
        let targets = targets(weights, &owned)?;
        // The highest buckets of a revision move, so that ranges stay few.
        let mut surplus: Vec<usize> =
            owned.iter().zip(&targets).map(|(owned, target)| owned.saturating_sub(*target)).collect();
        let mut owners = before;
        for owner in owners.iter_mut().rev() {
            if let Some(index) = *owner
                && surplus[index] > 0
            {
                surplus[index] -= 1;
                *owner = None;
            }
        }
        let shortage = targets.iter().zip(&owned).map(|(target, owned)| target.saturating_sub(*owned));
        let mut missing = shortage.enumerate().flat_map(|(index, count)| std::iter::repeat_n(index, count));
        let owners = owners
            .into_iter()
            .map(|owner| owner.or_else(|| missing.next()).and_then(|index| u16::try_from(index).ok()))
            .collect::<Option<Vec<u16>>>()?;
        let revisions = weights.iter().map(|share| share.revision.clone()).collect();
        Some(Self { revisions, owners })
    }

    /// The revision that owns a bucket; `None` for a number that is no bucket.
    #[must_use]
    pub fn owner(&self, bucket: u16) -> Option<&str> {
        let owner = self.owners.get(usize::from(bucket))?;
        Some(&self.revisions[usize::from(*owner)])
    }

    /// The owners as a table carries them.
    #[must_use]
    pub fn to_ranges(&self) -> Vec<BucketRange> {
        let mut ranges: Vec<BucketRange> = Vec::new();
        let mut last = None;
        for (end, owner) in (1..).zip(&self.owners) {
            if last == Some(owner)
                && let Some(range) = ranges.last_mut()
            {
                range.end = end;
            } else {
                ranges.push(BucketRange { end, revision: self.revisions[usize::from(*owner)].clone() });
            }
            last = Some(owner);
        }
        ranges
    }

    /// Reads what a table carries.
    ///
    /// # Errors
    /// The ranges do not cover every bucket once.
    pub fn of_ranges(ranges: &[BucketRange]) -> Result<Self, BucketsError> {
        let mut revisions: Vec<String> = Vec::new();
        let mut owners: Vec<u16> = Vec::with_capacity(usize::from(BUCKETS));
        for range in ranges {
            let end = range.end as usize;
            if end <= owners.len() || end > usize::from(BUCKETS) {
                return Err(BucketsError::Order { end: range.end });
            }
            let existing = revisions.iter().position(|revision| *revision == range.revision);
            let index = existing.unwrap_or_else(|| {
                revisions.push(range.revision.clone());
                revisions.len() - 1
            });
            // Each range has a bucket of its own, so that there are no more than 10,000 revisions.
            owners.resize(end, u16::try_from(index).unwrap_or(u16::MAX));
        }
        if owners.len() < usize::from(BUCKETS) {
            return Err(BucketsError::Incomplete { end: u32::try_from(owners.len()).unwrap_or(u32::MAX) });
        }
        Ok(Self { revisions, owners })
    }
}

/// How many buckets each revision gets: its share rounded down, and one more for those with the largest rest.
/// Of equal rests the revision that has the bucket already gets it, so that none moves for a rounding.
fn targets(weights: &[RevisionWeight], owned: &[usize]) -> Option<Vec<usize>> {
    let total: u64 = weights.iter().map(|share| u64::from(share.weight)).sum();
    if total == 0 {
        return None;
    }
    let scaled: Vec<u64> = weights.iter().map(|share| u64::from(share.weight) * u64::from(BUCKETS)).collect();
    let mut targets: Vec<usize> =
        scaled.iter().map(|share| usize::try_from(share / total).unwrap_or(0)).collect();
    let missing = usize::from(BUCKETS).saturating_sub(targets.iter().sum());
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&index| {
        let has_one_more = owned[index] > targets[index];
        (std::cmp::Reverse(scaled[index] % total), !has_one_more, index)
    });
    order.into_iter().take(missing).for_each(|index| targets[index] += 1);
    Some(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(shares: &[(&str, u32)]) -> Vec<RevisionWeight> {
        let share = |&(revision, weight): &(&str, u32)| RevisionWeight { revision: revision.into(), weight };
        shares.iter().map(share).collect()
    }

    fn owners(shares: &[(&str, u32)]) -> BucketOwners {
        BucketOwners::with_weights(&weights(shares)).unwrap()
    }

    fn count(owners: &BucketOwners, revision: &str) -> usize {
        (0..BUCKETS).filter(|&bucket| owners.owner(bucket) == Some(revision)).count()
    }

    fn moved(before: &BucketOwners, after: &BucketOwners) -> usize {
        (0..BUCKETS).filter(|&bucket| before.owner(bucket) != after.owner(bucket)).count()
    }

    #[test]
    fn a_change_moves_exactly_the_buckets_that_must_move() {
        let mut present = owners(&[("a", 90), ("b", 10)]);
        assert_eq!((count(&present, "a"), count(&present, "b")), (9000, 1000));
        for (shares, expected) in [
            (vec![("a", 80), ("b", 20)], 1000),
            // A third one takes from both what each has too much.
            (vec![("a", 60), ("b", 10), ("c", 30)], 3000),
            // The order of the weights says nothing.
            (vec![("c", 30), ("b", 10), ("a", 60)], 0),
            (vec![("a", 60), ("b", 40)], 3000),
            (vec![("b", 100)], 6000),
            (vec![("a", 1), ("b", 1), ("c", 1)], 6666),
            (vec![("a", 50), ("b", 50), ("d", 0)], 3333),
        ] {
            let next = present.changed_to(&weights(&shares)).unwrap();
            assert_eq!(moved(&present, &next), expected, "{shares:?}");
            let total: u32 = shares.iter().map(|(_, weight)| weight).sum();
            for (revision, weight) in &shares {
                let exact = f64::from(*weight) * f64::from(BUCKETS) / f64::from(total);
                assert!((count(&next, revision) as f64 - exact).abs() < 1.0, "{shares:?} {revision}");
            }
            present = next;
        }
    }

    #[test]
    fn a_step_of_a_rollout_moves_users_to_the_candidate_alone() {
        let mut present = owners(&[("old", 95), ("new", 5)]);
        for weight in [10, 25, 50, 75, 100] {
            let next = present.changed_to(&weights(&[("old", 100 - weight), ("new", weight)])).unwrap();
            for bucket in 0..BUCKETS {
                if present.owner(bucket) == Some("new") {
                    assert_eq!(next.owner(bucket), Some("new"), "bucket {bucket} at {weight} %");
                }
            }
            present = next;
        }
    }

    #[test]
    fn ranges_carry_all_of_it_and_wrong_ones_are_refused() {
        let before = owners(&[("a", 60), ("b", 10), ("c", 30)]);
        let after = before.changed_to(&weights(&[("a", 20), ("b", 50), ("c", 30)])).unwrap();
        assert_eq!(moved(&BucketOwners::of_ranges(&after.to_ranges()).unwrap(), &after), 0);
        assert!(after.to_ranges().len() <= 4, "{:?}", after.to_ranges());
        let range = |end| BucketRange { end, revision: "a".into() };
        assert_eq!(
            BucketOwners::of_ranges(&[range(9999)]).unwrap_err(),
            BucketsError::Incomplete { end: 9999 }
        );
        for end in [5, 10_001] {
            let error = BucketOwners::of_ranges(&[range(5), range(end)]).unwrap_err();
            assert_eq!(error, BucketsError::Order { end });
        }
    }

    #[test]
    fn without_a_weight_nobody_owns_a_bucket() {
        assert_eq!(BucketOwners::with_weights(&weights(&[("a", 0)])), None);
        assert_eq!(BucketOwners::with_weights(&[]), None);
    }
}
