//! A plan that runs on the pool: its steps, the tokens that are chosen from them, and their answers.
//!
//! An executable has the pool for a whole step, so that executables can share memory. Logits stay in
//! the arena, where the threads of the pool choose tokens from them; they are copied only for a step that was
//! not sampled.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use trustformers_plan::{
    BackendError, Executable, Numerics, Plan, SampleInput, SampleResult, SampleScratch, StepInput, StepOutput,
};

use crate::{
    adapter::CpuAdapter,
    footprint::sampling_threads,
    hazards::{self, Fence},
    model::ModelState,
    shared_pool::{PoolClient, PoolGuard},
    step::{Step, alone::WrittenBlocks, prompts::PromptRows},
};

/// A plan that runs on the pool.
pub(crate) struct CpuExecutable {
    plan: Plan,
    fences: Vec<Fence>,
    shared: Arc<ModelState>,
    pool: Arc<PoolClient>,
    row_sequences: Vec<u32>,
    prompt_rows: PromptRows,
    written_blocks: WrittenBlocks,
    /// The adapter of each sequence of the step that runs.
    adapters: Vec<Option<Arc<CpuAdapter>>>,
    /// Ids of the rows of the step.
    ids: Vec<u32>,
    /// Ids of the latest sample; 0 for a row without a choice.
    sampled: Vec<u32>,
    /// The choices of the step in flight.
    choices: Vec<SampleResult>,
    /// Of each thread that chooses tokens.
    scratch: Vec<Mutex<SampleScratch>>,
    in_flight: Option<StepInFlight>,
}

/// A step that was computed and not awaited yet.
#[derive(Clone, Copy)]
struct StepInFlight {
    /// Rows of its answer.
    rows: usize,
    logits_rows: usize,
    is_sampled: bool,
    /// Its number among the steps of the model.
    number: u64,
}

impl CpuExecutable {
    pub(crate) fn new(plan: Plan, shared: Arc<ModelState>, pool: Arc<PoolClient>) -> Self {
        let threads = pool.threads();
        let scratch = || Mutex::new(SampleScratch::with_room_for(plan.answer().cols));
        Self {
            fences: hazards::fences(plan.ops(), plan.limits()),
            scratch: (0..sampling_threads(&plan, threads)).map(|_| scratch()).collect(),
            plan,
            shared,
            pool,
            row_sequences: Vec::new(),
            prompt_rows: PromptRows::default(),
            written_blocks: WrittenBlocks::default(),
            adapters: Vec::new(),
            ids: Vec::new(),
            sampled: Vec::new(),
            choices: Vec::new(),
            in_flight: None,
        }
    }

    /// The logits or pooled row at `index` of the step in flight.
    ///
    /// # Safety
    /// No thread writes to the arena: the caller has the pool, and `index` is below the rows of the
    /// answer of the step that ran last.
    unsafe fn answer_row(&self, index: usize) -> &[f32] {
        let answer = self.plan.answer();
        // SAFETY: see above.
        unsafe { std::slice::from_raw_parts(self.shared.arena.row(answer, index), answer.cols) }
    }

