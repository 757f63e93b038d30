//! Speculative decoding: draft tokens that one step of the model verifies together.
//!
//! A step of few rows takes about as long as a step of one row, because most of its work is reading the
//! weights. Draft tokens are further rows of their sequence. The sampler then chooses from the rows in order,
//! for as long as its choice equals the draft token (see [`crate::sampling`]). So speculation changes when a
//! token comes, never which one: bit for bit in `exact`, and in `fast` on devices whose rounding does not
//! depend on the number of rows, such as the CPU.
//!
//! Draft tokens come from the sequence's own tokens ([`ngram`]) or from a smaller model ([`draft`]). Their
//! number depends on how many were accepted before ([`acceptance`]), on what they cost ([`costs`]), and on
//! how many sequences share the step.

mod acceptance;
mod costs;
mod draft;
mod ngram;

pub(crate) use costs::{DecodeStep, DraftOffer};
pub(crate) use draft::{DraftFeed, DraftModel, check, check_context};

use crate::config::SpeculationCosts;
use crate::generation::Sequence;
use crate::scheduling::rows::RowDemand;
use acceptance::AcceptanceRate;
use costs::{Expected, StepCosts};
use trustformers_plan::BackendError;

/// Most decode rows of one step, draft tokens included. Up to this number a step's time grows slowly with its
/// rows on every device that was measured (a Zen 5 reads the weights once for four rows); more draft tokens
/// would slow other streams down.
pub(crate) const MAX_VERIFY_ROWS: usize = 8;

const EXPECTED_OF_NGRAMS: Expected = Expected { acceptance: 0.6, draft_step: 0.0 };

/// Of a draft model a third to a quarter as large as the model.
const EXPECTED_OF_MODELS: Expected = Expected { acceptance: 0.8, draft_step: 0.25 };

/// Most draft tokens of one sequence: n-grams cost nothing to propose.
const MAX_NGRAM_TOKENS: usize = MAX_VERIFY_ROWS - 1;
const MAX_DRAFT_TOKENS: usize = MAX_VERIFY_ROWS - 2;

/// Tokens without a draft after which a draft model leaves a sequence alone: it would have to read them all
/// before it proposes another one, which at a fifth of its step each takes some 13 of its steps.
const MAX_PAUSE_TOKENS: u32 = 64;

/// Where draft tokens come from.
enum DraftSource {
    /// The tokens that followed the same tokens before.
    Ngram,
    /// A smaller model.
    Draft(Box<DraftModel>),
}

/// Proposes draft tokens.
pub(crate) struct Proposer {
    source: DraftSource,
    costs: StepCosts,
}

/// Most rows that speculation may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowLimits {
    /// All rows of the model's step.
    pub(crate) rows: usize,
    /// Rows of each step of a draft model: one that lags catches up at the pace of prompts.
    pub(crate) draft_rows: usize,
}

/// One sequence's draft tokens.
#[derive(Debug)]
pub(crate) struct DraftTokens {
    /// The rows to compute: the latest token and the draft tokens after it. Empty where nothing is drafted.
    rows: Vec<u32>,
    /// Tokens in the cache of the draft model, draft tokens included; `None` without such a model.
    drafted: Option<usize>,
    rate: AcceptanceRate,
}

impl DraftTokens {
    /// For a sequence without speculation.
    pub(crate) fn disabled() -> Self {
        Self { rows: Vec::new(), drafted: None, rate: AcceptanceRate::DISABLED }
    }

    /// The latest token and the draft tokens after it; empty where nothing is drafted.
    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// The draft tokens alone.
    pub(crate) fn ids(&self) -> &[u32] {
        self.rows.get(1..).unwrap_or_default()
    }

    /// How many draft tokens pay for themselves now.
    pub(crate) fn draft_len(&mut self, offer: &DraftOffer) -> usize {
        self.rate.draft_len(offer)
    }

    /// Adds a draft token after the sequence's latest token and the draft tokens so far.
    pub(crate) fn push(&mut self, latest: u32, id: u32) {
        if self.rows.is_empty() {
            self.rows.push(latest);
        }
        self.rows.push(id);
    }

    /// Ends a step in which `accepted` of the draft tokens were the model's choice. The sequence then has
    /// `cached` tokens in its cache.
    pub(crate) fn verified(&mut self, accepted: usize, cached: usize) {
        self.rate.record(self.ids().len(), accepted);
        self.discard(cached);
    }

