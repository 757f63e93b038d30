//! Sends one request to a pod, and to another one if the first gives no answer.
//!
//! A retry happens only before any byte of an answer has come, so that a caller never sees two beginnings,
//! and only on an endpoint that was not tried yet. Generating text changes nothing in a pod, so a request
//! whose stream was reset can be sent again. One whose connection broke can't: perhaps the request ended the
//! pod, and would end the next one as well. A full queue causes one retry: if two pods are full, the caller
//! gets the 429.
//!
//! Retries wait (`retry`), but not the first one after a pod that was not reached or that is not ready: such
//! a pod did nothing, and the next one has nothing to do with it.
//!
//! Where a route says so, requests that encode are sent to a second endpoint while the first one has not
//! answered (`hedged`).
//!
//! If every attempt fails, the caller gets the failure that says most: a pod's 429 before its 503 before a
//! connection that broke off before one that was not made.

mod hedged;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::Code;
use trustformers_api::answer_end::LOAD_HEADER;
use trustformers_api::error::GRPC_KIND_KEY;
use trustformers_api::surfaces::Kind;
use trustformers_proto::control::v1::Outcome;

use crate::ab_test::VARIANT_HEADER;
use crate::answer_end::{EndOutcome, EndScan};
use crate::attempt::{AnswerShape, Attempt};
use crate::body::{Body, grpc_code};
use crate::call::Call;
use crate::endpoint::{Endpoint, InFlight};
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::headers::strip_one_hop;
use crate::hedge::{HedgeRules, RouteHedges};
use crate::metrics::{Protocol, RetryReason};
use crate::outcome;
use crate::policy::{PREFIX_BYTES, Policy};
use crate::pool::{PodResponse, SendError, StreamPermit};
use crate::record::{AnswerGuard, RequestContext, RequestRecord};
use crate::retry::{self, RetryRules};
use crate::routing::{Choice, Criteria, Routing, SplitKey};
use crate::score_token::TOKEN_HEADER;
use crate::session::GrpcSession;
use crate::shadow::Mirrored;
use crate::wire::Wire;

/// The row of the table of surfaces whose calls have requests of their own.
const SESSION: &str = "grpc_session";

/// The route that a request goes to.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// The table in force.
    pub(crate) routing: &'a Routing,
    /// The route's index in it.
    pub(crate) route: usize,
    /// Decides the request's revision.
    pub(crate) key: SplitKey,
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
    /// The attempt's time passed.
    Timeout(Duration),
    /// The stream ended before an answer; the pod lives.
    Reset(String),
    /// The connection ended before an answer.
    Lost(String),
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
            Self::Timeout(_) => RetryReason::Timeout,
            Self::Reset(_) | Self::Lost(_) | Self::Upload(_) => RetryReason::Reset,
            Self::Declined(declined) => declined.reason,
        }
    }

    /// How much it says to the caller.
    fn rank(&self) -> u8 {
        match self.reason() {
            RetryReason::Connect | RetryReason::Hedge => 0,
            RetryReason::Timeout => 1,
            RetryReason::Reset => 2,
            RetryReason::Unavailable => 3,
            RetryReason::Overloaded => 4,
        }
    }

    /// Whether no other pod may get the request.
    fn is_final(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Upload(_))
    }
}

/// The time by which an answer has to begin.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
    /// Whether it is that of one attempt, after which another may follow.
    of_attempt: bool,
}

/// The attempts of one request.
struct Attempts<'a> {
    gateway: &'a Gateway,
    call: &'a Call,
    route: String,
    key: SplitKey,
    hash: Option<u64>,
    policy: Policy,
    retries_left: u32,
    /// Whether and when the request is sent to a second endpoint; none once it was.
    hedge: Option<HedgeRules>,
    hedges: Arc<RouteHedges>,
    /// The request for another revision that answers it as well.
    mirrored: Option<Mirrored>,
    overloaded_before: bool,
    tried: Vec<Arc<Endpoint>>,
    /// The failure that says most, so far.
    failure: Option<Failure>,
    record: RequestRecord,
    /// The attempt that runs. It is here and not in its future, which the deadline drops.
    current: Option<Attempt>,
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
    let Target { routing, route: index, key } = target;
    let route = routing.route(index);
    let policy = route.policy.clone();
    // A gRPC message has lengths in front, which change with the whole prompt.
    let prefix = (call.protocol == Protocol::Http).then(|| call.body.prefix(PREFIX_BYTES));
    let hash = policy.balance.hash_of(&call.headers, prefix);
    let criteria = Criteria { key: &key, hash, revision: None, tried: &[] };
    let Some(choice) = routing.choose(index, &criteria) else {
        return Err(GatewayError::NoEndpoint { route: route.name.clone() });
    };
    if let Some(rules) = &policy.retry {
        routing.retry_budget(index).request(gateway.now(), rules);
    }
    let deadline = policy.first_byte_timeout;
    let deadline = deadline.map(|limit| Deadline { at: call.ready_at + limit, limit, of_attempt: false });
    let mut record = RequestRecord::new(context, Arc::clone(&choice.metrics));
    // A session has any number of requests, whose callers' times are not known here.
    if call.surface.kind != Kind::Bidirectional {
        record.observe(routing.observe(index, &key));
    }
    let attempts = Attempts {
        gateway,
        call,
        route: route.name.clone(),
        key,
        hash,
        retries_left: policy.retries,
        hedge: policy.hedge.filter(|_| hedged::may_hedge(call)),
        hedges: Arc::clone(routing.hedges(index)),
        mirrored: gateway.shadows.mirror(call, routing, index),
        policy,
        overloaded_before: false,
        tried: Vec::new(),
        failure: None,
        record,
        current: None,
    };
    attempts.run(choice, deadline).await
}

