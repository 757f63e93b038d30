//! The device thread of generation: it alone uses the backend, and it never waits for a caller.
//!
//! Each iteration of its loop takes new jobs, drops cancelled sequences, admits waiting ones, launches a step
//! and sends the tokens of one (see [`super::flight`]). Everything that a request holds is released when its
//! sequence is dropped.

use super::adapters::LeavingAdapter;
use super::flight::LaunchedStep;
use super::sequence::{GenerationJob, Sequence};
use crate::adapters::{AdapterRegistry, DropAdapter, PutAdapter};
use crate::config::{EngineSizes, Speculation, SpeculationCosts, StartError};
use crate::device_thread::{self, OnProgress, Shared};
use crate::estimate;
use crate::metrics::ModelMetrics;
use crate::prefix_cache::{BlockPool, BlockTable, PrefixRoot};
use crate::request::GenerateError;
use crate::scheduling::preemption::{
    Candidate, Requester, Shortage, select_victim, select_victim_for_growth,
};
use crate::scheduling::queue::{AGED_SHARE, HasQueueKey, NextInQueue, Queue, QueueKey};
use crate::scheduling::rows::{PromptPacer, RowAllocation, RowBudget, RowRequest};
use crate::scheduling::tenants::{TenantId, Tenants};
use crate::speculation::{DraftModel, DraftTokens, Proposer};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use trustformers_model::Model;
use trustformers_plan::{
    Backend, BackendError, Executable, LoadSpec, Loaded, MemoryReport, Numerics, SampleInput, StepInput,
    StepOutput, buckets,
};

/// What callers send to the device thread.
#[derive(Debug)]
pub(crate) enum DeviceJob {
    /// A request.
    Generate(Box<GenerationJob>),
    PutAdapter(PutAdapter),
    DropAdapter(DropAdapter),
}

/// Everything that the device thread starts with.
pub(crate) struct GenerationStart {
    pub(crate) model: Arc<Model>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) numerics: Numerics,
    pub(crate) speculation: Option<Speculation>,
    pub(crate) speculation_costs: SpeculationCosts,
    pub(crate) sizes: EngineSizes,
    pub(crate) jobs: Receiver<DeviceJob>,
    pub(crate) adapters: Arc<AdapterRegistry>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: ModelMetrics,
    pub(crate) progress: OnProgress,
}

impl GenerationStart {
    /// Starts the thread and waits until the model is on the device.
    pub(crate) fn spawn(self) -> Result<MemoryReport, StartError> {
        let (device, shared) = (self.backend.caps().description.clone(), Arc::clone(&self.shared));
        device_thread::start("engine", device, shared, || self.load(), GenerationDevice::run)
    }

    fn load(mut self) -> Result<(GenerationDevice, MemoryReport), BackendError> {
        let sizes = self.sizes;
        let draft_rows = estimate::draft_rows(self.speculation.as_ref());
        let request = sizes.plan_request(draft_rows, self.backend.caps().fused);
        let plan = sizes.with_classes(self.model.plan_with_adapters(&request, sizes.adapters)?);
        let plan = plan.with_kv_room(sizes.kv_blocks);
        let mut loaded = self.backend.load(LoadSpec {
            weights: Arc::clone(self.model.weights()),
            plan: &plan,
            kv_blocks: sizes.first_kv_blocks,
            kv_type: sizes.kv_type,
            numerics: self.numerics,
            progress: &mut self.progress,
        })?;
        let executable = buckets::compile(&mut *loaded, &plan, &self.backend.caps().row_buckets)?;
        let mut memory = loaded.memory();
        let proposer = match &self.speculation {
            None => None,
            Some(Speculation::Ngram) => Some(Proposer::ngram(self.speculation_costs)),
            Some(Speculation::Draft(model)) => {
                let (draft, its_memory) = DraftModel::load(&mut *self.backend, model, &sizes, self.numerics)?;
                memory = memory.and(&its_memory);
                Some(Proposer::draft(draft, self.speculation_costs))
            }
        };
        let gauges = self.metrics.cache.blocks.clone();
        let pool = BlockPool::new(sizes.first_kv_blocks, sizes.needs, gauges).with_limit(sizes.kv_blocks);
        let device = GenerationDevice {
            runs_ahead: proposer.is_none() && self.backend.caps().steps_in_flight > 1,
            proposer,
            launched: VecDeque::new(),
            steps: 0,
            last_answer: Instant::now(),
            executable,
            loaded,
            adapters: self.adapters,
            leaving: Vec::new(),
            _backend: self.backend,
            running: Vec::new(),
            waiting: Queue::default(),
            tenants: Tenants::default(),
            arrivals: 0,
            pacer: PromptPacer::new(sizes.token_budget, sizes.step_target),
            step_time: Duration::ZERO,
            pool,
            jobs: self.jobs,
            shared: self.shared,
            metrics: self.metrics,
            model: self.model,
            sizes,
            step: StepBuffers::default(),
        };
        Ok((device, memory))
    }
}

