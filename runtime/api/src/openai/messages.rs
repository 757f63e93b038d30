//! The messages of a chat completion, as OpenAI's clients write them and as chat templates read them.
//!
//! A message's content becomes one text, the arguments of earlier calls become objects, and `developer`
//! becomes `system`, the word that templates know. What a template cannot show (images, audio, files) is
//! refused by name.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;
use crate::nearest;

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

/// MessageReader of messages and of their parts that are accepted without an effect, each with the reason.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("annotations", "part of an answer of OpenAI's that is sent back; no model reads it"),
    ("cache_control", "a hint for caches; equal beginnings of prompts are found without it"),
    ("index", "the number of a call, which some clients send back; its place in the list says the same"),
];

/// The messages as chat templates read them.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the message and its member, such as `messages[2].content`.
pub(crate) fn template_messages(messages: Option<Value>) -> Result<Vec<Value>, ApiError> {
    let list = match messages {
        None | Some(Value::Null) => {
            return Err(ApiError::field("messages", "is missing: give at least one message"));
        }
        Some(Value::Array(list)) if list.is_empty() => {
            return Err(ApiError::field("messages", "is empty: give at least one message"));
        }
        Some(Value::Array(list)) => list,
        Some(other) => {
            let why = format!("expected a list of messages, found {}", found(&other));
            return Err(ApiError::field("messages", why));
        }
    };
    // Names of functions by the id of their call, for the answers of tools.
    let mut functions = HashMap::new();
    let each = list.into_iter().enumerate();
    each.map(|(index, message)| template_message(format!("messages[{index}]"), message, &mut functions))
        .collect()
}

fn template_message(
    at: String,
    message: Value,
    functions: &mut HashMap<String, String>,
) -> Result<Value, ApiError> {
    let mut members = MessageReader::new(at, message)?;
    let role = members
        .text("role")?
        .ok_or_else(|| members.error("role", format!("is missing: give one of {}", ROLES.join(", "))))?;
    let message = match role.as_str() {
        "system" | "developer" => plain(&mut members, "system")?,
        "user" => plain(&mut members, "user")?,
        "assistant" => assistant(&mut members, functions)?,
        "tool" => tool(&mut members, functions)?,
        "function" => {
            let why =
                "\"function\" is OpenAI's former role; give \"tool\" with the \"tool_call_id\" of the call";
            return Err(members.error("role", why));
        }
        other => {
            let why = format!("there is no role {:?}; {}", echo(other), nearest::hint(other, ROLES));
            return Err(members.error("role", why));
        }
    };
    members.refuse_others()?;
    Ok(Value::Object(message))
}

/// A message that is only text.
fn plain(members: &mut MessageReader, role: &str) -> Result<Map<String, Value>, ApiError> {
    let content = members.content(&["text"])?;
    let content = content.ok_or_else(|| members.error("content", "is missing: give a text"))?;
    let mut message = message(role, content);
    members.copy_name(&mut message)?;
    Ok(message)
}

fn message(role: &str, content: String) -> Map<String, Value> {
    Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), Value::String(content))])
}

