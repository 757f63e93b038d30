//! One suite for every backend, judged by the scalar oracle of `trustformers-plan`.
//!
//! A backend hands in how it is opened; the suite runs small models through it that together use every op of the closed
//! set, every weight type and every fused form that the backend claims, in ragged steps, and compares. Everything is made
//! from seeds: no file is read. A backend's crate depends on this one for its tests alone.
//!
//! What must hold, and where it is checked:
//!
//! * F32 is among the types that it claims (`types`);
//! * `exact` follows the oracle to within the rounding of f32 sums ([`cases`] `decoder/exact`, `encoder/exact`);
//! * `fast` keeps the direction of the oracle's answer (`decoder/fast`, `encoder/fast`);
//! * each fused form by itself gives what the plain ops give (`fused/decoder`, `fused/encoder`);
//! * a sequence gives the same bits alone, in company, in chunks and behind a shared prefix (`decoder/company`,
//!   `decoder/prefix`, `encoder/company`);
//! * a few tokens read at once, as guesses are, give the bits of one after the other, in `fast` too (`decoder/guesses`);
//! * nothing of an earlier sequence is left in a block that is used again (`cache/poison`);
//! * steps and plans that make no sense are refused with the right error, and the next step works (`order/…`).

#![forbid(unsafe_code)]

pub mod cases;
pub mod compare;
pub mod models;
pub mod seeds;
pub mod story;

use trustformers_plan::{Backend, BackendError, PlanError, WeightError};

/// Opens the backend under test. Called once or more for every case, so that none sees what another left behind.
pub type Open<'a> = &'a dyn Fn() -> Result<Box<dyn Backend>, BackendError>;

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// The backend refused or failed where it must not.
    #[error("the backend failed: {0}")]
    Backend(#[from] BackendError),
    /// A plan of the suite is wrong: a fault of the suite or of a pass.
    #[error("a plan of the suite is wrong: {0}")]
    Plan(#[from] PlanError),
    /// A weight of the suite is wrong: a fault of the suite.
    #[error("a weight of the suite is wrong: {0}")]
    Weight(#[from] WeightError),
    /// The backend's answer is not what it has to be.
    #[error("{0}")]
    Wrong(String),
}

/// A case that a backend failed.
#[derive(Debug, thiserror::Error)]
#[error("{backend} fails {case}: {error}")]
pub struct Fault {
    /// The backend, in its own words.
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
