//! The rows of one sequence in steps: what it computes next, how its tokens are chosen, and what an answer
//! does to it.

use super::Sequence;
use crate::request::{GenerateError, GenerationProgress};
use crate::scheduling::rows::RowDemand;
use trustformers_model::Tokenizer;
use trustformers_plan::{LogitsRows, SampleInput, SampleResult, SampledStep, SequenceStep, StepInput};

/// A step that the device has computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnsweredStep {
    pub(crate) number: u64,
    /// The sequences that it had rows of.
    pub(crate) sequences: usize,
}

/// What a step did to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepOutcome {
    /// It continues.
    Running,
    /// It ended, and its caller has the last event.
    Ended,
    /// It ended because the model's own logits are not finite. Its caller has the error.
    ModelBroken,
}

/// The rows of one sequence in a step that the device computes.
#[derive(Debug)]
pub(super) struct RowsInFlight {
    /// The number of the step.
    step: u64,
    rows: usize,
    /// The first of its rows of logits, and how many it has.
    first_logits_row: usize,
    logits_rows: usize,
    /// The first of its choices, and how many it has. None before the step is sampled.
    first_choice: usize,
    choices: usize,
    /// Why no token can be chosen.
    error: Option<GenerateError>,
}

impl Sequence {
    /// Tokens in the cache when the steps in flight have ended.
    pub(super) fn computed(&self) -> usize {
        self.cached + self.in_flight.iter().map(|flight| flight.rows).sum::<usize>()
    }

    /// Tokens that a step in flight produces: one or none, because no row with a draft runs ahead.
    pub(super) fn awaited_tokens(&self) -> usize {
        usize::from(self.in_flight.iter().any(|flight| flight.choices > 0))
    }

    /// The row of the latest sample that chooses its next token.
    fn awaited_slot(&self) -> Option<u32> {
        let flight = self.in_flight.back().filter(|flight| flight.choices > 0)?;
        u32::try_from(flight.first_choice).ok()
    }

    /// What it can compute in the next step. It waits where its last token is in flight, or an error that
    /// ends it.
    pub(crate) fn demand(&self) -> RowDemand {
        let awaited = self.awaited_tokens();
        let fails = self.in_flight.iter().any(|flight| flight.error.is_some());
        if fails || awaited > 0 && self.job.completion.remaining_tokens() <= awaited {
            return RowDemand::Nothing;
        }
        match self.tokens.len() + awaited - self.computed() {
            0 | 1 => RowDemand::Decode,
            missing => RowDemand::Prompt(missing),
        }
    }

    /// Adds its rows to the step with the number `step`.
    pub(crate) fn push_step(&mut self, rows: usize, step: u64, input: &mut StepInput) {
        let (cached_tokens, first_logits_row) = (self.computed(), input.logits_rows.len());
        let blocks = self.blocks.as_ref().map_or(&[][..], |blocks| blocks.ids());
        let end = cached_tokens + rows;
        let logits = if self.draft.rows().is_empty() { LogitsRows::Last } else { LogitsRows::All };
        if let Some(slot) = self.awaited_slot() {
            input.push_sampled(SampledStep { slot, cached_tokens, blocks });
        } else if logits == LogitsRows::All {
            let tokens = self.draft.rows();
            input.push_sequence(SequenceStep { tokens, cached_tokens, blocks, logits });
        } else {
            let tokens = &self.tokens[cached_tokens..end];
            let logits = if end == self.tokens.len() { logits } else { LogitsRows::None };
            input.push_sequence(SequenceStep { tokens, cached_tokens, blocks, logits });
        }
        input.choose_adapter(self.job.adapter.as_ref().map(|adapter| adapter.slot));
        self.in_flight.push_back(RowsInFlight {
            step,
            rows,
            first_logits_row,
            logits_rows: input.logits_rows.len() - first_logits_row,
            first_choice: 0,
            choices: 0,
            error: None,
        });
    }

    /// Describes how its tokens are chosen from the step with the number `step`.
    pub(crate) fn push_sample(&mut self, step: u64, input: &mut SampleInput) {
        let Self { in_flight, draft, job, .. } = self;
        let flight = in_flight.back_mut().filter(|flight| flight.step == step && flight.logits_rows > 0);
        let Some(flight) = flight else { return };
        flight.first_choice = input.len();
        if let Err(error) = job.completion.push_rows(flight.first_logits_row, draft.ids(), input) {
            flight.error = Some(error);
        }
        flight.choices = input.len() - flight.first_choice;
    }

    /// Processes a step that the device has computed, and the choices of all its rows. `None` where it has no
    /// rows in that step.
    pub(crate) fn step_done(
        &mut self,
        step: AnsweredStep,
        choices: &[SampleResult],
        tokenizer: &Tokenizer,
    ) -> Option<StepOutcome> {
        let flight = self.in_flight.pop_front_if(|flight| flight.step == step.number)?;
        self.observe(GenerationProgress::Step { rows: flight.rows, sequences: step.sequences });
        self.count_rows(flight.rows);
        let mut outcome = StepOutcome::Running;
        let proposed = self.draft.ids().len();
        // Counted before any event is sent, so that a caller that has its answer finds it counted.
        self.metrics().inspect(|metrics| metrics.speculation.proposed.inc_by(proposed as u64));
        if let Some(error) = flight.error {
            outcome = self.fail_choice(error);
        }
        let (mut emitted, mut accepted) = (0, 0);
        for choice in choices.iter().skip(flight.first_choice).take(flight.choices) {
            let mut is_accepted = false;
            outcome = match self.job.completion.next(choice.clone(), tokenizer) {
                Ok(token) => {
                    is_accepted = self.draft.ids().get(emitted) == Some(&token.id);
                    if let (true, Some(metrics)) = (is_accepted, self.metrics()) {
                        metrics.speculation.accepted.inc();
                    }
                    self.emit(token)
                }
                Err(error) => self.fail_choice(error),
            };
            emitted += 1;
            accepted += usize::from(is_accepted);
            // The next row is that of the draft token, so it counts only if that token was chosen.
            if outcome != StepOutcome::Running || !is_accepted {
                break;
            }
        }
        // Rows of rejected draft tokens do not count as cached.
        self.cached += if proposed == 0 { flight.rows } else { emitted };
        self.max_cached = self.max_cached.max(self.cached);
        self.draft.verified(accepted, self.cached);
        if outcome != StepOutcome::ModelBroken {
            self.register_blocks();
        }
        Some(outcome)
    }

    /// Ends it because no token can be chosen.
    fn fail_choice(&mut self, error: GenerateError) -> StepOutcome {
        // Only the model's own row can be a model fault; the caller's settings cannot.
        let broken = matches!(error, GenerateError::Model(_));
        self.fail(error);
        if broken { StepOutcome::ModelBroken } else { StepOutcome::Ended }
    }

    /// Prepares it for another step after the one with the number `step` was refused: nothing of it was
    /// computed.
    pub(crate) fn step_refused(&mut self, step: u64) {
        self.in_flight.pop_back_if(|flight| flight.step == step);
        self.draft.discard(self.cached);
    }
}
