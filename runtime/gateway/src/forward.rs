//! Sends one request to a pod, and to another one if the first gives no answer.
//!
//! A retry happens only before any byte of an answer has come, so that a caller never sees two beginnings,
//! and only on an endpoint that was not tried yet. Generating text changes nothing in a pod, so a request
//! that was lost on the way can be sent again. A full queue causes one retry: if two pods are full, the
//! caller gets the 429.
//!
//! If every attempt fails, the caller gets the failure that says most: a pod's 429 before its 503 before a
//! connection that broke off before one that was not made.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};
use tonic::Code;
use trustformers_api::surfaces::Kind;

use crate::answer_end::EndScan;
use crate::body::{Body, grpc_code};
use crate::call::Call;
use crate::endpoint::{Endpoint, InFlight};
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::headers::strip_one_hop;
use crate::metrics::{Protocol, RetryReason};
use crate::pool::{PodResponse, SendError, StreamPermit};
use crate::record::{AnswerGuard, RequestContext, RequestRecord};
use crate::routing::{Choice, Criteria, Routing};

/// The route that a request goes to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The table in force.
    pub(crate) routing: &'a Routing,
    /// The route's index in it.
    pub(crate) route: usize,
}

/// An answer that has begun, and what lasts as long as it does.
#[derive(Debug)]
struct PodAnswer {
    response: Response<Incoming>,
    in_flight: InFlight,
    permit: StreamPermit,
}

/// Why an attempt gave nothing to pass on. Later variants say more to the caller.
#[derive(Debug)]
enum Failure {
    /// No pod was reached.
    Connect(String),
    /// The answer never began.
    Reset(String),
    /// The caller's upload broke off, which ended the attempt.
    Upload(GatewayError),
    /// The pod declined for a reason that another pod may not have.
    Declined(Box<Declined>),
}

/// A pod's refusal, and the pod.
#[derive(Debug)]
struct Declined {
    answer: PodAnswer,
    reason: RetryReason,
    choice: Choice,
}

impl Failure {
    /// Why the request may be retried.
    fn reason(&self) -> RetryReason {
        match self {
            Self::Connect(_) => RetryReason::Connect,
            Self::Reset(_) | Self::Upload(_) => RetryReason::Reset,
            Self::Declined(declined) => declined.reason,
        }
    }

    /// How much it says to the caller.
    fn rank(&self) -> u8 {
        match self.reason() {
            RetryReason::Connect => 0,
            RetryReason::Reset => 1,
            RetryReason::Unavailable => 2,
            RetryReason::Overloaded => 3,
        }
    }
}

/// The time by which an answer has to begin.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
}

/// The attempts of one request.
struct Attempts<'a> {
    gateway: &'a Gateway,
    call: &'a Call,
    route: String,
    sequence: u64,
    retries_left: u32,
    overloaded_before: bool,
    tried: Vec<Arc<Endpoint>>,
    /// The failure that says most, so far.
    failure: Option<Failure>,
    record: RequestRecord,
}

/// Forwards a request to a pod of the target.
///
/// # Errors
/// When no pod gave an answer, or none began in time.
pub(crate) async fn forward(
    gateway: &Gateway,
    target: Target<'_>,
    call: &Call,
    context: RequestContext,
) -> Result<Response<Body>, GatewayError> {
    let Target { routing, route: index } = target;
    let route = routing.route(index);
    let sequence = routing.next_sequence(index);
    let criteria = Criteria { sequence, revision: None, tried: &[], now: gateway.now() };
    let Some(choice) = routing.choose(index, &criteria) else {
        return Err(GatewayError::NoEndpoint { route: route.name.clone() });
    };
    let limit = route.policy.first_byte_timeout;
    let attempts = Attempts {
        gateway,
        call,
        route: route.name.clone(),
        sequence,
        retries_left: route.policy.retries,
        overloaded_before: false,
        tried: Vec::new(),
        failure: None,
        record: RequestRecord::new(context, Arc::clone(&choice.metrics)),
    };
    attempts.run(choice, limit.map(|limit| Deadline { at: call.ready_at + limit, limit })).await
}

