//! The messages of a WebSocket, read and written.

use std::collections::BTreeMap;

use axum::body::Bytes;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use crate::echo::echo;
use crate::error::ApiError;
use crate::multiplex::RequestReply;
use crate::nearest;

/// The types of messages that callers send.
const TYPES: &[&str] = &["generate", "chat", "cancel"];

/// What a caller asks.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    /// To start a request.
    Start {
        /// The route that answers it.
        route: Route,
        /// The body that the route takes.
        body: Bytes,
    },
    /// To end a request.
    Cancel,
}

/// The route that answers a type of request, with the way in which it writes its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Generate,
    Chat,
}

impl Route {
    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Generate => "/v1/generate/stream",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// A message of a caller.
#[derive(Debug, PartialEq)]
pub(super) struct Received {
    pub(super) id: String,
    pub(super) command: Command,
}

/// A message that cannot be followed.
#[derive(Debug, PartialEq)]
pub(super) struct Unreadable {
    /// Its id, where it has one.
    pub(super) id: Option<String>,
    pub(super) error: ApiError,
}

impl Received {
    /// Reads a message. Its fields stay as the caller wrote them: a number that is parsed and written again
    /// loses digits.
    pub(super) fn read(text: &[u8]) -> Result<Self, Unreadable> {
        let without_id = |message: String| Unreadable {
            id: None,
            error: ApiError::InvalidRequest { field: None, message },
        };
        let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(text).map_err(|error| {
            let example = r#"{"id": "1", "type": "generate", "prompt": "Hello"}"#;
            without_id(format!("the message is not a JSON object ({error}); send one such as {example}"))
        })?;
        let Some(id) = text_of(fields.remove("id").as_deref()) else {
            let error = ApiError::field("id", "is missing or not a string: choose one for each request");
            return Err(Unreadable { id: None, error });
        };
        let command = command(fields).map_err(|error| Unreadable { id: Some(id.clone()), error })?;
        Ok(Self { id, command })
    }
}

fn command(mut fields: BTreeMap<String, Box<RawValue>>) -> Result<Command, ApiError> {
    let kind = text_of(fields.remove("type").as_deref());
    let route = match kind.as_deref() {
        Some("generate") => Route::Generate,
        Some("chat") => Route::Chat,
        Some("cancel") => {
            return match fields.keys().next() {
                None => Ok(Command::Cancel),
                Some(other) => Err(ApiError::field(other, "cancel takes no field beside id")),
            };
        }
        Some(other) => {
            let hint = nearest::hint(other, TYPES);
            return Err(ApiError::field("type", format!("there is no {:?}; {hint}", echo(other))));
        }
        None => {
            let message = format!("is missing or not a string: give one of {}", TYPES.join(", "));
            return Err(ApiError::field("type", message));
        }
    };
    match fields.get("stream").map(|stream| stream.get()) {
        None | Some("true" | "null") => {}
        Some("false") => {
            return Err(ApiError::field("stream", "answers come as a stream here: leave it out"));
        }
        Some(other) => {
            let why = format!("expected true, or nothing, found {}", echo(other));
            return Err(ApiError::field("stream", why));
        }
    }
    let written = to_raw_value(&true).and_then(|stream| {
        fields.insert("stream".to_owned(), stream);
        serde_json::to_vec(&fields)
    });
    let body = written.map_err(|error| ApiError::Internal {
        message: format!("the message could not be passed on: {error}"),
    })?;
    Ok(Command::Start { route, body: body.into() })
}

fn text_of(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

/// A message about a request, without its id.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Message {
    kind: MessageKind,
    fields: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum MessageKind {
    Token,
    Finished,
    Error,
}

impl Message {
    pub(super) fn token(fields: Map<String, Value>) -> Self {
        Self { kind: MessageKind::Token, fields }
    }

    pub(super) fn finished(fields: Map<String, Value>) -> Self {
        Self { kind: MessageKind::Finished, fields }
    }

    pub(super) fn cancelled() -> Self {
        Self::finished(Map::from_iter([("finish_reason".to_owned(), json!("cancelled"))]))
    }

    /// An error in this server's own shape: what stands in `error`.
    pub(super) fn error(error: Value) -> Self {
        Self { kind: MessageKind::Error, fields: Map::from_iter([("error".to_owned(), error)]) }
    }

    /// The text that is sent; `null` for the id where there is none.
    pub(super) fn write(self, id: Option<&str>) -> String {
        let kind: &'static str = self.kind.into();
        let mut written =
            Map::from_iter([("id".to_owned(), json!(id.map(echo))), ("type".to_owned(), json!(kind))]);
        written.extend(self.fields);
        Value::Object(written).to_string()
    }
}

impl RequestReply for Message {
    fn is_last(&self) -> bool {
        self.kind != MessageKind::Token
    }

    fn failed(error: ApiError) -> Self {
        let mut error = error.to_json();
        Self::error(error["error"].take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Received, Unreadable> {
        Received::read(text.as_bytes())
    }

    #[test]
    fn a_request_keeps_its_fields_as_they_are_written() {
        let text = r#"{"id":"a","type":"generate","prompt":"x","response_format":{"type":"json_schema",
            "schema":{"const": 123456789012345678901234567890}}}"#;
        let Command::Start { route, body } = read(text).unwrap().command else { panic!() };
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(
            body.contains("123456789012345678901234567890") && body.contains(r#""stream":true"#),
            "{body}"
        );
        assert!(!body.contains("\"id\"") && !body.contains("\"generate\""), "{body}");
        assert_eq!(route.path(), "/v1/generate/stream");
        let chat = read(r#"{"id":"b","type":"chat","messages":[],"stream":null}"#).unwrap();
        assert!(matches!(chat.command, Command::Start { route: Route::Chat, .. }) && chat.id == "b");
        assert_eq!(read(r#"{"type":"cancel","id":"b"}"#).unwrap().command, Command::Cancel);
    }

    #[test]
    fn messages_that_cannot_be_followed_name_what_is_wrong() {
        for (text, id, begins) in [
            ("[1]", None, "the message is not a JSON object"),
            (r#"{"type":"generate"}"#, None, "id: is missing"),
            (r#"{"id":7,"type":"generate"}"#, None, "id: is missing or not a string"),
            (r#"{"id":"a"}"#, Some("a"), "type: is missing"),
            (r#"{"id":"a","type":"generat"}"#, Some("a"), "type: there is no \"generat\""),
            (r#"{"id":"a","type":"cancel","reason":"x"}"#, Some("a"), "reason: cancel takes"),
            (r#"{"id":"a","type":"chat","stream":false}"#, Some("a"), "stream: answers come"),
            (
                r#"{"id":"a","type":"chat","stream":0}"#,
                Some("a"),
                "stream: expected true, or nothing, found 0",
            ),
            (r#"{"id":"a","type":"chat","stream":"true"}"#, Some("a"), "stream: expected true"),
        ] {
            let unreadable = read(text).unwrap_err();
            assert_eq!(unreadable.id.as_deref(), id, "{text}");
            assert!(unreadable.error.to_string().starts_with(begins), "{}", unreadable.error);
        }
    }

    #[test]
    fn every_message_begins_with_its_id_and_type() {
        let fields = Map::from_iter([("text".to_owned(), json!("x"))]);
        assert_eq!(Message::token(fields).write(Some("a")), r#"{"id":"a","type":"token","text":"x"}"#);
        let failed = Message::failed(ApiError::field("top_p", "no")).write(None);
        assert!(
            failed.starts_with(r#"{"id":null,"type":"error","error":{"type":"invalid_request""#),
            "{failed}"
        );
        assert!(Message::cancelled().is_last());
    }
}
