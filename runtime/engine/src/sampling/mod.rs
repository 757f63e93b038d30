//! Sampling: how the next tokens of a sequence are to be chosen, and what is recorded of each choice.
//!
//! The device chooses ([`trustformers_plan::sample`] says how, in which order). Each sequence has its own
//! sampler, which describes only rows of that sequence, so that a choice does not depend on the rest of the
//! batch. vLLM uses the same order of edits and filters, except that it applies min-p before top-k.
//! llama.cpp applies penalties, then top-k, typical, top-p and min-p, and the temperature last: its filters
//! do not depend on the temperature.
//!
//! Bias and penalties never turn a finite logit into one that is not: their ranges are checked, and their
//! results are limited to finite numbers. So a row that is not finite is always the model's own, and a
//! [`ModelFault`].
//!
//! The rows of draft tokens are described as if all draft tokens before them were chosen. The choices count
//! in order, for as long as each equals the draft token. A draft token is then accepted with exactly the
//! probability that the model gives it. Each token that is produced uses one random number, and numbers that
//! were drawn for rows that do not count are used again, so the tokens are the same with and without
//! speculation.

mod edits;

use crate::faults::{ModelFault, RequestFault};
use crate::grammar::Constraint;
use crate::request::{GenerateError, GenerateParams};
use edits::Edits;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use trustformers_plan::{Filters, SampleFault, SampleInput, SampleResult, SampleSpec, TokenLogprobs};

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
    /// Random numbers that were drawn and belong to no produced token yet, the next one first.
    uniforms: VecDeque<f64>,
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
            uniforms: VecDeque::new(),
        }
    }

    /// Makes these tokens impossible.
    pub(crate) fn exclude(&mut self, ids: &[u32]) {
        self.edits.exclude(ids);
    }

    /// Describes how the next token is chosen, from the row of logits `first_row`, and the tokens after each
    /// of the draft tokens, from the rows after it. Stops before the first row that cannot count because the
    /// grammar forbids the draft token.
    ///
    /// # Errors
    /// The grammar cannot go on.
    pub(crate) fn push_rows(
        &mut self,
        first_row: usize,
        draft: &[u32],
        input: &mut SampleInput,
    ) -> Result<(), GenerateError> {
        let Self { temperature, filters, edits, constraint, logprobs, margins, rng, uniforms } = self;
        let mut index = 0;
        let push = |mask: Option<&[u32]>| {
            if *temperature > 0.0 && uniforms.len() <= index {
                // 53 random bits make a uniform number in [0, 1).
                uniforms.push_back((rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64);
            }
            input.push(&SampleSpec {
                logits_row: first_row + index,
                temperature: *temperature,
                filters: *filters,
                uniform: uniforms.get(index).copied().unwrap_or(0.0),
                bias: &edits.bias,
                mask,
                penalties: edits.penalties,
                counts: &edits.counts,
                drafted: &draft[..index],
                margin: *margins,
                logprobs: *logprobs,
            });
            index += 1;
        };
        match constraint {
            Some(constraint) => constraint.each_mask(draft, push),
            None => {
                let mut push = push;
                (0..=draft.len()).for_each(|_| push(None));
                Ok(())
            }
        }
    }

    /// Records the choice of the next token.
    ///
    /// # Errors
    /// The row is not finite, or the grammar cannot go on.
    pub(crate) fn accept(&mut self, choice: SampleResult) -> Result<Choice, GenerateError> {
        let token = choice.map_err(|fault| match fault {
            SampleFault::NotFinite => GenerateError::from(ModelFault::NotFinite),
            SampleFault::NothingAllowed => {
                let message = "no token of the model can continue it".to_owned();
                RequestFault::Grammar { message }.into()
            }
        })?;
        self.uniforms.pop_front();
        self.edits.record(token.id);
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(token.id)?,
            None => false,
        };
        Ok(Choice { id: token.id, margin: token.margin, logprobs: token.logprobs, complete })
    }
}

#[cfg(test)]
mod tests;
