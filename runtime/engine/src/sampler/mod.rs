//! From logits to a token, on the host.
//!
//! Each sequence has its own sampler and touches only its own row, so what it draws does not depend on who shares the
//! batch. A row goes through, in this order:
//!
//! 1. `logprobs` are taken from the model's own row, before anything changes it;
//! 2. `logit_bias` is added;
//! 3. the grammar's mask: what it does not allow becomes impossible;
//! 4. `repetition_penalty` (over prompt and answer), then `frequency_penalty` and `presence_penalty` (over the answer);
//! 5. `temperature`; 0 takes the best token, the lowest id among equals, and ends here;
//! 6. `top_k`, `typical_p`, `top_p`, `min_p`, each over what the one before left, with shares of what was left;
//! 7. a draw.
//!
//! vLLM has this order too, save that it takes min-p before top-k. llama.cpp penalises, then top-k, typical, top-p
//! and min-p, and applies the temperature last: there the cuts do not depend on it.
//!
//! To verify a draft, choose from its rows one after the other for as long as the choices equal the draft. A draft is
//! then accepted with exactly the probability that the model gives it, and since one random number is spent for each
//! token that is produced, the tokens are the same with and without speculation.

mod candidates;
mod edits;
mod scan;

use crate::grammar::Constraint;
use crate::request::{GenerateError, GenerateParams, TokenLogprobs};
use candidates::{Candidates, Cuts, Row};
use edits::Edits;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::hash::{BuildHasher, RandomState};

/// Largest inverse temperature: what is colder is greedy, and nothing becomes infinite.
const COLDEST: f32 = 1e30;

/// Space for one row at a time, shared by all sequences of an engine so that it grows with the vocabulary and not
/// with the batch.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    row: Vec<f32>,
    sums: Vec<f64>,
    candidates: Candidates,
}

impl Scratch {
    /// With room for rows of a vocabulary of this size.
    pub(crate) fn with_room_for(vocabulary: usize) -> Self {
        Self {
            row: Vec::with_capacity(vocabulary),
            sums: Vec::new(),
            candidates: Candidates::with_room_for(vocabulary),
        }
    }
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Choice {
    pub(crate) id: u32,
    pub(crate) margin: Option<f32>,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Whether the grammar is complete with this token, so that nothing may follow.
    pub(crate) complete: bool,
}

/// One sequence's chooser.
#[derive(Debug)]
pub(crate) struct Sampler {
    temperature: f32,
    cuts: Cuts,
    edits: Edits,
    constraint: Option<Constraint>,
    logprobs: Option<usize>,
    margins: bool,
    rng: ChaCha12Rng,
}

impl Sampler {
    pub(crate) fn new(params: &GenerateParams, prompt: &[u32], constraint: Option<Constraint>) -> Self {
        // The standard library keys its hashers from the operating system's randomness.
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8));
        Self {
            temperature: params.temperature,
            cuts: Cuts {
                top_k: params.top_k,
                typical_p: params.typical_p,
                top_p: params.top_p,
                min_p: params.min_p,
            },
            edits: Edits::new(params, prompt),
            constraint,
            logprobs: params.logprobs,
            margins: params.margins,
            rng: ChaCha12Rng::seed_from_u64(seed),
        }
    }

    /// Works out what the grammar allows next, which [`Sampler::choose`] does otherwise: for the time in which a
    /// device computes.
    pub(crate) fn prepare(&mut self) {
        if let Some(constraint) = &mut self.constraint {
            constraint.prepare();
        }
    }

    /// Chooses from one row of logits and takes note of the choice. The margin is that of the model's own row.
    pub(crate) fn choose(&mut self, logits: &[f32], scratch: &mut Scratch) -> Result<Choice, GenerateError> {
        let best = scan::finite_max(logits).ok_or(GenerateError::NotFinite)?;
        let Scratch { row, sums, candidates } = scratch;
        let edited = if self.edits.none() && self.constraint.is_none() {
            None
        } else {
            row.clear();
            row.extend_from_slice(logits);
            let mask = self.constraint.as_mut().map(Constraint::mask).transpose()?;
            self.edits.apply(row, mask);
            Some(scan::max(row))
        };
        let (row, max) = match edited {
            Some(max) if max.is_finite() => (row.as_slice(), max),
            Some(_) => return Err(GenerateError::NotFinite),
            None => (logits, best),
        };
        let id = if self.temperature > 0.0 {
            let row = Row { logits: row, max, scale: self.temperature.recip().min(COLDEST) };
            // 53 random bits make a uniform number in [0, 1).
            let uniform = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
            if self.cuts.none() {
                id_of(scan::draw(row.logits, row.max, row.scale, uniform, sums))
            } else {
                candidates.draw(row, &self.cuts, uniform)
            }
        } else {
            id_of(scan::first(row, max))
        };
        self.edits.produced(id);
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(id)?,
            None => false,
        };
        let margin = self.margins.then(|| best - scan::second(logits, scan::first(logits, best)));
        let logprobs = self.logprobs.map(|count| logprobs(logits, best, id, count));
        Ok(Choice { id, margin, logprobs, complete })
    }
}

/// The best token of a row, the lowest id among equals; none where a logit is no number.
pub(crate) fn best(logits: &[f32]) -> Option<u32> {
    scan::finite_max(logits).map(|max| id_of(scan::first(logits, max)))
}

/// Ids are indices of a vocabulary, which has fewer than 2^32 entries.
fn id_of(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// What the model itself gives the chosen token and the `count` best, best first and lower ids first among equals.
fn logprobs(logits: &[f32], max: f32, id: u32, count: usize) -> TokenLogprobs {
    #[expect(clippy::cast_possible_truncation, reason = "a log of a mass of a vocabulary fits")]
    let norm = max + scan::mass(logits, max, 1.0).ln() as f32;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    // Whoever is among the best is above the `count`-th of any part; the first block's is a floor for the rest.
    let mut floor = f32::NEG_INFINITY;
    for (block, start) in logits.chunks(FLOOR_BLOCK).zip((0..).step_by(FLOOR_BLOCK)) {
        scan::at_least(block, floor, |index, logit| {
            if count > 0 && (top.len() < count || top.last().is_some_and(|last| logit > last.1)) {
                let place = top.partition_point(|better| better.1 >= logit);
                top.insert(place, (id_of(start + index), logit));
                top.truncate(count);
            }
        });
        if top.len() == count {
            floor = top.last().map_or(f32::INFINITY, |last| last.1);
        }
    }
    for (_, logit) in &mut top {
        *logit -= norm;
    }
    TokenLogprobs { logprob: logits[id as usize] - norm, top }
}

/// Logits between two looks at how far the best have come.
const FLOOR_BLOCK: usize = 1024;

#[cfg(test)]
mod tests;
