//! Writes one answer: the events of its stream, and the response object that holds all of it. An answer in
//! one piece is the object at the end of the same events.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::join_objects;
use crate::blocks::{Block, BlockEvent, BlockKind, BlockReader, Ending};
use crate::chat_answer::{ChatEventKind, ChatFinish, ChatHead, ChatUsage, ChosenToken};
use crate::error::{ApiError, ErrorShape};

/// An event of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResponseEvent {
    /// Its name, which its data repeat as `type`.
    pub(super) name: &'static str,
    /// Its data, JSON.
    pub(super) data: String,
}

/// An answer in the making.
pub(super) struct ResponseWriter {
    /// The response object as far as it is known, without what it repeats of its request.
    response: Value,
    /// That, as the text of an object: a schema takes many times its length as a value.
    settings: String,
    blocks: BlockReader,
    /// Events so far: the next one's `sequence_number`.
    sequence_number: u64,
    /// Items that are complete or cut.
    output: Vec<Value>,
    /// What the item that is being written holds.
    open_kind: Option<BlockKind>,
    /// Its id.
    open_id: String,
}

impl ResponseWriter {
    /// An answer that repeats `settings` of its request, the text of an object that is not empty.
    pub(super) fn new(settings: String, head: &ChatHead) -> Self {
        let id = head.id.strip_prefix("gen-").unwrap_or(&head.id);
        let response = json!({
            "id": format!("resp_{id}"),
            "object": "response",
            "created_at": head.created_unix_s,
            "completed_at": null,
            "status": "in_progress",
            "model": head.model,
            "output": [],
            "error": null,
            "incomplete_details": null,
            "usage": null,
        });
        Self {
            response,
            settings,
            blocks: BlockReader::default(),
            sequence_number: 0,
            output: Vec::new(),
            open_kind: None,
            open_id: String::new(),
        }
    }

    /// The events before the first token.
    pub(super) fn start(&mut self) -> Vec<ResponseEvent> {
        ["response.created", "response.in_progress"].map(|name| self.event_of_response(name)).into()
    }

    /// The events of one part of the answer.
    pub(super) fn write(&mut self, kind: ChatEventKind) -> Vec<ResponseEvent> {
        let blocks = self.blocks.read(kind);
        blocks.into_iter().flat_map(|block| self.write_block(block)).collect()
    }

    /// The events of a failure, after which nothing follows. The first is for clients that raise on an
    /// `error`, in OpenAI's form and in that of its chat; the second is the end of the answer.
    pub(super) fn fail(&mut self, error: &ApiError) -> Vec<ResponseEvent> {
        let chat = error.to_json_in(ErrorShape::OpenAi)["error"].take();
        let data = json!({
            "code": chat["code"], "message": chat["message"], "param": chat["param"], "error": chat,
        });
        let first = self.event("error", data);
        self.response["status"] = json!("failed");
        self.response["error"] = json!({"code": failure_code(error), "message": error.message()});
        if let Some(block) = self.blocks.open_block() {
            self.output.push(item(&self.open_id, block, "incomplete"));
        }
        self.response["output"] = json!(self.output);
        vec![first, self.event_of_response("response.failed")]
    }

    /// The text of the response object: all of the answer, once its last part is written.
    pub(super) fn response_text(&self) -> String {
        join_objects(&self.response.to_string(), &self.settings)
    }

    /// An event with the response object.
    fn event_of_response(&mut self, name: &'static str) -> ResponseEvent {
        let head = json!({"type": name, "sequence_number": self.sequence_number}).to_string();
        self.sequence_number += 1;
        let response = format!("{{\"response\":{}}}", self.response_text());
        ResponseEvent { name, data: join_objects(&head, &response) }
    }

    fn event(&mut self, name: &'static str, more: Value) -> ResponseEvent {
        let mut data = json!({"type": name, "sequence_number": self.sequence_number});
        if let (Value::Object(data), Value::Object(more)) = (&mut data, more) {
            data.extend(more);
        }
        self.sequence_number += 1;
        ResponseEvent { name, data: data.to_string() }
    }

    /// An event of the open item.
    fn item_event(&mut self, name: &'static str, mut data: Value) -> ResponseEvent {
        data["item_id"] = json!(self.open_id);
        data["output_index"] = json!(self.output.len());
        self.event(name, data)
    }

    fn write_block(&mut self, event: BlockEvent) -> Vec<ResponseEvent> {
        match event {
            BlockEvent::Opened(kind) => self.open(kind),
            BlockEvent::Piece { text, logprobs } => vec![self.piece(&text, &logprobs)],
            BlockEvent::Closed { block, complete } => self.close(&block, complete),
            BlockEvent::Finished(ending) => vec![self.finish(&ending)],
        }
    }

