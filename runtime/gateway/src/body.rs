//! The body of an answer, as it goes to the caller.
//!
//! The frames of a pod pass one by one and unchanged. The body owns everything that has to last as long as
//! the answer: the endpoint's count, the stream's permit, the drain's count, the caller's shares, and the
//! record of how the request ended. When the caller disconnects, the server drops the body, which resets the
//! pod's stream.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::Instant;
use tonic::Code;
use trustformers_api::budget::Share;

use crate::connection::ActiveRequest;
use crate::drain::DrainGuard;
use crate::endpoint::InFlight;
use crate::metrics::{CodeClass, Protocol, RevisionMetrics};
use crate::pool::StreamPermit;
use crate::routing::Choice;

/// Why a body broke off.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An answer's body.
#[derive(Debug)]
pub(crate) struct Body {
    kind: Kind,
    /// Released when the answer has ended.
    _share: Option<Share>,
    /// The connection is not idle before the answer has ended.
    _active: Option<ActiveRequest>,
}

#[derive(Debug)]
enum Kind {
    /// Made by the gateway.
    Local(Full<Bytes>),
    /// Made by one of the gateway's own gRPC services.
    Service(tonic::body::Body),
    /// Comes from a pod.
    Pod(Box<PodBody>),
}

impl Default for Body {
    fn default() -> Self {
        Self::local(Bytes::new())
    }
}

impl Body {
    /// A body in memory.
    pub(crate) fn local(bytes: Bytes) -> Self {
        Self::of(Kind::Local(Full::new(bytes)))
    }

    /// The body of an answer of the gateway's own gRPC services.
    pub(crate) fn service(body: tonic::body::Body) -> Self {
        Self::of(Kind::Service(body))
    }

    /// A pod's body.
    pub(crate) fn pod(body: Incoming, guard: AnswerGuard) -> Self {
        Self::of(Kind::Pod(Box::new(PodBody { body, guard: Some(guard) })))
    }

    fn of(kind: Kind) -> Self {
        Self { kind, _share: None, _active: None }
    }

    /// Releases the share when the answer has ended.
    pub(crate) fn with_share(self, share: Share) -> Self {
        Self { _share: Some(share), ..self }
    }

    /// Keeps the request active until the answer has ended.
    pub(crate) fn with_active(self, active: ActiveRequest) -> Self {
        Self { _active: Some(active), ..self }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.kind {
            Kind::Local(body) => {
                Pin::new(body).poll_frame(context).map_err(|never: Infallible| match never {})
            }
            Kind::Service(body) => Pin::new(body).poll_frame(context).map_err(BoxError::from),
            Kind::Pod(body) => body.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Local(body) => body.is_end_stream(),
            Kind::Service(body) => body.is_end_stream(),
            Kind::Pod(pod) => pod.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Local(body) => body.size_hint(),
            Kind::Service(body) => body.size_hint(),
            Kind::Pod(pod) => pod.body.size_hint(),
        }
    }
}

/// What lasts as long as a pod's answer.
#[derive(Debug)]
pub(crate) struct AnswerGuard {
    /// Counted when the answer has ended.
    pub(crate) record: RequestRecord,
    /// The endpoint's count.
    pub(crate) _in_flight: InFlight,
    /// The stream's permit on its connection.
    pub(crate) _permit: StreamPermit,
}

#[derive(Debug)]
struct PodBody {
    body: Incoming,
    /// `None` once the answer has ended.
    guard: Option<AnswerGuard>,
}

impl PodBody {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let Some(guard) = &mut self.guard else {
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        };
        let ended = match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    guard.record.trailers(trailers);
                }
                // The server may not poll again once it knows that nothing follows.
                self.body.is_end_stream() || self.body.size_hint().exact() == Some(0)
            }
            Some(Err(error)) => {
                tracing::warn!(pod = guard.record.pod, %error, "a pod broke off in the middle of an answer");
                guard.record.class = Some(CodeClass::Broken);
                self.guard = None;
                false
            }
            None => true,
        };
        if ended && let Some(mut guard) = self.guard.take() {
            guard.record.complete();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)))
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
    class: Option<CodeClass>,
    /// The class of the head; trailers may change it.
    head: CodeClass,
    /// A gRPC answer has its status in trailers, unless the head has it.
    needs_trailers: bool,
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
}

impl RequestRecord {
    /// A request that goes to a pod of this revision.
    pub(crate) fn new(context: RequestContext, metrics: Arc<RevisionMetrics>) -> Self {
        metrics.in_flight().inc();
        Self {
            metrics,
            protocol: context.protocol,
            arrived: context.arrived,
            request_id: context.request_id,
            pod: String::new(),
            attempts: 0,
            first_byte: None,
            class: None,
            head: CodeClass::Server,
            needs_trailers: false,
            _share: context.share,
            _drain: context.drain,
        }
    }

    /// The series that the request counts in.
    pub(crate) fn metrics(&self) -> &Arc<RevisionMetrics> {
        &self.metrics
    }

    /// An attempt begins.
    pub(crate) fn attempt(&mut self, choice: &Choice) {
        self.attempts += 1;
        self.answered_by(choice);
    }

    /// The caller gets the answer of this pod, which counts for its revision.
    pub(crate) fn answered_by(&mut self, choice: &Choice) {
        choice.endpoint.spec.pod_name.clone_into(&mut self.pod);
        if !Arc::ptr_eq(&self.metrics, &choice.metrics) {
            self.metrics.in_flight().dec();
            choice.metrics.in_flight().inc();
            self.metrics = Arc::clone(&choice.metrics);
        }
    }

    /// The head of the answer that the caller gets has arrived.
    pub(crate) fn head(&mut self, status: http::StatusCode, headers: &HeaderMap) {
        let first_byte = self.arrived.elapsed();
        self.first_byte = Some(first_byte);
        self.metrics.first_byte(first_byte);
        self.head = CodeClass::of_http(status);
        if self.protocol == Protocol::Grpc && self.head == CodeClass::Success {
            match grpc_code(headers) {
                Some(code) => self.head = CodeClass::of_grpc(code),
                None => self.needs_trailers = true,
            }
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if self.needs_trailers
            && let Some(code) = grpc_code(trailers)
        {
            self.head = CodeClass::of_grpc(code);
            self.needs_trailers = false;
        }
    }

    /// The answer has ended.
    fn complete(&mut self) {
        // A gRPC answer without a status was cut between the pod and this gateway.
        self.class = Some(if self.needs_trailers { CodeClass::Broken } else { self.head });
    }

    /// No pod gave an answer.
    pub(crate) fn failed(&mut self) {
        self.class = Some(CodeClass::Server);
    }
}

/// The status in headers or trailers.
pub(crate) fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let class = self.class.unwrap_or(CodeClass::Cancelled);
        let took = self.arrived.elapsed();
        self.metrics.in_flight().dec();
        self.metrics.ended(self.protocol, class, took);
        tracing::debug!(
            request_id = self.request_id,
            protocol = <&str>::from(self.protocol),
            route = self.metrics.route,
            revision = self.metrics.revision,
            pod = self.pod,
            attempts = self.attempts,
            code = <&str>::from(class),
            first_byte_ms = self.first_byte.map(|first_byte| first_byte.as_secs_f64() * 1e3),
            duration_ms = took.as_secs_f64() * 1e3,
            "request"
        );
    }
}
