//! Splits reasoning, `<think>…</think>` at the beginning of an answer, from the rest.

use super::reader::{LiteralMatch, literal};
use super::syntax::{END_THINK, ReasoningSyntax, THINK};

/// Splits one answer. White space around the tags is left out.
#[derive(Debug)]
pub(super) struct ReasoningSplitter {
    state: ReasoningState,
    /// The answer begins in reasoning.
    opened: bool,
    pending: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReasoningState {
    /// Before the tag, or before the first character that is no white space.
    Begin,
    /// Before the first character of the reasoning.
    Opened,
    Reasoning,
    /// After the end tag, before the first character of the answer.
    Ended,
    Answer,
}

/// A piece of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AnswerPiece {
    Reasoning(String),
    Answer(String),
}

impl ReasoningSplitter {
    /// None where all of the answer is to be read.
    pub(super) fn new(syntax: Option<ReasoningSyntax>) -> Self {
        let state = if syntax.is_some() { ReasoningState::Begin } else { ReasoningState::Answer };
        let opened = syntax.is_some_and(|syntax| syntax.opened_by_template);
        Self { state, opened, pending: String::new() }
    }

    /// Takes the next piece of text.
    pub(super) fn push(&mut self, text: &str) -> Vec<AnswerPiece> {
        self.pending.push_str(text);
        let mut pieces = Vec::new();
        while self.step(&mut pieces) {}
        pieces
    }

    /// What was held back.
    pub(super) fn finish(&mut self) -> Option<AnswerPiece> {
        let text = std::mem::take(&mut self.pending);
        match self.state {
            _ if text.is_empty() => None,
            ReasoningState::Begin if self.opened => Some(AnswerPiece::Reasoning(text)),
            ReasoningState::Reasoning => Some(AnswerPiece::Reasoning(text)),
            ReasoningState::Opened | ReasoningState::Ended => None,
            ReasoningState::Begin | ReasoningState::Answer => Some(AnswerPiece::Answer(text)),
        }
    }

    /// One step; true where another may follow.
    fn step(&mut self, pieces: &mut Vec<AnswerPiece>) -> bool {
        let space = self.pending.len() - self.pending.trim_start().len();
        match self.state {
            ReasoningState::Begin => match literal(&self.pending[space..], THINK) {
                LiteralMatch::Beginning => false,
                LiteralMatch::Whole => {
                    self.pending.drain(..space + THINK.len());
                    self.state = ReasoningState::Opened;
                    true
                }
                LiteralMatch::Other => {
                    self.state = if self.opened { ReasoningState::Opened } else { ReasoningState::Answer };
                    true
                }
            },
            ReasoningState::Opened => self.skip_space(space, ReasoningState::Reasoning),
            ReasoningState::Reasoning => self.reasoning(pieces),
            ReasoningState::Ended => self.skip_space(space, ReasoningState::Answer),
            ReasoningState::Answer => {
                if !self.pending.is_empty() {
                    pieces.push(AnswerPiece::Answer(std::mem::take(&mut self.pending)));
                }
                false
            }
        }
    }

    /// Leaves white space out; true where something follows, which begins the next state.
    fn skip_space(&mut self, space: usize, next: ReasoningState) -> bool {
        self.pending.drain(..space);
        if !self.pending.is_empty() {
            self.state = next;
        }
        self.state == next
    }

    /// Gives reasoning up to what may be its end, without the space before that.
    fn reasoning(&mut self, pieces: &mut Vec<AnswerPiece>) -> bool {
        let found = self.pending.find(END_THINK);
        let certain = match found {
            Some(at) => at,
            None => self.pending.len() - beginning_at_end(&self.pending, END_THINK),
        };
        let text: String = self.pending[..certain].trim_end().to_owned();
        if found.is_some() {
            self.pending.drain(..certain + END_THINK.len());
            self.state = ReasoningState::Ended;
        } else {
            self.pending.drain(..text.len());
        }
        if !text.is_empty() {
            pieces.push(AnswerPiece::Reasoning(text));
        }
        found.is_some()
    }
}

/// The bytes at the end of a text that may be the beginning of a tag.
fn beginning_at_end(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|length| text.ends_with(&tag[..*length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reasoning and answer of a text in pieces of `chars`.
    fn split(opened_by_template: bool, text: &str, chars: usize) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(Some(ReasoningSyntax { opened_by_template }));
        let all: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for piece in all.chunks(chars) {
            pieces.extend(splitter.push(&piece.iter().collect::<String>()));
        }
        pieces.extend(splitter.finish());
        let (mut reasoning, mut answer) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                AnswerPiece::Reasoning(text) => reasoning.push_str(&text),
                AnswerPiece::Answer(text) => answer.push_str(&text),
            }
        }
        (reasoning, answer)
    }

    #[test]
    fn reasoning_ends_with_its_tag() {
        for (opened, text, reasoning, answer) in [
            (false, "<think>\nLet me see.\n</think>\n\nYes.", "Let me see.", "Yes."),
            (false, " \n<think>a</think>b", "a", "b"),
            (true, "Let me see.\n</think>\n\nYes. ", "Let me see.", "Yes. "),
            (true, "<think>\n a </think>b", "a", "b"),
            (false, "<think></think>b", "", "b"),
            (false, "<think>\n\n</think>\n\nb", "", "b"),
            (true, "\n</think>b", "", "b"),
            (false, "No tag, <think>a</think>", "", "No tag, <think>a</think>"),
            (false, "  Indented", "", "  Indented"),
            (false, "<think>cut </thi", "cut </thi", ""),
            (true, "cut", "cut", ""),
            (false, "<thi", "", "<thi"),
            (false, "<think>a < b </b> c</think>d</think>", "a < b </b> c", "d</think>"),
        ] {
            for chars in 1..=text.len() {
                let expected = (reasoning.to_owned(), answer.to_owned());
                assert_eq!(split(opened, text, chars), expected, "{text:?} by {chars}");
            }
        }
    }

    #[test]
    fn reasoning_is_given_as_it_comes() {
        let mut splitter = ReasoningSplitter::new(Some(ReasoningSyntax { opened_by_template: true }));
        assert_eq!(splitter.push("a b"), [AnswerPiece::Reasoning("a b".into())]);
        assert_eq!(splitter.push(" <"), []);
        assert_eq!(splitter.push("c"), [AnswerPiece::Reasoning(" <c".into())]);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_text_is_cut(
            text in "( |\n|a|<|/|think>|<think>|</think>|\u{e9}){0,12}", opened: bool, chars in 1usize..8,
        ) {
            let whole = split(opened, &text, usize::MAX);
            prop_assert_eq!(split(opened, &text, chars), whole);
        }
    }
}
