//! The body of an answer, as it goes to the caller.
//!
//! A pod's frames pass through one by one, untouched. What rides along is everything that must last as long as the
//! answer does: the endpoint's count, the stream's place, the drain's count, and the record of how it ended.
//! Dropping the body, which is what the server does when the caller leaves, drops the pod's stream with it and so
//! resets it.

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

use crate::drain::Busy;
use crate::endpoint::InFlight;
use crate::metrics::{CodeClass, Protocol, RevisionMetrics};
use crate::pool::StreamSlot;

/// Why a body ended before its end.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An answer's body.
#[derive(Debug)]
pub(crate) struct Body(Kind);

#[derive(Debug)]
enum Kind {
    /// Made here.
    Local(Full<Bytes>),
    /// Made by one of the gateway's own gRPC services.
    Service(tonic::body::Body),
    /// Comes from a pod.
    Pod(Box<Watched>),
}

impl Default for Body {
    fn default() -> Self {
        Self::local(Bytes::new())
    }
}

impl Body {
    /// A body that is here in full.
    pub(crate) fn local(bytes: Bytes) -> Self {
        Self(Kind::Local(Full::new(bytes)))
    }

    /// The body of an answer of the gateway's own gRPC services.
    pub(crate) fn service(body: tonic::body::Body) -> Self {
        Self(Kind::Service(body))
    }

    /// A pod's body.
    pub(crate) fn pod(body: Incoming, held: Held) -> Self {
        Self(Kind::Pod(Box::new(Watched { body, held: Some(held) })))
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Local(body) => {
                Pin::new(body).poll_frame(context).map_err(|never: Infallible| match never {})
            }
            Kind::Service(body) => Pin::new(body).poll_frame(context).map_err(BoxError::from),
            Kind::Pod(body) => body.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Local(body) => body.is_end_stream(),
            Kind::Service(body) => body.is_end_stream(),
            Kind::Pod(watched) => watched.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Local(body) => body.size_hint(),
            Kind::Service(body) => body.size_hint(),
            Kind::Pod(watched) => watched.body.size_hint(),
        }
    }
}

/// What lasts as long as a pod's answer.
#[derive(Debug)]
pub(crate) struct Held {
    /// Written when the answer ended.
    pub(crate) record: Record,
    /// The endpoint's count.
    pub(crate) _in_flight: InFlight,
    /// The stream's place on its connection.
    pub(crate) _slot: StreamSlot,
}

#[derive(Debug)]
struct Watched {
    body: Incoming,
    /// `None` once the answer ended.
    held: Option<Held>,
}

impl Watched {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let Some(held) = &mut self.held else {
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        };
        let ended = match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    held.record.trailers(trailers);
                }
                // The server may stop asking once it knows that nothing follows.
                self.body.is_end_stream() || self.body.size_hint().exact() == Some(0)
            }
            Some(Err(error)) => {
                tracing::warn!(pod = held.record.pod, %error, "a pod broke off in the middle of an answer");
                held.record.class = Some(CodeClass::Broken);
                self.held = None;
                false
            }
            None => true,
        };
        if ended && let Some(mut held) = self.held.take() {
            held.record.complete();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)))
    }
}

/// How one request went. Its last owner drops it when the request ended, and only then is it counted; a request
/// that nobody brought to an end was left by its caller.
#[derive(Debug)]
pub(crate) struct Record {
    /// Series of the revision that was asked last.
    metrics: Arc<RevisionMetrics>,
    protocol: Protocol,
    arrived: Instant,
    request_id: String,
    /// Name of the pod that was asked last.
    pod: String,
    /// Endpoints that were asked.
    pub(crate) attempts: u32,
    first_byte_after: Option<Duration>,
    class: Option<CodeClass>,
    /// What the pod's head said; it stands unless trailers say more.
    head: CodeClass,
    /// gRPC answers say how they ended in trailers, unless the head said it.
    needs_trailers: bool,
    _busy: Busy,
}

/// What a record begins with.
#[derive(Debug)]
pub(crate) struct Begun {
    /// How the caller speaks.
    pub(crate) protocol: Protocol,
    /// When the request came.
    pub(crate) arrived: Instant,
    /// Its id in the logs.
    pub(crate) request_id: String,
    /// The drain's count.
    pub(crate) busy: Busy,
}

impl Record {
    /// A request that goes to a pod of this revision.
    pub(crate) fn new(begun: Begun, metrics: Arc<RevisionMetrics>) -> Self {
        metrics.in_flight().inc();
        Self {
            metrics,
            protocol: begun.protocol,
            arrived: begun.arrived,
            request_id: begun.request_id,
            pod: String::new(),
            attempts: 0,
            first_byte_after: None,
            class: None,
            head: CodeClass::Server,
            needs_trailers: false,
            _busy: begun.busy,
        }
    }

    /// The series that the request counts in.
    pub(crate) fn metrics(&self) -> &Arc<RevisionMetrics> {
        &self.metrics
    }

    /// An attempt goes to this pod, of this revision.
    pub(crate) fn attempt(&mut self, metrics: &Arc<RevisionMetrics>, pod: &str) {
        self.attempts += 1;
        pod.clone_into(&mut self.pod);
        if !Arc::ptr_eq(&self.metrics, metrics) {
            self.metrics.in_flight().dec();
            metrics.in_flight().inc();
            self.metrics = Arc::clone(metrics);
        }
    }

    /// The head of the answer that the caller gets has come.
    pub(crate) fn head(&mut self, status: http::StatusCode, headers: &HeaderMap) {
        let after = self.arrived.elapsed();
        self.first_byte_after = Some(after);
        self.metrics.first_byte(after);
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

    /// The answer came to its end.
    fn complete(&mut self) {
        // A gRPC answer without a status was cut by something in between.
        self.class = Some(if self.needs_trailers { CodeClass::Broken } else { self.head });
    }

    /// No pod gave an answer.
    pub(crate) fn failed(&mut self) {
        self.class = Some(CodeClass::Server);
    }
}

/// The status that headers or trailers carry.
pub(crate) fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}

impl Drop for Record {
    fn drop(&mut self) {
        let class = self.class.unwrap_or(CodeClass::Cancelled);
        let took = self.arrived.elapsed();
        self.metrics.in_flight().dec();
        self.metrics.ended(self.protocol, class, took);
        tracing::debug!(
            request_id = self.request_id,
            protocol = self.protocol.as_str(),
            route = self.metrics.route,
            revision = self.metrics.revision,
            pod = self.pod,
            attempts = self.attempts,
            code = class.as_str(),
            first_byte_ms = self.first_byte_after.map(|after| after.as_secs_f64() * 1e3),
            duration_ms = took.as_secs_f64() * 1e3,
            "request"
        );
    }
}
