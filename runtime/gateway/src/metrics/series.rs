//! The series of one revision of one route.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, Opts};
use trustformers_proto::control::v1::{FeedbackSum, Outcome, RevisionCounts};

use super::{CodeClass, Metrics, Protocol, RetryReason, counters};
use crate::answer_end::EndUsage;
use crate::counts::RevisionSums;

/// Labels of the kinds of tokens.
const PROMPT: &str = "prompt";
const COMPLETION: &str = "completion";

/// The series of one revision of one route.
#[derive(Debug)]
pub struct RevisionMetrics {
    /// The route's name.
    pub route: String,
    /// The revision.
    pub revision: String,
    /// The number of the series in this process.
    number: u64,
    requests: [[IntCounter; 5]; 2],
    attempts: [IntCounter; Outcome::ALL.len()],
    retries: [IntCounter; 6],
    in_flight: IntGauge,
    connect_errors: IntCounter,
    duration: Histogram,
    first_byte: Histogram,
    first_token: Histogram,
    prompt_tokens: IntCounter,
    completion_tokens: IntCounter,
    scores: Mutex<Vec<ScoreSeries>>,
    score_families: ScoreFamilies,
    pub(super) sums: RevisionSums,
}

/// The scores in one metric.
#[derive(Debug)]
struct ScoreSeries {
    metric: Arc<str>,
    count: IntCounter,
    sum: Gauge,
}

/// The metrics of scores, which have a series for each name that callers give.
#[derive(Debug, Clone)]
pub(super) struct ScoreFamilies {
    pub(super) count: IntCounterVec,
    pub(super) sum: GaugeVec,
}

impl RevisionMetrics {
    /// The series of a revision, at zero or where they were registered before.
    pub(super) fn new(metrics: &Metrics, number: u64, route: &str, revision: &str) -> Self {
        let of_revision = &[route, revision];
        Self {
            route: route.to_owned(),
            revision: revision.to_owned(),
            number,
            requests: Protocol::ALL.map(|protocol| {
                CodeClass::ALL.map(|code| {
                    metrics.requests.with_label_values(&[route, revision, protocol.into(), code.into()])
                })
            }),
            attempts: Outcome::ALL
                .map(|outcome| metrics.attempts.with_label_values(&[route, revision, outcome.as_str()])),
            retries: RetryReason::ALL
                .map(|reason| metrics.retries.with_label_values(&[route, revision, reason.into()])),
            in_flight: metrics.in_flight.with_label_values(of_revision),
            connect_errors: metrics.connect_errors.with_label_values(of_revision),
            duration: metrics.duration.with_label_values(of_revision),
            first_byte: metrics.first_byte.with_label_values(of_revision),
            first_token: metrics.first_token.with_label_values(of_revision),
            prompt_tokens: metrics.tokens.with_label_values(&[route, revision, PROMPT]),
            completion_tokens: metrics.tokens.with_label_values(&[route, revision, COMPLETION]),
            scores: Mutex::default(),
            score_families: metrics.scores.clone(),
            sums: RevisionSums::default(),
        }
    }

