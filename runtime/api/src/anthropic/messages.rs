//! The messages of a request as chat templates read them.
//!
//! Messages of one role in a row count as one, as in Anthropic's own service. The results of tools come
//! before the texts of their message: templates write them right after the calls.

use serde_json::{Map, Value};

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;
use crate::json_object::ObjectAt;
use crate::transcript::{PastCall, Transcript, join};

/// A text that Claude Code sends as the first block of `system`, for the billing of Anthropic's service. It
/// is another one in each request, so that no two prompts would begin alike and none could be reused.
const BILLING_PREFIX: &str = "x-anthropic-billing-header:";

/// In front of the result of a tool that failed: chat templates have no other sign for it.
const FAILED: &str = "Error: ";

/// Adds `system` to the messages.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the block.
pub(super) fn read_system(body: &ObjectAt<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    let Some(system) = body.get("system") else { return Ok(()) };
    for block in blocks("system", system)? {
        let text = text_of(&block)?;
        if !text.is_empty() && !text.starts_with(BILLING_PREFIX) {
            transcript.system(text);
        }
    }
    Ok(())
}

/// Adds `messages` to the messages.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the block.
pub(super) fn read(body: &ObjectAt<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    let missing = || body.error("messages", "is missing: give a list of messages");
    let list = body.list("messages")?.ok_or_else(missing)?;
    if list.is_empty() {
        return Err(body.error("messages", "is empty: give at least one message"));
    }
    let mut user = UserMessage::default();
    for (index, message) in list.iter().enumerate() {
        let message = ObjectAt::new(message, format!("messages[{index}]"))?;
        let role = message.required_text("role")?;
        let content = message
            .get("content")
            .ok_or_else(|| message.error("content", "is missing: give a text or a list of blocks"))?;
        let blocks = blocks(&message.field("content"), content)?;
        if role == "user" {
            blocks.iter().try_for_each(|block| user.add(block))?;
            continue;
        }
        std::mem::take(&mut user).end(transcript)?;
        match role {
            "assistant" => blocks.iter().try_for_each(|block| assistant_block(block, transcript))?,
            "system" => {
                for block in &blocks {
                    transcript.system(text_of(block)?);
                }
            }
            other => {
                let why = format!("there is no {:?}; known are user, assistant and system", echo(other));
                return Err(message.error("role", why));
            }
        }
    }
    user.end(transcript)
}

/// A block of content, or a text in its place.
struct ContentBlock<'a> {
    path: String,
    value: BlockValue<'a>,
}

enum BlockValue<'a> {
    Text(&'a str),
    Object(ObjectAt<'a>),
}

/// The blocks of a field that is a text or a list of blocks.
fn blocks<'a>(path: &str, content: &'a Value) -> Result<Vec<ContentBlock<'a>>, ApiError> {
    match content {
        Value::String(text) => {
            Ok(vec![ContentBlock { path: path.to_owned(), value: BlockValue::Text(text) }])
        }
        Value::Array(list) => {
            let block = |(index, block): (usize, &'a Value)| {
                let path = format!("{path}[{index}]");
                let value = BlockValue::Object(ObjectAt::new(block, path.clone())?);
                Ok(ContentBlock { path, value })
            };
            list.iter().enumerate().map(block).collect()
        }
        other => {
            Err(ApiError::field(path, format!("expected a text or a list of blocks, found {}", found(other))))
        }
    }
}

impl<'a> ContentBlock<'a> {
    /// The type and the object of a block that is no plain text.
    fn typed(&self) -> Result<Option<(&'a str, &ObjectAt<'a>)>, ApiError> {
        match &self.value {
            BlockValue::Text(_) => Ok(None),
            BlockValue::Object(block) => Ok(Some((block.required_text("type")?, block))),
        }
    }

    fn unsupported(&self, kind: &str, known: &str) -> ApiError {
        let why = format!(
            "blocks of type {:?} are not supported here: the models read text; known are {known}",
            echo(kind)
        );
        ApiError::field(&format!("{}.type", self.path), why)
    }
}

/// The text of a block that can be nothing else. `cache_control` changes nothing: every prompt is cached by
/// what it begins with. `citations` say where an earlier answer had its text from.
fn text_of<'a>(block: &ContentBlock<'a>) -> Result<&'a str, ApiError> {
    match &block.value {
        BlockValue::Text(text) => Ok(text),
        BlockValue::Object(object) => match object.required_text("type")? {
            "text" => object.required_text("text"),
            other => Err(block.unsupported(other, "text")),
        },
    }
}

/// What the user said and what tools returned since the assistant's last message.
#[derive(Default)]
struct UserMessage<'a> {
    results: Vec<ToolResult<'a>>,
    texts: Vec<&'a str>,
}

struct ToolResult<'a> {
    path: String,
    call_id: &'a str,
    text: String,
}

impl<'a> UserMessage<'a> {
    fn add(&mut self, block: &ContentBlock<'a>) -> Result<(), ApiError> {
        match block.typed()? {
            None | Some(("text", _)) => self.texts.push(text_of(block)?),
            Some(("tool_result", object)) => {
                let path = object.field("tool_use_id");
                let call_id = object.required_text("tool_use_id")?;
                self.results.push(ToolResult { path, call_id, text: result_text(object)? });
            }
            Some((other, _)) => return Err(block.unsupported(other, "text and tool_result")),
        }
        Ok(())
    }

    fn end(self, transcript: &mut Transcript) -> Result<(), ApiError> {
        for ToolResult { path, call_id, text } in &self.results {
            if !transcript.result(call_id, text) {
                let why = format!("no tool_use before it has the id {:?}", echo(call_id));
                return Err(ApiError::field(path, why));
            }
        }
        if !self.texts.is_empty() {
            transcript.user(&join(&self.texts));
        }
        Ok(())
    }
}

