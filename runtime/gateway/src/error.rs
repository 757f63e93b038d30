//! The errors of the gateway itself.
//!
//! `error_shape` writes them in the words of each protocol. An error that pods have too has the same name,
//! status and code here.
//!
//! An error quotes at most [`MAX_ECHO_CHARS`] characters of a request and lists at most [`MAX_LISTED_NAMES`]
//! names.

use std::fmt;
use std::sync::Arc;

use http::StatusCode;
use tonic::Code;
use trustformers_api::echo::{MAX_ECHO_CHARS, MAX_LISTED_NAMES};

use crate::limits::Resource;

/// Bytes of all names that an error lists. gRPC libraries refuse heads above 8 KiB or 16 KiB, and the message
/// is a header there.
const CHOICES_BYTES: usize = 4 << 10;
/// What callers are told to wait. A table, a pod or a share that is missing now is usually there a second
/// later.
const RETRY_AFTER_S: u32 = 1;

/// Text of a request, escaped and cut for an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Echo(String);

impl Echo {
    /// At most [`MAX_ECHO_CHARS`] characters of a text.
    pub(crate) fn new(text: &str) -> Self {
        let mut echo = String::new();
        let mut left_chars = MAX_ECHO_CHARS;
        for character in text.chars() {
            let escaped = character.escape_debug();
            // One character stays free for the mark of the cut.
            if escaped.len() >= left_chars {
                echo.push('…');
                break;
            }
            left_chars -= escaped.len();
            // Quotes stand in JSON and in messages as they are; only what can't be printed is escaped.
            if escaped.len() == 2 && !character.is_control() {
                echo.push(character);
            } else {
                echo.extend(escaped);
            }
        }
        Self(echo)
    }

    /// The same of bytes that may not be UTF-8.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        // No character is longer than four bytes.
        Self::new(&String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_ECHO_CHARS)]))
    }
}

impl fmt::Display for Echo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The names that a caller can choose from, cut to what an error lists. Made once for each table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Choices {
    listed: Vec<String>,
    more: usize,
}

impl<'a> FromIterator<&'a str> for Choices {
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        let mut choices = Self::default();
        let mut bytes = 0;
        for name in names {
            bytes += name.len();
            if choices.more > 0 || choices.listed.len() == MAX_LISTED_NAMES || bytes > CHOICES_BYTES {
                choices.more += 1;
            } else {
                choices.listed.push(name.to_owned());
            }
        }
        choices
    }
}

impl Choices {
    /// The names that are listed.
    pub(crate) fn listed(&self) -> &[String] {
        &self.listed
    }
}

impl fmt::Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.listed[..], self.more) {
            ([], 0) => f.write_str("no model is being served"),
            (listed, 0) => write!(f, "choose one of: {}", listed.join(", ")),
            (listed, more) => {
                write!(f, "choose one of: {} and {more} more (GET /v1/models)", listed.join(", "))
            }
        }
    }
}

