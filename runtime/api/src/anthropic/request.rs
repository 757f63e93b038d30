//! The bodies of `/v1/messages` and of `/v1/messages/count_tokens`, and their checks.

use serde_json::{Map, Value, json};

use super::messages;
use crate::conversation::{Conversation, ToolChoice};
use crate::echo::echo;
use crate::error::ApiError;
use crate::fields::Asked;
use crate::functions::FunctionList;
use crate::json_body::{self, float, found, member_text};
use crate::json_object::{ObjectAt, UnsupportedField};
use crate::options::{Format, Options};
use crate::tools::check_choice;
use crate::transcript::{LastMessage, Transcript};

/// Fields that are read one by one.
const OWN: &[&str] = &[
    "model",
    "max_tokens",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "stop_sequences",
    "temperature",
    "top_p",
    "top_k",
    "thinking",
    "output_config",
    "context_management",
    "stream",
];

/// Fields that clients send without being asked to, and that change nothing here: who the user is, how
/// Anthropic bills, and what is worth caching (every prompt is cached by what it begins with).
const WITHOUT_EFFECT: &[&str] = &["metadata", "service_tier", "cache_control"];

const UNSUPPORTED: &[UnsupportedField] = &[
    UnsupportedField { name: "container", instead: "no code runs on this server: leave it out" },
    UnsupportedField {
        name: "mcp_servers",
        instead: "this server calls no others: call them in the client, and give their tools in tools",
    },
    UnsupportedField {
        name: "inference_geo",
        instead: "the server runs where you installed it: leave it out",
    },
    UnsupportedField { name: "output_format", instead: "its newer name is output_config.format" },
    UnsupportedField { name: "speed", instead: "there is one speed: leave it out" },
];

/// What a tool is defined by. Those after the first three change nothing: what to cache, whether arguments
/// stream early (they always do), who may call (calls are always the model's own), and a promise about
/// arguments that no other model can be held to before it calls.
const TOOL_FIELDS: &[&str] = &[
    "name",
    "description",
    "input_schema",
    "type",
    "cache_control",
    "eager_input_streaming",
    "allowed_callers",
    "strict",
    "defer_loading",
];

/// How much a model is to think.
const EFFORTS: &[&str] = &["low", "medium", "high", "xhigh", "max"];

/// The most stop texts, as the engine has it.
const MAX_STOP_SEQUENCES: usize = 16;

/// The edit of the context that Claude Code always sends: which thinking of earlier turns is kept. Here that
/// is up to the model's chat template, so that keeping all of it asks for nothing.
const CLEAR_THINKING: &str = "clear_thinking_20251015";

/// Every field that is not refused.
#[cfg(test)]
pub(crate) fn fields() -> Vec<&'static str> {
    [OWN, WITHOUT_EFFECT].concat()
}

/// What the two routes have in common.
#[derive(Debug)]
pub(super) struct MessagesRequest {
    /// What is asked of the model.
    pub(super) asked: Asked,
    /// Whether the answer is a stream.
    pub(super) stream: bool,
    /// Whether the answer shows that the model thinks, but not what.
    pub(super) hide_thinking: bool,
}

/// Which route is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// For an answer; `max_tokens` is required.
    Answer,
    /// For the number of tokens of the prompt.
    Count,
}

