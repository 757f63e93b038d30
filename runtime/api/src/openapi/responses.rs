//! OpenAI's responses, without a store.

use serde_json::{Value, json};

use super::native::{model_name, sampling};
use super::openai::{text_part, tool_name};
use super::operation::{DescribedAnswer, EVENTS, Operation, events};
use super::schema::{
    MAX_U32, ObjectSchema, any_object, any_of, constant, count, described, flag, list, list_not_empty,
    nullable, number, number_above_0, number_within, object, open_object, reference, text, whole, word,
};
use crate::openai::chat::EFFORTS;

/// The operations.
pub(super) fn operations() -> Vec<Operation> {
    let stream = "Each event has a name, such as response.output_text.delta, which its data repeat as \
        type, and a sequence_number. The last one is response.completed, response.incomplete or \
        response.failed; `[DONE]` follows the first two.";
    let answer = DescribedAnswer::json(200, "The answer.", reference("Response")).or(EVENTS, events(stream));
    vec![
        Operation::new("responses", "Answers a text or a list of items", answer)
            .body(reference("ResponseRequest")),
    ]
}

/// The schemas, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("ResponseRequest", request()),
        ("ResponseInputItem", input_item()),
        ("ResponseTool", tool()),
        ("ResponseItem", item()),
        ("Response", response()),
    ]
}

fn request() -> Value {
    let items = list_not_empty(reference("ResponseInputItem"));
    let input = any_of([json!({"type": "string", "minLength": 1}), items]);
    let reasoning = open_object()
        .sometimes("effort", nullable(word(EFFORTS, "How much the model thinks.")))
        .sometimes("summary", nullable(text("Changes nothing: the reasoning itself is in the answer.")))
        .build();
    let own = object()
        .required("input", described(input, "What is said to the model."))
        .optional("model", model_name())
        .optional("instructions", text("Said before the input."))
        .optional("tools", list(reference("ResponseTool")))
        .optional("tool_choice", tool_choice())
        .optional("parallel_tool_calls", flag("Whether an answer may hold more than one call."))
        .optional("text", text_settings())
        .optional("max_output_tokens", whole(1, MAX_U32, "New tokens at most."))
        .optional("temperature", number_within(0.0, 100.0, "0 is greedy; 1 where it is left out."))
        .optional("top_p", number_above_0(1.0, "Nucleus of sampling; 1 where it is left out."))
        .optional("top_logprobs", whole(0, 20, "The most probable tokens at each place."))
        .optional("include", list(word(&["reasoning.encrypted_content", "message.output_text.logprobs"], "")))
        .optional("reasoning", reasoning)
        .optional("metadata", any_object("Repeated by the answer."))
        .optional("stream", flag("Whether the answer is a stream of events."))
        .optional("store", json!({"const": false, "description": "No answers are stored."}))
        .optional("background", json!({"const": false, "description": "Not offered."}))
        .optional("truncation", constant("disabled"))
        .optional("seed", whole(0, u64::MAX, "The same seed, prompt and settings give the same tokens."))
        .optional("chat_template_kwargs", any_object("Variables of the model's chat template."));
    without_effect(sampling(own)).build()
}

fn without_effect(object: ObjectSchema) -> ObjectSchema {
    object
        .optional("user", text("Changes nothing."))
        .optional("safety_identifier", text("Changes nothing."))
        .optional("prompt_cache_key", text("Changes nothing."))
        .optional("prompt_cache_retention", text("Changes nothing."))
        .optional("prompt_cache_options", any_object("Changes nothing."))
        .optional("service_tier", text("Changes nothing."))
        .optional("max_tool_calls", whole(0, MAX_U32, "Changes nothing: no tools run here."))
        .optional("stream_options", any_object("Changes nothing."))
        .optional("client_metadata", any_object("Changes nothing."))
}

fn content() -> Value {
    let parts = ["input_text", "output_text", "text", "refusal"].map(text_part);
    any_of([text("A text."), list(any_of(parts))])
}

fn input_item() -> Value {
    let message = open_object()
        .sometimes("type", constant("message"))
        .required("role", word(&["user", "assistant", "system", "developer"], "Who says it."))
        .required("content", content())
        .build();
    let part = open_object().required("text", text("A text.")).build();
    let reasoning = open_object()
        .required("type", constant("reasoning"))
        .sometimes("summary", nullable(list(part.clone())))
        .sometimes("content", nullable(list(part)))
        .build();
    let call = open_object()
        .required("type", constant("function_call"))
        .required("call_id", text("The id of the call."))
        .required("name", text("The name of the function."))
        .required("arguments", text("A JSON object as text."))
        .build();
    let result = open_object()
        .required("type", constant("function_call_output"))
        .required("call_id", text("The id of the call."))
        .required("output", content())
        .build();
    any_of([message, reasoning, call, result])
}

