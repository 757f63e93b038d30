//! The draft model: a smaller model of the same vocabulary on the same device. It proposes one token after
//! the other before the model's own step.
//!
//! Its cache has as many blocks as the model's, and a sequence has the same block table in both. So a cached
//! prefix (see [`crate::prefix_cache`]) is valid for both: only blocks that both models have computed are
//! registered.

use super::DraftTokens;
use crate::config::{EngineSizes, StartError};
use crate::generation::Sequence;
use std::sync::Arc;
use trustformers_model::{Model, Task};
use trustformers_plan::{
    Backend, BackendError, Executable, LoadSpec, Loaded, LogitsRows, MemoryReport, Numerics, SampleInput,
    SampleSpec, SequenceStep, StepInput, StepOutput, buckets,
};

/// A draft model on its device. Fields are dropped in order: the executable before the model.
pub(crate) struct DraftModel {
    executable: Box<dyn Executable>,
    loaded: Box<dyn Loaded>,
    /// Most rows of a step.
    max_rows: usize,
    input: StepInput,
    sample: SampleInput,
    output: StepOutput,
    /// Indices of the running sequences that a step proposes a token for.
    targets: Vec<usize>,
}

/// The rows that one sequence adds to a step of the draft model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DraftFeed<'a> {
    /// The sequence's tokens, as far as the draft model should read them.
    pub(crate) tokens: &'a [u32],
    pub(crate) blocks: &'a [u32],
    pub(crate) max_rows: usize,
    pub(crate) logits: LogitsRows,
}

/// Checks that a draft model fits a model.
///
/// # Errors
/// [`StartError::Draft`] where it has another vocabulary or does not generate text.
pub(crate) fn check(model: &Model, draft: &Model) -> Result<(), StartError> {
    let refused = |why: String| Err(StartError::Draft { why });
    if draft.task() != Task::Generate {
        return refused(format!("its task is {}, and it does not generate text", draft.task()));
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
        Some(id) => refused(format!("token {id} of its vocabulary differs from the model's")),
        None => Ok(()),
    }
}

/// Checks that a draft model can read a whole context: otherwise answers would become slower at some length
/// for no visible reason.
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
    /// Loads a draft model on the device, beside the model that it drafts for. Its progress is not reported.
    ///
    /// # Errors
    /// The device refuses the draft model.
    pub(crate) fn load(
        backend: &mut dyn Backend,
        model: &Arc<Model>,
        sizes: &EngineSizes,
        numerics: Numerics,
    ) -> Result<(Self, MemoryReport), BackendError> {
        let plan = model.plan(&sizes.plan_request(0, backend.caps().fused))?.with_kv_room(sizes.kv_blocks);
        let mut loaded = backend.load(LoadSpec {
            weights: Arc::clone(model.weights()),
            plan: &plan,
            kv_blocks: sizes.first_kv_blocks,
            kv_type: sizes.kv_type,
            numerics,
            progress: &mut |_| {},
        })?;
        let executable = buckets::compile(&mut *loaded, &plan, &backend.caps().row_buckets)?;
        let memory = loaded.memory();
        let own = Self {
            executable,
            loaded,
            max_rows: sizes.token_budget,
            input: StepInput::new(),
            sample: SampleInput::new(),
            output: StepOutput::new(),
            targets: Vec::new(),
        };
        Ok((own, memory))
    }

    /// Resizes its cache, which has the blocks of the model's.
    pub(crate) fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.loaded.resize_kv(blocks)
    }

    /// Proposes the number of tokens in `wanted` for each sequence, the most likely one each time. A sequence
    /// whose missing rows do not fit in one step catches up now and gets draft tokens in a later step.
    pub(crate) fn propose(
        &mut self,
        running: &mut [Sequence],
        mut wanted: Vec<usize>,
        max_rows: usize,
    ) -> Result<(), BackendError> {
        let max_rows = max_rows.min(self.max_rows);
        while wanted.iter().any(|wanted| *wanted > 0) {
            self.clear();
            for (index, (sequence, wanted)) in running.iter_mut().zip(&mut wanted).enumerate() {
                if *wanted == 0 {
                    continue;
                }
                if self.feed(sequence, LogitsRows::Last, max_rows) {
                    self.targets.push(index);
                } else {
                    *wanted = 0;
                }
            }
            self.compute()?;
            for (choice, index) in self.output.choices.iter().zip(&self.targets) {
                match choice {
                    Ok(token) => {
                        running[*index].push_draft_token(token.id);
                        wanted[*index] -= 1;
                    }
                    Err(_) => wanted[*index] = 0,
                }
            }
        }
        Ok(())
    }

    /// Reads the tokens of prompts that the model has read.
    pub(crate) fn catch_up(&mut self, running: &mut [Sequence]) -> Result<(), BackendError> {
        loop {
            self.clear();
            for sequence in running.iter_mut().filter(|sequence| sequence.draft_model_lags()) {
                self.feed(sequence, LogitsRows::None, self.max_rows);
            }
            if self.input.rows() == 0 {
                break;
            }
            self.compute()?;
        }
        running.iter_mut().for_each(Sequence::register_blocks);
        Ok(())
    }

    fn clear(&mut self) {
        self.input.clear();
        self.targets.clear();
    }

    /// Adds the rows of a sequence that this model's cache lacks, as far as they fit. True if these were all,
    /// so that there are logits.
    fn feed(&mut self, sequence: &mut Sequence, logits: LogitsRows, max_rows: usize) -> bool {
        let free = max_rows.saturating_sub(self.input.rows());
        sequence.feed_draft(free, logits, &mut self.input)
    }

    /// Computes a step, and takes the best token of each of its rows of logits.
    fn compute(&mut self) -> Result<(), BackendError> {
        self.output.choices.clear();
        if self.input.rows() == 0 {
            return Ok(());
        }
        self.sample.clear();
        let rows = 0..self.input.logits_rows.len();
        rows.for_each(|row| self.sample.push(&SampleSpec::greedy(row)));
        self.executable.submit(&self.input)?;
        self.executable.sample(&self.sample)?;
        self.executable.wait(&mut self.output)
    }
}

impl DraftTokens {
    /// Tokens in the cache of the draft model.
    pub(crate) fn drafted(&self) -> Option<usize> {
        self.drafted
    }

    /// Adds the rows that the draft model's cache lacks, of the tokens and of the draft tokens after them, to
    /// its step. True if these were all.
    pub(crate) fn feed(&mut self, feed: DraftFeed<'_>, input: &mut StepInput) -> bool {
        let DraftFeed { tokens, blocks, max_rows, logits } = feed;
        let Some(drafted) = self.drafted else { return false };
        let missing = tokens.get(drafted..).filter(|missing| !missing.is_empty());
        // The latest token is the first of the rows, so the draft tokens begin one row later.
        let draft = || self.rows.get(drafted + 1 - tokens.len()..);
        let Some(rows) = missing.or_else(draft) else { return false };
        let (fed, all) = (&rows[..rows.len().min(max_rows)], rows.len() <= max_rows);
        if fed.is_empty() {
            return false;
        }
        let logits = if all { logits } else { LogitsRows::None };
        input.push_sequence(SequenceStep { tokens: fed, cached_tokens: drafted, blocks, logits });
        self.drafted = Some(drafted + fed.len());
        all
    }
}
