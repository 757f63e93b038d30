//! The gateway's errors in the words of the protocol that was asked.
//!
//! HTTP callers get the body that the surface's own errors have: this server's, OpenAI's, Anthropic's or
//! KServe's. gRPC callers get a status in the head of the answer, which every gRPC library reads; an HTTP
//! error would reach them as "unknown".

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, ALLOW, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use serde_json::{Value, json};
use tonic::Status;
use tonic::metadata::MetadataValue;
use trustformers_api::error::{GRPC_KIND_KEY, GRPC_RETRY_AFTER_KEY};
use trustformers_api::surfaces::error_shape;
use trustformers_api::{ApiError, ErrorShape};

use crate::body::Body;
use crate::error::{ACCEPTED_ENCODINGS, GatewayError};
use crate::wire::Wire;

/// The encodings of messages of gRPC that pods decode.
const ACCEPTED_MESSAGE_ENCODINGS: &str = "identity, gzip, zstd";

/// The request that failed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FailedRequest<'a> {
    /// Its protocol.
    pub(crate) wire: Wire,
    /// Its path.
    pub(crate) path: &'a str,
    /// Its id.
    pub(crate) id: &'a HeaderValue,
}

impl GatewayError {
    /// The answer to a request that failed.
    pub(crate) fn response(&self, request: FailedRequest<'_>) -> Response<Body> {
        if request.wire != Wire::Http {
            return self.grpc_response(request.wire);
        }
        let shape = error_shape(request.path);
        let (mut body, mut headers, status) = match shape {
            ErrorShape::Native | ErrorShape::Grpc => (self.native_json(), HeaderMap::new(), self.status()),
            shape => self.shaped(shape),
        };
        if shape == ErrorShape::Anthropic {
            body["request_id"] = json!(request.id.to_str().unwrap_or_default());
            headers.insert(HeaderName::from_static("request-id"), request.id.clone());
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        match self {
            Self::Method { allowed, .. } => {
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            Self::Encoded(_) => {
                headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED_ENCODINGS));
            }
            _ => {}
        }
        let mut response = Response::new(Body::local(Bytes::from(body.to_string())));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    fn grpc_response(&self, wire: Wire) -> Response<Body> {
        let mut status = Status::new(self.code(), self.to_string());
        let metadata = status.metadata_mut();
        metadata.insert(GRPC_KIND_KEY, MetadataValue::from_static(self.kind()));
        if let Some(seconds) = self.retry_after_s() {
            metadata.insert(GRPC_RETRY_AFTER_KEY, MetadataValue::from(seconds));
        }
        let mut response: Response<Body> = status.into_http();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, wire.content_type());
        if matches!(self, Self::Encoded(_)) {
            let accepted = HeaderName::from_static("grpc-accept-encoding");
            headers.insert(accepted, HeaderValue::from_static(ACCEPTED_MESSAGE_ENCODINGS));
        }
        response
    }

    /// This server's own words, which messages of a WebSocket have too.
    pub(crate) fn native_json(&self) -> Value {
        let mut error = json!({"type": self.kind(), "message": self.to_string()});
        if let Self::UnknownModel { choices, .. } | Self::NameRequired { choices } = self {
            error["choices"] = choices.listed().into();
        }
        if let Some(seconds) = self.retry_after_s() {
            error["retry_after_s"] = seconds.into();
        }
        json!({ "error": error })
    }

    /// Body, headers and status in the words of another protocol, as pods write them.
    fn shaped(&self, shape: ErrorShape) -> (Value, HeaderMap, StatusCode) {
        let error = self.as_pods_have_it();
        let mut body = error.to_json_in(shape);
        // OpenAI's `code` has room for what only a gateway knows; a model that is not found has OpenAI's own.
        if shape == ErrorShape::OpenAi && !matches!(self, Self::UnknownModel { .. }) {
            body["error"]["code"] = json!(self.kind());
        }
        let (head, _) = error.render(shape).into_parts();
        let own_status = head.status != error.status();
        (body, head.headers, if own_status { head.status } else { self.status() })
    }

