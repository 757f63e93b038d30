//! The body of a request, its checks, and what the answer repeats of it.

use serde_json::{Map, Value, json};

use super::input;
use super::join_objects;
use super::text::{self, TextFields};
use super::tools::{self, ResponseTools};
use crate::conversation::{Conversation, ToolChoice};
use crate::echo::echo;
use crate::error::ApiError;
use crate::fields::Asked;
use crate::json_body::{self, float};
use crate::json_object::{ObjectAt, UnsupportedField};
use crate::openai::chat::EFFORTS;
use crate::options::Options;
use crate::transcript::Transcript;

/// Fields that are read one by one.
const OWN: &[&str] = &[
    "input",
    "model",
    "instructions",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "text",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_logprobs",
    "include",
    "reasoning",
    "metadata",
    "stream",
    "stream_options",
    "store",
    "background",
    "truncation",
    "seed",
    "chat_template_kwargs",
];

/// Fields about sampling that have their own reader. Those that OpenAI does not have here are this server's
/// own.
const SAMPLING: &[&str] = &[
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
];

/// Fields that clients send without being asked to, and that change nothing here: who the user is, how OpenAI
/// bills and caches, how many calls of OpenAI's own tools are allowed, and what clients tell their vendor
/// about themselves.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "service_tier",
    "max_tool_calls",
    "client_metadata",
];

const UNSUPPORTED: &[UnsupportedField] = &[
    UnsupportedField {
        name: "previous_response_id",
        instead: "this server stores no answers: send the whole conversation in input, the items of earlier \
                  answers included",
    },
    UnsupportedField {
        name: "conversation",
        instead: "this server stores no conversations: send the whole conversation in input",
    },
    UnsupportedField {
        name: "prompt",
        instead: "this server stores no prompts: send the text in instructions and input",
    },
    UnsupportedField { name: "moderation", instead: "nothing is moderated here: leave it out" },
    UnsupportedField {
        name: "context_management",
        instead: "nothing is compacted here: leave it out, and shorten input where it is too long",
    },
];

/// What `include` may name. Encrypted reasoning is for answers whose reasoning the caller may not read; here
/// it is in the items themselves, and comes back with them.
const INCLUDED: &[&str] = &["reasoning.encrypted_content", LOGPROBS];
const LOGPROBS: &str = "message.output_text.logprobs";

/// The most alternatives of a token, as the engine has it.
const MAX_TOP_LOGPROBS: u32 = 20;

/// Every field that is not refused.
#[cfg(test)]
pub(crate) fn fields() -> Vec<&'static str> {
    [OWN, SAMPLING, WITHOUT_EFFECT].concat()
}

/// Labels of an answer (`metadata`), as at OpenAI.
const MAX_LABELS: usize = 16;
/// The longest label, in characters.
const MAX_LABEL_CHARS: usize = 512;
/// The longest name of a label, in characters.
const MAX_LABEL_KEY_CHARS: usize = 64;

/// Most bytes of the settings that an answer repeats: a stream repeats them in three events, so an answer is
/// at most 768 KiB longer than its text. Instructions and tools of that length exceed most contexts.
const MAX_SETTINGS_BYTES: usize = 256 * 1024;
/// Longest name of a user, in characters, as at OpenAI: each answer repeats it.
const MAX_USER_CHARS: usize = 512;

/// A request.
#[derive(Debug)]
pub(super) struct CreateRequest {
    /// What is asked of the model.
    pub(super) asked: Asked,
    /// Whether the answer is a stream.
    pub(super) stream: bool,
    /// The fields of the answer that repeat the request, the text of an object.
    pub(super) settings: String,
}

