//! Request bodies: read within bounds of length, time and memory, and discarded where nothing reads them.
//!
//! The listener wraps every body, whatever the protocol: the bytes count against a budget that callers share
//! until the answer begins, and a body that does not arrive in time is refused. A handler that refuses a
//! request drops its body; the listener then reads and discards the rest within a bound, because a client
//! that is still sending sees a broken connection instead of an answer.
//!
//! A stream of gRPC messages in both directions is bounded message by message instead: its bytes count until
//! their message is complete, and each message that has begun must arrive in time.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use axum::http::request::Parts;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::{Instant, Sleep};
use tonic::Status;

use crate::MAX_BODY_BYTES;
use crate::budget::Share;
use crate::echo::echo;
use crate::error::ApiError;
use crate::limits::too_many_request_bytes;

/// A body that has not arrived in this time is refused.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// The most bytes of a refused body that are discarded: 16 times what is accepted.
const MAX_DISCARDED_BYTES: usize = 16 * MAX_BODY_BYTES;
/// The longest time that a refused body is discarded.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);
/// A refused body that pauses for this long is not waited for.
const DISCARD_PAUSE: Duration = Duration::from_secs(1);
/// Bytes in front of each message of a gRPC stream: whether it is compressed, and its length.
const MESSAGE_HEAD_BYTES: usize = 5;

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
    /// In a stream of messages: where it stands.
    messages: Option<MessageFraming>,
}

/// Where a stream of gRPC messages stands between two messages or within one.
#[derive(Debug, Default)]
struct MessageFraming {
    head: [u8; MESSAGE_HEAD_BYTES],
    /// Bytes of the message that have arrived, its head included; 0 between messages.
    arrived: usize,
    /// Bytes that the message has in all, its head included; known once the head has arrived.
    length: usize,
}

impl MessageFraming {
    /// Takes the next bytes of the stream. Returns whether a message began in them.
    fn advance(&mut self, mut bytes: &[u8]) -> bool {
        let mut began = false;
        while !bytes.is_empty() {
            began |= self.arrived == 0;
            let in_head = self.arrived < MESSAGE_HEAD_BYTES;
            let wanted = if in_head { MESSAGE_HEAD_BYTES } else { self.length };
            let (now, rest) = bytes.split_at(bytes.len().min(wanted - self.arrived));
            if in_head {
                self.head[self.arrived..self.arrived + now.len()].copy_from_slice(now);
            }
            self.arrived += now.len();
            bytes = rest;
            if in_head && self.arrived == MESSAGE_HEAD_BYTES {
                let [_, length @ ..] = self.head;
                self.length = MESSAGE_HEAD_BYTES + u32::from_be_bytes(length) as usize;
            }
            if self.arrived >= MESSAGE_HEAD_BYTES && self.arrived == self.length {
                self.arrived = 0;
            }
        }
        began
    }
}

/// Splits a body into what the handler reads and what the listener keeps. `messages` says that it is a stream
/// of gRPC messages which goes on for as long as the caller likes.
pub(crate) fn metered<B>(body: B, share: Share, messages: bool) -> (Body, BodyMeter<B>)
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let metered = Arc::new(Mutex::new(Metered { share, unread: None, polled: false }));
    let deadline = Box::pin(tokio::time::sleep(BODY_TIMEOUT));
    let messages = messages.then(MessageFraming::default);
    let for_handler = MeteredBody { inner: Some(body), metered: Arc::clone(&metered), deadline, messages };
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
        if let Some(messages) = &this.messages {
            // Whoever asks for more has handled every complete message.
            lock(&this.metered).share.shrink_to(messages.arrived);
        }
        let between_messages = this.messages.as_ref().is_some_and(|messages| messages.arrived == 0);
        if !between_messages && this.deadline.as_mut().poll(context).is_ready() {
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
        if let (Some(messages), Some(data)) = (&mut this.messages, frame.data_ref())
            && messages.advance(data)
        {
            this.deadline.as_mut().reset(Instant::now() + BODY_TIMEOUT);
        }
        if metered.share.try_grow(bytes) {
            return Poll::Ready(Some(Ok(frame)));
        }
        Poll::Ready(Some(Err(Box::new(BodyRefused::from(too_many_request_bytes())))))
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
    read_encoded(head, body).await
}

