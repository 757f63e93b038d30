//! A backend that computes with the oracle, but only when the test allows it: every step is announced before
//! it runs and waits for a verdict, so that tests meet the engine in any state without a clock.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Adapter, AdapterSlot, Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded,
    MemoryReport, Plan, SampleFault, SampleInput, StepError, StepInput, StepOutput,
};

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It computes.
    Run,
    /// The device reports a failure.
    Fail,
    /// The device refuses this row before it computes anything.
    RefuseRow(usize),
    /// The values are not numbers, and no token is chosen from them.
    Poison,
    /// The backend's code panics.
    Panic,
}

/// The test's end. When it is dropped, all further steps run freely.
pub(crate) struct StepControl {
    announced: Receiver<StepInput>,
    verdicts: SyncSender<Verdict>,
}

impl StepControl {
    /// Waits until the engine has submitted a step, and gives it.
    pub(crate) fn next_step(&self) -> StepInput {
        self.announced.recv().unwrap()
    }

    /// Decides what the submitted step does.
    pub(crate) fn decide(&self, verdict: Verdict) {
        self.verdicts.send(verdict).unwrap();
    }

    /// Waits for a step, lets it run, and gives its rows per sequence.
    pub(crate) fn run_step(&self) -> Vec<usize> {
        let step = self.next_step();
        self.decide(Verdict::Run);
        (0..step.sequences()).map(|sequence| step.rows_of(sequence).len()).collect()
    }
}

/// The engine's end.
pub(crate) struct SteppedBackend {
    oracle: Oracle,
    ends: Option<StepChannels>,
}

struct StepChannels {
    announce: SyncSender<StepInput>,
    verdicts: Receiver<Verdict>,
}

/// An oracle whose steps are controlled, and its control.
pub(crate) fn stepped() -> (Box<SteppedBackend>, StepControl) {
    // One step runs at a time: one announcement and one verdict.
    let (announce, announced) = sync_channel(1);
    let (verdicts, decided) = sync_channel(1);
    let ends = StepChannels { announce, verdicts: decided };
    let backend = SteppedBackend { oracle: Oracle::new(), ends: Some(ends) };
    (Box::new(backend), StepControl { announced, verdicts })
}

impl Backend for SteppedBackend {
    fn caps(&self) -> &Caps {
        self.oracle.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.oracle.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let inner = self.oracle.load(spec)?;
        Ok(Box::new(SteppedModel { inner, ends: self.ends.take() }))
    }
}

struct SteppedModel {
    inner: Box<dyn Loaded>,
    ends: Option<StepChannels>,
}

impl Loaded for SteppedModel {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let inner = self.inner.compile(plan)?;
        let ends = self.ends.take().expect("compiled once");
        Ok(Box::new(SteppedExecutable { inner, ends, verdict: Verdict::Run }))
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

struct SteppedExecutable {
    inner: Box<dyn Executable>,
    ends: StepChannels,
    verdict: Verdict,
}

impl Executable for SteppedExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        let controlled = self.ends.announce.send(input.clone()).is_ok();
        self.verdict =
            if controlled { self.ends.verdicts.recv().unwrap_or(Verdict::Run) } else { Verdict::Run };
        match self.verdict {
            Verdict::Run | Verdict::Poison => self.inner.submit(input),
            Verdict::Fail => Err(BackendError::Device("the test pulled the plug".to_owned())),
            Verdict::RefuseRow(row) => {
                let token = input.tokens[row].id().unwrap();
                Err(StepError::Token { row, token, vocab: 0 }.into())
            }
            Verdict::Panic => panic!("the test broke the backend"),
        }
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.inner.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)?;
        if self.verdict == Verdict::Poison {
            output.values.fill(f32::NAN);
            output.choices.fill(Err(SampleFault::NotFinite));
        }
        Ok(())
    }
}
