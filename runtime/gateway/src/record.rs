//! What is counted of one request, and what lasts as long as its answer.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use tokio::time::Instant;
use trustformers_api::budget::Share;
use trustformers_proto::control::v1::Outcome;

use crate::ab_test::{Observation, ObservedEnd};
use crate::answer_end::{AnswerEnd, EndOutcome, EndUsage};
use crate::attempt::{AnswerShape, Attempt};
use crate::drain::DrainGuard;
use crate::endpoint::InFlight;
use crate::feedback::Feedback;
use crate::metrics::{CodeClass, Protocol, RevisionMetrics};
use crate::outcome;
use crate::pool::StreamPermit;
use crate::routing::Choice;
use crate::session::GrpcSession;
use crate::shadow::Mirrored;

/// What lasts as long as a pod's answer. Dropping it without [`AnswerGuard::ended`] says that the caller
/// left.
#[derive(Debug)]
pub(crate) struct AnswerGuard {
    /// Counted when the answer has ended.
    pub(crate) record: RequestRecord,
    /// The same of its last attempt; none where that was counted before, since the pod declined.
    pub(crate) attempt: Option<Attempt>,
    /// The same request for another revision.
    pub(crate) mirrored: Option<Mirrored>,
    /// The requests of a gRPC `Session`.
    pub(crate) session: Option<GrpcSession>,
    /// The endpoint's count.
    pub(crate) in_flight: InFlight,
    /// The stream's permit on its connection; none on a connection of its own.
    pub(crate) _permit: Option<StreamPermit>,
}

impl AnswerGuard {
    /// The first bytes of the answer's body have arrived.
    pub(crate) fn first_data(&mut self) {
        self.record.first_data = Some(self.record.arrived.elapsed());
        if let Some(attempt) = &self.attempt {
            attempt.first_data();
        }
    }

    /// These bytes of the answer's body have arrived.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        if let Some(session) = &mut self.session {
            session.data(bytes);
        }
        if let Some(mirrored) = &mut self.mirrored {
            mirrored.data(bytes);
        }
    }

    /// The answer has ended.
    pub(crate) fn ended(mut self, end: &AnswerEnd) {
        if let Some(session) = self.session.take()
            && matches!(end.outcome, EndOutcome::Reset | EndOutcome::NoStatus)
        {
            session.reset();
        }
        let outcome = self.record.ended(end);
        // The circuit breaker's word.
        self.in_flight.ended(outcome.is_failure());
        if let Some(attempt) = self.attempt.take() {
            attempt.end(outcome, end.usage);
        }
        if let Some(mirrored) = self.mirrored.take()
            && outcome == Outcome::Ok
        {
            mirrored.ended();
        }
    }
}

/// How one request went. It is counted when it is dropped, which is when the request has ended. A request
/// without an end was cancelled by its caller.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    /// Series of the revision of the last attempt.
    metrics: Arc<RevisionMetrics>,
    protocol: Protocol,
    arrived: Instant,
    request_id: String,
    /// Name of the pod of the last attempt.
    pod: String,
    /// Attempts so far.
    pub(crate) attempts: u32,
    /// From the request to the head of the answer.
    first_byte: Option<Duration>,
    /// From the request to the first bytes of the answer's body.
    first_data: Option<Duration>,
    usage: Option<EndUsage>,
    outcome: Option<Outcome>,
    /// The status of the head; the end may say another thing.
    status: StatusCode,
    feedback: Arc<Feedback>,
    /// Counts the request in the A/B test of its route.
    observation: Option<Observation>,
    /// The variant of the last attempt.
    variant: Option<HeaderValue>,
    is_stream: bool,
    _share: Share,
    _drain: DrainGuard,
}

/// A request that is being handled.
#[derive(Debug)]
pub(crate) struct RequestContext {
    /// The caller's protocol.
    pub(crate) protocol: Protocol,
    /// When the request came.
    pub(crate) arrived: Instant,
    /// Its id in logs.
    pub(crate) request_id: String,
    /// Its share of the requests in flight.
    pub(crate) share: Share,
    /// The drain's count.
    pub(crate) drain: DrainGuard,
    /// Remembers answers, so that their callers can score them.
    pub(crate) feedback: Arc<Feedback>,
}

