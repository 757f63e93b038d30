//! A chat completion in one piece.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::chat::{ChatStyle, ReasoningField};
use super::wire::{ChoiceEnd, Heading, UsageSum};
use crate::chat_answer::{ChatAnswer, ChosenToken, CollectedCall, CollectedChoice};
use crate::error::ApiError;

/// One choice.
#[derive(Serialize)]
struct WholeChoice {
    index: usize,
    message: AnswerMessage,
    /// Null where the request did not ask.
    logprobs: Option<ChatLogprobs>,
    #[serde(flatten)]
    end: ChoiceEnd,
}

#[derive(Serialize)]
struct AnswerMessage {
    role: &'static str,
    /// Null where the answer is only calls.
    content: Option<String>,
    /// No model here has a refusal apart from its text.
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<AnswerCall>,
}

/// A call of an answer.
#[derive(Serialize)]
struct AnswerCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: AnswerFunction,
}

#[derive(Serialize)]
struct AnswerFunction {
    name: String,
    arguments: String,
}

/// The logprobs of a choice, or of a chunk of it.
#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<Value>,
    refusal: Option<Vec<Value>>,
}

impl ChatLogprobs {
    pub(super) fn new(tokens: &[ChosenToken]) -> Self {
        Self { content: tokens.iter().map(ChosenToken::to_json).collect(), refusal: None }
    }
}

/// The response, once all choices have ended.
pub(super) async fn chat_response(answer: ChatAnswer, style: ChatStyle) -> Result<Response, ApiError> {
    let heading = Heading::new(&answer.head, "chatcmpl", "chat.completion");
    let headers = answer.head.headers.clone();
    let mut usage = UsageSum::new(style.delivery.choices);
    let mut choices = Vec::new();
    for (index, choice) in answer.collect().await?.into_iter().enumerate() {
        usage.add(index, choice.usage);
        choices.push(whole_choice(index, choice, style));
    }
    Ok((headers, Json(heading.body(&choices, Some(usage.body())))).into_response())
}

fn whole_choice(index: usize, choice: CollectedChoice, style: ChatStyle) -> WholeChoice {
    let CollectedChoice { content, reasoning, calls, logprobs, reason, stopped_by, usage: _ } = choice;
    let only_calls = content.is_empty() && !calls.is_empty();
    let reasoning = Some(reasoning).filter(|text| !text.is_empty());
    let (reasoning_content, reasoning) = match style.reasoning {
        ReasoningField::ReasoningContent => (reasoning, None),
        ReasoningField::Reasoning => (None, reasoning),
    };
    let call = |CollectedCall { id, name, arguments }| AnswerCall {
        id,
        kind: "function",
        function: AnswerFunction { name, arguments },
    };
    WholeChoice {
        index,
        message: AnswerMessage {
            role: "assistant",
            content: (!only_calls).then_some(content),
            refusal: None,
            reasoning_content,
            reasoning,
            tool_calls: calls.into_iter().map(call).collect(),
        },
        logprobs: style.logprobs.then(|| ChatLogprobs::new(&logprobs)),
        end: ChoiceEnd::new(reason, stopped_by.as_ref(), style.function_was_named),
    }
}
