//! The cases, each with what it opens, runs and compares.

mod cache;
mod company;
mod fused;
mod numerics;
mod order;

use crate::{CaseError, Open};

/// One case of the suite.
#[derive(Clone, Copy)]
pub struct Case {
    /// What is checked.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(Open<'_>) -> Result<(), CaseError>,
}

/// Every case.
pub const ALL: &[Case] = &[
    Case { name: "types", run: numerics::types },
    Case { name: "decoder/exact", run: numerics::decoder_exact },
    Case { name: "decoder/fast", run: numerics::decoder_fast },
    Case { name: "encoder/exact", run: numerics::encoder_exact },
    Case { name: "encoder/fast", run: numerics::encoder_fast },
    Case { name: "fused/decoder", run: fused::decoder },
    Case { name: "fused/encoder", run: fused::encoder },
    Case { name: "decoder/company", run: company::decoder },
    Case { name: "decoder/guesses", run: company::guesses },
    Case { name: "decoder/prefix", run: company::prefix },
    Case { name: "encoder/company", run: company::encoder },
    Case { name: "cache/poison", run: cache::poison },
    Case { name: "order/steps", run: order::steps },
    Case { name: "order/plans", run: order::plans },
    Case { name: "order/memory", run: order::memory },
];
