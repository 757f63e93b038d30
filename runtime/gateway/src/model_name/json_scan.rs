//! Finds the field `model` of a JSON object while the object arrives.
//!
//! Only the outermost object is taken apart. Everything inside of it is skipped: texts by a search for their
//! end, objects and arrays by counting brackets. Whether the skipped parts are valid is for the pod to say,
//! which reads them.

use memchr::memchr2;

use super::{MAX_NAME_BYTES, malformed};
use crate::error::GatewayError;

/// The longest way to write `model`: five escapes of six characters. Longer keys are other fields.
const MAX_KEY_BYTES: usize = 30;
/// The longest way to write a name: each byte as an escape of six characters.
const MAX_WRITTEN_BYTES: usize = 6 * MAX_NAME_BYTES;

/// A scan of one object.
#[derive(Debug)]
pub(crate) struct JsonScan {
    state: State,
    /// The key that is being read, or the value of `model`, as it is written.
    written: Vec<u8>,
    /// Whether the last key was `model`.
    is_model: bool,
    name: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the object.
    Start,
    /// Before a key. An object may end here if it has none yet.
    Key { first: bool },
    /// Inside a key.
    InKey { escaped: bool },
    /// Between a key and its value.
    Colon,
    /// Before a value.
    Value,
    /// Inside a text that is a value.
    Text { escaped: bool },
    /// Inside a number or a word.
    Scalar,
    /// Inside an object or an array.
    Nested { depth: u32, text: InText },
    /// Behind a value.
    AfterValue,
    /// Behind the object.
    End,
}

/// Whether a position inside a nested value is inside a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InText {
    No,
    Yes,
    Escaped,
}

/// Where a text ends in the bytes that are there.
struct TextEnd {
    /// Bytes of the text, its closing quote included where it is there.
    consumed: usize,
    /// Whether the closing quote is among them.
    closed: bool,
    /// Whether the bytes end behind a backslash.
    escaped: bool,
}

impl Default for JsonScan {
    fn default() -> Self {
        Self { state: State::Start, written: Vec::new(), is_model: false, name: None }
    }
}

