//! The device thread of the encoder: it alone uses the backend, and it waits only while the strategy says so.
//!
//! Each iteration of its loop takes new jobs, drops cancelled requests, asks the strategy, and either waits
//! or runs one step and copies its rows to their requests. A request is answered when the last of its texts
//! has been computed.

use super::config::EncoderSizes;
use super::handle::EncodeResult;
use super::metrics::EncoderSeries;
use super::request::{EncodeError, EncodeTimings, Encoded};
use super::strategy::{Batcher, Decision, Moment, NewText};
use crate::config::StartError;
use crate::device_thread::{self, OnProgress, Permit, Shared};
use crate::faults::{DeviceFault, ModelFault, RequestFault, StepFault, refused_sequence};
use crate::metrics::GaugeGuard;
use crate::scheduling::admission::InflightGuard;
use crate::scheduling::priority::Priority;
use crate::scheduling::tenants::{Tenant, TenantId};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;
use tokio::sync::oneshot;
use trustformers_model::Model;
use trustformers_plan::{
    Backend, BackendError, Executable, KvType, LoadSpec, Loaded, LogitsRows, MemoryReport, Numerics,
    SequenceStep, StepError, StepInput, StepOutput, buckets,
};

/// The tokens of a text, or of a pair of texts.
#[derive(Debug)]
pub(super) struct TextTokens {
    /// At least one.
    pub(super) ids: Vec<u32>,
    /// The index of the first token of the second segment; `None` where all belong to the first one.
    pub(super) second_segment: Option<usize>,
}

impl TextTokens {
    pub(super) fn of_one_text(ids: Vec<u32>) -> Self {
        Self { ids, second_segment: None }
    }
}

/// A request on its way to the device thread.
#[derive(Debug)]
pub(super) struct EncodeJob {
    /// At least one text.
    pub(super) texts: Vec<TextTokens>,
    /// The indices of those that were truncated.
    pub(super) truncated: Vec<usize>,
    pub(super) class: Priority,
    pub(super) tenant: Tenant,
    pub(super) submitted: Instant,
    pub(super) caller: Caller,
}

/// The caller of a request, and the guards that count the request until it is answered.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) reply: oneshot::Sender<EncodeResult>,
    /// `None` for the engine's own requests.
    pub(super) series: Option<EncoderSeries>,
    /// Counts it as waiting, then as running.
    pub(super) gauge: Option<GaugeGuard>,
    /// Keeps its texts in the admission counts.
    pub(super) inflight: Option<InflightGuard>,
    pub(super) permit: Permit,
}

/// Everything that the device thread starts with.
pub(super) struct EncoderStart {
    pub(super) model: Arc<Model>,
    pub(super) backend: Box<dyn Backend>,
    pub(super) numerics: Numerics,
    pub(super) sizes: EncoderSizes,
    pub(super) jobs: Receiver<EncodeJob>,
    pub(super) shared: Arc<Shared>,
    pub(super) series: EncoderSeries,
    pub(super) progress: OnProgress,
}

impl EncoderStart {
    /// Starts the thread and waits until the model is on the device.
    pub(super) fn spawn(self) -> Result<MemoryReport, StartError> {
        let (device, shared) = (self.backend.caps().description.clone(), Arc::clone(&self.shared));
        device_thread::start("encoder", device, shared, || self.load(), EncoderDevice::run)
    }

    fn load(mut self) -> Result<(EncoderDevice, MemoryReport), BackendError> {
        let rules = self.sizes.rules;
        let facts = self.model.facts();
        let labels_tokens = facts.labels_tokens();
        let plan = self.model.plan(&self.sizes.plan_request(facts, self.backend.caps().fused))?;
        let mut loaded = self.backend.load(LoadSpec {
            weights: Arc::clone(self.model.weights()),
            plan: &plan,
            kv_blocks: 0,
            kv_type: KvType::F32,
            numerics: self.numerics,
            progress: &mut self.progress,
        })?;
        let executable = buckets::compile(&mut *loaded, &plan, &self.backend.caps().row_buckets)?;
        let (memory, second_segment) = (loaded.memory(), plan.second_segment());
        let device = EncoderDevice {
            executable,
            _loaded: loaded,
            _backend: self.backend,
            created: Instant::now(),
            batcher: Batcher::new(rules),
            requests: HashMap::new(),
            next_request: 0,
            jobs: self.jobs,
            shared: self.shared,
            series: self.series,
            second_segment,
            labels_tokens,
            batch: Vec::new(),
            input: StepInput::new(),
            output: StepOutput::new(),
        };
        Ok((device, memory))
    }
}

/// A text of a pending request.
#[derive(Debug, Clone, Copy)]
struct TextRef {
    request: u64,
    index: usize,
}

/// A request whose texts are not all computed yet.
#[derive(Debug)]
struct PendingRequest {
    job: EncodeJob,
    tenant: TenantId,
    /// One row for each text, or for each of its tokens; empty until the first step.
    values: Vec<f32>,
    /// The first row of each text, and behind them the number of all rows.
    first_rows: Vec<usize>,
    remaining_texts: usize,
    started: Option<Instant>,
}

