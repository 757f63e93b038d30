//! What callers are told when the gateway itself can't serve them, in the protocol they speak.
//!
//! HTTP callers get `{"error": {"type", "message", ...}}`, the shape that pods use. gRPC callers get a status in the
//! head of the answer, which every gRPC library reads; an HTTP error would reach them as "unknown". Where a pod has the
//! same kind of error, its name is the same here.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use trustformers_api::error::GRPC_KIND_KEY;

use crate::body::Body;
use crate::metrics::Protocol;

/// Names listed in a message; a platform may have thousands.
const CHOICES_LISTED: usize = 50;

/// Why a request was not answered by a pod.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatewayError {
    /// No such path.
    #[error("there is no {path} here; models answer POST requests below /v1/, and GET /v1/models lists them")]
    NoSuchPath { path: String },
    /// The path takes another method.
    #[error("{path} takes {allowed} requests")]
    Method { path: String, allowed: &'static str },
    /// Loading by hand is not for gateways.
    #[error("models are loaded and unloaded by the operator: create, change or delete the InferenceModel")]
    Operated,
    /// No such gRPC method.
    #[error("the gateway does not serve {path}")]
    Unimplemented { path: String },
    /// More bytes than the limit.
    #[error("the request's body is longer than {limit_bytes} bytes")]
    TooLarge { limit_bytes: usize },
    /// The body did not come in time.
    #[error("the request's body did not come within {} s", limit.as_secs())]
    BodyTimeout { limit: std::time::Duration },
    /// The body broke off.
    #[error("the request's body broke off: {0}")]
    BodyLost(hyper::Error),
    /// The bodies of other requests fill the memory set aside for them.
    #[error("the gateway holds too many requests' bodies at the moment; try again")]
    Overloaded,
    /// The body can't be read for the model's name.
    #[error("the request's body is not valid: {0}")]
    Malformed(String),
    /// The body is compressed.
    #[error("the request's body is encoded as {0}; send it unencoded")]
    Encoded(String),
    /// No route has this name.
    #[error("there is no model {model:?}; {}", listed(choices))]
    UnknownModel { model: String, choices: Vec<String> },
    /// No route of a table that may be out of date has this name.
    #[error(
        "there is no model {model:?} in the last routing table, and the operator, who may know of it, is out of reach; try again"
    )]
    UnknownYet { model: String },
    /// A name is needed.
    #[error("the request names no model; {}", listed(choices))]
    NameRequired { choices: Vec<String> },
    /// No table came yet.
    #[error("the gateway has no routing table yet; try again in a moment")]
    NoTable,
    /// The route has no pods.
    #[error("no pod of {route} is ready; try again, or see the InferenceModel's status")]
    NoEndpoint { route: String },
    /// No pod could be connected to.
    #[error("no pod of {route} could be reached after {attempts} attempt(s): {cause}")]
    Unreachable { route: String, attempts: u32, cause: String },
    /// A pod broke off before its answer began.
    #[error("a pod of {route} broke off before it answered, after {attempts} attempt(s): {cause}")]
    BadUpstream { route: String, attempts: u32, cause: String },
    /// No answer began in time.
    #[error("{route} did not begin to answer within {limit_ms} ms")]
    FirstByteTimeout { route: String, limit_ms: u128 },
}

fn listed(choices: &[String]) -> String {
    match choices {
        [] => "no model is being served".to_owned(),
        _ if choices.len() > CHOICES_LISTED => {
            let more = choices.len() - CHOICES_LISTED;
            format!(
                "choose one of: {} and {more} more (GET /v1/models)",
                choices[..CHOICES_LISTED].join(", ")
            )
        }
        _ => format!("choose one of: {}", choices.join(", ")),
    }
}

