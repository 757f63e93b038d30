//! One call in the XML of Qwen3-Coder: `<function=f><parameter=k>v</parameter></function>`.

use super::emitter::Emitter;
use super::reader::{CallReader, CallReading, LiteralMatch, NoCall, UnfinishedCall, after_space, literal};

const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const END_PARAMETER: &str = "</parameter>";
const END_FUNCTION: &str = "</function>";

/// Reads one function. Each parameter is given when it is complete, since its type decides its first
/// character.
#[derive(Debug)]
pub(super) struct XmlCall {
    at: usize,
    state: XmlState,
    name: String,
    parameters: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum XmlState {
    /// Before `<function=`.
    Open,
    /// In the name of the function.
    Name,
    /// Before a parameter or the end.
    Body,
    /// In the name of a parameter.
    Key,
    /// In the value of a parameter, whose end is not before the byte `searched`.
    Value {
        key: String,
        searched: usize,
    },
    Complete,
}

impl XmlCall {
    /// After the tag of `tag_bytes`; the tag may be `<function=` itself.
    pub(super) fn new(tag_bytes: usize, tag_is_function: bool) -> Self {
        let state = if tag_is_function { XmlState::Name } else { XmlState::Open };
        Self { at: tag_bytes, state, name: String::new(), parameters: 0 }
    }

    fn no_call(&self) -> CallReading {
        CallReading::NoCall(NoCall { start: 0, error: self.at, json: false })
    }

    /// One step; none where the next can follow.
    fn step(&mut self, text: &str, emitter: &mut Emitter) -> Option<CallReading> {
        match &self.state {
            XmlState::Open => {
                let at = after_space(text, self.at);
                match literal(&text[at..], FUNCTION) {
                    LiteralMatch::Whole => self.go(at + FUNCTION.len(), XmlState::Name),
                    LiteralMatch::Beginning => Some(CallReading::More),
                    LiteralMatch::Other => Some(self.no_call()),
                }
            }
            XmlState::Name => {
                let rest = &text[self.at..];
                let Some(end) = rest.find('>') else {
                    let may_be = emitter.functions.may_begin(rest);
                    return Some(if may_be { CallReading::More } else { self.no_call() });
                };
                if !emitter.functions.has(&rest[..end]) {
                    return Some(self.no_call());
                }
                rest[..end].clone_into(&mut self.name);
                emitter.begin(&self.name);
                emitter.arguments("{");
                self.go(self.at + end + 1, XmlState::Body)
            }
            XmlState::Body => self.body(text, emitter),
            XmlState::Key => {
                let rest = &text[self.at..];
                match rest.find(['>', '\n']) {
                    None => Some(CallReading::More),
                    Some(end) if rest[end..].starts_with('>') => {
                        let (key, at) = (rest[..end].to_owned(), self.at + end + 1);
                        self.go(at, XmlState::Value { key, searched: at })
                    }
                    Some(_) => Some(self.no_call()),
                }
            }
            XmlState::Value { key, searched } => {
                let Some(end) = text[*searched..].find(END_PARAMETER).map(|end| *searched + end) else {
                    let key = key.clone();
                    let overlap = text.len().saturating_sub(END_PARAMETER.len() - 1);
                    let searched = text.floor_char_boundary(overlap).max(self.at);
                    self.state = XmlState::Value { key, searched };
                    return Some(CallReading::More);
                };
                let comma = if self.parameters > 0 { ", " } else { "" };
                let value = within_lines(&text[self.at..end]);
                let value = emitter.functions.get(&self.name).map(|function| function.typed(key, value));
                let key = serde_json::Value::from(key.as_str());
                emitter.arguments(&format!("{comma}{key}: {}", value.unwrap_or_default()));
                self.parameters += 1;
                self.go(end + END_PARAMETER.len(), XmlState::Body)
            }
            XmlState::Complete => Some(CallReading::Ended(self.at)),
        }
    }

    fn go(&mut self, at: usize, state: XmlState) -> Option<CallReading> {
        self.at = at;
        self.state = state;
        None
    }

    fn body(&mut self, text: &str, emitter: &mut Emitter) -> Option<CallReading> {
        let at = after_space(text, self.at);
        match (literal(&text[at..], PARAMETER), literal(&text[at..], END_FUNCTION)) {
            (LiteralMatch::Whole, _) => self.go(at + PARAMETER.len(), XmlState::Key),
            (_, LiteralMatch::Whole) => {
                emitter.arguments("}");
                emitter.end_call();
                self.go(at + END_FUNCTION.len(), XmlState::Complete)
            }
            (LiteralMatch::Beginning, _) | (_, LiteralMatch::Beginning) => Some(CallReading::More),
            (LiteralMatch::Other, LiteralMatch::Other) => Some(self.no_call()),
        }
    }
}

/// A value without the line ends that the template writes around it.
fn within_lines(value: &str) -> &str {
    let value = value.strip_prefix('\n').unwrap_or(value);
    value.strip_suffix('\n').unwrap_or(value)
}

impl CallReader for XmlCall {
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        loop {
            if let Some(reading) = self.step(text, emitter) {
                return reading;
            }
        }
    }

    fn finish(&self) -> UnfinishedCall {
        UnfinishedCall::Cut
    }
}
