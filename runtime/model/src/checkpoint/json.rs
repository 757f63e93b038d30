//! The JSON files of a checkpoint as Python writes them: `NaN` and `Infinity` stand for numbers, and `null`
//! for a key that is not set.

use super::CheckpointProblem;
use crate::foreign::ForeignFile;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Numbers of Python's `json` module that JSON does not have, longest first.
const NOT_NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The content of a file.
pub(super) fn parse<T: DeserializeOwned>(file: &[u8]) -> Result<T, CheckpointProblem> {
    let json = |error: serde_json::Error| CheckpointProblem::Json(error.to_string());
    let parsed = match std::str::from_utf8(file) {
        Ok(text) => serde_json::from_str(&with_texts(text)).map_err(json),
        Err(_) => Err(CheckpointProblem::NotText),
    };
    let mut value: Value = match (parsed, ForeignFile::of_text(file)) {
        (Ok(value), None) => value,
        (_, Some(foreign)) => return Err(CheckpointProblem::Foreign(foreign)),
        (Err(problem), None) => return Err(problem),
    };
    drop_nulls(&mut value);
    serde_json::from_value(value).map_err(json)
}

/// Numbers that JSON does not have as texts: a key that is read is then refused by its type, and others do
/// not matter.
fn with_texts(file: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(file.len()), file);
    while let Some(at) = rest.find(['"', '-', 'I', 'N']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let number = NOT_NUMBERS.iter().find(|number| rest.starts_with(**number));
        let taken = match number {
            Some(number) => {
                out.push_str(&format!("\"{number}\""));
                number.len()
            }
            None => {
                let taken = if rest.starts_with('"') { text_len(rest) } else { 1 };
                out.push_str(&rest[..taken]);
                taken
            }
        };
        rest = &rest[taken..];
    }
    out.push_str(rest);
    out
}

/// Bytes of the text at the beginning of `json`, with its quotes.
fn text_len(json: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in json.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    json.len()
}

/// Removes the keys whose value is `null`. The depth of a parsed value is bounded by `serde_json`.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(entries) => {
            entries.retain(|_, value| !value.is_null());
            entries.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn python_numbers_become_texts() {
        let file = r#"{"a": NaN, "b": [Infinity, -Infinity, -1.5], "NaN": "Infinity \" NaN", "n": null, "x": {"y": null}}"#;
        let parsed: Value = parse(file.as_bytes()).unwrap();
        let expected =
            json!({"a": "NaN", "b": ["Infinity", "-Infinity", -1.5], "NaN": "Infinity \" NaN", "x": {}});
        assert_eq!(parsed, expected);
    }

    #[test]
    fn broken_texts_are_refused() {
        for file in ["", "{", "\"a", "{\"a\": NaNa}", "[\"\\", "{\"a\": N}"] {
            assert!(parse::<Value>(file.as_bytes()).is_err(), "{file}");
        }
        let nested = "[".repeat(100_000);
        assert!(matches!(parse::<Value>(nested.as_bytes()), Err(CheckpointProblem::Json(_))));
    }

    #[test]
    fn foreign_files_are_named() {
        let page = parse::<Value>(b"<!DOCTYPE html><html></html>").unwrap_err().to_string();
        assert!(page.contains("web page"), "{page}");
        let error = parse::<Value>(br#"{"error": "Repository not found"}"#).unwrap_err().to_string();
        assert!(error.contains("a server's error in JSON (\"Repository not found\")"), "{error}");
    }
}
