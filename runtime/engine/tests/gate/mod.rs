//! A backend that computes with the oracle, but only when the test lets it: every step is announced before it runs
//! and waits for a verdict, so that tests meet the engine in any phase without a clock.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, StepInput,
    StepOutput,
};

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It computes.
    Run,
    /// The device reports a failure.
    Fail,
    /// The logits are not numbers.
    Poison,
    /// The backend's code panics.
    Panic,
}

/// The test's end. When it is dropped, all further steps run freely.
pub(crate) struct Gate {
    begun: Receiver<StepInput>,
    verdicts: SyncSender<Verdict>,
}

impl Gate {
    /// Waits until the engine has begun a step, and gives it.
    pub(crate) fn begun(&self) -> StepInput {
        self.begun.recv().unwrap()
    }

    /// Lets the step that was begun do this.
    pub(crate) fn let_it(&self, verdict: Verdict) {
        self.verdicts.send(verdict).unwrap();
    }

    /// Waits for a step, lets it run, and gives its rows per sequence.
    pub(crate) fn run(&self) -> Vec<usize> {
        let step = self.begun();
        self.let_it(Verdict::Run);
        (0..step.sequences()).map(|sequence| step.rows_of(sequence).len()).collect()
    }
}

/// The engine's end.
pub(crate) struct Gated {
    oracle: Oracle,
    ends: Option<Ends>,
}

struct Ends {
    begun: SyncSender<StepInput>,
    verdicts: Receiver<Verdict>,
}

/// A gated oracle and its gate.
pub(crate) fn gated() -> (Box<Gated>, Gate) {
    // One step is under way at a time: one announcement and one verdict.
    let (begun, announced) = sync_channel(1);
    let (verdicts, decided) = sync_channel(1);
    let ends = Ends { begun, verdicts: decided };
    (Box::new(Gated { oracle: Oracle::new(), ends: Some(ends) }), Gate { begun: announced, verdicts })
}

impl Backend for Gated {
    fn caps(&self) -> &Caps {
        self.oracle.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.oracle.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let inner = self.oracle.load(spec)?;
        Ok(Box::new(GatedModel { inner, ends: self.ends.take() }))
    }
}

struct GatedModel {
    inner: Box<dyn Loaded>,
    ends: Option<Ends>,
}

impl Loaded for GatedModel {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let inner = self.inner.compile(plan)?;
        let ends = self.ends.take().expect("compiled once");
        Ok(Box::new(GatedSteps { inner, ends, verdict: Verdict::Run }))
    }
}

struct GatedSteps {
    inner: Box<dyn Executable>,
    ends: Ends,
    verdict: Verdict,
}

impl Executable for GatedSteps {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        let watched = self.ends.begun.send(input.clone()).is_ok();
        self.verdict = if watched { self.ends.verdicts.recv().unwrap_or(Verdict::Run) } else { Verdict::Run };
        match self.verdict {
            Verdict::Run | Verdict::Poison => self.inner.submit(input),
            Verdict::Fail => Err(BackendError::Device("the test pulled the plug".to_owned())),
            Verdict::Panic => panic!("the test broke the backend"),
        }
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)?;
        if self.verdict == Verdict::Poison {
            output.values.fill(f32::NAN);
        }
        Ok(())
    }
}
