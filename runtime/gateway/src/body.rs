//! The body of an answer, as it goes to the caller.
//!
//! The frames of a pod pass one by one and unchanged, except trailers that are meant for the gateway. Where a
//! pod breaks off, a caller of gRPC gets the status UNAVAILABLE, and one of HTTP an answer without an end.
//! The body owns everything that has to last as long as the answer: the endpoint's count, the stream's
//! permit, the drain's count, the caller's shares, and the record of how the request ended. When the caller
//! disconnects, the server drops the body, which resets the pod's stream.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tonic::{Code, Status};
use trustformers_api::budget::Share;
use trustformers_api::error::GRPC_KIND_KEY;
use trustformers_telemetry::traces::SpanGuard;

use crate::answer_end::EndScan;
use crate::connection::ActiveRequest;
use crate::late::LateAnswer;
use crate::record::AnswerGuard;

/// Why a body broke off.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An answer's body.
#[derive(Debug)]
pub(crate) struct Body {
    kind: BodyKind,
    /// Released when the answer has ended.
    _share: Option<Share>,
    /// The connection is not idle before the answer has ended.
    _active: Option<ActiveRequest>,
    /// Ends with the answer.
    _span: SpanGuard,
}

#[derive(Debug)]
enum BodyKind {
    /// Made by the gateway.
    Local(Full<Bytes>),
    /// Made by one of the gateway's own services.
    Service(UnsyncBoxBody<Bytes, BoxError>),
    /// Comes from a pod.
    Pod(Box<PodBody<Incoming>>),
    /// Comes from a pod whose head was not waited for.
    Late(Box<LateAnswer>),
}

impl Default for Body {
    fn default() -> Self {
        Self::local(Bytes::new())
    }
}

impl Body {
    /// A body in memory.
    pub(crate) fn local(bytes: Bytes) -> Self {
        Self::of(BodyKind::Local(Full::new(bytes)))
    }

    /// The body of an answer of the gateway's own services.
    pub(crate) fn service<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Self::of(BodyKind::Service(body.map_err(Into::into).boxed_unsync()))
    }

    /// A pod's body.
    pub(crate) fn pod(body: Incoming, guard: AnswerGuard, scan: EndScan) -> Self {
        Self::of(BodyKind::Pod(Box::new(PodBody::new(body, guard, scan))))
    }

    /// An answer whose head was sent before the pod's came.
    pub(crate) fn late(answer: LateAnswer) -> Self {
        Self::of(BodyKind::Late(Box::new(answer)))
    }

    fn of(kind: BodyKind) -> Self {
        Self { kind, _share: None, _active: None, _span: SpanGuard::default() }
    }

    /// Releases the share when the answer has ended.
    pub(crate) fn with_share(self, share: Share) -> Self {
        Self { _share: Some(share), ..self }
    }

    /// Keeps the request active, and its span open, until the answer has ended.
    pub(crate) fn with_active(self, active: ActiveRequest, span: SpanGuard) -> Self {
        Self { _active: Some(active), _span: span, ..self }
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
            BodyKind::Local(body) => {
                Pin::new(body).poll_frame(context).map_err(|never: Infallible| match never {})
            }
            BodyKind::Service(body) => Pin::new(body).poll_frame(context),
            BodyKind::Pod(body) => body.poll(context),
            BodyKind::Late(answer) => answer.poll(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            BodyKind::Local(body) => body.is_end_stream(),
            BodyKind::Service(body) => body.is_end_stream(),
            BodyKind::Pod(body) => body.is_end_stream(),
            BodyKind::Late(answer) => answer.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            BodyKind::Local(body) => body.size_hint(),
            BodyKind::Service(body) => body.size_hint(),
            BodyKind::Pod(body) => body.size_hint(),
            BodyKind::Late(_) => SizeHint::default(),
        }
    }
}

/// A pod's body as it passes.
#[derive(Debug)]
struct PodBody<B> {
    body: B,
    /// None once the answer has ended.
    passing: Option<Passing>,
    /// The last bytes of an answer whose length is known. They wait for the end that the pod tells behind
    /// them: nobody asks for more once the caller has all of them.
    last: Option<Bytes>,
    /// What follows them.
    trailers: Option<HeaderMap>,
}

/// What is known of an answer that has not ended.
#[derive(Debug)]
struct Passing {
    guard: AnswerGuard,
    scan: EndScan,
    has_data: bool,
}

impl Passing {
    fn data(&mut self, data: &Bytes) {
        if !self.has_data && !data.is_empty() {
            self.has_data = true;
            self.guard.first_data();
        }
        self.scan.data(data);
        self.guard.data(data);
    }
}

impl<B> PodBody<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    fn new(body: B, guard: AnswerGuard, scan: EndScan) -> Self {
        let passing = Some(Passing { guard, scan, has_data: false });
        let mut pod = Self { body, passing, last: None, trailers: None };
        // An answer that is a head alone: the server never asks for more.
        if pod.body.is_end_stream() {
            pod.complete();
        }
        pod
    }

    fn complete(&mut self) {
        if let Some(Passing { guard, scan, .. }) = self.passing.take() {
            guard.ended(&scan.end());
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if self.passing.is_none() {
                let last = self.last.take().map(Frame::data);
                let next = last.or_else(|| self.trailers.take().map(Frame::trailers));
                return Poll::Ready(next.map(Ok));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => {
                    if let Some(data) = self.take(frame) {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                Some(Err(error)) => {
                    self.last = None;
                    let Some(Passing { guard, scan, .. }) = self.passing.take() else { continue };
                    let trailers = scan.awaits_status().then(broken_off);
                    guard.ended(&scan.reset());
                    let told = trailers.map(|trailers| Ok(Frame::trailers(trailers)));
                    return Poll::Ready(Some(told.unwrap_or_else(|| Err(error.into()))));
                }
                None => self.complete(),
            }
        }
    }

    /// Takes a frame of the pod. Gives the bytes that the caller may have now.
    fn take(&mut self, frame: Frame<Bytes>) -> Option<Bytes> {
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(frame) => {
                if let Ok(mut trailers) = frame.into_trailers() {
                    if let Some(passing) = &mut self.passing {
                        passing.scan.trailers(&mut trailers);
                    }
                    self.trailers = Some(trailers).filter(|trailers| !trailers.is_empty());
                    self.complete();
                }
                return None;
            }
        };
        if let Some(passing) = &mut self.passing {
            passing.data(&data);
        }
        if self.body.is_end_stream() {
            self.complete();
        } else if self.body.size_hint().exact() == Some(0) {
            // An empty frame may follow the last bytes.
            if !data.is_empty() || self.last.is_none() {
                self.last = Some(data);
            }
            return None;
        }
        Some(data)
    }

    fn is_end_stream(&self) -> bool {
        self.passing.is_none() && self.last.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let inner = self.body.size_hint();
        let last = self.last.as_ref().map_or(0, Bytes::len) as u64;
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + last);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + last);
        }
        hint
    }
}

/// The end of an answer of gRPC whose pod broke off. A reset of the stream would be "internal" to the caller,
/// which says that the request must not be sent again.
fn broken_off() -> HeaderMap {
    let message = "the pod broke off in the middle of its answer; send the request again";
    let mut trailers = HeaderMap::new();
    // The message has no byte that a header can't hold.
    let _added = Status::unavailable(message).add_header(&mut trailers);
    trailers.insert(GRPC_KIND_KEY, HeaderValue::from_static("bad_upstream"));
    trailers
}

/// The status in headers or trailers.
pub(crate) fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()))
}
