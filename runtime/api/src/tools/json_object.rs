//! One call as a JSON object: `{"name": …, "arguments": {…}}`, its members in any order.

use serde_json::{Map, Value};

use super::emitter::Emitter;
use super::json_scan::{JsonScan, JsonScanner, push_json};

/// Reads one object. Arguments after the name are given as they come, those before it together.
#[derive(Debug)]
pub(super) struct ObjectReader {
    /// The object stands in the text without a tag, so that it is a call only if it has the members of a call
    /// and no others.
    bare: bool,
    state: ObjectState,
    key: String,
    /// The name, or arguments that wait for it, as JSON.
    value: String,
    name: Option<String>,
    arguments: ArgumentsState,
    scanner: JsonScanner,
}

/// What a character of the object was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObjectProgress {
    /// The object goes on.
    More,
    /// It ends with this character; its call is complete.
    Ended,
    /// Its call is complete, and it does not go on with this character.
    EndedBefore,
    /// It is JSON, but no call.
    NoCall,
    /// It is no JSON.
    Invalid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ObjectState {
    Open,
    KeyOrEnd,
    Key,
    InKey,
    Colon,
    BeforeValue,
    Value(ObjectMember),
    CommaOrEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ObjectMember {
    Name,
    /// Arguments that are given as they come.
    Stream,
    /// Arguments that are given together.
    Held,
    Other,
}

#[derive(Debug, PartialEq, Eq)]
enum ArgumentsState {
    Missing,
    Held(String),
    Given,
}

impl ObjectReader {
    pub(super) fn new(bare: bool) -> Self {
        Self {
            bare,
            state: ObjectState::Open,
            key: String::new(),
            value: String::new(),
            name: None,
            arguments: ArgumentsState::Missing,
            scanner: JsonScanner::new(),
        }
    }

    /// Whether name and arguments are there.
    pub(super) fn is_complete(&self) -> bool {
        self.arguments == ArgumentsState::Given
    }

    /// Whether the object has the name of a function.
    pub(super) fn is_named(&self) -> bool {
        self.name.is_some()
    }

    /// Takes the next character, the first of which is `{`.
    pub(super) fn feed(&mut self, c: char, emitter: &mut Emitter) -> ObjectProgress {
        match self.next(c, emitter) {
            // What is wrong after a complete call does not make it less of a call.
            ObjectProgress::Invalid | ObjectProgress::NoCall if self.is_complete() => {
                ObjectProgress::EndedBefore
            }
            progress => progress,
        }
    }

    fn next(&mut self, c: char, emitter: &mut Emitter) -> ObjectProgress {
        let space = matches!(c, ' ' | '\n' | '\r' | '\t');
        match self.state {
            ObjectState::Open if c == '{' => self.go(ObjectState::KeyOrEnd),
            ObjectState::InKey => self.in_key(c),
            ObjectState::Value(member) => self.in_value(member, c, emitter),
            ObjectState::Open => ObjectProgress::Invalid,
            _ if space => ObjectProgress::More,
            ObjectState::KeyOrEnd if c == '}' => self.end(emitter),
            ObjectState::KeyOrEnd | ObjectState::Key if c == '"' => {
                self.scanner = JsonScanner::new();
                self.key.clear();
                self.in_key(c)
            }
            ObjectState::Colon if c == ':' => self.go(ObjectState::BeforeValue),
            ObjectState::BeforeValue => self.begin_value(c, emitter),
            ObjectState::CommaOrEnd if c == ',' => self.go(ObjectState::Key),
            ObjectState::CommaOrEnd if c == '}' => self.end(emitter),
            ObjectState::KeyOrEnd | ObjectState::Key | ObjectState::Colon | ObjectState::CommaOrEnd => {
                ObjectProgress::Invalid
            }
        }
    }

    fn go(&mut self, state: ObjectState) -> ObjectProgress {
        self.state = state;
        ObjectProgress::More
    }

    fn in_key(&mut self, c: char) -> ObjectProgress {
        push_json(&mut self.key, c, self.scanner.in_string());
        match self.scanner.feed(c) {
            JsonScan::Inside => self.go(ObjectState::InKey),
            JsonScan::Ended => {
                self.key = serde_json::from_str(&self.key).unwrap_or_default();
                let known = matches!(self.key.as_str(), "name" | "arguments" | "parameters" | "type" | "id");
                if self.bare && !known && !self.is_complete() {
                    ObjectProgress::NoCall
                } else {
                    self.go(ObjectState::Colon)
                }
            }
            JsonScan::Past | JsonScan::Invalid => ObjectProgress::Invalid,
        }
    }

    fn begin_value(&mut self, c: char, emitter: &mut Emitter) -> ObjectProgress {
        let member = match self.key.as_str() {
            "name" if self.name.is_none() => ObjectMember::Name,
            "arguments" | "parameters" if self.arguments == ArgumentsState::Missing => {
                match (c, &self.name) {
                    ('{', Some(name)) => {
                        emitter.begin(name);
                        ObjectMember::Stream
                    }
                    _ => ObjectMember::Held,
                }
            }
            _ => ObjectMember::Other,
        };
        let fits = match member {
            ObjectMember::Name => c == '"',
            ObjectMember::Held => matches!(c, '{' | '"' | 'n'),
            ObjectMember::Stream | ObjectMember::Other => true,
        };
        if !fits {
            return ObjectProgress::NoCall;
        }
        self.scanner = JsonScanner::new();
        self.value.clear();
        self.in_value(member, c, emitter)
    }

    fn in_value(&mut self, member: ObjectMember, c: char, emitter: &mut Emitter) -> ObjectProgress {
        let in_string = self.scanner.in_string();
        let scan = self.scanner.feed(c);
        match scan {
            JsonScan::Invalid => return ObjectProgress::Invalid,
            JsonScan::Past => {
                self.state = ObjectState::CommaOrEnd;
                return self.next(c, emitter);
            }
            JsonScan::Inside | JsonScan::Ended => {}
        }
        match member {
            ObjectMember::Stream => {
                self.value.clear();
                push_json(&mut self.value, c, in_string);
                emitter.arguments(&self.value);
            }
            ObjectMember::Name | ObjectMember::Held => push_json(&mut self.value, c, in_string),
            ObjectMember::Other => {}
        }
        if scan == JsonScan::Inside {
            return self.go(ObjectState::Value(member));
        }
        self.state = ObjectState::CommaOrEnd;
        self.end_value(member, emitter)
    }

    fn end_value(&mut self, member: ObjectMember, emitter: &mut Emitter) -> ObjectProgress {
        match member {
            ObjectMember::Name => match serde_json::from_str::<String>(&self.value) {
                Ok(name) if emitter.functions.has(&name) => self.name = Some(name),
                _ => return ObjectProgress::NoCall,
            },
            ObjectMember::Stream => {
                self.arguments = ArgumentsState::Given;
                emitter.end_call();
            }
            ObjectMember::Held => match held_arguments(&self.value) {
                Some(arguments) => self.arguments = ArgumentsState::Held(arguments),
                None => return ObjectProgress::NoCall,
            },
            ObjectMember::Other => {}
        }
        if let (Some(name), ArgumentsState::Held(arguments)) = (&self.name, &self.arguments) {
            give(name, arguments, emitter);
            self.arguments = ArgumentsState::Given;
        }
        ObjectProgress::More
    }

    fn end(&mut self, emitter: &mut Emitter) -> ObjectProgress {
        match &self.name {
            _ if self.is_complete() => ObjectProgress::Ended,
            Some(name) if !self.bare => {
                give(name, "{}", emitter);
                self.arguments = ArgumentsState::Given;
                ObjectProgress::Ended
            }
            _ => ObjectProgress::NoCall,
        }
    }
}

fn give(name: &str, arguments: &str, emitter: &mut Emitter) {
    emitter.begin(name);
    emitter.arguments(arguments);
    emitter.end_call();
}

/// Arguments from JSON: an object, none at all, or a string that holds an object, as Granite 4 writes them.
fn held_arguments(value: &str) -> Option<String> {
    match value.chars().next()? {
        '{' => Some(value.to_owned()),
        'n' => Some("{}".to_owned()),
        _ => {
            let text: String = serde_json::from_str(value).ok()?;
            let object: Option<Map<String, Value>> = serde_json::from_str(&text).ok();
            if text.trim().is_empty() { Some("{}".to_owned()) } else { object.map(|_| text) }
        }
    }
}
