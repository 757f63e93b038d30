//! JSON as Python's `json.dumps` writes it: models were trained on exactly these blanks and numbers.

use serde_json::Value;
use std::fmt::Write;

/// How to write.
#[derive(Debug, Clone)]
pub(super) struct Style {
    /// Between items.
    pub(super) item: String,
    /// Between a key and its value.
    pub(super) key: String,
    /// Blanks for each level; `None`: all on one line.
    pub(super) indent: Option<usize>,
    /// Whether everything beyond ASCII is escaped.
    pub(super) ascii: bool,
    /// Whether keys are sorted.
    pub(super) sorted: bool,
}

impl Style {
    pub(super) fn write(&self, value: &Value) -> String {
        let mut writer = Writer { style: self, out: String::new() };
        writer.value(value, 0);
        writer.out
    }
}

struct Writer<'a> {
    style: &'a Style,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, level: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(truth) => self.out.push_str(if *truth { "true" } else { "false" }),
            Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => self.out.push_str(&python_float(float)),
                None => self.out.push_str(&number.to_string()),
            },
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                self.list(['[', ']'], level, items.iter(), |writer, item| writer.value(item, level + 1));
            }
            Value::Object(map) => {
                let mut entries: Vec<(&String, &Value)> = map.iter().collect();
                if self.style.sorted {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.list(['{', '}'], level, entries.into_iter(), |writer, (key, value)| {
                    writer.text(key);
                    writer.out.push_str(&writer.style.key);
                    writer.value(value, level + 1);
                });
            }
        }
    }

    fn list<T>(
        &mut self,
        [open, close]: [char; 2],
        level: usize,
        items: impl Iterator<Item = T>,
        write: impl Fn(&mut Self, T),
    ) {
        self.out.push(open);
        let mut count = 0;
        for item in items {
            if count > 0 {
                self.out.push_str(&self.style.item);
            }
            self.line(level + 1);
            write(self, item);
            count += 1;
        }
        if count > 0 {
            self.line(level);
        }
        self.out.push(close);
    }

    fn line(&mut self, level: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent.min(16) * level));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing into a String cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// The shortest digits that give the number back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let plain = value == 0.0 || (1e-4..1e16).contains(&value.abs());
    if plain {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn style() -> Style {
        Style { item: ", ".into(), key: ": ".into(), indent: None, ascii: false, sorted: false }
    }

    #[test]
    fn numbers_are_pythons() {
        let numbers = json!([0.0, 1.0, -2.5, 0.1, 1e-5, 1.5e-7, 1e15, 1e16, 1.25e300, 3, u64::MAX, i64::MIN]);
        let expected = "[0.0, 1.0, -2.5, 0.1, 1e-05, 1.5e-07, 1000000000000000.0, 1e+16, 1.25e+300, 3, \
                        18446744073709551615, -9223372036854775808]";
        assert_eq!(style().write(&numbers), expected);
    }

    #[test]
    fn blanks_keys_and_escapes_are_as_asked_for() {
        let value = json!({"b": [1, {"c": null}], "a": "é\"\\\n\u{1}🦀\u{7f}", "e": {}, "f": []});
        let one = "{\"b\": [1, {\"c\": null}], \"a\": \"é\\\"\\\\\\n\\u0001🦀\u{7f}\", \"e\": {}, \"f\": []}";
        assert_eq!(style().write(&value), one);
        let ascii = Style { ascii: true, sorted: true, ..style() }.write(&value);
        assert!(ascii.starts_with("{\"a\": \"\\u00e9"), "{ascii}");
        assert!(ascii.contains("\\ud83e\\udd80\\u007f"), "{ascii}");
        let lines =
            Style { indent: Some(2), item: ",".into(), ..style() }.write(&json!({"a": [1, 2], "b": {}}));
        assert_eq!(lines, "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}");
    }
}
