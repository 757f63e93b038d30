//! The streaming parser: an answer's text in, content, reasoning and calls out.
//!
//! Text that may be the beginning of a tag is held back, so that no half of a tag is ever given, and none is
//! lost: what turns out to be no call is content. White space next to a call, and around the tags of
//! reasoning, is left out.

use serde_json::Value;

use super::emitter::{Emitter, IdStyle};
use super::functions::ToolFunctions;
use super::reasoning::{AnswerPiece, ReasoningSplitter};
use super::splitter::CallSplitter;
use super::syntax::{AnswerSyntax, CallSyntax};
use crate::conversation::ToolChoice;

/// A piece of an answer. The pieces of one kind, joined, are the same however the text was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// What the caller reads.
    Content(String),
    /// What the model thought first.
    Reasoning(String),
    /// A call begins.
    CallBegin {
        /// Which one, from 0.
        index: u32,
        /// `call_` and 24 hex digits; for Mistral's families 9 letters and digits.
        id: String,
        /// The function, one of the request's.
        name: String,
    },
    /// The next piece of the arguments of the call that began last. All together are the text of a JSON
    /// object.
    CallArguments {
        /// Which call.
        index: u32,
        /// JSON text.
        text: String,
    },
}

/// Takes one answer apart while it streams.
///
/// A call begins as soon as it has the name of a function and the beginning of its arguments. What is cut or
/// wrong after that cannot be taken back from a stream: [`Self::cut_call`] names it. An answer that is given
/// in one piece uses [`Self::whole_calls`] instead.
#[derive(Debug)]
pub struct AnswerParser {
    reasoning: ReasoningSplitter,
    /// None where all is content.
    calls: Option<CallSplitter>,
    emitter: Emitter,
}

impl AnswerParser {
    /// A parser for one answer to a request with these tools. Without tools, or with [`ToolChoice::None`],
    /// nothing is a call. Where a call is required its grammar leaves no room for reasoning, so that none is
    /// looked for.
    #[must_use]
    pub fn new(syntax: AnswerSyntax, tools: &[Value], choice: &ToolChoice) -> Self {
        let calls = syntax.calls.filter(|_| !tools.is_empty() && *choice != ToolChoice::None);
        let required = matches!(choice, ToolChoice::Required | ToolChoice::Named(_)) && calls.is_some();
        let ids = match syntax.calls {
            Some(CallSyntax::Mistral | CallSyntax::MistralNamed) => IdStyle::Short,
            _ => IdStyle::Call,
        };
        Self {
            reasoning: ReasoningSplitter::new(syntax.reasoning.filter(|_| !required)),
            calls: calls.map(CallSplitter::new),
            emitter: Emitter::new(ToolFunctions::new(tools), ids),
        }
    }

    /// Gives a call only when it is complete. One that is cut is then left out, and one whose arguments are
    /// no JSON is content.
    #[must_use]
    pub fn whole_calls(mut self) -> Self {
        self.emitter.set_whole_calls();
        self
    }

    /// Leaves out all calls but the first: `parallel_tool_calls` is false.
    #[must_use]
    pub fn one_call(mut self) -> Self {
        self.emitter.set_one_call();
        self
    }

    /// Takes the next piece of the answer's text.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        for piece in self.reasoning.push(text) {
            self.give(piece);
        }
        self.emitter.take()
    }

    /// Ends the answer. A call that is complete without its end tag is kept, one that is cut is left out, and
    /// text that was held back because a tag might have begun is content.
    pub fn finish(&mut self) -> Vec<Part> {
        if let Some(piece) = self.reasoning.finish() {
            self.give(piece);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut self.emitter);
        }
        self.emitter.take()
    }

    /// The last call that was given in part and then cut, or whose arguments are no JSON. It is final after
    /// [`Self::finish`], and none with [`Self::whole_calls`].
    #[must_use]
    pub fn cut_call(&self) -> Option<u32> {
        self.emitter.cut_call()
    }

    fn give(&mut self, piece: AnswerPiece) {
        match (piece, &mut self.calls) {
            (AnswerPiece::Reasoning(text), _) => self.emitter.reasoning(&text),
            (AnswerPiece::Answer(text), Some(calls)) => calls.push(&text, &mut self.emitter),
            (AnswerPiece::Answer(text), None) => self.emitter.plain_content(&text),
        }
    }
}
