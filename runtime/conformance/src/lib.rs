//! One conformance suite for every backend. The scalar oracle of `trustformers-plan` defines the right
//! answers.
//!
//! A backend's test passes a function that opens it. The suite runs small models in ragged steps and
//! compares. Together the models use every op, every weight type and every fused form that the backend
//! claims. All weights come from seeds: the suite reads no file. A backend's crate depends on this one in its
//! tests only.
//!
//! What must hold, and the [`cases`] that check it:
//!
//! * the backend claims F32 (`types`);
//! * `exact` follows the oracle to within the rounding of f32 sums (`decoder/exact`, `encoder/exact`);
//! * `fast` keeps the direction of the oracle's answer (`decoder/fast`, `encoder/fast`);
//! * projections of one input may have weights of different types (`decoder/mixed_types`);
//! * each fused form by itself gives the answer of the unfused ops (`fused/decoder`, `fused/encoder`,
//!   `fused/norms`);
//! * a sequence gives the same bits alone, batched, in chunks and after a shared prefix
//!   (`decoder/batch_invariance`, `decoder/prefix`, `encoder/batch_invariance`);
//! * draft tokens that are verified in one step get the bits of one step each, in `fast` too
//!   (`decoder/draft_tokens`), where the device claims it;
//! * rows whose results nobody reads may be left out of the last layer: the others keep their bits
//!   (`decoder/pruned`, `encoder/pruned`);
//! * sequences of one step that chose different adapters get each the answer that it gets alone
//!   (`adapters/mixed`, `adapters/fast`), and refused adapters change nothing (`adapters/slots`);
//! * each claimed type of the cache gives the answer of the oracle with that type (`cache/types`);
//! * a cache grows and shrinks without changing what it keeps (`cache/resize`);
//! * layers with windows may have blocks of their own, of which those before the window are absent
//!   (`windowed/classes`);
//! * a reused block shows nothing of an earlier sequence (`cache/poison`);
//! * the device chooses the tokens that the reference chooses from its logits, and gives them to the next
//!   step itself (`sample/choices`, `sample/slots`);
//! * as many steps are in flight as the device claims (`sample/flight`);
//! * invalid steps, samples and plans are refused with the right error, and the next step works (`order/…`,
//!   `sample/order`);
//! * the memory report and the estimate before the load are right (`order/memory`).

#![forbid(unsafe_code)]

pub mod bucketed;
pub mod cases;
pub mod compare;
pub mod harness;
pub mod late;
pub mod models;
pub mod normed;
pub mod seeds;
pub mod windowed;

use trustformers_plan::{Backend, BackendError, PlanError, WeightError};

/// Opens the backend under test. Each case calls it, so that no case depends on what another one left behind.
pub type Open<'a> = &'a dyn Fn() -> Result<Box<dyn Backend>, BackendError>;

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// The backend failed or refused something valid.
    #[error("the backend failed: {0}")]
    Backend(#[from] BackendError),
    /// A plan of the suite is wrong: a fault of the suite or of a pass.
    #[error("a plan of the suite is wrong: {0}")]
    Plan(#[from] PlanError),
    /// A weight of the suite is wrong: a fault of the suite.
    #[error("a weight of the suite is wrong: {0}")]
    Weight(#[from] WeightError),
    /// The backend's answer is wrong.
    #[error("{0}")]
    Wrong(String),
}

/// A case that a backend failed.
#[derive(Debug, thiserror::Error)]
#[error("{backend} fails {case}: {error}")]
pub struct Fault {
    /// The backend's description of itself.
    pub backend: String,
    /// The case.
    pub case: &'static str,
    /// Why.
    pub error: CaseError,
}

/// Runs every case; returns how many passed.
///
/// # Errors
/// Every case that failed.
pub fn check(open: Open<'_>) -> Result<usize, Vec<Fault>> {
    let backend = open().map_or_else(|error| error.to_string(), |backend| backend.caps().description.clone());
    let mut faults = Vec::new();
    for case in cases::ALL {
        if let Err(error) = (case.run)(open) {
            faults.push(Fault { backend: backend.clone(), case: case.name, error });
        }
    }
    if faults.is_empty() { Ok(cases::ALL.len()) } else { Err(faults) }
}