/// Reads a body.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the field.
pub(super) fn parse(bytes: &[u8]) -> Result<CreateRequest, ApiError> {
    let unsupported: Vec<&str> = UNSUPPORTED.iter().map(|field| field.name).collect();
    let known = [OWN, SAMPLING, WITHOUT_EFFECT, unsupported.as_slice()].concat();
    let object = json_body::object(bytes, &known, r#"{"model": "MODEL", "input": "Hello"}"#)?;
    let body = ObjectAt::body(&object);
    refuse_stored(&body)?;
    let tools = tools::read(&body)?;
    let text = text::read(&body, bytes)?;
    let reasoning = reasoning(&body)?;
    let logprobs = logprobs(&body)?;
    check_form(&tools, &text)?;
    let mut settings = settings(&body)?;
    settings["tool_choice"] = tools.choice_listed;
    settings["text"] = text.listed;
    settings["reasoning"] = reasoning.listed;
    settings["top_logprobs"] = json!(logprobs.unwrap_or(0));
    check_length(&settings, &tools.listed)?;
    let settings = join_objects(&settings.to_string(), &format!("{{\"tools\":{}}}", tools.listed));
    let conversation = Conversation {
        messages: messages(&body)?,
        tools: tools.tools,
        tool_choice: tools.choice,
        parallel_tool_calls: parallel_tool_calls(&body)?,
        variables: reasoning.variables,
        continue_last: false,
    };
    let asked = Asked {
        prompt: conversation.into(),
        model: body.text("model")?.map(str::to_owned),
        max_tokens: max_output_tokens(&body)?,
        temperature: body.read("temperature", "a number", float)?,
        top_p: body.read("top_p", "a number", float)?,
        seed: body.read("seed", "a whole number from 0 to 18446744073709551615", Value::as_u64)?,
        options: Options { logprobs, format: text.format, ..Options::from_json(&object, bytes)? },
        ..Asked::default()
    };
    Ok(CreateRequest { asked, stream: body.flag("stream")?.unwrap_or(false), settings })
}

/// Bounds what the answer repeats. The error names the field that has the most of it.
fn check_length(settings: &Value, tools: &str) -> Result<(), ApiError> {
    let own = settings.as_object().into_iter().flatten();
    let own = own.map(|(field, value)| (field.as_str(), value.to_string().len()));
    let fields: Vec<(&str, usize)> = own.chain([("tools", tools.len())]).collect();
    let total: usize = fields.iter().map(|(_, bytes)| bytes).sum();
    match fields.iter().max_by_key(|(_, bytes)| *bytes).filter(|_| total > MAX_SETTINGS_BYTES) {
        None => Ok(()),
        Some((field, bytes)) => {
            let why = format!(
                "has {bytes} of the {total} bytes of JSON that the answer repeats, which may be \
                 {MAX_SETTINGS_BYTES}: shorten it, or move text to input"
            );
            Err(ApiError::field(field, why))
        }
    }
}

/// What an answer repeats of the fields that stand as they are, and what is the same in every answer.
fn settings(body: &ObjectAt<'_>) -> Result<Value, ApiError> {
    let metadata = metadata(body)?;
    Ok(json!({
        "instructions": body.text("instructions")?,
        "metadata": metadata,
        "parallel_tool_calls": parallel_tool_calls(body)?,
        "max_output_tokens": max_output_tokens(body)?,
        "max_tool_calls": body.count("max_tool_calls")?,
        "temperature": number(body, "temperature", 1),
        "top_p": number(body, "top_p", 1),
        "presence_penalty": number(body, "presence_penalty", 0),
        "frequency_penalty": number(body, "frequency_penalty", 0),
        "safety_identifier": user(body, "safety_identifier")?,
        "prompt_cache_key": user(body, "prompt_cache_key")?,
        "user": user(body, "user")?,
        "truncation": "disabled",
        "store": false,
        "background": false,
        "previous_response_id": null,
        "conversation": null,
        "service_tier": "default",
    }))
}

/// Who the user is, in one of the fields for it.
fn user<'a>(body: &ObjectAt<'a>, key: &str) -> Result<Option<&'a str>, ApiError> {
    let name = body.text(key)?;
    match name.filter(|name| name.chars().count() > MAX_USER_CHARS) {
        Some(_) => Err(body.error(key, format!("is longer than {MAX_USER_CHARS} characters: shorten it"))),
        None => Ok(name),
    }
}

