//! A backend that counts its steps and rows, so that what a request had to wait for can be told without a clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use trustformers_plan::{
    Backend, BackendError, Caps, Executable, LoadSpec, Loaded, MemoryReport, Plan, StepInput, StepOutput,
};

/// What was begun and what is done.
#[derive(Debug, Default)]
pub(crate) struct Work {
    steps_begun: AtomicUsize,
    steps_done: AtomicUsize,
    rows_begun: AtomicUsize,
    rows_done: AtomicUsize,
}

/// The work at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    steps_done: usize,
    rows_done: usize,
}

impl Work {
    pub(crate) fn now(&self) -> Moment {
        Moment {
            steps_done: self.steps_done.load(Ordering::SeqCst),
            rows_done: self.rows_done.load(Ordering::SeqCst),
        }
    }

    /// Steps and rows that were under way at `before` or have begun since.
    pub(crate) fn since(&self, before: Moment) -> (usize, usize) {
        let steps = self.steps_begun.load(Ordering::SeqCst) - before.steps_done;
        (steps, self.rows_begun.load(Ordering::SeqCst) - before.rows_done)
    }
}

/// A backend and its count.
pub(crate) struct Counting<T: ?Sized> {
    work: Arc<Work>,
    rows: usize,
    inner: Box<T>,
}

impl<T: ?Sized> Counting<T> {
    pub(crate) fn new(inner: Box<T>, work: Arc<Work>) -> Self {
        Self { work, rows: 0, inner }
    }
}

impl Backend for Counting<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Box::new(Counting::new(self.inner.load(spec)?, Arc::clone(&self.work))))
    }
}

impl Loaded for Counting<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(Counting::new(self.inner.compile(plan)?, Arc::clone(&self.work))))
    }
}

impl Executable for Counting<dyn Executable> {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        self.rows = input.rows();
        self.work.rows_begun.fetch_add(self.rows, Ordering::SeqCst);
        self.work.steps_begun.fetch_add(1, Ordering::SeqCst);
        self.inner.submit(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)?;
        self.work.rows_done.fetch_add(self.rows, Ordering::SeqCst);
        self.work.steps_done.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