/// Why a request was not answered by a pod. The variant's kind is the `type` in the answer and the metric's
/// label.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub(crate) enum GatewayError {
    /// No such path.
    #[error("there is no route {path}; GET /v1/models lists the models, GET /openapi.json the routes")]
    #[strum(serialize = "unknown_route")]
    UnknownPath { path: Echo },
    /// The path takes another method.
    #[error("{path} takes {allowed} requests")]
    #[strum(serialize = "method_not_allowed")]
    Method { path: Echo, allowed: &'static str },
    /// Callers of a gateway do not load models.
    #[error("the operator loads and unloads models: create, change or delete the InferenceModel")]
    #[strum(serialize = "operated")]
    Operated,
    /// The same of a gateway inside another program.
    #[error("this server's configuration says which models it has: change models in its file")]
    #[strum(serialize = "configured")]
    Configured,
    /// No such gRPC method.
    #[error("the gateway does not serve {path}; server reflection lists what it serves")]
    #[strum(serialize = "unimplemented")]
    Unimplemented { path: Echo },
    /// More bytes than the limit.
    #[error("the request's body is longer than {limit_bytes} bytes")]
    #[strum(serialize = "too_long")]
    TooLarge { limit_bytes: usize },
    /// The body did not arrive in time.
    #[error("the request's body did not arrive within {} s", limit.as_secs())]
    #[strum(serialize = "request_timeout")]
    BodyTimeout { limit: std::time::Duration },
    /// The body arrives too slowly.
    #[error("the request's body stopped arriving; send it at 4 KiB/s or more")]
    #[strum(serialize = "request_timeout")]
    BodyStalled,
    /// The body broke off.
    #[error("the request's body broke off: {0}")]
    #[strum(serialize = "invalid_request")]
    BodyLost(hyper::Error),
    /// A bound on what the gateway holds is reached.
    #[error("{}", overloaded(*.0))]
    #[strum(serialize = "overloaded")]
    Overloaded(Resource),
    /// The model's name can't be read in the body.
    #[error("the request's body is not valid: {0}")]
    #[strum(serialize = "invalid_request")]
    Malformed(Echo),
    /// The body is compressed in a way that is not known.
    #[error("the request's body is encoded as {0}; use one of {ACCEPTED_ENCODINGS}, or none")]
    #[strum(serialize = "unsupported_encoding")]
    Encoded(Echo),
    /// No route has this name.
    #[error("there is no model \"{model}\"; {choices}")]
    #[strum(serialize = "unknown_model")]
    UnknownModel { model: Echo, choices: Arc<Choices> },
    /// No route of a table that may be out of date has this name.
    #[error(
        "there is no model \"{model}\" in the last routing table, and the operator is not connected, so the model may be newer; try again"
    )]
    #[strum(serialize = "table_outdated")]
    UnknownWhileDisconnected { model: Echo },
    /// A name is needed.
    #[error("the request names no model; {choices}")]
    #[strum(serialize = "model_required")]
    NameRequired { choices: Arc<Choices> },
    /// No table has arrived yet.
    #[error("the gateway has no routing table yet; try again in a moment")]
    #[strum(serialize = "no_table")]
    NoTable,
    /// The route has no pods.
    #[error("no pod of {route} is ready; try again, or see the InferenceModel's status")]
    #[strum(serialize = "unavailable")]
    NoEndpoint { route: String },
    /// No pod could be connected to.
    #[error("no pod of {route} could be reached after {attempts} attempt(s): {cause}")]
    #[strum(serialize = "unreachable")]
    Unreachable { route: String, attempts: u32, cause: String },
    /// A pod broke off before its answer began.
    #[error("a pod of {route} broke off before it answered, after {attempts} attempt(s): {cause}")]
    #[strum(serialize = "bad_upstream")]
    BadUpstream { route: String, attempts: u32, cause: String },
    /// No answer began in time.
    #[error("{route} did not begin to answer within {limit_ms} ms")]
    #[strum(serialize = "timeout")]
    FirstByteTimeout { route: String, limit_ms: u128 },
    /// No pod came in the time in which requests are held.
    #[error(
        "no pod of {route} became ready within {limit_ms} ms; try again, or see the InferenceModel's status"
    )]
    #[strum(serialize = "unavailable")]
    HeldTooLong { route: String, limit_ms: u128 },
    /// The route belongs to a pod, and no pod is asked.
    #[error("a gateway does not answer {path}; {instead}")]
    #[strum(serialize = "unknown_route")]
    NotHere { path: Echo, instead: &'static str },
    /// The connection cannot become a WebSocket.
    #[error("{0}")]
    #[strum(serialize = "invalid_request")]
    NoUpgrade(String),
    /// The gateway does not remember a request with this id.
    #[error(
        "no request of this user with the id {id} is remembered; send feedback within minutes, with the x-request-id of its answer and, where the route has an A/B test, the user's header of the request or the token of the answer"
    )]
    #[strum(serialize = "unknown_request")]
    UnknownRequest { id: Echo },
    /// A fault of the gateway.
    #[error("{message}")]
    #[strum(serialize = "internal")]
    Internal { message: String },
}

/// The encodings of bodies that pods decode, and that the gateway looks into.
pub(crate) const ACCEPTED_ENCODINGS: &str = "gzip, deflate, br, zstd";

fn overloaded(resource: Resource) -> String {
    let what = match resource {
        Resource::BodyBytes => "bytes of request bodies",
        Resource::Requests => "requests in flight",
        Resource::Connections => "connections",
        Resource::Listings => "lists and metrics that are being read",
        Resource::HeldRequests => "requests for models without a pod",
        Resource::HeldBytes => "bytes of requests for models without a pod",
    };
    format!("the gateway holds too many {what}, of all callers or of this one; try again later")
}

