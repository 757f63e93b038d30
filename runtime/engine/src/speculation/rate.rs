//! How many guesses are worth making, from how often they were right.
//!
//! With a share `p` of right ones, the `k`-th guess is used with probability `p^k`: all before it have to be right too.
//! It costs a row of the model's step and, of a draft model, a step of its own. So the last guess made is the last one
//! whose chance is above what it costs, measured in tokens at the speed that guessing gives.

/// Part that the newest outcome has in the share: about the last sixteen count.
const NEWEST: f64 = 1.0 / 16.0;

/// Tokens without a guess after which one is tried, where guesses were not worth it: texts change.
const TRY_AFTER: u32 = 16;

/// The share of right guesses of one sequence.
#[derive(Debug)]
pub(crate) struct Rate {
    share: f64,
    /// Chance below which a guess is not worth its cost.
    worth: f64,
    most: usize,
    /// Steps without a guess.
    without: u32,
}

impl Rate {
    /// No guesses at all.
    pub(crate) const NEVER: Self = Self { share: 0.0, worth: 1.0, most: 0, without: 0 };

    /// For guesses out of the text: they cost a row, about a tenth of a step of one row, at two to three tokens a step.
    /// Begins with two.
    pub(crate) const fn ngram() -> Self {
        Self { share: 0.6, worth: 0.25, most: 7, without: 0 }
    }

    /// For guesses of a draft model a third to a quarter as large: a step of it and a row cost some 0.35 steps, at 1.5
    /// tokens a step. Begins with three.
    pub(crate) const fn draft() -> Self {
        Self { share: 0.8, worth: 0.5, most: 6, without: 0 }
    }

    /// How many guesses are worth making now.
    pub(crate) fn worth(&mut self) -> usize {
        let mut chance = self.share;
        let mut count = 0;
        while count < self.most && chance >= self.worth {
            count += 1;
            chance *= self.share;
        }
        if count == 0 && self.most > 0 {
            self.without += 1;
            if self.without >= TRY_AFTER {
                self.without = 0;
                return 1;
            }
        }
        count
    }

    /// Takes note of how many of so many guesses were right: all before the first wrong one. What came after that one
    /// says nothing.
    pub(crate) fn note(&mut self, made: usize, right: usize) {
        let outcomes = std::iter::repeat_n(1.0, right).chain((right < made).then_some(0.0));
        for outcome in outcomes {
            self.share += NEWEST * (outcome - self.share);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_grow_with_what_was_right_and_end_with_what_was_wrong() {
        let mut rate = Rate::draft();
        assert_eq!(rate.worth(), 3);
        (0..30).for_each(|_| rate.note(3, 3));
        assert_eq!(rate.worth(), 6);
        (0..30).for_each(|_| rate.note(6, 0));
        let tried: Vec<usize> = (0..32).map(|_| rate.worth()).collect();
        assert_eq!(tried.iter().sum::<usize>(), 2, "one in sixteen: {tried:?}");
        (0..60).for_each(|_| rate.note(1, 1));
        assert!(rate.worth() > 3);
        assert_eq!(Rate::ngram().worth(), 2);
    }

    #[test]
    fn what_was_not_reached_does_not_count() {
        let (mut one, mut many) = (Rate::draft(), Rate::draft());
        one.note(1, 0);
        many.note(5, 0);
        assert!((one.share - many.share).abs() < 1e-12);
        let before = one.share;
        one.note(0, 0);
        assert!((one.share - before).abs() < 1e-12);
    }

    #[test]
    fn never_is_never() {
        let mut rate = Rate::NEVER;
        assert!((0..100).all(|_| rate.worth() == 0));
    }
}