impl Attempts<'_> {
    async fn run(
        mut self,
        mut choice: Choice,
        deadline: Option<Deadline>,
    ) -> Result<Response<Body>, GatewayError> {
        loop {
            let limit = self.attempt_deadline(deadline);
            let failure = match within(limit, self.attempt_hedged(&mut choice)).await {
                Ok(Ok(answer)) => return Ok(self.respond(answer)),
                Ok(Err(Failure::Upload(error))) => {
                    self.record.failed(Outcome::CallerError);
                    return Err(error);
                }
                Ok(Err(failure)) => failure,
                Err(Deadline { limit, of_attempt, .. }) => {
                    if !self.waits_for_caller() {
                        choice.timed_out(limit);
                    }
                    if !of_attempt {
                        return self.timed_out(limit);
                    }
                    self.ended(Outcome::Timeout);
                    Failure::Timeout(limit)
                }
            };
            let (reason, is_final) = (failure.reason(), failure.is_final());
            self.note(failure);
            self.tried.push(Arc::clone(&choice.endpoint));
            let next = if is_final { None } else { self.next_choice(reason, deadline).await };
            match next {
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

    /// The earlier of the request's time and the attempt's. A body that is still arriving has only the
    /// former, since its pod can't answer yet.
    fn attempt_deadline(&self, deadline: Option<Deadline>) -> Option<Deadline> {
        let limit = self.policy.attempt_timeout.filter(|_| self.call.body.is_whole());
        let of_attempt = limit.map(|limit| Deadline { at: Instant::now() + limit, limit, of_attempt: true });
        deadline.into_iter().chain(of_attempt).min_by_key(|deadline| deadline.at)
    }

    /// An attempt on an endpoint begins.
    fn begin(&mut self, choice: &Choice) {
        self.record.attempt(choice);
        self.current = Some(Attempt::begin(&choice.metrics));
    }

    /// The attempt that runs has an answer, or has failed.
    fn conclude(&mut self, tried: TriedEndpoint) -> Result<PodAnswer, Failure> {
        if let Some(outcome) = tried.outcome {
            self.ended(outcome);
        }
        tried.result
    }

    /// Keeps a failure if it says more than those before.
    fn note(&mut self, failure: Failure) {
        if self.failure.as_ref().is_none_or(|best| failure.rank() >= best.rank()) {
            self.failure = Some(failure);
        }
    }

    /// The attempt that runs has ended without an answer to pass on.
    fn ended(&mut self, outcome: Outcome) {
        if let Some(attempt) = self.current.take() {
            attempt.end(outcome, None);
        }
    }

    /// Another endpoint, if a retry is allowed. It comes from the newest table, which may lack the one that
    /// failed.
    async fn next_choice(&mut self, reason: RetryReason, deadline: Option<Deadline>) -> Option<Choice> {
        let repeated =
            reason == RetryReason::Overloaded && std::mem::replace(&mut self.overloaded_before, true);
        if self.retries_left == 0 || repeated || !self.call.body.can_be_sent_again() {
            return None;
        }
        self.retries_left -= 1;
        if let Some(rules) = self.policy.retry {
            self.wait_to_retry(&rules, reason, deadline).await?;
        }
        let routing = self.gateway.routing()?;
        let index = routing.table.find(&self.route).ok()?;
        let criteria = Criteria {
            key: &self.key,
            hash: self.hash,
            revision: Some(&self.record.metrics().revision),
            tried: &self.tried,
        };
        routing.choose(index, &criteria)
    }

    /// Waits in front of a retry. None where there is no other endpoint, no budget or no time for one. The
    /// borrow is mutable because a stored answer of a pod is not `Sync`.
    async fn wait_to_retry(
        &mut self,
        rules: &RetryRules,
        reason: RetryReason,
        deadline: Option<Deadline>,
    ) -> Option<()> {
        {
            let routing = self.gateway.routing()?;
            let index = routing.table.find(&self.route).ok()?;
            if !routing.has_untried(index, &self.tried) {
                return None;
            }
            if !routing.retry_budget(index).try_retry(self.gateway.now(), rules) {
                tracing::debug!(route = self.route, "the route's budget for retries is used up");
                return None;
            }
        }
        let attempts = self.record.attempts;
        if attempts == 1 && matches!(reason, RetryReason::Connect | RetryReason::Unavailable) {
            return Some(());
        }
        let until = Instant::now() + retry::delay(rules, attempts, &mut fastrand::Rng::new());
        if deadline.is_some_and(|deadline| deadline.at <= until) {
            return None;
        }
        sleep_until(until).await;
        Some(())
    }

    fn respond(mut self, answer: PodAnswer) -> Response<Body> {
        let (mut parts, body) = answer.response.into_parts();
        strip_one_hop(&mut parts.headers);
        parts.headers.remove(LOAD_HEADER);
        let shape = shape(self.call, &parts.headers);
        self.record.head(parts.status, shape);
        if let Some(variant) = self.record.variant() {
            parts.headers.insert(VARIANT_HEADER, variant.clone());
        }
        if let Some(token) = self.record.score_token() {
            parts.headers.insert(TOKEN_HEADER, token);
        }
        let scan = EndScan::new(self.call.wire, &parts.headers);
        if let Some(attempt) = &mut self.current {
            attempt.head(shape);
        }
        // The caller's connection decides in which version the answer is sent.
        parts.version = Version::default();
        let is_session = self.call.surface.name == SESSION && self.call.wire == Wire::Grpc;
        let session = is_session.then(|| GrpcSession::new(self.record.metrics()));
        let mut mirrored = self.mirrored.take();
        if let Some(mirrored) = &mut mirrored {
            mirrored.head(&parts.headers, self.record.metrics());
        }
        let guard = AnswerGuard {
            record: self.record,
            mirrored,
            session,
            attempt: self.current,
            in_flight: answer.in_flight,
            _permit: Some(answer.permit),
        };
        Response::from_parts(parts, Body::pod(body, guard, scan))
    }

    /// The deadline passed during an attempt. A pod that declined before said more than the timeout does.
    fn timed_out(mut self, limit: Duration) -> Result<Response<Body>, GatewayError> {
        let is_arriving = self.waits_for_caller();
        let outcome = if is_arriving { Outcome::CallerError } else { Outcome::Timeout };
        self.ended(outcome);
        if matches!(self.failure, Some(Failure::Declined(_))) {
            return self.fail();
        }
        self.record.failed(outcome);
        if is_arriving {
            return Err(GatewayError::BodyTimeout { limit });
        }
        Err(GatewayError::FirstByteTimeout { route: self.route, limit_ms: limit.as_millis() })
    }

    /// Whether the caller is still sending what the pod needs. A stream of messages goes on arriving; its pod
    /// owes the head all the same.
    fn waits_for_caller(&self) -> bool {
        self.call.body.is_arriving() && self.call.surface.kind != Kind::Bidirectional
    }

    /// No attempt is left: the caller gets the failure that says most.
    fn fail(mut self) -> Result<Response<Body>, GatewayError> {
        let attempts = self.record.attempts;
        match self.failure.take() {
            Some(Failure::Declined(declined)) => {
                self.record.answered_by(&declined.choice);
                Ok(self.respond(declined.answer))
            }
            Some(Failure::Timeout(limit)) => {
                self.record.failed(Outcome::Timeout);
                Err(GatewayError::FirstByteTimeout { route: self.route, limit_ms: limit.as_millis() })
            }
            Some(Failure::Reset(cause) | Failure::Lost(cause)) => {
                self.record.failed(Outcome::ResetBefore);
                Err(GatewayError::BadUpstream { route: self.route, attempts, cause })
            }
            Some(Failure::Connect(cause)) => {
                self.record.failed(Outcome::ConnectFailed);
                Err(GatewayError::Unreachable { route: self.route, attempts, cause })
            }
            // Not reached: every attempt that gives no answer stores a failure, and a broken upload ends at
            // once.
            Some(Failure::Upload(_)) | None => {
                self.record.failed(Outcome::Unavailable);
                Err(GatewayError::NoEndpoint { route: self.route })
            }
        }
    }
}

/// What one attempt on one endpoint gave.
struct TriedEndpoint {
    /// How it ended, where it gave no answer to pass on.
    outcome: Option<Outcome>,
    result: Result<PodAnswer, Failure>,
}

impl TriedEndpoint {
    fn failed(outcome: Outcome, failure: Failure) -> Self {
        Self { outcome: Some(outcome), result: Err(failure) }
    }
}

/// Sends a request to one endpoint.
async fn try_endpoint(call: &Call, choice: &Choice) -> TriedEndpoint {
    let endpoint = &choice.endpoint;
    let span = call.trace.call("attempt");
    span.set("trustformers.pod", endpoint.spec.pod_name.clone());
    let mut in_flight = choice.enter();
    let address = match call.protocol {
        Protocol::Http => endpoint.spec.id.http,
        Protocol::Grpc => endpoint.spec.id.grpc,
    };
    let pool = endpoint.pool(call.protocol);
    match pool.send(|| call.outgoing(address, &span, choice)).await {
        Ok(PodResponse { response, permit }) => {
            endpoint.connected();
            endpoint.reported(response.headers());
            let reason =
                declined(call.protocol, &response).or_else(|| lost_revision(choice, response.headers()));
            let outcome = outcome_of_head(call.protocol, &response);
            if outcome.is_failure() {
                in_flight.ended(true);
            } else {
                in_flight.answered(reason.is_none() && response.status().is_success());
            }
            if reason == Some(RetryReason::Unavailable)
                && let Some(pause) = retry_after(response.headers())
            {
                endpoint.declined_for(pause);
            }
            let answer = PodAnswer { response, in_flight, permit };
            match reason {
                Some(reason) => {
                    span.fail(<&str>::from(reason));
                    let choice = choice.clone();
                    let declined = Declined { answer, reason, choice };
                    TriedEndpoint::failed(outcome, Failure::Declined(Box::new(declined)))
                }
                None => TriedEndpoint { outcome: None, result: Ok(answer) },
            }
        }
        Err(SendError::Connect(error)) => {
            endpoint.connect_failed();
            in_flight.ended(true);
            choice.metrics.connect_failed();
            span.fail("connect");
            tracing::warn!(pod = endpoint.spec.pod_name, %error, "a pod could not be connected to");
            TriedEndpoint::failed(Outcome::ConnectFailed, Failure::Connect(error.to_string()))
        }
        Err(error) => {
            span.fail("reset");
            if let Some(broken) = call.body.take_failure() {
                return TriedEndpoint::failed(Outcome::CallerError, Failure::Upload(broken));
            }
            if !matches!(error, SendError::BodyUsed) {
                in_flight.ended(true);
            }
            let cause = error.to_string();
            let lost = matches!(error, SendError::Lost(_));
            let failure = if lost { Failure::Lost(cause) } else { Failure::Reset(cause) };
            TriedEndpoint::failed(Outcome::ResetBefore, failure)
        }
    }
}

/// What the times of an answer with these headers say.
fn shape(call: &Call, headers: &HeaderMap) -> AnswerShape {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    match call.surface.kind {
        Kind::Bidirectional | Kind::Upgrade => AnswerShape::Session,
        Kind::ServerStream => AnswerShape::Stream,
        Kind::Unary | Kind::BodyDecides if kind.starts_with(b"text/event-stream") => AnswerShape::Stream,
        Kind::Unary | Kind::BodyDecides => AnswerShape::Whole,
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

/// Whether the pod does not hold the revision that this gateway chose: it has restarted since the table was
/// made. Another pod may hold it.
fn lost_revision(choice: &Choice, headers: &HeaderMap) -> Option<RetryReason> {
    let kind = headers.get(GRPC_KIND_KEY).map(HeaderValue::as_bytes);
    (choice.revision().is_some() && kind == Some(&b"unknown_revision"[..]))
        .then_some(RetryReason::Unavailable)
}

/// The outcome of an answer, as far as its head tells it.
fn outcome_of_head(protocol: Protocol, response: &Response<Incoming>) -> Outcome {
    let code = grpc_code(response.headers()).filter(|_| protocol == Protocol::Grpc);
    outcome::of_answer(response.status(), &code.map_or(EndOutcome::Complete, EndOutcome::Grpc))
}

/// How long the pod wants to be left alone. A date is not looked at: our pods write seconds.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// Runs a future up to a deadline, which is the error when it has passed.
async fn within<T>(deadline: Option<Deadline>, future: impl Future<Output = T>) -> Result<T, Deadline> {
    match deadline {
        Some(deadline) => timeout_at(deadline.at, future).await.map_err(|_elapsed| deadline),
        None => Ok(future.await),
    }
}