/// The labels of an answer, within OpenAI's bounds: each answer repeats them.
fn metadata(body: &ObjectAt<'_>) -> Result<Map<String, Value>, ApiError> {
    let Some(metadata) = body.object("metadata")? else { return Ok(Map::new()) };
    if metadata.entries().len() > MAX_LABELS {
        let why =
            format!("{} labels are more than the {MAX_LABELS} that are allowed", metadata.entries().len());
        return Err(body.error("metadata", why));
    }
    for key in metadata.entries().keys() {
        let long = metadata.required_text(key)?.chars().count() > MAX_LABEL_CHARS;
        if long || key.chars().count() > MAX_LABEL_KEY_CHARS {
            let why = format!(
                "is longer than {MAX_LABEL_CHARS} characters, or its name than {MAX_LABEL_KEY_CHARS}: shorten it"
            );
            return Err(metadata.error(&echo(key), why));
        }
    }
    Ok(metadata.entries().clone())
}

fn parallel_tool_calls(body: &ObjectAt<'_>) -> Result<bool, ApiError> {
    Ok(body.flag("parallel_tool_calls")?.unwrap_or(true))
}

/// Refuses what needs a store of answers, work in the background, or a conversation that is cut.
fn refuse_stored(body: &ObjectAt<'_>) -> Result<(), ApiError> {
    body.refuse(UNSUPPORTED)?;
    // OpenAI's default is true, and clients leave it out. The answer says false, which is what happened; only
    // who relies on the store is refused.
    if body.flag("store")? == Some(true) {
        let why = "true is not supported: this server stores no answers; send false, and the whole \
                   conversation in input";
        return Err(body.error("store", why));
    }
    if body.flag("background")? == Some(true) {
        let why =
            "true is not supported: there is no store to read the answer from; wait for it, or set stream";
        return Err(body.error("background", why));
    }
    if let Some(options) = body.object("stream_options")? {
        options.only(&["include_obfuscation"])?;
        if options.flag("include_obfuscation")? == Some(true) {
            let why = "events are not padded to equal lengths here: leave it out or give false";
            return Err(options.error("include_obfuscation", why));
        }
    }
    if body.word("truncation", &["auto", "disabled"])? == Some("auto") {
        let why = "\"auto\" is not supported: an input that is too long is refused, never cut; send \
                   \"disabled\" and shorten input";
        return Err(body.error("truncation", why));
    }
    Ok(())
}

/// An answer that must be a call has no other form. Where the model decides, it is a call or in this form.
fn check_form(tools: &ResponseTools, text: &TextFields) -> Result<(), ApiError> {
    if text.format.is_none() || !matches!(tools.choice, ToolChoice::Required | ToolChoice::Named(_)) {
        return Ok(());
    }
    let why = "cannot hold for an answer that tool_choice requires to be a call: leave out one of them";
    Err(ApiError::field("text.format", why))
}

fn messages(body: &ObjectAt<'_>) -> Result<Vec<Value>, ApiError> {
    let mut transcript = Transcript::default();
    if let Some(instructions) = body.text("instructions")?.filter(|text| !text.is_empty()) {
        transcript.system(instructions);
    }
    let input =
        body.get("input").ok_or_else(|| body.error("input", "is missing: give a text or a list of items"))?;
    input::read(input, &mut transcript)?;
    Ok(transcript.into_messages())
}

fn max_output_tokens(body: &ObjectAt<'_>) -> Result<Option<u32>, ApiError> {
    const KEY: &str = "max_output_tokens";
    match body.count(KEY)? {
        Some(0) => Err(body.error(KEY, "0 asks for nothing: give 1 or more")),
        count => Ok(count),
    }
}

/// A number as the caller wrote it.
fn number(body: &ObjectAt<'_>, key: &str, default: u8) -> Value {
    body.get(key).cloned().unwrap_or_else(|| json!(default))
}