/// The buffers of a step. Reused, so that steps allocate next to nothing.
#[derive(Default)]
pub(super) struct StepBuffers {
    pub(super) input: StepInput,
    pub(super) sample: SampleInput,
    pub(super) output: StepOutput,
    requests: Vec<RowRequest>,
    pub(super) allocation: RowAllocation,
}

/// The state of the device thread. Fields are dropped in order: an executable before its model, a model
/// before its backend.
pub(super) struct GenerationDevice {
    /// In the order of their ranks.
    pub(super) running: Vec<Sequence>,
    pub(super) waiting: Queue<Sequence>,
    pub(super) tenants: Tenants,
    /// Requests that have arrived so far.
    arrivals: u64,
    pub(super) pacer: PromptPacer,
    /// Time of steps since a request last ended.
    pub(super) step_time: Duration,
    pub(super) proposer: Option<Proposer>,
    /// Whether the next step is launched before the last one has ended.
    pub(super) runs_ahead: bool,
    /// The steps that the device has, oldest first.
    pub(super) launched: VecDeque<LaunchedStep>,
    /// Steps so far: their numbers.
    pub(super) steps: u64,
    /// When a step last ended.
    pub(super) last_answer: Instant,
    pub(super) executable: Box<dyn Executable>,
    pub(super) loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
    pub(super) adapters: Arc<AdapterRegistry>,
    /// Adapters that take no new requests.
    pub(super) leaving: Vec<LeavingAdapter>,
    pub(super) pool: BlockPool,
    pub(super) jobs: Receiver<DeviceJob>,
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: ModelMetrics,
    pub(super) model: Arc<Model>,
    pub(super) sizes: EngineSizes,
    pub(super) step: StepBuffers,
}

impl GenerationDevice {
    fn run(mut self) {
        while self.take_jobs() && !self.shared.stopping() {
            self.sweep_cancelled();
            self.shed();
            self.admit();
            self.shared.set_running(self.running.len());
            if !self.running.is_empty() || !self.launched.is_empty() {
                self.step();
                self.shared.set_running(self.running.len());
            }
            self.drop_unused_adapters();
        }
        self.end();
    }

    /// Takes new jobs, and waits for one where there is nothing to do. False when no more can come.
    fn take_jobs(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() && self.launched.is_empty() {
            match self.next_job_when_idle() {
                Ok(job) => self.take(job),
                Err(_) => return false,
            }
        }
        while let Ok(job) = self.jobs.try_recv() {
            self.take(job);
        }
        true
    }

    fn take(&mut self, job: DeviceJob) {
        match job {
            DeviceJob::Generate(job) => self.enqueue(*job),
            DeviceJob::PutAdapter(put) => self.put_adapter(put),
            DeviceJob::DropAdapter(asked) => self.leaving.push(asked.into()),
        }
    }

    fn enqueue(&mut self, job: GenerationJob) {
        let tenant = self.tenants.request_arrived(&job.tenant);
        let draft = self.proposer.as_ref().map_or_else(DraftTokens::disabled, Proposer::new_sequence);
        self.waiting.push(Sequence::new(job, tenant, self.arrivals, draft));
        self.arrivals += 1;
    }

    /// Drops sequences whose answers are closed. Their blocks are free before anything is admitted.
    fn sweep_cancelled(&mut self) {
        let Self { waiting, running, tenants, .. } = self;
        let mut retain = |sequence: &mut Sequence| {
            if !sequence.is_cancelled() {
                return true;
            }
            sequence.count_cancelled();
            tenants.request_ended(sequence.queue_key().tenant);
            false
        };
        waiting.retain(&mut retain);
        running.retain_mut(&mut retain);
    }

    /// Refuses the requests for which the queue has no room because others with precedence arrived. A request
    /// whose caller has received a token is never refused.
    fn shed(&mut self) {
        let limit = self.sizes.max_batch_size + self.sizes.max_queue;
        while self.waiting.len() + self.running.len() > limit {
            let Some(mut last) = self.waiting.remove_least_urgent(Sequence::has_no_output) else { return };
            self.tenants.request_ended(last.queue_key().tenant);
            last.refuse(self.shared.retry_after());
        }
    }

    /// Admits as many waiting sequences as fit, in the order of the queue. One fits if the batch has room and
    /// there are blocks for all of its tokens, beside those that the running sequences still need and those
    /// of 16 more tokens for each of them. Running sequences are preempted where the policy says so. The next
    /// one always fits once nothing runs, because no request needs more than one full context and the cache
    /// has at least that.
    ///
    /// A preempted sequence may be the next one in the queue. Each preemption serves a request with
    /// precedence, so the loop ends; the bound is there so that this needs no proof.
    fn admit(&mut self) {
        let mut preemptions_left = self.sizes.max_batch_size;
        loop {
            let running_of = |tenant: TenantId| {
                self.running.iter().filter(|sequence| sequence.queue_key().tenant == tenant).count()
            };
            let aged = self.running.iter().filter(|sequence| sequence.queue_key().aged).count();
            let may_age = aged < self.sizes.max_batch_size.div_ceil(AGED_SHARE);
            let Some(next) = self.waiting.select_next(&self.tenants, running_of, may_age) else { return };
            // The cached prefix is looked up only where the batch has room: a full batch would look it up in
            // every step.
            let is_full = self.running.len() >= self.sizes.max_batch_size;
            if !is_full {
                self.grow_kv(self.blocks_wanted(&next));
            }
            let found = if is_full { Err(Shortage::Batch) } else { self.find_blocks(&next) };
            let blocks = match found {
                Ok(blocks) => blocks,
                Err(shortage) => {
                    let requester = Requester { class: next.class(), tenant: next.tenant() };
                    let victim = select_victim(requester, shortage, &self.candidates());
                    let Some(index) = victim.filter(|_| preemptions_left > 0) else { return };
                    preemptions_left -= 1;
                    self.preempt(index);
                    continue;
                }
            };
            let Some(mut sequence) = self.waiting.pop(&next) else { return };
            if next.is_aged() {
                sequence.mark_aged();
            }
            sequence.admit(blocks);
            let rank = sequence.queue_key().rank();
            let at = self.running.partition_point(|other| other.queue_key().rank() < rank);
            self.running.insert(at, sequence);
        }
    }

