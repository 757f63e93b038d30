//! Traces the requests of an axum router: one span each, from its head to the end of its answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Frame, SizeHint};

use super::{SpanGuard, Traces};

/// Paths that are asked every few seconds by probes and scrapers.
const UNTRACED: [&str; 3] = ["/health", "/metrics", "/grpc.health.v1.Health/"];

/// Longest name of a span: that of a gRPC method is what the caller sent.
const MAX_NAME_CHARS: usize = 128;

impl Traces {
    /// The router, with a span for each request except those of probes and scrapers. While the request is
    /// handled and its answer is made, the span is [`Trace::current`](super::Trace::current).
    pub fn router(&self, router: Router) -> Router {
        if self.0.is_none() {
            return router;
        }
        router.layer(from_fn_with_state(self.clone(), traced))
    }
}

/// What a request's span is called: few names, whatever callers ask.
fn name(request: &Request) -> String {
    let path = request.uri().path();
    if is_grpc(request.headers()) {
        return path.trim_start_matches('/').chars().take(MAX_NAME_CHARS).collect();
    }
    let route = request.extensions().get::<MatchedPath>().map_or("(unknown)", MatchedPath::as_str);
    format!("{} {route}", request.method())
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

async fn traced(State(traces): State<Traces>, request: Request, next: Next) -> Response {
    if UNTRACED.iter().any(|prefix| request.uri().path().starts_with(prefix)) {
        return next.run(request).await;
    }
    let span = traces.request(request.headers(), name(&request));
    if is_grpc(request.headers()) {
        span.set("rpc.system.name", "grpc");
    } else {
        span.set("http.request.method", request.method().as_str().to_owned());
    }
    let response = (*span).clone().scope(next.run(request)).await;
    let status = response.status();
    span.set("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.fail(status.as_str().to_owned());
    }
    note_grpc_status(&span, response.headers());
    response.map(|body| Body::new(TracedBody { body, span: Some(span) }))
}

/// A gRPC status other than OK, in the head of an answer without a body or in trailers.
fn note_grpc_status(span: &SpanGuard, headers: &HeaderMap) {
    let Some(code) = headers.get("grpc-status").map(HeaderValue::as_bytes) else { return };
    let Some(code) = std::str::from_utf8(code).ok().and_then(|code| code.parse::<i64>().ok()) else { return };
    span.set("rpc.response.status_code", code);
    if code != 0 {
        span.fail(format!("grpc {code}"));
    }
}

/// An answer's body whose end is the end of the span.
struct TracedBody {
    body: Body,
    /// None once the answer has ended.
    span: Option<SpanGuard>,
}

impl HttpBody for TracedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, span } = &mut *self;
        let trace = span.as_deref().cloned().unwrap_or_default();
        let polled = trace.scope_sync(|| Pin::new(body).poll_frame(context));
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let (Some(trailers), Some(span)) = (frame.trailers_ref(), span.as_ref()) {
                    note_grpc_status(span, trailers);
                }
            }
            Poll::Ready(Some(Err(_))) => {
                if let Some(span) = span.take() {
                    span.fail("broken off");
                }
            }
            Poll::Ready(None) => drop(span.take()),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
