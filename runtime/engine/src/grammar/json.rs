//! JSON as a caller wrote it: numbers keep all their digits and objects their order.

use super::decimal::Decimal;
use serde::de::IgnoredAny;
use std::collections::HashMap;

/// Deepest nesting of a schema's text. Every recursion over a schema has at most this depth, at some 500
/// bytes of stack a level.
pub(super) const MAX_DEPTH: usize = 100;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(Decimal),
    String(String),
    Array(Vec<Json>),
    Object(Members),
}

/// The members of an object in their order. A name that is given twice has its last value.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Members(Vec<(String, Json)>);

impl Members {
    pub(super) fn get(&self, name: &str) -> Option<&Json> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Json)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Json {
    /// Reads a whole text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str::<IgnoredAny>(text).map_err(|error| error.to_string())?;
        Reader { text, at: 0 }.value(0)
    }

    /// Reads the value that a text begins with, and gives the bytes up to its end.
    pub(super) fn parse_prefix(text: &str) -> Result<(Self, usize), String> {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
        match values.next() {
            Some(Ok(_)) => Ok((Reader { text, at: 0 }.value(0)?, values.byte_offset())),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("it is missing".to_owned()),
        }
    }

    pub(super) fn as_object(&self) -> Option<&Members> {
        if let Self::Object(members) = self { Some(members) } else { None }
    }

    pub(super) fn as_array(&self) -> Option<&[Self]> {
        if let Self::Array(list) = self { Some(list) } else { None }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }
}

/// Reads a text that is JSON already; `serde_json` itself would round the numbers.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn value(&mut self, depth: usize) -> Result<Json, String> {
        if depth > MAX_DEPTH {
            return Err(format!("it nests deeper than {MAX_DEPTH} levels"));
        }
        Ok(match self.next_byte() {
            b'{' => Json::Object(self.members(depth)?),
            b'[' => {
                self.at += 1;
                let mut list = Vec::new();
                while self.next_byte() != b']' {
                    list.push(self.value(depth + 1)?);
                    self.skip(b',');
                }
                self.at += 1;
                Json::Array(list)
            }
            b'"' => Json::String(self.string()?),
            _ => match self.word() {
                "null" => Json::Null,
                "true" => Json::Bool(true),
                "false" => Json::Bool(false),
                "" => return Err("a value is missing".to_owned()),
                number => Json::Number(Decimal::parse(number)),
            },
        })
    }

    fn members(&mut self, depth: usize) -> Result<Members, String> {
        self.at += 1;
        let mut members: Vec<(String, Json)> = Vec::new();
        let mut positions: HashMap<String, usize> = HashMap::new();
        while self.next_byte() != b'}' {
            let name = self.string()?;
            self.next_byte();
            self.skip(b':');
            let value = self.value(depth + 1)?;
            self.next_byte();
            self.skip(b',');
            match positions.get(&name) {
                Some(&position) => members[position].1 = value,
                None => {
                    positions.insert(name.clone(), members.len());
                    members.push((name, value));
                }
            }
        }
        self.at += 1;
        Ok(Members(members))
    }

    /// Goes to the next byte that is no white space; a closing one stands for the end, so that every loop
    /// ends.
    fn next_byte(&mut self) -> u8 {
        let bytes = self.text.as_bytes();
        while bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        bytes.get(self.at).copied().unwrap_or(b'}')
    }

    fn skip(&mut self, byte: u8) {
        if self.next_byte() == byte {
            self.at += 1;
        }
    }

    fn string(&mut self) -> Result<String, String> {
        let mut escaped = false;
        let end = self.text[self.at..].bytes().skip(1).position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        });
        let end = self.at + end.ok_or("a string is not closed")? + 2;
        let string = serde_json::from_str(&self.text[self.at..end]).map_err(|error| error.to_string());
        self.at = end;
        string
    }

    /// A number or a literal name.
    fn word(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_order_and_the_last_of_two_equal_names_survive() {
        let json =
            Json::parse(r#" {"b": 12345678901234567890123, "a": [1e400, "é\n", null], "b": true} "#).unwrap();
        let members: Vec<_> = json.as_object().unwrap().iter().collect();
        assert_eq!(members[0], ("b", &Json::Bool(true)));
        let list = members[1].1.as_array().unwrap();
        assert_eq!(list[0], Json::Number(Decimal::parse("1e400")));
        assert_eq!((&list[1], &list[2]), (&Json::String("é\n".into()), &Json::Null));
    }

    #[test]
    fn bad_and_deep_texts_are_refused() {
        let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
        for (text, words) in
            [("{", "EOF"), ("{} x", "trailing"), (r#""\ud800""#, "escape"), (&*deep, "100 levels")]
        {
            let error = Json::parse(text).unwrap_err();
            assert!(error.contains(words), "{text:.20}: {error}");
        }
    }
}