/// How many alternatives each token comes with, where log probabilities are asked for.
fn logprobs(body: &ObjectAt<'_>) -> Result<Option<u32>, ApiError> {
    const KEY: &str = "top_logprobs";
    let mut wanted = false;
    for (index, name) in body.list("include")?.unwrap_or_default().iter().enumerate() {
        match name.as_str().filter(|name| INCLUDED.contains(name)) {
            Some(name) => wanted |= name == LOGPROBS,
            None => {
                let found = json_body::found(name);
                let why = format!("{found} is not supported; known are: {}", INCLUDED.join(", "));
                return Err(ApiError::field(&format!("include[{index}]"), why));
            }
        }
    }
    let top = body.count(KEY)?;
    if let Some(count) = top.filter(|count| *count > MAX_TOP_LOGPROBS) {
        return Err(
            body.error(KEY, format!("{count} is more than {MAX_TOP_LOGPROBS}, the most that is given"))
        );
    }
    Ok(match top {
        Some(count) if count > 0 || wanted => Some(count),
        None if wanted => Some(0),
        _ => None,
    })
}

struct ReasoningFields {
    /// Variables of the chat template.
    variables: Map<String, Value>,
    /// As the answer repeats it.
    listed: Value,
}

/// How much the model is to think. Templates know two variables for it: `enable_thinking` and
/// `reasoning_effort`; one that has neither takes no notice. A summary is no other text here: reasoning comes
/// whole, as the content of its item.
fn reasoning(body: &ObjectAt<'_>) -> Result<ReasoningFields, ApiError> {
    let given = body.object("chat_template_kwargs")?.map(|kwargs| kwargs.entries().clone());
    let mut variables = given.unwrap_or_default();
    let Some(reasoning) = body.object("reasoning")? else {
        return Ok(ReasoningFields { variables, listed: json!({"effort": null, "summary": null}) });
    };
    reasoning.only(&["effort", "summary", "generate_summary"])?;
    let effort = reasoning.word("effort", EFFORTS)?;
    let summary = reasoning.text("summary")?;
    if let Some(effort) = effort {
        variables.entry("enable_thinking").or_insert_with(|| json!(effort != "none"));
        if effort != "none" {
            variables.entry("reasoning_effort").or_insert_with(|| json!(effort));
        }
    }
    Ok(ReasoningFields { variables, listed: json!({"effort": effort, "summary": summary.map(echo)}) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Prompt;
    use crate::options::Format;

    fn read(body: &Value) -> Result<CreateRequest, ApiError> {
        parse(body.to_string().as_bytes())
    }

    fn settings_of(request: &CreateRequest) -> Value {
        serde_json::from_str(&request.settings).unwrap()
    }

    fn conversation(request: &CreateRequest) -> &Conversation {
        match &request.asked.prompt {
            Prompt::Conversation(conversation) => conversation,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_short_request_takes_the_defaults() {
        let request = read(&json!({"input": "Hi"})).unwrap();
        let conversation = conversation(&request);
        assert_eq!(conversation.messages, [json!({"role": "user", "content": "Hi"})]);
        assert_eq!((&conversation.tool_choice, conversation.parallel_tool_calls), (&ToolChoice::Auto, true));
        let asked = &request.asked;
        assert_eq!((asked.max_tokens, asked.temperature, asked.top_p, asked.seed), (None, None, None, None));
        assert_eq!((&asked.options, request.stream), (&Options::default(), false));
        assert_eq!(
            settings_of(&request),
            json!({
                "instructions": null, "metadata": {}, "tools": [], "tool_choice": "auto",
                "parallel_tool_calls": true, "text": {"format": {"type": "text"}},
                "reasoning": {"effort": null, "summary": null}, "max_output_tokens": null,
                "max_tool_calls": null, "temperature": 1, "top_p": 1, "presence_penalty": 0,
                "frequency_penalty": 0, "top_logprobs": 0, "truncation": "disabled", "store": false,
                "background": false, "previous_response_id": null, "conversation": null,
                "service_tier": "default", "safety_identifier": null, "prompt_cache_key": null, "user": null,
            })
        );
    }

    #[test]
    fn every_field_that_is_honoured_reaches_the_request_and_the_answer() {
        let request = read(&json!({
            "model": "m", "instructions": "Be short.", "input": [{"role": "system", "content": "More."},
                {"role": "user", "content": "Hi"}],
            "max_output_tokens": 16, "temperature": 0.25, "top_p": 0.5, "seed": 7, "stream": true,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "top_k": 3, "stop": ["END"],
            "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"k": "v"},
            "parallel_tool_calls": false, "reasoning": {"effort": "low", "summary": "auto"},
            "tools": [{"type": "function", "name": "f"}], "tool_choice": "required",
            "store": false, "background": false,
            "truncation": "disabled", "user": "u", "max_tool_calls": 3,
        }))
        .unwrap();
        let conversation = conversation(&request);
        assert_eq!(conversation.messages[0], json!({"role": "system", "content": "Be short.\n\nMore."}));
        assert_eq!((conversation.tools.len(), &conversation.tool_choice), (1, &ToolChoice::Required));
        assert_eq!(
            Value::from(conversation.variables.clone()),
            json!({"enable_thinking": true, "reasoning_effort": "low"})
        );
        assert!(!conversation.parallel_tool_calls && request.stream);
        let asked = &request.asked;
        assert_eq!(
            (asked.model.as_deref(), asked.max_tokens, asked.temperature, asked.top_p, asked.seed),
            (Some("m"), Some(16), Some(0.25), Some(0.5), Some(7))
        );
        let options = &asked.options;
        assert_eq!((options.presence_penalty, options.frequency_penalty), (Some(0.5), Some(-0.5)));
        assert_eq!((options.top_k, options.stop.as_slice()), (Some(3), &["END".to_owned()][..]));
        assert_eq!((options.logprobs, &options.format), (Some(2), &None));
        for (key, value) in [
            ("temperature", json!(0.25)),
            ("top_logprobs", json!(2)),
            ("metadata", json!({"k": "v"})),
            ("reasoning", json!({"effort": "low", "summary": "auto"})),
            ("tool_choice", json!("required")),
            ("max_output_tokens", json!(16)),
            ("max_tool_calls", json!(3)),
            ("user", json!("u")),
        ] {
            assert_eq!(settings_of(&request)[key], value, "{key}");
        }
    }

    #[test]
    fn a_format_reaches_the_request_beside_tools_that_need_not_be_called() {
        for (choice, offered) in [("auto", 1), ("none", 0)] {
            let request = read(&json!({
                "input": "a", "text": {"format": {"type": "json_object"}}, "tool_choice": choice,
                "tools": [{"type": "function", "name": "f"}, {"type": "web_search"}],
            }))
            .unwrap();
            assert_eq!(request.asked.options.format, Some(Format::JsonObject));
            assert_eq!(settings_of(&request)["text"], json!({"format": {"type": "json_object"}}));
            assert_eq!(conversation(&request).tools.len(), offered);
            assert_eq!(settings_of(&request)["tools"].as_array().unwrap().len(), 1);
        }
    }

    #[test]
    fn what_an_answer_repeats_is_bounded() {
        let long = "x".repeat(MAX_USER_CHARS + 1);
        for key in ["user", "safety_identifier", "prompt_cache_key"] {
            let error = read(&json!({"input": "a", key: long})).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{key}: is longer than 512 characters")), "{error}");
            read(&json!({"input": "a", key: long[1..]})).unwrap();
        }
        for (key, value) in [
            ("instructions", json!("x".repeat(MAX_SETTINGS_BYTES))),
            (
                "tools",
                json!([{"type": "function", "name": "f", "description": "x".repeat(MAX_SETTINGS_BYTES)}]),
            ),
            (
                "text",
                json!({"format": {"type": "json_schema", "schema": {"description": "x".repeat(MAX_SETTINGS_BYTES)}}}),
            ),
        ] {
            let error = read(&json!({"input": "a", key: value})).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{key}: has 26")), "{error}");
        }
        read(&json!({"input": "x".repeat(2 * MAX_SETTINGS_BYTES)})).unwrap();
    }

    #[test]
    fn fields_that_clients_always_send_change_nothing() {
        let plain = read(&json!({"input": "a"})).unwrap();
        let sent = read(&json!({
            "input": "a", "store": null, "previous_response_id": null, "conversation": null, "prompt": null,
            "include": ["reasoning.encrypted_content"], "service_tier": "auto", "prompt_cache_key": null,
            "stream_options": {"include_obfuscation": false}, "client_metadata": {"a": "b"},
            "prompt_cache_retention": "24h", "truncation": null, "reasoning": null, "text": null,
        }))
        .unwrap();
        assert_eq!((sent.asked, sent.settings), (plain.asked, plain.settings));
    }

    #[test]
    fn thinking_is_switched_by_the_effort_and_by_template_variables() {
        for (body, expected) in [
            (json!({"input": "a", "reasoning": {"effort": "none"}}), json!({"enable_thinking": false})),
            (json!({"input": "a", "reasoning": {"summary": "auto"}}), json!({})),
            (
                json!({"input": "a", "reasoning": {"effort": "high"},
                    "chat_template_kwargs": {"enable_thinking": false}}),
                json!({"enable_thinking": false, "reasoning_effort": "high"}),
            ),
        ] {
            assert_eq!(
                Value::from(conversation(&read(&body).unwrap()).variables.clone()),
                expected,
                "{body}"
            );
        }
    }

    #[test]
    fn log_probabilities_are_given_where_they_are_asked_for() {
        let wanted = json!(["message.output_text.logprobs"]);
        for (body, expected) in [
            (json!({"input": "a", "include": wanted}), Some(0)),
            (json!({"input": "a", "top_logprobs": 3}), Some(3)),
            (json!({"input": "a", "top_logprobs": 0}), None),
            (json!({"input": "a", "top_logprobs": 0, "include": wanted}), Some(0)),
        ] {
            assert_eq!(read(&body).unwrap().asked.options.logprobs, expected, "{body}");
        }
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name_with_what_to_do() {
        for (field, value, text) in [
            ("previous_response_id", json!("resp_1"), "send the whole conversation in input"),
            ("conversation", json!("conv_1"), "send the whole conversation in input"),
            ("prompt", json!({"id": "pmpt_1"}), "send the text in instructions and input"),
            ("moderation", json!({"model": "m"}), "leave it out"),
            ("context_management", json!([{"type": "compaction"}]), "leave it out"),
            ("store", json!(true), "send false"),
            ("background", json!(true), "set stream"),
            ("truncation", json!("auto"), "shorten input"),
            ("truncation", json!("half"), "there is no \"half\""),
            ("max_output_tokens", json!(0), "1 or more"),
            ("max_output_tokens", json!("x"), "whole number"),
            ("max_tokens", json!(1), "there is no such field"),
            ("response_format", json!({}), "there is no such field"),
            ("include[0]", json!(null), "is not supported; known are"),
            ("top_logprobs", json!(21), "more than 20"),
            ("stream_options.include_obfuscation", json!(null), "leave it out or give false"),
            ("text.format", json!(null), "requires to be a call"),
            ("reasoning.effort", json!(null), "there is no \"most\""),
            ("reasoning.budget", json!(null), "there is no such field here"),
            ("instructions", json!(["a"]), "expected a string"),
            ("metadata", json!("a"), "expected an object"),
            ("metadata.k", json!(null), "expected a string"),
            ("metadata.long", json!(null), "shorten it"),
            ("temperature", json!("hot"), "expected a number"),
            ("stream", json!(1), "true or false"),
            ("top_k", json!(-1), "found -1"),
        ] {
            let mut body = json!({"input": "a"});
            match field {
                "metadata.k" => body["metadata"] = json!({"k": 1}),
                "metadata.long" => body["metadata"] = json!({"long": "x".repeat(513)}),
                "include[0]" => body["include"] = json!(["file_search_call.results"]),
                "stream_options.include_obfuscation" => {
                    body["stream_options"] = json!({"include_obfuscation": true});
                }
                "text.format" => {
                    body["text"] = json!({"format": {"type": "json_object"}});
                    body["tools"] = json!([{"type": "function", "name": "f"}]);
                    body["tool_choice"] = json!("required");
                }
                "reasoning.effort" => body["reasoning"] = json!({"effort": "most"}),
                "reasoning.budget" => body["reasoning"] = json!({"budget": 1}),
                field => body[field] = value,
            }
            let error = read(&body).map(|_| ()).unwrap_err();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
                "{body}: {error:?}"
            );
            assert!(error.to_string().contains(text), "{error}");
        }
        let error = read(&json!({"model": "m"})).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("input: is missing"), "{error}");
    }
}