    /// Blocks for all tokens of the next sequence, and those that running sequences still need.
    fn blocks_wanted(&self, next: &NextInQueue) -> usize {
        let needs = self.sizes.needs;
        let own = self.waiting.peek(next).map_or(0, |sequence| needs.most(sequence.tokens().len()));
        own + self.promised_blocks()
    }

    /// Blocks that running sequences still need for their tokens and the next block of tokens of each.
    fn promised_blocks(&self) -> usize {
        let groups = self.sizes.needs.classes.groups();
        self.running.iter().map(|sequence| sequence.missing_blocks() + groups).sum()
    }

    /// The cached blocks of the next sequence, where the cache has room for the rest of it.
    fn find_blocks(&self, next: &NextInQueue) -> Result<BlockTable, Shortage> {
        let (root, prefix, tokens) = match self.waiting.peek(next) {
            Some(sequence) => (sequence.prefix_root(), sequence.cacheable_prefix(), sequence.tokens().len()),
            None => (PrefixRoot::MODEL, &[][..], 0),
        };
        let blocks = self.pool.match_prefix(root, prefix);
        let own = self.sizes.needs.most(tokens);
        let missing = blocks.missing_until(tokens) + self.promised_blocks();
        let short = missing.saturating_sub(self.pool.available());
        if short > 0 && !self.running.is_empty() { Err(Shortage::Blocks { short, own }) } else { Ok(blocks) }
    }

    fn candidates(&self) -> Vec<Candidate<'_>> {
        self.running
            .iter()
            .map(|sequence| Candidate {
                key: sequence.queue_key(),
                blocks: self.sizes.needs.most(sequence.tokens().len()),
            })
            .collect()
    }

    /// Lets a running sequence wait again.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        sequence.preempt();
        self.waiting.push(sequence);
    }

    /// Decides how many rows each running sequence gets in the next step, and allocates the blocks for them.
    /// Where these run out, a sequence is preempted; the first one never is, so the engine always makes
    /// progress.
    pub(super) fn allocate_rows(&mut self) {
        loop {
            let Self { running, tenants, step: StepBuffers { requests, allocation, .. }, .. } = self;
            let lowest = running.last().map(|sequence| sequence.queue_key().class);
            requests.clear();
            requests.extend(running.iter().map(|sequence| {
                let QueueKey { class, tenant, aged, .. } = sequence.queue_key();
                let precedes_class = lowest.is_some_and(|lowest| *class < lowest);
                RowRequest {
                    demand: sequence.demand(),
                    rank: sequence.queue_key().rank(),
                    usage: tenants.usage(*tenant),
                    underserved: *aged || precedes_class || tenants.is_underserved(*tenant),
                }
            }));
            let alone = running.len() == 1 && self.waiting.is_empty();
            let budget = RowBudget {
                rows: self.sizes.token_budget,
                prompt_rows: self.pacer.prompt_rows(alone),
                may_pause: self.pacer.may_pause(),
            };
            allocation.allocate(requests, budget);
            let rows = running.iter().zip(&allocation.rows);
            let missing = rows.map(|(sequence, rows)| sequence.blocks_missing_for(*rows)).sum();
            self.grow_kv(missing);
            let Self { running, step: StepBuffers { allocation, .. }, .. } = self;
            let mut rows = allocation.rows.iter();
            let short =
                running.iter_mut().any(|sequence| rows.next().is_some_and(|rows| !sequence.reserve(*rows)));
            if !short {
                return;
            }
            let Some(index) = select_victim_for_growth(&self.candidates()) else { return };
            self.preempt(index);
        }
    }

    /// Ends all requests because the engine has stopped.
    fn end(mut self) {
        self.discard_launched();
        while let Ok(job) = self.jobs.try_recv() {
            // A change of adapters is not answered, which its caller reads as the end of the engine.
            if let DeviceJob::Generate(job) = job {
                self.enqueue(*job);
            }
        }
        for mut sequence in self.waiting.drain().chain(self.running.drain(..)) {
            sequence.fail(GenerateError::Stopped);
        }
    }
}
