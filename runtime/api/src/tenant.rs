//! The tenant of a request: a header that gateways set, so that no tenant crowds out the others.

use axum::http::HeaderMap;

use crate::error::ApiError;

/// HTTP header, and gRPC metadata key, that names the tenant. The name is the Gateway API inference
/// extension's.
pub const TENANT_HEADER: &str = "x-gateway-inference-fairness-id";

/// The longest name of a tenant. Each request of the tenant holds a copy of it.
const MAX_TENANT_BYTES: usize = 256;

/// The tenant that headers or metadata name.
///
/// # Errors
/// A name that is no text, or too long.
pub(crate) fn of_headers(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(TENANT_HEADER) else { return Ok(None) };
    let bytes = value.as_bytes();
    if bytes.len() > MAX_TENANT_BYTES {
        let why = format!("{} bytes are more than the {MAX_TENANT_BYTES} that are allowed", bytes.len());
        return Err(ApiError::field(TENANT_HEADER, why));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(ApiError::field(TENANT_HEADER, "is not UTF-8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn a_name_is_text_of_a_bounded_length() {
        let read = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).unwrap();
            of_headers(&HeaderMap::from_iter([(TENANT_HEADER.parse().unwrap(), value)]))
        };
        assert_eq!(of_headers(&HeaderMap::new()).unwrap(), None);
        assert_eq!(read("team ä".as_bytes()).unwrap().as_deref(), Some("team ä"));
        for (value, why) in [(&b"\xff"[..], "UTF-8"), (&[b'a'; 257][..], "257 bytes")] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.starts_with(TENANT_HEADER) && error.contains(why), "{error}");
        }
    }
}