/// As [`read`], whatever the encoding of the body.
pub(crate) async fn read_encoded(head: &Parts, body: Body) -> Result<Bytes, ApiError> {
    let length = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|bytes| bytes > MAX_BODY_BYTES as u64) {
        return Err(too_long());
    }
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(refusal(error.as_ref())),
    }
}

/// [`crate::encoding`] decodes bodies before they come here. An encoding that is ignored would show up as bad
/// JSON.
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

pub(crate) fn too_long() -> ApiError {
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
        let (body, meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap(), false);
        assert_eq!(read(&head("x", "y"), body).await.unwrap(), "12345");
        assert_eq!(budget.used(), 5);
        drop(meter);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_body_beyond_the_budget_is_refused_in_both_protocols() {
        let budget = FairBudget::new(8);
        let (body, _meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap(), false);
        let error = read(&head("x", "y"), body).await.unwrap_err();
        assert!(matches!(error, ApiError::Overloaded { retry_after_s: 1, .. }), "{error:?}");
        let (body, _meter) = metered(Body::from("12345"), budget.try_acquire(caller(), 0).unwrap(), false);
        let status = Status::from_error(body.collect().await.unwrap_err().into());
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_is_refused_after_its_time() {
        let budget = FairBudget::new(64);
        let stalled = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let (body, _meter) = metered(stalled, budget.try_acquire(caller(), 0).unwrap(), false);
        let error = read(&head("x", "y"), body).await.unwrap_err().to_string();
        assert!(error.contains("within 30 s"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unread_body_is_discarded_up_to_its_bound() {
        let budget = FairBudget::new(64);
        let (body, meter) = metered(endless(), budget.try_acquire(caller(), 0).unwrap(), false);
        assert!(matches!(
            read(&head("content-length", "5000000"), body).await,
            Err(ApiError::TooLong { .. })
        ));
        meter.discard(false).await;
        assert!(lock(&meter.0).unread.is_none());
        let (body, meter) = metered(endless(), budget.try_acquire(caller(), 0).unwrap(), false);
        drop(body);
        meter.discard(true).await;
        assert!(lock(&meter.0).unread.is_some(), "the client has sent nothing yet");
    }

    #[tokio::test]
    async fn a_body_that_nobody_decoded_is_refused_with_its_encoding() {
        let error = read(&head("content-encoding", "compress"), Body::empty()).await.unwrap_err();
        assert_eq!(error.status(), 415);
        assert!(error.to_string().contains("\"compress\""), "{error}");
        assert!(read(&head("content-encoding", "identity"), Body::empty()).await.is_ok());
    }

    /// A message of a gRPC stream.
    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend_from_slice(&u32::try_from(bytes).unwrap().to_be_bytes());
        message.resize(MESSAGE_HEAD_BYTES + bytes, b'x');
        message
    }

    #[test]
    fn messages_of_a_stream_end_where_they_say_however_they_are_cut() {
        let stream = [message(7), message(0), message(300)].concat();
        for cut in 0..stream.len() {
            let mut framing = MessageFraming::default();
            framing.advance(&stream[..cut]);
            let ends = [0, 12, 17];
            let begin = ends.iter().rev().find(|end| **end <= cut).unwrap();
            assert_eq!(framing.arrived, cut - begin, "cut at {cut}");
            framing.advance(&stream[cut..]);
            assert_eq!(framing.arrived, 0, "cut at {cut}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_messages_may_pause_and_holds_only_its_unfinished_message() {
        let budget = FairBudget::new(64);
        let (mut sender, receiver) = futures::channel::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(4);
        let share = budget.try_acquire(caller(), 0).unwrap();
        let (mut body, _meter) = metered(StreamBody::new(receiver), share, true);
        for _ in 0..10 {
            sender.try_send(Ok(Frame::data(message(20).into()))).unwrap();
            body.frame().await.unwrap().unwrap();
            assert_eq!(budget.used(), 25, "the bytes of the other messages were given back");
            tokio::time::advance(2 * BODY_TIMEOUT).await;
        }
        sender.try_send(Ok(Frame::data(message(20)[..9].to_vec().into()))).unwrap();
        body.frame().await.unwrap().unwrap();
        assert_eq!(budget.used(), 9);
        let error = refusal(body.frame().await.unwrap().unwrap_err().into_inner().as_ref());
        assert!(error.to_string().contains("within 30 s"), "{error}");
    }
}
