//! What the readers of all families share: how far a call was read, and tags that may be incomplete.

use std::fmt::Debug;

use super::emitter::Emitter;

/// Reads one construct that begins with a tag: one call, or several. It is given the text since the beginning
/// of the tag, each time with more at the end.
pub(super) trait CallReader: Debug + Send {
    /// Reads on.
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading;

    /// What the construct is where the text ends here.
    fn finish(&self) -> UnfinishedCall;
}

/// How far a construct was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallReading {
    /// More text is needed.
    More,
    /// All its calls are complete; the answer goes on at this byte.
    Ended(usize),
    /// From `start` on it is no call.
    NoCall(NoCall),
}

/// Where what looked like a call is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoCall {
    /// The byte where the call would have begun: content from here on, where nothing of the call was given.
    pub(super) start: usize,
    /// The byte that fits no call: content from here on, where the beginning of the call was given already.
    pub(super) error: usize,
    /// What begins at `start` is JSON of another meaning, so that nothing inside of it is a call.
    pub(super) json: bool,
}

/// What a construct is at the end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnfinishedCall {
    /// Complete but for its end tag.
    Complete,
    /// A call that was cut.
    Cut,
    /// It may as well be text.
    Text,
}

/// Whether a text begins with a literal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LiteralMatch {
    /// It does.
    Whole,
    /// It ends within the literal.
    Beginning,
    /// It does not.
    Other,
}

/// Whether `text` begins with `literal`. An empty text is a beginning of every literal.
pub(super) fn literal(text: &str, literal: &str) -> LiteralMatch {
    if text.starts_with(literal) {
        LiteralMatch::Whole
    } else if literal.starts_with(text) {
        LiteralMatch::Beginning
    } else {
        LiteralMatch::Other
    }
}

/// The byte after the white space at `at`.
pub(super) fn after_space(text: &str, at: usize) -> usize {
    text.len() - text[at..].trim_start().len()
}

/// Whether a character may stand in the name of a function.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.".contains(c)
}
