//! The device thread: it alone talks to the backend, and it never waits for a caller.
//!
//! One turn of its loop takes what arrived, drops what was cancelled, admits what fits, runs one step and hands out
//! the tokens. Between two turns nothing is held that a dropped request would not give back by itself.

use crate::blocks::BlockPool;
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
    Backend, BackendError, Executable, Limits, LoadProgress, LoadSpec, Loaded, MemoryReport, Numerics,
    StepInput, StepOutput,
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
        let pool =
            BlockPool::new(sizes.kv_blocks, self.metrics.kv_used.clone(), self.metrics.kv_total.clone());
        let device = Device {
            executable,
            _loaded: loaded,
            _backend: self.backend,
            running: Vec::new(),
            waiting: VecDeque::new(),
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
    running: Vec<Sequence>,
    waiting: VecDeque<Job>,
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
                Ok(job) => self.waiting.push_back(job),
                Err(_) => return false,
            }
        }
        self.waiting.extend(self.jobs.try_iter());
        true
    }

    /// Drops requests whose callers have gone. Their blocks are free before anything is admitted.
    fn sweep_cancelled(&mut self) {
        self.waiting.retain(|job| {
            let gone = job.is_cancelled();
            if let (true, Some(metrics)) = (gone, &job.metrics) {
                metrics.cancelled.inc();
            }
            !gone
        });
        self.running.retain(|sequence| {
            let gone = sequence.is_cancelled();
            if let (true, Some(metrics)) = (gone, sequence.metrics()) {
                metrics.cancelled.inc();
            }
            !gone
        });
    }

    /// Admits in order of arrival for as long as the worst case of the next one fits. It always does once nothing
    /// runs, because no request needs more than one full context and the cache holds at least that.
    fn admit(&mut self) {
        while self.running.len() < self.sizes.max_batch_size {
            let Some(next) = self.waiting.front() else { break };
            let Some(blocks) = self.pool.reserve(next.blocks) else { break };
            if let Some(job) = self.waiting.pop_front() {
                self.running.push(Sequence::new(job, blocks));
            }
        }
    }

    fn step(&mut self) {
        let Step { input, output, wants, rows, scratch } = &mut self.step;
        wants.clear();
        wants.extend(self.running.iter().map(Sequence::wants));
        scheduler::rows(wants, self.sizes.token_budget, rows);
        input.clear();
        for (sequence, rows) in self.running.iter_mut().zip(rows.iter()).filter(|(_, rows)| **rows > 0) {
            sequence.step_begins();
            input.push_sequence(sequence.step(*rows));
        }
        let submitted = self.executable.submit(input);
        self.running.iter_mut().for_each(Sequence::prepare);
        let ran = submitted.and_then(|()| self.executable.wait(output));
        if let Err(error) = ran {
            // After a failed step nobody's cache can be trusted.
            tracing::error!(%error, sequences = self.running.len(), "a step failed");
            let message = error.to_string();
            for mut sequence in self.running.drain(..) {
                sequence.fail(GenerateError::Backend { message: message.clone() });
            }
            return;
        }
        let tokenizer = self.model.tokenizer();
        let (mut index, mut logits_row) = (0, 0);
        self.running.retain_mut(|sequence| {
            let (rows, wants) = (rows[index], wants[index]);
            index += 1;
            if rows == 0 {
                return true;
            }
            let complete =
                matches!(wants, scheduler::Wants::Decode) || wants == scheduler::Wants::Prompt(rows);
            let logits = complete.then(|| {
                logits_row += 1;
                output.row(logits_row - 1)
            });
            sequence.step_done(rows, logits, scratch, tokenizer) == After::Running
        });
    }

    /// Tells everyone who is left that the engine has stopped.
    fn end(mut self) {
        self.waiting.extend(self.jobs.try_iter());
        for job in self.waiting.drain(..) {
            if let Some(metrics) = &job.metrics {
                metrics.failed.inc();
            }
            let _gone = job.events.try_send(Err(GenerateError::Stopped));
        }
        for mut sequence in self.running.drain(..) {
            sequence.fail(GenerateError::Stopped);
        }
    }
}
