//! Series about guessed tokens: how many were made, and how many were the model's own choice.

use super::New;
use prometheus::{IntCounter, IntCounterVec};

/// The families, by the label `model`.
#[derive(Clone)]
pub(super) struct GuessFamilies {
    made: IntCounterVec,
    right: IntCounterVec,
}

/// One label's series.
#[derive(Debug, Clone)]
pub(crate) struct GuessMetrics {
    pub(crate) made: IntCounter,
    pub(crate) right: IntCounter,
}

impl GuessFamilies {
    pub(super) fn register(new: &New<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            made: new.counter(
                "trustformers_draft_tokens_total",
                "Tokens that were guessed and checked by the model.",
                &["model"],
            )?,
            right: new.counter(
                "trustformers_draft_tokens_accepted_total",
                "Guessed tokens that were the model's own choice.",
                &["model"],
            )?,
        })
    }

    pub(super) fn for_model(&self, label: &str) -> GuessMetrics {
        GuessMetrics {
            made: self.made.with_label_values(&[label]),
            right: self.right.with_label_values(&[label]),
        }
    }
}
