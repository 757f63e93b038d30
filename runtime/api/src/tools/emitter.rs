//! The parts of an answer as they become certain: text before, between and after calls, and the calls.

use uuid::Uuid;

use super::functions::ToolFunctions;
use super::parser::Part;

/// Collects parts. White space next to a call belongs to neither side and is left out.
#[derive(Debug)]
pub(super) struct Emitter {
    pub(super) functions: ToolFunctions,
    ids: IdStyle,
    /// Calls are given only when they are complete.
    whole_calls: bool,
    /// Further calls are left out.
    one_call: bool,
    parts: Vec<Part>,
    /// White space, or a separator of calls, that is content only if text follows.
    gap: String,
    /// Nothing but white space came since the last call.
    after_call: bool,
    /// How many calls began.
    calls: u32,
    call: Option<OpenCall>,
    cut_call: Option<u32>,
}

/// How the ids of calls look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IdStyle {
    /// `call_` and 24 hex digits.
    Call,
    /// Nine letters and digits: the templates of Mistral refuse others.
    Short,
}

#[derive(Debug)]
enum OpenCall {
    /// Its beginning was given.
    Streamed(u32),
    /// It is given when it is complete.
    Held { name: String, arguments: String },
    /// It is left out.
    Skipped,
}

impl Emitter {
    pub(super) fn new(functions: ToolFunctions, ids: IdStyle) -> Self {
        Self {
            functions,
            ids,
            whole_calls: false,
            one_call: false,
            parts: Vec::new(),
            gap: String::new(),
            after_call: false,
            calls: 0,
            call: None,
            cut_call: None,
        }
    }

    pub(super) fn set_whole_calls(&mut self) {
        self.whole_calls = true;
    }

    pub(super) fn set_one_call(&mut self) {
        self.one_call = true;
    }

    pub(super) fn cut_call(&self) -> Option<u32> {
        self.cut_call
    }

    /// The parts since the last time.
    pub(super) fn take(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }

    /// Text of the answer. White space at its end waits for what follows.
    pub(super) fn content(&mut self, text: &str) {
        if text.trim_start().is_empty() {
            if !self.after_call || !self.gap.is_empty() {
                self.gap.push_str(text);
            }
            return;
        }
        let mut all = std::mem::take(&mut self.gap);
        all.push_str(text);
        let from = if self.after_call { all.len() - all.trim_start().len() } else { 0 };
        let to = all.trim_end().len().max(from);
        all[to..].clone_into(&mut self.gap);
        if from < to {
            self.after_call = false;
            self.plain_content(&all[from..to]);
        }
    }

    /// Text of an answer that has no calls.
    pub(super) fn plain_content(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Content(before)) => before.push_str(text),
            _ => self.parts.push(Part::Content(text.to_owned())),
        }
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Reasoning(before)) => before.push_str(text),
            _ => self.parts.push(Part::Reasoning(text.to_owned())),
        }
    }

    /// What stands between two calls: content only if no call follows.
    pub(super) fn separator(&mut self, text: &str) {
        self.gap.push_str(text);
    }

    /// A call of a function begins.
    pub(super) fn begin(&mut self, name: &str) {
        self.call = Some(if self.one_call && self.calls > 0 {
            OpenCall::Skipped
        } else if self.whole_calls {
            OpenCall::Held { name: name.to_owned(), arguments: String::new() }
        } else {
            OpenCall::Streamed(self.give_begin(name))
        });
    }

    fn give_begin(&mut self, name: &str) -> u32 {
        let index = self.calls;
        self.calls += 1;
        self.gap.clear();
        self.after_call = true;
        self.parts.push(Part::CallBegin { index, id: self.ids.make(), name: name.to_owned() });
        index
    }

    /// The next piece of the arguments of the call that began.
    pub(super) fn arguments(&mut self, text: &str) {
        match &mut self.call {
            Some(OpenCall::Streamed(index)) => {
                let index = *index;
                self.give_arguments(index, text);
            }
            Some(OpenCall::Held { arguments, .. }) => arguments.push_str(text),
            Some(OpenCall::Skipped) | None => {}
        }
    }

    fn give_arguments(&mut self, index: u32, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::CallArguments { text: before, .. }) => before.push_str(text),
            _ => self.parts.push(Part::CallArguments { index, text: text.to_owned() }),
        }
    }

    /// The arguments of the call are complete.
    pub(super) fn end_call(&mut self) {
        match self.call.take() {
            Some(OpenCall::Held { name, arguments }) => {
                let index = self.give_begin(&name);
                self.give_arguments(index, &arguments);
            }
            Some(OpenCall::Skipped) => {
                self.gap.clear();
                self.after_call = true;
            }
            Some(OpenCall::Streamed(_)) | None => {}
        }
    }

    /// What began is no complete call. True where its beginning was given already.
    pub(super) fn cancel_call(&mut self) -> bool {
        match self.call.take() {
            Some(OpenCall::Streamed(index)) => {
                self.cut_call = Some(index);
                true
            }
            Some(OpenCall::Held { .. } | OpenCall::Skipped) | None => false,
        }
    }

    /// A call was cut by the end of the answer: what was held of it, and the space before it, is left out.
    pub(super) fn drop_call(&mut self) {
        self.cancel_call();
        self.gap.clear();
    }

    /// White space at the end of an answer is content, a separator after its last call is not.
    pub(super) fn finish(&mut self) {
        let gap = std::mem::take(&mut self.gap);
        if !self.after_call {
            self.plain_content(&gap);
        }
    }
}

impl IdStyle {
    fn make(self) -> String {
        const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let random = Uuid::new_v4();
        match self {
            Self::Call => {
                let digits = random.simple().to_string();
                format!("call_{}", &digits[..24])
            }
            Self::Short => {
                // Without the bytes 6 and 8, which hold the version of the id.
                let bytes = random.as_bytes().iter().enumerate().filter(|(at, _)| !matches!(at, 6 | 8));
                bytes
                    .take(9)
                    .map(|(_, byte)| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]))
                    .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_the_form_of_their_family() {
        let id = IdStyle::Call.make();
        let digits = id.strip_prefix("call_").unwrap();
        assert!(digits.len() == 24 && digits.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
        let id = IdStyle::Short.make();
        assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
        assert_ne!(IdStyle::Short.make(), id);
    }
}
