//! Splits an answer into content and calls while it streams.

use super::emitter::Emitter;
use super::gemma_call::GemmaCall;
use super::json_calls::{JsonCalls, MistralCalls};
use super::json_scan::{JsonScan, JsonScanner};
use super::reader::{CallReader, CallReading, LiteralMatch, NoCall, UnfinishedCall, literal};
use super::syntax::CallSyntax;
use super::xml_call::XmlCall;

/// Looks for the calls of one family.
#[derive(Debug)]
pub(super) struct CallSplitter {
    tags: CallTags,
    pending: String,
    /// Bytes of `pending` that are done with.
    done: usize,
    mode: SplitMode,
}

#[derive(Debug)]
enum SplitMode {
    Text,
    /// JSON that is no call.
    Json(JsonScanner),
    Call {
        tag: &'static str,
        reader: Box<dyn CallReader>,
    },
    /// After a call, where its end tag or a separator may stand.
    CallEnded {
        separated: bool,
    },
}

/// The tags of a family.
#[derive(Debug, Clone, Copy)]
struct CallTags {
    open: &'static [&'static str],
    /// Empty where there is none.
    end: &'static str,
    /// Between two calls; empty where there is none.
    separator: &'static str,
    kind: CallKind,
}

/// What follows a tag.
#[derive(Debug, Clone, Copy)]
enum CallKind {
    Json,
    Llama,
    Mistral,
    Xml,
    Gemma { mark: &'static str },
}

impl CallTags {
    fn of(syntax: CallSyntax) -> Self {
        let tags = |open, end, kind| Self { open, end, separator: "", kind };
        match syntax {
            // Qwen's models for code leave the tags out.
            CallSyntax::Hermes => tags(&["<tool_call>", "{"], "</tool_call>", CallKind::Json),
            CallSyntax::QwenXml => tags(&["<tool_call>", "<function="], "</tool_call>", CallKind::Xml),
            CallSyntax::Llama3 => {
                Self { separator: ";", ..tags(&["<|python_tag|>", "{"], "", CallKind::Llama) }
            }
            CallSyntax::Mistral | CallSyntax::MistralNamed => tags(&["[TOOL_CALLS]"], "", CallKind::Mistral),
            CallSyntax::Phi4 => tags(&["functools[", "<|tool_call|>"], "<|/tool_call|>", CallKind::Json),
            // Both versions write either tag.
            CallSyntax::Granite30 | CallSyntax::Granite31 => {
                tags(&["<|tool_call|>", "<tool_call>"], "</tool_call>", CallKind::Json)
            }
            CallSyntax::FunctionGemma => {
                let kind = CallKind::Gemma { mark: "<escape>" };
                tags(&["<start_function_call>"], "<end_function_call>", kind)
            }
            CallSyntax::Gemma4 => tags(&["<|tool_call>"], "<tool_call|>", CallKind::Gemma { mark: "<|\"|>" }),
        }
    }

    fn reader(&self, tag: &'static str) -> Box<dyn CallReader> {
        // The bracket of `functools[` begins the list.
        let bytes = tag.strip_suffix('[').unwrap_or(tag).len();
        match self.kind {
            CallKind::Json | CallKind::Llama if tag == "{" => Box::new(JsonCalls::bare()),
            CallKind::Json | CallKind::Llama => Box::new(JsonCalls::tagged(bytes)),
            CallKind::Mistral => Box::new(MistralCalls::new(bytes)),
            CallKind::Xml => Box::new(XmlCall::new(bytes, tag == "<function=")),
            CallKind::Gemma { mark } => Box::new(GemmaCall::new(bytes, mark)),
        }
    }

    /// The first tag in a text, or what may be its beginning at the end of the text.
    fn find(&self, text: &str) -> Option<(usize, Option<&'static str>)> {
        let may_begin = |c: char| self.open.iter().any(|tag| tag.starts_with(c));
        for (at, _) in text.match_indices(may_begin) {
            for tag in self.open.iter().copied() {
                match literal(&text[at..], tag) {
                    LiteralMatch::Whole => return Some((at, Some(tag))),
                    LiteralMatch::Beginning => return Some((at, None)),
                    LiteralMatch::Other => {}
                }
            }
        }
        None
    }
}

impl CallSplitter {
    pub(super) fn new(syntax: CallSyntax) -> Self {
        Self { tags: CallTags::of(syntax), pending: String::new(), done: 0, mode: SplitMode::Text }
    }