/// Reads a body.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the field.
pub(super) fn parse(bytes: &[u8], purpose: Purpose) -> Result<MessagesRequest, ApiError> {
    let unsupported: Vec<&str> = UNSUPPORTED.iter().map(|field| field.name).collect();
    let known = [OWN, WITHOUT_EFFECT, unsupported.as_slice()].concat();
    let example =
        r#"{"model": "MODEL", "max_tokens": 256, "messages": [{"role": "user", "content": "Hello"}]}"#;
    let object = json_body::object(bytes, &known, example)?;
    let body = ObjectAt::body(&object);
    refuse(&body)?;
    let max_tokens = max_tokens(&body, purpose)?;
    let mut transcript = Transcript::default();
    messages::read_system(&body, &mut transcript)?;
    messages::read(&body, &mut transcript)?;
    let last = transcript.last();
    let tools = tools(&body)?;
    let thinking = thinking(&body, max_tokens)?;
    let output = output_config(&body, bytes)?;
    check_last(last, &thinking, output.format.as_ref())?;
    // An answer that must be a call has no other form. Where the model decides, it is a call or in this form.
    if output.format.is_some() && matches!(tools.choice, ToolChoice::Required | ToolChoice::Named(_)) {
        let why = "cannot hold for an answer that tool_choice requires to be a call: leave out one of them";
        return Err(ApiError::field("output_config.format", why));
    }
    let mut variables = thinking.variables;
    variables.extend(output.variables);
    let conversation = Conversation {
        messages: transcript.into_messages(),
        tools: tools.tools,
        tool_choice: tools.choice,
        parallel_tool_calls: tools.parallel,
        variables,
        continue_last: last == LastMessage::AssistantText,
    };
    let asked = Asked {
        prompt: conversation.into(),
        model: body.text("model")?.map(str::to_owned),
        max_tokens,
        temperature: body.read("temperature", "a number", float)?,
        top_p: body.read("top_p", "a number", float)?,
        options: Options {
            top_k: body.count("top_k")?,
            stop: stop_sequences(&body)?,
            format: output.format,
            ..Options::default()
        },
        ..Asked::default()
    };
    let stream = body.flag("stream")?.unwrap_or(false);
    Ok(MessagesRequest { asked, stream, hide_thinking: thinking.hide })
}

fn refuse(body: &ObjectAt<'_>) -> Result<(), ApiError> {
    body.refuse(UNSUPPORTED)?;
    let Some(management) = body.object("context_management")? else { return Ok(()) };
    for (index, edit) in management.list("edits")?.unwrap_or_default().iter().enumerate() {
        let edit = ObjectAt::new(edit, format!("{}[{index}]", management.field("edits")))?;
        let keeps_all = edit.get("keep").is_some_and(|keep| keep == "all");
        if edit.required_text("type")? != CLEAR_THINKING || !keeps_all {
            let why = "is not supported: nothing is removed from a conversation here; leave the edit out, \
                       and shorten messages where they are too long";
            return Err(edit.error("type", why));
        }
    }
    Ok(())
}

fn max_tokens(body: &ObjectAt<'_>, purpose: Purpose) -> Result<Option<u32>, ApiError> {
    const KEY: &str = "max_tokens";
    match body.count(KEY)? {
        None if purpose == Purpose::Answer => {
            Err(body.error(KEY, "is missing: give the number of new tokens at most"))
        }
        Some(0) => Err(body.error(KEY, "0 asks for nothing: give 1 or more")),
        count => Ok(count),
    }
}

fn stop_sequences(body: &ObjectAt<'_>) -> Result<Vec<String>, ApiError> {
    const KEY: &str = "stop_sequences";
    let list = body.list(KEY)?.unwrap_or_default();
    if list.len() > MAX_STOP_SEQUENCES {
        let why = format!("{} are more than the {MAX_STOP_SEQUENCES} that are allowed", list.len());
        return Err(body.error(KEY, why));
    }
    let text = |(index, value): (usize, &Value)| match value.as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => {
            let why = format!("expected a text that is not empty, found {}", found(value));
            Err(ApiError::field(&format!("{KEY}[{index}]"), why))
        }
    };
    list.iter().enumerate().map(text).collect()
}

struct MessageTools {
    tools: Vec<Value>,
    choice: ToolChoice,
    parallel: bool,
}

