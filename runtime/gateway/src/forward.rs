//! Sends one request to a pod, and to another one if the first gives no answer.
//!
//! Another attempt is made only while nothing of an answer has come, so a caller never sees two beginnings; and
//! only on an endpoint that was not asked yet. Generating text changes nothing in a pod, so a request that was lost
//! on the way may be sent again. A full queue is tried elsewhere once: if two pods are full, the caller is told.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use crate::body::{Begun, Body, Held, Record, grpc_code};
use crate::endpoint::{Endpoint, InFlight};
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::headers::strip_one_hop;
use crate::metrics::{Protocol, RetryReason};
use crate::pool::{Outgoing, SendError, StreamSlot};
use crate::routing::{Ask, Choice, Routing};

/// A request, ready to be sent as often as needed.
#[derive(Debug)]
pub(crate) struct Call {
    /// How the caller speaks.
    pub(crate) protocol: Protocol,
    /// The caller's method.
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: PathAndQuery,
    /// The host that the caller addressed, where it said.
    pub(crate) authority: Option<Authority>,
    /// Headers for the pod.
    pub(crate) headers: HeaderMap,
    /// The body.
    pub(crate) body: Bytes,
    /// When the request came.
    pub(crate) arrived: Instant,
}

impl Call {
    fn outgoing(&self, endpoint: &Endpoint) -> Outgoing {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = self.headers.clone();
        let authority = self.authority.clone().or_else(|| {
            let address = match self.protocol {
                Protocol::Http => endpoint.spec.id.http,
                Protocol::Grpc => endpoint.spec.id.grpc,
            };
            address.to_string().parse().ok()
        });
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = Some(self.path.clone());
        if let Some(authority) = authority {
            parts.scheme = Some(Scheme::HTTP);
            parts.authority = Some(authority);
        }
        // Scheme, authority and path together always make a URI; a path alone does as well.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request
    }
}

/// An answer that has begun, and what lasts as long as it.
#[derive(Debug)]
struct Answer {
    response: Response<Incoming>,
    in_flight: InFlight,
    slot: StreamSlot,
}

/// Why the last attempt gave nothing to pass on.
#[derive(Debug)]
enum Failure {
    /// The pod said no in a way that another may not; the caller gets this if no other does better.
    Declined(Box<Answer>),
    /// Nobody was reached.
    Connect(String),
    /// The answer never began.
    Reset(String),
}

/// One request's way from endpoint to endpoint.
struct Attempts<'a> {
    gateway: &'a Gateway,
    call: &'a Call,
    route: String,
    ticket: u64,
    left: u32,
    overloaded_before: bool,
    tried: Vec<Arc<Endpoint>>,
    record: Record,
}

/// Forwards a request of the route at `index` of `routing`.
///
/// # Errors
/// When no pod gave an answer, or none began in time.
pub(crate) async fn forward(
    gateway: &Gateway,
    routing: &Routing,
    index: usize,
    (call, begun): (&Call, Begun),
) -> Result<Response<Body>, GatewayError> {
    let route = routing.route(index);
    let ticket = routing.draw(index);
    let ask = Ask { ticket, revision: None, tried: &[], now: gateway.now() };
    let Some(choice) = routing.choose(index, &ask, &gateway.dice) else {
        return Err(GatewayError::NoEndpoint { route: route.name.clone() });
    };
    let limit = route.policy.first_byte_timeout;
    let attempts = Attempts {
        gateway,
        call,
        route: route.name.clone(),
        ticket,
        left: route.policy.retries,
        overloaded_before: false,
        tried: Vec::new(),
        record: Record::new(begun, Arc::clone(&choice.metrics)),
    };
    attempts.run(choice, limit.map(|limit| (call.arrived + limit, limit.as_millis()))).await
}

