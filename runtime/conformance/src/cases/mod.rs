//! The cases of the suite. Each opens backends, runs models and compares their answers.

mod adapters;
mod batch_invariance;
mod cache;
mod fused;
mod numerics;
mod order;
mod pruned;
mod sample;
mod views;
mod windowed;

use crate::{CaseError, Open};

/// One case of the suite.
#[derive(Clone, Copy)]
pub struct Case {
    /// The claim that it checks.
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
    Case { name: "fused/norms", run: fused::norms },
    Case { name: "decoder/mixed_types", run: numerics::decoder_mixed_types },
    Case { name: "decoder/batch_invariance", run: batch_invariance::decoder },
    Case { name: "decoder/draft_tokens", run: batch_invariance::draft_tokens },
    Case { name: "decoder/prefix", run: batch_invariance::prefix },
    Case { name: "encoder/batch_invariance", run: batch_invariance::encoder },
    Case { name: "decoder/pruned", run: pruned::decoder },
    Case { name: "encoder/pruned", run: pruned::encoder },
    Case { name: "weights/views", run: views::decoder },
    Case { name: "windowed/numerics", run: windowed::numerics },
    Case { name: "windowed/chunks", run: windowed::chunks },
    Case { name: "windowed/classes", run: windowed::classes },
    Case { name: "adapters/mixed", run: adapters::mixed },
    Case { name: "adapters/fast", run: adapters::fast },
    Case { name: "adapters/slots", run: adapters::slots },
    Case { name: "cache/types", run: cache::types },
    Case { name: "cache/poison", run: cache::poison },
    Case { name: "cache/resize", run: cache::resize },
    Case { name: "sample/choices", run: sample::choices },
    Case { name: "sample/slots", run: sample::slots },
    Case { name: "sample/flight", run: sample::flight },
    Case { name: "sample/order", run: sample::order },
    Case { name: "order/steps", run: order::steps },
    Case { name: "order/plans", run: order::plans },
    Case { name: "order/groups", run: order::groups },
    Case { name: "order/memory", run: order::memory },
];
