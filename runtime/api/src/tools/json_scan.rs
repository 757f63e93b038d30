//! Where a JSON value ends, character by character.

/// Most open objects and lists: what `serde_json` reads, so that whatever is a call here can be read again.
const MAX_DEPTH: usize = 127;

/// Follows one JSON value. Inside strings it takes control characters as they are; the readers of calls write
/// them as escapes.
#[derive(Debug)]
pub(super) struct JsonScanner {
    /// The open objects (`true`) and lists.
    objects: Vec<bool>,
    state: ScanState,
}

/// What a character was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JsonScan {
    /// The value goes on.
    Inside,
    /// The value ends with this character.
    Ended,
    /// The value, a number, ended before this character.
    Past,
    /// No JSON goes on like this.
    Invalid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScanState {
    Value,
    ItemOrEnd,
    KeyOrEnd,
    Key,
    Colon,
    CommaOrEnd,
    Text { key: bool },
    Escape { key: bool },
    Hex { key: bool, left: u8 },
    Number(NumberState),
    Word(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NumberState {
    Sign,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl NumberState {
    fn next(self, c: char) -> Option<Self> {
        use NumberState::{Exponent, ExponentDigits, ExponentSign, Fraction, Point, Sign, Whole, Zero};
        match (self, c) {
            (Sign, '0') => Some(Zero),
            (Sign | Whole, '0'..='9') => Some(Whole),
            (Zero | Whole, '.') => Some(Point),
            (Point | Fraction, '0'..='9') => Some(Fraction),
            (Zero | Whole | Fraction, 'e' | 'E') => Some(Exponent),
            (Exponent, '+' | '-') => Some(ExponentSign),
            (Exponent | ExponentSign | ExponentDigits, '0'..='9') => Some(ExponentDigits),
            _ => None,
        }
    }

    fn is_whole(self) -> bool {
        matches!(self, Self::Zero | Self::Whole | Self::Fraction | Self::ExponentDigits)
    }
}

impl JsonScanner {
    /// At the beginning of a value.
    pub(super) fn new() -> Self {
        Self { objects: Vec::new(), state: ScanState::Value }
    }

    /// Whether the next character stands in a string.
    pub(super) fn in_string(&self) -> bool {
        matches!(self.state, ScanState::Text { .. })
    }

    /// Takes the next character.
    pub(super) fn feed(&mut self, c: char) -> JsonScan {
        match self.state {
            ScanState::Text { key } => match c {
                '"' if key => self.go(ScanState::Colon),
                '"' => self.complete(),
                '\\' => self.go(ScanState::Escape { key }),
                _ => JsonScan::Inside,
            },
            ScanState::Escape { key } => match c {
                'u' => self.go(ScanState::Hex { key, left: 4 }),
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => self.go(ScanState::Text { key }),
                _ => JsonScan::Invalid,
            },
            ScanState::Hex { key, left } if c.is_ascii_hexdigit() => match left {
                1 => self.go(ScanState::Text { key }),
                left => self.go(ScanState::Hex { key, left: left - 1 }),
            },
            ScanState::Hex { .. } => JsonScan::Invalid,
            ScanState::Number(number) => match number.next(c) {
                Some(next) => self.go(ScanState::Number(next)),
                None if !number.is_whole() => JsonScan::Invalid,
                None => match self.complete() {
                    JsonScan::Ended => JsonScan::Past,
                    _ => self.feed(c),
                },
            },
            ScanState::Word(rest) => match rest.strip_prefix(c) {
                Some("") => self.complete(),
                Some(rest) => self.go(ScanState::Word(rest)),
                None => JsonScan::Invalid,
            },
            _ if matches!(c, ' ' | '\n' | '\r' | '\t') => JsonScan::Inside,
            ScanState::Value => self.value(c),
            ScanState::ItemOrEnd if c == ']' => self.close(),
            ScanState::ItemOrEnd => self.value(c),
            ScanState::KeyOrEnd if c == '}' => self.close(),
            ScanState::KeyOrEnd | ScanState::Key if c == '"' => self.go(ScanState::Text { key: true }),
            ScanState::Colon if c == ':' => self.go(ScanState::Value),
            ScanState::CommaOrEnd => match (c, self.objects.last()) {
                (',', Some(true)) => self.go(ScanState::Key),
                (',', Some(false)) => self.go(ScanState::Value),
                ('}', Some(true)) | (']', Some(false)) => self.close(),
                _ => JsonScan::Invalid,
            },
            ScanState::KeyOrEnd | ScanState::Key | ScanState::Colon => JsonScan::Invalid,
        }
    }

    fn value(&mut self, c: char) -> JsonScan {
        match c {
            '{' => self.open(true),
            '[' => self.open(false),
            '"' => self.go(ScanState::Text { key: false }),
            '-' => self.go(ScanState::Number(NumberState::Sign)),
            '0' => self.go(ScanState::Number(NumberState::Zero)),
            '1'..='9' => self.go(ScanState::Number(NumberState::Whole)),
            't' => self.go(ScanState::Word("rue")),
            'f' => self.go(ScanState::Word("alse")),
            'n' => self.go(ScanState::Word("ull")),
            _ => JsonScan::Invalid,
        }
    }

    fn go(&mut self, state: ScanState) -> JsonScan {
        self.state = state;
        JsonScan::Inside
    }

    fn open(&mut self, object: bool) -> JsonScan {
        if self.objects.len() >= MAX_DEPTH {
            return JsonScan::Invalid;
        }
        self.objects.push(object);
        self.go(if object { ScanState::KeyOrEnd } else { ScanState::ItemOrEnd })
    }

    fn close(&mut self) -> JsonScan {
        self.objects.pop();
        self.complete()
    }

    /// A value is complete: the whole one, or one inside of it.
    fn complete(&mut self) -> JsonScan {
        self.state = ScanState::CommaOrEnd;
        if self.objects.is_empty() { JsonScan::Ended } else { JsonScan::Inside }
    }
}

/// Adds a character of a JSON text; a control character in a string as its escape.
pub(super) fn push_json(text: &mut String, c: char, in_string: bool) {
    match c {
        '\n' if in_string => text.push_str("\\n"),
        '\r' if in_string => text.push_str("\\r"),
        '\t' if in_string => text.push_str("\\t"),
        c if in_string && c < ' ' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
        c => text.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes that the value at the beginning of a text takes; none where it is no JSON or goes on.
    fn length(text: &str) -> Option<usize> {
        let mut scanner = JsonScanner::new();
        for (at, c) in text.char_indices() {
            match scanner.feed(c) {
                JsonScan::Inside => {}
                JsonScan::Ended => return Some(at + c.len_utf8()),
                JsonScan::Past => return Some(at),
                JsonScan::Invalid => return None,
            }
        }
        None
    }

    #[test]
    fn values_end_where_they_do() {
        for (text, rest) in [
            (r#"{"a": [1, {"b": "}]"}], "c": -0.5e+3}"#, " tail"),
            ("[]", "]"),
            ("{}", "}"),
            (r#""\"\u00e9é""#, "\""),
            ("-12.5", ","),
            ("null", "l"),
            ("true", ""),
        ] {
            assert_eq!(length(&format!("{text}{rest}")), Some(text.len()), "{text}");
        }
        for text in ["{'a': 1}", "{a: 1}", "[1,]", "{,}", "01", "1.e", "\"\\x\"", "+1", "nul1", "]", "-a"] {
            assert_eq!(length(&format!("{text} ")).filter(|end| *end == text.len()), None, "{text}");
        }
        assert_eq!(length(&format!("{}1{}", "[".repeat(127), "]".repeat(127))), Some(255));
        assert_eq!(length(&format!("{}1{}", "[".repeat(128), "]".repeat(128))), None);
    }

    proptest! {
        #[test]
        fn it_agrees_with_serde_json(text in r#"[\[\]{}:,"\\0-9.eE+\-aun tfrlse]{0,24}"#) {
            let valid = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            let whole = length(&format!("{text} "));
            let by_scan = whole.is_some_and(|end| text[end..].trim().is_empty());
            // serde_json also refuses what is JSON: unpaired surrogates and numbers beyond the range.
            prop_assert!(by_scan || !valid, "{text}");
            if by_scan && !text.contains("\\u") && !text.contains(['e', 'E']) {
                prop_assert!(valid, "{text}");
            }
        }
    }
}