/// The state of the device thread. Fields are dropped in order: an executable before its model, a model
/// before its backend.
struct EncoderDevice {
    executable: Box<dyn Executable>,
    _loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
    /// The start of all [`Moment`]s.
    created: Instant,
    batcher: Batcher<TextRef>,
    requests: HashMap<u64, PendingRequest>,
    next_request: u64,
    jobs: Receiver<EncodeJob>,
    shared: Arc<Shared>,
    series: EncoderSeries,
    /// What the plan adds to the positions of a second segment; `None` where its model knows one segment.
    second_segment: Option<usize>,
    /// Whether the plan gives a row for each token.
    labels_tokens: bool,
    /// Buffers of a step. Reused, so that steps do not allocate.
    batch: Vec<TextRef>,
    input: StepInput,
    output: StepOutput,
}

impl EncoderDevice {
    fn run(mut self) {
        loop {
            // New jobs are taken before the decision, because they may fill the batch.
            while let Ok(job) = self.jobs.try_recv() {
                self.enqueue(job);
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
                Ok(job) => self.enqueue(job),
                Err(RecvTimeoutError::Timeout) => {}
                // No more jobs can come. The waiting texts are still computed, unless the engine was stopped.
                Err(RecvTimeoutError::Disconnected) if self.batcher.len() == 0 || self.shared.stopping() => {
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => self.step(),
            }
        }
        self.end();
    }

    fn now(&self) -> Moment {
        self.created.elapsed()
    }

    fn enqueue(&mut self, job: EncodeJob) {
        let arrived = job.submitted.saturating_duration_since(self.created);
        if job.caller.series.is_some() {
            self.batcher.record_arrival(arrived);
        }
        let tenant = self.batcher.request_arrived(&job.tenant);
        let request = self.next_request;
        self.next_request += 1;
        for (index, tokens) in job.texts.iter().enumerate() {
            let text = NewText { arrived, class: job.class, tenant, tokens: tokens.ids.len() };
            self.batcher.push(text, TextRef { request, index });
        }
        let remaining_texts = job.texts.len();
        let rows = |tokens: &TextTokens| if self.labels_tokens { tokens.ids.len() } else { 1 };
        let mut first_rows = vec![0];
        for tokens in &job.texts {
            first_rows.push(first_rows[first_rows.len() - 1] + rows(tokens));
        }
        let values = Vec::new();
        let pending = PendingRequest { job, tenant, values, first_rows, remaining_texts, started: None };
        self.requests.insert(request, pending);
    }

    /// Drops requests whose callers have gone, with all their texts.
    fn sweep_cancelled(&mut self) {
        let Self { requests, batcher, .. } = self;
        let count_before = requests.len();
        requests.retain(|_, request| {
            let gone = request.job.caller.reply.is_closed();
            if gone {
                batcher.request_ended(request.tenant);
                if let Some(series) = &request.job.caller.series {
                    series.cancelled.inc();
                    let stages = &series.cancellations;
                    (if request.started.is_none() { &stages.queued } else { &stages.prefill }).inc();
                }
            }
            !gone
        });
        if requests.len() < count_before {
            batcher.retain(|text| requests.contains_key(&text.request));
        }
    }

    fn step(&mut self) {
        self.batch.clear();
        self.batcher.take_batch(&mut self.batch);
        self.shared.set_running(self.batch.len());
        let started = Instant::now();
        let result = self.compute(started);
        self.shared.set_running(0);
        if self.batch.is_empty() {
            return;
        }
        let (took, tokens) = (started.elapsed(), self.input.rows());
        self.batcher.step_done(self.now(), tokens, took);
        self.series.texts.observe(self.batch.len() as f64);
        self.series.tokens.observe(tokens as f64);
        self.series.seconds.observe(took.as_secs_f64());
        match result {
            Ok(()) => {
                // Before any result is sent, so that a caller that has its result finds the engine healthy.
                self.shared.step_succeeded();
                if let Some(each) =
                    u32::try_from(self.batch.len()).ok().and_then(|texts| took.checked_div(texts))
                {
                    self.shared.record_request_time(each);
                }
                self.distribute_rows();
            }
            Err(fault) => {
                tracing::error!(error = %fault, texts = self.batch.len(), "a step failed");
                self.series.failed_steps.inc();
                self.shared.step_failed();
                self.fail_batch(&fault.into());
            }
        }
    }

    /// Computes the batch. Where the device refuses the step because of a text, the request of that text ends
    /// and the others are submitted again: nothing was computed.
    fn compute(&mut self, started: Instant) -> Result<(), DeviceFault> {
        while !self.batch.is_empty() {
            match self.submit(started).map_err(StepFault::from) {
                Ok(()) => return Ok(()),
                Err(StepFault::Device(fault)) => return Err(fault),
                Err(StepFault::Refused(refusal)) => self.drop_refused(&refusal),
            }
        }
        Ok(())
    }

    fn submit(&mut self, started: Instant) -> Result<(), BackendError> {
        self.input.clear();
        for text in &self.batch {
            let Some(request) = self.requests.get_mut(&text.request) else { continue };
            request.note_started(started);
            let tokens = &request.job.texts[text.index];
            self.input.push_sequence(SequenceStep {
                tokens: &tokens.ids,
                cached_tokens: 0,
                blocks: &[],
                logits: if self.labels_tokens { LogitsRows::All } else { LogitsRows::None },
            });
            if let (Some(first), Some(offset)) = (tokens.second_segment, self.second_segment) {
                self.input.begin_second_segment(first, offset);
            }
        }
        self.executable.submit(&self.input)?;
        self.executable.wait(&mut self.output)
    }

    /// Ends the request of the text that a refused step is about, or all of the batch where it is about the
    /// whole.
    fn drop_refused(&mut self, refusal: &StepError) {
        tracing::warn!(%refusal, texts = self.batch.len(), "the device refused a step");
        self.shared.record_progress();
        let fault = EncodeError::from(RequestFault::RefusedStep { message: refusal.to_string() });
        match refused_sequence(refusal, &self.input).and_then(|index| self.batch.get(index).copied()) {
            Some(text) => self.fail(text.request, fault),
            None => self.fail_batch(&fault),
        }
        let Self { batch, requests, .. } = self;
        batch.retain(|text| requests.contains_key(&text.request));
    }

    /// Copies the rows of each text to its request, and answers the requests that are complete.
    fn distribute_rows(&mut self) {
        let width = self.output.width;
        let batch = std::mem::take(&mut self.batch);
        for (sequence, text) in batch.iter().enumerate() {
            let Some(request) = self.requests.get_mut(&text.request) else { continue };
            // Rows of tokens are asked for of all sequences, so that they are those of the step.
            let rows = if self.labels_tokens { self.input.rows_of(sequence) } else { sequence..sequence + 1 };
            let values = &self.output.values[rows.start * width..rows.end * width];
            if !values.iter().all(|value| value.is_finite()) {
                self.fail(text.request, ModelFault::NotFinite.into());
                continue;
            }
            let own = request.first_rows[text.index]..request.first_rows[text.index + 1];
            request.values.resize(request.first_rows[request.job.texts.len()] * width, 0.0);
            request.values[own.start * width..own.end * width].copy_from_slice(values);
            request.remaining_texts -= 1;
            if let Some(series) = &request.job.caller.series {
                series.prompt_tokens.inc_by(request.job.texts[text.index].ids.len() as u64);
            }
            if request.remaining_texts == 0
                && let Some(done) = self.requests.remove(&text.request)
            {
                self.batcher.request_ended(done.tenant);
                done.answer(width);
            }
        }
        self.batch = batch;
    }

    /// Ends every request that has a text in the step; the texts of others can still be trusted.
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
        self.batcher.request_ended(failed.tenant);
        failed.fail(error);
    }

