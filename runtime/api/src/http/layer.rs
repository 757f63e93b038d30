//! The outermost layer of the HTTP routes: the id of each request, and errors in the words of the protocol
//! that was asked.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use crate::error::{ApiError, ErrorShape, Refusal};
use crate::surfaces::error_shape;

/// Identifies a request in logs and in answers.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The name that Anthropic's clients read it by.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// Longer ids of callers are replaced, because every log line repeats them.
const REQUEST_ID_MAX_BYTES: usize = 128;
/// Hexadecimal digits of an id that is made here: 96 random bits.
const REQUEST_ID_DIGITS: usize = 24;

/// The caller's id for the request, or a new one.
pub(crate) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| {
        !id.is_empty() && id.len() <= REQUEST_ID_MAX_BYTES && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        let random = uuid::Uuid::new_v4().simple().to_string();
        // Hexadecimal digits are always a valid value.
        HeaderValue::from_str(&format!("req_{}", &random[random.len() - REQUEST_ID_DIGITS..]))
            .unwrap_or(HeaderValue::from_static("req_"))
    })
}

/// The message of a caller's mistake may repeat what the caller sent, so the log has its kind alone.
pub(crate) fn log_refusal(id: &HeaderValue, error: &ApiError) {
    let kind = error.kind();
    if error.status().is_server_error() {
        tracing::debug!(request_id = ?id, kind, %error, "request failed");
    } else {
        tracing::debug!(request_id = ?id, kind, "request refused");
    }
}

/// Gives the request its id, the answer the same one, and an error the shape of the path.
pub(crate) async fn identify_and_shape(request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let shape = error_shape(request.uri().path());
    let mut response = next.run(request).await;
    if let Some(Refusal(error)) = response.extensions_mut().remove::<Refusal>() {
        log_refusal(&id, &error);
        if shape != ErrorShape::Native {
            response = error.render_for(shape, Some(&id));
        }
    }
    name_request(response.headers_mut(), shape, id);
    response
}

/// Adds the id of the request to the head of its answer.
pub(crate) fn name_request(headers: &mut HeaderMap, shape: ErrorShape, id: HeaderValue) {
    if shape == ErrorShape::Anthropic {
        headers.insert(ANTHROPIC_REQUEST_ID, id.clone());
    }
    headers.insert(REQUEST_ID, id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_id_is_kept_where_it_is_short_and_visible() {
        let with = |id: &[u8]| {
            let value = HeaderValue::from_bytes(id).unwrap();
            request_id(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(with(b"mine-1"), "mine-1");
        let long = vec![b'a'; REQUEST_ID_MAX_BYTES + 1];
        for refused in [&b""[..], b"two words", "\u{e9}".as_bytes(), &long] {
            let made = with(refused);
            let made = made.to_str().unwrap();
            assert!(made.strip_prefix("req_").is_some_and(|hex| hex.len() == REQUEST_ID_DIGITS), "{made}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
