//! One call of Gemma: `call:f{k:<escape>v<escape>, n: 3}`, with `<|"|>` around strings in Gemma 4.

use serde_json::Value;
use serde_json::value::RawValue;

use super::emitter::Emitter;
use super::functions::ToolFunction;
use super::reader::{
    CallReader, CallReading, LiteralMatch, NoCall, UnfinishedCall, after_space, is_name_char, literal,
};

const CALL: &str = "call:";

/// Most open objects and lists, as in JSON.
const MAX_DEPTH: usize = 127;

/// Reads one call. Its arguments are no JSON, so that they are given together.
#[derive(Debug)]
pub(super) struct GemmaCall {
    /// The mark before and after a string.
    mark: &'static str,
    at: usize,
    state: GemmaState,
    name: String,
    /// Where the arguments begin, with their brace.
    arguments: usize,
    depth: usize,
    in_string: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GemmaState {
    Open,
    Name,
    Arguments,
}

impl GemmaCall {
    /// After the tag of `tag_bytes`.
    pub(super) fn new(tag_bytes: usize, mark: &'static str) -> Self {
        Self {
            mark,
            at: tag_bytes,
            state: GemmaState::Open,
            name: String::new(),
            arguments: 0,
            depth: 0,
            in_string: false,
        }
    }

    fn no_call(&self) -> CallReading {
        CallReading::NoCall(NoCall { start: 0, error: self.at, json: false })
    }

    fn open(&mut self, text: &str) -> Option<CallReading> {
        let at = after_space(text, self.at);
        match literal(&text[at..], CALL) {
            LiteralMatch::Whole => {
                self.at = at + CALL.len();
                self.state = GemmaState::Name;
                None
            }
            LiteralMatch::Beginning => Some(CallReading::More),
            LiteralMatch::Other => Some(self.no_call()),
        }
    }

    fn name(&mut self, text: &str, emitter: &Emitter) -> Option<CallReading> {
        let rest = &text[self.at..];
        let Some(end) = rest.find(|c: char| !is_name_char(c)) else {
            let may_be = emitter.functions.may_begin(rest);
            return Some(if may_be { CallReading::More } else { self.no_call() });
        };
        if !rest[end..].starts_with('{') || !emitter.functions.has(&rest[..end]) {
            return Some(self.no_call());
        }
        rest[..end].clone_into(&mut self.name);
        self.at += end;
        self.arguments = self.at;
        self.state = GemmaState::Arguments;
        None
    }

    /// Looks for the brace that ends the arguments.
    fn arguments(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        while self.at < text.len() {
            let rest = &text[self.at..];
            match literal(rest, self.mark) {
                LiteralMatch::Whole => {
                    self.in_string = !self.in_string;
                    self.at += self.mark.len();
                    continue;
                }
                LiteralMatch::Beginning => return CallReading::More,
                LiteralMatch::Other => {}
            }
            let c = rest.chars().next().unwrap_or_default();
            self.at += c.len_utf8();
            match c {
                _ if self.in_string => {}
                '{' | '[' if self.depth >= MAX_DEPTH => return self.no_call(),
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth -= 1,
                _ => {}
            }
            if self.depth == 0 {
                return self.give(text, emitter);
            }
        }
        CallReading::More
    }

    fn give(&self, text: &str, emitter: &mut Emitter) -> CallReading {
        let written = WrittenArguments { rest: &text[self.arguments..self.at], mark: self.mark };
        let function = emitter.functions.get(&self.name);
        let Some(arguments) = function.and_then(|function| written.arguments(function)) else {
            return self.no_call();
        };
        emitter.begin(&self.name);
        emitter.arguments(&arguments);
        emitter.end_call();
        CallReading::Ended(self.at)
    }
}

impl CallReader for GemmaCall {
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        if self.state == GemmaState::Open
            && let Some(reading) = self.open(text)
        {
            return reading;
        }
        if self.state == GemmaState::Name
            && let Some(reading) = self.name(text, emitter)
        {
            return reading;
        }
        self.arguments(text, emitter)
    }

    fn finish(&self) -> UnfinishedCall {
        UnfinishedCall::Cut
    }
}

/// Arguments as the model wrote them, complete, and what is left to read of them.
struct WrittenArguments<'a> {
    rest: &'a str,
    mark: &'static str,
}

/// The value of a parameter.
enum ArgumentValue {
    /// Text between marks, or without marks where it is no JSON.
    Text(String),
    /// JSON.
    Json(String),
}

impl<'a> WrittenArguments<'a> {
    /// All arguments as JSON; none where they are not written as they should be.
    fn arguments(mut self, function: &ToolFunction) -> Option<String> {
        let json = self.object(Some(function))?;
        self.rest.trim().is_empty().then_some(json)
    }

    /// An object. Its keys may stand between marks. Where it holds the arguments of a function, texts take
    /// the types of its parameters.
    fn object(&mut self, function: Option<&ToolFunction>) -> Option<String> {
        self.take("{")?;
        let mut json = String::from("{");
        loop {
            self.skip_commas();
            if self.take("}").is_some() {
                json.push('}');
                return Some(json);
            }
            let key = match self.marked() {
                Some(key) => key.to_owned(),
                None => self.until(&[':'])?.trim().trim_matches('"').to_owned(),
            };
            self.take(":")?;
            let value = match (self.value()?, function) {
                (ArgumentValue::Json(value), _) => value,
                (ArgumentValue::Text(text), Some(function)) => function.typed(&key, &text),
                (ArgumentValue::Text(text), None) => Value::from(text).to_string(),
            };
            let comma = if json.len() > 1 { ", " } else { "" };
            json.push_str(&format!("{comma}{}: {value}", Value::from(key)));
        }
    }

    fn list(&mut self) -> Option<String> {
        self.take("[")?;
        let mut json = String::from("[");
        loop {
            self.skip_commas();
            if self.take("]").is_some() {
                json.push(']');
                return Some(json);
            }
            let value = match self.value()? {
                ArgumentValue::Json(value) => value,
                ArgumentValue::Text(text) => Value::from(text).to_string(),
            };
            let comma = if json.len() > 1 { ", " } else { "" };
            json.push_str(&format!("{comma}{value}"));
        }
    }

    fn value(&mut self) -> Option<ArgumentValue> {
        self.rest = self.rest.trim_start();
        if let Some(text) = self.marked() {
            return Some(ArgumentValue::Text(text.to_owned()));
        }
        match self.rest.chars().next()? {
            '{' => self.object(None).map(ArgumentValue::Json),
            '[' => self.list().map(ArgumentValue::Json),
            _ => {
                let text = self.until(&[',', '}', ']'])?.trim().to_owned();
                let is_json = serde_json::from_str::<&RawValue>(&text).is_ok();
                Some(if is_json { ArgumentValue::Json(text) } else { ArgumentValue::Text(text) })
            }
        }
    }

    /// The text between two marks, where the first stands here.
    fn marked(&mut self) -> Option<&'a str> {
        let rest = self.rest.trim_start().strip_prefix(self.mark)?;
        let (text, rest) = rest.split_once(self.mark)?;
        self.rest = rest;
        Some(text)
    }

    fn take(&mut self, text: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(text)?;
        Some(())
    }

    /// The text before the first of the characters, which must come.
    fn until(&mut self, ends: &[char]) -> Option<&'a str> {
        let (text, rest) = self.rest.split_at(self.rest.find(ends)?);
        self.rest = rest;
        Some(text)
    }

    fn skip_commas(&mut self) {
        self.rest = self.rest.trim_start_matches(|c: char| c == ',' || c.is_whitespace());
    }
}
