//! OpenAI's chat completions and completions.

use serde_json::{Value, json};

use super::native::{model_name, priority, sampling, token_ids};
use super::operation::{DescribedAnswer, EVENTS, Operation, events};
use super::schema::{
    MAX_U32, ObjectSchema, any_object, any_of, constant, count, described, flag, list, list_not_empty,
    list_of, nullable, number, number_above_0, number_within, object, open_object, reference, text, whole,
    word,
};
use crate::chat_answer::MAX_CHOICES;
use crate::openai::chat::EFFORTS;
use crate::tools::MAX_TOOLS;

/// The operations.
pub(super) fn operations() -> Vec<Operation> {
    let chat = "Each event is a chat.completion.chunk with a part of one choice; the last one with \
        choices has a finish_reason each, usage follows where it was asked for, then `[DONE]`.";
    let text = "Each event is a text_completion with a part of one choice, then `[DONE]` follows.";
    vec![
        Operation::new(
            "chat_completions",
            "Answers a conversation",
            DescribedAnswer::json(200, "The answer.", reference("ChatCompletion")).or(EVENTS, events(chat)),
        )
        .body(reference("ChatCompletionRequest")),
        Operation::new(
            "completions",
            "Continues one or more prompts",
            DescribedAnswer::json(200, "The texts.", reference("Completion")).or(EVENTS, events(text)),
        )
        .body(reference("CompletionRequest")),
    ]
}

/// The schemas, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("ChatCompletionRequest", chat_request()),
        ("ChatCompletion", chat()),
        ("ChatMessage", message()),
        ("ChatTool", tool()),
        ("ChatToolCall", tool_call()),
        ("ChatLogprobs", logprobs()),
        ("CompletionRequest", completion_request()),
        ("Completion", completion()),
        ("CompletionUsage", usage()),
    ]
}

/// The fields that chat completions and completions share.
fn shared(object: ObjectSchema) -> ObjectSchema {
    let stream_options =
        open_object().sometimes("include_usage", flag("A last event counts the tokens.")).build();
    let own = object
        .optional("model", model_name())
        .optional("stream", flag("Whether the answer is a stream of events."))
        .optional("stream_options", stream_options)
        .optional("max_tokens", whole(1, MAX_U32, "New tokens at most."))
        .optional("temperature", number_within(0.0, 100.0, "0 is greedy; 1 where it is left out."))
        .optional("top_p", number_above_0(1.0, "Nucleus of sampling; 1 where it is left out."))
        .optional("n", whole(1, MAX_CHOICES.into(), "Answers to each prompt."))
        .optional("seed", seed())
        .optional("priority", priority())
        .optional("response_format", reference("ResponseFormat"));
    without_effect(sampling(own))
}

fn seed() -> Value {
    let same = "The same seed, prompt and settings give the same tokens.";
    json!({"type": "integer", "minimum": i64::MIN, "maximum": u64::MAX, "description": same})
}

/// Fields that clients always send and that change nothing here.
fn without_effect(object: ObjectSchema) -> ObjectSchema {
    object
        .optional("user", text("Changes nothing."))
        .optional("safety_identifier", text("Changes nothing."))
        .optional("metadata", any_object("Changes nothing."))
        .optional("store", json!({"const": false, "description": "No answers are stored."}))
        .optional("service_tier", text("Changes nothing."))
        .optional("prompt_cache_key", text("Changes nothing."))
        .optional("prompt_cache_retention", text("Changes nothing."))
}

/// A part of a message that has only text. The text of a refusal is in a member of that name.
pub(super) fn text_part(kind: &str) -> Value {
    let member = if kind == "refusal" { "refusal" } else { "text" };
    json!({
        "type": "object",
        "required": ["type", member],
        "properties": {"type": {"const": kind}, member: {"type": "string"}},
    })
}

/// A text, or parts of text.
fn content(kinds: &[&str]) -> Value {
    any_of([text("A text."), list(any_of(kinds.iter().map(|kind| text_part(kind))))])
}

/// The name of a function.
pub(super) fn tool_name(most: usize) -> Value {
    json!({"type": "string", "pattern": format!("^[a-zA-Z0-9_-]{{1,{most}}}$")})
}

fn message() -> Value {
    let plain = |roles: &[&str]| {
        object()
            .required("role", word(roles, "Who says it."))
            .required("content", content(&["text"]))
            .optional("name", text("The name of who says it."))
            .build()
    };
    let assistant = open_object()
        .required("role", constant("assistant"))
        .sometimes("content", nullable(content(&["text", "refusal"])))
        .sometimes("reasoning_content", nullable(text("The reasoning of an earlier answer.")))
        .sometimes("tool_calls", nullable(list(reference("ChatToolCall"))))
        .build();
    let tool = object()
        .required("role", constant("tool"))
        .required("content", content(&["text"]))
        .required("tool_call_id", text("The id of the call."))
        .optional("name", text("The name of the function."))
        .build();
    any_of([plain(&["system", "developer", "user"]), assistant, tool])
}

fn tool() -> Value {
    let function = object()
        .required("name", tool_name(64))
        .optional("description", text("What it does, for the model."))
        .optional("parameters", any_object("The JSON schema of its arguments."))
        .optional("strict", flag("Changes nothing: a call that is required follows its schema."))
        .build();
    object().required("type", constant("function")).required("function", function).build()
}