    /// Removes them from the metrics. A series that does not exist is not an error, since the result is the
    /// same.
    pub(super) fn remove_from(&self, metrics: &Metrics) {
        let (route, revision) = (self.route.as_str(), self.revision.as_str());
        let of_revision = &[route, revision];
        for protocol in Protocol::ALL {
            for code in CodeClass::ALL {
                let labels = &[route, revision, protocol.into(), code.into()];
                let _removed = metrics.requests.remove_label_values(labels);
            }
        }
        for reason in RetryReason::ALL {
            let _removed = metrics.retries.remove_label_values(&[route, revision, reason.into()]);
        }
        for outcome in Outcome::ALL {
            let _removed = metrics.attempts.remove_label_values(&[route, revision, outcome.as_str()]);
        }
        for kind in [PROMPT, COMPLETION] {
            let _removed = metrics.tokens.remove_label_values(&[route, revision, kind]);
        }
        for scored in self.scores.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let labels = &[route, revision, &*scored.metric];
            let _removed = metrics.scores.count.remove_label_values(labels);
            let _removed = metrics.scores.sum.remove_label_values(labels);
        }
        let _removed = metrics.in_flight.remove_label_values(of_revision);
        let _removed = metrics.connect_errors.remove_label_values(of_revision);
        let _removed = metrics.duration.remove_label_values(of_revision);
        let _removed = metrics.first_byte.remove_label_values(of_revision);
        let _removed = metrics.first_token.remove_label_values(of_revision);
    }

    /// A request of this revision ended for its caller.
    pub(crate) fn ended(&self, protocol: Protocol, outcome: Outcome, duration: Duration) {
        self.requests[protocol as usize][CodeClass::of(outcome) as usize].inc();
        self.duration.observe(duration.as_secs_f64());
        self.sums.requests.add(outcome);
        self.sums.set_changed();
    }

    /// An attempt on a pod of this revision begins.
    pub(crate) fn attempt_began(&self) {
        self.in_flight.inc();
        self.sums.attempts.fetch_add(1, Ordering::Relaxed);
        self.sums.set_changed();
    }

    /// An attempt has ended.
    pub(crate) fn attempt_ended(&self, outcome: Outcome) {
        self.in_flight.dec();
        if let Some(count) = outcome.index().and_then(|index| self.attempts.get(index)) {
            count.inc();
        }
        self.sums.outcomes.add(outcome);
        self.sums.set_changed();
    }

    /// The first bytes of a stream came this long behind their attempt.
    pub(crate) fn first_token(&self, latency: Duration) {
        self.first_token.observe(latency.as_secs_f64());
        self.sums.first_token.observe(latency);
        self.sums.set_changed();
    }

    /// An answer was complete this long behind its attempt.
    pub(crate) fn answered(&self, latency: Duration) {
        self.sums.answer.observe(latency);
        self.sums.set_changed();
    }

    /// An answer told its tokens.
    pub(crate) fn tokens(&self, usage: EndUsage) {
        let (prompt, completion) = (u64::from(usage.prompt_tokens), u64::from(usage.completion_tokens));
        self.prompt_tokens.inc_by(prompt);
        self.completion_tokens.inc_by(completion);
        self.sums.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
        self.sums.completion_tokens.fetch_add(completion, Ordering::Relaxed);
        self.sums.set_changed();
    }

    /// A caller scored an answer.
    pub(crate) fn scored(&self, metric: &Arc<str>, score: f64) {
        let mut all = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        let index = all.iter().position(|series| series.metric == *metric).unwrap_or_else(|| {
            let labels = &[self.route.as_str(), self.revision.as_str(), &**metric];
            let count = self.score_families.count.with_label_values(labels);
            let sum = self.score_families.sum.with_label_values(labels);
            all.push(ScoreSeries { metric: Arc::clone(metric), count, sum });
            all.len() - 1
        });
        all[index].count.inc();
        all[index].sum.add(score);
        drop(all);
        self.sums.set_changed();
    }

    /// The sums for a report, if anything was added since the last one.
    pub(super) fn take_changed(&self) -> Option<RevisionCounts> {
        let counts = self.sums.take_changed()?;
        let scores = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        let feedback = scores.iter().map(|series| FeedbackSum {
            metric: series.metric.to_string(),
            count: series.count.get(),
            sum: series.sum.get(),
        });
        Some(RevisionCounts {
            route: self.route.clone(),
            revision: self.revision.clone(),
            series: self.number,
            feedback: feedback.collect(),
            ..counts
        })
    }

    /// The head of an answer came this long behind its request.
    pub fn first_byte(&self, duration: Duration) {
        self.first_byte.observe(duration.as_secs_f64());
    }

    /// A request of this revision is sent to another endpoint.
    pub fn retried(&self, reason: RetryReason) {
        self.retries[reason as usize].inc();
    }

    /// An endpoint of this revision could not be connected to.
    pub fn connect_failed(&self) {
        self.connect_errors.inc();
    }
}

impl ScoreFamilies {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let labels = &["route", "revision", "metric"];
        let sum = Opts::new("trustformers_gateway_feedback_score_sum", "Sum of the scores, by metric.");
        let count = "trustformers_gateway_feedback_total";
        Ok(Self {
            count: counters(count, "Scores of answers, by metric.", labels)?,
            sum: GaugeVec::new(sum, labels)?,
        })
    }
}
