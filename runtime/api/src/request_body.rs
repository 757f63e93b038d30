//! Request bodies: read within bounds of length, time and memory, and discarded where nothing reads them.
//!
//! The listener wraps every body, whatever the protocol: the bytes count against a budget that callers share
//! until the answer begins, and a body that does not arrive in time is refused. A handler that refuses a
//! request drops its body; the listener then reads and discards the rest within a bound, because a client
//! that is still sending sees a broken connection instead of an answer.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use axum::http::request::Parts;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::Sleep;
use tonic::Status;

use crate::MAX_BODY_BYTES;
use crate::budget::Share;
use crate::echo::echo;
use crate::error::ApiError;

/// A body that has not arrived in this time is refused.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// The most bytes of a refused body that are discarded: 16 times what is accepted.
const MAX_DISCARDED_BYTES: usize = 16 * MAX_BODY_BYTES;
/// The longest time that a refused body is discarded.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);
/// A refused body that pauses for this long is not waited for.
const DISCARD_PAUSE: Duration = Duration::from_secs(1);
/// Seconds after which a request that found the budget in use may be sent again.
const RETRY_AFTER_S: u32 = 1;

/// Why a body ended early. `status` is in the chain of sources because tonic looks for it there.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
struct BodyRefused {
    error: ApiError,
    #[source]
    status: Status,
}

impl From<ApiError> for BodyRefused {
    fn from(error: ApiError) -> Self {
        Self { status: error.clone().into(), error }
    }
}

/// What a body and the listener that waits for its answer both know.
#[derive(Debug)]
struct Metered<B> {
    /// The bytes that were read.
    share: Share,
    /// What a handler left unread.
    unread: Option<B>,
    /// Whether anything was asked of the client: one that expects `100 Continue` has not sent anything
    /// before.
    polled: bool,
}

/// The listener's side of a body. While it lives, the bytes of the body count.
#[derive(Debug)]
pub(crate) struct BodyMeter<B>(Arc<Mutex<Metered<B>>>);

/// The handler's side of a body.
struct MeteredBody<B: HttpBody> {
    inner: Option<B>,
    metered: Arc<Mutex<Metered<B>>>,
    deadline: Pin<Box<Sleep>>,
}

/// Splits a body into what the handler reads and what the listener keeps.
pub(crate) fn metered<B>(body: B, share: Share) -> (Body, BodyMeter<B>)
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let metered = Arc::new(Mutex::new(Metered { share, unread: None, polled: false }));
    let deadline = Box::pin(tokio::time::sleep(BODY_TIMEOUT));
    let for_handler = MeteredBody { inner: Some(body), metered: Arc::clone(&metered), deadline };
    (Body::new(for_handler), BodyMeter(metered))
}

fn lock<B>(metered: &Mutex<Metered<B>>) -> MutexGuard<'_, Metered<B>> {
    metered.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> HttpBody for MeteredBody<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        if this.deadline.as_mut().poll(context).is_ready() {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            let error = ApiError::InvalidRequest { field: None, message };
            return Poll::Ready(Some(Err(Box::new(BodyRefused::from(error)))));
        }
        let frame = Pin::new(inner).poll_frame(context);
        let mut metered = lock(&this.metered);
        metered.polled = true;
        let frame = match frame {
            Poll::Ready(Some(Ok(frame))) => frame,
            other => return other.map_err(Into::into),
        };
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        if metered.share.try_grow(bytes) {
            return Poll::Ready(Some(Ok(frame)));
        }
        let message = "the memory for request bodies is in use; send the request again later".to_owned();
        let error = ApiError::Overloaded { message, retry_after_s: RETRY_AFTER_S };
        Poll::Ready(Some(Err(Box::new(BodyRefused::from(error)))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl<B: HttpBody> Drop for MeteredBody<B> {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take().filter(|inner| !inner.is_end_stream()) {
            lock(&self.metered).unread = Some(inner);
        }
    }
}

impl<B: HttpBody + Unpin> BodyMeter<B> {
    /// Reads and discards what the handler left unread, within the bounds above. A client that expects
    /// `100 Continue` and was not asked for its body is left alone: it sends none.
    pub(crate) async fn discard(&self, expects_continue: bool) {
        let unread = {
            let mut metered = lock(&self.0);
            if expects_continue && !metered.polled { None } else { metered.unread.take() }
        };
        let Some(mut body) = unread else { return };
        let discarded = async {
            let mut left = MAX_DISCARDED_BYTES;
            while let Ok(Some(Ok(frame))) = tokio::time::timeout(DISCARD_PAUSE, body.frame()).await {
                let bytes = frame.data_ref().map_or(0, bytes::Buf::remaining);
                match left.checked_sub(bytes) {
                    Some(rest) => left = rest,
                    None => return,
                }
            }
        };
        // Past the bounds the connection is closed, whether the client has read its answer or not.
        let _ = tokio::time::timeout(DISCARD_TIMEOUT, discarded).await;
    }
}

/// A whole body of an HTTP request, at most [`MAX_BODY_BYTES`] long.
///
/// # Errors
/// A body that is too long, compressed, late, broken, or beyond the memory for bodies.
pub(crate) async fn read(head: &Parts, body: Body) -> Result<Bytes, ApiError> {
    check_encoding(head)?;
    let length = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|bytes| bytes > MAX_BODY_BYTES as u64) {
        return Err(too_long());
    }
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(refusal(error.as_ref())),
    }
}

