//! Tests of the suite: the oracle passes it, and a backend with one fault fails the case for that fault.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in what it builds as well")]

use std::{borrow::Cow, sync::Arc};

use trustformers_conformance::bucketed::BucketedBackend;
use trustformers_conformance::late::{LateOracle, LateTime};
use trustformers_conformance::{Fault, Open, check};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Adapter, AdapterSlot, Backend, BackendError, Caps, DType, EstimateSpec, Executable, FusedOps, KvType,
    LoadSpec, Loaded, MemoryReport, Numerics, Plan, SampleInput, SampleSpec, StepInput, StepOutput, Weight,
    WeightView, Weights,
};

/// The fault of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    /// One element of every answer is slightly too large.
    Inexact,
    /// An answer depends on how many sequences there are.
    BatchDependent,
    /// In fast numerics an answer depends on how many rows there are.
    Tiled,
    /// One element is NaN.
    NotANumber,
    /// `wait` succeeds without `submit`.
    Eager,
    /// It reports that it takes no memory.
    Forgetful,
    /// It estimates less memory than it takes.
    Underestimating,
    /// It takes the rows of a weight that is stored transposed in another order.
    Transposing,
    /// It chooses the best token, whatever it is asked for.
    Greedy,
    /// It takes the adapter of a step's first sequence for all of them.
    OneAdapter,
    /// It claims no type.
    Typeless,
}

/// The oracle with a fault.
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

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        let mut estimate = self.0.estimate(spec)?;
        if self.1 == Flaw::Underestimating {
            estimate.kv_bytes /= 2;
        }
        Ok(estimate)
    }

    fn load(&mut self, mut spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let numerics = spec.numerics;
        if self.1 == Flaw::Transposing {
            spec.weights = Arc::new(transposes_rotated(&spec.weights));
        }
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

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.0.resize_kv(blocks)
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        self.0.put_adapter(slot, adapter)
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        self.0.drop_adapter(slot)
    }
}

impl Executable for FlawedExecutable {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        (self.sequences, self.rows) = (input.sequences(), input.rows());
        if self.flaw == Flaw::OneAdapter {
            let mut one = input.clone();
            one.adapters.fill(input.adapters.first().copied().flatten());
            return self.inner.submit(&one);
        }
        self.inner.submit(input)
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        if self.flaw != Flaw::Greedy {
            return self.inner.sample(input);
        }
        let mut greedy = SampleInput::new();
        for row in 0..input.len() {
            greedy.push(&SampleSpec::greedy(input.row(row).logits_row));
        }
        self.inner.sample(&greedy)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        match self.inner.wait(output) {
            Err(_) if self.flaw == Flaw::Eager => return Ok(()),
            outcome => outcome?,
        }
        let Some(first) = output.values.first_mut() else { return Ok(()) };
        match self.flaw {
            Flaw::Inexact => *first = *first * 1.001 + 0.001,
            // A difference of one bit, which only a comparison of bits finds.
            Flaw::BatchDependent if self.sequences > 1 => *first = f32::from_bits(first.to_bits() ^ 1),
            Flaw::Tiled if self.numerics == Numerics::Fast && self.rows >= 8 => {
                *first = f32::from_bits(first.to_bits() ^ 1);
            }
            Flaw::NotANumber => *first = f32::NAN,
            _ => {}
        }
        Ok(())
    }
}

/// The weights; of those whose rows do not lie side by side, the first row comes last.
fn transposes_rotated(weights: &Weights) -> Weights {
    let mut rotated = Weights::new();
    for (_, weight) in weights.iter() {
        let mut weight = weight.clone();
        if matches!(weight.row(0), Cow::Owned(_)) {
            let first = weight.view("first", &WeightView::Rows(0..1)).unwrap();
            let others = weight.view("others", &WeightView::Rows(1..weight.rows())).unwrap();
            weight = Weight::stacked(weight.name(), &[&others, &first]).unwrap();
        }
        rotated.push(weight).unwrap();
    }
    rotated
}

