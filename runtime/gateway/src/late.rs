//! The answer to a stream of messages whose caller waits for the head before it sends its first message.
//!
//! The pod of such a stream is chosen by its first message, so the gateway sends the head itself. What goes
//! wrong later is told in the trailers, as gRPC allows it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, Response};
use http_body::{Body as HttpBody, Frame};

use crate::body::{Body, BoxError, grpc_code};
use crate::wire::Wire;

/// A caller that has sent no message for this long may be waiting for the head. Others have theirs from the
/// pod, with its metadata.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// An answer that is still to come, its errors as answers of gRPC.
pub(crate) type ComingAnswer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

/// The body of an answer whose head was sent first.
pub(crate) struct LateAnswer(LateState);

enum LateState {
    /// For the pod's head.
    Waiting(ComingAnswer),
    /// The pod's body passes.
    Passing(Body),
    /// The head that came was all of the answer.
    Told(HeaderMap),
    Ended,
}

impl fmt::Debug for LateAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            LateState::Waiting(_) => "LateAnswer(Waiting)",
            LateState::Passing(_) => "LateAnswer(Passing)",
            LateState::Told(_) => "LateAnswer(Told)",
            LateState::Ended => "LateAnswer(Ended)",
        })
    }
}

/// The head of an answer that comes later.
pub(crate) fn head(coming: ComingAnswer) -> Response<Body> {
    let mut response = Response::new(Body::late(LateAnswer(LateState::Waiting(coming))));
    response.headers_mut().insert(CONTENT_TYPE, Wire::Grpc.content_type());
    response
}

impl LateAnswer {
    /// The next frame.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            match &mut self.0 {
                LateState::Waiting(coming) => {
                    let (head, body) = ready!(coming.as_mut().poll(context)).into_parts();
                    self.0 = if grpc_code(&head.headers).is_some() {
                        let mut told = head.headers;
                        told.remove(CONTENT_TYPE);
                        told.remove(CONTENT_LENGTH);
                        LateState::Told(told)
                    } else {
                        LateState::Passing(body)
                    };
                }
                LateState::Passing(body) => return Pin::new(body).poll_frame(context),
                LateState::Told(trailers) => {
                    let trailers = std::mem::take(trailers);
                    self.0 = LateState::Ended;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                LateState::Ended => return Poll::Ready(None),
            }
        }
    }

    /// Whether nothing follows.
    pub(crate) fn is_end_stream(&self) -> bool {
        match &self.0 {
            LateState::Waiting(_) | LateState::Told(_) => false,
            LateState::Passing(body) => body.is_end_stream(),
            LateState::Ended => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_body_follows_and_an_error_becomes_trailers() {
        let whole = head(Box::pin(async { Response::new(Body::local(Bytes::from_static(b"messages"))) }));
        assert_eq!(whole.headers()[CONTENT_TYPE], "application/grpc");
        assert_eq!(whole.into_body().collect().await.unwrap().to_bytes(), "messages");
        let refused = async {
            let mut response = Response::new(Body::default());
            response.headers_mut().insert("grpc-status", http::HeaderValue::from_static("5"));
            response.headers_mut().insert(CONTENT_TYPE, Wire::Grpc.content_type());
            response
        };
        let refused = head(Box::pin(refused)).into_body().collect().await.unwrap();
        let trailers = refused.trailers().unwrap();
        assert!(trailers["grpc-status"] == "5" && trailers.len() == 1, "{trailers:?}");
    }
}
