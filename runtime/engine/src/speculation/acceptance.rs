//! How many draft tokens pay for themselves, from the share that was accepted.
//!
//! With an acceptance rate `p`, the `k`-th draft token is used with probability `p^k`, because all before it
//! have to be accepted as well. It costs a row of the model's step and, with a draft model, a step of that
//! model. So the last draft token is the last one whose probability is above its cost, measured in tokens at
//! the speed of speculation.

/// Weight of the newest outcome in the rate: a running mean of about sixteen.
const NEWEST_WEIGHT: f64 = 1.0 / 16.0;

/// Tokens without a draft after which one is tried again: texts change.
const RETRY_TOKENS: u32 = 16;

/// The acceptance rate of one sequence.
#[derive(Debug)]
pub(crate) struct AcceptanceRate {
    rate: f64,
    /// Probability below which a draft token does not pay for itself.
    break_even: f64,
    max_len: usize,
    /// Steps without a draft.
    skipped: u32,
}

impl AcceptanceRate {
    /// No draft tokens at all.
    pub(crate) const DISABLED: Self = Self { rate: 0.0, break_even: 1.0, max_len: 0, skipped: 0 };

    /// For n-gram drafts: a token costs one row, about a tenth of a step of one row, at two to three tokens a
    /// step. Starts with two tokens.
    pub(crate) const fn ngram() -> Self {
        Self { rate: 0.6, break_even: 0.25, max_len: 7, skipped: 0 }
    }

    /// For a draft model a third to a quarter as large as the model: its step and a row cost some 0.35 steps,
    /// at 1.5 tokens a step. Starts with three tokens.
    pub(crate) const fn draft() -> Self {
        Self { rate: 0.8, break_even: 0.5, max_len: 6, skipped: 0 }
    }

    /// How many draft tokens pay for themselves now.
    pub(crate) fn draft_len(&mut self) -> usize {
        let mut probability = self.rate;
        let mut count = 0;
        while count < self.max_len && probability >= self.break_even {
            count += 1;
            probability *= self.rate;
        }
        if count == 0 && self.max_len > 0 {
            self.skipped += 1;
            if self.skipped >= RETRY_TOKENS {
                self.skipped = 0;
                return 1;
            }
        }
        count
    }

    /// Records that the first `accepted` of `proposed` draft tokens were accepted. The tokens after the first
    /// rejected one carry no information.
    pub(crate) fn record(&mut self, proposed: usize, accepted: usize) {
        let outcomes = std::iter::repeat_n(1.0, accepted).chain((accepted < proposed).then_some(0.0));
        for outcome in outcomes {
            self.rate += NEWEST_WEIGHT * (outcome - self.rate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_grow_with_acceptance_and_stop_with_rejection() {
        let mut rate = AcceptanceRate::draft();
        assert_eq!(rate.draft_len(), 3);
        (0..30).for_each(|_| rate.record(3, 3));
        assert_eq!(rate.draft_len(), 6);
        (0..30).for_each(|_| rate.record(6, 0));
        let tried: Vec<usize> = (0..32).map(|_| rate.draft_len()).collect();
        assert_eq!(tried.iter().sum::<usize>(), 2, "one in sixteen: {tried:?}");
        (0..60).for_each(|_| rate.record(1, 1));
        assert!(rate.draft_len() > 3);
        assert_eq!(AcceptanceRate::ngram().draft_len(), 2);
    }

    #[test]
    fn tokens_after_a_rejected_one_do_not_count() {
        let (mut one, mut many) = (AcceptanceRate::draft(), AcceptanceRate::draft());
        one.record(1, 0);
        many.record(5, 0);
        assert!((one.rate - many.rate).abs() < 1e-12);
        let before = one.rate;
        one.record(0, 0);
        assert!((one.rate - before).abs() < 1e-12);
    }

    #[test]
    fn disabled_speculation_never_drafts() {
        let mut rate = AcceptanceRate::DISABLED;
        assert!((0..100).all(|_| rate.draft_len() == 0));
    }
}