fn claim_little(caps: &mut Caps) {
    caps.dtypes.retain(|dtype| [DType::F32, DType::Q4_1].contains(dtype));
    (caps.kv_types, caps.fast_kv_type, caps.fused) = (vec![KvType::F32], KvType::F32, FusedOps::NONE);
}

/// The cases that the backend fails. It claims little, because each claim costs runs of a model and the
/// faults do not depend on them.
fn faults(flaw: Flaw) -> Vec<&'static str> {
    let open: Open<'_> = &move || {
        let oracle = Oracle::new();
        let mut caps = oracle.caps().clone();
        claim_little(&mut caps);
        caps.adapters = flaw == Flaw::OneAdapter;
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
fn a_device_with_late_answers_passes() {
    let late = || LateOracle::new(LateTime::new(5000, 0)).claiming(claim_little);
    check(&|| Ok(Box::new(late()))).unwrap();
}

#[test]
fn a_device_that_insists_on_buckets_passes() {
    let bucketed = || BucketedBackend::new(Box::new(Oracle::new())).claiming(claim_little);
    check(&|| Ok(Box::new(bucketed()))).unwrap();
}

#[test]
fn a_device_with_buckets_and_late_answers_passes() {
    let late = || Box::new(LateOracle::new(LateTime::new(5000, 0)));
    let bucketed = || BucketedBackend::new(late()).claiming(claim_little);
    check(&|| Ok(Box::new(bucketed()))).unwrap();
}

// One test for each fault: each runs the whole suite, and tests run side by side.

#[test]
fn an_inexact_answer_is_found() {
    assert!(faults(Flaw::Inexact).starts_with(&["decoder/exact", "encoder/exact"]));
}

#[test]
fn an_answer_that_depends_on_the_batch_is_found() {
    // In the decoder's case the changed row belongs to another sequence and is not compared.
    assert!(faults(Flaw::BatchDependent).contains(&"encoder/batch_invariance"));
}

#[test]
fn an_answer_that_depends_on_the_rows_is_found() {
    assert_eq!(faults(Flaw::Tiled), ["decoder/draft_tokens"]);
}

#[test]
fn an_answer_that_is_no_number_is_found() {
    let not_a_number = faults(Flaw::NotANumber);
    for case in ["decoder/exact", "decoder/fast", "encoder/fast", "cache/poison"] {
        assert!(not_a_number.contains(&case), "{case} in {not_a_number:?}");
    }
}

#[test]
fn a_wait_without_a_submit_is_found() {
    assert_eq!(faults(Flaw::Eager), ["order/steps"]);
}

#[test]
fn a_report_of_no_memory_is_found() {
    assert_eq!(faults(Flaw::Forgetful), ["windowed/classes", "cache/resize", "order/memory"]);
}

#[test]
fn an_estimate_that_is_too_small_is_found() {
    assert_eq!(faults(Flaw::Underestimating), ["windowed/classes", "cache/resize", "order/memory"]);
}

#[test]
fn a_view_in_another_order_is_found() {
    assert_eq!(faults(Flaw::Transposing), ["weights/views"]);
}

#[test]
fn another_choice_of_tokens_is_found() {
    assert_eq!(faults(Flaw::Greedy), ["sample/choices"]);
}

#[test]
fn one_adapter_for_all_sequences_is_found() {
    assert_eq!(faults(Flaw::OneAdapter), ["adapters/mixed", "adapters/fast", "adapters/slots"]);
}

#[test]
fn a_backend_without_types_is_found() {
    assert_eq!(faults(Flaw::Typeless), ["types"]);
}

#[test]
fn a_backend_that_does_not_open_fails_every_case() {
    let faults = check(&|| Err(BackendError::Device("none here".to_owned()))).unwrap_err();
    assert_eq!(faults.len(), trustformers_conformance::cases::ALL.len());
    assert!(faults[0].to_string().contains("none here"), "{}", faults[0]);
}
