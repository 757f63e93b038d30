//! Anthropic's messages.

use serde_json::{Value, json};

use super::native::model_name;
use super::openai::tool_name;
use super::operation::{DescribedAnswer, EVENTS, Operation, events};
use super::schema::{
    MAX_U32, ObjectSchema, any_object, any_of, constant, count, described, flag, list, list_not_empty,
    list_of, nullable, number_above_0, number_within, object, open_object, reference, text, whole, word,
};

/// Most stop texts.
const MAX_STOPS: usize = 16;

/// The operations.
pub(super) fn operations() -> Vec<Operation> {
    let stream = "Each event has a name, which its data repeat as type: message_start, then \
        content_block_start, content_block_delta and content_block_stop for each block, \
        message_delta, message_stop. A ping may come between them; after an error nothing \
        follows.";
    let counted = open_object().required("input_tokens", count("Tokens of the prompt.")).build();
    vec![
        Operation::new(
            "messages",
            "Answers a conversation",
            DescribedAnswer::json(200, "The answer.", reference("Message")).or(EVENTS, events(stream)),
        )
        .body(reference("MessagesRequest")),
        Operation::new(
            "count_tokens",
            "Counts the tokens of a conversation",
            DescribedAnswer::json(200, "The number.", counted),
        )
        .body(reference("CountTokensRequest")),
    ]
}

/// The schemas, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    let limit = || whole(1, MAX_U32, "New tokens at most.");
    vec![
        ("MessagesRequest", request(object().required("max_tokens", limit()))),
        ("CountTokensRequest", request(object().optional("max_tokens", limit()))),
        ("InputMessage", input_message()),
        ("MessageTool", tool()),
        ("Message", message()),
    ]
}

fn request(object: ObjectSchema) -> Value {
    let messages = list_not_empty(reference("InputMessage"));
    let stop = json!({"type": "string", "minLength": 1, "maxLength": 1024});
    object
        .required("messages", described(messages, "The conversation, oldest message first."))
        .optional("model", model_name())
        .optional("system", any_of([text("A text."), list(text_block())]))
        .optional("tools", list(reference("MessageTool")))
        .optional("tool_choice", tool_choice())
        .optional("stop_sequences", list_of(0, MAX_STOPS, stop))
        .optional("temperature", number_within(0.0, 100.0, "0 is greedy; 1 where it is left out."))
        .optional("top_p", number_above_0(1.0, "Nucleus of sampling; 1 where it is left out."))
        .optional("top_k", whole(0, MAX_U32, "Samples from this many best tokens only."))
        .optional("thinking", thinking())
        .optional("output_config", output_config())
        .optional("context_management", context_management())
        .optional("stream", flag("Whether the answer is a stream of events."))
        .optional("metadata", any_object("Changes nothing."))
        .optional("service_tier", text("Changes nothing."))
        .optional("cache_control", any_object("Changes nothing."))
        .build()
}

fn text_block() -> Value {
    open_object().required("type", constant("text")).required("text", text("The text.")).build()
}

fn input_message() -> Value {
    let result = open_object()
        .required("type", constant("tool_result"))
        .required("tool_use_id", text("The id of the call."))
        .sometimes("content", nullable(any_of([text("A text."), list(text_block())])))
        .sometimes("is_error", nullable(flag("Whether the tool failed.")))
        .build();
    let call = open_object()
        .required("type", constant("tool_use"))
        .required("id", text("The id of the call."))
        .required("name", text("The name of the tool."))
        .sometimes("input", nullable(any_object("The arguments.")))
        .build();
    let thought = open_object()
        .required("type", constant("thinking"))
        .required("thinking", text("The reasoning of an earlier answer."))
        .build();
    let hidden = open_object().required("type", constant("redacted_thinking")).build();
    let of = |role: &str, blocks: Vec<Value>| {
        open_object()
            .required("role", constant(role))
            .required("content", any_of([text("A text."), list(any_of(blocks))]))
            .build()
    };
    any_of([
        of("user", vec![text_block(), result]),
        of("assistant", vec![text_block(), call, thought, hidden]),
        of("system", vec![text_block()]),
    ])
}

fn tool() -> Value {
    object()
        .required("name", tool_name(128))
        .optional("description", text("What it does, for the model."))
        .required("input_schema", any_object("The JSON schema of its arguments."))
        .optional("type", constant("custom"))
        .optional("cache_control", any_object("Changes nothing."))
        .optional("eager_input_streaming", flag("Changes nothing: arguments always stream as they are made."))
        .optional("allowed_callers", json!({"type": "array", "description": "Changes nothing."}))
        .optional("strict", flag("Changes nothing."))
        .optional("defer_loading", json!({"const": false}))
        .build()
}

fn tool_choice() -> Value {
    let of = |kind: &str| {
        object()
            .required("type", constant(kind))
            .optional("disable_parallel_tool_use", flag("Whether an answer holds one call at most."))
    };
    let named = of("tool").required("name", text("A tool of tools.")).build();
    any_of([of("auto").build(), of("any").build(), of("none").build(), named])
}

fn thinking() -> Value {
    let of = |kind: &str| {
        object()
            .required("type", constant(kind))
            .optional("display", word(&["summarized", "omitted"], "Whether the answer shows it."))
    };
    let budget = || whole(1, MAX_U32, "Less than max_tokens, which bounds both together.");
    any_of([
        of("enabled").required("budget_tokens", budget()).build(),
        of("disabled").build(),
        of("adaptive").build(),
    ])
}

fn output_config() -> Value {
    let format = object()
        .required("type", constant("json_schema"))
        .required("schema", any_object("The JSON schema of the answer."))
        .build();
    object()
        .optional("effort", word(&["low", "medium", "high", "xhigh", "max"], "How much the model thinks."))
        .optional("format", format)
        .build()
}

/// The one edit that changes nothing, which Claude Code always sends.
fn context_management() -> Value {
    let edit = open_object()
        .required("type", constant("clear_thinking_20251015"))
        .required("keep", constant("all"))
        .build();
    open_object().sometimes("edits", nullable(list(edit))).build()
}

fn message() -> Value {
    let call = open_object()
        .required("type", constant("tool_use"))
        .required("id", text("The id of the call."))
        .required("name", text("The name of the tool."))
        .required("input", any_object("The arguments."))
        .build();
    let thought = open_object()
        .required("type", constant("thinking"))
        .required("thinking", text("The reasoning."))
        .required("signature", text("Always empty."))
        .build();
    let usage = open_object()
        .required("input_tokens", count("Tokens of the prompt."))
        .required("cache_creation_input_tokens", count("Always 0."))
        .required("cache_read_input_tokens", count("Always 0."))
        .required("output_tokens", count("Tokens of the answer."))
        .build();
    let reasons = ["end_turn", "max_tokens", "stop_sequence", "tool_use"];
    open_object()
        .required("id", text("The id of the answer."))
        .required("type", constant("message"))
        .required("role", constant("assistant"))
        .required("model", text("The model that answered."))
        .required("content", list(any_of([text_block(), call, thought])))
        .required("stop_reason", word(&reasons, "Why the answer ended."))
        .required("stop_sequence", nullable(text("The one of stop_sequences that ended it.")))
        .required("usage", usage)
        .build()
}
