//! One request inside the engine: first a waiting job, then a running sequence.

use crate::answer::{Answer, End, Said};
use crate::blocks::{Blocks, blocks_for};
use crate::census::Enrolled;
use crate::generation::EventResult;
use crate::metrics::{Counted, ModelMetrics};
use crate::priority::Priority;
use crate::queue::{Place, Placed};
use crate::request::{FinishReason, GenerateError, GenerationEvent, Timings};
use crate::sampler::Scratch;
use crate::scheduler::Wants;
use crate::shared::Ticket;
use crate::speculation::Guesses;
use crate::tenants::Tenant;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use trustformers_model::Tokenizer;
use trustformers_plan::{KV_BLOCK_TOKENS, LogitsRows, SequenceStep, StepInput};

/// A request on its way to the device.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) prompt: Arc<[u32]>,
    /// Chooses its tokens and knows which is the last.
    pub(crate) answer: Answer,
    pub(crate) submitted: Instant,
    pub(crate) events: mpsc::Sender<EventResult>,
    /// `None` for requests that are not a caller's.
    pub(crate) metrics: Option<ModelMetrics>,
    pub(crate) class: Priority,
    pub(crate) tenant: Tenant,
    /// Counts it among the requests of its class and tenant while this exists.
    pub(crate) _enrolled: Option<Enrolled>,
    /// Counts it as waiting while this exists.
    pub(crate) waiting: Option<Counted>,
    /// Its place among the requests in flight, given back when it is dropped.
    pub(crate) _ticket: Ticket,
}

/// What became of a sequence after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It goes on.
    Running,
    /// It ended and its caller was told.
    Ended,
    /// It ended because what the device computed is no number; its caller was told.
    Broken,
}

/// A request on the device thread. It waits without a block of the cache, or runs with as many as it has needed so
/// far; between the two it may change any number of times, and its caller sees nothing of that but the time.
#[derive(Debug)]
pub(crate) struct Sequence {
    place: Place,
    /// Prompt and answer so far; the last one is not in the cache.
    tokens: Vec<u32>,
    /// The table while it runs.
    blocks: Option<Blocks>,
    /// Tokens in the cache.
    cached: usize,
    /// The most that ever were, so that what is computed once more can be told.
    reached: usize,
    guesses: Guesses,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    running: Option<Counted>,
    /// Last, so that its place in flight is given back after everything else: an idle engine holds nothing.
    job: Job,
}

impl Sequence {
    /// A job that has arrived as number `order`, and what it begins to guess with.
    pub(crate) fn new(job: Job, order: u64, guesses: Guesses) -> Self {
        Self {
            place: Place { class: job.class, tenant: Arc::clone(&job.tenant), order, due: false },
            tokens: job.prompt.to_vec(),
            blocks: None,
            cached: 0,
            reached: 0,
            guesses,
            started: None,
            first_token: None,
            last_token: None,
            running: None,
            job,
        }
    }

    /// Puts it before all others until it ends.
    pub(crate) fn raise(&mut self) {
        self.place.class = Priority::High;
        self.place.due = true;
    }

    /// Whether its caller has been told nothing yet.
    pub(crate) fn is_silent(&self) -> bool {
        self.first_token.is_none()
    }

    /// Prompt and answer so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What of it may be known from others: nothing of the engine's own requests, which are there to be computed.
    pub(crate) fn shared_beginning(&self) -> &[u32] {
        if self.job.metrics.is_some() { &self.tokens } else { &[] }
    }

    /// Lets it run with the blocks of its beginning that were known.
    pub(crate) fn admit(&mut self, blocks: Blocks) {
        self.cached = blocks.ids().len() * KV_BLOCK_TOKENS;
        if let Some(metrics) = &self.job.metrics {
            metrics.cache.reused_tokens.inc_by(self.cached.saturating_sub(self.reached) as u64);
            self.running = Some(Counted::new(&metrics.running));
        }
        self.reached = self.reached.max(self.cached);
        self.guesses.admitted(self.cached);
        self.blocks = Some(blocks);
        self.job.waiting = None;
    }

    /// Takes its blocks, so that it waits again. What it has said stands; the cache is computed once more, as far as
    /// its blocks are not found again.
    pub(crate) fn preempt(&mut self) {
        self.blocks = None;
        self.cached = 0;
        self.guesses.admitted(0);
        self.running = None;
        if let Some(metrics) = &self.job.metrics {
            metrics.cache.preemptions.inc();
            self.job.waiting = Some(Counted::new(&metrics.waiting));
        }
    }

    /// Blocks that it lacks for all of its tokens.
    pub(crate) fn missing_blocks(&self) -> usize {
        let held = self.blocks.as_ref().map_or(0, |blocks| blocks.ids().len());
        blocks_for(self.tokens.len()).saturating_sub(held)
    }

    /// Makes room for `rows` more tokens in the cache, or says that there is none.
    pub(crate) fn make_room(&mut self, rows: usize) -> bool {
        let tokens = self.cached + rows;
        self.blocks.as_mut().is_some_and(|blocks| blocks.make_room(tokens))
    }