impl Attempts<'_> {
    async fn run(
        mut self,
        mut choice: Choice,
        deadline: Option<Deadline>,
    ) -> Result<Response<Body>, GatewayError> {
        loop {
            let failure = match within(deadline, self.attempt(&choice)).await {
                Ok(Ok(answer)) => return Ok(self.respond(answer)),
                Ok(Err(Failure::Upload(error))) => {
                    self.record.caller_failed();
                    return Err(error);
                }
                Ok(Err(failure)) => failure,
                Err(Deadline { limit, .. }) => return self.timed_out(limit),
            };
            let reason = failure.reason();
            if self.failure.as_ref().is_none_or(|best| failure.rank() >= best.rank()) {
                self.failure = Some(failure);
            }
            self.tried.push(Arc::clone(&choice.endpoint));
            match self.next_choice(reason) {
                Some(next) => {
                    self.record.metrics().retried(reason);
                    tracing::debug!(
                        pod = choice.endpoint.spec.pod_name,
                        reason = <&str>::from(reason),
                        "retrying on another endpoint"
                    );
                    choice = next;
                }
                None => return self.fail(),
            }
        }
    }

    /// One attempt on one endpoint.
    async fn attempt(&mut self, choice: &Choice) -> Result<PodAnswer, Failure> {
        let endpoint = &choice.endpoint;
        self.record.attempt(choice);
        let in_flight = endpoint.enter();
        let pool = endpoint.pool(self.call.protocol);
        let address = match self.call.protocol {
            Protocol::Http => endpoint.spec.id.http,
            Protocol::Grpc => endpoint.spec.id.grpc,
        };
        match pool.send(|| self.call.outgoing(address)).await {
            Ok(PodResponse { response, permit }) => {
                endpoint.connected();
                let reason = declined(self.call.protocol, &response);
                let answer = PodAnswer { response, in_flight, permit };
                match reason {
                    Some(reason) => {
                        let choice = choice.clone();
                        Err(Failure::Declined(Box::new(Declined { answer, reason, choice })))
                    }
                    None => Ok(answer),
                }
            }
            Err(SendError::Connect(error)) => {
                endpoint.connect_failed(self.gateway.now());
                choice.metrics.connect_failed();
                tracing::warn!(pod = endpoint.spec.pod_name, %error, "a pod could not be connected to");
                Err(Failure::Connect(error.to_string()))
            }
            Err(error @ (SendError::Reset(_) | SendError::BodyUsed)) => match self.call.body.take_failure() {
                Some(broken) => Err(Failure::Upload(broken)),
                None => Err(Failure::Reset(error.to_string())),
            },
        }
    }

    /// Another endpoint, if a retry is allowed. It comes from the newest table, which may lack the one that
    /// failed.
    fn next_choice(&mut self, reason: RetryReason) -> Option<Choice> {
        let repeated =
            reason == RetryReason::Overloaded && std::mem::replace(&mut self.overloaded_before, true);
        if self.retries_left == 0 || repeated || !self.call.body.can_be_sent_again() {
            return None;
        }
        self.retries_left -= 1;
        let routing = self.gateway.routing()?;
        let index = routing.table.find(&self.route).ok()?;
        let criteria = Criteria {
            sequence: self.sequence,
            revision: Some(&self.record.metrics().revision),
            tried: &self.tried,
            now: self.gateway.now(),
        };
        routing.choose(index, &criteria)
    }

    fn respond(mut self, answer: PodAnswer) -> Response<Body> {
        let (mut parts, body) = answer.response.into_parts();
        strip_one_hop(&mut parts.headers);
        self.record.head(parts.status);
        let scan = EndScan::new(self.call.wire, &parts.headers);
        // The caller's connection decides in which version the answer is sent.
        parts.version = Version::default();
        let guard =
            AnswerGuard { record: self.record, _in_flight: answer.in_flight, _permit: Some(answer.permit) };
        Response::from_parts(parts, Body::pod(body, guard, scan))
    }

    /// The deadline passed during an attempt. A pod that declined before said more than the timeout does.
    fn timed_out(mut self, limit: Duration) -> Result<Response<Body>, GatewayError> {
        if matches!(self.failure, Some(Failure::Declined(_))) {
            return self.fail();
        }
        // A stream of messages goes on arriving; its pod owes the head all the same.
        if self.call.body.is_arriving() && self.call.surface.kind != Kind::Bidirectional {
            self.record.caller_failed();
            return Err(GatewayError::BodyTimeout { limit });
        }
        self.record.failed();
        Err(GatewayError::FirstByteTimeout { route: self.route, limit_ms: limit.as_millis() })
    }

    /// No attempt is left: the caller gets the failure that says most.
    fn fail(mut self) -> Result<Response<Body>, GatewayError> {
        let attempts = self.record.attempts;
        match self.failure.take() {
            Some(Failure::Declined(declined)) => {
                self.record.answered_by(&declined.choice);
                Ok(self.respond(declined.answer))
            }
            Some(Failure::Reset(cause)) => {
                self.record.failed();
                Err(GatewayError::BadUpstream { route: self.route, attempts, cause })
            }
            Some(Failure::Connect(cause)) => {
                self.record.failed();
                Err(GatewayError::Unreachable { route: self.route, attempts, cause })
            }
            // Not reached: every attempt that gives no answer stores a failure, and a broken upload ends at
            // once.
            Some(Failure::Upload(_)) | None => {
                self.record.failed();
                Err(GatewayError::NoEndpoint { route: self.route })
            }
        }
    }
}

/// Whether the pod declined for a reason that another pod may not have: it is ending or not ready, or its
/// queue is full.
fn declined(protocol: Protocol, response: &Response<Incoming>) -> Option<RetryReason> {
    match response.status() {
        StatusCode::SERVICE_UNAVAILABLE => return Some(RetryReason::Unavailable),
        StatusCode::TOO_MANY_REQUESTS => return Some(RetryReason::Overloaded),
        _ => {}
    }
    match grpc_code(response.headers()).filter(|_| protocol == Protocol::Grpc) {
        Some(Code::Unavailable) => Some(RetryReason::Unavailable),
        Some(Code::ResourceExhausted) => Some(RetryReason::Overloaded),
        _ => None,
    }
}

/// Runs a future up to a deadline, which is the error when it has passed.
async fn within<T>(deadline: Option<Deadline>, future: impl Future<Output = T>) -> Result<T, Deadline> {
    match deadline {
        Some(deadline) => timeout_at(deadline.at, future).await.map_err(|_elapsed| deadline),
        None => Ok(future.await),
    }
}