fn tool() -> Value {
    let function = object()
        .required("type", constant("function"))
        .required("name", tool_name(128))
        .optional("description", text("What it does, for the model."))
        .optional("parameters", any_object("The JSON schema of its arguments."))
        .optional("strict", flag("Changes nothing: a call that is required follows its schema."))
        .optional("allowed_callers", json!({"type": "array", "description": "Changes nothing."}))
        .optional("output_schema", any_object("Changes nothing."))
        .optional("defer_loading", json!({"const": false}))
        .build();
    let others = "Tools that OpenAI's servers or single clients run; they are left out.";
    let other = json!({
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string", "not": {"const": "function"}}},
        "description": others,
    });
    any_of([function, other])
}

fn tool_choice() -> Value {
    let named = || {
        open_object()
            .required("type", constant("function"))
            .required("name", text("A function of tools."))
            .build()
    };
    let allowed = open_object()
        .required("type", constant("allowed_tools"))
        .sometimes("mode", nullable(word(&["auto", "required"], "Whether one must be called.")))
        .required("tools", list(named()))
        .build();
    any_of([word(&["none", "auto", "required"], "Whether the answer is a call."), named(), allowed])
}

fn text_settings() -> Value {
    let of = |kind: &str| object().required("type", constant(kind));
    let schema = of("json_schema")
        .optional("name", text("For models that read it."))
        .optional("description", text("For models that read it."))
        .required("schema", json!({"type": ["object", "boolean"], "description": "A JSON schema."}))
        .optional("strict", flag("Changes nothing: the schema always holds."))
        .build();
    object()
        .optional("format", any_of([of("text").build(), of("json_object").build(), schema]))
        .optional("verbosity", constant("medium"))
        .build()
}

/// An item of an answer.
fn item() -> Value {
    let status = || word(&["in_progress", "completed", "incomplete"], "Whether the item is whole.");
    let common = |kind: &str| {
        open_object()
            .required("id", text("The id of the item."))
            .required("type", constant(kind))
            .required("status", status())
    };
    let text_part = open_object()
        .required("type", constant("output_text"))
        .required("text", text("The text."))
        .required("annotations", json!({"type": "array"}))
        .required("logprobs", list(any_object("The log probability of a token.")))
        .build();
    let reasoning_part = open_object()
        .required("type", constant("reasoning_text"))
        .required("text", text("The reasoning."))
        .build();
    any_of([
        common("message")
            .required("role", constant("assistant"))
            .required("content", list(text_part))
            .build(),
        common("reasoning")
            .required("summary", json!({"type": "array"}))
            .required("content", list(reasoning_part))
            .build(),
        common("function_call")
            .required("call_id", text("The id of the call."))
            .required("name", text("The name of the function."))
            .required("arguments", text("A JSON object as text."))
            .build(),
    ])
}

fn response() -> Value {
    let details = |name: &'static str| open_object().required(name, count("Of them.")).build();
    let usage = open_object()
        .required("input_tokens", count("Tokens of the input."))
        .required("input_tokens_details", details("cached_tokens"))
        .required("output_tokens", count("Tokens of the answer."))
        .required("output_tokens_details", details("reasoning_tokens"))
        .required("total_tokens", count("Both together."))
        .build();
    let incomplete = open_object().required("reason", text("Why it is not whole.")).build();
    open_object()
        .required("id", text("The id of the answer."))
        .required("object", constant("response"))
        .required("created_at", count("Seconds since 1970."))
        .required("completed_at", nullable(count("Seconds since 1970.")))
        .required("status", word(&["completed", "incomplete", "failed", "in_progress"], "How it ended."))
        .required("model", text("The model that answered."))
        .required("output", list(reference("ResponseItem")))
        .required("error", nullable(any_object("What went wrong.")))
        .required("incomplete_details", nullable(incomplete))
        .required("usage", nullable(usage))
        .required("temperature", number("As it was asked for."))
        .required("top_p", number("As it was asked for."))
        .required("store", json!({"const": false}))
        .build()
}
