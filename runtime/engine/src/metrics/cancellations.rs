//! Series about requests whose callers left: how far they had come.

use super::FamilyRegistrar;
use prometheus::{IntCounter, IntCounterVec};

/// The family, by the labels `model` and `stage`.
#[derive(Clone)]
pub(super) struct CancellationFamilies(IntCounterVec);

/// One label's series.
#[derive(Debug, Clone)]
pub(crate) struct CancellationMetrics {
    /// Before the first step.
    pub(crate) queued: IntCounter,
    /// Before the first token.
    pub(crate) prefill: IntCounter,
    /// After it.
    pub(crate) decode: IntCounter,
}

impl CancellationFamilies {
    pub(super) fn register(registrar: &FamilyRegistrar<'_>) -> Result<Self, prometheus::Error> {
        registrar
            .counter(
                "trustformers_requests_cancelled_total",
                "Requests whose callers left, by the stage in which they did: queued, prefill or decode.",
                &["model", "stage"],
            )
            .map(Self)
    }

    pub(super) fn for_model(&self, label: &str) -> CancellationMetrics {
        let stage = |name| self.0.with_label_values(&[label, name]);
        CancellationMetrics { queued: stage("queued"), prefill: stage("prefill"), decode: stage("decode") }
    }
}
