//! The steps that the device has: launching one, choosing its tokens, and processing its answer.
//!
//! On a device that runs beside the host, two steps are in flight. Each iteration launches step *n + 1*,
//! whose tokens are still on the device, then processes the answer of step *n* while the device computes, and
//! then describes how the tokens of step *n + 1* are chosen, with the masks and penalties that follow from
//! step
//! *n*. A sequence that ends in step *n* has one row too many in step *n + 1*: nothing is chosen from it, and
//! it is not counted. Its blocks may have a new owner by then, whose rows the device computes later.
//!
//! Where tokens are drafted, no step runs ahead: a draft begins with the latest token.

use super::device::{GenerationDevice, StepBuffers};
use super::sequence::{AnsweredStep, Sequence, StepOutcome};
use crate::faults::{DeviceFault, StepFault, refused_sequence};
use crate::scheduling::queue::HasQueueKey;
use crate::scheduling::rows::{RowDemand, StepShape};
use crate::speculation::{DecodeStep, RowLimits};
use std::time::{Duration, Instant};
use trustformers_plan::{BackendError, StepError};

/// A step that the device has.
#[derive(Debug)]
pub(crate) struct LaunchedStep {
    number: u64,
    shape: StepShape,
    /// The sequences that it has rows of.
    sequences: usize,
    /// Before tokens were drafted for it.
    began: Instant,
    launched: Instant,
    /// What it tells about the costs of draft tokens, without its time and its tokens.
    decode: Option<DecodeStep>,
}

impl LaunchedStep {
    /// Its number among the steps of the engine.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

impl GenerationDevice {
    /// Launches a step, and processes the answer of the step before, or of the same one where no step runs
    /// ahead.
    pub(super) fn step(&mut self) {
        let before = self.launched.len();
        self.allocate_rows();
        if let Err(fault) = self.launch().map_err(StepFault::from) {
            match fault {
                StepFault::Refused(refusal) => self.drop_refused(&refusal),
                StepFault::Device(fault) => return self.fail(&fault),
            }
        }
        let launched = self.launched.len() > before;
        let outcome = if before > 0 { self.process_answer() } else { Ok(()) };
        let outcome = outcome.and_then(|()| if launched { self.sample() } else { Ok(()) });
        let outcome = match outcome {
            Ok(()) if launched && !self.runs_ahead => self.process_answer(),
            outcome => outcome,
        };
        if let Err(error) = outcome {
            self.fail(&DeviceFault::FailedStep { message: error.to_string() });
        }
    }

    /// Proposes draft tokens, and submits a step where a sequence has rows.
    fn launch(&mut self) -> Result<(), BackendError> {
        let began = Instant::now();
        if let Some(proposer) = &mut self.proposer {
            let alone = self.running.len() == 1 && self.waiting.is_empty();
            let limits =
                RowLimits { rows: self.sizes.token_budget, draft_rows: self.pacer.prompt_rows(alone) };
            if let Err(error) = proposer.propose(&mut self.running, &mut self.step.allocation.rows, limits) {
                self.disable_speculation(&error);
            }
        }
        let proposing = began.elapsed();
        let StepBuffers { input, allocation, .. } = &mut self.step;
        let measured = self.proposer.is_some();
        let decode = if measured { decode_step(&self.running, &allocation.rows, proposing) } else { None };
        input.clear();
        let (number, mut sequences) = (self.steps, 0);
        for (sequence, rows) in self.running.iter_mut().zip(&allocation.rows).filter(|(_, rows)| **rows > 0) {
            sequence.note_started();
            sequence.push_step(*rows, number, input);
            sequences += 1;
        }
        if input.rows() == 0 {
            return Ok(());
        }
        self.steps += 1;
        let launched = Instant::now();
        self.executable.submit(input)?;
        self.pacer.record_launch(allocation.shape);
        let shape = allocation.shape;
        self.launched.push_back(LaunchedStep { number, shape, sequences, began, launched, decode });
        Ok(())
    }

    /// Describes how the tokens of the step that was launched last are chosen.
    fn sample(&mut self) -> Result<(), BackendError> {
        let Some(number) = self.launched.back().map(|step| step.number) else { return Ok(()) };
        let sample = &mut self.step.sample;
        sample.clear();
        self.running.iter_mut().for_each(|sequence| sequence.push_sample(number, sample));
        self.executable.sample(sample)
    }

