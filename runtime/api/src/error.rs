//! Every way a request can fail, with its form over HTTP and over gRPC.
//!
//! | kind | HTTP | gRPC | may another server do better? |
//! |---|---|---|---|
//! | `invalid_request` | 400 | INVALID_ARGUMENT | no |
//! | `model_required` | 400 | INVALID_ARGUMENT | no |
//! | `wrong_task` | 400 | INVALID_ARGUMENT | no |
//! | `unknown_model`, `unknown_route` | 404 | NOT_FOUND | no |
//! | `method_not_allowed` | 405 | UNIMPLEMENTED | no |
//! | `too_long` | 413 | OUT_OF_RANGE | no |
//! | `unsupported_encoding` | 415 | UNIMPLEMENTED | no |
//! | `overloaded` | 429 + `Retry-After` | RESOURCE_EXHAUSTED | yes |
//! | `unavailable` | 503 (+ `Retry-After`) | UNAVAILABLE | yes |
//! | `timeout` | 504 | DEADLINE_EXCEEDED | yes |
//! | `internal` | 500 | INTERNAL | yes |
//!
//! What an error repeats of its request is cut ([`crate::echo`]). HTTP answers carry `{"error": {"type",
//! "message", ...}}`; gRPC answers carry the message, the kind in the metadata key `trustformers-error` and,
//! where HTTP has it, `retry-after` in seconds.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use trustformers_proto::Task;

use crate::echo::{MAX_LISTED_NAMES, MAX_MESSAGE_CHARS, echo, list, truncate};
use crate::surfaces::{self, how_to_ask};

/// Metadata key of a gRPC error that holds its kind.
pub const GRPC_KIND_KEY: &str = "trustformers-error";
/// Metadata key of a gRPC error that holds the seconds to wait before the next attempt.
pub const GRPC_RETRY_AFTER_KEY: &str = "retry-after";

/// Why a request got no answer, or no complete one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
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
    #[error("several models could be meant, so the request must name one in \"model\": {}", list(choices))]
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
    #[error("no model answers to {:?}; {}", echo(asked), known_models(choices))]
    UnknownModel {
        /// The name that was asked for.
        asked: String,
        /// Names that can be asked for.
        choices: Vec<String>,
    },
    /// No such route.
    #[error(
        "there is no route {}; GET /v1/models lists the models, {} ask them",
        echo(path),
        surfaces::list_http()
    )]
    UnknownRoute {
        /// The path that was asked for.
        path: String,
    },
    /// The route exists, but not for this method.
    #[error("{} does not take {}", echo(path), echo(method))]
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
    /// The body is compressed.
    #[error("content-encoding: {encoding:?} is not supported; send the body as it is, without compression")]
    UnsupportedEncoding {
        /// The encoding, cut.
        encoding: String,
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
    /// A fault of the server.
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
        format!("known are: {}", list(choices))
    }
}

impl ApiError {
    /// A wrong field, with what is wrong and what is allowed.
    pub fn field(field: &str, message: impl std::fmt::Display) -> Self {
        let field = echo(field).into_owned();
        Self::InvalidRequest { message: format!("{field}: {message}"), field: Some(field) }
    }

    /// The kind as it stands in answers and in metric labels.
    pub fn kind(&self) -> &'static str {
        self.into()
    }

    /// The message of this error, at most [`MAX_MESSAGE_CHARS`] characters long.
    pub fn message(&self) -> String {
        truncate(&self.to_string(), MAX_MESSAGE_CHARS).into_owned()
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
            Self::UnsupportedEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
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
            Self::MethodNotAllowed { .. } | Self::UnsupportedEncoding { .. } => Code::Unimplemented,
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
        let mut error = json!({"type": self.kind(), "message": self.message()});
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
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, Self::UnsupportedEncoding { .. }) {
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        response
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let mut status = Self::new(error.code(), error.message());
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
            (ApiError::UnsupportedEncoding { encoding: text() }, 415, Code::Unimplemented),
            (ApiError::Overloaded { message: text(), retry_after_s: 2 }, 429, Code::ResourceExhausted),
            (ApiError::Unavailable { message: text(), retry_after_s: None }, 503, Code::Unavailable),
            (ApiError::Timeout { message: text() }, 504, Code::DeadlineExceeded),
            (ApiError::Internal { message: text() }, 500, Code::Internal),
        ]
    }

    #[test]
    fn each_kind_has_a_status_a_code_and_its_name_in_both() {
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
    fn overload_has_a_retry_time_in_both() {
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

    #[test]
    fn no_error_repeats_more_than_a_bounded_piece_of_its_request() {
        let long = "\u{e9}".repeat(1 << 20);
        let names: Vec<String> = (0..10_000).map(|index| format!("model-{index}")).collect();
        let errors = [
            ApiError::field(&long, "there is no such field"),
            ApiError::InvalidRequest { field: Some(long.clone()), message: long.clone() },
            ApiError::UnknownModel { asked: long.clone(), choices: names },
            ApiError::UnknownRoute { path: long.clone() },
            ApiError::MethodNotAllowed { method: long.clone(), path: long.clone() },
        ];
        for error in errors {
            assert!(error.to_json().to_string().len() < 5000, "{}", error.kind());
            assert!(Status::from(error).message().chars().count() <= MAX_MESSAGE_CHARS + 3);
        }
    }
}
