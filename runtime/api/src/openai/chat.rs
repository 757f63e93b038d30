//! `POST /v1/chat/completions`: the fields of a request, and the handler.

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::messages::template_messages;
use super::request::{self, Delivery, RefusedField, RouteFields, whole};
use super::{stream, whole as whole_answer};
use crate::chat_answer;
use crate::conversation::{Conversation, ToolChoice};
use crate::error::ApiError;
use crate::fields::{Asked, Defaults};
use crate::json_body::{found, take};
use crate::tools::{check_choice, check_tools};
use crate::{Api, nearest, request_body};

/// OpenAI's defaults. An answer may take the rest of the context.
pub(crate) const CHAT_DEFAULTS: Defaults = Defaults { max_tokens: u32::MAX, temperature: 1.0, top_p: 1.0 };

/// The values of `reasoning_effort`.
pub(crate) const EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Most alternatives of a token in logprobs.
const MAX_TOP_LOGPROBS: u32 = 20;

pub(crate) const FIELDS: RouteFields = RouteFields {
    own: &[
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "continue_final_message",
        "add_generation_prompt",
        "reasoning_effort",
        "reasoning_field",
        "modalities",
    ],
    refused: &[
        RefusedField { name: "functions", instead: "is OpenAI's former field; give \"tools\"" },
        RefusedField { name: "function_call", instead: "is OpenAI's former field; give \"tool_choice\"" },
        RefusedField { name: "audio", instead: "is not offered: the models here write text only" },
        RefusedField { name: "prediction", instead: "is not offered; leave it out" },
        RefusedField {
            name: "web_search_options",
            instead: "is not offered: no tools run here; leave it out",
        },
        RefusedField { name: "verbosity", instead: "is not offered; ask for it in a message" },
        RefusedField { name: "prompt", instead: "is a field of POST /v1/completions; give \"messages\"" },
    ],
    example: r#"{"messages": [{"role": "user", "content": "Hello"}]}"#,
};

/// How the answer of a chat is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChatStyle {
    /// As a stream or whole, and how many choices.
    pub(super) delivery: Delivery,
    /// Logprobs are written.
    pub(super) logprobs: bool,
    /// The request named the function to call.
    pub(super) function_was_named: bool,
    /// The field of reasoning.
    pub(super) reasoning: ReasoningField,
}

/// The field in which reasoning is written: clients know one of two names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum ReasoningField {
    /// `reasoning_content`.
    #[default]
    ReasoningContent,
    /// `reasoning`.
    Reasoning,
}

