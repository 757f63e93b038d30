//! Writes one answer: the events of its stream, and the message that holds all of it. An answer in one piece
//! is the message at the end of the same events.

use serde_json::{Value, json};

use crate::blocks::{Block, BlockEvent, BlockKind, BlockReader, Ending, arguments};
use crate::chat_answer::{ChatEventKind, ChatFinish, ChatHead};
use crate::inference::StoppedBy;
use crate::sse_frames::Frame;

/// Signatures let Anthropic's service check that thinking which comes back is its own. Nothing is checked
/// here, and clients require the field.
const NO_SIGNATURE: &str = "";

/// An answer in the making.
pub(super) struct MessageWriter {
    /// The message as far as it is known.
    message: Value,
    blocks: BlockReader,
    hide_thinking: bool,
    /// Blocks that were opened; the index of the open one is one less.
    opened: usize,
    open_kind: Option<BlockKind>,
    /// Blocks that are complete, or a text that was cut.
    content: Vec<Value>,
}

impl MessageWriter {
    /// An answer; `hide_thinking` shows that the model thinks, but not what.
    pub(super) fn new(head: &ChatHead, hide_thinking: bool) -> Self {
        let id = head.id.strip_prefix("gen-").unwrap_or(&head.id);
        let message = json!({
            "id": format!("msg_{id}"),
            "type": "message",
            "role": "assistant",
            "model": head.model,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage_json(head.prompt_tokens.first().copied().unwrap_or(0), 0),
        });
        Self {
            message,
            blocks: BlockReader::default(),
            hide_thinking,
            opened: 0,
            open_kind: None,
            content: Vec::new(),
        }
    }

    /// The events before the first token.
    pub(super) fn start(&self) -> Vec<Frame> {
        vec![event("message_start", json!({"message": self.message})), event("ping", json!({}))]
    }

    /// The events of one part of the answer.
    pub(super) fn write(&mut self, kind: ChatEventKind) -> Vec<Frame> {
        let blocks = self.blocks.read(kind);
        blocks.into_iter().flat_map(|block| self.write_block(block)).collect()
    }

    /// The message of an answer in one piece, once its last part is written.
    pub(super) fn into_message(mut self) -> Value {
        self.message["content"] = self.content.into();
        self.message
    }

    fn write_block(&mut self, event: BlockEvent) -> Vec<Frame> {
        match event {
            BlockEvent::Opened(kind) => vec![self.open(kind)],
            BlockEvent::Piece { text, .. } => self.piece(&text).into_iter().collect(),
            BlockEvent::Closed { block, complete } => self.close(&block, complete),
            BlockEvent::Finished(ending) => self.finish(&ending),
        }
    }

    fn open(&mut self, kind: BlockKind) -> Frame {
        let block = match &kind {
            BlockKind::Reasoning => thinking_json(""),
            BlockKind::Text => text_json(""),
            BlockKind::Call { id, name } => json!({"type": "tool_use", "id": id, "name": name, "input": {}}),
        };
        self.open_kind = Some(kind);
        self.opened += 1;
        event("content_block_start", json!({"index": self.index(), "content_block": block}))
    }

    /// The index of the open block.
    fn index(&self) -> usize {
        self.opened.saturating_sub(1)
    }

    fn delta(&self, delta: &Value) -> Frame {
        event("content_block_delta", json!({"index": self.index(), "delta": delta}))
    }

    fn piece(&self, text: &str) -> Option<Frame> {
        let delta = match &self.open_kind {
            Some(BlockKind::Reasoning) if self.hide_thinking => return None,
            Some(BlockKind::Reasoning) => json!({"type": "thinking_delta", "thinking": text}),
            Some(BlockKind::Call { .. }) => json!({"type": "input_json_delta", "partial_json": text}),
            Some(BlockKind::Text) | None => json!({"type": "text_delta", "text": text}),
        };
        Some(self.delta(&delta))
    }

    fn close(&mut self, block: &Block, complete: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        match &block.kind {
            BlockKind::Reasoning => {
                frames.push(self.delta(&json!({"type": "signature_delta", "signature": NO_SIGNATURE})));
                self.content.push(thinking_json(if self.hide_thinking { "" } else { &block.text }));
            }
            BlockKind::Text => self.content.push(text_json(&block.text)),
            // Half a call is no call.
            BlockKind::Call { id, name } => {
                if let Some(input) = arguments(&block.text).filter(|_| complete) {
                    let call = json!({"type": "tool_use", "id": id, "name": name, "input": input});
                    self.content.push(call);
                }
            }
        }
        frames.push(event("content_block_stop", json!({"index": self.index()})));
        frames
    }

    fn finish(&mut self, ending: &Ending) -> Vec<Frame> {
        let (reason, sequence) = match (ending.reason, &ending.stopped_by) {
            (ChatFinish::Length, _) => ("max_tokens", None),
            // A stop text may follow a complete call in the same answer; the call is what the client waits
            // for.
            (ChatFinish::ToolCalls, _) => ("tool_use", None),
            (_, Some(StoppedBy::Text(text))) => ("stop_sequence", Some(text)),
            (ChatFinish::Stop, _) => ("end_turn", None),
        };
        let usage = usage_json(ending.usage.prompt_tokens, ending.usage.completion_tokens);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        let frames = vec![
            event("message_delta", json!({"delta": delta, "usage": usage})),
            event("message_stop", json!({})),
        ];
        self.message["stop_reason"] = json!(reason);
        self.message["stop_sequence"] = json!(sequence);
        self.message["usage"] = usage;
        frames
    }
}

/// An event whose data repeat its name as `type`.
fn event(name: &'static str, more: Value) -> Frame {
    let mut data = json!({"type": name});
    if let (Value::Object(data), Value::Object(more)) = (&mut data, more) {
        data.extend(more);
    }
    Frame::named(name, &data)
}

fn text_json(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

fn thinking_json(thinking: &str) -> Value {
    json!({"type": "thinking", "thinking": thinking, "signature": NO_SIGNATURE})
}

/// Tokens of prompt and answer. Nothing is billed by what `cache_control` names, so that all tokens of the
/// prompt are counted as read.
fn usage_json(input_tokens: u32, output_tokens: u32) -> Value {
    json!({
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
    })
}
