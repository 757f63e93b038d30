//! Writes server-sent events: the one writer of all streams over HTTP.
//!
//! Clients disagree about the less common parts of the format, so an event is an `event:` line, where it has
//! a name, and `data:` lines, and nothing else. While nothing happens for [`KEEP_ALIVE`], a comment with one
//! line end keeps proxies from closing the connection: a blank line after a comment is an empty event to some
//! clients.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream::{BoxStream, Stream};
use http_body::{Body as HttpBody, Frame as BodyFrame};
use serde_json::Value;
use std::convert::Infallible;
use tokio::time::{Instant, Sleep};

/// The longest silence of a stream. Proxies usually close a connection after 60 seconds without a byte.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// What is sent then.
const PING: &[u8] = b": ping\n";
/// The data of the last event of a stream, where its protocol has one.
const DONE: &str = "[DONE]";

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Its name, for protocols whose clients dispatch by it.
    pub(crate) event: Option<&'static str>,
    /// Its data.
    pub(crate) data: String,
}

impl Frame {
    /// An event without a name.
    pub(crate) fn json(value: &Value) -> Self {
        Self { event: None, data: value.to_string() }
    }

    /// An event with a name.
    pub(crate) fn named(event: &'static str, value: &Value) -> Self {
        Self { event: Some(event), data: value.to_string() }
    }

    /// `[DONE]`.
    pub(crate) fn done() -> Self {
        Self { event: None, data: DONE.to_owned() }
    }

    fn write(&self) -> Bytes {
        let mut text = String::with_capacity(self.data.len() + 32);
        if let Some(event) = self.event {
            text.push_str("event: ");
            text.push_str(event);
            text.push('\n');
        }
        for line in self.data.split('\n') {
            text.push_str("data: ");
            text.push_str(line);
            text.push('\n');
        }
        text.push('\n');
        text.into()
    }
}

/// The body of a stream of events.
pub(crate) struct SseBody {
    frames: BoxStream<'static, Frame>,
    silence: Pin<Box<Sleep>>,
}

impl SseBody {
    /// Events as they come. Dropping the body drops the stream.
    pub(crate) fn new(frames: impl Stream<Item = Frame> + Send + 'static) -> Self {
        Self { frames: frames.boxed(), silence: Box::pin(tokio::time::sleep(KEEP_ALIVE)) }
    }
}

impl HttpBody for SseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Infallible>>> {
        let bytes = match self.frames.poll_next_unpin(context) {
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(frame)) => frame.write(),
            Poll::Pending if self.silence.as_mut().poll(context).is_ready() => Bytes::from_static(PING),
            Poll::Pending => return Poll::Pending,
        };
        self.silence.as_mut().reset(Instant::now() + KEEP_ALIVE);
        Poll::Ready(Some(Ok(BodyFrame::data(bytes))))
    }
}

impl IntoResponse for SseBody {
    fn into_response(self) -> Response {
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
            // Proxies that gather small writes would turn a stream of tokens into one block at the end.
            (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        ];
        (headers, Body::new(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use serde_json::json;

    #[tokio::test]
    async fn events_are_data_lines_and_names() {
        let frames = [
            Frame::json(&json!({"a": 1})),
            Frame::named("x", &json!("b\nc")),
            Frame { event: None, data: "d\ne".into() },
            Frame::done(),
        ];
        let response = SseBody::new(futures::stream::iter(frames)).into_response();
        assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
        assert_eq!(response.headers()["x-accel-buffering"], "no");
        let text = response.into_body().collect().await.unwrap().to_bytes();
        let expected = "data: {\"a\":1}\n\nevent: x\ndata: \"b\\nc\"\n\ndata: d\ndata: e\n\ndata: [DONE]\n\n";
        assert_eq!(text, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_broken_by_a_comment_without_a_blank_line() {
        let (sender, receiver) = futures::channel::mpsc::unbounded();
        let mut body = SseBody::new(receiver);
        let began = Instant::now();
        for ping in 1..=2 {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((frame.as_ref(), began.elapsed().as_secs()), (PING, 10 * ping));
        }
        sender.unbounded_send(Frame::done()).unwrap();
        drop(sender);
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "data: [DONE]\n\n");
        assert!(body.frame().await.is_none());
    }
}
