//! The form of an error in each protocol's own words.
//!
//! | shape | body |
//! |---|---|
//! | native | `{"error": {"type": KIND, "message", "field"?, "choices"?, "retry_after_s"?}}` |
//! | OpenAI | `{"error": {"message", "type", "param", "code": KIND, ...}}`, with what native has beside it |
//! | Anthropic | `{"type": "error", "error": {"type", "message"}, "request_id"?}`; overload is 529 |
//! | KServe over HTTP | `{"error": MESSAGE}` |
//! | gRPC | the status, with the kind in `trustformers-error` |
//!
//! A handler returns the [`ApiError`] itself. Its response carries the error as well, so that the outermost
//! layer ([`crate::http`]) writes it again in the shape of the surface that was asked.

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::Status;

use super::ApiError;
use crate::echo::{MAX_LISTED_NAMES, echo};
use crate::encoding::ACCEPTED_ENCODINGS;

/// Milliseconds to wait before another attempt, which OpenAI's and Anthropic's clients prefer.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
/// Whether another attempt can help, which OpenAI's and Anthropic's clients obey.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Anthropic's status of an overload.
const STATUS_OVERLOADED: u16 = 529;

/// The protocol whose words an error is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorShape {
    /// This server's own routes.
    Native,
    /// OpenAI's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
    /// KServe v2 over HTTP.
    KserveHttp,
    /// A gRPC status.
    Grpc,
}

impl ErrorShape {
    /// Every shape.
    pub const ALL: &'static [Self] =
        &[Self::Native, Self::OpenAi, Self::Anthropic, Self::KserveHttp, Self::Grpc];
}

/// The error that a response tells of. It travels in the response's extensions.
#[derive(Debug, Clone)]
pub(crate) struct Refusal(pub(crate) ApiError);

impl ApiError {
    /// The HTTP status in this shape.
    #[must_use]
    pub fn status_in(&self, shape: ErrorShape) -> StatusCode {
        match (shape, self) {
            (ErrorShape::Anthropic, Self::Overloaded { .. }) => {
                StatusCode::from_u16(STATUS_OVERLOADED).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
            }
            // The status of a gRPC answer is in its trailers.
            (ErrorShape::Grpc, _) => StatusCode::OK,
            _ => self.status(),
        }
    }

    /// The body of an answer, and of an error inside a stream, in this shape. gRPC has no JSON and gets the
    /// native one.
    #[must_use]
    pub fn to_json_in(&self, shape: ErrorShape) -> Value {
        match shape {
            ErrorShape::Native | ErrorShape::Grpc => self.to_json(),
            ErrorShape::OpenAi => {
                let mut error = json!({
                    "message": self.message(),
                    "type": self.openai_type(),
                    "param": self.param().map(|param| echo(param).into_owned()),
                    "code": self.openai_code(),
                });
                self.add_details(&mut error);
                json!({ "error": error })
            }
            ErrorShape::Anthropic => json!({
                "type": "error",
                "error": {"type": self.anthropic_type(), "message": self.message()},
            }),
            ErrorShape::KserveHttp => json!({"error": self.message()}),
        }
    }

    /// An HTTP answer in this shape.
    #[must_use]
    pub fn render(&self, shape: ErrorShape) -> Response {
        self.render_for(shape, None)
    }

    /// [`Self::render`], with the id of the request where the shape has a field for it.
    pub(crate) fn render_for(&self, shape: ErrorShape, request_id: Option<&HeaderValue>) -> Response {
        if shape == ErrorShape::Grpc {
            return Status::from(self.clone()).into_http::<Body>();
        }
        let mut body = self.to_json_in(shape);
        if let (ErrorShape::Anthropic, Some(Ok(id))) = (shape, request_id.map(HeaderValue::to_str)) {
            body["request_id"] = json!(id);
        }
        let mut response = (self.status_in(shape), Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(u64::from(seconds) * 1000));
        }
        if self.is_lasting() {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if matches!(self, Self::Unauthenticated { .. }) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::UnknownRevision { .. }) {
            // A gateway that chose the revision tries another pod.
            headers.insert(super::GRPC_KIND_KEY, HeaderValue::from_static(self.kind()));
        }
        if matches!(self, Self::UnsupportedEncoding { .. }) {
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED_ENCODINGS));
        }
        response
    }

    /// Whether sending the request again cannot help: it is at fault itself, or the server stays as it is
    /// until somebody changes it.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Unavailable { retry_after_s, .. } => retry_after_s.is_none(),
            _ => self.status().is_client_error() && !matches!(self, Self::Overloaded { .. }),
        }
    }

    /// The field at fault.
    fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidRequest { field, .. } => field.as_deref(),
            Self::ModelRequired { .. } | Self::WrongTask { .. } | Self::UnknownModel { .. } => Some("model"),
            Self::UnknownRevision { .. } => Some(crate::revision::REVISION_HEADER),
            _ => None,
        }
    }

    fn openai_type(&self) -> &'static str {
        match self {
            Self::Overloaded { .. } => "rate_limit_error",
            Self::Unavailable { .. } | Self::Timeout { .. } | Self::Internal { .. } => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn openai_code(&self) -> &'static str {
        match self {
            Self::UnknownModel { .. } => "model_not_found",
            other => other.kind(),
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self {
            Self::InvalidRequest { .. }
            | Self::ModelRequired { .. }
            | Self::WrongTask { .. }
            | Self::MethodNotAllowed { .. }
            | Self::Conflict { .. }
            | Self::UnsupportedEncoding { .. } => "invalid_request_error",
            Self::UnknownModel { .. } | Self::UnknownRevision { .. } | Self::UnknownRoute { .. } => {
                "not_found_error"
            }
            Self::Unauthenticated { .. } => "authentication_error",
            Self::Forbidden { .. } => "permission_error",
            Self::TooLong { .. } => "request_too_large",
            Self::Overloaded { .. } => "overloaded_error",
            Self::Timeout { .. } => "timeout_error",
            Self::Unavailable { .. } | Self::Internal { .. } => "api_error",
        }
    }

    /// What this server says of an error beyond other protocols' fields.
    pub(super) fn add_details(&self, error: &mut Value) {
        match self {
            Self::InvalidRequest { field: Some(field), .. } => error["field"] = json!(echo(field)),
            Self::ModelRequired { choices } | Self::UnknownModel { choices, .. } => {
                error["choices"] = json!(&choices[..choices.len().min(MAX_LISTED_NAMES)]);
            }
            _ => {}
        }
        if let Some(seconds) = self.retry_after_s() {
            error["retry_after_s"] = json!(seconds);
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.render(ErrorShape::Native);
        response.extensions_mut().insert(Refusal(self));
        response
    }
}
