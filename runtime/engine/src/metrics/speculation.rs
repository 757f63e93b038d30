//! Series about speculation: the draft tokens that were proposed, and those that were accepted.

use super::FamilyRegistrar;
use prometheus::{IntCounter, IntCounterVec};

/// The families, by the label `model`.
#[derive(Clone)]
pub(super) struct SpeculationFamilies {
    proposed: IntCounterVec,
    accepted: IntCounterVec,
}

/// One label's series.
#[derive(Debug, Clone)]
pub(crate) struct SpeculationMetrics {
    pub(crate) proposed: IntCounter,
    pub(crate) accepted: IntCounter,
}

impl SpeculationFamilies {
    pub(super) fn register(registrar: &FamilyRegistrar<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            proposed: registrar.counter(
                "trustformers_draft_tokens_total",
                "Draft tokens that were proposed and verified by the model.",
                &["model"],
            )?,
            accepted: registrar.counter(
                "trustformers_draft_tokens_accepted_total",
                "Draft tokens that were the model's own choice.",
                &["model"],
            )?,
        })
    }

    pub(super) fn for_model(&self, label: &str) -> SpeculationMetrics {
        SpeculationMetrics {
            proposed: self.proposed.with_label_values(&[label]),
            accepted: self.accepted.with_label_values(&[label]),
        }
    }
}
