//! The errors of operations: which statuses a surface may answer, and their bodies in each protocol's words.

use serde_json::{Value, json};

use super::operation::JSON;
use super::schema::{constant, list, open_object, reference, text, whole, word};
use crate::error::ErrorShape;
use crate::surfaces::{ModelPlace, Surface};

/// A status of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DescribedFailure {
    /// The status.
    pub(super) status: u16,
    what: &'static str,
}

const INVALID: DescribedFailure =
    DescribedFailure { status: 400, what: "The request is wrong: the message names the field." };
const FORBIDDEN: DescribedFailure = DescribedFailure {
    status: 403,
    what: "Whoever runs the server does not allow this, or not to pages of this origin.",
};
const UNKNOWN: DescribedFailure =
    DescribedFailure { status: 404, what: "No model has this name, or not this revision." };
const CONFLICT: DescribedFailure = DescribedFailure {
    status: 409,
    what: "The versions of the model do not allow it, or changed meanwhile.",
};
const TOO_LONG: DescribedFailure =
    DescribedFailure { status: 413, what: "The body or the prompt is too long." };
const ENCODING: DescribedFailure =
    DescribedFailure { status: 415, what: "The body has an encoding that is not supported." };
const OVERLOADED: DescribedFailure =
    DescribedFailure { status: 429, what: "The queue is full; try again later." };
const OVERLOADED_ANTHROPIC: DescribedFailure =
    DescribedFailure { status: 529, what: "The queue is full; try again later." };
const INTERNAL: DescribedFailure = DescribedFailure { status: 500, what: "A fault of the server." };
const UNAVAILABLE: DescribedFailure =
    DescribedFailure { status: 503, what: "The model is not ready, or the server is ending." };
const TIMEOUT: DescribedFailure = DescribedFailure {
    status: 408,
    what: "The answer was not complete in the time that the request allows.",
};

/// The errors that a surface may answer.
pub(super) fn of(surface: &Surface, has_body: bool) -> Vec<DescribedFailure> {
    let mut found = vec![INTERNAL, FORBIDDEN];
    let names_model = matches!(surface.model, ModelPlace::JsonField | ModelPlace::PathSegment);
    if has_body || names_model || surface.task.is_some() {
        found.push(INVALID);
    }
    if has_body {
        found.extend([TOO_LONG, ENCODING]);
    }
    if names_model {
        found.extend([UNKNOWN, UNAVAILABLE]);
    }
    if surface.task.is_some() || (names_model && has_body) {
        let overloaded =
            if surface.errors == ErrorShape::Anthropic { OVERLOADED_ANTHROPIC } else { OVERLOADED };
        found.extend([overloaded, UNAVAILABLE, TIMEOUT]);
    }
    if has_body && names_model && !surface.idempotent {
        found.push(CONFLICT);
    }
    found
}

impl DescribedFailure {
    /// Its entry in the document.
    pub(super) fn describe(self, shape: ErrorShape) -> Value {
        let mut headers = json!({"x-request-id": {"$ref": "#/components/headers/x-request-id"}});
        if [OVERLOADED, OVERLOADED_ANTHROPIC, UNAVAILABLE].contains(&self) {
            headers["retry-after"] = json!({"$ref": "#/components/headers/retry-after"});
        }
        json!({
            "description": self.what,
            "headers": headers,
            "content": {JSON: {"schema": reference(schema_name(shape))}},
        })
    }
}

fn schema_name(shape: ErrorShape) -> &'static str {
    match shape {
        ErrorShape::Native | ErrorShape::Grpc => "Error",
        ErrorShape::OpenAi => "OpenAiError",
        ErrorShape::Anthropic => "AnthropicError",
        ErrorShape::KserveHttp => "KserveError",
    }
}

/// The schemas of errors, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    let message = || text("What is wrong and what to do.");
    let details = |object: super::schema::ObjectSchema| {
        object
            .sometimes("field", text("The field at fault."))
            .sometimes("choices", list(text("A name that can be asked for.")))
            .sometimes("retry_after_s", whole(0, u32::MAX.into(), "Seconds before another attempt."))
            .build()
    };
    let native = open_object()
        .required("type", text("The kind of the error, such as invalid_request or overloaded."))
        .required("message", message());
    let param = json!({"type": ["string", "null"], "description": "The field at fault."});
    let openai_types = ["invalid_request_error", "rate_limit_error", "server_error"];
    let openai = open_object()
        .required("message", message())
        .required("type", word(&openai_types, "The class of the error."))
        .required("param", param)
        .required("code", text("The kind of the error, such as invalid_request or model_not_found."));
    let anthropic = open_object()
        .required("type", text("The class of the error, such as invalid_request_error."))
        .required("message", message())
        .build();
    let anthropic = open_object()
        .required("type", constant("error"))
        .required("error", anthropic)
        .sometimes("request_id", text("The id of the request."))
        .build();
    let wrapped = |error: Value| open_object().required("error", error).build();
    vec![
        ("Error", wrapped(details(native))),
        ("OpenAiError", wrapped(details(openai))),
        ("AnthropicError", anthropic),
        ("KserveError", wrapped(message())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ApiError;
    use crate::surfaces::http_surface;
    use trustformers_proto::Task;

    fn errors() -> Vec<ApiError> {
        let text = || "m".to_owned();
        vec![
            ApiError::field("top_p", "no"),
            ApiError::ModelRequired { choices: vec![text()] },
            ApiError::WrongTask { model: text(), task: Task::Embed },
            ApiError::UnknownModel { asked: text(), choices: vec![] },
            ApiError::UnknownRevision { model: text(), asked: text(), loaded: text() },
            ApiError::TooLong { message: text() },
            ApiError::UnsupportedEncoding { encoding: text() },
            ApiError::Overloaded { message: text(), retry_after_s: 2 },
            ApiError::Unavailable { message: text(), retry_after_s: Some(1) },
            ApiError::Timeout { message: text() },
            ApiError::Internal { message: text() },
        ]
    }

    #[test]
    fn every_error_of_a_request_that_asks_a_model_is_described_with_its_members() {
        let paths = ["/v1/generate", "/v1/chat/completions", "/v1/messages", "/v2/models/m/generate"];
        for path in paths {
            let surface = http_surface("POST", path).unwrap();
            let described = of(surface, true);
            let (_, schema) =
                schemas().into_iter().find(|(name, _)| *name == schema_name(surface.errors)).unwrap();
            for error in errors() {
                let status = error.status_in(surface.errors).as_u16();
                assert!(described.iter().any(|failure| failure.status == status), "{path}: {status}");
                members_are_described(&schema, &error.to_json_in(surface.errors));
            }
        }
    }

    #[track_caller]
    fn members_are_described(schema: &Value, found: &Value) {
        let Some(members) = found.as_object() else { return };
        for name in schema["required"].as_array().unwrap() {
            assert!(members.contains_key(name.as_str().unwrap()), "{name} is missing in {found}");
        }
        for (name, value) in members {
            let member = schema["properties"].get(name).unwrap_or_else(|| panic!("{name} of {found}"));
            members_are_described(member, value);
        }
    }
}