    /// Drops the draft tokens without a result. The sequence has `cached` tokens in its cache.
    pub(crate) fn discard(&mut self, cached: usize) {
        self.rows.clear();
        self.drafted = self.drafted.map(|drafted| drafted.min(cached));
    }

    /// The sequence was admitted with `cached` tokens in both caches.
    pub(crate) fn admitted(&mut self, cached: usize) {
        self.rows.clear();
        self.drafted = self.drafted.map(|_| cached);
    }

    /// How many of the `cached` tokens of the model's cache other sequences may reuse: those that both models
    /// have computed.
    pub(crate) fn shared_tokens(&self, cached: usize) -> usize {
        self.drafted.map_or(cached, |drafted| drafted.min(cached))
    }
}

impl Proposer {
    /// From n-grams.
    pub(crate) fn ngram(costs: SpeculationCosts) -> Self {
        Self { source: DraftSource::Ngram, costs: StepCosts::new(costs, EXPECTED_OF_NGRAMS) }
    }

    /// By a draft model.
    pub(crate) fn draft(model: DraftModel, costs: SpeculationCosts) -> Self {
        let source = DraftSource::Draft(Box::new(model));
        Self { source, costs: StepCosts::new(costs, EXPECTED_OF_MODELS) }
    }

    /// Resizes the cache of the draft model.
    pub(crate) fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        match &mut self.source {
            DraftSource::Ngram => Ok(()),
            DraftSource::Draft(model) => model.resize_kv(blocks),
        }
    }

    /// The draft state of a new sequence.
    pub(crate) fn new_sequence(&self) -> DraftTokens {
        let (drafted, max_len, max_pause) = match &self.source {
            DraftSource::Ngram => (None, MAX_NGRAM_TOKENS, None),
            DraftSource::Draft(_) => (Some(0), MAX_DRAFT_TOKENS, Some(MAX_PAUSE_TOKENS)),
        };
        let rate = AcceptanceRate::new(self.costs.acceptance(), max_len, max_pause);
        DraftTokens { rows: Vec::new(), drafted, rate }
    }

    /// Records a step in which every sequence decoded.
    pub(crate) fn record(&mut self, step: &DecodeStep) {
        self.costs.record(step);
    }

    /// Proposes draft tokens for the sequences that decode, and adds their rows to `rows`, which has one
    /// number for each of `running`.
    ///
    /// # Errors
    /// The device fails a step of the draft model.
    pub(crate) fn propose(
        &mut self,
        running: &mut [Sequence],
        rows: &mut [usize],
        limits: RowLimits,
    ) -> Result<(), BackendError> {
        let decodes = |sequence: &Sequence, rows: usize| rows > 0 && sequence.demand() == RowDemand::Decode;
        let pairs = running.iter().zip(rows.iter().copied());
        let decoding = pairs.filter(|(sequence, rows)| decodes(sequence, *rows)).count();
        let each = MAX_VERIFY_ROWS.saturating_sub(decoding).checked_div(decoding).unwrap_or(0);
        if each == 0 {
            return Ok(());
        }
        let offer = self.costs.offer(decoding);
        let mut free = limits.rows.saturating_sub(rows.iter().sum());
        let wanted: Vec<usize> = running
            .iter_mut()
            .zip(rows.iter().copied())
            .map(|(sequence, rows)| {
                let limit = if decodes(sequence, rows) { each.min(free) } else { 0 };
                let count = if limit > 0 { sequence.draft_tokens_wanted(limit, &offer) } else { 0 };
                free -= count;
                count
            })
            .collect();
        match &mut self.source {
            DraftSource::Ngram => {
                for (sequence, wanted) in running.iter_mut().zip(wanted) {
                    let ids = ngram::propose(sequence.tokens(), wanted).to_vec();
                    ids.into_iter().for_each(|id| sequence.push_draft_token(id));
                }
            }
            DraftSource::Draft(model) => model.propose(running, wanted, limits.draft_rows)?,
        }
        for (sequence, rows) in running.iter().zip(rows) {
            *rows += sequence.draft_ids().len();
        }
        Ok(())
    }

    /// Lets a draft model read the prompts of the last step. Their first tokens have been sent by then.
    ///
    /// # Errors
    /// The device fails a step of the draft model.
    pub(crate) fn catch_up(&mut self, running: &mut [Sequence]) -> Result<(), BackendError> {
        match &mut self.source {
            DraftSource::Ngram => Ok(()),
            DraftSource::Draft(model) => model.catch_up(running),
        }
    }
}