impl GatewayError {
    /// The `type` in the answer, and the metric's label.
    pub(crate) fn kind(&self) -> &'static str {
        self.into()
    }

    /// HTTP's status for it.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::UnknownPath { .. }
            | Self::UnknownModel { .. }
            | Self::NotHere { .. }
            | Self::UnknownRequest { .. } => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Operated | Self::Configured => StatusCode::FORBIDDEN,
            Self::Unimplemented { .. } => StatusCode::NOT_IMPLEMENTED,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout { .. } | Self::BodyStalled => StatusCode::REQUEST_TIMEOUT,
            Self::BodyLost(_) | Self::Malformed(_) | Self::NameRequired { .. } | Self::NoUpgrade(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Encoded(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::UnknownWhileDisconnected { .. }
            | Self::NoTable
            | Self::NoEndpoint { .. }
            | Self::HeldTooLong { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unreachable { .. } | Self::BadUpstream { .. } => StatusCode::BAD_GATEWAY,
            Self::FirstByteTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// gRPC's code for it.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::UnknownPath { .. }
            | Self::Method { .. }
            | Self::Unimplemented { .. }
            | Self::NotHere { .. } => Code::Unimplemented,
            Self::Operated | Self::Configured => Code::PermissionDenied,
            Self::TooLarge { .. } => Code::OutOfRange,
            Self::BodyTimeout { .. } | Self::BodyStalled | Self::FirstByteTimeout { .. } => {
                Code::DeadlineExceeded
            }
            Self::BodyLost(_) | Self::Malformed(_) | Self::NameRequired { .. } | Self::NoUpgrade(_) => {
                Code::InvalidArgument
            }
            Self::Internal { .. } => Code::Internal,
            Self::Encoded(_) => Code::Unimplemented,
            Self::UnknownModel { .. } | Self::UnknownRequest { .. } => Code::NotFound,
            Self::Overloaded(_) => Code::ResourceExhausted,
            Self::UnknownWhileDisconnected { .. }
            | Self::NoTable
            | Self::NoEndpoint { .. }
            | Self::HeldTooLong { .. } => Code::Unavailable,
            Self::Unreachable { .. } | Self::BadUpstream { .. } => Code::Unavailable,
        }
    }

    /// Seconds after which another attempt makes sense.
    pub(crate) fn retry_after_s(&self) -> Option<u32> {
        let status = self.status();
        let retryable = status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE;
        retryable.then_some(RETRY_AFTER_S)
    }

    /// Whether the caller may still be sending a body that is worth reading to its end, so that the caller
    /// sees this answer. A caller that stopped sending is not waited for.
    pub(crate) fn discards_body(&self) -> bool {
        !matches!(self, Self::BodyTimeout { .. } | Self::BodyStalled | Self::BodyLost(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let names: Vec<String> = (0..1000).map(|index| format!("default/m{index}")).collect();
        let choices: Choices = names.iter().map(String::as_str).collect();
        let text = choices.to_string();
        assert!(text.contains("and 968 more"), "{text}");
        let long: Vec<String> = (0..100).map(|index| format!("{index:0300}")).collect();
        let choices: Choices = long.iter().map(String::as_str).collect();
        assert!(choices.to_string().len() < 5000);
        assert!(choices.to_string().contains("and 87 more"), "{choices}");
    }

    #[test]
    fn an_echo_has_at_most_200_characters() {
        assert_eq!(Echo::new("a \"b\" 'c' é").to_string(), "a \"b\" 'c' é");
        assert_eq!(Echo::new("a\nb\u{0}").to_string(), "a\\nb\\0");
        for text in ["a".repeat(1 << 20), "\u{0}".repeat(1 << 20), "\"é\u{1f600}\n".repeat(1 << 18)] {
            let echo = Echo::new(&text).to_string();
            assert!(echo.ends_with('…') && echo.chars().count() <= MAX_ECHO_CHARS, "{echo}");
        }
        let echo = Echo::of_bytes(&[0xff; 5000]).to_string();
        assert!(echo.chars().count() <= MAX_ECHO_CHARS, "{echo}");
    }
}