/// An earlier answer, as this server or another one gave it.
fn assistant(
    members: &mut MessageReader,
    functions: &mut HashMap<String, String>,
) -> Result<Map<String, Value>, ApiError> {
    let content = members.content(&["text", "refusal"])?;
    let refusal = members.text("refusal")?;
    let (ours, other) = (members.text("reasoning_content")?, members.text("reasoning")?);
    let calls = members.calls()?;
    members.refuse("function_call", "is OpenAI's former field; give \"tool_calls\"")?;
    members.refuse("audio", "is not offered: the models here read text only")?;
    let content = content.filter(|text| !text.is_empty()).or(refusal);
    let reasoning = ours.or(other).filter(|text| !text.is_empty());
    if content.is_none() && calls.is_empty() && reasoning.is_none() && !members.had_content {
        return Err(members.error("content", "is missing: give a text, or \"tool_calls\""));
    }
    let mut message = message("assistant", content.unwrap_or_default());
    if let Some(reasoning) = reasoning {
        message.insert("reasoning_content".to_owned(), json!(reasoning));
    }
    if !calls.is_empty() {
        functions.extend(calls.iter().map(|call| (call.id.clone(), call.name.clone())));
        let calls = calls.into_iter().map(EarlierCall::into_json).collect();
        message.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    members.copy_name(&mut message)?;
    Ok(message)
}

/// What a tool answered. Templates that name the function find its name in the call.
fn tool(
    members: &mut MessageReader,
    functions: &HashMap<String, String>,
) -> Result<Map<String, Value>, ApiError> {
    let content = members.content(&["text"])?.unwrap_or_default();
    let id = members.text("tool_call_id")?;
    let id = id.ok_or_else(|| members.error("tool_call_id", "is missing: give the id of the call"))?;
    let mut message = message("tool", content);
    if let Some(name) = functions.get(&id) {
        message.insert("name".to_owned(), json!(name));
    }
    message.insert("tool_call_id".to_owned(), json!(id));
    members.copy_name(&mut message)?;
    Ok(message)
}

/// A call in an earlier answer.
struct EarlierCall {
    id: String,
    name: String,
    arguments: Map<String, Value>,
}

impl EarlierCall {
    fn into_json(self) -> Value {
        let Self { id, name, arguments } = self;
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
    }
}

/// The parameter that holds arguments which are no JSON.
const UNREADABLE: &str = "unreadable_arguments";

/// The arguments of a call as an object. Clients send them as JSON text; some send an empty text for none.
/// Text that is no JSON is what is left of a call that was cut, as by `max_tokens`: a client repeats it in
/// every further request, so that the model is shown the text, as the only parameter, and the conversation
/// goes on.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names `field`, where they are JSON but no object.
pub(crate) fn arguments_object(
    field: &str,
    arguments: Option<Value>,
) -> Result<Map<String, Value>, ApiError> {
    let parsed = match arguments {
        None | Some(Value::Null) => return Ok(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Map::new()),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(parsed) => parsed,
            Err(_) => return Ok(Map::from_iter([(UNREADABLE.to_owned(), Value::String(text))])),
        },
        Some(value) => value,
    };
    match parsed {
        Value::Object(arguments) => Ok(arguments),
        other => {
            let why = format!("expected a JSON object, found {}", found(&other));
            Err(ApiError::field(field, why))
        }
    }
}

/// The members of an object in the request. What is read is taken out, so that what is left is unknown.
struct MessageReader {
    /// Where the object stands, such as `messages[2]`.
    at: String,
    members: Map<String, Value>,
    /// Whether `content` was given, empty or not.
    had_content: bool,
}

