//! One request inside the engine: first a waiting job, then a running sequence.

use crate::answer::{Answer, End, Said};
use crate::blocks::Blocks;
use crate::generation::EventResult;
use crate::metrics::{Counted, ModelMetrics};
use crate::request::{FinishReason, GenerateError, GenerationEvent, Timings};
use crate::sampler::Scratch;
use crate::scheduler::Wants;
use crate::shared::Ticket;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use trustformers_model::Tokenizer;
use trustformers_plan::{LogitsRows, SequenceStep};

/// A request on its way to the device.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) prompt: Arc<[u32]>,
    /// KV blocks of the worst case.
    pub(crate) blocks: usize,
    /// Chooses its tokens and knows which is the last.
    pub(crate) answer: Answer,
    pub(crate) submitted: Instant,
    pub(crate) events: mpsc::Sender<EventResult>,
    /// `None` for requests that are not a caller's.
    pub(crate) metrics: Option<ModelMetrics>,
    /// Counts it as waiting while this exists.
    pub(crate) waiting: Option<Counted>,
    /// Its place among the requests in flight, given back when it is dropped.
    pub(crate) _ticket: Ticket,
}

impl Job {
    /// Whether the caller dropped its generation.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }
}

/// What became of a sequence after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It goes on.
    Running,
    /// It ended and its caller was told.
    Ended,
}

/// A request that has its KV blocks and takes part in steps.
#[derive(Debug)]
pub(crate) struct Sequence {
    blocks: Blocks,
    /// Tokens in the cache.
    cached: usize,
    /// Tokens produced.
    produced: usize,
    /// The latest token, which is not in the cache yet.
    latest: u32,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    _running: Option<Counted>,
    /// Last, so that its place in flight is given back after everything else: an idle engine holds nothing.
    job: Job,
}

impl Sequence {
    /// Admits a job with the blocks that were reserved for it.
    pub(crate) fn new(mut job: Job, blocks: Blocks) -> Self {
        job.waiting = None;
        let running = job.metrics.as_ref().map(|metrics| Counted::new(&metrics.running));
        Self {
            blocks,
            cached: 0,
            produced: 0,
            latest: 0,
            started: None,
            first_token: None,
            last_token: None,
            _running: running,
            job,
        }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.job.is_cancelled()
    }

    pub(crate) fn metrics(&self) -> Option<&ModelMetrics> {
        self.job.metrics.as_ref()
    }

    /// What it wants from the next step.
    pub(crate) fn wants(&self) -> Wants {
        match self.job.prompt.len().checked_sub(self.cached) {
            Some(left) if left > 0 => Wants::Prompt(left),
            _ => Wants::Decode,
        }
    }

    /// Its part of a step with `rows` rows.
    pub(crate) fn step(&self, rows: usize) -> SequenceStep<'_> {
        let (tokens, logits) = match self.wants() {
            Wants::Prompt(left) => {
                let logits = if rows == left { LogitsRows::Last } else { LogitsRows::None };
                (&self.job.prompt[self.cached..self.cached + rows], logits)
            }
            Wants::Decode => (std::slice::from_ref(&self.latest), LogitsRows::Last),
        };
        SequenceStep { tokens, cached_tokens: self.cached, blocks: self.blocks.ids(), logits }
    }

    /// Notes that a step of `rows` rows begins.
    pub(crate) fn step_begins(&mut self) {
        if self.started.is_none() {
            let now = Instant::now();
            self.started = Some(now);
            if let Some(metrics) = self.metrics() {
                metrics.queue_wait.observe((now - self.job.submitted).as_secs_f64());
            }
        }
    }

    /// Works out what can be known about the next token while the device computes its logits.
    pub(crate) fn prepare(&mut self) {
        self.job.answer.prepare();
    }

    /// Takes note of a finished step and of its logits where it had any.
    pub(crate) fn step_done(
        &mut self,
        rows: usize,
        logits: Option<&[f32]>,
        scratch: &mut Scratch,
        tokenizer: &Tokenizer,
    ) -> After {
        if let (Wants::Prompt(_), Some(metrics)) = (self.wants(), self.metrics()) {
            metrics.prompt_tokens.inc_by(rows as u64);
        }
        self.cached += rows;
        let Some(logits) = logits else { return After::Running };
        match self.job.answer.next(logits, scratch, tokenizer) {
            Ok(said) => self.say(said),
            Err(error) => {
                self.fail(error);
                After::Ended
            }
        }
    }

    fn say(&mut self, said: Said) -> After {
        let Said { id, text, margin, logprobs, end } = said;
        self.latest = id;
        self.produced += 1;
        self.note_time();
        self.tell(Ok(GenerationEvent::Token { id, text, margin, logprobs }));
        match end {
            None => After::Running,
            Some(end) => {
                self.finish(end);
                After::Ended
            }
        }
    }

    fn note_time(&mut self) {
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

    fn finish(&mut self, end: End) {
        let End { reason, stop } = end;
        if let Some(metrics) = self.metrics() {
            match reason {
                FinishReason::Stop => metrics.stop.inc(),
                FinishReason::Length => metrics.length.inc(),
            }
        }
        let timings = self.timings();
        self.tell(Ok(GenerationEvent::Finished {
            reason,
            stop,
            prompt_tokens: self.job.prompt.len(),
            completion_tokens: self.produced,
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
        self.tell(Err(error));
    }

    fn tell(&self, event: EventResult) {
        // The channel holds every event of the longest answer, so only a caller that has gone refuses one, which the
        // next step's sweep notices.
        let _gone = self.job.events.try_send(event);
    }
}
