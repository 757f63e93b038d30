//! A backend whose steps are counted, can be blocked and can be made to fail. The wait of a request is then
//! measured in orders and counts, which do not depend on other load on the machine.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, SampleInput,
    StepInput, StepOutput,
};

/// Steps and rows that were started.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WorkCount {
    pub(crate) steps: usize,
    pub(crate) rows: usize,
}

#[derive(Debug, Default)]
struct WorkState {
    started: WorkCount,
    /// Rows of the step that was started last.
    last_rows: usize,
    blocked: bool,
    /// Steps that may run although steps are blocked.
    permits: usize,
    fails: bool,
    /// The first tokens of prompts, in the order in which they were started while steps were blocked.
    prompts: Vec<u32>,
    /// The row to find, by position and token, and the count after its step was started.
    awaited: Option<(usize, u32)>,
    found: Option<WorkCount>,
}

/// The work of one engine.
#[derive(Debug)]
pub(crate) struct EngineWork {
    state: Mutex<WorkState>,
    /// Notified when steps may run.
    released: Condvar,
    /// Steps that were started.
    started: watch::Sender<usize>,
}

impl EngineWork {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), released: Condvar::new(), started: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, WorkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many steps were started. The events of the steps before are readable then.
    pub(crate) async fn until_started(&self, steps: usize) {
        let mut started = self.started.subscribe();
        // The sender lives as long as this.
        let _started = started.wait_for(|started| *started >= steps).await;
    }

    /// Blocks every step that is started from now on; gives the number of steps so far.
    pub(crate) fn block(&self) -> usize {
        let mut state = self.lock();
        (state.blocked, state.permits) = (true, 0);
        state.prompts.clear();
        state.started.steps
    }

    /// Lets the blocked step run, and waits until the next one is blocked.
    pub(crate) async fn advance(&self) {
        let next = {
            let mut state = self.lock();
            state.permits = 1;
            state.started.steps + 1
        };
        self.released.notify_all();
        self.until_started(next).await;
    }

    /// Lets all steps run.
    pub(crate) fn unblock(&self) {
        self.lock().blocked = false;
        self.released.notify_all();
    }

    /// Makes the next step fail.
    pub(crate) fn fail_next(&self) {
        self.lock().fails = true;
    }

    pub(crate) fn now(&self) -> WorkCount {
        self.lock().started
    }

    /// Rows of the step that was started last.
    pub(crate) fn last_rows(&self) -> usize {
        self.lock().last_rows
    }

    /// The first tokens of prompts, in the order in which they were started since steps are blocked.
    pub(crate) fn prompts(&self) -> Vec<u32> {
        self.lock().prompts.clone()
    }

    /// Searches for the row of this token at this position.
    pub(crate) fn find_row(&self, position: usize, token: u32) {
        let mut state = self.lock();
        (state.awaited, state.found) = (Some((position, token)), None);
    }

    /// The count with the step of the row that was searched for.
    pub(crate) fn found(&self) -> Option<WorkCount> {
        self.lock().found
    }

    /// Counts a step, and waits while it is blocked. True if it must fail.
    fn start_step(&self, input: &StepInput) -> bool {
        let mut state = self.lock();
        state.started.steps += 1;
        state.started.rows += input.rows();
        state.last_rows = input.rows();
        for (token, position) in input.tokens.iter().filter_map(|token| token.id()).zip(&input.positions) {
            if *position == 0 && state.blocked {
                state.prompts.push(token);
            }
            if state.awaited == Some((*position as usize, token)) {
                (state.awaited, state.found) = (None, Some(state.started));
            }
        }
        self.started.send_replace(state.started.steps);
        while state.blocked && state.permits == 0 {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.permits = 0;
        std::mem::take(&mut state.fails)
    }
}

/// A backend, or a model or executable of it, and its work.
pub(crate) struct Observed<T: ?Sized> {
    work: Arc<EngineWork>,
    inner: Box<T>,
}

impl<T: ?Sized> Observed<T> {
    pub(crate) fn new(inner: Box<T>, work: Arc<EngineWork>) -> Self {
        Self { work, inner }
    }
}

impl Backend for Observed<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(Observed::new(self.inner.load(spec)?, Arc::clone(&self.work))))
    }
}

impl Loaded for Observed<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(Observed::new(self.inner.compile(plan)?, Arc::clone(&self.work))))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.inner.resize_kv(blocks)
    }
}

impl Executable for Observed<dyn Executable> {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.work.start_step(input) {
            return Err(BackendError::Device("a failure that the run asked for".to_owned()));
        }
        self.inner.submit(input)
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.inner.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)
    }
}
