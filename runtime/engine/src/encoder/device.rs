//! The encoder's device thread: it alone talks to the backend, and it waits only while the strategy says so.
//!
//! One turn of its loop takes what arrived, drops what was cancelled, asks the strategy, and either waits or runs one
//! step and hands out the rows. A request is answered when the last of its texts has been computed.

use super::config::EncoderSizes;
use super::handle::Outcome;
use super::metrics::EncoderSeries;
use super::request::{EncodeError, EncodeTimings, Encoded};
use super::strategy::{Batcher, Decision, Moment};
use crate::census::Enrolled;
use crate::config::StartError;
use crate::metrics::Counted;
use crate::priority::Priority;
use crate::shared::{Shared, Ticket};
use crate::tenants::Tenant;
use crate::thread::{self, OnProgress};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;
use tokio::sync::oneshot;
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    Backend, BackendError, Executable, Limits, LoadSpec, Loaded, LogitsRows, MemoryReport, Numerics,
    SequenceStep, StepInput, StepOutput,
};

/// A request on its way to the device.
#[derive(Debug)]
pub(super) struct Job {
    /// Ids of each text, at least one text of at least one id.
    pub(super) texts: Vec<Vec<u32>>,
    /// Which of them were cut.
    pub(super) truncated: Vec<usize>,
    pub(super) class: Priority,
    pub(super) tenant: Tenant,
    pub(super) submitted: Instant,
    pub(super) caller: Caller,
}

/// Who waits for the rows, and what counts the request until he has them.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) reply: oneshot::Sender<Outcome>,
    /// `None` for requests that are not a caller's.
    pub(super) series: Option<EncoderSeries>,
    /// Counts it as waiting, then as running.
    pub(super) counted: Option<Counted>,
    /// Counts its texts for its class and tenant.
    pub(super) enrolled: Option<Enrolled>,
    /// Its texts' places in flight.
    pub(super) ticket: Ticket,
}

/// Everything a device thread starts with.
pub(super) struct Start {
    pub(super) model: Arc<Model>,
    pub(super) backend: Box<dyn Backend>,
    pub(super) numerics: Numerics,
    pub(super) sizes: EncoderSizes,
    pub(super) jobs: Receiver<Job>,
    pub(super) shared: Arc<Shared>,
    pub(super) series: EncoderSeries,
    pub(super) progress: OnProgress,
}

impl Start {
    /// Starts the thread and waits until the model is on the device.
    pub(super) fn spawn(self) -> Result<MemoryReport, StartError> {
        let (device, shared) = (self.backend.caps().description.clone(), Arc::clone(&self.shared));
        thread::start("encoder", device, shared, || self.load(), Device::run)
    }

    fn load(mut self) -> Result<(Device, MemoryReport), BackendError> {
        let rules = self.sizes.rules;
        let request = PlanRequest {
            context_tokens: self.sizes.context_tokens,
            limits: Limits { rows: rules.max_tokens, sequences: rules.max_texts, logits_rows: 0 },
            fused: self.backend.caps().fused,
        };
        let plan = self.model.plan(&request)?;
        let mut loaded = self.backend.load(LoadSpec {
            weights: Arc::clone(self.model.weights()),
            plan: &plan,
            kv_blocks: 0,
            numerics: self.numerics,
            progress: &mut self.progress,
        })?;
        let executable = loaded.compile(&plan)?;
        let memory = loaded.memory();
        let device = Device {
            executable,
            _loaded: loaded,
            _backend: self.backend,
            born: Instant::now(),
            batcher: Batcher::new(rules),
            requests: HashMap::new(),
            next_request: 0,
            jobs: self.jobs,
            shared: self.shared,
            series: self.series,
            batch: Vec::new(),
            input: StepInput::new(),
            output: StepOutput::new(),
        };
        Ok((device, memory))
    }
}

/// A text of a request that is under way.
#[derive(Debug, Clone, Copy)]
struct Text {
    request: u64,
    index: usize,
}

/// A request of which some texts are still to be computed.
#[derive(Debug)]
struct Request {
    job: Job,
    /// One row for each text, empty until the first step.
    values: Vec<f32>,
    left: usize,
    started: Option<Instant>,
}

/// The thread's state. Fields are dropped in order: what runs before what it runs on.
struct Device {
    executable: Box<dyn Executable>,
    _loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
    /// What moments are counted from.
    born: Instant,
    batcher: Batcher<Text>,
    requests: HashMap<u64, Request>,
    next_request: u64,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
    series: EncoderSeries,
    /// Buffers of a step, kept so that steps do not allocate.
    batch: Vec<Text>,
    input: StepInput,
    output: StepOutput,
}