/// Bodies are read as they are. An encoding that is ignored would show up as bad JSON.
fn check_encoding(head: &Parts) -> Result<(), ApiError> {
    let encodings = head.headers.get_all(CONTENT_ENCODING).iter();
    let other = encodings
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        .find(|value| !value.trim().is_empty() && !value.trim().eq_ignore_ascii_case("identity"));
    other.map_or(Ok(()), |encoding| {
        Err(ApiError::UnsupportedEncoding { encoding: echo(&encoding).into_owned() })
    })
}

fn refusal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return too_long();
        }
        if let Some(refused) = error.downcast_ref::<BodyRefused>() {
            return refused.error.clone();
        }
        cause = error.source();
    }
    ApiError::InvalidRequest { field: None, message: format!("the body could not be read: {error}") }
}

fn too_long() -> ApiError {
    let message = format!("the body is longer than {MAX_BODY_BYTES} bytes, the longest that is accepted");
    ApiError::TooLong { message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Caller, FairBudget};
    use axum::http::Request;
    use futures::StreamExt;
    use http_body_util::StreamBody;
    use std::convert::Infallible;

    fn caller() -> Caller {
        Caller::at([127, 0, 0, 1].into())
    }

    fn head(name: &str, value: &str) -> Parts {
        Request::post("/").header(name, value).body(()).unwrap().into_parts().0
    }

    fn endless() -> impl HttpBody<Data = Bytes, Error = Infallible> + Unpin + Send + 'static {
        let chunk = Bytes::from_static(&[b'x'; 1 << 16]);
        StreamBody::new(futures::stream::repeat_with(move || Ok(Frame::data(chunk.clone()))).boxed())
    }

    #[tokio::test]
    async fn bytes_count_until_the_meter_is_dropped() {
        let budget = FairBudget::new(64);
        let (body, meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap());
        assert_eq!(read(&head("x", "y"), body).await.unwrap(), "12345");
        assert_eq!(budget.used(), 5);
        drop(meter);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_body_beyond_the_budget_is_refused_in_both_protocols() {
        let budget = FairBudget::new(8);
        let (body, _meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap());
        let error = read(&head("x", "y"), body).await.unwrap_err();
        assert!(matches!(error, ApiError::Overloaded { retry_after_s: 1, .. }), "{error:?}");
        let (body, _meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap());
        let status = Status::from_error(body.collect().await.unwrap_err().into());
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_is_refused_after_its_time() {
        let budget = FairBudget::new(64);
        let stalled = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let (body, _meter) = metered(stalled, budget.try_acquire(caller(), 0).unwrap());
        let error = read(&head("x", "y"), body).await.unwrap_err().to_string();
        assert!(error.contains("within 30 s"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unread_body_is_discarded_up_to_its_bound() {
        let budget = FairBudget::new(64);
        let (body, meter) = metered(endless(), budget.try_acquire(caller(), 0).unwrap());
        assert!(matches!(
            read(&head("content-length", "5000000"), body).await,
            Err(ApiError::TooLong { .. })
        ));
        meter.discard(false).await;
        assert!(lock(&meter.0).unread.is_none());
        let (body, meter) = metered(endless(), budget.try_acquire(caller(), 0).unwrap());
        drop(body);
        meter.discard(true).await;
        assert!(lock(&meter.0).unread.is_some(), "the client has sent nothing yet");
    }

    #[tokio::test]
    async fn a_compressed_body_is_refused_with_its_encoding() {
        let error = read(&head("content-encoding", "gzip"), Body::empty()).await.unwrap_err();
        assert_eq!(error.status(), 415);
        assert!(error.to_string().contains("\"gzip\""), "{error}");
        assert!(read(&head("content-encoding", "identity"), Body::empty()).await.is_ok());
    }
}