    /// Acquires the pool, while the arena still has the answer of a step.
    fn pool_after(&self, step: StepInFlight) -> Result<PoolGuard<'_>, BackendError> {
        let pool = self.pool.acquire();
        if self.shared.steps.load(Ordering::Relaxed) == step.number {
            return Ok(pool);
        }
        Err(BackendError::Order("another executable of the model ran before the step was awaited"))
    }

    /// The choices for the rows of a sample of the step in flight.
    fn choose(&self, input: &SampleInput, step: StepInFlight) -> Result<Vec<SampleResult>, BackendError> {
        let mut pool = self.pool_after(step)?;
        let choice = |index: usize, scratch: &mut SampleScratch| {
            let spec = input.row(index);
            // SAFETY: the pool is held, the row was validated, and the processor has the tier's instructions.
            unsafe { (self.shared.kernels.choose)(self.answer_row(spec.logits_row), &spec, scratch) }
        };
        let locked = |thread: usize| self.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
        if input.len() < 2 {
            // Not worth waking a thread.
            return Ok((0..input.len()).map(|index| choice(index, &mut locked(0))).collect());
        }
        // Rows differ in cost, so each thread takes the next one.
        let next = AtomicUsize::new(0);
        let chosen = Mutex::new(Vec::with_capacity(input.len()));
        let run = pool.run(&|number, _| {
            if number >= self.scratch.len() {
                return Ok(());
            }
            let mut scratch = locked(number);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= input.len() {
                    return Ok(());
                }
                let own = choice(index, &mut scratch);
                chosen.lock().unwrap_or_else(PoisonError::into_inner).push((index, own));
            }
        });
        run.map_err(|_| BackendError::Device("sampling panicked; its message is in the log".into()))?;
        let mut chosen = chosen.into_inner().unwrap_or_else(PoisonError::into_inner);
        chosen.sort_unstable_by_key(|(index, _)| *index);
        Ok(chosen.into_iter().map(|(_, choice)| choice).collect())
    }
}

impl Executable for CpuExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        if self.in_flight.is_some() {
            return Err(BackendError::Order("submit before the last step was awaited"));
        }
        input.validate(&self.plan, self.shared.cache.blocks())?;
        input.resolve(&self.sampled, &mut self.ids)?;
        self.shared.adapters().chosen(input, &mut self.adapters)?;
        self.row_sequences.clear();
        for sequence in 0..input.sequences() {
            self.row_sequences.extend(input.rows_of(sequence).map(|_| sequence as u32));
        }
        let has_panels = self.shared.numerics == Numerics::Fast && self.shared.kernels.has_panels();
        self.prompt_rows.list(input, has_panels);
        let groups = self.shared.kv_layout.classes().groups();
        let rows_are_alone =
            self.fences.contains(&Fence::Joint) && self.written_blocks.rows_are_alone(input, groups);
        let mut pool = self.pool.acquire();
        let number = self.shared.steps.fetch_add(1, Ordering::Relaxed) + 1;
        let step = Step {
            shared: &self.shared,
            plan: &self.plan,
            fences: &self.fences,
            input,
            ids: &self.ids,
            row_sequences: &self.row_sequences,
            prompt_rows: &self.prompt_rows,
            rows_are_alone,
            adapters: &self.adapters,
            threads: pool.threads(),
        };
        let run = pool.run(&|number, barrier| step.run(number, barrier));
        let rows = step.rows(self.plan.answer());
        // An adapter that is dropped must not stay in memory because a step chose it.
        self.adapters.clear();
        run.map_err(|_| BackendError::Device("a kernel panicked; its message is in the log".into()))?;
        let logits_rows = input.logits_rows.len();
        self.in_flight = Some(StepInFlight { rows, logits_rows, is_sampled: false, number });
        Ok(())
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        let step = self.in_flight.ok_or(BackendError::Order("sample without submit"))?;
        if step.is_sampled {
            return Err(BackendError::Order("sample after a sample of the same step"));
        }
        input.validate(step.logits_rows)?;
        self.choices = self.choose(input, step)?;
        self.sampled.clear();
        self.sampled.extend(self.choices.iter().map(|choice| choice.as_ref().map_or(0, |token| token.id)));
        self.in_flight = Some(StepInFlight { is_sampled: true, ..step });
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        let step = self.in_flight.take().ok_or(BackendError::Order("wait without submit"))?;
        output.width = self.plan.answer().cols;
        output.values.clear();
        output.choices.clear();
        if step.is_sampled {
            output.choices.append(&mut self.choices);
            return Ok(());
        }
        let _pool = self.pool_after(step)?;
        for index in 0..step.rows {
            // SAFETY: the pool is held, and the step had this row.
            output.values.extend_from_slice(unsafe { self.answer_row(index) });
        }
        Ok(())
    }
}
