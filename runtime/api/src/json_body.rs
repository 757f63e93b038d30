//! Reads the fields of a JSON body one by one.
//!
//! A derived type would be shorter, but its errors do not name the field together with what was found and
//! what was expected, and an unknown field could not be refused with the nearest known one. A setting that is
//! silently ignored costs its user more than an error.

use std::collections::BTreeMap;

use axum::body::Bytes;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::echo::{echo, truncate};
use crate::error::ApiError;
use crate::{Api, nearest};

/// A longer body is parsed away from the threads that serve connections: below this, parsing takes less than
/// a millisecond.
const LARGE_BODY_BYTES: usize = 64 * 1024;

impl Api {
    /// Parses a body: on this thread when it is short, else as a job that counts against the jobs for large
    /// bodies.
    pub(crate) async fn parse<T: Send + 'static>(
        &self,
        body: Bytes,
        parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if body.len() <= LARGE_BODY_BYTES {
            return parse(&body);
        }
        self.large_bodies.run(move || parse(&body)).await?
    }
}

fn not_an_object(message: String) -> ApiError {
    ApiError::InvalidRequest { field: None, message }
}

/// The object in a body. A field that is not among the `known` ones is refused.
pub(crate) fn object(bytes: &[u8], known: &[&str], example: &str) -> Result<Map<String, Value>, ApiError> {
    let object = any_object(bytes, example)?;
    refuse_unknown(&object, known)?;
    Ok(object)
}

/// The object in a body, whatever its fields are.
pub(crate) fn any_object(bytes: &[u8], example: &str) -> Result<Map<String, Value>, ApiError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        not_an_object(format!("the body is not JSON ({error}); send an object such as {example}"))
    })?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(not_an_object(format!("the body must be a JSON object such as {example}"))),
    }
}

/// Refuses a field that is not among the `known` ones.
pub(crate) fn refuse_unknown(object: &Map<String, Value>, known: &[&str]) -> Result<(), ApiError> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(unknown) => {
            let hint = nearest::hint(unknown, known);
            Err(ApiError::field(unknown, format!("there is no such field; {hint}")))
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "a setting needs no more digits than an f32 has")]
pub(crate) fn float(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32)
}

/// A field of the object; `null` is the same as leaving it out.
pub(crate) fn take<T>(
    object: &Map<String, Value>,
    field: &str,
    expected: &str,
    convert: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, ApiError> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(ApiError::field(field, format!("expected {expected}, found {}", found(value)))),
        },
    }
}

/// The text of the member at this path of a body, as the caller wrote it: a number that is parsed and written
/// again loses digits.
pub(crate) fn member_text(body: &[u8], path: &[&str]) -> Option<String> {
    type RawMembers<'a> = BTreeMap<String, &'a RawValue>;
    let mut text = std::str::from_utf8(body).ok()?;
    for name in path {
        let members: RawMembers<'_> = serde_json::from_str(text).ok()?;
        text = members.get(*name)?.get();
    }
    Some(text.to_owned())
}

/// A value as errors show it: its JSON, cut.
pub(crate) fn found(value: &Value) -> String {
    const MAX_CHARS: usize = 40;
    match value {
        // Only the beginning of a long text is written.
        Value::String(text) => truncate(&Value::from(echo(text)).to_string(), MAX_CHARS).into_owned(),
        Value::Array(all) if all.len() > MAX_CHARS => {
            truncate(&Value::from(&all[..MAX_CHARS]).to_string(), MAX_CHARS).into_owned()
        }
        value => truncate(&value.to_string(), MAX_CHARS).into_owned(),
    }
}
