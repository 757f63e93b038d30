//! Series about the time that a finished generation took: as a whole, and by phase.

use super::FamilyRegistrar;
use crate::request::Timings;
use prometheus::{Histogram, HistogramVec};
use std::time::Duration;

/// The families, by the label `model`.
#[derive(Clone)]
pub(super) struct LatencyFamilies {
    whole: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
}

/// One label's series.
#[derive(Debug, Clone)]
pub(crate) struct LatencyMetrics {
    whole: Histogram,
    prefill: Histogram,
    decode: Histogram,
}

impl LatencyFamilies {
    pub(super) fn register(registrar: &FamilyRegistrar<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            whole: registrar.histogram(
                "trustformers_request_seconds",
                "Time from submission to the end of requests that were answered to their end.",
            )?,
            prefill: registrar.histogram(
                "trustformers_prefill_seconds",
                "Time from a sequence's first step to its first token.",
            )?,
            decode: registrar.histogram(
                "trustformers_decode_seconds",
                "Time from a sequence's first token to its last.",
            )?,
        })
    }

    /// The series of whole requests alone, for engines without phases.
    pub(super) fn whole(&self, label: &str) -> Histogram {
        self.whole.with_label_values(&[label])
    }

    pub(super) fn for_model(&self, label: &str) -> LatencyMetrics {
        LatencyMetrics {
            whole: self.whole(label),
            prefill: self.prefill.with_label_values(&[label]),
            decode: self.decode.with_label_values(&[label]),
        }
    }
}

impl LatencyMetrics {
    /// A generation has ended that was submitted `whole` ago.
    pub(crate) fn finished(&self, whole: Duration, phases: Timings) {
        self.whole.observe(whole.as_secs_f64());
        self.prefill.observe(phases.prefill.as_secs_f64());
        self.decode.observe(phases.decode.as_secs_f64());
    }
}
