//! The input of a request, a text or items, as the messages that chat templates read.

use serde_json::Value;

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;
use crate::json_object::ObjectAt;
use crate::openai::messages::arguments_object;
use crate::transcript::{PastCall, Transcript, join};

/// Items that a request may hold.
const ITEMS: &str = "message, function_call, function_call_output and reasoning";

/// Adds the input to the messages.
///
/// What else an item repeats of the answer that it comes from (`id`, `status`, `phase`, `annotations`,
/// `logprobs`, `encrypted_content`) says nothing to a model and is passed over.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the item and its field.
pub(super) fn read(input: &Value, transcript: &mut Transcript) -> Result<(), ApiError> {
    match input {
        Value::String(text) if !text.is_empty() => transcript.user(text),
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                read_item(&ObjectAt::new(item, format!("input[{index}]"))?, transcript)?;
            }
        }
        Value::String(_) | Value::Array(_) => {
            return Err(ApiError::field("input", "is empty: give a text or a list of items"));
        }
        other => {
            let why = format!("expected a text or a list of items, found {}", found(other));
            return Err(ApiError::field("input", why));
        }
    }
    Ok(())
}

fn read_item(item: &ObjectAt<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    let kind = match item.text("type")? {
        Some(kind) => kind,
        None if item.get("role").is_some() => "message",
        None => return Err(item.error("type", format!("is missing: give one of {ITEMS}"))),
    };
    match kind {
        "message" => message(item, transcript),
        "reasoning" => reasoning(item, transcript),
        "function_call" => {
            let arguments = arguments_object(&item.field("arguments"), item.get("arguments").cloned())?;
            let (id, name) = (item.required_text("call_id")?, item.required_text("name")?);
            transcript.assistant_call(PastCall { id, name, arguments });
            Ok(())
        }
        "function_call_output" => {
            let id = item.required_text("call_id")?;
            let output = text_of(item, "output")?;
            if transcript.result(id, &output) {
                return Ok(());
            }
            let why = format!("no function_call before it has the call_id {:?}", echo(id));
            Err(item.error("call_id", why))
        }
        "item_reference" => {
            let why = "refers to an item of an earlier answer, and this server stores none: set store to \
                       false and send the items themselves";
            Err(item.error("type", why))
        }
        other => {
            let why = format!("items of type {:?} are not supported; known are {ITEMS}", echo(other));
            Err(item.error("type", why))
        }
    }
}

fn message(item: &ObjectAt<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    let role = item.required_text("role")?;
    let text = text_of(item, "content")?;
    match role {
        "user" => transcript.user(&text),
        "assistant" => transcript.assistant_text(&text),
        // OpenAI's newer word for the instructions of the one who deploys the model.
        "system" | "developer" => transcript.system(&text),
        other => {
            let why =
                format!("there is no {:?}; known are user, assistant, system and developer", echo(other));
            return Err(item.error("role", why));
        }
    }
    Ok(())
}

/// The reasoning of an earlier answer: its own text, or else its summary.
fn reasoning(item: &ObjectAt<'_>, transcript: &mut Transcript) -> Result<(), ApiError> {
    for key in ["content", "summary"] {
        let mut texts = Vec::new();
        for (index, part) in item.list(key)?.unwrap_or_default().iter().enumerate() {
            let part = ObjectAt::new(part, format!("{}[{index}]", item.field(key)))?;
            texts.push(part.required_text("text")?);
        }
        let text = join(&texts);
        if !text.is_empty() {
            transcript.assistant_reasoning(&text);
            break;
        }
    }
    Ok(())
}

