//! The device thread: it alone talks to the backend, and it never waits for a caller.
//!
//! One turn of its loop takes what arrived, drops what was cancelled, admits what fits, runs one step and hands out
//! the tokens. Between two turns nothing is held that a dropped request would not give back by itself.

use crate::blocks::{BlockPool, blocks_for};
use crate::config::{Sizes, Speculation, StartError};
use crate::contest::{Lack, Runs, gives_way, gives_way_to_growth};
use crate::metrics::ModelMetrics;
use crate::queue::{DUE_PART, Place, Placed, Queue};
use crate::request::GenerateError;
use crate::sampler::Scratch;
use crate::scheduler::{Ask, Budget, Pace, Split};
use crate::sequence::{After, Job, Sequence};
use crate::shared::Shared;
use crate::speculation::{DraftModel, Guesser, Guesses, Room, VERIFIED_ROWS};
use crate::tenants::{Tenant, Tenants};
use crate::thread::{self, OnProgress};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    Backend, BackendError, Executable, Limits, LoadSpec, Loaded, LogitsRows, MemoryReport, Numerics,
    StepInput, StepOutput,
};

/// Everything a device thread starts with.
pub(crate) struct Start {
    pub(crate) model: Arc<Model>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) numerics: Numerics,
    pub(crate) speculation: Option<Speculation>,
    pub(crate) sizes: Sizes,
    pub(crate) jobs: Receiver<Job>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: ModelMetrics,
    pub(crate) progress: OnProgress,
}

impl Start {
    /// Starts the thread and waits until the model is on the device.
    pub(crate) fn spawn(self) -> Result<MemoryReport, StartError> {
        let (device, shared) = (self.backend.caps().description.clone(), Arc::clone(&self.shared));
        thread::start("engine", device, shared, || self.load(), Device::run)
    }

    fn load(mut self) -> Result<(Device, MemoryReport), BackendError> {
        let sizes = self.sizes;
        let guessed = if self.speculation.is_some() { VERIFIED_ROWS } else { 0 };
        let request = PlanRequest {
            context_tokens: sizes.context_tokens,
            limits: Limits {
                rows: sizes.token_budget,
                sequences: sizes.max_batch_size,
                // Each sequence has at most one beside its guesses.
                logits_rows: sizes.max_batch_size + guessed,
            },
            fused: self.backend.caps().fused,
        };
        let plan = self.model.plan(&request)?;
        let mut loaded = self.backend.load(LoadSpec {
            weights: Arc::clone(self.model.weights()),
            plan: &plan,
            kv_blocks: sizes.kv_blocks,
            numerics: self.numerics,
            progress: &mut self.progress,
        })?;
        let executable = loaded.compile(&plan)?;
        let mut memory = loaded.memory();
        // The answers' room on this side.
        memory.other_bytes += (plan.answer_len() * size_of::<f32>()) as u64;
        let step = Step {
            output: StepOutput::with_room_for(&plan),
            scratch: Scratch::with_room_for(self.model.facts().vocabulary),
            ..Step::default()
        };
        let guesser = match &self.speculation {
            None => None,
            Some(Speculation::Ngram) => Some(Guesser::Ngram),
            Some(Speculation::Draft(model)) => {
                let (draft, its) = DraftModel::load(&mut *self.backend, model, &sizes, self.numerics)?;
                memory = memory.and(&its);
                Some(Guesser::Draft(Box::new(draft)))
            }
        };
        let pool = BlockPool::new(sizes.kv_blocks, self.metrics.cache.blocks.clone());
        let device = Device {
            guesser,
            executable,
            _loaded: loaded,
            _backend: self.backend,
            running: Vec::new(),
            waiting: Queue::default(),
            tenants: Tenants::default(),
            arrived: 0,
            pace: Pace::new(sizes.token_budget, sizes.step_target),
            worked: Duration::ZERO,
            pool,
            jobs: self.jobs,
            shared: self.shared,
            metrics: self.metrics,
            model: self.model,
            sizes,
            step,
        };
        Ok((device, memory))
    }
}

/// The buffers of a step, kept so that steps allocate next to nothing.
#[derive(Default)]
struct Step {
    input: StepInput,
    output: StepOutput,
    asks: Vec<Ask>,
    split: Split,
    scratch: Scratch,
}

/// The thread's state. Fields are dropped in order: what runs before what it runs on.
struct Device {
    /// By class, then in the order of arrival.
    running: Vec<Sequence>,
    waiting: Queue<Sequence>,
    tenants: Tenants,
    /// Requests that have arrived so far.
    arrived: u64,
    pace: Pace,
    /// Time of steps since a request last ended.
    worked: Duration,
    guesser: Option<Guesser>,
    executable: Box<dyn Executable>,
    _loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
    pool: BlockPool,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
    metrics: ModelMetrics,
    model: Arc<Model>,
    sizes: Sizes,
    step: Step,
}

