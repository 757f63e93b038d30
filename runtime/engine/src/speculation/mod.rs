//! Guessing tokens before the model computes them, so that one step checks several at once.
//!
//! A step of few rows takes about as long as a step of one, because reading the weights is most of its work. Guessed
//! tokens ride along as further rows of their sequence; the sampler then chooses from the rows one after the other for
//! as long as its choice equals the guess (see [`crate::sampler`]). So guesses change when a token comes, never which: bit
//! for bit in `exact`, and in `fast` on devices whose rounding does not depend on a step's rows, as the CPU's does not.
//!
//! Guesses come from the sequence's own tokens ([`ngram`]) or from a smaller model ([`draft`]). How many are made
//! follows from how many were right before ([`rate`]), and from how many sequences share the step.

mod draft;
mod ngram;
mod rate;

pub(crate) use draft::{DraftModel, check, check_context};

use crate::scheduler::Wants;
use crate::sequence::Sequence;
use rate::Rate;
use trustformers_plan::BackendError;

/// Rows of one step that decode, guesses included. Up to here a step's time grows slowly with its rows on every device
/// that was measured (a Zen 5 reads weights once for four rows); beyond it guesses would slow other streams down.
pub(crate) const VERIFIED_ROWS: usize = 8;

/// What guesses.
pub(crate) enum Guesser {
    /// The tokens that followed the same words before.
    Ngram,
    /// A smaller model.
    Draft(Box<DraftModel>),
}

/// How many rows guessing may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Of the model's step, all rows together.
    pub(crate) rows: usize,
    /// Of each step of a draft model: one that has fallen behind catches up at the pace of prompts.
    pub(crate) draft_rows: usize,
}

/// One sequence's guesses.
#[derive(Debug)]
pub(crate) struct Guesses {
    /// The rows to compute: its latest token and the guesses after it. Empty where nothing is guessed.
    rows: Vec<u32>,
    /// Tokens that the draft model has in its cache, guessed ones included; none without such a model.
    drafted: Option<usize>,
    rate: Rate,
}

impl Guesses {
    /// None, ever: the sequence runs without.
    pub(crate) fn none() -> Self {
        Self { rows: Vec::new(), drafted: None, rate: Rate::NEVER }
    }

    /// The latest token and the guesses after it; empty where nothing is guessed.
    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// The guesses alone.
    pub(crate) fn ids(&self) -> &[u32] {
        self.rows.get(1..).unwrap_or_default()
    }

    /// How many are worth making.
    pub(crate) fn worth(&mut self) -> usize {
        self.rate.worth()
    }

    /// One more after `latest`, the sequence's latest token, and the guesses so far.
    pub(crate) fn push(&mut self, latest: u32, guess: u32) {
        if self.rows.is_empty() {
            self.rows.push(latest);
        }
        self.rows.push(guess);
    }

    /// Of the guesses, `right` were the model's own choice, and the sequence has `cached` tokens in its cache now.
    pub(crate) fn checked(&mut self, right: usize, cached: usize) {
        self.rate.note(self.ids().len(), right);
        self.rows.clear();
        self.drafted = self.drafted.map(|drafted| drafted.min(cached));
    }

    /// The sequence runs from now on with so many tokens in both caches.
    pub(crate) fn admitted(&mut self, cached: usize) {
        self.rows.clear();
        self.drafted = self.drafted.map(|_| cached);
    }

    /// Of `cached` tokens in the model's cache, those that whoever begins alike can rely on.
    pub(crate) fn known(&self, cached: usize) -> usize {
        self.drafted.map_or(cached, |drafted| drafted.min(cached))
    }
}

impl Guesser {
    /// What a new sequence begins with.
    pub(crate) fn begin(&self) -> Guesses {
        match self {
            Self::Ngram => Guesses { rows: Vec::new(), drafted: None, rate: Rate::ngram() },
            Self::Draft(_) => Guesses { rows: Vec::new(), drafted: Some(0), rate: Rate::draft() },
        }
    }

    /// Guesses for the sequences that decode, and adds the rows that this takes to `rows`, one figure for each of
    /// `running`, as far as there is room for them.
    ///
    /// # Errors
    /// The draft model's device fails.
    pub(crate) fn guess(
        &mut self,
        running: &mut [Sequence],
        rows: &mut [usize],
        room: Room,
    ) -> Result<(), BackendError> {
        let decodes = |(sequence, rows): (&Sequence, usize)| rows > 0 && sequence.wants() == Wants::Decode;
        let decoding = running.iter().zip(rows.iter().copied()).filter(|pair| decodes(*pair)).count();
        let each = VERIFIED_ROWS.saturating_sub(decoding).checked_div(decoding).unwrap_or(0);
        if each == 0 {
            return Ok(());
        }
        let mut left = room.rows.saturating_sub(rows.iter().sum());
        let wanted: Vec<usize> = running
            .iter_mut()
            .zip(rows.iter().copied())
            .map(|(sequence, rows)| {
                let count =
                    if decodes((sequence, rows)) { sequence.guesses_wanted(each.min(left)) } else { 0 };
                left -= count;
                count
            })
            .collect();
        match self {
            Self::Ngram => {
                for (sequence, wanted) in running.iter_mut().zip(wanted) {
                    let guesses = ngram::follow(sequence.tokens(), wanted).to_vec();
                    guesses.into_iter().for_each(|guess| sequence.guess(guess));
                }
            }
            Self::Draft(model) => model.guess(running, wanted, room.draft_rows)?,
        }
        for (sequence, rows) in running.iter().zip(rows) {
            *rows += sequence.guesses().len();
        }
        Ok(())
    }

    /// Lets a draft model read the prompts that were read in the last step. The first tokens of these have been told
    /// by then.
    ///
    /// # Errors
    /// The draft model's device fails.
    pub(crate) fn follow(&mut self, running: &mut [Sequence]) -> Result<(), BackendError> {
        match self {
            Self::Ngram => Ok(()),
            Self::Draft(model) => model.follow(running),
        }
    }
}
