//! A device with steps of fixed shapes, for tests: another backend that insists on buckets.
//!
//! An executable takes only steps for which no smaller bucket would do, and answers are awaited on the
//! executable that has the oldest step. So a caller that submits to one executable whatever comes, or waits
//! on the wrong one, does not work on it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use trustformers_plan::{
    Adapter, AdapterSlot, Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded,
    MemoryReport, Plan, SampleInput, StepError, StepInput, StepOutput,
};

/// The buckets of the device. Odd numbers, so that few steps fill one.
pub const BUCKETS: [usize; 4] = [1, 3, 9, 31];

/// The backend.
pub struct BucketedBackend {
    inner: Box<dyn Backend>,
    caps: Caps,
}

impl BucketedBackend {
    /// A device that computes as `inner` does.
    #[must_use]
    pub fn new(inner: Box<dyn Backend>) -> Self {
        let description = format!("{} in buckets", inner.caps().description);
        let caps = Caps { description, row_buckets: BUCKETS.to_vec(), ..inner.caps().clone() };
        Self { inner, caps }
    }

    /// The same with other claims.
    #[must_use]
    pub fn claiming(mut self, change: impl FnOnce(&mut Caps)) -> Self {
        change(&mut self.caps);
        self
    }
}

impl Backend for BucketedBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let most_rows = spec.plan.limits().rows;
        Ok(Box::new(BucketedModel { inner: self.inner.load(spec)?, most_rows, plans: Vec::new() }))
    }
}

/// The executable of the whole plan, which those of all its buckets share.
struct SharedExecutable {
    inner: Box<dyn Executable>,
    /// The buckets of the steps in flight, oldest first.
    in_flight: VecDeque<usize>,
}

struct BucketedModel {
    inner: Box<dyn Loaded>,
    most_rows: usize,
    /// The plans that were compiled, for all rows.
    plans: Vec<(Plan, Arc<Mutex<SharedExecutable>>)>,
}

impl Loaded for BucketedModel {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let (whole, bucket) = (plan.for_rows(self.most_rows), plan.limits().rows);
        let known = self.plans.iter().find(|(own, _)| *own == whole).map(|(_, shared)| Arc::clone(shared));
        let shared = match known {
            Some(shared) => shared,
            None => {
                let shared =
                    SharedExecutable { inner: self.inner.compile(&whole)?, in_flight: VecDeque::new() };
                let shared = Arc::new(Mutex::new(shared));
                self.plans.push((whole, Arc::clone(&shared)));
                shared
            }
        };
        let smaller = BUCKETS.into_iter().filter(|rows| *rows < bucket).max().unwrap_or(0);
        Ok(Box::new(BucketExecutable { bucket, smaller, shared }))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.inner.resize_kv(blocks)
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        self.inner.put_adapter(slot, adapter)
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        self.inner.drop_adapter(slot)
    }
}

struct BucketExecutable {
    /// The most rows of a step.
    bucket: usize,
    /// Steps of so many rows belong to the next smaller bucket.
    smaller: usize,
    shared: Arc<Mutex<SharedExecutable>>,
}

impl BucketExecutable {
    fn lock(&self) -> MutexGuard<'_, SharedExecutable> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Executable for BucketExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        let rows = input.rows();
        if rows > self.bucket {
            return Err(StepError::TooMany { what: "rows", got: rows, max: self.bucket }.into());
        }
        // An empty step belongs to no bucket, and is refused like any other wrong one.
        if rows > 0 && rows <= self.smaller {
            return Err(BackendError::Order("a step that fits a smaller bucket"));
        }
        let mut shared = self.lock();
        shared.inner.submit(input)?;
        shared.in_flight.push_back(self.bucket);
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        let mut shared = self.lock();
        if shared.in_flight.back() != Some(&self.bucket) {
            return Err(BackendError::Order("a sample of a step of another bucket"));
        }
        shared.inner.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        let mut shared = self.lock();
        if shared.in_flight.front() != Some(&self.bucket) {
            return Err(BackendError::Order("another bucket has the oldest step"));
        }
        shared.in_flight.pop_front();
        shared.inner.wait(output)
    }
}
