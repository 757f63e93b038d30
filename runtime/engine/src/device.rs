//! The device thread: it alone talks to the backend, and it never waits for a caller.
//!
//! One turn of its loop takes what arrived, drops what was cancelled, admits what fits, runs one step and hands out
//! the tokens. Between two turns nothing is held that a dropped request would not give back by itself.

use crate::blocks::{BlockPool, blocks_for};
use crate::config::{Sizes, StartError};
use crate::metrics::ModelMetrics;
use crate::request::GenerateError;
use crate::sampler::Scratch;
use crate::scheduler;
use crate::sequence::{After, Job, Sequence};
use crate::shared::{EndMark, Shared};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    Backend, BackendError, Executable, Limits, LoadProgress, LoadSpec, Loaded, LogitsRows, MemoryReport,
    Numerics, StepInput, StepOutput,
};

/// What is told about loading; called on the device thread.
pub(crate) type OnProgress = Box<dyn FnMut(LoadProgress) + Send>;

/// Everything a device thread starts with.
pub(crate) struct Start {
    pub(crate) model: Arc<Model>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) numerics: Numerics,
    pub(crate) sizes: Sizes,
    pub(crate) jobs: Receiver<Job>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: ModelMetrics,
    pub(crate) progress: OnProgress,
}

impl Start {
    /// Starts the thread and waits until the model is on the device.
    pub(crate) fn spawn(self) -> Result<MemoryReport, StartError> {
        let device = self.backend.caps().description.clone();
        // One message: how loading went.
        let (loaded, ready) = sync_channel(1);
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let shared = Arc::clone(&self.shared);
            // Declared first, hence dropped last: whoever sees the end finds everything given back.
            let _end = EndMark(Arc::clone(&shared));
            match self.load() {
                Ok((device, memory)) => {
                    let told = loaded.send(Ok(memory));
                    if told.is_ok() {
                        device.run();
                    }
                }
                Err(error) => {
                    // Nobody waits any more only if the starting thread died.
                    let _gone = loaded.send(Err(error));
                }
            }
        })?;
        match ready.recv() {
            Ok(Ok(memory)) => Ok(memory),
            Ok(Err(error)) => Err(StartError::Backend { device, message: error.to_string() }),
            Err(_) => Err(StartError::Backend {
                device,
                message: "it panicked while loading; see the log".to_owned(),
            }),
        }
    }

    fn load(mut self) -> Result<(Device, MemoryReport), BackendError> {
        let sizes = self.sizes;
        let request = PlanRequest {
            context_tokens: sizes.context_tokens,
            limits: Limits {
                rows: sizes.token_budget,
                sequences: sizes.max_batch_size,
                logits_rows: sizes.max_batch_size,
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
        let memory = loaded.memory();
        let pool = BlockPool::new(sizes.kv_blocks, self.metrics.cache.blocks.clone());
        let device = Device {
            executable,
            _loaded: loaded,
            _backend: self.backend,
            running: Vec::new(),
            waiting: VecDeque::new(),
            arrived: 0,
            pool,
            jobs: self.jobs,
            shared: self.shared,
            model: self.model,
            sizes,
            step: Step::default(),
        };
        Ok((device, memory))
    }
}

/// The buffers of a step, kept so that steps do not allocate.
#[derive(Default)]
struct Step {
    input: StepInput,
    output: StepOutput,
    wants: Vec<scheduler::Wants>,
    rows: Vec<usize>,
    scratch: Scratch,
}

/// The thread's state. Fields are dropped in order: what runs before what it runs on.
struct Device {
    /// In the order of arrival, like those that wait: the last is the first to give its blocks up.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    /// Requests that have arrived so far.
    arrived: u64,
    executable: Box<dyn Executable>,
    _loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
    pool: BlockPool,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
    model: Arc<Model>,
    sizes: Sizes,
    step: Step,
}

impl Device {
    fn run(mut self) {
        while self.take_jobs() && !self.shared.stopping() {
            self.sweep_cancelled();
            self.admit();
            self.shared.set_running(self.running.len());
            if !self.running.is_empty() {
                self.step();
                self.shared.set_running(self.running.len());
                self.shared.step_done();
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
        self.waiting.push_back(Sequence::new(job, self.arrived));
        self.arrived += 1;
    }

    /// Drops requests whose callers have gone. Their blocks are free before anything is admitted.
    fn sweep_cancelled(&mut self) {
        let stays = |sequence: &Sequence| {
            let gone = sequence.is_cancelled();
            if let (true, Some(metrics)) = (gone, sequence.metrics()) {
                metrics.cancelled.inc();
            }
            !gone
        };
        self.waiting.retain(stays);
        self.running.retain(stays);
    }

    /// Admits in order of arrival for as long as there are blocks for all tokens of the next one, beside what the
    /// running ones need for theirs and one more block for each of them. It always fits once nothing runs, because no
    /// request needs more than one full context and the cache holds at least that.
    fn admit(&mut self) {
        while self.running.len() < self.sizes.max_batch_size {
            let Some(mut next) = self.waiting.pop_front() else { break };
            let blocks = self.pool.matching(next.shared_beginning());
            let missing = blocks_for(next.tokens().len()) - blocks.ids().len();
            let promised: usize = self.running.iter().map(|sequence| sequence.missing_blocks() + 1).sum();
            if !self.running.is_empty() && self.pool.available() < missing + promised {
                self.waiting.push_front(next);
                break;
            }
            next.admit(blocks);
            let place = self.running.partition_point(|other| other.order() < next.order());
            self.running.insert(place, next);
        }
    }

    /// Decides who has how many rows in the next step and gets the blocks for them. Where these run out, the latest
    /// sequence gives its own up and waits again; the first one always goes on, so the engine never stands still.
    fn share_out(&mut self) {
        loop {
            let Step { wants, rows, .. } = &mut self.step;
            wants.clear();
            wants.extend(self.running.iter().map(Sequence::wants));
            scheduler::rows(wants, self.sizes.token_budget, rows);
            let short =
                self.running.iter_mut().zip(rows.iter()).any(|(sequence, rows)| !sequence.make_room(*rows));
            if !short {
                return;
            }
            let Some(mut last) = self.running.pop() else { return };
            last.preempt();
            let place = self.waiting.partition_point(|other| other.order() < last.order());
            self.waiting.insert(place, last);
        }
    }

    fn step(&mut self) {
        self.share_out();
        let Step { input, output, rows, scratch, .. } = &mut self.step;
        input.clear();
        for (sequence, rows) in self.running.iter_mut().zip(rows.iter()).filter(|(_, rows)| **rows > 0) {
            sequence.step_begins();
            input.push_sequence(sequence.step(*rows));
        }
        let submitted = self.executable.submit(input);
        self.running.iter_mut().for_each(Sequence::prepare);
        let ran = submitted.and_then(|()| self.executable.wait(output));
        if let Err(error) = ran {
            self.fail(&error);
            return;
        }
        let tokenizer = self.model.tokenizer();
        let (mut logits_rows, mut rows) = (0.., rows.iter().copied());
        self.running.retain_mut(|sequence| {
            let rows = rows.next().unwrap_or(0);
            if rows == 0 {
                return true;
            }
            let complete = sequence.step(rows).logits == LogitsRows::Last;
            let logits = complete.then(|| logits_rows.next()).flatten().map(|row| output.row(row));
            let after = sequence.step_done(rows, logits, scratch, tokenizer);
            if after == After::Broken {
                self.pool.forget();
            }
            after == After::Running
        });
    }

    /// After a failed step nobody's cache can be trusted.
    fn fail(&mut self, error: &BackendError) {
        tracing::error!(%error, sequences = self.running.len(), "a step failed");
        self.pool.forget();
        let message = error.to_string();
        for mut sequence in self.running.drain(..) {
            sequence.fail(GenerateError::Backend { message: message.clone() });
        }
    }

    /// Tells everyone who is left that the engine has stopped.
    fn end(mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.arrive(job);
        }
        for mut sequence in self.waiting.drain(..).chain(self.running.drain(..)) {
            sequence.fail(GenerateError::Stopped);
        }
    }
}