impl Device {
    fn run(mut self) {
        loop {
            // What has arrived is taken before anything is decided: it may fill the batch.
            while let Ok(job) = self.jobs.try_recv() {
                self.accept(job);
            }
            if self.shared.stopping() {
                break;
            }
            self.sweep_cancelled();
            let now = self.now();
            let arrived = match self.batcher.decide(now) {
                Decision::Run => {
                    self.step();
                    continue;
                }
                Decision::Idle => self.jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Decision::Until(at) => self.jobs.recv_timeout(at.saturating_sub(now)),
            };
            match arrived {
                Ok(job) => self.accept(job),
                Err(RecvTimeoutError::Timeout) => {}
                // No more can come. What waits is still answered, unless the engine was stopped.
                Err(RecvTimeoutError::Disconnected) if self.batcher.len() == 0 || self.shared.stopping() => {
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => self.step(),
            }
        }
        self.end();
    }

    fn now(&self) -> Moment {
        self.born.elapsed()
    }

    fn accept(&mut self, job: Job) {
        let at = job.submitted.saturating_duration_since(self.born);
        if job.caller.series.is_some() {
            self.batcher.arrived(at);
        }
        self.batcher.enter(&job.tenant);
        let request = self.next_request;
        self.next_request += 1;
        for (index, ids) in job.texts.iter().enumerate() {
            self.batcher.push(at, (job.class, &job.tenant), ids.len(), Text { request, index });
        }
        let left = job.texts.len();
        self.requests.insert(request, Request { job, values: Vec::new(), left, started: None });
    }

    /// Drops requests whose callers have gone, with all their texts.
    fn sweep_cancelled(&mut self) {
        let Self { requests, batcher, .. } = self;
        let before = requests.len();
        requests.retain(|_, request| {
            let gone = request.job.caller.reply.is_closed();
            if gone {
                batcher.leave(&request.job.tenant);
                if let Some(series) = &request.job.caller.series {
                    series.cancelled.inc();
                }
            }
            !gone
        });
        if requests.len() < before {
            batcher.retain(|text| requests.contains_key(&text.request));
        }
    }

    fn step(&mut self) {
        self.batch.clear();
        self.batcher.take(&mut self.batch);
        self.shared.set_running(self.batch.len());
        self.input.clear();
        let began = Instant::now();
        for text in &self.batch {
            let Some(request) = self.requests.get_mut(&text.request) else { continue };
            request.begins(began);
            self.input.push_sequence(SequenceStep {
                tokens: &request.job.texts[text.index],
                cached_tokens: 0,
                blocks: &[],
                logits: LogitsRows::None,
            });
        }
        let ran = self.executable.submit(&self.input).and_then(|()| self.executable.wait(&mut self.output));
        let (took, tokens) = (began.elapsed(), self.input.rows());
        self.batcher.step_done(self.born.elapsed(), tokens, took);
        self.shared.set_running(0);
        self.series.texts.observe(self.batch.len() as f64);
        self.series.tokens.observe(tokens as f64);
        self.series.seconds.observe(took.as_secs_f64());
        match ran {
            Ok(()) => {
                // Before anybody is told something: whoever sees his answer finds the engine well.
                self.shared.step_succeeded();
                if let Some(each) =
                    u32::try_from(self.batch.len()).ok().and_then(|texts| took.checked_div(texts))
                {
                    self.shared.requests_took(each);
                }
                self.hand_out();
            }
            Err(error) => {
                tracing::error!(%error, texts = self.batch.len(), "a step failed");
                self.series.failed_steps.inc();
                self.shared.step_failed();
                self.fail_batch(&EncodeError::Backend { message: error.to_string() });
            }
        }
    }

    /// Gives each text of the step its row, and answers the requests that are complete with it.
    fn hand_out(&mut self) {
        let width = self.output.width;
        let batch = std::mem::take(&mut self.batch);
        for (row, text) in batch.iter().enumerate() {
            let Some(request) = self.requests.get_mut(&text.request) else { continue };
            let values = self.output.row(row);
            if !values.iter().all(|value| value.is_finite()) {
                self.fail(text.request, EncodeError::NotFinite);
                continue;
            }
            request.values.resize(request.job.texts.len() * width, 0.0);
            request.values[text.index * width..(text.index + 1) * width].copy_from_slice(values);
            request.left -= 1;
            if let Some(series) = &request.job.caller.series {
                series.prompt_tokens.inc_by(request.job.texts[text.index].len() as u64);
            }
            if request.left == 0
                && let Some(done) = self.requests.remove(&text.request)
            {
                self.batcher.leave(&done.job.tenant);
                done.answer(width);
            }
        }
        self.batch = batch;
    }

    /// Ends every request that had a text in the step; the texts of others can still be trusted.
    fn fail_batch(&mut self, error: &EncodeError) {
        let batch = std::mem::take(&mut self.batch);
        for text in &batch {
            self.fail(text.request, error.clone());
        }
        self.batch = batch;
    }

    fn fail(&mut self, request: u64, error: EncodeError) {
        let Some(failed) = self.requests.remove(&request) else { return };
        self.batcher.retain(|text| text.request != request);
        self.batcher.leave(&failed.job.tenant);
        failed.fail(error);
    }

    /// Tells everyone who is left that the engine has stopped.
    fn end(mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.accept(job);
        }
        for (_, request) in self.requests.drain() {
            request.fail(EncodeError::Stopped);
        }
    }
}

impl Request {
    /// Notes that a step with one of its texts begins.
    fn begins(&mut self, now: Instant) {
        if self.started.is_some() {
            return;
        }
        self.started = Some(now);
        if let Some(series) = &self.job.caller.series {
            series.queue_wait.observe(now.saturating_duration_since(self.job.submitted).as_secs_f64());
            // The one that counts it as waiting is dropped.
            self.job.caller.counted = Some(Counted::new(&series.running));
        }
    }

    fn answer(self, width: usize) {
        let Job { texts, truncated, submitted, caller, .. } = self.job;
        let Caller { reply, series, counted, enrolled, ticket } = caller;
        if let Some(series) = series {
            series.done.inc();
        }
        let started = self.started.unwrap_or(submitted);
        let timings =
            EncodeTimings { queue: started.saturating_duration_since(submitted), compute: started.elapsed() };
        let tokens = texts.iter().map(Vec::len).sum();
        // Whoever hears the answer finds the request no longer counted.
        drop((counted, enrolled, ticket));
        let _gone = reply.send(Ok(Encoded { values: self.values, width, tokens, truncated, timings }));
    }

    fn fail(self, error: EncodeError) {
        let Caller { reply, series, counted, enrolled, ticket } = self.job.caller;
        if let Some(series) = series {
            series.failed.inc();
        }
        drop((counted, enrolled, ticket));
        let _gone = reply.send(Err(error));
    }
}
