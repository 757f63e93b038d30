//! The suite itself: the oracle passes it, and backends with one fault each do not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use trustformers_conformance::{Fault, Open, check};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, BackendError, Caps, Executable, LoadSpec, Loaded, MemoryReport, Numerics, Plan, StepInput,
    StepOutput,
};

/// What is wrong with a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    /// Every answer is a little too large in one place.
    Inexact,
    /// An answer depends on how many sequences there are.
    Social,
    /// In fast numerics an answer depends on how many rows there are.
    Tiled,
    /// One element is no number.
    NotANumber,
    /// It answers without having been asked.
    Eager,
    /// It says that it takes no memory.
    Forgetful,
    /// It claims no type.
    Typeless,
}

/// The oracle with a flaw.
struct Flawed(Oracle, Flaw, Caps);
struct FlawedModel(Box<dyn Loaded>, Flaw, Numerics);
struct FlawedExecutable {
    inner: Box<dyn Executable>,
    flaw: Flaw,
    numerics: Numerics,
    sequences: usize,
    rows: usize,
}

impl Backend for Flawed {
    fn caps(&self) -> &Caps {
        &self.2
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let numerics = spec.numerics;
        Ok(Box::new(FlawedModel(self.0.load(spec)?, self.1, numerics)))
    }
}

impl Loaded for FlawedModel {
    fn memory(&self) -> MemoryReport {
        if self.1 == Flaw::Forgetful { MemoryReport::default() } else { self.0.memory() }
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        let inner = self.0.compile(plan)?;
        Ok(Box::new(FlawedExecutable { inner, flaw: self.1, numerics: self.2, sequences: 0, rows: 0 }))
    }
}

impl Executable for FlawedExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        (self.sequences, self.rows) = (input.sequences(), input.rows());
        self.inner.submit(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        match self.inner.wait(output) {
            Err(_) if self.flaw == Flaw::Eager => return Ok(()),
            outcome => outcome?,
        }
        let Some(first) = output.values.first_mut() else { return Ok(()) };
        match self.flaw {
            Flaw::Inexact => *first = *first * 1.001 + 0.001,
            // One part in four million for each other sequence: only bits can tell.
            Flaw::Social if self.sequences > 1 => *first = f32::from_bits(first.to_bits() ^ 1),
            Flaw::Tiled if self.numerics == Numerics::Fast && self.rows >= 8 => {
                *first = f32::from_bits(first.to_bits() ^ 1);
            }
            Flaw::NotANumber => *first = f32::NAN,
            _ => {}
        }
        Ok(())
    }
}

fn faults(flaw: Flaw) -> Vec<&'static str> {
    let open: Open<'_> = &move || {
        let oracle = Oracle::new();
        let mut caps = oracle.caps().clone();
        if flaw == Flaw::Typeless {
            caps.dtypes.clear();
        }
        Ok(Box::new(Flawed(oracle, flaw, caps)))
    };
    check(open).unwrap_err().iter().map(|fault: &Fault| fault.case).collect()
}

#[test]
fn the_oracle_passes() {
    check(&|| Ok(Box::new(Oracle::new()))).unwrap();
}

#[test]
fn each_flaw_is_found_by_the_case_that_is_there_for_it() {
    assert!(faults(Flaw::Inexact).starts_with(&["decoder/exact", "encoder/exact"]));
    // The first of the rows that are compared is another one's, so the flaw shows where all are.
    assert!(faults(Flaw::Social).contains(&"encoder/company"));
    assert_eq!(faults(Flaw::Tiled), ["decoder/guesses"]);
    let not_a_number = faults(Flaw::NotANumber);
    for case in ["decoder/exact", "decoder/fast", "encoder/fast", "cache/poison"] {
        assert!(not_a_number.contains(&case), "{case} in {not_a_number:?}");
    }
    assert_eq!(faults(Flaw::Eager), ["order/steps"]);
    assert_eq!(faults(Flaw::Forgetful), ["order/memory"]);
    assert_eq!(faults(Flaw::Typeless), ["types"]);
}

#[test]
fn a_backend_that_does_not_open_fails_every_case() {
    let faults = check(&|| Err(BackendError::Device("none here".to_owned()))).unwrap_err();
    assert_eq!(faults.len(), trustformers_conformance::cases::ALL.len());
    assert!(faults[0].to_string().contains("none here"), "{}", faults[0]);
}
