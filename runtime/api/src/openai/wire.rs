//! The JSON that chat completions and completions share, whole or in chunks.

use serde::Serialize;
use serde_json::Value;

use crate::chat_answer::{ChatFinish, ChatHead, ChatUsage};
use crate::inference::StoppedBy;
use crate::sse_frames::Frame;

/// What every body of one answer begins with. Clients compare it between chunks, so it is made once.
pub(super) struct Heading {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

impl Heading {
    /// `prefix` is that of OpenAI's ids, such as `chatcmpl`.
    pub(super) fn new(head: &ChatHead, prefix: &str, object: &'static str) -> Self {
        // The beginning of the digest tells configurations apart as well as all of it.
        const FINGERPRINT_CHARS: usize = 12;
        let id = head.id.strip_prefix("gen-").unwrap_or(&head.id);
        let digest: String = head.model_digest.chars().take(FINGERPRINT_CHARS).collect();
        Self {
            id: format!("{prefix}-{id}"),
            object,
            created: head.created_unix_s,
            model: head.model.clone(),
            system_fingerprint: format!("fp_{digest}"),
        }
    }

    /// A whole body.
    pub(super) fn body<'a, C>(&'a self, choices: &'a [C], usage: Option<UsageBody>) -> AnswerEnvelope<'a, C> {
        let Self { id, object, created, model, system_fingerprint } = self;
        AnswerEnvelope { id, object, created: *created, model, system_fingerprint, choices, usage }
    }

    /// A chunk about one choice.
    pub(super) fn chunk<C: Serialize>(&self, choice: C) -> Frame {
        frame(&self.body(&[choice], None))
    }

    /// The last chunk, which has no choices.
    pub(super) fn usage_chunk(&self, usage: UsageBody) -> Frame {
        frame(&self.body::<()>(&[], Some(usage)))
    }
}

/// A frame whose data is this value.
fn frame(value: &impl Serialize) -> Frame {
    let data = serde_json::to_string(value).expect("values of texts and numbers have a JSON form");
    Frame { event: None, data }
}

/// A whole answer, or a chunk of one.
#[derive(Serialize)]
pub(super) struct AnswerEnvelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
}

/// Tokens of all choices. The prompt of several choices counts once.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u32,
}

/// Adds up the tokens of an answer.
pub(super) struct UsageSum {
    /// Choices for each prompt.
    choices: usize,
    sum: UsageBody,
}

impl UsageSum {
    pub(super) fn new(choices: u32) -> Self {
        Self { choices: choices.max(1) as usize, sum: UsageBody::default() }
    }

    /// Adds the choice of this index; choices of one prompt follow each other.
    pub(super) fn add(&mut self, choice: usize, usage: ChatUsage) {
        if choice.is_multiple_of(self.choices) {
            self.sum.prompt_tokens += usage.prompt_tokens;
        }
        self.sum.completion_tokens += usage.completion_tokens;
        self.sum.completion_tokens_details.reasoning_tokens += usage.reasoning_tokens;
    }

    pub(super) fn body(&self) -> UsageBody {
        UsageBody { total_tokens: self.sum.prompt_tokens + self.sum.completion_tokens, ..self.sum }
    }
}

/// The end of a choice as it stands in JSON.
#[derive(Serialize)]
pub(super) struct ChoiceEnd {
    /// Null until the choice ends.
    pub(super) finish_reason: Option<&'static str>,
    /// The stop text or token of the request that ended it: a field of this server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stopped_by: Option<Value>,
}

impl ChoiceEnd {
    /// Not yet.
    pub(super) const OPEN: Self = Self { finish_reason: None, stopped_by: None };

    /// A call of a function that the request named ends with `stop`, as at OpenAI.
    pub(super) fn new(reason: ChatFinish, stopped_by: Option<&StoppedBy>, function_was_named: bool) -> Self {
        let reason = match reason {
            ChatFinish::Length => "length",
            ChatFinish::ToolCalls if !function_was_named => "tool_calls",
            ChatFinish::ToolCalls | ChatFinish::Stop => "stop",
        };
        Self { finish_reason: Some(reason), stopped_by: stopped_by.map(StoppedBy::to_json) }
    }
}
