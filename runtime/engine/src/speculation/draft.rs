//! A smaller model of the same vocabulary guesses: it runs on the same device, one token after the other, before the
//! model's own step.
//!
//! Its cache has as many blocks as the model's, and a sequence has the same block table in both. So a beginning that is
//! known (see [`crate::blocks`]) is known to both: only what both have computed is learnt.

use super::Guesses;
use crate::config::{Sizes, StartError};
use crate::sampler::best;
use crate::sequence::Sequence;
use std::sync::Arc;
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    Backend, BackendError, Executable, Limits, LoadSpec, Loaded, LogitsRows, MemoryReport, Numerics,
    SequenceStep, StepInput, StepOutput,
};

/// A draft model on its device. Fields are dropped in order: what runs before what it runs on.
pub(crate) struct DraftModel {
    executable: Box<dyn Executable>,
    _loaded: Box<dyn Loaded>,
    /// Most rows of a step.
    most_rows: usize,
    input: StepInput,
    output: StepOutput,
    /// Who is guessed for in a step, as indices of the running sequences.
    asked: Vec<usize>,
}

/// Checks that a draft model can guess for a model.
///
/// # Errors
/// [`StartError::Draft`] where it is not of the same vocabulary, or generates nothing.
pub(crate) fn check(model: &Model, draft: &Model) -> Result<(), StartError> {
    let refused = |why: String| Err(StartError::Draft { why });
    if draft.facts().embedding.is_some() {
        return refused("it turns texts into vectors and generates nothing".to_owned());
    }
    let (ours, its) = (model.tokenizer(), draft.tokenizer());
    let (rows, its_rows) = (model.facts().vocabulary, draft.facts().vocabulary);
    if rows != its_rows {
        return refused(format!("its vocabulary has {its_rows} rows, the model's has {rows}"));
    }
    if ours.len() != its.len() {
        return refused(format!("its vocabulary has {} tokens, the model's has {}", its.len(), ours.len()));
    }
    let ids = 0..u32::try_from(ours.len()).unwrap_or(u32::MAX);
    match ids.into_iter().find(|id| ours.token_bytes(*id) != its.token_bytes(*id)) {
        Some(id) => refused(format!("token {id} of its vocabulary is another one than the model's")),
        None => Ok(()),
    }
}

/// Checks that a draft model can follow to the end of a context: answers that went on without it at some place would be
/// slower there, and nobody would know why.
///
/// # Errors
/// [`StartError::Draft`] where its own context is shorter.
pub(crate) fn check_context(draft: &Model, context_tokens: usize) -> Result<(), StartError> {
    let own = draft.facts().context_tokens;
    if own >= context_tokens {
        return Ok(());
    }
    let why = format!("its context of {own} tokens is shorter than the {context_tokens} that are served");
    Err(StartError::Draft { why })
}

impl DraftModel {
    /// Puts a draft model on the device, beside the model that it guesses for; how far that is, nobody is told.
    ///
    /// # Errors
    /// Whatever the device refuses.
    pub(crate) fn load(
        backend: &mut dyn Backend,
        model: &Arc<Model>,
        sizes: &Sizes,
        numerics: Numerics,
    ) -> Result<(Self, MemoryReport), BackendError> {
        let request = PlanRequest {
            context_tokens: sizes.context_tokens,
            limits: Limits {
                rows: sizes.token_budget,
                sequences: sizes.max_batch_size,
                logits_rows: sizes.max_batch_size,
            },
            fused: backend.caps().fused,
        };
        let plan = model.plan(&request)?;
        let mut loaded = backend.load(LoadSpec {
            weights: Arc::clone(model.weights()),
            plan: &plan,
            kv_blocks: sizes.kv_blocks,
            numerics,
            progress: &mut |_| {},
        })?;
        let executable = loaded.compile(&plan)?;
        let mut memory = loaded.memory();
        memory.other_bytes += (plan.answer_len() * size_of::<f32>()) as u64;
        let own = Self {
            executable,
            _loaded: loaded,
            most_rows: sizes.token_budget,
            input: StepInput::new(),
            output: StepOutput::with_room_for(&plan),
            asked: Vec::new(),
        };
        Ok((own, memory))
    }

    /// Guesses as many tokens for each sequence as `wanted` says, the likeliest one each time. Who is so far behind that
    /// it does not fit in a step is caught up and guessed for another time.
    pub(crate) fn guess(
        &mut self,
        running: &mut [Sequence],
        mut wanted: Vec<usize>,
        most_rows: usize,
    ) -> Result<(), BackendError> {
        let most_rows = most_rows.min(self.most_rows);
        while wanted.iter().any(|wanted| *wanted > 0) {
            self.begin();
            for (index, (sequence, wanted)) in running.iter_mut().zip(&mut wanted).enumerate() {
                if *wanted == 0 {
                    continue;
                }
                if self.feed(sequence, LogitsRows::Last, most_rows) {
                    self.asked.push(index);
                } else {
                    *wanted = 0;
                }
            }
            self.run()?;
            for (row, index) in self.asked.iter().enumerate() {
                match best(self.output.row(row)) {
                    Some(guess) => {
                        running[*index].guess(guess);
                        wanted[*index] -= 1;
                    }
                    None => wanted[*index] = 0,
                }
            }
        }
        Ok(())
    }

    /// Reads what the model has read of prompts.
    pub(crate) fn follow(&mut self, running: &mut [Sequence]) -> Result<(), BackendError> {
        loop {
            self.begin();
            for sequence in running.iter_mut().filter(|sequence| sequence.draft_lacks_prompt()) {
                self.feed(sequence, LogitsRows::None, self.most_rows);
            }
            if self.input.rows() == 0 {
                break;
            }
            self.run()?;
        }
        running.iter_mut().for_each(Sequence::learn);
        Ok(())
    }

    fn begin(&mut self) {
        self.input.clear();
        self.asked.clear();
    }

    /// Adds what a sequence has that this model's cache lacks, as far as it fits. Says whether that was all, and so
    /// whether there are logits.
    fn feed(&mut self, sequence: &mut Sequence, logits: LogitsRows, most_rows: usize) -> bool {
        let left = most_rows.saturating_sub(self.input.rows());
        sequence.feed_draft(left, logits, &mut self.input)
    }

    fn run(&mut self) -> Result<(), BackendError> {
        if self.input.rows() == 0 {
            return Ok(());
        }
        self.executable.submit(&self.input)?;
        self.executable.wait(&mut self.output)
    }
}

impl Guesses {
    /// Tokens that the draft model has in its cache.
    pub(crate) fn drafted(&self) -> Option<usize> {
        self.drafted
    }

    /// Adds to the draft model's step what it lacks of `tokens` and the guesses after them, at most `most` rows.
    pub(crate) fn feed(
        &mut self,
        (tokens, blocks): (&[u32], &[u32]),
        (most, logits): (usize, LogitsRows),
        input: &mut StepInput,
    ) -> bool {
        let Some(drafted) = self.drafted else { return false };
        let lacking = tokens.get(drafted..).filter(|lacking| !lacking.is_empty());
        // The latest token is the first of the rows, so that guesses begin at the place after it.
        let guessed = || self.rows.get(drafted + 1 - tokens.len()..);
        let Some(rows) = lacking.or_else(guessed) else { return false };
        let (fed, all) = (&rows[..rows.len().min(most)], rows.len() <= most);
        if fed.is_empty() {
            return false;
        }
        let logits = if all { logits } else { LogitsRows::None };
        input.push_sequence(SequenceStep { tokens: fed, cached_tokens: drafted, blocks, logits });
        self.drafted = Some(drafted + fed.len());
        all
    }
}
