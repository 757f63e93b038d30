//! The priority class of a request: a field of the request, or a header for requests of any kind.

use axum::http::HeaderMap;
use serde_json::{Map, Value};
use trustformers_proto::v1;

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::take;

/// HTTP header, and gRPC metadata key, that gives the class where the request itself does not.
pub const PRIORITY_HEADER: &str = "x-trustformers-priority";

/// A class of requests. Models that are served by classes answer the first class first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// For interactive use.
    High,
    /// The ordinary class.
    #[default]
    Normal,
    /// For batch work.
    Low,
}

impl Priority {
    /// The word that stands for it in a header.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

const EXPECTED: &str = "\"high\", \"normal\" or \"low\"";

fn word(text: &str) -> Option<Priority> {
    match text {
        "high" => Some(Priority::High),
        "normal" => Some(Priority::Normal),
        "low" => Some(Priority::Low),
        _ => None,
    }
}

/// The class that headers or metadata give.
///
/// # Errors
/// Another word than the three.
pub fn of_headers(headers: &HeaderMap) -> Result<Option<Priority>, ApiError> {
    let Some(value) = headers.get(PRIORITY_HEADER) else { return Ok(None) };
    let found = value.to_str().ok().and_then(word);
    found.map(Some).ok_or_else(|| {
        let found = String::from_utf8_lossy(value.as_bytes());
        ApiError::field(PRIORITY_HEADER, format!("expected {EXPECTED}, found {:?}", echo(&found)))
    })
}

/// The class that a field of a JSON request gives.
pub(crate) fn of_json(object: &Map<String, Value>) -> Result<Option<Priority>, ApiError> {
    take(object, "priority", EXPECTED, |value| value.as_str().and_then(word))
}

/// The class that a field of a message gives.
pub(crate) fn of_proto(priority: i32) -> Result<Option<Priority>, ApiError> {
    match v1::Priority::try_from(priority) {
        Ok(v1::Priority::Unspecified) => Ok(None),
        Ok(v1::Priority::High) => Ok(Some(Priority::High)),
        Ok(v1::Priority::Normal) => Ok(Some(Priority::Normal)),
        Ok(v1::Priority::Low) => Ok(Some(Priority::Low)),
        Err(_) => Err(ApiError::field("priority", format!("{priority} is none of the classes 1, 2 and 3"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_take_the_three_priorities_and_refuse_others() {
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(
                axum::http::HeaderName::from_static(PRIORITY_HEADER),
                axum::http::HeaderValue::from_static(value),
            )])
        };
        assert_eq!(of_headers(&HeaderMap::new()).unwrap(), None);
        assert_eq!(of_headers(&headers("low")).unwrap(), Some(Priority::Low));
        let error = of_headers(&headers("urgent")).unwrap_err().to_string();
        assert!(
            error.starts_with("x-trustformers-priority: expected") && error.contains("urgent"),
            "{error}"
        );
    }
}
