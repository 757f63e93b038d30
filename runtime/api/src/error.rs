//! Every way a request can fail, and the one place that says how it looks over HTTP and over gRPC.
//!
//! | kind | HTTP | gRPC | may another server do better? |
//! |---|---|---|---|
//! | `invalid_request` | 400 | INVALID_ARGUMENT | no |
//! | `model_required` | 400 | INVALID_ARGUMENT | no |
//! | `wrong_task` | 400 | INVALID_ARGUMENT | no |
//! | `unknown_model`, `unknown_route` | 404 | NOT_FOUND | no |
//! | `method_not_allowed` | 405 | UNIMPLEMENTED | no |
//! | `too_long` | 413 | OUT_OF_RANGE | no |
//! | `overloaded` | 429 + `Retry-After` | RESOURCE_EXHAUSTED | yes |
//! | `unavailable` | 503 (+ `Retry-After`) | UNAVAILABLE | yes |
//! | `timeout` | 504 | DEADLINE_EXCEEDED | yes |
//! | `internal` | 500 | INTERNAL | yes |
//!
//! HTTP answers carry `{"error": {"type", "message", ...}}`; gRPC answers carry the message, the kind in the
//! metadata key `trustformers-error` and, where HTTP has it, `retry-after` in seconds.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use trustformers_proto::Task;

use crate::surfaces::how_to_ask;

/// Metadata key of a gRPC error that holds its kind.
pub const GRPC_KIND_KEY: &str = "trustformers-error";
/// Metadata key of a gRPC error that holds the seconds to wait before the next attempt.
pub const GRPC_RETRY_AFTER_KEY: &str = "retry-after";

/// Why a request got no answer, or no complete one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request itself is wrong; sending it again does not help.
    #[error("{message}")]
    InvalidRequest {
        /// The field at fault, where it is one.
        field: Option<String>,
        /// What is wrong and what is allowed.
        message: String,
    },
    /// Several models serve and the request names none.
    #[error("several models could be meant, so the request must name one in \"model\": {}", choices.join(", "))]
    ModelRequired {
        /// Names that can be asked for.
        choices: Vec<String>,
    },
    /// The model is made for something else.
    #[error("model {model:?} {}; {}", what_it_does(*task), what_to_ask(*task))]
    WrongTask {
        /// The model that was asked.
        model: String,
        /// The task that the model serves.
        task: Task,
    },
    /// No model answers to this name.
    #[error("no model answers to {asked:?}; {}", known_models(choices))]
    UnknownModel {
        /// The name that was asked for.
        asked: String,
        /// Names that can be asked for.
        choices: Vec<String>,
    },
    /// No such route.
    #[error(
        "there is no route {path}; GET /v1/models lists the models, POST /v1/generate and POST /v1/embeddings ask them"
    )]
    UnknownRoute {
        /// The path that was asked for.
        path: String,
    },
    /// The route exists, but not for this method.
    #[error("{path} does not take {method}")]
    MethodNotAllowed {
        /// The method that was used.
        method: String,
        /// The path that was asked for.
        path: String,
    },
    /// The body or the prompt is longer than can be served.
    #[error("{message}")]
    TooLong {
        /// How long it is and what is allowed.
        message: String,
    },
    /// The queue is full. Nothing of the request is kept.
    #[error("{message}")]
    Overloaded {
        /// What is full.
        message: String,
        /// Seconds after which another attempt makes sense.
        retry_after_s: u32,
    },
    /// This server cannot answer now: the model is loading, failed, or the server is ending.
    #[error("{message}")]
    Unavailable {
        /// The state or the cause, and what to do.
        message: String,
        /// Seconds after which another attempt makes sense, where that is known.
        retry_after_s: Option<u32>,
    },
    /// No answer came in the time allowed.
    #[error("{message}")]
    Timeout {
        /// Which time ran out.
        message: String,
    },
    /// Something broke that the caller cannot mend.
    #[error("{message}")]
    Internal {
        /// What broke.
        message: String,
    },
}

fn what_it_does(task: Task) -> &'static str {
    match task {
        Task::Generate => "generates text",
        Task::Embed => "turns texts into vectors",
    }
}

fn what_to_ask(task: Task) -> String {
    let others: Vec<&str> =
        Task::ALL.iter().filter(|other| **other != task).map(|other| other.as_str()).collect();
    format!("ask it with {}, or name a model whose task is {}", how_to_ask(task), others.join(" or "))
}

fn known_models(choices: &[String]) -> String {
    if choices.is_empty() {
        "none serves here now".to_owned()
    } else {
        format!("known are: {}", choices.join(", "))
    }
}

impl ApiError {
    /// A wrong field, with what is wrong and what is allowed.
    pub fn field(field: &str, message: impl std::fmt::Display) -> Self {
        Self::InvalidRequest { field: Some(field.to_owned()), message: format!("{field}: {message}") }
    }