impl RequestRecord {
    /// A request that goes to a pod of this revision.
    pub(crate) fn new(context: RequestContext, metrics: Arc<RevisionMetrics>) -> Self {
        Self {
            metrics,
            protocol: context.protocol,
            arrived: context.arrived,
            request_id: context.request_id,
            pod: String::new(),
            attempts: 0,
            first_byte: None,
            first_data: None,
            usage: None,
            outcome: None,
            status: StatusCode::OK,
            feedback: context.feedback,
            observation: None,
            variant: None,
            is_stream: false,
            _share: context.share,
            _drain: context.drain,
        }
    }

    /// The series that the request counts in.
    pub(crate) fn metrics(&self) -> &Arc<RevisionMetrics> {
        &self.metrics
    }

    /// The request counts in the A/B test of its route.
    pub(crate) fn observe(&mut self, observation: Option<Observation>) {
        self.observation = observation;
    }

    /// What lets other gateways count a score of the answer.
    pub(crate) fn score_token(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.observation.as_ref()?.token(&self.request_id)?).ok()
    }

    /// The variant whose answer the caller gets.
    pub(crate) fn variant(&self) -> Option<&HeaderValue> {
        self.variant.as_ref()
    }

    /// An attempt begins.
    pub(crate) fn attempt(&mut self, choice: &Choice) {
        self.attempts += 1;
        self.answered_by(choice);
    }

    /// The caller gets the answer of this pod, which counts for its revision.
    pub(crate) fn answered_by(&mut self, choice: &Choice) {
        choice.endpoint.spec.pod_name.clone_into(&mut self.pod);
        self.metrics = Arc::clone(&choice.metrics);
        self.variant.clone_from(&choice.variant);
    }

    /// The head of the answer that the caller gets has arrived.
    pub(crate) fn head(&mut self, status: StatusCode, shape: AnswerShape) {
        self.is_stream = shape == AnswerShape::Stream;
        let first_byte = self.arrived.elapsed();
        self.first_byte = Some(first_byte);
        self.metrics.first_byte(first_byte);
        self.status = status;
    }

    /// The answer has ended. Gives how.
    fn ended(&mut self, end: &AnswerEnd) -> Outcome {
        self.usage = end.usage;
        let outcome = outcome::of_answer(self.status, &end.outcome);
        self.outcome = Some(outcome);
        if end.outcome == EndOutcome::Reset {
            tracing::warn!(pod = self.pod, "a pod broke off in the middle of an answer");
        }
        outcome
    }

    /// The request ends without an answer.
    pub(crate) fn failed(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or(Outcome::Cancelled);
        let took = self.arrived.elapsed();
        if outcome == Outcome::Ok {
            let bucket = self.observation.as_ref().and_then(Observation::scored_bucket);
            self.feedback.remember(&self.request_id, &self.metrics, bucket);
        }
        if let Some(observation) = &self.observation {
            let first_token = self.first_data.filter(|_| self.is_stream);
            let end = ObservedEnd { outcome, took, first_token, usage: self.usage };
            observation.ended(&end, self.variant.as_ref());
        }
        self.metrics.ended(self.protocol, outcome, took);
        tracing::debug!(
            request_id = self.request_id,
            protocol = <&str>::from(self.protocol),
            route = self.metrics.route,
            revision = self.metrics.revision,
            pod = self.pod,
            attempts = self.attempts,
            code = <&str>::from(CodeClass::of(outcome)),
            outcome = outcome.as_str(),
            prompt_tokens = self.usage.map(|usage| usage.prompt_tokens),
            completion_tokens = self.usage.map(|usage| usage.completion_tokens),
            first_data_ms = self.first_data.map(|first_data| first_data.as_secs_f64() * 1e3),
            first_byte_ms = self.first_byte.map(|first_byte| first_byte.as_secs_f64() * 1e3),
            duration_ms = took.as_secs_f64() * 1e3,
            "request"
        );
    }
}
