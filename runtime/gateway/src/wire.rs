//! The protocol of a request on the wire, which decides how messages are framed and how errors look.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};

use crate::metrics::Protocol;

/// A protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    /// JSON and server-sent events.
    Http,
    /// gRPC.
    Grpc,
    /// gRPC-Web: messages as in gRPC, trailers inside the body.
    GrpcWeb,
    /// The same in base64.
    GrpcWebText,
}

impl Wire {
    /// The protocol that a request's headers say.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let Some(kind) = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes) else { return Self::Http };
        let Some(rest) = kind.strip_prefix(b"application/grpc") else { return Self::Http };
        if rest.starts_with(b"-web-text") {
            Self::GrpcWebText
        } else if rest.starts_with(b"-web") {
            Self::GrpcWeb
        } else {
            Self::Grpc
        }
    }

    /// The label in metrics, and which port of a pod is called.
    pub(crate) fn protocol(self) -> Protocol {
        match self {
            Self::Http => Protocol::Http,
            Self::Grpc | Self::GrpcWeb | Self::GrpcWebText => Protocol::Grpc,
        }
    }

    /// The content type of the gateway's own answers.
    pub(crate) fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Http => "application/json",
            Self::Grpc => "application/grpc",
            Self::GrpcWeb => "application/grpc-web+proto",
            Self::GrpcWebText => "application/grpc-web-text+proto",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_type_says_the_protocol() {
        for (kind, wire) in [
            ("application/json", Wire::Http),
            ("application/grpc", Wire::Grpc),
            ("application/grpc+proto", Wire::Grpc),
            ("application/grpc-web", Wire::GrpcWeb),
            ("application/grpc-web+proto", Wire::GrpcWeb),
            ("application/grpc-web-text+proto", Wire::GrpcWebText),
        ] {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
            assert_eq!(Wire::of(&headers), wire, "{kind}");
        }
        assert_eq!(Wire::of(&HeaderMap::new()), Wire::Http);
    }
}
