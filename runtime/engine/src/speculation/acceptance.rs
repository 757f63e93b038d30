//! How many draft tokens one sequence should get, from the share that was accepted and from what steps cost.
//!
//! With an acceptance rate `p`, the `k`-th draft token is used with probability `p^k`, because all before it
//! have to be accepted as well. So a step with `k` draft tokens gives `1 + p + ... + p^k` tokens, and costs
//! as many plain steps as [`super::costs`] has measured. The best `k` has the most tokens for its cost.

use super::costs::DraftOffer;

/// Weight of the newest outcome in the rate: a running mean of about sixteen.
const NEWEST_WEIGHT: f64 = 1.0 / 16.0;

/// Tokens without a draft after which one is tried again: texts change.
const RETRY_TOKENS: u32 = 16;

/// Tokens per time, as a multiple of plain decoding, from which on draft tokens are worth it. Below, what was
/// measured does not say whether they gain or lose.
pub(super) const MIN_GAIN: f64 = 1.02;

/// The acceptance rate of one sequence.
#[derive(Debug)]
pub(crate) struct AcceptanceRate {
    rate: f64,
    max_len: usize,
    /// Tokens without a draft after which none is tried any more.
    max_pause: Option<u32>,
    /// Steps without a draft.
    skipped: u32,
}

impl AcceptanceRate {
    /// No draft tokens at all.
    pub(crate) const DISABLED: Self = Self { rate: 0.0, max_len: 0, max_pause: None, skipped: 0 };

    /// Of a new sequence, which is expected to be like those before it. A draft model would have to read all
    /// tokens of a pause, so it has a `max_pause`.
    pub(crate) const fn new(expected: f64, max_len: usize, max_pause: Option<u32>) -> Self {
        Self { rate: expected, max_len, max_pause, skipped: 0 }
    }

    /// How many draft tokens pay for themselves now.
    pub(crate) fn draft_len(&mut self, offer: &DraftOffer) -> usize {
        if self.max_len == 0 || self.max_pause.is_some_and(|most| self.skipped >= most) {
            return 0;
        }
        let count = if offer.affordable { self.best_len(self.rate, offer) } else { 0 };
        if count > 0 {
            self.skipped = 0;
            return count;
        }
        self.skipped = self.skipped.saturating_add(1);
        // Tried again only where it would pay if all tokens were accepted.
        let retries = offer.affordable && self.skipped.is_multiple_of(RETRY_TOKENS);
        if !retries || self.best_len(1.0, offer) == 0 {
            return 0;
        }
        self.skipped = 0;
        1
    }

    /// The number of draft tokens with the most tokens for its cost, 0 where none gains.
    fn best_len(&self, rate: f64, offer: &DraftOffer) -> usize {
        let (mut best, mut best_gain) = (0, MIN_GAIN);
        let (mut probability, mut tokens) = (1.0, 1.0);
        for (count, cost) in (1..=self.max_len).zip(offer.costs()) {
            probability *= rate;
            tokens += probability;
            if tokens / cost > best_gain {
                (best, best_gain) = (count, tokens / cost);
            }
        }
        best
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
    use crate::config::SpeculationCosts;
    use crate::speculation::costs::{Expected, StepCosts};

    const EXPECTED: Expected = Expected { acceptance: 0.8, draft_step: 0.2 };

    /// With a cheap row and a draft step of a quarter.
    fn offer() -> DraftOffer {
        StepCosts::new(SpeculationCosts::Assumed { row: 0.05, draft_step: 0.2 }, EXPECTED).offer(1)
    }

    #[test]
    fn drafts_grow_with_acceptance_and_stop_with_rejection() {
        let mut rate = AcceptanceRate::new(0.8, 6, None);
        let first = rate.draft_len(&offer());
        assert!((1..6).contains(&first), "{first}");
        (0..60).for_each(|_| rate.record(3, 3));
        assert_eq!(rate.draft_len(&offer()), 6);
        (0..60).for_each(|_| rate.record(6, 0));
        let tried: Vec<usize> = (0..32).map(|_| rate.draft_len(&offer())).collect();
        assert_eq!(tried.iter().sum::<usize>(), 2, "one in sixteen: {tried:?}");
        (0..60).for_each(|_| rate.record(1, 1));
        assert!(rate.draft_len(&offer()) > 3);
    }

    #[test]
    fn dear_rows_are_not_even_tried() {
        let dear = StepCosts::new(SpeculationCosts::Assumed { row: 0.6, draft_step: 0.5 }, EXPECTED).offer(1);
        let mut rate = AcceptanceRate::new(0.95, 6, None);
        assert!((0..100).all(|_| rate.draft_len(&dear) == 0));
    }

    #[test]
    fn tokens_after_a_rejected_one_do_not_count() {
        let (mut one, mut many) = (AcceptanceRate::new(0.8, 6, None), AcceptanceRate::new(0.8, 6, None));
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
        assert!((0..100).all(|_| rate.draft_len(&offer()) == 0));
    }
}
