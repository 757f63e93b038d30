//! From logits to a token, on the host.
//!
//! Each sequence has its own generator and touches only its own row, so what it draws does not depend on who shares
//! the batch.

use crate::request::{GenerateError, GenerateParams};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cmp::Ordering;
use std::hash::{BuildHasher, RandomState};

/// Candidates that are sorted at first when sampling from the top; grows by eight until they hold enough.
const FIRST_CANDIDATES: usize = 64;

/// How a request wants its tokens chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sampling {
    temperature: f32,
    top_p: f32,
    seed: u64,
    margins: bool,
}

impl From<&GenerateParams> for Sampling {
    fn from(params: &GenerateParams) -> Self {
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            // The standard library keys its hashers from the operating system's randomness.
            seed: params.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8)),
            margins: params.margins,
        }
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    pub(crate) id: u32,
    pub(crate) margin: Option<f32>,
}

/// One sequence's chooser.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    rng: ChaCha12Rng,
    /// Kept between tokens so that sampling allocates once per sequence: pairs of weight and id.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self { sampling, rng: ChaCha12Rng::seed_from_u64(sampling.seed), candidates: Vec::new() }
    }

    /// Chooses from one row of logits.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<Choice, GenerateError> {
        let best = best_two(logits).ok_or(GenerateError::NotFinite)?;
        let id = if self.sampling.temperature > 0.0 { self.draw(logits, best.first) } else { best.id };
        Ok(Choice { id, margin: self.sampling.margins.then_some(best.first - best.second) })
    }

    fn draw(&mut self, logits: &[f32], max: f32) -> u32 {
        let temperature = self.sampling.temperature;
        self.candidates.clear();
        self.candidates
            .extend(logits.iter().zip(0..).map(|(logit, id)| (((logit - max) / temperature).exp(), id)));
        let total: f64 = self.candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
        let (kept, mass) = if self.sampling.top_p < 1.0 {
            self.keep_top(total * f64::from(self.sampling.top_p))
        } else {
            (self.candidates.len(), total)
        };
        // 53 random bits make a uniform number in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = uniform * mass;
        let mut last = self.candidates[0].1;
        for (weight, id) in &self.candidates[..kept] {
            if *weight > 0.0 {
                last = *id;
                left -= f64::from(*weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        last
    }

    /// Moves the fewest best candidates that together weigh at least `wanted` to the front, best first and lower ids
    /// first among equals. Gives how many they are and what they weigh.
    fn keep_top(&mut self, wanted: f64) -> (usize, f64) {
        let best_first =
            |a: &(f32, u32), b: &(f32, u32)| -> Ordering { b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)) };
        let all = self.candidates.len();
        let mut sorted = FIRST_CANDIDATES.min(all);
        loop {
            if sorted < all {
                self.candidates.select_nth_unstable_by(sorted - 1, best_first);
            }
            self.candidates[..sorted].sort_unstable_by(best_first);
            let mut mass = 0.0;
            for (index, (weight, _)) in self.candidates[..sorted].iter().enumerate() {
                mass += f64::from(*weight);
                if mass >= wanted {
                    return (index + 1, mass);
                }
            }
            if sorted == all {
                return (all, mass);
            }
            sorted = (sorted * 8).min(all);
        }
    }
}

/// The best logit with the lowest id that has it, and the second best.
struct BestTwo {
    id: u32,
    first: f32,
    second: f32,
}

/// `None` when a logit is not finite or there are none.
fn best_two(logits: &[f32]) -> Option<BestTwo> {
    let mut best = BestTwo { id: 0, first: f32::NEG_INFINITY, second: f32::NEG_INFINITY };
    let mut finite = !logits.is_empty();
    for (logit, id) in logits.iter().zip(0..) {
        finite &= logit.is_finite();
        if *logit > best.first {
            best = BestTwo { id, first: *logit, second: best.first };
        } else if *logit > best.second {
            best.second = *logit;
        }
    }
    finite.then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, seed, margins: true }
    }

    fn draws(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..count).map(|_| sampler.choose(logits).unwrap().id).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_exact_ties() {
        let choice = Sampler::new(sampling(0.0, 1.0, 0)).choose(&[1.0, 3.0, 2.5, 3.0]).unwrap();
        assert_eq!(choice, Choice { id: 1, margin: Some(0.0) });
        let choice = Sampler::new(sampling(0.0, 1.0, 0)).choose(&[-1.0, -3.0, -2.5]).unwrap();
        assert_eq!(choice, Choice { id: 0, margin: Some(1.5) });
    }

    #[test]
    fn broken_logits_are_an_error() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut sampler = Sampler::new(sampling(1.0, 0.9, 0));
            assert_eq!(sampler.choose(&[0.0, broken, 1.0]), Err(GenerateError::NotFinite));
        }
        assert_eq!(Sampler::new(sampling(0.0, 1.0, 0)).choose(&[]), Err(GenerateError::NotFinite));
    }

    #[test]
    fn the_same_seed_draws_the_same_and_another_seed_does_not() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 50.0).collect();
        let first = draws(sampling(1.0, 0.95, 7), &logits, 50);
        assert_eq!(first, draws(sampling(1.0, 0.95, 7), &logits, 50));
        assert_ne!(first, draws(sampling(1.0, 0.95, 8), &logits, 50));
    }

    #[test]
    fn no_seed_means_a_fresh_one() {
        let params = GenerateParams { temperature: 1.0, ..GenerateParams::greedy("", 1) };
        assert_ne!(Sampling::from(&params).seed, Sampling::from(&params).seed);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0_f32, 1.0, 2.0];
        let count = 20_000;
        let drawn = draws(sampling(2.0, 1.0, 3), &logits, count);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (id, weight) in weights.iter().enumerate() {
            let share = drawn.iter().filter(|d| **d as usize == id).count() as f64 / count as f64;
            assert!((share - weight / total).abs() < 0.015, "{id}: {share} against {}", weight / total);
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_the_share() {
        // Shares of about 0.64, 0.24, 0.09, 0.03.
        let logits = [1.0_f32, 0.0, 3.0, 2.0];
        let only = |p| {
            let mut ids = draws(sampling(1.0, p, 1), &logits, 2000);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(only(0.5), [2]);
        assert_eq!(only(0.8), [2, 3]);
        assert_eq!(only(0.95), [0, 2, 3]);
        assert_eq!(only(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn a_flat_row_needs_more_than_the_first_candidates() {
        let mut ids = draws(sampling(1.0, 0.5, 1), &[0.0; 1000], 20_000);
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids, (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn a_tiny_temperature_is_as_good_as_greedy() {
        assert_eq!(draws(sampling(1e-6, 0.9, 1), &[1.0, 5.0, 4.9], 20), [1; 20]);
    }
}
