//! Sampling: from logits to a token, on the host.
//!
//! Each sequence has its own sampler, which reads only its own row, so that a draw does not depend on the
//! rest of the batch. A row is processed in this order:
//!
//! 1. `logprobs` are taken from the model's own row, before anything changes it;
//! 2. `logit_bias` is added;
//! 3. the grammar's mask: tokens that it does not allow become impossible;
//! 4. `repetition_penalty` (over prompt and answer), then `frequency_penalty` and `presence_penalty` (over
//!    the answer);
//! 5. `temperature`; 0 takes the best token, the lowest id among equals, and ends here;
//! 6. `top_k`, `typical_p`, `top_p`, `min_p`, each on the tokens that the previous one kept and on their
//!    shares;
//! 7. a draw.
//!
//! vLLM uses this order too, except that it applies min-p before top-k. llama.cpp applies penalties, then
//! top-k, typical, top-p and min-p, and the temperature last: its filters do not depend on the temperature.
//!
//! Bias and penalties never turn a finite logit into one that is not: their ranges are checked, and their
//! results are limited to finite numbers. So a row that is not finite is always the model's own, and a
//! [`ModelFault`].
//!
//! To verify draft tokens, choose from their rows in order, for as long as each choice equals the draft
//! token. A draft token is then accepted with exactly the probability that the model gives it. Since each
//! token that is produced uses one random number, the tokens are the same with and without speculation.

mod candidates;
mod edits;
mod scan;

use crate::faults::{ModelFault, RequestFault};
use crate::grammar::Constraint;
use crate::request::{GenerateError, GenerateParams, TokenLogprobs};
use candidates::{CandidateTokens, Filters, LogitsRow};
use edits::Edits;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::hash::{BuildHasher, RandomState};

/// Largest inverse temperature: a lower temperature is greedy, and no product overflows.
const MAX_INVERSE_TEMPERATURE: f32 = 1e30;

/// Scratch space for one row at a time, shared by all sequences of an engine, so that it does not grow with
/// the batch.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    row: Vec<f32>,
    sums: Vec<f64>,
    candidates: CandidateTokens,
}

impl Scratch {
    /// For rows of a vocabulary of this size.
    pub(crate) fn with_room_for(vocabulary: usize) -> Self {
        Self {
            row: Vec::with_capacity(vocabulary),
            sums: Vec::new(),
            candidates: CandidateTokens::with_room_for(vocabulary),
        }
    }
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Choice {
    pub(crate) id: u32,
    pub(crate) margin: Option<f32>,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Whether this token completes the grammar, so that nothing may follow.
    pub(crate) complete: bool,
}

/// The sampler of one sequence.
#[derive(Debug)]
pub(crate) struct Sampler {
    temperature: f32,
    filters: Filters,
    edits: Edits,
    constraint: Option<Constraint>,
    logprobs: Option<usize>,
    margins: bool,
    rng: ChaCha12Rng,
}

impl Sampler {
    pub(crate) fn new(params: &GenerateParams, prompt: &[u32], constraint: Option<Constraint>) -> Self {
        // The standard library keys its hashers with random numbers of the operating system.
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8));
        Self {
            temperature: params.temperature,
            filters: Filters {
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

    /// Makes these tokens impossible.
    pub(crate) fn exclude(&mut self, ids: &[u32]) {
        self.edits.exclude(ids);
    }

    /// Computes the next mask of the grammar, which [`Sampler::choose`] does otherwise; called while the
    /// device computes.
    pub(crate) fn prepare(&mut self) {
        if let Some(constraint) = &mut self.constraint {
            constraint.prepare();
        }
    }

    /// Chooses a token from one row of logits, and records it. The margin is that of the model's own row.
    pub(crate) fn choose(&mut self, logits: &[f32], scratch: &mut Scratch) -> Result<Choice, GenerateError> {
        let best = scan::finite_max(logits).ok_or(ModelFault::NotFinite)?;
        let Scratch { row, sums, candidates } = scratch;
        let edited = if self.edits.is_empty() && self.constraint.is_none() {
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
            // Edits keep every logit finite, so only a mask without any token gives no maximum.
            Some(_) => {
                let message = "no token of the model can continue it".to_owned();
                return Err(RequestFault::Grammar { message }.into());
            }
            None => (logits, best),
        };
        let id = if self.temperature > 0.0 {
            let row =
                LogitsRow { logits: row, max, scale: self.temperature.recip().min(MAX_INVERSE_TEMPERATURE) };
            // 53 random bits make a uniform number in [0, 1).
            let uniform = (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
            if self.filters.is_empty() {
                id_of(scan::draw(row.logits, row.max, row.scale, uniform, sums))
            } else {
                candidates.draw(row, &self.filters, uniform)
            }
        } else {
            id_of(scan::index_of(row, max))
        };
        self.edits.record(id);
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(id)?,
            None => false,
        };
        let margin = self.margins.then(|| best - scan::second_max(logits, scan::index_of(logits, best)));
        let logprobs = self.logprobs.map(|count| logprobs(logits, best, id, count));
        Ok(Choice { id, margin, logprobs, complete })
    }
}

/// The best token of a row, the lowest id among equals; `None` where a logit is not finite.
pub(crate) fn best(logits: &[f32]) -> Option<u32> {
    scan::finite_max(logits).map(|max| id_of(scan::index_of(logits, max)))
}

/// Ids are indices of a vocabulary, which has fewer than 2^32 entries.
fn id_of(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// The model's own log probabilities of the chosen token and of the `count` best, lower ids first among
/// equals.
fn logprobs(logits: &[f32], max: f32, id: u32, count: usize) -> TokenLogprobs {
    #[expect(clippy::cast_possible_truncation, reason = "the logarithm of a mass is a small number")]
    let norm = max + scan::mass(logits, max, 1.0).ln() as f32;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    // The `count`-th best of the first blocks is a lower bound for the best of the rest.
    let mut floor = f32::NEG_INFINITY;
    for (block, start) in logits.chunks(FLOOR_BLOCK).zip((0..).step_by(FLOOR_BLOCK)) {
        scan::at_least(block, floor, |index, logit| {
            if count > 0 && (top.len() < count || top.last().is_some_and(|last| logit > last.1)) {
                let at = top.partition_point(|better| better.1 >= logit);
                top.insert(at, (id_of(start + index), logit));
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

/// Logits between two updates of the lower bound.
const FLOOR_BLOCK: usize = 1024;

#[cfg(test)]
mod tests;
