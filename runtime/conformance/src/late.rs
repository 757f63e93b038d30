//! A device that runs beside the host, for tests: the oracle, whose answers come as late as they may.
//!
//! Two steps may be in flight. Nothing of a step is computed before the host waits for it, so a host that
//! reads an answer too early, or needs one to prepare the next step, does not work on it. Time is counted,
//! not measured ([`LateTime`]): tests of speed need no clock.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Adapter, AdapterSlot, Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded,
    MemoryReport, Plan, SampleInput, StepError, StepInput, StepOutput,
};

/// Steps that each executable takes.
const STEPS_IN_FLIGHT: usize = 2;

/// The time of a late device and of its host.
#[derive(Debug)]
pub struct LateTime {
    /// Microseconds that the device takes for a step.
    step_us: u64,
    /// Microseconds that the host takes for each answer.
    host_us: u64,
    state: Mutex<TimeState>,
}

#[derive(Debug, Default)]
struct TimeState {
    /// The host's time.
    now_us: u64,
    /// When the device will have computed all that it has.
    free_us: u64,
    steps: u64,
}

impl LateTime {
    /// For a device and a host of these speeds, in microseconds.
    #[must_use]
    pub fn new(step_us: u64, host_us: u64) -> Arc<Self> {
        Arc::new(Self { step_us, host_us, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, TimeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time that has passed for the host, in microseconds.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        self.lock().now_us
    }

    /// Steps that the device was given.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.lock().steps
    }

    /// A step begins when the device is free and the host has submitted it; returns when it ends.
    fn submitted(&self) -> u64 {
        let mut state = self.lock();
        state.free_us = state.free_us.max(state.now_us) + self.step_us;
        state.steps += 1;
        state.free_us
    }

    /// A sample begins when the device is free and the host has described it; returns when it ends.
    fn sampled(&self) -> u64 {
        let mut state = self.lock();
        state.free_us = state.free_us.max(state.now_us);
        state.free_us
    }

    /// The host waited for an answer that is there at `done_us`, and processes it.
    fn awaited(&self, done_us: u64) {
        let mut state = self.lock();
        state.now_us = state.now_us.max(done_us) + self.host_us;
    }
}

/// The backend.
#[derive(Debug)]
pub struct LateOracle {
    oracle: Oracle,
    caps: Caps,
    time: Arc<LateTime>,
}

impl LateOracle {
    /// A device with this time.
    #[must_use]
    pub fn new(time: Arc<LateTime>) -> Self {
        let oracle = Oracle::new();
        let caps = Caps {
            description: "late oracle".into(),
            steps_in_flight: STEPS_IN_FLIGHT,
            ..oracle.caps().clone()
        };
        Self { oracle, caps, time }
    }

    /// The same with other claims.
    #[must_use]
    pub fn claiming(mut self, change: impl FnOnce(&mut Caps)) -> Self {
        change(&mut self.caps);
        self
    }
}

impl Backend for LateOracle {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.oracle.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let kv_blocks = Arc::new(AtomicUsize::new(spec.kv_blocks));
        let (inner, time) = (self.oracle.load(spec)?, self.time.clone());
        Ok(Box::new(LateModel { inner, kv_blocks, filled: Arc::default(), time }))
    }
}

/// The adapter slots that hold an adapter.
type FilledSlots = Arc<Mutex<BTreeSet<AdapterSlot>>>;

fn locked(slots: &FilledSlots) -> MutexGuard<'_, BTreeSet<AdapterSlot>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

struct LateModel {
    inner: Box<dyn Loaded>,
    kv_blocks: Arc<AtomicUsize>,
    filled: FilledSlots,
    time: Arc<LateTime>,
}

impl Loaded for LateModel {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(LateExecutable {
            inner: self.inner.compile(plan)?,
            plan: plan.clone(),
            kv_blocks: self.kv_blocks.clone(),
            filled: self.filled.clone(),
            queue: VecDeque::new(),
            slots: 0,
            time: self.time.clone(),
        }))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.inner.resize_kv(blocks)?;
        self.kv_blocks.store(blocks, Ordering::Relaxed);
        Ok(())
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        self.inner.put_adapter(slot, adapter)?;
        locked(&self.filled).insert(slot);
        Ok(())
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        self.inner.drop_adapter(slot)?;
        locked(&self.filled).remove(&slot);
        Ok(())
    }
}

struct LateExecutable {
    inner: Box<dyn Executable>,
    plan: Plan,
    kv_blocks: Arc<AtomicUsize>,
    filled: FilledSlots,
    /// The steps in flight, oldest first; none of them is computed.
    queue: VecDeque<QueuedStep>,
    /// Rows of the latest sample.
    slots: usize,
    time: Arc<LateTime>,
}

struct QueuedStep {
    input: StepInput,
    sample: Option<SampleInput>,
    done_us: u64,
}

impl Executable for LateExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.queue.len() == STEPS_IN_FLIGHT {
            return Err(BackendError::Order("submit while two steps are in flight"));
        }
        input.validate(&self.plan, self.kv_blocks.load(Ordering::Relaxed))?;
        input.resolve(&vec![0; self.slots], &mut Vec::new())?;
        let chosen =
            input.adapters.iter().enumerate().filter_map(|(sequence, slot)| Some((sequence, (*slot)?)));
        for (sequence, slot) in chosen {
            if !locked(&self.filled).contains(&slot) {
                return Err(StepError::EmptySlot { sequence, slot }.into());
            }
        }
        let done_us = self.time.submitted();
        self.queue.push_back(QueuedStep { input: input.clone(), sample: None, done_us });
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        let step = self.queue.back_mut().ok_or(BackendError::Order("sample without submit"))?;
        if step.sample.is_some() {
            return Err(BackendError::Order("sample after a sample of the same step"));
        }
        input.validate(step.input.logits_rows.len())?;
        step.done_us = self.time.sampled();
        step.sample = Some(input.clone());
        self.slots = input.len();
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        let step = self.queue.pop_front().ok_or(BackendError::Order("wait without submit"))?;
        self.inner.submit(&step.input)?;
        if let Some(sample) = &step.sample {
            self.inner.sample(sample)?;
        }
        self.inner.wait(output)?;
        self.time.awaited(step.done_us);
        Ok(())
    }
}