fn tool_call() -> Value {
    let function = open_object()
        .required("name", text("The name of the function."))
        .required("arguments", text("The arguments, a JSON object as text."))
        .build();
    open_object()
        .required("id", text("The id of the call."))
        .required("type", constant("function"))
        .required("function", function)
        .build()
}

/// Whether the answer is a call.
fn tool_choice() -> Value {
    let name = || object().required("name", text("The name of a function of tools.")).build();
    let named = || object().required("type", constant("function")).required("function", name()).build();
    let allowed = object()
        .required("mode", word(&["auto", "required"], "Whether one must be called."))
        .required("tools", list(named()))
        .build();
    let allowed =
        object().required("type", constant("allowed_tools")).required("allowed_tools", allowed).build();
    any_of([word(&["none", "auto", "required"], "Whether the answer is a call."), named(), allowed])
}

fn chat_request() -> Value {
    let messages = list_not_empty(reference("ChatMessage"));
    let own = object()
        .required("messages", described(messages, "The conversation, oldest message first."))
        .optional("max_completion_tokens", whole(1, MAX_U32, "New tokens at most."))
        .optional("logprobs", flag("Whether each token has its log probability."))
        .optional("top_logprobs", whole(0, 20, "And those of this many best tokens."))
        .optional("tools", list_of(0, MAX_TOOLS, reference("ChatTool")))
        .optional("tool_choice", tool_choice())
        .optional("parallel_tool_calls", flag("Whether an answer may hold more than one call."))
        .optional("chat_template_kwargs", any_object("Variables of the model's chat template."))
        .optional("continue_final_message", flag("The last message is the assistant's and is continued."))
        .optional("add_generation_prompt", flag("The opposite of continue_final_message."))
        .optional("reasoning_effort", word(EFFORTS, "How much the model thinks, where its template has it."))
        .optional("reasoning_field", word(&["reasoning_content", "reasoning"], "Where reasoning is written."))
        .optional("modalities", json!({"const": ["text"]}));
    shared(own).build()
}

fn finish(words: &[&str]) -> Value {
    word(words, "Why the choice ended.")
}

fn stopped_by() -> Value {
    any_of([text("This one of stop."), count("This one of stop_token_ids.")])
}

fn chat() -> Value {
    let nothing = || json!({"type": "null"});
    let message = open_object()
        .required("role", constant("assistant"))
        .required("content", nullable(text("The text.")))
        .required("refusal", nothing())
        .sometimes("reasoning_content", text("The reasoning of the model."))
        .sometimes("reasoning", text("The reasoning of the model."))
        .sometimes("tool_calls", list_not_empty(reference("ChatToolCall")))
        .build();
    let choice = open_object()
        .required("index", count("The number of the choice."))
        .required("message", message)
        .required("logprobs", nullable(reference("ChatLogprobs")))
        .required("finish_reason", finish(&["stop", "length", "tool_calls"]))
        .sometimes("stopped_by", stopped_by())
        .build();
    envelope("chat.completion", choice)
}

fn envelope(kind: &str, choice: Value) -> Value {
    open_object()
        .required("id", text("The id of the answer."))
        .required("object", constant(kind))
        .required("created", count("Seconds since 1970."))
        .required("model", text("The model that answered."))
        .required("system_fingerprint", text("What answered: it changes with the weights."))
        .required("choices", list_not_empty(choice))
        .required("usage", reference("CompletionUsage"))
        .build()
}

fn logprobs() -> Value {
    let token = |object: ObjectSchema| {
        object
            .required("token", text("The text of the token."))
            .required("logprob", number("The natural logarithm of its probability."))
            .required("bytes", list(whole(0, 255, "A byte of its text.")))
    };
    let best = token(open_object()).build();
    let chosen = token(open_object()).required("top_logprobs", list(best)).build();
    open_object().required("content", list(chosen)).required("refusal", json!({"type": "null"})).build()
}

fn usage() -> Value {
    let details = open_object().required("reasoning_tokens", count("Tokens of reasoning.")).build();
    open_object()
        .required("prompt_tokens", count("Tokens of the prompt."))
        .required("completion_tokens", count("Tokens of all choices."))
        .required("total_tokens", count("Both together."))
        .sometimes("completion_tokens_details", details)
        .build()
}

fn completion_request() -> Value {
    let text_prompt = || json!({"type": "string", "minLength": 1});
    let several = any_of([text_prompt(), token_ids(1)]);
    let prompt = any_of([text_prompt(), token_ids(1), list_not_empty(several)]);
    let own = object()
        .required("prompt", described(prompt, "One or more texts, or their token ids."))
        .optional(
            "logprobs",
            whole(0, 20, "With each token its log probability and those of this many best ones."),
        )
        .optional("echo", flag("Whether the text begins with the prompt."))
        .optional("suffix", json!({"const": "", "description": "Not offered."}))
        .optional("best_of", whole(1, MAX_CHOICES.into(), "As n: all answers are returned."));
    shared(own).build()
}

fn completion() -> Value {
    let logprobs = open_object()
        .required("tokens", list(text("The text of a token.")))
        .required("token_logprobs", list(number("The natural logarithm of its probability.")))
        .required("top_logprobs", nullable(list(any_object("The best tokens with theirs."))))
        .required("text_offset", list(count("Where the token begins in the text.")))
        .build();
    let choice = open_object()
        .required("index", count("The number of the choice."))
        .required("text", text("The text."))
        .required("logprobs", nullable(logprobs))
        .required("finish_reason", finish(&["stop", "length"]))
        .sometimes("stopped_by", stopped_by())
        .build();
    envelope("text_completion", choice)
}