/// The text of a field that is a text or a list of parts.
fn text_of(item: &ObjectAt<'_>, key: &str) -> Result<String, ApiError> {
    let parts = match item.get(key) {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        None => return Err(item.error(key, "is missing: give a text or a list of parts")),
        Some(other) => {
            let why = format!("expected a text or a list of parts, found {}", found(other));
            return Err(item.error(key, why));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let part = ObjectAt::new(part, format!("{}[{index}]", item.field(key)))?;
        texts.push(match part.required_text("type")? {
            "input_text" | "output_text" | "text" => part.required_text("text")?,
            "refusal" => part.required_text("refusal")?,
            other => {
                let why = format!(
                    "parts of type {:?} are not supported: the models here read text; send input_text",
                    echo(other)
                );
                return Err(part.error("type", why));
            }
        });
    }
    Ok(join(&texts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn messages(input: &Value) -> Result<Vec<Value>, ApiError> {
        let mut transcript = Transcript::default();
        read(input, &mut transcript)?;
        Ok(transcript.into_messages())
    }

    #[test]
    fn a_text_is_a_message_of_the_user() {
        assert_eq!(messages(&json!("Hi")).unwrap(), [json!({"role": "user", "content": "Hi"})]);
    }

    #[test]
    fn items_of_every_kind_become_messages() {
        let input = json!([
            {"type": "message", "role": "developer", "content": "Be short."},
            {"role": "user",
             "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{\"k\": 1}"},
            {"type": "function_call_output", "call_id": "call_1",
             "output": [{"type": "input_text", "text": "9"}]},
            {"type": "function_call", "call_id": "call_2", "name": "g", "arguments": ""},
            {"type": "function_call_output", "call_id": "call_2", "output": "8"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ]);
        let call = |id: &str, name: &str, arguments: Value| {
            let function = json!({"name": name, "arguments": arguments});
            json!({"id": id, "type": "function", "function": function})
        };
        assert_eq!(
            messages(&input).unwrap(),
            [
                json!({"role": "system", "content": "Be short."}),
                json!({"role": "user", "content": "a\nb"}),
                json!({"role": "assistant", "content": "c", "reasoning_content": "t",
                    "tool_calls": [call("call_1", "f", json!({"k": 1}))]}),
                json!({"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "9"}),
                json!({"role": "assistant", "content": "", "tool_calls": [call("call_2", "g", json!({}))]}),
                json!({"role": "tool", "tool_call_id": "call_2", "name": "g", "content": "8"}),
                json!({"role": "assistant", "content": "no"}),
            ]
        );
    }

    #[test]
    fn reasoning_is_read_from_its_summary_where_its_text_is_missing() {
        let item = |value: Value| json!([value, {"role": "user", "content": "x"}]);
        let summary = json!([{"type": "summary_text", "text": "s"}]);
        let read =
            messages(&item(json!({"type": "reasoning", "summary": summary, "content": null}))).unwrap();
        assert_eq!(read[0], json!({"role": "assistant", "content": "", "reasoning_content": "s"}));
        let encrypted = json!({"type": "reasoning", "summary": [], "encrypted_content": "gAAA"});
        assert_eq!(messages(&item(encrypted)).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]);
        let arguments = json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]);
        let cases = [
            (json!(""), "input: is empty"),
            (json!([]), "input: is empty"),
            (json!(7), "input: expected a text or a list of items, found 7"),
            (json!([7]), "input[0]: expected an object"),
            (json!([{}]), "input[0].type: is missing"),
            (json!([{"role": "robot", "content": "x"}]), "input[0].role: there is no \"robot\""),
            (json!([{"role": "user"}]), "input[0].content: is missing"),
            (json!([{"role": "user", "content": 7}]), "input[0].content: expected a text or a list of parts"),
            (json!([{"type": "item_reference", "id": "msg_1"}]), "input[0].type: refers to an item"),
            (json!([{"type": "web_search_call"}]), "input[0].type: items of type \"web_search_call\""),
            (json!([{"type": "function_call", "name": "f"}]), "input[0].call_id: is missing"),
            (
                json!([{"type": "function_call_output", "call_id": "c", "output": "x"}]),
                "input[0].call_id: no function_call",
            ),
            (image, "input[0].content[0].type: parts of type \"input_image\" are not supported"),
            (arguments, "input[0].arguments: expected a JSON object"),
        ];
        for (input, text) in cases {
            let error = messages(&input).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