    fn open(&mut self, kind: BlockKind) -> Vec<ResponseEvent> {
        let prefix = match kind {
            BlockKind::Reasoning => "rs",
            BlockKind::Text => "msg",
            BlockKind::Call { .. } => "fc",
        };
        self.open_id = format!("{prefix}_{}", uuid::Uuid::new_v4().simple());
        self.open_kind = Some(kind.clone());
        let empty = Block { kind, text: String::new(), logprobs: Vec::new() };
        let mut added = item(&self.open_id, &empty, "in_progress");
        if added.get("content").is_some() {
            added["content"] = json!([]);
        }
        let added = json!({"output_index": self.output.len(), "item": added});
        let mut events = vec![self.event("response.output_item.added", added)];
        if let Some(part) = content_part(&empty) {
            let data = json!({"content_index": 0, "part": part});
            events.push(self.item_event("response.content_part.added", data));
        }
        events
    }

    fn piece(&mut self, text: &str, logprobs: &[ChosenToken]) -> ResponseEvent {
        match &self.open_kind {
            Some(BlockKind::Call { .. }) => {
                self.item_event("response.function_call_arguments.delta", json!({"delta": text}))
            }
            Some(BlockKind::Reasoning) => {
                let data = json!({"content_index": 0, "delta": text});
                self.item_event("response.reasoning_text.delta", data)
            }
            Some(BlockKind::Text) | None => {
                let data = json!({"content_index": 0, "delta": text, "logprobs": logprobs_json(logprobs)});
                self.item_event("response.output_text.delta", data)
            }
        }
    }

    fn close(&mut self, block: &Block, complete: bool) -> Vec<ResponseEvent> {
        let status = if complete { "completed" } else { "incomplete" };
        let done = item(&self.open_id, block, status);
        let mut events = vec![match &block.kind {
            BlockKind::Call { name, .. } => self.item_event(
                "response.function_call_arguments.done",
                json!({"name": name, "arguments": block.text}),
            ),
            BlockKind::Reasoning => {
                let data = json!({"content_index": 0, "text": block.text});
                self.item_event("response.reasoning_text.done", data)
            }
            BlockKind::Text => {
                let logprobs = logprobs_json(&block.logprobs);
                let data = json!({"content_index": 0, "text": block.text, "logprobs": logprobs});
                self.item_event("response.output_text.done", data)
            }
        }];
        if let Some(part) = content_part(block) {
            let data = json!({"content_index": 0, "part": part});
            events.push(self.item_event("response.content_part.done", data));
        }
        let data = json!({"output_index": self.output.len(), "item": done});
        events.push(self.event("response.output_item.done", data));
        self.output.push(done);
        events
    }

    fn finish(&mut self, ending: &Ending) -> ResponseEvent {
        self.response["usage"] = usage_json(ending.usage);
        self.response["output"] = json!(self.output);
        let name = if ending.reason == ChatFinish::Length {
            self.response["status"] = json!("incomplete");
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            "response.incomplete"
        } else {
            self.response["status"] = json!("completed");
            self.response["completed_at"] = json!(now_unix_s());
            "response.completed"
        };
        self.event_of_response(name)
    }
}

/// The item of a block.
fn item(id: &str, block: &Block, status: &str) -> Value {
    match &block.kind {
        BlockKind::Reasoning => json!({
            "id": id, "type": "reasoning", "status": status, "summary": [],
            "content": content_part(block).as_slice(),
        }),
        BlockKind::Text => json!({
            "id": id, "type": "message", "status": status, "role": "assistant",
            "content": content_part(block).as_slice(),
        }),
        BlockKind::Call { id: call_id, name } => json!({
            "id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
            "arguments": block.text,
        }),
    }
}

/// The content part of a block; calls have none.
fn content_part(block: &Block) -> Option<Value> {
    match &block.kind {
        BlockKind::Reasoning => Some(json!({"type": "reasoning_text", "text": block.text})),
        BlockKind::Text => Some(json!({
            "type": "output_text", "text": block.text, "annotations": [],
            "logprobs": logprobs_json(&block.logprobs),
        })),
        BlockKind::Call { .. } => None,
    }
}

fn logprobs_json(tokens: &[ChosenToken]) -> Value {
    tokens.iter().map(ChosenToken::to_json).collect()
}

/// Clients require the details. What the prefix cache saved is not counted for each request.
fn usage_json(usage: ChatUsage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
    })
}

/// The word of OpenAI's list that says most about a failure.
fn failure_code(error: &ApiError) -> &'static str {
    match error {
        ApiError::Overloaded { .. } => "rate_limit_exceeded",
        ApiError::InvalidRequest { .. } | ApiError::TooLong { .. } => "invalid_prompt",
        _ => "server_error",
    }
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
