//! An answer as a sequence of blocks, each opened, written and closed: reasoning, text, calls. The protocols
//! whose answers are lists (items of responses, content blocks of messages) write their events from these.

use serde_json::{Map, Value};

use crate::chat_answer::{ChatEventKind, ChatFinish, ChatUsage, ChosenToken};
use crate::inference::StoppedBy;

/// What a block holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BlockKind {
    /// Reasoning of the model.
    Reasoning,
    /// Text for the user.
    Text,
    /// A call; the text of its block are the arguments as JSON.
    Call {
        /// Its id.
        id: String,
        /// The name of the function.
        name: String,
    },
}

/// A block as far as it is written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Block {
    /// What it holds.
    pub(crate) kind: BlockKind,
    /// Its text.
    pub(crate) text: String,
    /// The tokens of a text, where the request asked for logprobs.
    pub(crate) logprobs: Vec<ChosenToken>,
}

/// What happens to the blocks of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum BlockEvent {
    /// A block begins.
    Opened(BlockKind),
    /// More text of the open block.
    Piece {
        /// The text, not empty.
        text: String,
        /// Its tokens, where the request asked for logprobs.
        logprobs: Vec<ChosenToken>,
    },
    /// The open block ends.
    Closed {
        /// All of it.
        block: Block,
        /// False where a limit cut it, and for a call whose arguments are no JSON.
        complete: bool,
    },
    /// The answer ends; every block is closed.
    Finished(Ending),
}

/// How an answer ends.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    /// Why.
    pub(crate) reason: ChatFinish,
    /// What of the request ended it.
    pub(crate) stopped_by: Option<StoppedBy>,
    /// What was counted.
    pub(crate) usage: ChatUsage,
}

/// Turns the parts of one answer into blocks.
#[derive(Debug, Default)]
pub(crate) struct BlockReader {
    open: Option<Block>,
    /// Blanks in front of a text that may never come: between reasoning and a call, or between two calls,
    /// they are no text of their own.
    blanks: String,
    /// Tokens whose text did not arrive yet.
    unwritten: Vec<ChosenToken>,
    /// Blocks that were opened.
    opened: usize,
}

impl BlockReader {
    /// The events of one part of the answer.
    pub(crate) fn read(&mut self, kind: ChatEventKind) -> Vec<BlockEvent> {
        let mut events = Vec::new();
        match kind {
            ChatEventKind::Content(text) => self.content(&text, &mut events),
            ChatEventKind::Reasoning(text) => {
                self.drop_blanks();
                if !matches!(&self.open, Some(Block { kind: BlockKind::Reasoning, .. })) {
                    self.begin(BlockKind::Reasoning, &mut events);
                }
                self.write(text, Vec::new(), &mut events);
            }
            ChatEventKind::CallBegin { id, name, .. } => {
                self.drop_blanks();
                self.begin(BlockKind::Call { id, name }, &mut events);
            }
            ChatEventKind::CallArguments { text, .. } => {
                self.drop_blanks();
                self.write(text, Vec::new(), &mut events);
            }
            ChatEventKind::Logprobs(tokens) => self.unwritten.extend(tokens),
            ChatEventKind::Finished { reason, stopped_by, usage, .. } => {
                self.finish(Ending { reason, stopped_by, usage }, &mut events);
            }
        }
        events
    }

    /// The block that is being written.
    pub(crate) fn open_block(&self) -> Option<&Block> {
        self.open.as_ref()
    }

    fn content(&mut self, text: &str, events: &mut Vec<BlockEvent>) {
        self.blanks.push_str(text);
        if !matches!(&self.open, Some(Block { kind: BlockKind::Text, .. })) {
            if self.blanks.trim().is_empty() {
                return;
            }
            self.begin(BlockKind::Text, events);
        }
        self.write_content(events);
    }

    /// Writes what waits to the open block of text.
    fn write_content(&mut self, events: &mut Vec<BlockEvent>) {
        let (text, logprobs) = (std::mem::take(&mut self.blanks), std::mem::take(&mut self.unwritten));
        self.write(text, logprobs, events);
    }

    fn drop_blanks(&mut self) {
        self.blanks.clear();
        self.unwritten.clear();
    }

    fn begin(&mut self, kind: BlockKind, events: &mut Vec<BlockEvent>) {
        self.close(true, events);
        self.opened += 1;
        events.push(BlockEvent::Opened(kind.clone()));
        self.open = Some(Block { kind, text: String::new(), logprobs: Vec::new() });
    }

    fn write(&mut self, text: String, logprobs: Vec<ChosenToken>, events: &mut Vec<BlockEvent>) {
        if let Some(block) = self.open.as_mut().filter(|_| !text.is_empty()) {
            block.text.push_str(&text);
            block.logprobs.extend(logprobs.iter().cloned());
            events.push(BlockEvent::Piece { text, logprobs });
        }
    }

    fn close(&mut self, complete: bool, events: &mut Vec<BlockEvent>) {
        if matches!(&self.open, Some(Block { kind: BlockKind::Call { .. }, text, .. }) if text.is_empty()) {
            self.write("{}".to_owned(), Vec::new(), events);
        }
        if let Some(block) = self.open.take() {
            // A call whose arguments are all there is whole, whatever was cut after it.
            let complete = match block.kind {
                BlockKind::Call { .. } => arguments(&block.text).is_some(),
                BlockKind::Reasoning | BlockKind::Text => complete,
            };
            events.push(BlockEvent::Closed { block, complete });
        }
    }