    /// Whether the caller dropped its generation.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.job.events.is_closed()
    }

    pub(crate) fn metrics(&self) -> Option<&ModelMetrics> {
        self.job.metrics.as_ref()
    }

    /// What it wants from the next step.
    pub(crate) fn wants(&self) -> Wants {
        match self.tokens.len() - self.cached {
            0 | 1 => Wants::Decode,
            left => Wants::Prompt(left),
        }
    }

    /// Its part of a step with `rows` rows.
    pub(crate) fn step(&self, rows: usize) -> SequenceStep<'_> {
        let end = self.cached + rows;
        let (tokens, logits) = if !self.guesses.rows().is_empty() {
            (self.guesses.rows(), LogitsRows::All)
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

    /// Forgets its guesses and makes no more.
    pub(crate) fn guess_no_more(&mut self) {
        self.guesses = Guesses::none();
    }

    /// How many tokens should be guessed for it, at most `most`; there is room for them in the cache.
    pub(crate) fn guesses_wanted(&mut self, most: usize) -> usize {
        // Of the tokens that may still come, the model itself chooses the last.
        let most = most.min(self.job.answer.left().saturating_sub(1));
        let wanted = self.guesses.worth().min(most);
        if wanted > 0 && self.make_room(1 + wanted) { wanted } else { 0 }
    }

    /// Takes one more guess.
    pub(crate) fn guess(&mut self, id: u32) {
        if let Some(latest) = self.tokens.last() {
            self.guesses.push(*latest, id);
        }
    }

    /// Tokens that are guessed for the next step.
    pub(crate) fn guesses(&self) -> &[u32] {
        self.guesses.ids()
    }

    /// Whether the draft model lacks something of the prompt that the model has read.
    pub(crate) fn draft_lacks_prompt(&self) -> bool {
        self.guesses.drafted().is_some_and(|drafted| drafted < self.cached.min(self.job.prompt.len()))
    }

    /// Adds its rows to a step of the draft model, at most `most`: what that lacks of all tokens and guesses where logits
    /// are wanted, else of what the model has read. Says whether these were all.
    pub(crate) fn feed_draft(&mut self, most: usize, logits: LogitsRows, input: &mut StepInput) -> bool {
        let tokens = match logits {
            LogitsRows::None => &self.tokens[..self.cached],
            LogitsRows::Last | LogitsRows::All => &self.tokens,
        };
        let blocks = self.blocks.as_ref().map_or(&[][..], |blocks| blocks.ids());
        self.guesses.feed((tokens, blocks), (most, logits), input)
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

    /// Takes note of a finished step and of its rows of logits: none of a part of a prompt, one for each guess and one
    /// more otherwise.
    pub(crate) fn step_done<'a>(
        &mut self,
        rows: usize,
        logits: impl Iterator<Item = &'a [f32]>,
        scratch: &mut Scratch,
        tokenizer: &Tokenizer,
    ) -> After {
        self.count(rows);
        let mut after = After::Running;
        let guessed = self.guesses.ids().len();
        // Counted before anything is told, so that whoever sees the answer finds it counted.
        self.metrics().inspect(|metrics| metrics.guesses.made.inc_by(guessed as u64));
        let (mut said, mut right) = (0, 0);
        for logits in logits {
            let mut is_right = false;
            after = match self.job.answer.next(logits, scratch, tokenizer) {
                Ok(token) => {
                    is_right = self.guesses.ids().get(said) == Some(&token.id);
                    if let (true, Some(metrics)) = (is_right, self.metrics()) {
                        metrics.guesses.right.inc();
                    }
                    self.say(token)
                }
                Err(error) => {
                    let broken = error == GenerateError::NotFinite;
                    self.fail(error);
                    if broken { After::Broken } else { After::Ended }
                }
            };
            said += 1;
            right += usize::from(is_right);
            // The next row is that of the guess, so it counts only if this was chosen.
            if after != After::Running || !is_right {
                break;
            }
        }
        // Of a row that was guessed wrong nothing remains.
        self.cached += if guessed == 0 { rows } else { said };
        self.reached = self.reached.max(self.cached);
        self.guesses.checked(right, self.cached);
        if after != After::Broken {
            self.learn();
        }
        after
    }

    /// Lets others find what it has computed.
    pub(crate) fn learn(&mut self) {
        let known = self.guesses.known(self.cached);
        if let (true, Some(blocks)) = (self.job.metrics.is_some(), &mut self.blocks) {
            blocks.learn(&self.tokens[..known]);
        }
    }

    /// Counts the rows of a step: new ones of the prompt, and those that were in the cache before.
    fn count(&self, rows: usize) {
        let Some(metrics) = self.metrics() else { return };
        let (from, to) = (self.cached, self.cached + rows);
        let new = to.min(self.job.prompt.len()).saturating_sub(from.max(self.reached));
        metrics.prompt_tokens.inc_by(new as u64);
        metrics.cache.recomputed_tokens.inc_by(to.min(self.reached).saturating_sub(from) as u64);
    }

    fn say(&mut self, said: Said) -> After {
        let Said { id, text, margin, logprobs, end } = said;
        self.tokens.push(id);
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
        self.tell(Err(error));
    }

    /// Ends it before it began, because the queue is full.
    pub(crate) fn refuse(&mut self, retry_after: Duration) {
        if let Some(metrics) = self.metrics() {
            metrics.overloaded.inc();
        }
        self.tell(Err(GenerateError::Overloaded { retry_after }));
    }

    fn tell(&self, event: EventResult) {
        // The channel holds every event of the longest answer, so only a caller that has gone refuses one, which the
        // next step's sweep notices.
        let _gone = self.job.events.try_send(event);
    }
}

impl Placed for Sequence {
    fn place(&self) -> &Place {
        &self.place
    }
}
