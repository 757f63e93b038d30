//! One request on the device thread: a job that waits, and then a sequence that runs.

use super::buffer::EventSender;
use super::completion::{Completion, CompletionEnd, EmittedToken};
use crate::device_thread::Permit;
use crate::faults::RequestFault;
use crate::metrics::{GaugeGuard, ModelMetrics};
use crate::prefix_cache::{BlockTable, blocks_for};
use crate::request::{EventResult, FinishReason, GenerateError, GenerationEvent, Timings};
use crate::sampling::Scratch;
use crate::scheduling::admission::InflightGuard;
use crate::scheduling::priority::Priority;
use crate::scheduling::queue::{HasQueueKey, QueueKey};
use crate::scheduling::rows::RowDemand;
use crate::scheduling::tenants::{Tenant, TenantId};
use crate::speculation::{DraftFeed, DraftTokens};
use std::sync::Arc;
use std::time::{Duration, Instant};
use trustformers_model::Tokenizer;
use trustformers_plan::{KV_BLOCK_TOKENS, LogitsRows, SequenceStep, StepError, StepInput};

/// A request on its way to the device thread.
#[derive(Debug)]
pub(crate) struct GenerationJob {
    pub(crate) prompt: Arc<[u32]>,
    /// Chooses its tokens and decides which is the last.
    pub(crate) completion: Completion,
    pub(crate) submitted: Instant,
    pub(crate) events: EventSender,
    /// `None` for the engine's own requests.
    pub(crate) metrics: Option<ModelMetrics>,
    pub(crate) class: Priority,
    pub(crate) tenant: Tenant,
    /// Keeps it in the admission counts.
    pub(crate) _inflight: Option<InflightGuard>,
    /// Counts it as waiting.
    pub(crate) waiting: Option<GaugeGuard>,
    /// Released when it is dropped.
    pub(crate) _permit: Permit,
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

/// A request on the device thread. It waits without KV blocks, or runs with the blocks that it has needed so
/// far. It may change between the two any number of times; its caller notices only the time.
#[derive(Debug)]
pub(crate) struct Sequence {
    key: QueueKey,
    /// Prompt and answer so far; the last one is not in the cache.
    tokens: Vec<u32>,
    /// The block table while it runs.
    blocks: Option<BlockTable>,
    /// Tokens in the cache.
    cached: usize,
    /// The highest value of `cached` so far: tokens below it are computed again after a preemption.
    max_cached: usize,
    draft: DraftTokens,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    running: Option<GaugeGuard>,
    /// The last field, so that its permit is released after everything else: an idle engine holds nothing.
    job: GenerationJob,
}

impl Sequence {
    /// The job with the number `arrival`, of a tenant that was counted.
    pub(crate) fn new(job: GenerationJob, tenant: TenantId, arrival: u64, draft: DraftTokens) -> Self {
        Self {
            key: QueueKey { class: job.class, tenant, arrival, aged: false },
            tokens: job.prompt.to_vec(),
            blocks: None,
            cached: 0,
            max_cached: 0,
            draft,
            started: None,
            first_token: None,
            last_token: None,
            running: None,
            job,
        }
    }

    /// Marks it as aged: it precedes all others until it ends.
    pub(crate) fn mark_aged(&mut self) {
        self.key.class = Priority::High;
        self.key.aged = true;
    }

    /// Whether its caller has received no event yet.
    pub(crate) fn has_no_output(&self) -> bool {
        self.first_token.is_none()
    }

    /// Prompt and answer so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens whose blocks it may share with other sequences: none of the engine's own requests, because
    /// a warm-up has to compute.
    pub(crate) fn cacheable_prefix(&self) -> &[u32] {
        if self.job.metrics.is_some() { &self.tokens } else { &[] }
    }

    /// Starts it with the cached blocks of its prefix.
    pub(crate) fn admit(&mut self, blocks: BlockTable) {
        self.cached = blocks.ids().len() * KV_BLOCK_TOKENS;
        if let Some(metrics) = &self.job.metrics {
            metrics.cache.reused_tokens.inc_by(self.cached.saturating_sub(self.max_cached) as u64);
            self.running = Some(GaugeGuard::new(&metrics.running));
        }
        self.max_cached = self.max_cached.max(self.cached);
        self.draft.admitted(self.cached);
        self.blocks = Some(blocks);
        self.job.waiting = None;
    }

    /// Releases its blocks, so that it waits again. Its output so far stands. Later the cache is computed
    /// again, except for the blocks that are still cached then.
    pub(crate) fn preempt(&mut self) {
        self.blocks = None;
        self.cached = 0;
        self.draft.admitted(0);
        self.running = None;
        if let Some(metrics) = &self.job.metrics {
            metrics.cache.preemptions.inc();
            self.job.waiting = Some(GaugeGuard::new(&metrics.waiting));
        }
    }

    /// Blocks that it still needs for all of its tokens.
    pub(crate) fn missing_blocks(&self) -> usize {
        let allocated = self.blocks.as_ref().map_or(0, |blocks| blocks.ids().len());
        blocks_for(self.tokens.len()).saturating_sub(allocated)
    }

