//! Every way a request can fail, with its form over HTTP and over gRPC.
//!
//! | kind | HTTP | gRPC | may another server do better? |
//! |---|---|---|---|
//! | `invalid_request` | 400 | INVALID_ARGUMENT | no |
//! | `model_required` | 400 | INVALID_ARGUMENT | no |
//! | `wrong_task` | 400 | INVALID_ARGUMENT | no |
//! | `unauthenticated` | 401 + `WWW-Authenticate` | UNAUTHENTICATED | no |
//! | `forbidden` | 403 | PERMISSION_DENIED | no |
//! | `unknown_model`, `unknown_revision`, `unknown_route` | 404 | NOT_FOUND | no |
//! | `conflict` | 409 | ABORTED | no |
//! | `method_not_allowed` | 405 | UNIMPLEMENTED | no |
//! | `timeout` | 408 | DEADLINE_EXCEEDED | no |
//! | `too_long` | 413 | OUT_OF_RANGE | no |
//! | `unsupported_encoding` | 415 | UNIMPLEMENTED | no |
//! | `overloaded` | 429 + `Retry-After` | RESOURCE_EXHAUSTED | yes |
//! | `unavailable` | 503 (+ `Retry-After`) | UNAVAILABLE | where `Retry-After` is given |
//! | `internal` | 500 | INTERNAL | yes |
//!
//! What an error repeats of its request is cut ([`crate::echo`]). HTTP answers carry `{"error": {"type",
//! "message", ...}}`, or the body of the protocol that was asked ([`ErrorShape`]); gRPC answers carry the
//! message, the kind in the metadata key `trustformers-error` and, where HTTP has it, `retry-after` in
//! seconds.

mod render;

use axum::http::StatusCode;
use serde_json::{Value, json};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use trustformers_proto::Task;

use crate::echo::{MAX_MESSAGE_CHARS, echo, list, truncate};
use crate::encoding::ACCEPTED_ENCODINGS;
use crate::revision::REVISION_HEADER;
use crate::surfaces::{self, how_to_ask};

pub use render::ErrorShape;
pub(crate) use render::Refusal;

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
    /// The request does not show who sends it.
    #[error("{message}")]
    Unauthenticated {
        /// What is missing or refused, and what to send.
        message: String,
    },
    /// The request asks for something that this server does not do for its callers.
    #[error("{message}")]
    Forbidden {
        /// What is refused, and who may do it.
        message: String,
    },
    /// No model answers to this name.
    #[error("no model answers to {:?}; {}", echo(asked), known_models(choices))]
    UnknownModel {
        /// The name that was asked for.
        asked: String,
        /// Names that can be asked for.
        choices: Vec<String>,
    },
    /// The model does not serve the revision that the request insists on.
    #[error(
        "model {model:?} {}, and {:?} is asked for; leave {} out to accept any",
        loaded_revision(loaded),
        echo(asked),
        REVISION_HEADER
    )]
    UnknownRevision {
        /// The model that was asked.
        model: String,
        /// The revision that was asked for.
        asked: String,
        /// The revision that serves; may be empty.
        loaded: String,
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
    /// Another request changed meanwhile what this one is about.
    #[error("{message}")]
    Conflict {
        /// What happened, and what to do.
        message: String,
    },
    /// The body or the prompt is longer than can be served.
    #[error("{message}")]
    TooLong {
        /// How long it is and what is allowed.
        message: String,
    },
    /// The body is compressed in a way that is not known here.
    #[error("content-encoding: {encoding:?} is not supported; use one of {ACCEPTED_ENCODINGS}, or none")]
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
        /// Seconds after which another attempt makes sense. None where it makes no sense until somebody
        /// changes the server.
        retry_after_s: Option<u32>,
    },
    /// The answer was not complete in the time that the request itself allows.
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
        Task::Classify => "gives texts the scores of its labels",
        Task::Rerank => "orders documents by a query",
    }
}

fn what_to_ask(task: Task) -> String {
    let others: Vec<&str> =
        Task::ALL.iter().filter(|other| **other != task).map(|other| other.as_str()).collect();
    format!("ask it with {}, or name a model whose task is {}", how_to_ask(task), others.join(" or "))
}

fn loaded_revision(loaded: &str) -> String {
    match loaded {
        "" => "has a revision without a name".to_owned(),
        name => format!("serves revision {name:?}"),
    }
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
            Self::Unauthenticated { .. } => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::UnknownModel { .. } | Self::UnknownRevision { .. } | Self::UnknownRoute { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict { .. } => StatusCode::CONFLICT,
            Self::TooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidRequest { .. } | Self::ModelRequired { .. } | Self::WrongTask { .. } => {
                Code::InvalidArgument
            }
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::Forbidden { .. } => Code::PermissionDenied,
            Self::UnknownModel { .. } | Self::UnknownRevision { .. } | Self::UnknownRoute { .. } => {
                Code::NotFound
            }
            Self::MethodNotAllowed { .. } | Self::UnsupportedEncoding { .. } => Code::Unimplemented,
            Self::Conflict { .. } => Code::Aborted,
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
        self.add_details(&mut error);
        json!({ "error": error })
    }

    /// The engine ended an answer without saying why.
    pub(crate) fn ended_early() -> Self {
        let message = "the engine ended the answer without a reason; its log says more".to_owned();
        Self::Internal { message }
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
pub(crate) mod tests;
