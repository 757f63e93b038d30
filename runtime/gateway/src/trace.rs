//! The span of a request that a pod answers. Each attempt is a part of it, and the pod's own span a part of
//! the attempt.

use http::{Request, StatusCode};
use trustformers_api::surfaces::Surface;
use trustformers_telemetry::traces::{SpanGuard, Traces};

/// The span of a request, as a part of its caller's trace; none where no pod is asked.
pub(crate) fn request_span<B>(
    traces: &Traces,
    surface: Option<&'static Surface>,
    request: &Request<B>,
) -> SpanGuard {
    let Some(surface) = surface else { return SpanGuard::default() };
    let span = traces.request(request.headers(), surface.name);
    span.set("http.request.method", request.method().as_str().to_owned());
    span
}

/// The status of the answer's head.
pub(crate) fn note_status(span: &SpanGuard, status: StatusCode) {
    span.set("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.fail(status.as_str().to_owned());
    }
}