    /// Allocates blocks for `rows` more tokens in the cache. False where there are not enough.
    pub(crate) fn reserve(&mut self, rows: usize) -> bool {
        let tokens = self.cached + rows;
        self.blocks.as_mut().is_some_and(|blocks| blocks.reserve(tokens))
    }

    /// Whether its caller dropped the generation, or the answer was discarded because it was not read.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.job.events.is_closed()
    }

    /// Counts the end of a sequence whose answer is closed.
    pub(crate) fn count_cancelled(&self) {
        if let Some(metrics) = self.metrics() {
            let discarded = self.job.events.is_discarded();
            (if discarded { &metrics.failed } else { &metrics.cancelled }).inc();
        }
    }

    fn metrics(&self) -> Option<&ModelMetrics> {
        self.job.metrics.as_ref()
    }

    /// What it can compute in the next step.
    pub(crate) fn demand(&self) -> RowDemand {
        match self.tokens.len() - self.cached {
            0 | 1 => RowDemand::Decode,
            missing => RowDemand::Prompt(missing),
        }
    }

    /// Its rows of a step with `rows` rows.
    pub(crate) fn step(&self, rows: usize) -> SequenceStep<'_> {
        let end = self.cached + rows;
        let (tokens, logits) = if !self.draft.rows().is_empty() {
            (self.draft.rows(), LogitsRows::All)
        } else if end == self.tokens.len() {
            (&self.tokens[self.cached..end], LogitsRows::Last)
        } else {
            (&self.tokens[self.cached..end], LogitsRows::None)
        };
        let blocks = self.blocks.as_ref().map_or(&[][..], |blocks| blocks.ids());
        SequenceStep { tokens, cached_tokens: self.cached, blocks, logits }
    }

    /// Tokens in the cache.
    pub(crate) fn cached(&self) -> usize {
        self.cached
    }

    /// Drops its draft tokens and proposes no more.
    pub(crate) fn disable_speculation(&mut self) {
        self.draft = DraftTokens::disabled();
    }

    /// How many draft tokens it should get, at most `limit`. Their blocks are allocated.
    pub(crate) fn draft_tokens_wanted(&mut self, limit: usize) -> usize {
        // The model itself chooses the last of the tokens that may still be produced.
        let limit = limit.min(self.job.completion.remaining_tokens().saturating_sub(1));
        let wanted = self.draft.draft_len().min(limit);
        if wanted > 0 && self.reserve(1 + wanted) { wanted } else { 0 }
    }

    /// Adds a draft token.
    pub(crate) fn push_draft_token(&mut self, id: u32) {
        if let Some(latest) = self.tokens.last() {
            self.draft.push(*latest, id);
        }
    }

    /// The draft tokens of the next step.
    pub(crate) fn draft_ids(&self) -> &[u32] {
        self.draft.ids()
    }

    /// Whether the draft model has read less of the prompt than the model.
    pub(crate) fn draft_model_lags(&self) -> bool {
        self.draft.drafted().is_some_and(|drafted| drafted < self.cached.min(self.job.prompt.len()))
    }

    /// Adds rows to a step of the draft model, at most `max_rows`. Where logits are wanted, these are the
    /// tokens and draft tokens that its cache lacks, else the tokens that the model has read and it has not.
    /// True if these were all.
    pub(crate) fn feed_draft(&mut self, max_rows: usize, logits: LogitsRows, input: &mut StepInput) -> bool {
        let tokens = match logits {
            LogitsRows::None => &self.tokens[..self.cached],
            LogitsRows::Last | LogitsRows::All => &self.tokens,
        };
        let blocks = self.blocks.as_ref().map_or(&[][..], |blocks| blocks.ids());
        self.draft.feed(DraftFeed { tokens, blocks, max_rows, logits }, input)
    }

    /// Records the start of its first step.
    pub(crate) fn note_started(&mut self) {
        if self.started.is_none() {
            let now = Instant::now();
            self.started = Some(now);
            if let Some(metrics) = self.metrics() {
                metrics.queue_wait.observe((now - self.job.submitted).as_secs_f64());
            }
        }
    }

    /// Computes what the next token needs beside its logits; called while the device computes.
    pub(crate) fn prepare(&mut self) {
        self.job.completion.prepare();
    }

    /// Processes a finished step of `rows` rows and its rows of logits: none for a chunk of a prompt,
    /// otherwise one for each draft token and one more.
    pub(crate) fn step_done<'a>(
        &mut self,
        rows: usize,
        logits: impl Iterator<Item = &'a [f32]>,
        scratch: &mut Scratch,
        tokenizer: &Tokenizer,
    ) -> StepOutcome {
        self.count_rows(rows);
        let mut outcome = StepOutcome::Running;
        let proposed = self.draft.ids().len();
        // Counted before any event is sent, so that a caller that has its answer finds it counted.
        self.metrics().inspect(|metrics| metrics.speculation.proposed.inc_by(proposed as u64));
        let (mut emitted, mut accepted) = (0, 0);
        for logits in logits {
            let mut is_accepted = false;
            outcome = match self.job.completion.next(logits, scratch, tokenizer) {
                Ok(token) => {
                    is_accepted = self.draft.ids().get(emitted) == Some(&token.id);
                    if let (true, Some(metrics)) = (is_accepted, self.metrics()) {
                        metrics.speculation.accepted.inc();
                    }
                    self.emit(token)
                }
                Err(error) => {
                    // Only the model's own row can be a model fault; the caller's settings cannot.
                    let broken = matches!(error, GenerateError::Model(_));
                    self.fail(error);
                    if broken { StepOutcome::ModelBroken } else { StepOutcome::Ended }
                }
            };
            emitted += 1;
            accepted += usize::from(is_accepted);
            // The next row is that of the draft token, so it counts only if that token was chosen.
            if outcome != StepOutcome::Running || !is_accepted {
                break;
            }
        }
        // Rows of rejected draft tokens do not count as cached.
        self.cached += if proposed == 0 { rows } else { emitted };
        self.max_cached = self.max_cached.max(self.cached);
        self.draft.verified(accepted, self.cached);
        if outcome != StepOutcome::ModelBroken {
            self.register_blocks();
        }
        outcome
    }

    /// Prepares it for another step after one that was refused: nothing was computed.
    pub(crate) fn step_refused(&mut self) {
        self.draft.discard(self.cached);
    }

    /// Makes its full blocks available to other sequences.
    pub(crate) fn register_blocks(&mut self) {
        let shared = self.draft.shared_tokens(self.cached);
        if let (true, Some(blocks)) = (self.job.metrics.is_some(), &mut self.blocks) {
            blocks.register(&self.tokens[..shared]);
        }
    }

    /// Counts the rows of a step: new ones of the prompt, and those that were in the cache before a
    /// preemption.
    fn count_rows(&self, rows: usize) {
        let Some(metrics) = self.metrics() else { return };
        let (from, to) = (self.cached, self.cached + rows);
        let new = to.min(self.job.prompt.len()).saturating_sub(from.max(self.max_cached));
        metrics.prompt_tokens.inc_by(new as u64);
        metrics.cache.recomputed_tokens.inc_by(to.min(self.max_cached).saturating_sub(from) as u64);
    }

    fn emit(&mut self, token: EmittedToken) -> StepOutcome {
        let EmittedToken { id, text, margin, logprobs, end } = token;
        self.tokens.push(id);
        self.record_token_time();
        self.send(Ok(GenerationEvent::Token { id, text, margin, logprobs }));
        match end {
            None => StepOutcome::Running,
            Some(end) => {
                self.finish(end);
                StepOutcome::Ended
            }
        }
    }

    fn record_token_time(&mut self) {
        let now = Instant::now();
        if let Some(metrics) = self.metrics() {
            metrics.generated_tokens.inc();
            match self.last_token {
                Some(last) => metrics.inter_token.observe((now - last).as_secs_f64()),
                None => metrics.first_token.observe((now - self.job.submitted).as_secs_f64()),
            }
        }
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    fn finish(&mut self, end: CompletionEnd) {
        let CompletionEnd { reason, stop } = end;
        if let Some(metrics) = self.metrics() {
            match reason {
                FinishReason::Stop => metrics.stop.inc(),
                FinishReason::Length => metrics.length.inc(),
            }
        }
        let timings = self.timings();
        self.send(Ok(GenerationEvent::Finished {
            reason,
            stop,
            prompt_tokens: self.job.prompt.len(),
            completion_tokens: self.tokens.len() - self.job.prompt.len(),
            timings,
        }));
    }

    fn timings(&self) -> Timings {
        let submitted = self.job.submitted;
        let started = self.started.unwrap_or(submitted);
        let first = self.first_token.unwrap_or(started);
        let last = self.last_token.unwrap_or(first);
        Timings { queue: started - submitted, prefill: first - started, decode: last - first }
    }

    /// Ends it with an error.
    pub(crate) fn fail(&mut self, error: GenerateError) {
        if let Some(metrics) = self.metrics() {
            metrics.failed.inc();
        }
        self.send(Err(error));
    }

    /// Ends it because the device refused a step with it.
    pub(crate) fn fail_refused(&mut self, refusal: &StepError) {
        self.fail(RequestFault::RefusedStep { message: refusal.to_string() }.into());
    }

    /// Ends it before it started, because the queue is full.
    pub(crate) fn refuse(&mut self, retry_after: Duration) {
        if let Some(metrics) = self.metrics() {
            metrics.overloaded.inc();
        }
        self.send(Err(GenerateError::Overloaded { retry_after }));
    }

    fn send(&self, event: EventResult) {
        self.job.events.send(event);
    }
}

impl HasQueueKey for Sequence {
    fn queue_key(&self) -> &QueueKey {
        &self.key
    }
}
