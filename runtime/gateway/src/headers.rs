//! What a proxy does to headers: it drops those of one hop and adds the address that it forwards for.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderValue};

/// Identifies a request in all logs.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The addresses that a request came through, the original caller's first.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Longer ids are replaced, because every log line repeats them.
const REQUEST_ID_MAX_BYTES: usize = 128;

/// Headers that belong to one connection.
const ONE_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Removes the headers of one hop, including those that `Connection` names.
pub(crate) fn strip_one_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&ONE_HOP) {
        headers.remove(name);
    }
}

/// Converts the headers of a caller to those that a pod gets.
pub(crate) fn forwarded(mut headers: HeaderMap, caller: IpAddr, request_id: HeaderValue) -> HeaderMap {
    // gRPC requires `te: trailers` on every hop.
    let trailers = headers.get(TE).is_some_and(|value| value == "trailers");
    strip_one_hop(&mut headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    // HTTP/2 sends the host as the authority, the length is that of the body that is sent, and a buffered
    // body needs no `100 Continue`.
    for name in [HOST, CONTENT_LENGTH, EXPECT] {
        headers.remove(name);
    }
    let mut chain = Vec::new();
    for earlier in headers.get_all(FORWARDED_FOR) {
        chain.extend_from_slice(earlier.as_bytes());
        chain.extend_from_slice(b", ");
    }
    // An IPv4 caller on a dual-stack listener is an IPv4 caller.
    chain.extend_from_slice(caller.to_canonical().to_string().as_bytes());
    if let Ok(chain) = HeaderValue::from_bytes(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    headers.insert(REQUEST_ID, request_id);
    headers
}

/// The caller's id for the request, or a new one.
pub(crate) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| {
        !id.is_empty() && id.len() <= REQUEST_ID_MAX_BYTES && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        let mut buffer = uuid::Uuid::encode_buffer();
        // An id has to be unique, not secret, so no system call is needed.
        let id = uuid::Builder::from_random_bytes(fastrand::u128(..).to_be_bytes()).into_uuid();
        let text = id.hyphenated().encode_lower(&mut buffer);
        // Hexadecimal digits and hyphens are always a valid value.
        HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("-"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn headers_of_one_hop_do_not_reach_the_pod() {
        let caller = map(&[
            ("connection", "keep-alive, x-private"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMA"),
            ("te", "trailers"),
            ("host", "example.org"),
            ("content-length", "12"),
            ("expect", "100-continue"),
            ("x-private", "1"),
            ("authorization", "Bearer t"),
            ("x-user-id", "u"),
            ("x-trustformers-priority", "low"),
            ("x-gateway-inference-fairness-id", "team-1"),
        ]);
        let sent = forwarded(caller, "192.0.2.7".parse().unwrap(), HeaderValue::from_static("id"));
        let mut names: Vec<&str> = sent.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "authorization",
                "te",
                "x-forwarded-for",
                "x-gateway-inference-fairness-id",
                "x-request-id",
                "x-trustformers-priority",
                "x-user-id"
            ]
        );
        // The pod decides on priority and fairness.
        assert_eq!(sent["x-trustformers-priority"], "low");
        assert_eq!(sent["x-gateway-inference-fairness-id"], "team-1");
        assert_eq!(sent["te"], "trailers");
        assert_eq!(sent[FORWARDED_FOR], "192.0.2.7");
    }

    #[test]
    fn the_caller_is_added_to_x_forwarded_for() {
        let caller = map(&[("x-forwarded-for", "198.51.100.1"), ("x-forwarded-for", "198.51.100.2")]);
        let sent = forwarded(caller, "::ffff:192.0.2.7".parse().unwrap(), HeaderValue::from_static("id"));
        assert_eq!(sent[FORWARDED_FOR], "198.51.100.1, 198.51.100.2, 192.0.2.7");
        assert_eq!(sent.get_all(FORWARDED_FOR).iter().count(), 1);
    }

    #[test]
    fn a_valid_request_id_stays_and_others_are_replaced() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1")])), "abc-1");
        let made = request_id(&map(&[("x-request-id", "two words")]));
        assert_eq!(made.len(), 36);
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
