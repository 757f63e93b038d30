//! Calls as JSON after a tag, one by one or in a list; and the calls of Llama, which have no tag.

use super::emitter::Emitter;
use super::json_object::{ObjectProgress, ObjectReader};
use super::json_scan::{JsonScan, JsonScanner, push_json};
use super::reader::{
    CallReader, CallReading, LiteralMatch, NoCall, UnfinishedCall, after_space, is_name_char, literal,
};

/// Reads `{…}`, or `[{…}, {…}]`, after a tag; or, without a tag, one object.
#[derive(Debug)]
pub(super) struct JsonCalls {
    bare: bool,
    state: ListState,
    /// The byte to read next.
    at: usize,
    /// Where the object that is read now begins; 0, with the tag, for the first one.
    start: usize,
    list: bool,
    object: ObjectReader,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ListState {
    /// Before the first object or the list.
    Open,
    /// Before an object of the list, or its end.
    Item,
    Object,
    /// After an object.
    ObjectRead,
}

impl JsonCalls {
    /// After the tag of `tag_bytes`.
    pub(super) fn tagged(tag_bytes: usize) -> Self {
        let object = ObjectReader::new(false);
        Self { bare: false, state: ListState::Open, at: tag_bytes, start: 0, list: false, object }
    }

    /// An object without a tag.
    pub(super) fn bare() -> Self {
        let object = ObjectReader::new(true);
        Self { bare: true, state: ListState::Object, at: 0, start: 0, list: false, object }
    }

    fn no_call(&self, json: bool) -> CallReading {
        CallReading::NoCall(NoCall { start: self.start, error: self.at, json })
    }

    fn begin_object(&mut self) {
        self.object = ObjectReader::new(self.bare);
        self.state = ListState::Object;
    }

    /// Reads the object on; none where it has ended.
    fn object(&mut self, text: &str, emitter: &mut Emitter) -> Option<CallReading> {
        while let Some(c) = text[self.at..].chars().next() {
            match self.object.feed(c, emitter) {
                ObjectProgress::More => self.at += c.len_utf8(),
                progress @ (ObjectProgress::Ended | ObjectProgress::EndedBefore) => {
                    if progress == ObjectProgress::Ended {
                        self.at += c.len_utf8();
                    }
                    self.state = ListState::ObjectRead;
                    return None;
                }
                ObjectProgress::NoCall => return Some(self.no_call(true)),
                ObjectProgress::Invalid => return Some(self.no_call(false)),
            }
        }
        Some(CallReading::More)
    }
}

impl CallReader for JsonCalls {
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        loop {
            if self.state == ListState::Object {
                match self.object(text, emitter) {
                    Some(reading) => return reading,
                    None if self.bare => return CallReading::Ended(self.at),
                    None => {}
                }
            }
            let at = after_space(text, self.at);
            let Some(c) = text[at..].chars().next() else { return CallReading::More };
            match (self.state, c) {
                (ListState::Open, '[') => {
                    self.list = true;
                    self.state = ListState::Item;
                    self.at = at + 1;
                }
                (ListState::ObjectRead, ',') if self.list => {
                    self.state = ListState::Item;
                    self.at = at + 1;
                }
                (ListState::Open, '{') => {
                    self.at = at;
                    self.begin_object();
                }
                (ListState::Item | ListState::ObjectRead, '{') => {
                    self.at = at;
                    // Where the first object of a list is no call, its tag is content too.
                    if self.object.is_complete() {
                        self.start = at;
                    }
                    self.begin_object();
                }
                (ListState::Item, ']') if self.object.is_complete() => return CallReading::Ended(at + 1),
                (ListState::ObjectRead, ']') if self.list => return CallReading::Ended(at + 1),
                (ListState::ObjectRead, _) => return CallReading::Ended(self.at),
                (ListState::Item, _) if self.object.is_complete() => return CallReading::Ended(self.at),
                _ => return self.no_call(false),
            }
        }
    }

    fn finish(&self) -> UnfinishedCall {
        match self.state {
            ListState::ObjectRead => UnfinishedCall::Complete,
            ListState::Object if self.object.is_complete() => UnfinishedCall::Complete,
            ListState::Item if self.object.is_complete() => UnfinishedCall::Complete,
            ListState::Object if self.bare && !self.object.is_named() => UnfinishedCall::Text,
            ListState::Open | ListState::Item | ListState::Object => UnfinishedCall::Cut,
        }
    }
}

