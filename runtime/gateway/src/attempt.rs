//! One attempt on a pod. It is counted once, when it is dropped, whatever becomes of its request.
//!
//! An attempt that nobody ended was given up by its caller.

use std::sync::Arc;

use tokio::time::Instant;
use trustformers_proto::control::v1::Outcome;

use crate::answer_end::EndUsage;
use crate::metrics::RevisionMetrics;

/// What the time of an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnswerShape {
    /// One answer: its time is that of the whole.
    Whole,
    /// A stream: its first bytes come with the first token.
    Stream,
    /// A connection for any number of requests: its times are its caller's.
    Session,
}

/// An attempt that has not ended.
#[derive(Debug)]
pub(crate) struct Attempt {
    metrics: Arc<RevisionMetrics>,
    began: Instant,
    shape: AnswerShape,
    outcome: Outcome,
}

impl Attempt {
    /// An attempt on a pod of this revision.
    pub(crate) fn begin(metrics: &Arc<RevisionMetrics>) -> Self {
        metrics.attempt_began();
        Self {
            metrics: Arc::clone(metrics),
            began: Instant::now(),
            shape: AnswerShape::Session,
            outcome: Outcome::Cancelled,
        }
    }

    /// The head of an answer of this shape has come.
    pub(crate) fn head(&mut self, shape: AnswerShape) {
        self.shape = shape;
    }

    /// The first bytes of the answer have come.
    pub(crate) fn first_data(&self) {
        if self.shape == AnswerShape::Stream {
            self.metrics.first_token(self.began.elapsed());
        }
    }

    /// It has ended.
    pub(crate) fn end(mut self, outcome: Outcome, usage: Option<EndUsage>) {
        if let Some(usage) = usage {
            self.metrics.tokens(usage);
        }
        if outcome == Outcome::Ok && self.shape != AnswerShape::Session {
            self.metrics.answered(self.began.elapsed());
        }
        self.outcome = outcome;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.metrics.attempt_ended(self.outcome);
    }
}
