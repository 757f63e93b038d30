//! Answers in chunks: what all streams share, and the chunks of a chat.
//!
//! Clients are strict about the order: first one chunk with the role for each choice, then the parts as they
//! come, one chunk with the reason for each choice, the usage where it was asked for, and `[DONE]`. After an
//! error nothing follows, so that a client which waits for `[DONE]` knows that the answer is not complete.

use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream;
use serde::Serialize;

use super::chat::{ChatStyle, ReasoningField};
use super::request::Delivery;
use super::whole::ChatLogprobs;
use super::wire::{ChoiceEnd, Heading, UsageSum};
use crate::chat_answer::{ChatAnswer, ChatEvent, ChatEventKind, ChosenToken};
use crate::error::{ApiError, ErrorShape};
use crate::sse_frames::{Frame, SseBody};

/// Writes the events of an answer as chunks.
pub(super) trait ChunkWriter: Send + 'static {
    /// The heading of all chunks.
    fn heading(&self) -> &Heading;
    /// The chunks before all others.
    fn first_chunks(&mut self) -> Vec<Frame>;
    /// The chunks of an event, possibly none.
    fn chunks(&mut self, event: ChatEvent) -> Vec<Frame>;
}

/// The response that streams an answer.
pub(super) fn response(answer: ChatAnswer, delivery: Delivery, mut writer: impl ChunkWriter) -> Response {
    let ChatAnswer { head, events, .. } = answer;
    let mut unfinished = head.prompt_tokens.len();
    let mut usage = UsageSum::new(delivery.choices);
    let first = writer.first_chunks();
    let frames = move |event: Result<ChatEvent, ApiError>| match event {
        Ok(event) => {
            let mut ends = false;
            if let ChatEventKind::Finished { usage: counted, .. } = &event.kind {
                usage.add(event.choice, *counted);
                unfinished = unfinished.saturating_sub(1);
                ends = unfinished == 0;
            }
            let mut frames = writer.chunks(event);
            if ends {
                frames.extend(delivery.include_usage.then(|| writer.heading().usage_chunk(usage.body())));
                frames.push(Frame::done());
            }
            frames
        }
        Err(error) => vec![Frame::json(&error.to_json_in(ErrorShape::OpenAi))],
    };
    let rest = events.map(frames).flat_map(stream::iter);
    let mut response = SseBody::new(stream::iter(first).chain(rest)).into_response();
    response.headers_mut().extend(head.headers);
    response
}

/// The response that streams a chat.
pub(super) fn chat_response(answer: ChatAnswer, style: ChatStyle) -> Response {
    let heading = Heading::new(&answer.head, "chatcmpl", "chat.completion.chunk");
    let logprobs = answer.head.prompt_tokens.iter().map(|_| Vec::new()).collect();
    response(answer, style.delivery, ChatChunks { heading, style, logprobs })
}

/// Writes the chunks of a chat.
struct ChatChunks {
    heading: Heading,
    style: ChatStyle,
    /// For each choice the tokens that wait for the chunk with their text.
    logprobs: Vec<Vec<ChosenToken>>,
}

#[derive(Serialize)]
struct ChatChunk<'a> {
    index: usize,
    delta: Delta<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<ChatLogprobs>,
    #[serde(flatten)]
    end: ChoiceEnd,
}

/// What a chunk adds to a message. A member that adds nothing is left out: clients fail on nulls and on empty
/// lists.
#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    /// One call for each chunk: some clients read only the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[DeltaCall<'a>; 1]>,
}

#[derive(Serialize)]
struct DeltaCall<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: DeltaFunction<'a>,
}

#[derive(Serialize)]
struct DeltaFunction<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl ChunkWriter for ChatChunks {
    fn heading(&self) -> &Heading {
        &self.heading
    }

    fn first_chunks(&mut self) -> Vec<Frame> {
        let role = |index| {
            let delta = Delta { role: Some("assistant"), ..Delta::default() };
            self.heading.chunk(ChatChunk { index, delta, logprobs: None, end: ChoiceEnd::OPEN })
        };
        (0..self.logprobs.len()).map(role).collect()
    }

    fn chunks(&mut self, event: ChatEvent) -> Vec<Frame> {
        let ChatEvent { choice, kind } = event;
        let mut end = ChoiceEnd::OPEN;
        let delta = match &kind {
            ChatEventKind::Content(text) => Delta { content: Some(text), ..Delta::default() },
            ChatEventKind::Reasoning(text) => match self.style.reasoning {
                ReasoningField::ReasoningContent => {
                    Delta { reasoning_content: Some(text), ..Delta::default() }
                }
                ReasoningField::Reasoning => Delta { reasoning: Some(text), ..Delta::default() },
            },
            ChatEventKind::CallBegin { index, id, name } => call(DeltaCall {
                index: *index,
                id: Some(id),
                kind: Some("function"),
                function: DeltaFunction { name: Some(name), arguments: "" },
            }),
            ChatEventKind::CallArguments { index, text } => call(DeltaCall {
                index: *index,
                id: None,
                kind: None,
                function: DeltaFunction { name: None, arguments: text },
            }),
            ChatEventKind::Logprobs(tokens) => {
                if let Some(waiting) = self.logprobs.get_mut(choice) {
                    waiting.extend_from_slice(tokens);
                }
                return Vec::new();
            }
            ChatEventKind::Finished { reason, stopped_by, .. } => {
                end = ChoiceEnd::new(*reason, stopped_by.as_ref(), self.style.function_was_named);
                Delta::default()
            }
        };
        let tokens = self.logprobs.get_mut(choice).map(std::mem::take).unwrap_or_default();
        let logprobs = (!tokens.is_empty()).then(|| ChatLogprobs::new(&tokens));
        vec![self.heading.chunk(ChatChunk { index: choice, delta, logprobs, end })]
    }
}

fn call(call: DeltaCall<'_>) -> Delta<'_> {
    Delta { tool_calls: Some([call]), ..Delta::default() }
}