    /// The kind as it stands in answers and in metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::InvalidRequest { .. } => "invalid_request",
            Self::ModelRequired { .. } => "model_required",
            Self::WrongTask { .. } => "wrong_task",
            Self::UnknownModel { .. } => "unknown_model",
            Self::UnknownRoute { .. } => "unknown_route",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::TooLong { .. } => "too_long",
            Self::Overloaded { .. } => "overloaded",
            Self::Unavailable { .. } => "unavailable",
            Self::Timeout { .. } => "timeout",
            Self::Internal { .. } => "internal",
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::InvalidRequest { .. } | Self::ModelRequired { .. } | Self::WrongTask { .. } => {
                StatusCode::BAD_REQUEST
            }
            Self::UnknownModel { .. } | Self::UnknownRoute { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidRequest { .. } | Self::ModelRequired { .. } | Self::WrongTask { .. } => {
                Code::InvalidArgument
            }
            Self::UnknownModel { .. } | Self::UnknownRoute { .. } => Code::NotFound,
            Self::MethodNotAllowed { .. } => Code::Unimplemented,
            Self::TooLong { .. } => Code::OutOfRange,
            Self::Overloaded { .. } => Code::ResourceExhausted,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Timeout { .. } => Code::DeadlineExceeded,
            Self::Internal { .. } => Code::Internal,
        }
    }

    /// Seconds after which another attempt makes sense, where that is known.
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::Overloaded { retry_after_s, .. } => Some(*retry_after_s),
            Self::Unavailable { retry_after_s, .. } => *retry_after_s,
            _ => None,
        }
    }

    /// The body of an HTTP answer, and of an error inside a stream: `{"error": {"type", "message", ...}}`.
    pub fn to_json(&self) -> Value {
        let mut error = json!({"type": self.kind(), "message": self.to_string()});
        match self {
            Self::InvalidRequest { field: Some(field), .. } => error["field"] = json!(field),
            Self::ModelRequired { choices } | Self::UnknownModel { choices, .. } => {
                error["choices"] = json!(choices);
            }
            _ => {}
        }
        if let Some(seconds) = self.retry_after_s() {
            error["retry_after_s"] = json!(seconds);
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut status = Self::new(error.code(), error.to_string());
        status.metadata_mut().insert(GRPC_KIND_KEY, MetadataValue::from_static(error.kind()));
        if let Some(seconds) = error.retry_after_s() {
            status.metadata_mut().insert(GRPC_RETRY_AFTER_KEY, MetadataValue::from(seconds));
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<(ApiError, u16, Code)> {
        let text = || "m".to_owned();
        vec![
            (ApiError::field("top_p", "no"), 400, Code::InvalidArgument),
            (ApiError::ModelRequired { choices: vec![text()] }, 400, Code::InvalidArgument),
            (ApiError::WrongTask { model: text(), task: Task::Embed }, 400, Code::InvalidArgument),
            (ApiError::UnknownModel { asked: text(), choices: vec![] }, 404, Code::NotFound),
            (ApiError::UnknownRoute { path: text() }, 404, Code::NotFound),
            (ApiError::MethodNotAllowed { method: text(), path: text() }, 405, Code::Unimplemented),
            (ApiError::TooLong { message: text() }, 413, Code::OutOfRange),
            (ApiError::Overloaded { message: text(), retry_after_s: 2 }, 429, Code::ResourceExhausted),
            (ApiError::Unavailable { message: text(), retry_after_s: None }, 503, Code::Unavailable),
            (ApiError::Timeout { message: text() }, 504, Code::DeadlineExceeded),
            (ApiError::Internal { message: text() }, 500, Code::Internal),
        ]
    }

    #[test]
    fn each_kind_has_its_status_and_code_and_says_its_kind_in_both() {
        for (error, status, code) in all() {
            let kind = error.kind();
            let grpc = Status::from(error.clone());
            assert_eq!(grpc.code(), code, "{kind}");
            assert_eq!(grpc.metadata().get(GRPC_KIND_KEY).unwrap(), kind);
            assert_eq!(error.to_json()["error"]["type"], kind);
            assert_eq!(error.into_response().status().as_u16(), status, "{kind}");
        }
    }

    #[test]
    fn overload_says_when_to_come_back_in_both() {
        let error = ApiError::Overloaded { message: "full".into(), retry_after_s: 3 };
        assert_eq!(Status::from(error.clone()).metadata().get(GRPC_RETRY_AFTER_KEY).unwrap(), "3");
        assert_eq!(error.into_response().headers()[header::RETRY_AFTER], "3");
    }

    #[test]
    fn an_unknown_model_lists_the_choices() {
        let error = ApiError::UnknownModel { asked: "x".into(), choices: vec!["a".into(), "b".into()] };
        assert_eq!(error.to_string(), "no model answers to \"x\"; known are: a, b");
        assert_eq!(error.to_json()["error"]["choices"], json!(["a", "b"]));
    }
}
