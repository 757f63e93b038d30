//! One request on the device thread: a job that waits, and then a sequence that runs.

mod steps;

pub(crate) use steps::{AnsweredStep, StepOutcome};

use super::buffer::EventSender;
use super::completion::{Completion, CompletionEnd, EmittedToken};
use crate::adapters::ServedAdapter;
use crate::device_thread::Permit;
use crate::faults::RequestFault;
use crate::metrics::{GaugeGuard, ModelMetrics};
use crate::prefix_cache::{BlockTable, PrefixRoot};
use crate::request::{
    EventResult, FinishReason, GenerateError, GenerationEvent, GenerationObserver, GenerationOutcome,
    GenerationProgress, Timings,
};
use crate::scheduling::admission::InflightGuard;
use crate::scheduling::priority::Priority;
use crate::scheduling::queue::{HasQueueKey, QueueKey};
use crate::scheduling::tenants::{Tenant, TenantId};
use crate::speculation::{DraftFeed, DraftOffer, DraftTokens};
use prometheus::IntCounter;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steps::RowsInFlight;
use trustformers_plan::{KV_BLOCK_TOKENS, LogitsRows, StepError, StepInput};

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
    /// What its tenant was served; none for the engine's own requests.
    pub(crate) served_tokens: Option<IntCounter>,
    /// Is told its course.
    pub(crate) observer: Option<Box<dyn GenerationObserver>>,
    /// Held until the request has ended.
    pub(crate) adapter: Option<Arc<ServedAdapter>>,
    pub(crate) class: Priority,
    pub(crate) tenant: Tenant,
    /// Keeps it in the admission counts.
    pub(crate) _inflight: Option<InflightGuard>,
    /// Counts it as waiting.
    pub(crate) waiting: Option<GaugeGuard>,
    /// Released when it is dropped.
    pub(crate) _permit: Permit,
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
    /// Tokens in the cache, without those of steps in flight.
    cached: usize,
    /// Its rows of the steps in flight, in their order.
    in_flight: VecDeque<RowsInFlight>,
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
            in_flight: VecDeque::new(),
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

    /// The root of its blocks in the prefix cache.
    pub(crate) fn prefix_root(&self) -> PrefixRoot {
        self.job.adapter.as_ref().map_or(PrefixRoot::MODEL, |adapter| adapter.root)
    }

    /// Starts it with the cached blocks of its prefix.
    pub(crate) fn admit(&mut self, blocks: BlockTable) {
        self.cached = blocks.token_blocks() * KV_BLOCK_TOKENS;
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
    /// again, except for the blocks that are still cached then. The results of its rows in flight are
    /// discarded; the device has written them before any later owner of the blocks writes.
    pub(crate) fn preempt(&mut self) {
        self.in_flight.clear();
        self.blocks = None;
        self.cached = 0;
        self.draft.admitted(0);
        self.running = None;
        self.observe(GenerationProgress::Preempted);
        if let Some(metrics) = &self.job.metrics {
            metrics.cache.preemptions.inc();
            self.job.waiting = Some(GaugeGuard::new(&metrics.waiting));
        }
    }

    /// Blocks that it still needs for all of its tokens.
    pub(crate) fn missing_blocks(&self) -> usize {
        let tokens = self.tokens.len() + self.awaited_tokens();
        self.blocks.as_ref().map_or(0, |blocks| blocks.missing_until(tokens))
    }

    /// Blocks that it needs for `rows` more tokens in the cache and does not have.
    pub(crate) fn blocks_missing_for(&self, rows: usize) -> usize {
        let tokens = self.computed() + rows;
        self.blocks.as_ref().filter(|_| rows > 0).map_or(0, |blocks| blocks.missing_for(tokens))
    }

    /// Allocates blocks for `rows` more tokens in the cache. False where there are not enough. Before that it
    /// releases the blocks that neither its next rows nor those in flight can reach.
    pub(crate) fn reserve(&mut self, rows: usize) -> bool {
        let (tokens, cached) = (self.computed() + rows, self.cached);
        self.blocks.as_mut().is_some_and(|blocks| {
            blocks.release_unreachable(cached);
            blocks.reserve(tokens)
        })
    }

    /// Whether its caller dropped the generation, or the answer was discarded because it was not read.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.job.events.is_closed()
    }

    /// Counts the end of a sequence whose answer is closed.
    pub(crate) fn count_cancelled(&mut self) {
        let discarded = self.job.events.is_discarded();
        if let (false, Some(metrics)) = (discarded, self.metrics()) {
            let stages = &metrics.cancellations;
            let stage = match (self.started, self.first_token) {
                (None, _) => &stages.queued,
                (Some(_), None) => &stages.prefill,
                (Some(_), Some(_)) => &stages.decode,
            };
            stage.inc();
        }
        self.ended(if discarded { GenerationOutcome::Failed } else { GenerationOutcome::Cancelled });
    }

    /// Counts its end, and tells it. Called before its caller gets the last event, so that a caller that has
    /// it finds it counted.
    fn ended(&mut self, outcome: GenerationOutcome) {
        if let Some(metrics) = self.metrics() {
            let counter = match outcome {
                GenerationOutcome::Stop => &metrics.stop,
                GenerationOutcome::Length => &metrics.length,
                GenerationOutcome::Cancelled => &metrics.cancelled,
                GenerationOutcome::Failed => &metrics.failed,
                GenerationOutcome::Overloaded => &metrics.overloaded,
            };
            counter.inc();
        }
        self.observe(GenerationProgress::Ended(outcome));
    }

    fn observe(&mut self, progress: GenerationProgress) {
        if let Some(observer) = &mut self.job.observer {
            observer.observe(progress);
        }
    }

    /// Counts tokens that were computed for its tenant.
    pub(crate) fn count_served(&self, tokens: usize) {
        if let Some(served) = &self.job.served_tokens {
            served.inc_by(tokens as u64);
        }
    }

    fn metrics(&self) -> Option<&ModelMetrics> {
        self.job.metrics.as_ref()
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
    pub(crate) fn draft_tokens_wanted(&mut self, limit: usize, offer: &DraftOffer) -> usize {
        // The model itself chooses the last of the tokens that may still be produced.
        let limit = limit.min(self.job.completion.remaining_tokens().saturating_sub(1));
        let wanted = self.draft.draft_len(offer).min(limit);
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
            self.observe(GenerationProgress::Started);
        }
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
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.observe(GenerationProgress::FirstToken);
        }
        self.last_token = Some(now);
    }

    fn finish(&mut self, end: CompletionEnd) {
        let CompletionEnd { reason, stop } = end;
        let timings = self.timings();
        if let Some(metrics) = self.metrics() {
            metrics.latency.finished(self.job.submitted.elapsed(), timings);
        }
        self.ended(match reason {
            FinishReason::Stop => GenerationOutcome::Stop,
            FinishReason::Length => GenerationOutcome::Length,
        });
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
        self.ended(GenerationOutcome::Failed);
        self.send(Err(error));
    }

    /// Ends it because the device refused a step with it.
    pub(crate) fn fail_refused(&mut self, refusal: &StepError) {
        self.fail(RequestFault::RefusedStep { message: refusal.to_string() }.into());
    }

    /// Ends it before it started, because the queue is full.
    pub(crate) fn refuse(&mut self, retry_after: Duration) {
        self.ended(GenerationOutcome::Overloaded);
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
