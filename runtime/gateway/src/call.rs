//! One request as it goes to pods: its head and its body; and who sends it.
//!
//! A body that was read to its end can be sent again. A live body is still arriving: its beginning, which had
//! to be read to find the model, is kept, and its rest flows from the caller to the one pod that takes it. An
//! attempt that ends before it takes the rest leaves the body as it was, so another pod may get the request.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Uri, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;
use trustformers_api::Priority;
use trustformers_api::surfaces::Surface;
use trustformers_telemetry::traces::Trace;

use crate::body::BoxError;
use crate::error::GatewayError;
use crate::headers::{name_revision, name_routed};
use crate::metrics::Protocol;
use crate::routing::Choice;
use crate::wire::Wire;

/// What one attempt sends.
pub(crate) type Outgoing = Request<OutgoingBody>;

/// The rest of a body as the caller sends it, within the bounds of `request_body`.
pub(crate) type LiveSource = Pin<Box<dyn HttpBody<Data = Bytes, Error = GatewayError> + Send>>;

/// A request, ready to be sent to a pod.
#[derive(Debug)]
pub(crate) struct Call {
    /// The row of the table of surfaces that it asks.
    pub(crate) surface: &'static Surface,
    /// The caller's protocol, as metrics name it.
    pub(crate) protocol: Protocol,
    /// The same on the wire.
    pub(crate) wire: Wire,
    /// The caller's method.
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) path: PathAndQuery,
    /// The host that the caller addressed, where the request names one.
    pub(crate) authority: Option<Authority>,
    /// Headers for the pod.
    pub(crate) headers: HeaderMap,
    /// The body.
    pub(crate) body: CallBody,
    /// When it could be sent: its model is known, and it is not held any more. What its caller or the missing
    /// pod took before is no pod's fault.
    pub(crate) ready_at: Instant,
    /// The span of the request.
    pub(crate) trace: Trace,
}

impl Call {
    /// The request of one attempt on the pod of a choice, as a part of the attempt's span, which names a
    /// revision where the pod holds more than one. None where an earlier attempt has taken the rest of a live
    /// body, so that no other pod can get the request.
    pub(crate) fn outgoing(&self, address: SocketAddr, attempt: &Trace, choice: &Choice) -> Option<Outgoing> {
        let mut request = Request::new(self.body.attempt()?);
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        // The sender consumes it, and a retry needs it again: a copy of the map without its texts.
        *request.headers_mut() = self.headers.clone();
        name_revision(request.headers_mut(), choice.revision());
        name_routed(request.headers_mut(), choice.routed());
        attempt.inject(request.headers_mut());
        let authority = self.authority.clone().or_else(|| address.to_string().parse().ok());
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = Some(self.path.clone());
        if let Some(authority) = authority {
            parts.scheme = Some(Scheme::HTTP);
            parts.authority = Some(authority);
        }
        // Scheme, authority and path together always make a URI; a path alone does as well.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        Some(request)
    }
}

/// A request of the gateway's own for a path of the pod at an address.
pub(crate) fn outgoing_check(address: SocketAddr, path: &'static str) -> Option<Outgoing> {
    let mut request = Request::new(CallBody::Whole(Bytes::new()).attempt()?);
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = format!("http://{address}{path}").parse().ok()?;
    Some(request)
}

/// Who sends a request, as the gateway believes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Address of the connection.
    pub(crate) address: IpAddr,
    /// The tenant. Pods are fair between tenants.
    pub(crate) tenant: Option<String>,
    /// The priority class.
    pub(crate) priority: Option<Priority>,
}

/// Which of a caller's own headers count on a route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CallerRules {
    /// Whether the caller may name its tenant.
    pub(crate) own_tenant: bool,
    /// Whether the caller may choose its priority class.
    pub(crate) own_priority: bool,
}

/// The body of a request.
#[derive(Debug)]
pub(crate) enum CallBody {
    /// All of it.
    Whole(Bytes),
    /// What was read of it, and the rest.
    Live {
        /// What was read to find the model.
        first: Bytes,
        /// What follows.
        rest: LiveRest,
    },
}