    /// Waits for the oldest step that the device has, and processes its answer.
    fn process_answer(&mut self) -> Result<(), BackendError> {
        let Some(step) = self.launched.pop_front() else { return Ok(()) };
        self.executable.wait(&mut self.step.output)?;
        let device_time = step.launched.elapsed();
        // Before any event is sent, so that a caller that has its answer finds the engine healthy.
        self.shared.step_succeeded();
        let Self { running, tenants, pool, step: StepBuffers { output, .. }, .. } = self;
        let tokenizer = self.model.tokenizer();
        let (count_before, mut tokens) = (running.len(), 0);
        running.retain_mut(|sequence| {
            let cached_before = sequence.cached();
            let of_step = AnsweredStep { number: step.number, sequences: step.sequences };
            let Some(outcome) = sequence.step_done(of_step, &output.choices, tokenizer) else {
                return true;
            };
            // Rejected draft tokens are not charged.
            let served = sequence.cached() - cached_before;
            tokens += served;
            tenants.charge(sequence.queue_key().tenant, served);
            sequence.count_served(served);
            if outcome == StepOutcome::ModelBroken {
                pool.invalidate();
            }
            if outcome != StepOutcome::Running {
                tenants.request_ended(sequence.queue_key().tenant);
            }
            outcome == StepOutcome::Running
        });
        let ended = count_before - running.len();
        if let (Some(proposer), Some(decode)) = (&mut self.proposer, step.decode) {
            proposer.record(&DecodeStep { step: device_time, tokens, ..decode });
        }
        if let Some(proposer) = &mut self.proposer
            && let Err(error) = proposer.catch_up(running)
        {
            self.disable_speculation(&error);
        }
        self.record_time(&step, ended);
        Ok(())
    }

    /// Records the time of a step in which `ended` requests ended.
    fn record_time(&mut self, step: &LaunchedStep, ended: usize) {
        let now = Instant::now();
        // A step that was launched ahead began when the one before it ended.
        let took = now - step.began.max(self.last_answer);
        self.last_answer = now;
        self.pacer.record(step.shape, took);
        self.step_time += took;
        if let Some(each) = u32::try_from(ended).ok().and_then(|ended| self.step_time.checked_div(ended)) {
            self.shared.record_request_time(each);
            self.step_time = Duration::ZERO;
        }
    }

    /// Answers do not depend on draft tokens, so the engine continues without them. A broken device shows in
    /// the next step of the model itself.
    fn disable_speculation(&mut self, error: &BackendError) {
        tracing::error!(%error, "the draft model failed; no tokens are drafted from now on");
        self.proposer = None;
        self.running.iter_mut().chain(self.waiting.iter_mut()).for_each(Sequence::disable_speculation);
    }

    /// Ends the sequence that a refused step is about, or all of the step where it is about the whole.
    /// Nothing was computed: the cache stays valid, the others try again, and liveness is not affected.
    fn drop_refused(&mut self, refusal: &StepError) {
        // Sequences without rows are not in the step's input.
        let rows = self.step.allocation.rows.iter().enumerate();
        let included: Vec<usize> = rows.filter(|(_, rows)| **rows > 0).map(|(index, _)| index).collect();
        let refused = refused_sequence(refusal, &self.step.input).and_then(|index| included.get(index));
        let refused = match refused {
            Some(index) => *index..*index + 1,
            None => 0..self.running.len(),
        };
        tracing::warn!(%refusal, sequences = refused.len(), "the device refused a step; its requests end");
        self.shared.record_progress();
        let (mut index, number) = (0, self.steps - 1);
        let Self { running, tenants, .. } = self;
        running.retain_mut(|sequence| {
            sequence.step_refused(number);
            let ends = refused.contains(&index);
            index += 1;
            if ends {
                tenants.request_ended(sequence.queue_key().tenant);
                sequence.fail_refused(refusal);
            }
            !ends
        });
    }

    /// Ends all running sequences after the device failed: the content of the cache cannot be trusted.
    fn fail(&mut self, fault: &DeviceFault) {
        tracing::error!(error = %fault, sequences = self.running.len(), "a step failed");
        self.discard_launched();
        self.metrics.failed_steps.inc();
        self.shared.step_failed();
        self.pool.invalidate();
        for mut sequence in self.running.drain(..) {
            self.tenants.request_ended(sequence.queue_key().tenant);
            sequence.fail(fault.clone().into());
        }
    }

    /// Waits for the steps that the device has, and discards their answers.
    pub(super) fn discard_launched(&mut self) {
        while self.launched.pop_front().is_some() {
            if let Err(error) = self.executable.wait(&mut self.step.output) {
                tracing::debug!(%error, "a step whose answer is discarded failed");
            }
        }
    }
}

/// What a step tells about the costs of draft tokens: nothing where it has other rows than tokens and draft
/// tokens of sequences that decode.
fn decode_step(running: &[Sequence], rows: &[usize], proposing: Duration) -> Option<DecodeStep> {
    let mut step = DecodeStep {
        sequences: 0,
        draft_rows: 0,
        draft_steps: 0,
        proposing,
        step: Duration::ZERO,
        tokens: 0,
    };
    for (sequence, rows) in running.iter().zip(rows).filter(|(_, rows)| **rows > 0) {
        let drafts = sequence.draft_ids().len();
        if sequence.demand() != RowDemand::Decode || *rows != 1 + drafts {
            return None;
        }
        step.sequences += 1;
        step.draft_rows += drafts;
        step.draft_steps = step.draft_steps.max(drafts);
    }
    (step.sequences > 0).then_some(step)
}