fn tools(body: &ObjectAt<'_>) -> Result<MessageTools, ApiError> {
    let mut functions = FunctionList::default();
    for (index, tool) in body.list("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = ObjectAt::new(tool, format!("tools[{index}]"))?;
        if let Some(kind) = tool.text("type")?.filter(|kind| *kind != "custom") {
            let why = format!(
                "tools of type {:?} run on Anthropic's servers or are known to its models only: define the \
                 tool by name, description and input_schema",
                echo(kind)
            );
            return Err(tool.error("type", why));
        }
        tool.only(TOOL_FIELDS)?;
        if tool.flag("defer_loading")? == Some(true) {
            let why = "is not supported: there is no search for tools here; leave it out";
            return Err(tool.error("defer_loading", why));
        }
        if tool.get("input_schema").is_none() {
            return Err(tool.error("input_schema", "is missing: give the JSON schema of an object"));
        }
        functions.add(&tool, "input_schema")?;
    }
    const KEY: &str = "tool_choice";
    let Some(choice) = body.object(KEY)? else {
        return Ok(MessageTools { tools: functions.into_tools(), choice: ToolChoice::Auto, parallel: true });
    };
    choice.only(&["type", "name", "disable_parallel_tool_use"])?;
    let kind = choice.word("type", &["auto", "any", "tool", "none"])?;
    let wanted = match kind.ok_or_else(|| choice.error("type", "is missing: give auto, any, tool or none"))? {
        "any" => json!("required"),
        "tool" => {
            json!({"type": "function", "function": {"name": choice.required_text("name")?}})
        }
        word => json!(word),
    };
    let parallel = !choice.flag("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = check_choice(Some(&wanted), functions.tools())?;
    // A model that must not call is not shown what it could call.
    let tools = if choice == ToolChoice::None { Vec::new() } else { functions.into_tools() };
    Ok(MessageTools { tools, choice, parallel })
}

#[derive(Debug)]
struct ThinkingFields {
    enabled: bool,
    hide: bool,
    variables: Map<String, Value>,
}

/// Whether the model is to think. Where a request does not say so it is not, as with Anthropic's models: its
/// clients expect a text first. `budget_tokens` is checked and is no limit of its own: `max_tokens` bounds
/// thinking and answer together.
fn thinking(body: &ObjectAt<'_>, max_tokens: Option<u32>) -> Result<ThinkingFields, ApiError> {
    let variables = |enabled: bool| Map::from_iter([("enable_thinking".to_owned(), json!(enabled))]);
    let Some(thinking) = body.object("thinking")? else {
        return Ok(ThinkingFields { enabled: false, hide: false, variables: variables(false) });
    };
    thinking.only(&["type", "budget_tokens", "display"])?;
    let kind = thinking.word("type", &["enabled", "disabled", "adaptive"])?;
    let kind =
        kind.ok_or_else(|| thinking.error("type", "is missing: give enabled, disabled or adaptive"))?;
    let hide = thinking.word("display", &["summarized", "omitted"])? == Some("omitted");
    if kind == "enabled" {
        let missing =
            || thinking.error("budget_tokens", "is missing: give the number of tokens for thinking");
        let budget = thinking.count("budget_tokens")?.ok_or_else(missing)?;
        if budget == 0 || max_tokens.is_some_and(|most| budget >= most) {
            let why = format!("{budget} is not within 1 and max_tokens, which holds thinking and answer");
            return Err(thinking.error("budget_tokens", why));
        }
    }
    Ok(match kind {
        // The model's own habit.
        "adaptive" => ThinkingFields { enabled: true, hide, variables: Map::new() },
        kind => {
            let enabled = kind == "enabled";
            ThinkingFields { enabled, hide, variables: variables(enabled) }
        }
    })
}

struct OutputFields {
    format: Option<Format>,
    variables: Map<String, Value>,
}

/// The form of the answer, and how much work goes into it. Templates that have a variable for it call it
/// `reasoning_effort`.
fn output_config(body: &ObjectAt<'_>, bytes: &[u8]) -> Result<OutputFields, ApiError> {
    let mut fields = OutputFields { format: None, variables: Map::new() };
    let Some(config) = body.object("output_config")? else { return Ok(fields) };
    config.only(&["effort", "format"])?;
    if let Some(effort) = config.word("effort", EFFORTS)? {
        fields.variables.insert("reasoning_effort".to_owned(), json!(effort));
    }
    let Some(format) = config.object("format")? else { return Ok(fields) };
    format.only(&["type", "schema"])?;
    if format.word("type", &["json_schema"])?.is_none() {
        return Err(format.error("type", "is missing: give json_schema"));
    }
    let Some(schema) = format.object("schema")? else {
        return Err(format.error("schema", "is missing: give a JSON schema"));
    };
    let text = member_text(bytes, &["output_config", "format", "schema"]);
    let text = text.unwrap_or_else(|| Value::Object(schema.entries().clone()).to_string());
    fields.format = Some(Format::JsonSchema(text));
    Ok(fields)
}

/// A last message of the assistant is continued, which asks for text to continue and for an answer that has
/// no beginning of its own.
fn check_last(last: LastMessage, thinking: &ThinkingFields, format: Option<&Format>) -> Result<(), ApiError> {
    let wrong = |field: &str, why: &str| Err(ApiError::field(field, why));
    match last {
        LastMessage::Other => Ok(()),
        LastMessage::AssistantWithoutText => wrong(
            "messages",
            "the last one is the assistant's and has no text to continue: add the tool_result of each \
             tool_use, or a message of the user",
        ),
        LastMessage::AssistantText if thinking.enabled => wrong(
            "thinking",
            "cannot begin after the last message, which is the assistant's: disable it, or end with a \
             message of the user",
        ),
        LastMessage::AssistantText if format.is_some() => wrong(
            "output_config.format",
            "cannot hold for a last message of the assistant: end with a message of the user",
        ),
        LastMessage::AssistantText => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Prompt;

    fn short() -> Value {
        json!({"max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut body = short();
        body[key] = value;
        body
    }

    fn read(body: &Value) -> Result<MessagesRequest, ApiError> {
        parse(body.to_string().as_bytes(), Purpose::Answer)
    }

    fn conversation(request: &MessagesRequest) -> &Conversation {
        match &request.asked.prompt {
            Prompt::Conversation(conversation) => conversation,
            other => panic!("{other:?}"),
        }
    }

    fn tool() -> Value {
        json!({"name": "f", "description": "d", "input_schema": {"type": "object"}, "type": "custom",
            "cache_control": {"type": "ephemeral"}, "strict": true, "eager_input_streaming": true})
    }

    #[test]
    fn a_short_request_takes_the_defaults() {
        let request = read(&short()).unwrap();
        assert_eq!(
            (request.asked.max_tokens, request.stream, request.hide_thinking),
            (Some(64), false, false)
        );
        assert_eq!((request.asked.temperature, request.asked.top_p), (None, None));
        assert_eq!(request.asked.options, Options::default());
        let conversation = conversation(&request);
        assert_eq!(conversation.messages, [json!({"role": "user", "content": "Hi"})]);
        assert_eq!(Value::from(conversation.variables.clone()), json!({"enable_thinking": false}));
        assert!(conversation.parallel_tool_calls && !conversation.continue_last);
    }

    #[test]
    fn every_field_that_is_honoured_reaches_the_request() {
        let request = read(&json!({
            "model": "m", "max_tokens": 2048, "system": "Be short.", "temperature": 0.25, "top_p": 0.5,
            "top_k": 3,
            "stop_sequences": ["END"], "stream": true, "tools": [tool()],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
            "output_config": {"effort": "low"},
            "messages": [{"role": "user", "content": "Hi"}],
        }))
        .unwrap();
        let asked = &request.asked;
        assert_eq!(
            (asked.model.as_deref(), asked.max_tokens, asked.temperature, asked.top_p),
            (Some("m"), Some(2048), Some(0.25), Some(0.5))
        );
        assert_eq!((asked.options.top_k, asked.options.stop.as_slice()), (Some(3), &["END".to_owned()][..]));
        assert!(request.stream && request.hide_thinking);
        let conversation = conversation(&request);
        assert_eq!(conversation.messages[0], json!({"role": "system", "content": "Be short."}));
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        assert_eq!(conversation.tools, [json!({"type": "function", "function": function})]);
        assert_eq!(
            (&conversation.tool_choice, conversation.parallel_tool_calls),
            (&ToolChoice::Required, false)
        );
        let variables = json!({"enable_thinking": true, "reasoning_effort": "low"});
        assert_eq!(Value::from(conversation.variables.clone()), variables);
    }

    #[test]
    fn fields_that_clients_always_send_change_nothing() {
        let edits = json!({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]});
        let mut body = short();
        for (key, value) in [
            ("metadata", json!({"user_id": "u"})),
            ("service_tier", json!("auto")),
            ("cache_control", json!({"type": "ephemeral"})),
            ("context_management", edits),
            ("container", json!(null)),
            ("mcp_servers", json!([])),
            ("stop_sequences", json!([])),
            ("tools", json!([])),
            ("tool_choice", json!({"type": "auto"})),
            ("thinking", json!({"type": "disabled"})),
        ] {
            body[key] = value;
        }
        assert_eq!(read(&body).unwrap().asked, read(&short()).unwrap().asked);
    }

    #[test]
    fn every_choice_and_every_kind_of_thinking_is_read() {
        for (choice, expected) in [
            (json!({"type": "auto"}), ToolChoice::Auto),
            (json!({"type": "none"}), ToolChoice::None),
            (json!({"type": "any"}), ToolChoice::Required),
            (json!({"type": "tool", "name": "f"}), ToolChoice::Named("f".into())),
        ] {
            let mut body = with("tools", json!([tool()]));
            body["tool_choice"] = choice;
            assert_eq!(conversation(&read(&body).unwrap()).tool_choice, expected);
        }
        for (thinking, expected) in [
            (json!({"type": "enabled", "budget_tokens": 63}), json!({"enable_thinking": true})),
            (json!({"type": "disabled"}), json!({"enable_thinking": false})),
            (json!({"type": "adaptive"}), json!({})),
        ] {
            let request = read(&with("thinking", thinking)).unwrap();
            assert_eq!(Value::from(conversation(&request).variables.clone()), expected);
        }
    }

    #[test]
    fn a_last_message_of_the_assistant_is_continued() {
        let messages = |content: Value| {
            let last = json!({"role": "assistant", "content": content});
            json!([{"role": "user", "content": "Hi"}, last])
        };
        let request = read(&with("messages", messages(json!("Once")))).unwrap();
        assert!(conversation(&request).continue_last);
        let call = json!([{"type": "tool_use", "id": "c", "name": "f", "input": {}}]);
        let mut thinks = with("messages", messages(json!("Once")));
        thinks["thinking"] = json!({"type": "enabled", "budget_tokens": 1});
        let mut formatted = with("messages", messages(json!("{")));
        formatted["output_config"] = json!({"format": {"type": "json_schema", "schema": {}}});
        for (body, text) in [
            (with("messages", messages(call)), "messages: the last one"),
            (with("messages", messages(json!(""))), "messages: the last one"),
            (thinks, "thinking: cannot begin"),
            (formatted, "output_config.format: cannot hold"),
        ] {
            let error = read(&body).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }

    #[test]
    fn a_schema_keeps_every_digit() {
        let schema = r#"{"const": 123456789012345678901234567890}"#;
        let body = format!(
            r#"{{"max_tokens": 1, "messages": [{{"role": "user", "content": "a"}}],
                "output_config": {{"format": {{"type": "json_schema", "schema": {schema}}}}}}}"#
        );
        let request = parse(body.as_bytes(), Purpose::Answer).unwrap();
        assert_eq!(request.asked.options.format, Some(Format::JsonSchema(schema.to_owned())));
    }

    #[test]
    fn a_count_needs_no_limit() {
        let mut body = short();
        body["max_tokens"] = json!(null);
        assert!(parse(body.to_string().as_bytes(), Purpose::Count).is_ok());
        let error = read(&body).unwrap_err().to_string();
        assert!(error.starts_with("max_tokens: is missing"), "{error}");
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name_with_what_to_do() {
        let tools = |tool: Value| with("tools", json!([tool]));
        let choice = |choice: Value| {
            let mut body = with("tools", json!([tool()]));
            body["tool_choice"] = choice;
            body
        };
        let thinking = |thinking: Value| with("thinking", thinking);
        let format = |format: Value| with("output_config", json!({"format": format}));
        let mut formatted_with_tools = format(json!({"type": "json_schema", "schema": {}}));
        formatted_with_tools["tools"] = json!([tool()]);
        formatted_with_tools["tool_choice"] = json!({"type": "any"});
        let edits = json!({"edits": [{"type": "clear_tool_uses_20250919"}]});
        for (body, text) in [
            (with("max_tokens", json!(0)), "max_tokens: 0 asks for nothing"),
            (with("max_tokens", json!(-1)), "max_tokens: expected a whole number"),
            (with("container", json!("c")), "container: is not supported"),
            (with("mcp_servers", json!([{"url": "x"}])), "mcp_servers: is not supported"),
            (with("inference_geo", json!("us")), "inference_geo: is not supported"),
            (with("output_format", json!({})), "output_format: is not supported: its newer name"),
            (with("speed", json!("fast")), "speed: is not supported"),
            (with("context_management", edits), "context_management.edits[0].type: is not supported"),
            (with("n", json!(2)), "n: there is no such field"),
            (with("stop_sequences", json!([""])), "stop_sequences[0]: expected a text"),
            (with("stop_sequences", json!(vec!["x"; 17])), "stop_sequences: 17 are more than the 16"),
            (with("temperature", json!("hot")), "temperature: expected a number"),
            (with("top_k", json!(-1)), "top_k: expected a whole number"),
            (with("stream", json!(1)), "stream: expected true or false"),
            (tools(json!({"type": "web_search_20250305", "name": "w"})), "tools[0].type: tools of type"),
            (tools(json!({"name": "f"})), "tools[0].input_schema: is missing"),
            (tools(json!({"input_schema": {}})), "tools[0].name: is missing"),
            (
                tools(json!({"name": "f", "input_schema": {}, "parameters": {}})),
                "tools[0].parameters: there is no",
            ),
            (
                tools(json!({"name": "f", "input_schema": {}, "defer_loading": true})),
                "tools[0].defer_loading",
            ),
            (choice(json!({})), "tool_choice.type: is missing"),
            (choice(json!({"type": "required"})), "tool_choice.type: there is no \"required\""),
            (choice(json!({"type": "tool"})), "tool_choice.name: is missing"),
            (choice(json!({"type": "tool", "name": "g"})), "tool_choice: "),
            (with("tool_choice", json!({"type": "any"})), "tool_choice: "),
            (thinking(json!({"type": "enabled"})), "thinking.budget_tokens: is missing"),
            (
                thinking(json!({"type": "enabled", "budget_tokens": 64})),
                "thinking.budget_tokens: 64 is not within",
            ),
            (
                thinking(json!({"type": "enabled", "budget_tokens": 0})),
                "thinking.budget_tokens: 0 is not within",
            ),
            (thinking(json!({"type": "deep"})), "thinking.type: there is no \"deep\""),
            (thinking(json!({})), "thinking.type: is missing"),
            (with("output_config", json!({"effort": "most"})), "output_config.effort: there is no \"most\""),
            (with("output_config", json!({"style": 1})), "output_config.style: there is no such field"),
            (formatted_with_tools, "output_config.format: cannot hold for an answer that tool_choice"),
            (format(json!({"type": "json_schema"})), "output_config.format.schema: is missing"),
            (format(json!({"schema": {}})), "output_config.format.type: is missing"),
            (format(json!({"type": "json_object"})), "output_config.format.type: there is no"),
        ] {
            let error = read(&body).unwrap_err().to_string();
            assert!(error.starts_with(text), "{body}: {error}");
        }
    }
}