impl CallBody {
    /// A body whose rest still comes.
    pub(crate) fn live(first: Bytes, rest: LiveSource) -> Self {
        let state = RestState { source: Some(rest), upload: Upload::Waiting };
        Self::Live { first, rest: LiveRest(Arc::new(Mutex::new(state))) }
    }

    /// The body of one more attempt. None where the rest was taken.
    pub(crate) fn attempt(&self) -> Option<OutgoingBody> {
        match self {
            Self::Whole(bytes) => {
                let first = Some(bytes.clone()).filter(|bytes| !bytes.is_empty());
                Some(OutgoingBody { first, rest: Rest::Ended })
            }
            Self::Live { first, rest } => {
                let first = Some(first.clone()).filter(|bytes| !bytes.is_empty());
                rest.is_unread().then(|| OutgoingBody { first, rest: Rest::Waiting(rest.clone()) })
            }
        }
    }

    /// Its first bytes, no more than `bytes`.
    pub(crate) fn prefix(&self, bytes: usize) -> &[u8] {
        let (Self::Whole(first) | Self::Live { first, .. }) = self;
        &first[..first.len().min(bytes)]
    }

    /// Whether all of it is here.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }

    /// Whether another attempt can send it.
    pub(crate) fn can_be_sent_again(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Live { rest, .. } => rest.is_unread(),
        }
    }

    /// Whether the caller is still sending it, so that a pod that has not answered yet is not to blame.
    pub(crate) fn is_arriving(&self) -> bool {
        match self {
            Self::Whole(_) => false,
            Self::Live { rest, .. } => !matches!(rest.lock().upload, Upload::Ended),
        }
    }

    /// Why the caller's upload broke off, once. The pod's stream was reset for this reason and for no fault
    /// of the pod.
    pub(crate) fn take_failure(&self) -> Option<GatewayError> {
        let Self::Live { rest, .. } = self else { return None };
        let mut state = rest.lock();
        match std::mem::replace(&mut state.upload, Upload::Ended) {
            Upload::Failed(error) => Some(error),
            other => {
                state.upload = other;
                None
            }
        }
    }
}

/// The rest of a live body, which one attempt takes.
#[derive(Clone)]
pub(crate) struct LiveRest(Arc<Mutex<RestState>>);

struct RestState {
    /// None once an attempt has taken it.
    source: Option<LiveSource>,
    upload: Upload,
}

/// How far the rest of a live body is.
#[derive(Debug)]
enum Upload {
    /// No attempt has taken it.
    Waiting,
    /// It flows.
    Flowing,
    /// It has ended, or nobody reads it any more.
    Ended,
    /// The caller's side broke off.
    Failed(GatewayError),
}

impl fmt::Debug for LiveRest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LiveRest({:?})", self.lock().upload)
    }
}

impl LiveRest {
    fn lock(&self) -> std::sync::MutexGuard<'_, RestState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_unread(&self) -> bool {
        self.lock().source.is_some()
    }

    fn take(&self) -> Option<LiveSource> {
        let mut state = self.lock();
        let source = state.source.take()?;
        state.upload = Upload::Flowing;
        Some(source)
    }

    fn ended(&self) {
        self.lock().upload = Upload::Ended;
    }

    fn failed(&self, error: GatewayError) {
        self.lock().upload = Upload::Failed(error);
    }
}

/// The body of one attempt.
#[derive(Debug)]
pub(crate) struct OutgoingBody {
    /// What was read already; None once it was sent.
    first: Option<Bytes>,
    rest: Rest,
}

enum Rest {
    /// Nothing was taken of it.
    Waiting(LiveRest),
    /// It flows.
    Flowing { source: LiveSource, state: LiveRest },
    /// Nothing follows.
    Ended,
}

impl fmt::Debug for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting(_) => "Waiting",
            Self::Flowing { .. } => "Flowing",
            Self::Ended => "Ended",
        })
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if let Self::Flowing { state, .. } = self {
            state.ended();
        }
    }
}