    fn finish(&mut self, ending: Ending, events: &mut Vec<BlockEvent>) {
        if self.opened == 0 {
            // An answer without any block reads like a fault to clients that look at the first one.
            self.begin(BlockKind::Text, events);
            self.write_content(events);
        }
        self.close(ending.reason != ChatFinish::Length, events);
        events.push(BlockEvent::Finished(ending));
    }
}

/// The arguments of a call, where its text is a whole JSON object.
pub(crate) fn arguments(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_answer::TokenScore;
    use crate::inference::TokenText;

    fn read(kinds: Vec<ChatEventKind>) -> Vec<BlockEvent> {
        let mut reader = BlockReader::default();
        kinds.into_iter().flat_map(|kind| reader.read(kind)).collect()
    }

    fn content(text: &str) -> ChatEventKind {
        ChatEventKind::Content(text.to_owned())
    }

    fn call(index: u32, arguments: &str) -> [ChatEventKind; 2] {
        [
            ChatEventKind::CallBegin { index, id: format!("c{index}"), name: "f".to_owned() },
            ChatEventKind::CallArguments { index, text: arguments.to_owned() },
        ]
    }

    fn finished(reason: ChatFinish) -> ChatEventKind {
        ChatEventKind::Finished { reason, stopped_by: None, cut_call: None, usage: ChatUsage::default() }
    }

    /// `kind:text` of each closed block, with a mark where it is not complete.
    fn closed(events: &[BlockEvent]) -> Vec<String> {
        let text = |event: &BlockEvent| match event {
            BlockEvent::Closed { block, complete } => {
                let kind = match &block.kind {
                    BlockKind::Reasoning => "reasoning",
                    BlockKind::Text => "text",
                    BlockKind::Call { id, .. } => id,
                };
                Some(format!("{kind}:{}{}", block.text, if *complete { "" } else { " (cut)" }))
            }
            _ => None,
        };
        events.iter().filter_map(text).collect()
    }

    /// Every piece lies between the opening and the closing of its block, and the pieces are the block.
    fn check_order(events: &[BlockEvent]) {
        let mut open: Option<(BlockKind, String)> = None;
        for (at, event) in events.iter().enumerate() {
            match event {
                BlockEvent::Opened(kind) => {
                    assert!(open.replace((kind.clone(), String::new())).is_none(), "{events:?}");
                }
                BlockEvent::Piece { text, .. } => open.as_mut().unwrap().1.push_str(text),
                BlockEvent::Closed { block, .. } => {
                    assert_eq!(open.take().unwrap(), (block.kind.clone(), block.text.clone()));
                }
                BlockEvent::Finished(_) => assert_eq!(at, events.len() - 1),
            }
        }
        assert!(open.is_none());
    }

    #[test]
    fn reasoning_text_and_calls_become_blocks_in_order() {
        let mut kinds = vec![ChatEventKind::Reasoning("a".into()), ChatEventKind::Reasoning("b".into())];
        kinds.extend([content("\n\n"), content("Hel"), content("lo "), content("\n")]);
        kinds.extend(call(0, "{\"k\":1}"));
        kinds.push(content("\n"));
        kinds.extend(call(1, ""));
        kinds.push(finished(ChatFinish::ToolCalls));
        let events = read(kinds);
        check_order(&events);
        assert_eq!(closed(&events), ["reasoning:ab", "text:\n\nHello \n", "c0:{\"k\":1}", "c1:{}"]);
    }

    #[test]
    fn an_answer_without_text_is_one_empty_block_and_blanks_alone_are_its_text() {
        for (kinds, expected) in [
            (vec![finished(ChatFinish::Stop)], "text:"),
            (vec![content(" "), content("\n"), finished(ChatFinish::Stop)], "text: \n"),
            (vec![content(" "), finished(ChatFinish::Length)], "text:  (cut)"),
        ] {
            let events = read(kinds);
            check_order(&events);
            assert_eq!(closed(&events), [expected]);
        }
    }

    #[test]
    fn a_limit_cuts_text_and_half_a_call_but_not_a_whole_call() {
        let length = || finished(ChatFinish::Length);
        assert_eq!(closed(&read(vec![content("a"), length()])), ["text:a (cut)"]);
        let [begin, arguments] = call(0, "{\"k\":1}");
        assert_eq!(closed(&read(vec![begin.clone(), arguments, length()])), ["c0:{\"k\":1}"]);
        let [_, half] = call(0, "{\"k\":");
        assert_eq!(closed(&read(vec![begin, half, length()])), ["c0:{\"k\": (cut)"]);
    }

    #[test]
    fn logprobs_go_with_text_only() {
        let token = |id: u32| {
            let token = TokenText { text: format!("t{id}"), bytes: Vec::new() };
            ChosenToken { chosen: TokenScore { id, token, logprob: -0.5 }, top: Vec::new() }
        };
        let events = read(vec![
            ChatEventKind::Logprobs(vec![token(1)]),
            ChatEventKind::Reasoning("r".into()),
            ChatEventKind::Logprobs(vec![token(2)]),
            content("\n"),
            ChatEventKind::Logprobs(vec![token(3)]),
            content("a"),
            finished(ChatFinish::Stop),
        ]);
        let pieces: Vec<(&str, usize)> = events
            .iter()
            .filter_map(|event| match event {
                BlockEvent::Piece { text, logprobs } => Some((text.as_str(), logprobs.len())),
                _ => None,
            })
            .collect();
        assert_eq!(pieces, [("r", 0), ("\na", 2)]);
        let blocks = events.iter().filter_map(|event| match event {
            BlockEvent::Closed { block, .. } => Some(block.logprobs.len()),
            _ => None,
        });
        assert_eq!(blocks.collect::<Vec<_>>(), [0, 2]);
    }
}