impl JsonScan {
    /// Takes the next bytes of the object.
    ///
    /// # Errors
    /// This can't be an object, its model is not a text, or it names two models.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), GatewayError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let consumed = self.step(rest)?;
            rest = &rest[consumed..];
        }
        Ok(())
    }

    /// Whether the name is known.
    pub(crate) fn is_found(&self) -> bool {
        self.name.is_some()
    }

    /// The name, where it is known.
    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The name; empty where the object has none.
    ///
    /// # Errors
    /// The bytes ended before the object did, and no name had come.
    pub(crate) fn finish(self) -> Result<String, GatewayError> {
        match (self.name, self.state) {
            (Some(name), _) => Ok(name),
            (None, State::End) => Ok(String::new()),
            (None, State::Start) => Err(malformed("expected a JSON object")),
            (None, _) => Err(malformed("as JSON: it ends before its object does")),
        }
    }

    /// Takes at least one byte, or changes the state.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, GatewayError> {
        let byte = bytes[0];
        match self.state {
            State::InKey { escaped } => {
                let end = text_end(bytes, escaped);
                self.note(&bytes[..end.consumed], MAX_KEY_BYTES);
                self.state = State::InKey { escaped: end.escaped };
                if end.closed {
                    self.is_model = self.key_is_model();
                    self.written.clear();
                    self.state = State::Colon;
                }
                Ok(end.consumed)
            }
            State::Text { escaped } => self.text(bytes, escaped),
            State::Nested { depth, text } => Ok(self.nested(bytes, depth, text)),
            State::Scalar => {
                let length =
                    bytes.iter().position(|byte| matches!(byte, b',' | b'}' | b' ' | b'\t' | b'\r' | b'\n'));
                if length.is_some() {
                    self.state = State::AfterValue;
                }
                Ok(length.unwrap_or(bytes.len()))
            }
            _ if byte.is_ascii_whitespace() => Ok(1),
            _ => self.between(byte).map(|()| 1),
        }
    }

    /// A byte between keys and values.
    fn between(&mut self, byte: u8) -> Result<(), GatewayError> {
        self.state = match (self.state, byte) {
            (State::Start, b'{') => State::Key { first: true },
            (State::Start, _) => return Err(malformed("expected a JSON object")),
            (State::Key { .. }, b'"') => State::InKey { escaped: false },
            (State::Key { first: true }, b'}') | (State::AfterValue, b'}') => State::End,
            (State::Colon, b':') => State::Value,
            (State::AfterValue, b',') => State::Key { first: false },
            (State::Value, b'"') => State::Text { escaped: false },
            // `null` is the same as leaving it out.
            (State::Value, b'n') if self.is_model => State::Scalar,
            (State::Value, _) if self.is_model => {
                return Err(malformed("model: expected a text, such as \"default/name\""));
            }
            (State::Value, b'{' | b'[') => State::Nested { depth: 1, text: InText::No },
            (State::Value, b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => State::Scalar,
            (State::End, _) => return Err(malformed("as JSON: something follows its object")),
            (_, other) => {
                let found = char::from(other).escape_debug();
                return Err(malformed(&format!("as JSON: '{found}' where it does not belong")));
            }
        };
        Ok(())
    }

    fn text(&mut self, bytes: &[u8], escaped: bool) -> Result<usize, GatewayError> {
        let end = text_end(bytes, escaped);
        if self.is_model {
            self.note(&bytes[..end.consumed], MAX_WRITTEN_BYTES);
        }
        self.state = State::Text { escaped: end.escaped };
        if end.closed {
            self.state = State::AfterValue;
            if self.is_model {
                self.named()?;
            }
        }
        Ok(end.consumed)
    }

    /// Skips what is inside an object or an array.
    fn nested(&mut self, bytes: &[u8], mut depth: u32, mut text: InText) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            if text == InText::No {
                match bytes[at] {
                    b'"' => text = InText::Yes,
                    b'{' | b'[' => depth = depth.saturating_add(1),
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                at += 1;
                if depth == 0 {
                    self.state = State::AfterValue;
                    return at;
                }
            } else {
                let end = text_end(&bytes[at..], text == InText::Escaped);
                at += end.consumed;
                text = match (end.closed, end.escaped) {
                    (true, _) => InText::No,
                    (false, true) => InText::Escaped,
                    (false, false) => InText::Yes,
                };
            }
        }
        self.state = State::Nested { depth, text };
        at
    }

    /// Keeps what is written, up to one byte more than fits, so that what is too long differs from what is
    /// not.
    fn note(&mut self, bytes: &[u8], longest: usize) {
        let room = (longest + 2).saturating_sub(self.written.len());
        self.written.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn key_is_model(&self) -> bool {
        match self.written.strip_suffix(b"\"") {
            Some(b"model") => true,
            Some(key) if key.contains(&b'\\') => unescaped(key).is_some_and(|key| key == "model"),
            _ => false,
        }
    }

    /// The value of `model` is complete.
    fn named(&mut self) -> Result<(), GatewayError> {
        if self.name.is_some() {
            return Err(malformed("it names the model twice"));
        }
        let written = std::mem::take(&mut self.written);
        let name = match written.strip_suffix(b"\"") {
            Some(written) if written.len() <= MAX_WRITTEN_BYTES => {
                unescaped(written).ok_or_else(|| malformed("model: not a valid text"))?
            }
            // No model has a name that long; its beginning is enough for the error that says so.
            _ => String::from_utf8_lossy(&written[..written.len().min(MAX_WRITTEN_BYTES)]).into_owned(),
        };
        self.name = Some(name);
        Ok(())
    }
}

/// Looks for the end of a text. `escaped` says that the first byte follows a backslash.
fn text_end(bytes: &[u8], escaped: bool) -> TextEnd {
    let mut at = usize::from(escaped);
    loop {
        match bytes.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
            None => {
                // With nothing left, an escape that is pending stays so only if its character is not here.
                let escaped = escaped && bytes.is_empty() || at > bytes.len();
                return TextEnd { consumed: bytes.len(), closed: false, escaped };
            }
            Some(offset) if bytes[at + offset] == b'"' => {
                return TextEnd { consumed: at + offset + 1, closed: true, escaped: false };
            }
            // The backslash and what it escapes.
            Some(offset) => at += offset + 2,
        }
    }
}