/// The upload broke off, which resets the pod's stream. The reason is in the call's body.
#[derive(Debug, thiserror::Error)]
#[error("the caller's upload broke off")]
pub(crate) struct UploadBroken;

impl HttpBody for OutgoingBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if let Rest::Waiting(state) = &self.rest {
            let state = state.clone();
            // Another attempt can have taken it only where this one was given up, and is not polled.
            let Some(source) = state.take() else { return Poll::Ready(Some(Err(UploadBroken.into()))) };
            self.rest = Rest::Flowing { source, state };
        }
        let Rest::Flowing { source, state } = &mut self.rest else { return Poll::Ready(None) };
        match ready!(source.as_mut().poll_frame(context)) {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(Err(error)) => {
                let state = state.clone();
                self.rest = Rest::Ended;
                state.failed(error);
                Poll::Ready(Some(Err(UploadBroken.into())))
            }
            None => {
                self.rest = Rest::Ended;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && matches!(self.rest, Rest::Ended)
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().map_or(0, Bytes::len) as u64;
        match &self.rest {
            Rest::Ended => SizeHint::with_exact(first),
            Rest::Waiting(_) | Rest::Flowing { .. } => {
                let mut hint = SizeHint::new();
                hint.set_lower(first);
                hint
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use http_body_util::{BodyExt, StreamBody};

    fn source(frames: Vec<Result<&'static str, GatewayError>>) -> LiveSource {
        let frames = frames
            .into_iter()
            .map(|frame| frame.map(|text| Frame::data(Bytes::from_static(text.as_bytes()))));
        Box::pin(StreamBody::new(stream::iter(frames.collect::<Vec<_>>())))
    }

    async fn text(body: OutgoingBody) -> String {
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_whole_body_is_sent_as_often_as_is_asked() {
        let body = CallBody::Whole(Bytes::from_static(b"abc"));
        for _ in 0..3 {
            let attempt = body.attempt().unwrap();
            assert_eq!(attempt.size_hint().exact(), Some(3));
            assert_eq!(text(attempt).await, "abc");
        }
        assert!(body.can_be_sent_again() && !body.is_arriving());
        assert!(CallBody::Whole(Bytes::new()).attempt().unwrap().is_end_stream());
    }

    #[tokio::test]
    async fn the_rest_goes_to_the_attempt_that_reads_it() {
        let body = CallBody::live(Bytes::from_static(b"ab"), source(vec![Ok("cd"), Ok("ef")]));
        // The first attempt sent what was read, and ended.
        let mut first = body.attempt().unwrap();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        drop(first);
        assert!(body.can_be_sent_again() && body.is_arriving());
        assert_eq!(text(body.attempt().unwrap()).await, "abcdef");
        assert!(!body.can_be_sent_again() && !body.is_arriving());
        assert!(body.attempt().is_none() && body.take_failure().is_none());
    }

    #[tokio::test]
    async fn an_upload_that_breaks_off_leaves_its_reason() {
        let body =
            CallBody::live(Bytes::from_static(b"a"), source(vec![Ok("b"), Err(GatewayError::BodyStalled)]));
        let mut attempt = body.attempt().unwrap();
        for expected in ["a", "b"] {
            assert_eq!(attempt.frame().await.unwrap().unwrap().into_data().unwrap(), expected);
        }
        assert!(attempt.frame().await.unwrap().is_err());
        assert!(attempt.frame().await.is_none());
        assert!(matches!(body.take_failure(), Some(GatewayError::BodyStalled)));
        assert!(body.take_failure().is_none() && !body.can_be_sent_again());
    }

    #[tokio::test]
    async fn an_attempt_that_is_dropped_in_the_middle_ends_the_upload() {
        let body = CallBody::live(Bytes::new(), source(vec![Ok("b"), Ok("c")]));
        let mut attempt = body.attempt().unwrap();
        assert_eq!(attempt.frame().await.unwrap().unwrap().into_data().unwrap(), "b");
        assert!(body.is_arriving());
        drop(attempt);
        assert!(!body.is_arriving() && body.attempt().is_none());
    }
}
