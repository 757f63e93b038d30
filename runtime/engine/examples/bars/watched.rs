//! A backend whose steps are counted, can be held and can be made to fail: so that what a request has to wait for is
//! told by orders and counts, which no other load on the machine changes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, StepInput,
    StepOutput,
};

/// Steps and rows that have begun.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moment {
    pub(crate) steps: usize,
    pub(crate) rows: usize,
}

#[derive(Debug, Default)]
struct State {
    begun: Moment,
    /// Rows of the step that began last.
    last_rows: usize,
    holds: bool,
    /// Steps that may run although steps are held.
    permits: usize,
    fails: bool,
    /// The first tokens of prompts, in the order in which they began while steps were held.
    prompts: Vec<u32>,
    /// A row that is waited for, by position and token, and the moment after its step began.
    awaited: Option<(usize, u32)>,
    found: Option<Moment>,
}

/// The work of one engine.
#[derive(Debug)]
pub(crate) struct Work {
    state: Mutex<State>,
    /// Told when steps may run.
    released: Condvar,
    /// Steps that have begun.
    begun: watch::Sender<usize>,
}

impl Work {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), released: Condvar::new(), begun: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many steps have begun. What the ones before told their callers can be seen then.
    pub(crate) async fn begun(&self, steps: usize) {
        let mut begun = self.begun.subscribe();
        // The sender lives as long as this does.
        let _begun = begun.wait_for(|begun| *begun >= steps).await;
    }

    /// Holds every step that begins from now on; gives the number of those that have begun.
    pub(crate) fn hold(&self) -> usize {
        let mut state = self.lock();
        (state.holds, state.permits) = (true, 0);
        state.prompts.clear();
        state.begun.steps
    }

    /// Lets the step that is held run, and waits until the next one is held.
    pub(crate) async fn advance(&self) {
        let next = {
            let mut state = self.lock();
            state.permits = 1;
            state.begun.steps + 1
        };
        self.released.notify_all();
        self.begun(next).await;
    }

    /// Lets all steps run.
    pub(crate) fn open(&self) {
        self.lock().holds = false;
        self.released.notify_all();
    }

    /// Makes the next step fail.
    pub(crate) fn fail_next(&self) {
        self.lock().fails = true;
    }

    pub(crate) fn now(&self) -> Moment {
        self.lock().begun
    }

    /// Rows of the step that began last.
    pub(crate) fn last_rows(&self) -> usize {
        self.lock().last_rows
    }

    /// The first tokens of prompts, in the order in which they began since steps are held.
    pub(crate) fn prompts(&self) -> Vec<u32> {
        self.lock().prompts.clone()
    }

    /// Looks out for the row of this token at this position.
    pub(crate) fn look_out(&self, position: usize, token: u32) {
        let mut state = self.lock();
        (state.awaited, state.found) = (Some((position, token)), None);
    }

    /// What had begun with the step of the row that was looked out for.
    pub(crate) fn found(&self) -> Option<Moment> {
        self.lock().found
    }

    /// Notes a step, and waits while it is held. Whether it shall fail.
    fn begin(&self, input: &StepInput) -> bool {
        let mut state = self.lock();
        state.begun.steps += 1;
        state.begun.rows += input.rows();
        state.last_rows = input.rows();
        for (token, position) in input.tokens.iter().zip(&input.positions) {
            if *position == 0 && state.holds {
                state.prompts.push(*token);
            }
            if state.awaited == Some((*position as usize, *token)) {
                (state.awaited, state.found) = (None, Some(state.begun));
            }
        }
        self.begun.send_replace(state.begun.steps);
        while state.holds && state.permits == 0 {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.permits = 0;
        std::mem::take(&mut state.fails)
    }
}

/// A backend and its work.
pub(crate) struct Watched<T: ?Sized> {
    work: Arc<Work>,
    inner: Box<T>,
}

impl<T: ?Sized> Watched<T> {
    pub(crate) fn new(inner: Box<T>, work: Arc<Work>) -> Self {
        Self { work, inner }
    }
}

impl Backend for Watched<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(Watched::new(self.inner.load(spec)?, Arc::clone(&self.work))))
    }
}

impl Loaded for Watched<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(Watched::new(self.inner.compile(plan)?, Arc::clone(&self.work))))
    }
}

impl Executable for Watched<dyn Executable> {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.work.begin(input) {
            return Err(BackendError::Device("a failure that was asked for".to_owned()));
        }
        self.inner.submit(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)
    }
}