impl GatewayError {
    /// The `type` in the body, and the metric's label.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::NoSuchPath { .. } => "unknown_route",
            Self::Method { .. } => "method_not_allowed",
            Self::Operated => "operated",
            Self::Unimplemented { .. } => "unimplemented",
            Self::TooLarge { .. } => "too_long",
            Self::BodyTimeout { .. } => "request_timeout",
            Self::BodyLost(_) | Self::Malformed(_) => "invalid_request",
            Self::Encoded(_) => "unsupported_encoding",
            Self::Overloaded => "overloaded",
            Self::UnknownModel { .. } => "unknown_model",
            Self::NameRequired { .. } => "model_required",
            Self::UnknownYet { .. } => "table_outdated",
            Self::NoTable => "no_table",
            Self::NoEndpoint { .. } => "unavailable",
            Self::Unreachable { .. } => "unreachable",
            Self::BadUpstream { .. } => "bad_upstream",
            Self::FirstByteTimeout { .. } => "timeout",
        }
    }

    /// HTTP's status for it.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchPath { .. } | Self::UnknownModel { .. } => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Operated => StatusCode::FORBIDDEN,
            Self::Unimplemented { .. } => StatusCode::NOT_IMPLEMENTED,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::BodyLost(_) | Self::Malformed(_) | Self::NameRequired { .. } => StatusCode::BAD_REQUEST,
            Self::Encoded(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded | Self::UnknownYet { .. } | Self::NoTable | Self::NoEndpoint { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Unreachable { .. } | Self::BadUpstream { .. } => StatusCode::BAD_GATEWAY,
            Self::FirstByteTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// gRPC's code for it.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NoSuchPath { .. } | Self::Method { .. } | Self::Unimplemented { .. } => Code::Unimplemented,
            Self::Operated => Code::PermissionDenied,
            Self::TooLarge { .. } => Code::OutOfRange,
            Self::BodyTimeout { .. } | Self::FirstByteTimeout { .. } => Code::DeadlineExceeded,
            Self::BodyLost(_) | Self::Malformed(_) | Self::NameRequired { .. } => Code::InvalidArgument,
            Self::Encoded(_) => Code::Unimplemented,
            Self::UnknownModel { .. } => Code::NotFound,
            Self::Overloaded | Self::UnknownYet { .. } | Self::NoTable | Self::NoEndpoint { .. } => {
                Code::Unavailable
            }
            Self::Unreachable { .. } | Self::BadUpstream { .. } => Code::Unavailable,
        }
    }

    /// The answer in the caller's protocol.
    pub(crate) fn answer(&self, protocol: Protocol) -> Response<Body> {
        let mut response = match protocol {
            Protocol::Grpc => {
                let mut status = Status::new(self.code(), self.to_string());
                status.metadata_mut().insert(GRPC_KIND_KEY, MetadataValue::from_static(self.kind()));
                status.into_http()
            }
            Protocol::Http => self.http_answer(),
        };
        if matches!(self, Self::Encoded(_)) {
            response.headers_mut().insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
        }
        response
    }

    fn http_answer(&self) -> Response<Body> {
        let mut error = serde_json::json!({"type": self.kind(), "message": self.to_string()});
        if let Self::UnknownModel { choices, .. } | Self::NameRequired { choices } = self {
            let first = &choices[..choices.len().min(CHOICES_LISTED)];
            error["choices"] = first.into();
        }
        let body = serde_json::json!({"error": error}).to_string();
        let mut response = Response::new(Body::local(Bytes::from(body)));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            // A table or a pod that is missing now is usually there a second later.
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if let Self::Method { allowed, .. } = self {
            headers.insert(http::header::ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn http_callers_get_json_with_the_choices() {
        let error = GatewayError::UnknownModel {
            model: "x".to_owned(),
            choices: vec!["default/a".to_owned(), "default/b".to_owned()],
        };
        let response = error.answer(Protocol::Http);
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(json["error"]["type"], "unknown_model");
        assert_eq!(json["error"]["choices"], serde_json::json!(["default/a", "default/b"]));
        let message = json["error"]["message"].as_str().unwrap();
        assert!(message.contains("\"x\"") && message.contains("default/b"), "{message}");
    }

    #[test]
    fn grpc_callers_get_a_status_in_the_head() {
        let response = GatewayError::NoTable.answer(Protocol::Grpc);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(response.headers()[GRPC_KIND_KEY], "no_table");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
    }

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let choices: Vec<String> = (0..1000).map(|index| format!("default/m{index}")).collect();
        let text = GatewayError::NameRequired { choices }.to_string();
        assert!(text.contains("and 950 more"), "{text}");
    }

    #[test]
    fn what_passes_soon_says_when_to_come_back() {
        let response = GatewayError::NoEndpoint { route: "default/a".to_owned() }.answer(Protocol::Http);
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
    }
}