impl Attempts<'_> {
    async fn run(
        mut self,
        mut choice: Choice,
        deadline: Option<(Instant, u128)>,
    ) -> Result<Response<Body>, GatewayError> {
        loop {
            let Some(outcome) = within(deadline.map(|(at, _)| at), self.once(&choice)).await else {
                self.record.failed();
                let limit_ms = deadline.map_or(0, |(_, limit_ms)| limit_ms);
                return Err(GatewayError::FirstByteTimeout { route: self.route, limit_ms });
            };
            let (failure, reason) = match outcome {
                Ok(answer) => return Ok(self.deliver(answer)),
                Err(failed) => failed,
            };
            self.tried.push(Arc::clone(&choice.endpoint));
            match self.next(reason) {
                Some(next) => {
                    self.record.metrics().retried(reason);
                    tracing::debug!(
                        pod = choice.endpoint.spec.pod_name,
                        reason = reason.as_str(),
                        "trying another endpoint"
                    );
                    choice = next;
                }
                None => return self.give_up(failure),
            }
        }
    }

    /// One attempt on one endpoint.
    async fn once(&mut self, choice: &Choice) -> Result<Answer, (Failure, RetryReason)> {
        let endpoint = &choice.endpoint;
        self.record.attempt(&choice.metrics, &endpoint.spec.pod_name);
        let in_flight = endpoint.enter();
        let pool = endpoint.pool(self.call.protocol);
        match pool.send(|| self.call.outgoing(endpoint)).await {
            Ok((response, slot)) => {
                endpoint.connected();
                let declined = declined(self.call.protocol, &response);
                let answer = Answer { response, in_flight, slot };
                match declined {
                    Some(reason) => Err((Failure::Declined(Box::new(answer)), reason)),
                    None => Ok(answer),
                }
            }
            Err(SendError::Connect(error)) => {
                endpoint.connect_failed(self.gateway.now());
                choice.metrics.connect_failed();
                tracing::warn!(pod = endpoint.spec.pod_name, %error, "a pod could not be connected to");
                Err((Failure::Connect(error.to_string()), RetryReason::Connect))
            }
            Err(error @ SendError::Reset(_)) => Err((Failure::Reset(error.to_string()), RetryReason::Reset)),
        }
    }

    /// Another endpoint, if another attempt is allowed. The newest table is asked: what failed may be gone from it.
    fn next(&mut self, reason: RetryReason) -> Option<Choice> {
        let repeated =
            reason == RetryReason::Overloaded && std::mem::replace(&mut self.overloaded_before, true);
        if self.left == 0 || repeated {
            return None;
        }
        self.left -= 1;
        let routing = self.gateway.routing()?;
        let index = routing.table.find(&self.route).ok()?;
        let ask = Ask {
            ticket: self.ticket,
            revision: Some(&self.record.metrics().revision),
            tried: &self.tried,
            now: self.gateway.now(),
        };
        routing.choose(index, &ask, &self.gateway.dice)
    }

    fn deliver(mut self, answer: Answer) -> Response<Body> {
        let (mut parts, body) = answer.response.into_parts();
        strip_one_hop(&mut parts.headers);
        self.record.head(parts.status, &parts.headers);
        // The caller's connection decides in which version the answer goes out.
        parts.version = Version::default();
        let held = Held { record: self.record, _in_flight: answer.in_flight, _slot: answer.slot };
        Response::from_parts(parts, Body::pod(body, held))
    }

    fn give_up(mut self, failure: Failure) -> Result<Response<Body>, GatewayError> {
        let attempts = self.record.attempts;
        match failure {
            Failure::Declined(answer) => Ok(self.deliver(*answer)),
            Failure::Connect(cause) => {
                self.record.failed();
                Err(GatewayError::Unreachable { route: self.route, attempts, cause })
            }
            Failure::Reset(cause) => {
                self.record.failed();
                Err(GatewayError::BadUpstream { route: self.route, attempts, cause })
            }
        }
    }
}

/// Whether the pod declined in a way that another pod may not: it is leaving or not ready, or its queue is full.
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

/// `None` at the deadline.
async fn within<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => timeout_at(deadline, future).await.ok(),
        None => Some(future.await),
    }
}