/// A request that was read.
struct ChatRequest {
    asked: Asked,
    style: ChatStyle,
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat_completions(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let ChatRequest { asked, style } = api.parse(bytes, parse).await?;
    let generation = asked.with_headers(&head.headers)?.check(&CHAT_DEFAULTS)?;
    let requests = chat_answer::choices(generation, style.delivery.choices);
    if style.delivery.stream {
        Ok(stream::chat_response(chat_answer::ask(&api, requests).await?, style))
    } else {
        whole_answer::chat_response(chat_answer::ask_whole(&api, requests).await?, style).await
    }
}

fn parse(bytes: &[u8]) -> Result<ChatRequest, ApiError> {
    let mut object = FIELDS.read(bytes)?;
    let delivery = Delivery::from_json(&object)?;
    let logprobs = take_logprobs(&mut object)?;
    check_modalities(&object)?;
    check_schema_format(&object)?;
    let reasoning = take(&object, "reasoning_field", "\"reasoning_content\" or \"reasoning\"", |value| {
        match value.as_str() {
            Some("reasoning_content") => Some(ReasoningField::ReasoningContent),
            Some("reasoning") => Some(ReasoningField::Reasoning),
            _ => None,
        }
    })?;
    let conversation = conversation(&mut object)?;
    let function_was_named = matches!(conversation.tool_choice, ToolChoice::Named(_));
    let asked = request::asked(&object, bytes, conversation.into())?;
    let reasoning = reasoning.unwrap_or_default();
    Ok(ChatRequest { asked, style: ChatStyle { delivery, logprobs, function_was_named, reasoning } })
}

fn conversation(object: &mut Map<String, Value>) -> Result<Conversation, ApiError> {
    let messages = template_messages(object.remove("messages"))?;
    let mut tools = check_tools(object.get("tools").unwrap_or(&Value::Null))?;
    let choice = allowed_tools(object.get("tool_choice"), &mut tools)?;
    let tool_choice = check_choice(choice.as_ref(), &tools)?;
    // A model that must not call is not shown what it could call.
    if tool_choice == ToolChoice::None {
        tools.clear();
    }
    let continue_last = continue_last(object, &messages)?;
    let parallel = take(object, "parallel_tool_calls", "true or false", Value::as_bool)?;
    Ok(Conversation {
        messages,
        tools,
        tool_choice,
        parallel_tool_calls: parallel.unwrap_or(true),
        variables: variables(object)?,
        continue_last,
    })
}

/// The variables of the template. Templates know two for how much the model is to think; one that has neither
/// takes no notice. What the request gives by their own names holds.
fn variables(object: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let given = take(object, "chat_template_kwargs", "an object", |value| value.as_object().cloned())?;
    let mut variables = given.unwrap_or_default();
    let expected = format!("one of {}", EFFORTS.join(", "));
    let effort = take(object, "reasoning_effort", &expected, |value| {
        value.as_str().filter(|effort| EFFORTS.contains(effort)).map(str::to_owned)
    })?;
    if let Some(effort) = effort {
        variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
        if effort != "none" {
            variables.entry("reasoning_effort").or_insert_with(|| json!(effort));
        }
    }
    Ok(variables)
}

/// Whether the last message is continued. vLLM's clients say so with two fields, the second of which is the
/// opposite of the first.
fn continue_last(object: &Map<String, Value>, messages: &[Value]) -> Result<bool, ApiError> {
    let continued = take(object, "continue_final_message", "true or false", Value::as_bool)?.unwrap_or(false);
    let header = take(object, "add_generation_prompt", "true or false", Value::as_bool)?;
    if header == Some(continued) {
        let why = format!("{continued} contradicts \"continue_final_message\": {continued}; leave it out");
        return Err(ApiError::field("add_generation_prompt", why));
    }
    let last_role = messages.last().and_then(|message| message.get("role")).and_then(Value::as_str);
    if continued && last_role != Some("assistant") {
        let why = "needs a last message of the role \"assistant\", which the answer continues";
        return Err(ApiError::field("continue_final_message", why));
    }
    Ok(continued)
}

/// The choice, where `{"type": "allowed_tools"}` is replaced by its mode. The tools that it does not allow
/// are taken out.
fn allowed_tools(choice: Option<&Value>, tools: &mut Vec<Value>) -> Result<Option<Value>, ApiError> {
    let Some(choice) = choice.filter(|choice| choice.get("type") == Some(&json!("allowed_tools"))) else {
        return Ok(choice.cloned());
    };
    let at = "tool_choice.allowed_tools";
    let wrong = |name: &str, why: String| ApiError::field(&format!("{at}.{name}"), why);
    let allowed = &choice["allowed_tools"];
    let mode = allowed.get("mode").and_then(Value::as_str).filter(|mode| ["auto", "required"].contains(mode));
    let mode = mode.ok_or_else(|| wrong("mode", "expected \"auto\" or \"required\"".to_owned()))?;
    let names = allowed.get("tools").and_then(Value::as_array).and_then(|list| {
        list.iter().map(function_name).collect::<Option<Vec<&str>>>().filter(|names| !names.is_empty())
    });
    let names = names.ok_or_else(|| {
        let expected = "expected a list such as [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]";
        wrong("tools", format!("{expected}, found {}", found(&allowed["tools"])))
    })?;
    let defined = |name: &&str| tools.iter().any(|tool| function_name(tool) == Some(*name));
    if let Some(unknown) = names.iter().find(|name| !defined(name)) {
        let unknown = found(&json!(unknown));
        return Err(wrong("tools", format!("{unknown} is not the name of a function in \"tools\"")));
    }
    tools.retain(|tool| function_name(tool).is_some_and(|name| names.contains(&name)));
    Ok(Some(json!(mode)))
}

/// The name of a function in a list of tools.
fn function_name(tool: &Value) -> Option<&str> {
    let function = tool.get("function").filter(|_| tool.get("type") == Some(&json!("function")))?;
    function.get("name")?.as_str()
}

/// Reads the two fields about logprobs and writes them as the one that the options have.
fn take_logprobs(object: &mut Map<String, Value>) -> Result<bool, ApiError> {
    let wanted = take(object, "logprobs", "true or false", Value::as_bool)?.unwrap_or(false);
    let expected = format!("a whole number from 0 to {MAX_TOP_LOGPROBS}");
    let top = take(object, "top_logprobs", &expected, |value| {
        whole(value).filter(|count| *count <= MAX_TOP_LOGPROBS)
    })?;
    if !wanted && top.is_some_and(|count| count > 0) {
        return Err(ApiError::field("top_logprobs", "needs \"logprobs\": true"));
    }
    object.remove("logprobs");
    if wanted {
        object.insert("logprobs".to_owned(), json!(top.unwrap_or(0)));
    }
    Ok(wanted)
}

fn check_modalities(object: &Map<String, Value>) -> Result<(), ApiError> {
    let only_text = |value: &Value| (value == &json!(["text"])).then_some(());
    take(object, "modalities", "[\"text\"], all that the models here write", only_text).map(|_| ())
}

/// Checks what is beside the schema in OpenAI's form of it. The name and the description are for models that
/// read them; the schema holds whether `strict` is given or not.
fn check_schema_format(object: &Map<String, Value>) -> Result<(), ApiError> {
    const KNOWN: &[&str] = &["name", "description", "schema", "strict"];
    let at = |name: &str| format!("response_format.json_schema.{name}");
    let format = object.get("response_format").and_then(Value::as_object);
    let inner = format.and_then(|format| format.get("json_schema")).filter(|inner| !inner.is_null());
    let Some(inner) = inner else { return Ok(()) };
    let Some(inner) = inner.as_object() else {
        let why = format!(
            "expected an object such as {{\"name\": \"x\", \"schema\": {{}}}}, found {}",
            found(inner)
        );
        return Err(ApiError::field("response_format.json_schema", why));
    };
    if let Some(unknown) = inner.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        let why = format!("there is no such field; {}", nearest::hint(unknown, KNOWN));
        return Err(ApiError::field(&at(unknown), why));
    }
    let given = |name: &str| inner.get(name).filter(|value| !value.is_null());
    for name in ["name", "description"] {
        if let Some(other) = given(name).filter(|value| !value.is_string()) {
            return Err(ApiError::field(&at(name), format!("expected a string, found {}", found(other))));
        }
    }
    if let Some(other) = given("strict").filter(|value| !value.is_boolean()) {
        return Err(ApiError::field(
            &at("strict"),
            format!("expected true or false, found {}", found(other)),
        ));
    }
    match given("schema") {
        Some(schema) if schema.is_object() || schema.is_boolean() => Ok(()),
        Some(other) => {
            Err(ApiError::field(&at("schema"), format!("expected a JSON schema, found {}", found(other))))
        }
        None => Err(ApiError::field(&at("schema"), "is missing: give a JSON schema")),
    }
}
