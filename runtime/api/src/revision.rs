//! The revision and the digest of a model: named by answers, and asked for by requests that accept no other.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::ApiError;

/// HTTP header, and gRPC metadata key. In a request: the revision that must answer. In an answer: the one
/// that did, as the server's configuration names it.
pub const REVISION_HEADER: &str = "x-trustformers-revision";
/// HTTP header, and gRPC metadata key, of a request that a gateway routed by a name that its pods do not
/// have: the route of an A/B test. `1`: the only model of the pod is meant, whatever name the request has.
/// Another value is the name of the model that is meant.
pub const ROUTED_HEADER: &str = "x-trustformers-routed";
/// HTTP header, and gRPC metadata key, of an answer: sha256 of the weights, 64 hex digits.
pub const DIGEST_HEADER: &str = "x-trustformers-digest";

/// The longest name of a revision. Kubernetes' names have at most 253 characters.
pub(crate) const MAX_REVISION_BYTES: usize = 256;

/// The revision that headers or metadata ask for.
///
/// # Errors
/// A name that is no visible ASCII text, or too long.
pub(crate) fn of_headers(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(REVISION_HEADER) else { return Ok(None) };
    let bytes = value.as_bytes();
    if bytes.len() > MAX_REVISION_BYTES {
        let why = format!("{} bytes are more than the {MAX_REVISION_BYTES} that are allowed", bytes.len());
        return Err(ApiError::field(REVISION_HEADER, why));
    }
    match value.to_str() {
        Ok("") => Ok(None),
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(ApiError::field(REVISION_HEADER, "is not ASCII text")),
    }
}

/// The name by which the model of a request is found: the request's own, or what a gateway has found already,
/// which is none where the only model is meant.
pub(crate) fn addressed(headers: &HeaderMap, name: Option<String>) -> Option<String> {
    match headers.get(ROUTED_HEADER) {
        None => name,
        Some(routed) if routed == "1" => None,
        Some(routed) => routed.to_str().ok().map(str::to_owned),
    }
}

/// The headers that name what answered. An empty revision, or one that no header can carry, is left out.
pub(crate) fn answer_headers(revision: &str, digest: &str) -> HeaderMap {
    let named = [(REVISION_HEADER, revision), (DIGEST_HEADER, digest)];
    let given = named.into_iter().filter(|(_, value)| !value.is_empty());
    given
        .filter_map(|(name, value)| Some((HeaderName::from_static(name), HeaderValue::from_str(value).ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_text_of_a_bounded_length() {
        let read = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).unwrap();
            of_headers(&HeaderMap::from_iter([(HeaderName::from_static(REVISION_HEADER), value)]))
        };
        assert_eq!(of_headers(&HeaderMap::new()).unwrap(), None);
        assert_eq!(read(b"r-1").unwrap().as_deref(), Some("r-1"));
        assert_eq!(read(b"").unwrap(), None);
        for (value, why) in [(&b"\xff"[..], "ASCII"), (&[b'a'; 257][..], "257 bytes")] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.starts_with(REVISION_HEADER) && error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_request_that_a_gateway_routed_names_no_model() {
        let name = || Some("team/route".to_owned());
        assert_eq!(addressed(&HeaderMap::new(), name()), name());
        let value = HeaderValue::from_static("1");
        let headers = HeaderMap::from_iter([(HeaderName::from_static(ROUTED_HEADER), value)]);
        assert_eq!(addressed(&headers, name()), None);
        let value = HeaderValue::from_static("b");
        let headers = HeaderMap::from_iter([(HeaderName::from_static(ROUTED_HEADER), value)]);
        assert_eq!(addressed(&headers, name()).as_deref(), Some("b"));
    }

    #[test]
    fn an_answer_names_what_is_known() {
        let headers = answer_headers("r1", "d1");
        assert!(headers[REVISION_HEADER] == "r1" && headers[DIGEST_HEADER] == "d1", "{headers:?}");
        let headers = answer_headers("", "d1");
        assert!(!headers.contains_key(REVISION_HEADER) && headers.len() == 1);
    }
}
