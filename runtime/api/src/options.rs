//! The fields of a generate request that shape how tokens are chosen and where an answer ends, for both
//! protocols.
//!
//! Here they are only read: the engine that honours them knows their ranges and refuses what is outside, by
//! the same names.

use serde_json::{Map, Value};
use trustformers_proto::v1;

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::{float, found, member_text, take};
use crate::nearest;

/// Their names in JSON.
pub(crate) const OPTION_FIELDS: &[&str] = &[
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "stop",
    "stop_token_ids",
    "response_format",
];

/// The options of a request about sampling and about its end. Each field that is left out has no effect.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options {
    /// Samples from this many best tokens only; 0: from all.
    pub top_k: Option<u32>,
    /// Samples only from tokens with at least this share of the best one's probability, 0 to 1.
    pub min_p: Option<f32>,
    /// Samples from the most typical tokens up to this share of probability, above 0 and at most 1.
    pub typical_p: Option<f32>,
    /// Makes what prompt and answer hold already less likely, above 0 and at most 10; 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// Taken from the logit of what the answer holds already, -2 to 2.
    pub presence_penalty: Option<f32>,
    /// Taken from a logit as often as its token is in the answer, -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Added to logits, by token id, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// With each token its log probability and this many of the best, 0 to 20.
    pub logprobs: Option<u32>,
    /// Texts that end the answer, at most 16.
    pub stop: Vec<String>,
    /// Tokens that end the answer, at most 64.
    pub stop_token_ids: Vec<u32>,
    /// What the answer must look like.
    pub format: Option<Format>,
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema, as text, describes.
    JsonSchema(String),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// Text of a context-free grammar in Lark's syntax.
    Grammar(String),
}

impl Options {
    /// Reads them from a JSON object that may hold other fields too, and from the text of that object.
    pub(crate) fn from_json(object: &Map<String, Value>, body: &[u8]) -> Result<Self, ApiError> {
        let number = |field| take(object, field, "a number", float);
        let count = |field| take(object, field, "a whole number from 0 to 4294967295", whole);
        Ok(Self {
            top_k: count("top_k")?,
            min_p: number("min_p")?,
            typical_p: number("typical_p")?,
            repetition_penalty: number("repetition_penalty")?,
            presence_penalty: number("presence_penalty")?,
            frequency_penalty: number("frequency_penalty")?,
            logit_bias: take(object, "logit_bias", "an object such as {\"42\": -5.0}", biases)?
                .unwrap_or_default(),
            logprobs: count("logprobs")?,
            stop: take(object, "stop", "a string or a list of strings", texts)?.unwrap_or_default(),
            stop_token_ids: take(object, "stop_token_ids", "a list of token ids", |value| {
                value.as_array()?.iter().map(whole).collect()
            })?
            .unwrap_or_default(),
            format: match object.get("response_format") {
                None | Some(Value::Null) => None,
                Some(value) => format(value, body)?,
            },
        })
    }
}

impl From<&mut v1::GenerateRequest> for Options {
    /// Takes them out of a request.
    fn from(request: &mut v1::GenerateRequest) -> Self {
        use v1::response_format::Format as Wire;
        let mut logit_bias: Vec<(u32, f32)> = std::mem::take(&mut request.logit_bias).into_iter().collect();
        logit_bias.sort_unstable_by_key(|(id, _)| *id);
        let format = request.response_format.take().and_then(|format| format.format);
        Self {
            top_k: request.top_k,
            min_p: request.min_p,
            typical_p: request.typical_p,
            repetition_penalty: request.repetition_penalty,
            presence_penalty: request.presence_penalty,
            frequency_penalty: request.frequency_penalty,
            logit_bias,
            logprobs: request.logprobs,
            stop: std::mem::take(&mut request.stop),
            stop_token_ids: std::mem::take(&mut request.stop_token_ids),
            format: format.map(|format| match format {
                Wire::JsonObject(_) => Format::JsonObject,
                Wire::JsonSchema(schema) => Format::JsonSchema(schema),
                Wire::Regex(regex) => Format::Regex(regex),
                Wire::Grammar(grammar) => Format::Grammar(grammar),
            }),
        }
    }
}