impl MessageReader {
    fn new(at: String, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(members) => Ok(Self { at, members, had_content: false }),
            other => Err(ApiError::field(&at, format!("expected an object, found {}", found(&other)))),
        }
    }

    fn error(&self, name: &str, why: impl std::fmt::Display) -> ApiError {
        ApiError::field(&format!("{}.{name}", self.at), why)
    }

    /// A member; null is the same as leaving it out.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(name, format!("expected a string, found {}", found(&other)))),
        }
    }

    /// A list of objects, each with its place.
    fn list(&mut self, name: &str) -> Result<Vec<Self>, ApiError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let at = |index: usize| format!("{}.{name}[{index}]", self.at);
                list.into_iter().enumerate().map(|(index, value)| Self::new(at(index), value)).collect()
            }
            Some(other) => Err(self.error(name, format!("expected a list, found {}", found(&other)))),
        }
    }

    fn refuse(&mut self, name: &str, why: &str) -> Result<(), ApiError> {
        match self.take(name) {
            None => Ok(()),
            Some(_) => Err(self.error(name, why)),
        }
    }

    /// Refuses what nothing has taken. A null asks for nothing.
    fn refuse_others(&self) -> Result<(), ApiError> {
        let ignored = |name: &str| WITHOUT_EFFECT.iter().any(|(known, _)| *known == name);
        match self.members.iter().find(|(name, value)| !value.is_null() && !ignored(name)) {
            None => Ok(()),
            Some((name, _)) => Err(self.error(name, "there is no such field here; leave it out")),
        }
    }

    fn copy_name(&mut self, message: &mut Map<String, Value>) -> Result<(), ApiError> {
        if let Some(name) = self.text("name")? {
            message.insert("name".to_owned(), json!(name));
        }
        Ok(())
    }

    /// The content: a text, or the texts of its parts with a line break between them.
    fn content(&mut self, kinds: &[&str]) -> Result<Option<String>, ApiError> {
        match self.members.get("content") {
            Some(Value::Array(_)) => {
                self.had_content = true;
                let parts = self.list("content")?.into_iter();
                let texts: Result<Vec<String>, ApiError> = parts.map(|part| part.into_text(kinds)).collect();
                Ok(Some(texts?.join("\n")))
            }
            Some(Value::String(_)) => {
                self.had_content = true;
                self.text("content")
            }
            None | Some(Value::Null) => Ok(None),
            Some(other) => {
                let why = format!("expected a string or a list of parts, found {}", found(other));
                Err(self.error("content", why))
            }
        }
    }

    /// The text of a part of a content.
    fn into_text(mut self, kinds: &[&str]) -> Result<String, ApiError> {
        let expected = kinds.iter().map(|kind| format!("{kind:?}")).collect::<Vec<_>>().join(" or ");
        let kind = self.text("type")?;
        let kind = kind.ok_or_else(|| self.error("type", format!("is missing: give {expected}")))?;
        if !kinds.contains(&kind.as_str()) {
            let why =
                format!("{:?} is not offered: the models here read text only; give {expected}", echo(&kind));
            return Err(self.error("type", why));
        }
        let text = self.text(&kind)?;
        let text = text.ok_or_else(|| self.error(&kind, "is missing: give the text of the part"))?;
        self.refuse_others()?;
        Ok(text)
    }

    /// The calls of an earlier answer.
    fn calls(&mut self) -> Result<Vec<EarlierCall>, ApiError> {
        self.list("tool_calls")?.into_iter().map(Self::into_call).collect()
    }

    fn into_call(mut self) -> Result<EarlierCall, ApiError> {
        let id = self.text("id")?;
        let id = id.ok_or_else(|| self.error("id", "is missing: give the id of the call"))?;
        match self.text("type")?.as_deref() {
            None | Some("function") => {}
            Some(other) => {
                let why = format!("{:?} is not offered: only functions are called here", echo(other));
                return Err(self.error("type", why));
            }
        }
        let function = self.take("function");
        let function =
            function.ok_or_else(|| self.error("function", "is missing: give its name and arguments"))?;
        let mut function = Self::new(format!("{}.function", self.at), function)?;
        let name = function.text("name")?;
        let name = name.ok_or_else(|| function.error("name", "is missing: name the function"))?;
        let arguments = function.take("arguments");
        let arguments = arguments_object(&format!("{}.arguments", function.at), arguments)?;
        function.refuse_others()?;
        self.refuse_others()?;
        Ok(EarlierCall { id, name, arguments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(messages: Value) -> Result<Vec<Value>, ApiError> {
        template_messages(Some(messages))
    }

    fn call(arguments: &Value) -> Value {
        json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}})
    }

    #[test]
    fn contents_become_one_text_and_roles_those_of_templates() {
        let read = read(json!([
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "Ann", "content": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ]},
            {"role": "assistant", "content": "c", "refusal": null, "audio": null, "function_call": null,
             "tool_calls": null, "annotations": []},
            {"role": "assistant", "content": null, "refusal": "No."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": ""},
        ]));
        let wanted = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb", "name": "Ann"},
            {"role": "assistant", "content": "c"},
            {"role": "assistant", "content": "No."},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": ""},
        ]);
        assert_eq!(json!(read.unwrap()), wanted);
    }

    #[test]
    fn earlier_calls_have_their_arguments_as_objects_and_their_answers_the_name() {
        for (given, parsed) in [
            (json!("{\"a\": [1]}"), json!({"a": [1]})),
            (json!({"a": 1}), json!({"a": 1})),
            (json!("{}"), json!({})),
            (json!(""), json!({})),
            (json!(null), json!({})),
        ] {
            let read = read(json!([
                {"role": "assistant", "content": null, "tool_calls": [call(&given)]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}]},
                {"role": "tool", "tool_call_id": "other", "content": null, "name": "g"},
            ]));
            let wanted = json!([
                {"role": "assistant", "content": "", "tool_calls": [call(&parsed)]},
                {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"},
                {"role": "tool", "content": "", "tool_call_id": "other", "name": "g"},
            ]);
            assert_eq!(json!(read.unwrap()), wanted);
        }
    }

    #[test]
    fn reasoning_is_taken_back_under_either_name() {
        for name in ["reasoning_content", "reasoning"] {
            let read = read(json!([{"role": "assistant", "content": "a", name: "because"}]));
            let wanted = json!([{"role": "assistant", "content": "a", "reasoning_content": "because"}]);
            assert_eq!(json!(read.unwrap()), wanted);
        }
    }

    #[test]
    fn what_a_message_cannot_hold_is_named() {
        let assistant = |call: Value| json!({"role": "assistant", "tool_calls": [call]});
        let arguments = "messages[0].tool_calls[0].function.arguments";
        let image = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]);
        for (message, field, text) in [
            (json!("Hi"), "messages[0]", "an object"),
            (json!({"content": "a"}), "messages[0].role", "is missing"),
            (json!({"role": "function", "content": "a"}), "messages[0].role", "tool_call_id"),
            (json!({"role": "usr", "content": "a"}), "messages[0].role", "did you mean \"user\""),
            (json!({"role": "user"}), "messages[0].content", "is missing"),
            (json!({"role": "user", "content": null}), "messages[0].content", "is missing"),
            (json!({"role": "user", "content": 7}), "messages[0].content", "found 7"),
            (json!({"role": "user", "content": image}), "messages[0].content[1].type", "image_url"),
            (
                json!({"role": "user", "content": [{"text": "a"}]}),
                "messages[0].content[0].type",
                "is missing",
            ),
            (
                json!({"role": "user", "content": [{"type": "text"}]}),
                "messages[0].content[0].text",
                "is missing",
            ),
            (json!({"role": "user", "content": "a", "name": 1}), "messages[0].name", "a string"),
            (json!({"role": "user", "content": "a", "tool_calls": [1]}), "messages[0].tool_calls", "no such"),
            (json!({"role": "assistant"}), "messages[0].content", "tool_calls"),
            (json!({"role": "assistant", "content": "a", "audio": {}}), "messages[0].audio", "text only"),
            (
                json!({"role": "assistant", "function_call": {"name": "f"}}),
                "messages[0].function_call",
                "tool_calls",
            ),
            (json!({"role": "tool", "content": "a"}), "messages[0].tool_call_id", "is missing"),
            (assistant(json!({"function": {"name": "f"}})), "messages[0].tool_calls[0].id", "is missing"),
            (
                assistant(json!({"id": "c1", "type": "custom"})),
                "messages[0].tool_calls[0].type",
                "only functions",
            ),
            (assistant(json!({"id": "c1"})), "messages[0].tool_calls[0].function", "is missing"),
            (
                assistant(json!({"id": "c1", "function": {}})),
                "messages[0].tool_calls[0].function.name",
                "is missing",
            ),
            (assistant(call(&json!("[1]"))), arguments, "found [1]"),
        ] {
            let error = read(json!([message])).unwrap_err();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
                "{message}: {error:?}"
            );
            assert!(error.to_string().contains(text), "{message}: {error}");
        }
    }
}