/// Reads what follows `[TOOL_CALLS]`: a list of objects, or a name and its arguments.
#[derive(Debug)]
pub(super) struct MistralCalls {
    tag_bytes: usize,
    reader: Option<Box<dyn CallReader>>,
}

impl MistralCalls {
    /// After the tag of `tag_bytes`.
    pub(super) fn new(tag_bytes: usize) -> Self {
        Self { tag_bytes, reader: None }
    }
}

impl CallReader for MistralCalls {
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        if let Some(reader) = &mut self.reader {
            return reader.read(text, emitter);
        }
        let at = after_space(text, self.tag_bytes);
        let Some(c) = text[at..].chars().next() else { return CallReading::More };
        let mut reader: Box<dyn CallReader> = if matches!(c, '[' | '{') {
            Box::new(JsonCalls::tagged(self.tag_bytes))
        } else {
            Box::new(NamedCall { at, scanner: JsonScanner::new(), state: NamedCallState::Name })
        };
        let reading = reader.read(text, emitter);
        self.reader = Some(reader);
        reading
    }

    fn finish(&self) -> UnfinishedCall {
        self.reader.as_ref().map_or(UnfinishedCall::Cut, |reader| reader.finish())
    }
}

/// Reads `f{…}`, or `f[CALL_ID]…[ARGS]{…}`.
#[derive(Debug)]
struct NamedCall {
    at: usize,
    scanner: JsonScanner,
    state: NamedCallState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum NamedCallState {
    Name,
    BeforeArguments(String),
    Arguments,
}

impl NamedCall {
    fn no_call(&self) -> CallReading {
        CallReading::NoCall(NoCall { start: 0, error: self.at, json: false })
    }

    fn name(&mut self, text: &str, emitter: &Emitter) -> Option<CallReading> {
        let rest = &text[self.at..];
        let Some(end) = rest.find(|c: char| !is_name_char(c)) else {
            let may_be = emitter.functions.may_begin(rest);
            return Some(if may_be { CallReading::More } else { self.no_call() });
        };
        if !emitter.functions.has(&rest[..end]) {
            return Some(self.no_call());
        }
        self.state = NamedCallState::BeforeArguments(rest[..end].to_owned());
        self.at += end;
        None
    }

    /// Skips the id and the tag that may stand before the arguments.
    fn before_arguments(&mut self, text: &str) -> Option<CallReading> {
        let mut at = after_space(text, self.at);
        let id = literal(&text[at..], "[CALL_ID]");
        if id == LiteralMatch::Whole {
            at += "[CALL_ID]".len();
            at += text[at..].find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(text.len() - at);
            at = after_space(text, at);
        }
        let tag = literal(&text[at..], "[ARGS]");
        if tag == LiteralMatch::Whole {
            at = after_space(text, at + "[ARGS]".len());
        }
        if at == text.len() || id == LiteralMatch::Beginning || tag == LiteralMatch::Beginning {
            return Some(CallReading::More);
        }
        self.at = at;
        (!text[at..].starts_with('{')).then(|| self.no_call())
    }
}

impl CallReader for NamedCall {
    fn read(&mut self, text: &str, emitter: &mut Emitter) -> CallReading {
        if self.state == NamedCallState::Name
            && let Some(reading) = self.name(text, emitter)
        {
            return reading;
        }
        if let NamedCallState::BeforeArguments(name) = &self.state {
            let name = name.clone();
            if let Some(reading) = self.before_arguments(text) {
                return reading;
            }
            self.state = NamedCallState::Arguments;
            emitter.begin(&name);
        }
        let mut arguments = String::new();
        for c in text[self.at..].chars() {
            let in_string = self.scanner.in_string();
            let scan = self.scanner.feed(c);
            if matches!(scan, JsonScan::Past | JsonScan::Invalid) {
                emitter.arguments(&arguments);
                return self.no_call();
            }
            push_json(&mut arguments, c, in_string);
            self.at += c.len_utf8();
            if scan == JsonScan::Ended {
                emitter.arguments(&arguments);
                emitter.end_call();
                return CallReading::Ended(self.at);
            }
        }
        emitter.arguments(&arguments);
        CallReading::More
    }

    fn finish(&self) -> UnfinishedCall {
        UnfinishedCall::Cut
    }
}