    /// Ends all requests because the engine has stopped.
    fn end(mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.enqueue(job);
        }
        for (_, request) in self.requests.drain() {
            request.fail(EncodeError::Stopped);
        }
    }
}

impl PendingRequest {
    /// Records the start of its first step.
    fn note_started(&mut self, now: Instant) {
        if self.started.is_some() {
            return;
        }
        self.started = Some(now);
        if let Some(series) = &self.job.caller.series {
            series.queue_wait.observe(now.saturating_duration_since(self.job.submitted).as_secs_f64());
            // This drops the guard that counts it as waiting.
            self.job.caller.gauge = Some(GaugeGuard::new(&series.running));
        }
    }

    fn answer(self, width: usize) {
        let EncodeJob { texts, truncated, submitted, caller, tenant, .. } = self.job;
        let Caller { reply, series, gauge, inflight, permit } = caller;
        let tokens: usize = texts.iter().map(|tokens| tokens.ids.len()).sum();
        if let Some(series) = series {
            series.done.inc();
            series.request_seconds.observe(submitted.elapsed().as_secs_f64());
            series.tenants.served_tokens(&tenant).inc_by(tokens as u64);
        }
        let started = self.started.unwrap_or(submitted);
        let timings =
            EncodeTimings { queue: started.saturating_duration_since(submitted), compute: started.elapsed() };
        // Before the reply, so that a caller that has its result finds the request no longer counted.
        drop((gauge, inflight, permit));
        let Self { values, first_rows, .. } = self;
        let _ignored = reply.send(Ok(Encoded { values, width, first_rows, tokens, truncated, timings }));
    }

    fn fail(self, error: EncodeError) {
        let Caller { reply, series, gauge, inflight, permit } = self.job.caller;
        if let Some(series) = series {
            series.failed.inc();
        }
        drop((gauge, inflight, permit));
        let _ignored = reply.send(Err(error));
    }
}