impl Device {
    fn run(mut self) {
        while self.take_jobs() && !self.shared.stopping() {
            self.sweep_cancelled();
            self.shed();
            self.admit();
            self.shared.set_running(self.running.len());
            if !self.running.is_empty() {
                self.step();
                self.shared.set_running(self.running.len());
            }
        }
        self.end();
    }

    /// Takes what has arrived, and waits for something where there is nothing to do. False when no more can come.
    fn take_jobs(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.jobs.recv() {
                Ok(job) => self.arrive(job),
                Err(_) => return false,
            }
        }
        while let Ok(job) = self.jobs.try_recv() {
            self.arrive(job);
        }
        true
    }

    fn arrive(&mut self, job: Job) {
        self.tenants.enter(&job.tenant);
        let guesses = self.guesser.as_ref().map_or_else(Guesses::none, Guesser::begin);
        self.waiting.push(Sequence::new(job, self.arrived, guesses));
        self.arrived += 1;
    }

    /// Drops requests whose callers have gone. Their blocks are free before anything is admitted.
    fn sweep_cancelled(&mut self) {
        let Self { waiting, running, tenants, .. } = self;
        let mut stays = |sequence: &Sequence| {
            if !sequence.is_cancelled() {
                return true;
            }
            if let Some(metrics) = sequence.metrics() {
                metrics.cancelled.inc();
            }
            tenants.leave(&sequence.place().tenant);
            false
        };
        waiting.retain(&mut stays);
        running.retain(&mut stays);
    }

    /// Refuses what the queue has no room for because others with precedence came. Who has been told something already
    /// is never put out.
    fn shed(&mut self) {
        let most = self.sizes.max_batch_size + self.sizes.max_queue;
        while self.waiting.len() + self.running.len() > most {
            let Some(mut last) = self.waiting.take_last(Sequence::is_silent) else { return };
            self.tenants.leave(&last.place().tenant);
            last.refuse(self.shared.retry_after());
        }
    }

    /// Admits, in turn, as many as there is room for: a place in the batch, and blocks for all tokens of the next one
    /// beside what the running ones need for theirs and one more block for each of them. Others give way where they
    /// have to. It always fits once nothing runs, because no request needs more than one full context and the cache
    /// holds at least that.
    ///
    /// Who gave way may be whose turn it is next. Each one gives way to a better claim, so this comes to an end; the
    /// bound is there so that it needs no proof.
    fn admit(&mut self) {
        let mut may_give_way = self.sizes.max_batch_size;
        loop {
            let running_of = |tenant: &Tenant| {
                self.running.iter().filter(|sequence| sequence.place().tenant == *tenant).count()
            };
            let due = self.running.iter().filter(|sequence| sequence.place().due).count();
            let more_due = due < self.sizes.max_batch_size.div_ceil(DUE_PART);
            let Some(turn) = self.waiting.turn(&self.tenants, running_of, more_due) else { return };
            let Some(next) = self.waiting.peek(&turn) else { return };
            let blocks = self.pool.matching(next.shared_beginning());
            let own = blocks_for(next.tokens().len());
            let promised: usize = self.running.iter().map(|sequence| sequence.missing_blocks() + 1).sum();
            let short = (own - blocks.ids().len() + promised).saturating_sub(self.pool.available());
            let lack = if self.running.len() >= self.sizes.max_batch_size {
                Some(Lack::Place)
            } else if short > 0 && !self.running.is_empty() {
                Some(Lack::Blocks { short, own })
            } else {
                None
            };
            if let Some(lack) = lack {
                let gives_way = gives_way((turn.class(), turn.tenant()), lack, &self.runs());
                let Some(index) = gives_way.filter(|_| may_give_way > 0) else { return };
                may_give_way -= 1;
                self.preempt(index);
                continue;
            }
            let Some(mut next) = self.waiting.take(&turn) else { return };
            if turn.is_due() {
                next.raise();
            }
            next.admit(blocks);
            let place = self.running.partition_point(|other| other.place().rank() < next.place().rank());
            self.running.insert(place, next);
        }
    }

    fn runs(&self) -> Vec<Runs<'_>> {
        self.running
            .iter()
            .map(|sequence| Runs { place: sequence.place(), blocks: blocks_for(sequence.tokens().len()) })
            .collect()
    }

    /// Lets a running sequence wait again.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        sequence.preempt();
        self.waiting.push(sequence);
    }

    /// Decides who has how many rows in the next step and gets the blocks for them. Where these run out, somebody gives
    /// his own up and waits again; the first sequence always goes on, so the engine never stands still.
    fn share_out(&mut self) {
        loop {
            let Self { running, tenants, step: Step { asks, split, .. }, .. } = self;
            let lowest = running.last().map(|sequence| sequence.place().class);
            asks.clear();
            asks.extend(running.iter().map(|sequence| {
                let Place { class, tenant, due, .. } = sequence.place();
                let overtakes = lowest.is_some_and(|lowest| *class < lowest);
                Ask {
                    wants: sequence.wants(),
                    rank: sequence.place().rank(),
                    standing: tenants.standing(tenant),
                    behind: *due || overtakes || tenants.is_behind(tenant),
                }
            }));
            let alone = running.len() == 1 && self.waiting.is_empty();
            let prompt_rows = self.pace.prompt_rows(alone);
            split.share_out(
                asks,
                Budget { rows: self.sizes.token_budget, prompt_rows, may_pause: self.pace.may_pause() },
            );
            let mut rows = split.rows.iter();
            let short =
                running.iter_mut().any(|sequence| rows.next().is_some_and(|rows| !sequence.make_room(*rows)));
            if !short {
                return;
            }
            let Some(index) = gives_way_to_growth(&self.runs()) else { return };
            self.preempt(index);
        }
    }

    fn step(&mut self) {
        self.share_out();
        let began = Instant::now();
        match self.compute() {
            Ok(()) => self.collect(began),
            Err(error) => self.fail(&error),
        }
    }

    /// Guesses, and computes one step.
    fn compute(&mut self) -> Result<(), BackendError> {
        if let Some(guesser) = &mut self.guesser {
            let alone = self.running.len() == 1 && self.waiting.is_empty();
            let room = Room { rows: self.sizes.token_budget, draft_rows: self.pace.prompt_rows(alone) };
            if let Err(error) = guesser.guess(&mut self.running, &mut self.step.split.rows, room) {
                self.guesses_fail(&error);
            }
        }
        let Step { input, output, split, .. } = &mut self.step;
        input.clear();
        for (sequence, rows) in self.running.iter_mut().zip(&split.rows).filter(|(_, rows)| **rows > 0) {
            sequence.step_begins();
            input.push_sequence(sequence.step(*rows));
        }
        let submitted = self.executable.submit(input);
        self.running.iter_mut().for_each(Sequence::prepare);
        submitted.and_then(|()| self.executable.wait(output))
    }

    /// Takes note of a step that went well.
    fn collect(&mut self, began: Instant) {
        // Before anybody is told something: whoever sees his answer finds the engine well.
        self.shared.step_succeeded();
        let Self { running, tenants, pool, step: Step { output, split, scratch, .. }, .. } = self;
        let tokenizer = self.model.tokenizer();
        let (mut first_row, mut rows) = (0, split.rows.iter().copied());
        let before = running.len();
        running.retain_mut(|sequence| {
            let rows = rows.next().unwrap_or(0);
            if rows == 0 {
                return true;
            }
            let before = sequence.cached();
            let count = match sequence.step(rows).logits {
                LogitsRows::None => 0,
                LogitsRows::Last => 1,
                LogitsRows::All => rows,
            };
            let logits = (first_row..first_row + count).map(|row| output.row(row));
            first_row += count;
            let after = sequence.step_done(rows, logits, scratch, tokenizer);
            // Of guesses only the right ones were served.
            tenants.charge(&sequence.place().tenant, sequence.cached() - before);
            if after == After::Broken {
                pool.forget();
            }
            if after != After::Running {
                tenants.leave(&sequence.place().tenant);
            }
            after == After::Running
        });
        let ended = before - running.len();
        if let Some(guesser) = &mut self.guesser
            && let Err(error) = guesser.follow(running)
        {
            self.guesses_fail(&error);
        }
        let Self { step: Step { split, .. }, .. } = self;
        let took = began.elapsed();
        self.pace.note(split, took);
        self.worked += took;
        if let Some(each) = u32::try_from(ended).ok().and_then(|ended| self.worked.checked_div(ended)) {
            self.shared.requests_took(each);
            self.worked = Duration::ZERO;
        }
    }

    /// Answers do not depend on guesses, so without them the engine goes on. A device that is broken shows in the model's
    /// own next step.
    fn guesses_fail(&mut self, error: &BackendError) {
        tracing::error!(%error, "the draft model failed; nothing is guessed from now on");
        self.guesser = None;
        self.running.iter_mut().chain(self.waiting.iter_mut()).for_each(Sequence::guess_no_more);
    }

    /// After a failed step nobody's cache can be trusted.
    fn fail(&mut self, error: &BackendError) {
        tracing::error!(%error, sequences = self.running.len(), "a step failed");
        self.metrics.failed_steps.inc();
        self.shared.step_failed();
        self.pool.forget();
        let message = error.to_string();
        for mut sequence in self.running.drain(..) {
            self.tenants.leave(&sequence.place().tenant);
            sequence.fail(GenerateError::Backend { message: message.clone() });
        }
    }

    /// Tells everyone who is left that the engine has stopped.
    fn end(mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.arrive(job);
        }
        for mut sequence in self.waiting.drain().chain(self.running.drain(..)) {
            sequence.fail(GenerateError::Stopped);
        }
    }
}
