//! The field `text` of a request: the form of the answer's text.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::json_body::{found, member_text};
use crate::json_object::ObjectAt;
use crate::options::Format;

/// The name of a schema that has none. It says nothing to a model.
const UNNAMED: &str = "response";

/// What a request says about the text of its answer.
#[derive(Debug)]
pub(super) struct TextFields {
    /// The format; none for plain text.
    pub(super) format: Option<Format>,
    /// The field as the answer repeats it.
    pub(super) listed: Value,
}

/// Reads `text`. A schema is passed on as it is written in the body.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the field.
pub(super) fn read(body: &ObjectAt<'_>, bytes: &[u8]) -> Result<TextFields, ApiError> {
    let plain = || json!({"type": "text"});
    let Some(text) = body.object("text")? else {
        return Ok(TextFields { format: None, listed: json!({"format": plain()}) });
    };
    text.only(&["format", "verbosity"])?;
    let verbosity = text.word("verbosity", &["low", "medium", "high"])?;
    if let Some(found @ ("low" | "high")) = verbosity {
        let why = format!("{found:?} is not supported: say in instructions how long the answer is to be");
        return Err(text.error("verbosity", why));
    }
    let (format, listed) = match text.object("format")? {
        None => (None, plain()),
        Some(format) => read_format(&format, bytes)?,
    };
    let mut listed = json!({"format": listed});
    if let Some(verbosity) = verbosity {
        listed["verbosity"] = json!(verbosity);
    }
    Ok(TextFields { format, listed })
}

fn read_format(format: &ObjectAt<'_>, bytes: &[u8]) -> Result<(Option<Format>, Value), ApiError> {
    let kind = format.word("type", &["text", "json_object", "json_schema"])?;
    let kind =
        kind.ok_or_else(|| format.error("type", "is missing: give one of text, json_object, json_schema"))?;
    if kind != "json_schema" {
        format.only(&["type"])?;
        let wanted = (kind == "json_object").then_some(Format::JsonObject);
        return Ok((wanted, json!({"type": kind})));
    }
    format.only(&["type", "name", "description", "schema", "strict"])?;
    let schema = match format.get("schema") {
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => schema,
        None => {
            let why = "is missing: give a JSON schema, or the type json_object for any object";
            return Err(format.error("schema", why));
        }
        Some(other) => {
            let why = format!("expected a JSON schema, which is an object, found {}", found(other));
            return Err(format.error("schema", why));
        }
    };
    let text = member_text(bytes, &["text", "format", "schema"]).unwrap_or_else(|| schema.to_string());
    let listed = json!({
        "type": kind,
        "name": format.text("name")?.unwrap_or(UNNAMED),
        "description": format.text("description")?,
        "schema": schema,
        // A schema is enforced in either case.
        "strict": format.flag("strict")?.unwrap_or(true),
    });
    Ok((Some(Format::JsonSchema(text)), listed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(bytes: &[u8]) -> Result<TextFields, ApiError> {
        let body: Value = serde_json::from_slice(bytes).unwrap();
        read(&ObjectAt::body(body.as_object().unwrap()), bytes)
    }

    #[test]
    fn every_format_is_read_and_repeated() {
        for body in [json!({}), json!({"text": {}}), json!({"text": {"format": {"type": "text"}}})] {
            let text = read_text(body.to_string().as_bytes()).unwrap();
            assert_eq!((text.format, text.listed), (None, json!({"format": {"type": "text"}})));
        }
        let body = json!({"text": {"verbosity": "medium", "format": {"type": "json_object"}}});
        let text = read_text(body.to_string().as_bytes()).unwrap();
        assert_eq!(text.format, Some(Format::JsonObject));
        assert_eq!(text.listed, json!({"format": {"type": "json_object"}, "verbosity": "medium"}));
    }

    #[test]
    fn a_schema_keeps_every_digit() {
        let body = br#"{"text": {"format": {"type": "json_schema", "name": "n",
            "schema": {"const": 123456789012345678901234567890}}}}"#;
        let text = read_text(body).unwrap();
        let schema = r#"{"const": 123456789012345678901234567890}"#.to_owned();
        assert_eq!(text.format, Some(Format::JsonSchema(schema)));
        let listed = &text.listed["format"];
        assert_eq!(
            (&listed["name"], &listed["description"], &listed["strict"]),
            (&json!("n"), &json!(null), &json!(true))
        );
    }

    #[test]
    fn wrong_formats_are_refused_by_name() {
        for (text, expected) in [
            (json!({"format": {}}), "text.format.type: is missing"),
            (json!({"format": {"type": "xml"}}), "text.format.type: there is no \"xml\""),
            (json!({"format": {"type": "json_schema", "name": "n"}}), "text.format.schema: is missing"),
            (
                json!({"format": {"type": "json_schema", "schema": "x"}}),
                "text.format.schema: expected a JSON schema",
            ),
            (
                json!({"format": {"type": "json_object", "schema": {}}}),
                "text.format.schema: there is no such field",
            ),
            (json!({"format": "json"}), "text.format: expected an object"),
            (json!({"verbosity": "high"}), "text.verbosity: \"high\" is not supported"),
            (json!({"verbosity": "loud"}), "text.verbosity: there is no \"loud\""),
            (json!({"style": 1}), "text.style: there is no such field"),
        ] {
            let error = read_text(json!({"text": text}).to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