    /// Takes the next piece of text.
    pub(super) fn push(&mut self, text: &str, emitter: &mut Emitter) {
        self.pending.push_str(text);
        while self.step(emitter) {}
        self.pending.drain(..self.done);
        self.done = 0;
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, emitter: &mut Emitter) {
        let rest = &self.pending[self.done..];
        match &self.mode {
            SplitMode::Text | SplitMode::Json(_) => emitter.content(rest),
            // White space, or the beginning of an end tag.
            SplitMode::CallEnded { .. } => {}
            SplitMode::Call { reader, .. } => match reader.finish() {
                UnfinishedCall::Complete => {}
                UnfinishedCall::Cut => emitter.drop_call(),
                UnfinishedCall::Text => emitter.content(rest),
            },
        }
        self.pending.clear();
        emitter.finish();
    }

    /// One step; true where another may follow.
    fn step(&mut self, emitter: &mut Emitter) -> bool {
        let text = &self.pending[self.done..];
        match &mut self.mode {
            SplitMode::Text => {
                let found = self.tags.find(text);
                let end = found.map_or(text.len(), |(at, _)| at);
                emitter.content(&text[..end]);
                self.done += end;
                let Some((_, Some(tag))) = found else { return false };
                self.mode = SplitMode::Call { tag, reader: self.tags.reader(tag) };
                true
            }
            SplitMode::Json(scanner) => {
                let end = text.char_indices().find_map(|(at, c)| match scanner.feed(c) {
                    JsonScan::Inside => None,
                    JsonScan::Ended => Some(at + c.len_utf8()),
                    JsonScan::Past | JsonScan::Invalid => Some(at),
                });
                let length = end.unwrap_or(text.len());
                emitter.content(&text[..length]);
                self.done += length;
                if end.is_some() {
                    self.mode = SplitMode::Text;
                }
                end.is_some()
            }
            SplitMode::Call { tag, reader } => match reader.read(text, emitter) {
                CallReading::More => false,
                CallReading::Ended(at) => {
                    self.done += at;
                    self.mode = SplitMode::CallEnded { separated: false };
                    true
                }
                CallReading::NoCall(no_call) => {
                    let tag = *tag;
                    self.no_call(tag, no_call, emitter);
                    true
                }
            },
            SplitMode::CallEnded { .. } => self.after(emitter),
        }
    }

    /// What looked like a call is content.
    fn no_call(&mut self, tag: &str, no_call: NoCall, emitter: &mut Emitter) {
        let given = emitter.cancel_call();
        let from = if given { no_call.error } else { no_call.start };
        self.done += from;
        self.mode = SplitMode::Text;
        // Elsewhere than at the tag, the text may hold other calls from here on.
        if !given && from == 0 {
            if tag == "{" && no_call.json {
                self.mode = SplitMode::Json(JsonScanner::new());
            } else {
                emitter.content(tag);
                self.done += tag.len();
            }
        }
    }

    /// Leaves out the end tag of a call and what separates it from the next.
    fn after(&mut self, emitter: &mut Emitter) -> bool {
        let SplitMode::CallEnded { separated } = self.mode else { return true };
        let text = &self.pending[self.done..];
        let space = text.len() - text.trim_start().len();
        if separated {
            emitter.separator(&text[..space]);
        }
        self.done += space;
        let text = &text[space..];
        if text.is_empty() {
            return false;
        }
        let tag = if separated || self.tags.end.is_empty() { self.tags.separator } else { self.tags.end };
        if separated || tag.is_empty() {
            self.mode = SplitMode::Text;
            return true;
        }
        match literal(text, tag) {
            LiteralMatch::Beginning => return false,
            LiteralMatch::Other => self.mode = SplitMode::Text,
            LiteralMatch::Whole => {
                self.done += tag.len();
                if tag == self.tags.separator {
                    emitter.separator(tag);
                    self.mode = SplitMode::CallEnded { separated: true };
                } else {
                    self.mode = SplitMode::Text;
                }
            }
        }
        true
    }
}