    /// The error of a pod that is nearest to this one.
    fn as_pods_have_it(&self) -> ApiError {
        let message = self.to_string();
        let retry_after_s = self.retry_after_s();
        match self {
            Self::UnknownModel { model, choices } => {
                ApiError::UnknownModel { asked: model.to_string(), choices: choices.listed().to_vec() }
            }
            Self::NameRequired { choices } => ApiError::ModelRequired { choices: choices.listed().to_vec() },
            Self::Encoded(encoding) => ApiError::UnsupportedEncoding { encoding: encoding.to_string() },
            Self::UnknownPath { path } | Self::NotHere { path, .. } | Self::Unimplemented { path } => {
                ApiError::UnknownRoute { path: path.to_string() }
            }
            Self::Operated | Self::Configured => ApiError::Forbidden { message },
            Self::TooLarge { .. } => ApiError::TooLong { message },
            Self::Overloaded(_) => {
                ApiError::Overloaded { message, retry_after_s: retry_after_s.unwrap_or_default() }
            }
            Self::BodyTimeout { .. } | Self::BodyStalled => ApiError::Timeout { message },
            Self::Method { .. }
            | Self::BodyLost(_)
            | Self::Malformed(_)
            | Self::NoUpgrade(_)
            | Self::UnknownRequest { .. } => ApiError::InvalidRequest { field: None, message },
            Self::UnknownWhileDisconnected { .. }
            | Self::NoTable
            | Self::NoEndpoint { .. }
            | Self::HeldTooLong { .. }
            | Self::FirstByteTimeout { .. }
            | Self::Unreachable { .. }
            | Self::BadUpstream { .. } => ApiError::Unavailable { message, retry_after_s },
            Self::Internal { .. } => ApiError::Internal { message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::error::{Choices, Echo};
    use crate::limits::Resource;
    use http_body_util::BodyExt;

    fn at(error: &GatewayError, wire: Wire, path: &str) -> Response<Body> {
        error.response(FailedRequest { wire, path, id: &HeaderValue::from_static("id-1") })
    }

    async fn json(response: Response<Body>) -> Value {
        let body = response.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&body).unwrap()
    }

    fn unknown_model() -> GatewayError {
        let choices = Arc::new(["default/a", "default/b"].into_iter().collect());
        GatewayError::UnknownModel { model: Echo::new("x"), choices }
    }

    #[tokio::test]
    async fn http_callers_get_json_with_the_choices() {
        let response = at(&unknown_model(), Wire::Http, "/v1/generate");
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        let json = json(response).await;
        assert_eq!(json["error"]["type"], "unknown_model");
        assert_eq!(json["error"]["choices"], serde_json::json!(["default/a", "default/b"]));
        let message = json["error"]["message"].as_str().unwrap();
        assert!(message.contains("\"x\"") && message.contains("default/b"), "{message}");
    }

    #[tokio::test]
    async fn each_surface_has_its_own_words() {
        let openai = json(at(&unknown_model(), Wire::Http, "/v1/chat/completions")).await;
        assert_eq!(openai["error"]["code"], "model_not_found");
        assert_eq!(openai["error"]["param"], "model");
        let response = at(&GatewayError::NoTable, Wire::Http, "/openai/v1/completions");
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        let openai = json(response).await;
        assert_eq!(
            (&openai["error"]["code"], &openai["error"]["type"]),
            (&"no_table".into(), &"server_error".into())
        );
        let full = GatewayError::Overloaded(Resource::Requests);
        let response = at(&full, Wire::Http, "/v1/messages");
        assert_eq!(
            (response.status().as_u16(), &response.headers()["request-id"]),
            (529, &"id-1".parse().unwrap())
        );
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        let anthropic = json(response).await;
        assert_eq!((&anthropic["type"], &anthropic["request_id"]), (&"error".into(), &"id-1".into()));
        assert_eq!(anthropic["error"]["type"], "overloaded_error");
        let kserve = at(&unknown_model(), Wire::Http, "/v2/models/x/infer");
        assert_eq!(kserve.status(), StatusCode::NOT_FOUND);
        assert!(json(kserve).await["error"].is_string());
        let broken = GatewayError::BadUpstream { route: "d/a".into(), attempts: 1, cause: "reset".into() };
        assert_eq!(at(&broken, Wire::Http, "/v1/chat/completions").status(), StatusCode::BAD_GATEWAY);
    }

    #[test]
    fn grpc_callers_get_a_status_in_the_head() {
        for (wire, kind) in [
            (Wire::Grpc, "application/grpc"),
            (Wire::GrpcWeb, "application/grpc-web+proto"),
            (Wire::GrpcWebText, "application/grpc-web-text+proto"),
        ] {
            let response = at(&GatewayError::NoTable, wire, "/a.B/C");
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()["grpc-status"], "14");
            assert_eq!(response.headers()[GRPC_KIND_KEY], "no_table");
            assert_eq!(response.headers()[CONTENT_TYPE], kind);
        }
    }

    #[test]
    fn a_long_model_name_stays_short_in_every_header() {
        let choices = Arc::new(Choices::default());
        let error = GatewayError::UnknownModel { model: Echo::new(&"é".repeat(50_000)), choices };
        let response = at(&error, Wire::Grpc, "/a.B/C");
        // Percent-encoding triples the bytes of what is not ASCII.
        assert!(response.headers()["grpc-message"].len() < 2000);
    }

    #[tokio::test]
    async fn overload_is_429_with_retry_after() {
        let error = GatewayError::Overloaded(Resource::BodyBytes);
        let response = at(&error, Wire::Http, "/v1/generate");
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert_eq!(json(response).await["error"]["retry_after_s"], 1);
        let response = at(&error, Wire::Grpc, "/a.B/C");
        assert_eq!(response.headers()["grpc-status"], "8");
        assert_eq!(response.headers()[GRPC_RETRY_AFTER_KEY], "1");
    }

    #[test]
    fn refusals_that_pass_soon_say_when_to_retry() {
        let error = GatewayError::NoEndpoint { route: "default/a".to_owned() };
        let response = at(&error, Wire::Http, "/v1/generate");
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert_eq!(at(&error, Wire::Grpc, "/a.B/C").headers()[GRPC_RETRY_AFTER_KEY], "1");
        let error = GatewayError::Operated;
        assert!(!at(&error, Wire::Http, "/v1/models/load").headers().contains_key(RETRY_AFTER));
        assert!(!at(&error, Wire::Grpc, "/a.B/C").headers().contains_key(GRPC_RETRY_AFTER_KEY));
    }
}
