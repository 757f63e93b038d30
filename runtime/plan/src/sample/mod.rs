//! Choosing a token from a row of logits. This is the reference: every backend chooses the same tokens from
//! the same logits, bit for bit.
//!
//! A row is processed in this order:
//!
//! 1. log probabilities are taken from the model's own row, before anything changes it;
//! 2. biases are added;
//! 3. tokens outside the mask become impossible;
//! 4. the repetition penalty, then the frequency and the presence penalty;
//! 5. the temperature; 0 takes the best token, the lowest id among equals, and ends here;
//! 6. top-k, typical-p, top-p, min-p, each on the tokens that the previous one kept and on their shares;
//! 7. a draw with the random number of the row.
//!
//! Biases and penalties never turn a finite logit into one that is not. So a row that is not finite is always
//! the model's own.

mod candidates;
mod edits;
mod input;
mod scan;

use candidates::{CandidateToken, CandidateTokens, LogitsRow};

pub use candidates::Filters;
pub use edits::{Penalties, TokenCount};
pub use input::{SampleInput, SampleSpec};

/// Largest inverse temperature: a lower temperature is greedy, and no product overflows.
const MAX_INVERSE_TEMPERATURE: f32 = 1e30;

/// Logits between two updates of the lower bound of the best ones.
const FLOOR_BLOCK: usize = 1024;

/// The model's own probabilities for one token, as natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The log probability of the token that was chosen.
    pub logprob: f32,
    /// The most likely tokens with theirs, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct ChosenToken {
    /// Its id.
    pub id: u32,
    /// Best minus second best logit of the model's own row, where [`SampleSpec::margin`] asks for it.
    pub margin: Option<f32>,
    /// Where [`SampleSpec::logprobs`] asks for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a row gives no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleFault {
    /// The model produced a logit that is not finite.
    #[error("the model produced a logit that is not a finite number")]
    NotFinite,
    /// The mask allows no token.
    #[error("the mask allows no token")]
    NothingAllowed,
}

/// The choice from one row.
pub type SampleResult = Result<ChosenToken, SampleFault>;

/// Memory for intermediate results of one row at a time.
#[derive(Debug, Default)]
pub struct SampleScratch {
    row: Vec<f32>,
    sums: Vec<f64>,
    candidates: CandidateTokens,
}

impl SampleScratch {
    /// For rows of a vocabulary of this size.
    #[must_use]
    pub fn with_room_for(vocabulary: usize) -> Self {
        Self {
            row: Vec::with_capacity(vocabulary),
            sums: Vec::with_capacity(scan::sums_of(vocabulary)),
            candidates: CandidateTokens::with_room_for(vocabulary),
        }
    }

    /// Bytes that [`Self::with_room_for`] allocates.
    #[must_use]
    pub const fn bytes_of(vocabulary: usize) -> u64 {
        let row = vocabulary * (size_of::<f32>() + size_of::<CandidateToken>());
        (row + scan::sums_of(vocabulary) * size_of::<f64>()) as u64
    }
}

/// Chooses a token from one row of logits. Inlined, so that a backend can compile it for its processor's
/// instructions; the choice does not depend on them.
///
/// # Errors
/// [`SampleFault`] where a logit is not finite or the mask allows no token.
#[inline(always)]
pub fn choose(logits: &[f32], spec: &SampleSpec<'_>, scratch: &mut SampleScratch) -> SampleResult {
    let best = scan::finite_max(logits).ok_or(SampleFault::NotFinite)?;
    let margin = || spec.margin.then(|| best - scan::second_max(logits, scan::index_of(logits, best)));
    if let Some(id) = biased_best(logits, best, spec) {
        let logprobs = spec.logprobs.map(|count| logprobs(logits, best, id, count));
        return Ok(ChosenToken { id, margin: margin(), logprobs });
    }
    let SampleScratch { row, sums, candidates } = scratch;
    let (row, max) = if spec.changes_logits() {
        row.clear();
        row.extend_from_slice(logits);
        edits::apply(spec, row);
        (row.as_slice(), scan::max(row))
    } else {
        (logits, best)
    };
    // Edits keep every logit finite, so only a mask without any token gives no maximum.
    if !max.is_finite() {
        return Err(SampleFault::NothingAllowed);
    }
    let id = if spec.temperature > 0.0 {
        let scale = spec.temperature.recip().min(MAX_INVERSE_TEMPERATURE);
        if spec.filters.is_empty() {
            id_of(scan::draw(row, max, scale, spec.uniform, sums))
        } else {
            candidates.draw(LogitsRow { logits: row, max, scale }, &spec.filters, spec.uniform)
        }
    } else {
        id_of(scan::index_of(row, max))
    };
    let logprobs = spec.logprobs.map(|count| logprobs(logits, best, id, count));
    Ok(ChosenToken { id, margin: margin(), logprobs })
}

/// Most biases for which [`biased_best`] saves a copy of the row.
const FEW_BIASES: usize = 16;

/// The best token of a row that only a few biases change, without a copy of it: the best of the others is the
/// row's own best, unless a bias changes that. None where it does, or where more is changed.
#[inline(always)]
fn biased_best(logits: &[f32], best: f32, spec: &SampleSpec<'_>) -> Option<u32> {
    let is_few = (1..=FEW_BIASES).contains(&spec.bias.len());
    if !is_few || spec.temperature > 0.0 || spec.mask.is_some() || !spec.penalties.is_empty() {
        return None;
    }
    let first = id_of(scan::index_of(logits, best));
    if spec.bias.iter().any(|(id, _)| *id == first) {
        return None;
    }
    let mut chosen = (first, best);
    for (id, _) in spec.bias {
        let Some(logit) = logits.get(*id as usize) else { continue };
        let own = spec.bias.iter().filter(|(other, _)| other == id);
        let biased = own.fold(*logit, |logit, (_, bias)| edits::biased(logit, *bias));
        // Of equal ones the lowest id is chosen.
        if biased > chosen.1 || (biased == chosen.1 && *id < chosen.0) {
            chosen = (*id, biased);
        }
    }
    Some(chosen.0)
}

/// Ids are indices of a vocabulary, which has fewer than 2^32 entries.
fn id_of(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// The model's own log probabilities of the chosen token and of the `count` best, lower ids first among
/// equals.
#[inline(always)]
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

#[cfg(test)]
mod tests;