fn whole(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

fn biases(value: &Value) -> Option<Vec<(u32, f32)>> {
    value.as_object()?.iter().map(|(id, bias)| Some((id.parse().ok()?, float(bias)?))).collect()
}

fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(all) => all.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

const FORMAT: &str = "response_format";
const TYPES: &[&str] = &["text", "json_object", "json_schema", "regex", "grammar"];

/// What formats have beside their type. Clients that build a request from a class write the others as null.
const MEMBERS: &[&str] = &["schema", "json_schema", "regex", "grammar"];

/// A format; none for plain text.
fn format(value: &Value, body: &[u8]) -> Result<Option<Format>, ApiError> {
    let Some(object) = value.as_object() else {
        let expected = "expected an object such as {\"type\": \"json_object\"}";
        return Err(ApiError::field(FORMAT, format!("{expected}, found {}", found(value))));
    };
    let kind = object.get("type").and_then(Value::as_str).ok_or_else(|| {
        ApiError::field("response_format.type", format!("is missing: give one of {}", TYPES.join(", ")))
    })?;
    let format = match kind {
        "text" => allow(object, &[]).map(|()| None),
        "json_object" => allow(object, &[]).map(|()| Some(Format::JsonObject)),
        "json_schema" => schema(object, body).map(|schema| Some(Format::JsonSchema(schema))),
        "regex" => text(object, "regex").map(|text| Some(Format::Regex(text))),
        "grammar" => text(object, "grammar").map(|text| Some(Format::Grammar(text))),
        other => {
            let hint = nearest::hint(other, TYPES);
            Err(ApiError::field("response_format.type", format!("there is no {:?}; {hint}", echo(other))))
        }
    }?;
    Ok(format)
}

/// Refuses keys that a format has no use for.
fn allow(object: &Map<String, Value>, keys: &[&str]) -> Result<(), ApiError> {
    let known: Vec<&str> = ["type"].iter().chain(keys).copied().collect();
    let absent = |key: &str, value: &Value| value.is_null() && MEMBERS.contains(&key);
    match object.iter().find(|(key, value)| !known.contains(&key.as_str()) && !absent(key, value)) {
        None => Ok(()),
        Some((key, _)) => {
            let hint = nearest::hint(key, &known);
            Err(ApiError::field(&format!("{FORMAT}.{key}"), format!("there is no such field here; {hint}")))
        }
    }
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, ApiError> {
    allow(object, &[key])?;
    object
        .get(key)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| ApiError::field(&format!("{FORMAT}.{key}"), "is missing or not a string"))
}

/// The schema, beside the type or, as OpenAI has it, inside `json_schema` with a name. It is passed on as the
/// caller wrote it: a number that is parsed and written again loses digits.
fn schema(object: &Map<String, Value>, body: &[u8]) -> Result<String, ApiError> {
    allow(object, &["schema", "json_schema"])?;
    let given = |holder: Option<&Map<String, Value>>| {
        holder.and_then(|holder| holder.get("schema")).filter(|schema| !schema.is_null()).cloned()
    };
    let inner = object.get("json_schema").and_then(Value::as_object);
    let schema = match (given(Some(object)), given(inner)) {
        (Some(schema), None) | (None, Some(schema)) => schema,
        (None, None) => {
            return Err(ApiError::field("response_format.schema", "is missing: give a JSON schema"));
        }
        (Some(_), Some(_)) => {
            return Err(ApiError::field(
                "response_format.schema",
                "stands there twice: give one JSON schema",
            ));
        }
    };
    if schema.is_object() || schema.is_boolean() {
        Ok(raw_schema(body).unwrap_or_else(|| schema.to_string()))
    } else {
        let why = format!("expected a JSON schema, which is an object, found {}", found(&schema));
        Err(ApiError::field("response_format.schema", why))
    }
}

/// The text of the schema in the text of a body.
fn raw_schema(body: &[u8]) -> Option<String> {
    let given = |path: &[&str]| member_text(body, path).filter(|text| text.trim() != "null");
    given(&[FORMAT, "schema"]).or_else(|| given(&[FORMAT, "json_schema", "schema"]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> Result<Options, ApiError> {
        Options::from_json(value.as_object().unwrap(), value.to_string().as_bytes())
    }

    #[test]
    fn null_members_of_a_format_are_missing() {
        let schema = Some(Format::JsonSchema(r#"{"type":"object"}"#.into()));
        for (format, expected) in [
            (json!({"type": "text", "json_schema": null, "regex": null}), None),
            (json!({"type": "json_object", "schema": null}), Some(Format::JsonObject)),
            (
                json!({"type": "json_schema", "schema": {"type": "object"}, "json_schema": null}),
                schema.clone(),
            ),
            (
                json!({"type": "json_schema", "schema": null, "json_schema": {"schema": {"type": "object"}}}),
                schema,
            ),
        ] {
            assert_eq!(read(&json!({"response_format": format})).unwrap().format, expected, "{format}");
        }
        assert!(read(&json!({"response_format": {"type": "json_schema", "schema": null}})).is_err());
        assert!(read(&json!({"response_format": {"type": "text", "other": null}})).is_err());
    }

    #[test]
    fn missing_and_null_options_are_none() {
        assert_eq!(read(&json!({})).unwrap(), Options::default());
        let nulls: Map<String, Value> =
            OPTION_FIELDS.iter().map(|field| ((*field).to_owned(), Value::Null)).collect();
        assert_eq!(Options::from_json(&nulls, b"").unwrap(), Options::default());
    }

    #[test]
    fn json_and_grpc_say_the_same() {
        let json = json!({
            "top_k": 40, "min_p": 0.5, "typical_p": 0.75, "repetition_penalty": 1.5, "presence_penalty": 0.25,
            "frequency_penalty": -0.5, "logit_bias": {"3": -1.5, "12": 2}, "logprobs": 2, "stop": ["a", "b"],
            "stop_token_ids": [5], "response_format": {"type": "regex", "regex": "a+"},
        });
        let mut request = v1::GenerateRequest {
            top_k: Some(40),
            min_p: Some(0.5),
            typical_p: Some(0.75),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(0.25),
            frequency_penalty: Some(-0.5),
            logit_bias: [(12, 2.0), (3, -1.5)].into(),
            logprobs: Some(2),
            stop: vec!["a".into(), "b".into()],
            stop_token_ids: vec![5],
            response_format: Some(v1::ResponseFormat {
                format: Some(v1::response_format::Format::Regex("a+".into())),
            }),
            ..Default::default()
        };
        let read = read(&json).unwrap();
        assert_eq!(read, Options::from(&mut request));
        assert_eq!((read.top_k, read.logit_bias), (Some(40), vec![(3, -1.5), (12, 2.0)]));
    }

    #[test]
    fn every_format_is_read_in_its_forms() {
        let cases = [
            (json!({"type": "text"}), None),
            (json!({"type": "json_object"}), Some(Format::JsonObject)),
            (
                json!({"type": "json_schema", "schema": {"a": 1}}),
                Some(Format::JsonSchema("{\"a\":1}".into())),
            ),
            (
                json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}),
                Some(Format::JsonSchema("{\"a\":1}".into())),
            ),
            (json!({"type": "regex", "regex": "x"}), Some(Format::Regex("x".into()))),
            (json!({"type": "grammar", "grammar": "start: x"}), Some(Format::Grammar("start: x".into()))),
        ];
        for (value, wanted) in cases {
            assert_eq!(read(&json!({"response_format": value})).unwrap().format, wanted, "{value}");
        }
    }

    #[test]
    fn unreadable_values_are_named_with_what_was_found() {
        let cases = [
            (json!({"top_k": -1}), "top_k", "found -1"),
            (json!({"top_k": 1.5}), "top_k", "whole number"),
            (json!({"min_p": "x"}), "min_p", "a number"),
            (json!({"stop": 7}), "stop", "a string or a list of strings"),
            (json!({"stop": ["a", 7]}), "stop", "found [\"a\",7]"),
            (json!({"stop_token_ids": 7}), "stop_token_ids", "list"),
            (json!({"logit_bias": {"a": 1}}), "logit_bias", "found {\"a\":1}"),
            (json!({"response_format": "json"}), "response_format", "found \"json\""),
            (json!({"response_format": {}}), "response_format.type", "json_schema, regex"),
            (json!({"response_format": {"type": "json"}}), "response_format.type", "json_object"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.schema", "missing"),
            (
                json!({"response_format": {"type": "json_schema", "schema": "x"}}),
                "response_format.schema",
                "an object",
            ),
            (
                json!({"response_format": {"type": "regex", "regx": "x"}}),
                "response_format.regx",
                "did you mean \"regex\"",
            ),
            (json!({"response_format": {"type": "grammar"}}), "response_format.grammar", "missing"),
        ];
        for (value, field, text) in cases {
            let error = read(&value).unwrap_err();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
                "{value}: {error:?}"
            );
            assert!(error.to_string().contains(text), "{value}: {error}");
        }
    }
}