/// The text between quotes, as JSON means it.
fn unescaped(written: &[u8]) -> Option<String> {
    if !written.contains(&b'\\') {
        return std::str::from_utf8(written).ok().map(str::to_owned);
    }
    serde_json::from_slice(&[b"\"", written, b"\""].concat()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan(text: &[u8], piece: usize) -> Result<String, GatewayError> {
        let mut scan = JsonScan::default();
        for piece in text.chunks(piece.max(1)) {
            scan.push(piece)?;
        }
        scan.finish()
    }

    #[test]
    fn the_name_is_found_however_the_object_is_cut() {
        let long = "x".repeat(5000);
        let cases = [
            (r#"{"model":"a"}"#.to_owned(), "a"),
            (r#" {"prompt": "a \"model\": \"no\" \\", "model": "de\u0066", "n": [1]}"#.to_owned(), "def"),
            (r#"{"nested": {"model": "inner", "x": ["]}\"", {}]}, "model" : "outer"}"#.to_owned(), "outer"),
            (r#"{"n": -1.5e3, "t": true, "mod\u0065l": "escaped"}"#.to_owned(), "escaped"),
            (r#"{"prompt": "x"}"#.to_owned(), ""),
            (r#"{"model": null, "n":1}"#.to_owned(), ""),
            ("{}".to_owned(), ""),
            (format!(r#"{{"{long}": "{long}", "model": "behind"}}"#), "behind"),
            (r#"{"model": "näme/ü"}"#.to_owned(), "näme/ü"),
            (r#"{"modelx": "no", "mode": "no", "model": "yes"}"#.to_owned(), "yes"),
        ];
        for (text, name) in cases {
            for piece in [1, 2, 3, 7, text.len()] {
                assert_eq!(scan(text.as_bytes(), piece).unwrap(), name, "{piece}: {text}");
            }
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            "",
            "   ",
            "{",
            "[\"a\"]",
            "\"a\"",
            r#"{"model": 3}"#,
            r#"{"model": ["a"]}"#,
            r#"{"model": "a", "model": "b"}"#,
            r#"{"model" "a"}"#,
            r#"{model: "a"}"#,
            r#"{"n": 1} x"#,
            r#"{"n": 1"#,
            r#"{"n":, "model": "a"}"#,
            r#"{"model": "\x"}"#,
        ] {
            for piece in [1, 64] {
                let error = scan(bad.as_bytes(), piece).unwrap_err();
                assert_eq!(error.kind(), "invalid_request", "{bad}");
            }
        }
        let not_utf8 = b"{\"model\": \"\xff\"}";
        assert_eq!(scan(not_utf8, 64).unwrap_err().kind(), "invalid_request");
    }

    #[test]
    fn a_name_is_kept_up_to_a_bound() {
        for escape in ["n", "\\u006e"] {
            let long = escape.repeat(100_000);
            let mut found = JsonScan::default();
            found.push(format!(r#"{{"model": "{long}", "n": 1}}"#).as_bytes()).unwrap();
            let name = found.finish().unwrap();
            assert!(name.len() > MAX_NAME_BYTES && name.len() <= MAX_WRITTEN_BYTES, "{}", name.len());
        }
        let fits = "n".repeat(MAX_NAME_BYTES);
        assert_eq!(scan(format!(r#"{{"model": "{fits}"}}"#).as_bytes(), 64).unwrap(), fits);
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::Value;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((".*", inner), 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_object_gives_the_name_that_a_parser_finds(
            members in prop::collection::vec((".*", value()), 0..6),
            name in ".{0,40}",
            at in any::<prop::sample::Index>(),
            pretty in any::<bool>(),
            piece in 1_usize..40,
        ) {
            let mut members: Vec<(String, serde_json::Value)> =
                members.into_iter().filter(|(key, _)| key != "model").collect();
            members.insert(at.index(members.len() + 1), ("model".to_owned(), name.clone().into()));
            let object = serde_json::Value::Object(members.into_iter().collect());
            let text = if pretty { format!("{object:#}") } else { object.to_string() };
            prop_assert_eq!(scan(text.as_bytes(), piece).unwrap(), name);
        }
    }
}