fn result_text(result: &ObjectAt<'_>) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    if let Some(content) = result.get("content") {
        for block in blocks(&result.field("content"), content)? {
            texts.push(text_of(&block)?);
        }
    }
    let failed = result.flag("is_error")?.unwrap_or(false);
    Ok(format!("{}{}", if failed { FAILED } else { "" }, join(&texts)))
}

fn assistant_block(block: &ContentBlock<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    match block.typed()? {
        None | Some(("text", _)) => transcript.assistant_text(text_of(block)?),
        Some(("thinking", object)) => transcript.assistant_reasoning(object.required_text("thinking")?),
        // It is readable for Anthropic's service only.
        Some(("redacted_thinking", _)) => {}
        Some(("tool_use", object)) => {
            let arguments = object.object("input")?.map_or_else(Map::new, |input| input.entries().clone());
            let (id, name) = (object.required_text("id")?, object.required_text("name")?);
            transcript.assistant_call(PastCall { id, name, arguments });
        }
        Some((other, _)) => {
            return Err(block.unsupported(other, "text, thinking, redacted_thinking and tool_use"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_body(body: &Value) -> Result<Vec<Value>, ApiError> {
        let body = ObjectAt::body(body.as_object().unwrap());
        let mut transcript = Transcript::default();
        read_system(&body, &mut transcript)?;
        read(&body, &mut transcript)?;
        Ok(transcript.into_messages())
    }

    #[test]
    fn texts_and_blocks_become_messages() {
        let cached = json!({"type": "ephemeral"});
        let body = json!({
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=00;"},
                {"type": "text", "text": "Be short.", "cache_control": cached},
                {"type": "text", "text": "Be kind."},
            ],
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "user", "content": [{"type": "text", "text": "there", "cache_control": cached}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Look.", "citations": null},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"k": 1}},
                    {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
                ]},
                {"role": "user", "content": [
                    {"type": "text", "text": "Here."},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "9"}]},
                    {"type": "tool_result", "tool_use_id": "c1", "content": "no city", "is_error": true},
                ]},
                {"role": "system", "content": "Hurry."},
                {"role": "user", "content": "And?"},
            ],
        });
        let call = |id: &str, name: &str, arguments: Value| {
            let function = json!({"name": name, "arguments": arguments});
            json!({"id": id, "type": "function", "function": function})
        };
        assert_eq!(
            read_body(&body).unwrap(),
            [
                json!({"role": "system", "content": "Be short.\n\nBe kind."}),
                json!({"role": "user", "content": "Hi\nthere"}),
                json!({"role": "assistant", "content": "Look.", "reasoning_content": "t",
                    "tool_calls": [call("c1", "f", json!({"k": 1})), call("c2", "g", json!({}))]}),
                json!({"role": "tool", "tool_call_id": "c2", "name": "g", "content": "9"}),
                json!({"role": "tool", "tool_call_id": "c1", "name": "f", "content": "Error: no city"}),
                json!({"role": "user", "content": "Here."}),
                json!({"role": "system", "content": "Hurry."}),
                json!({"role": "user", "content": "And?"}),
            ]
        );
    }

    #[test]
    fn a_result_may_be_empty() {
        let call = json!({"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f"}]});
        let result = json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]});
        let messages = read_body(&json!({"messages": [call, result]})).unwrap();
        assert_eq!(messages[1]["content"], "");
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let user = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
        let assistant = |block: Value| json!({"messages": [{"role": "assistant", "content": [block]}]});
        let image = json!({"type": "image", "source": {"type": "base64"}});
        let result = |content: Value| json!({"type": "tool_result", "tool_use_id": "c", "content": content});
        let system = json!({"system": [image], "messages": [{"role": "user", "content": "a"}]});
        for (body, text) in [
            (json!({}), "messages: is missing"),
            (json!({"messages": []}), "messages: is empty"),
            (json!({"messages": "a"}), "messages: expected a list"),
            (json!({"messages": ["a"]}), "messages[0]: expected an object"),
            (json!({"messages": [{"content": "a"}]}), "messages[0].role: is missing"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content: is missing"),
            (
                json!({"messages": [{"role": "user", "content": 7}]}),
                "messages[0].content: expected a text or",
            ),
            (
                json!({"messages": [{"role": "tool", "content": "a"}]}),
                "messages[0].role: there is no \"tool\"",
            ),
            (user(json!("a")), "messages[0].content[0]: expected an object"),
            (user(json!({"text": "a"})), "messages[0].content[0].type: is missing"),
            (user(json!({"type": "text"})), "messages[0].content[0].text: is missing"),
            (user(image.clone()), "messages[0].content[0].type: blocks of type \"image\" are not supported"),
            (user(json!({"type": "document"})), "messages[0].content[0].type: blocks of type \"document\""),
            (user(result(json!("a"))), "messages[0].content[0].tool_use_id: no tool_use before it"),
            (
                user(result(json!([image]))),
                "messages[0].content[0].content[0].type: blocks of type \"image\"",
            ),
            (assistant(json!({"type": "server_tool_use"})), "messages[0].content[0].type: blocks of type"),
            (
                assistant(json!({"type": "tool_use", "id": "c", "name": "f", "input": []})),
                "messages[0].content[0].input",
            ),
            (system, "system[0].type: blocks of type \"image\" are not supported"),
            (
                json!({"system": 7, "messages": [{"role": "user", "content": "a"}]}),
                "system: expected a text or",
            ),
        ] {
            let error = read_body(&body).unwrap_err().to_string();
            assert!(error.starts_with(text), "{body}: {error}");
        }
    }
}
