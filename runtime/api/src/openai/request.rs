//! The fields that chat completions and completions share: how they are read, which ones are refused with a
//! hint, and which ones are accepted without an effect.

use serde_json::{Map, Value};

use crate::chat_answer::MAX_CHOICES;
use crate::conversation::Prompt;
use crate::error::ApiError;
use crate::fields::Asked;
use crate::json_body::{any_object, float, found, refuse_unknown, take};
use crate::options::{OPTION_FIELDS, Options};
use crate::{nearest, priority};

/// The fields of both routes, beside [`OPTION_FIELDS`].
const SHARED_FIELDS: &[&str] =
    &["model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "seed", "priority"];

/// A field that is accepted because clients always send it, although it changes nothing here.
pub(super) struct FieldWithoutEffect {
    /// Its name.
    pub(super) name: &'static str,
    /// What its value must be.
    expected: &'static str,
    /// Whether a value is that.
    fits: fn(&Value) -> bool,
    /// Why it has no effect.
    reason: &'static str,
}

/// The fields of both routes that are accepted without an effect. A value of the wrong type is refused, with
/// the reason in the error.
pub(super) const WITHOUT_EFFECT: &[FieldWithoutEffect] = &[
    FieldWithoutEffect {
        name: "user",
        expected: "a string",
        fits: Value::is_string,
        reason: "it names an end user, and no users are kept",
    },
    FieldWithoutEffect {
        name: "safety_identifier",
        expected: "a string",
        fits: Value::is_string,
        reason: "it names an end user, and no users are kept",
    },
    FieldWithoutEffect {
        name: "metadata",
        expected: "an object",
        fits: Value::is_object,
        reason: "it labels a stored answer, and no answers are stored",
    },
    FieldWithoutEffect {
        name: "store",
        expected: "false",
        fits: |value| value == &Value::Bool(false),
        reason: "no answers are stored",
    },
    FieldWithoutEffect {
        name: "service_tier",
        expected: "a string",
        fits: Value::is_string,
        reason: "there are no tiers to buy; \"priority\" gives the class",
    },
    FieldWithoutEffect {
        name: "prompt_cache_key",
        expected: "a string",
        fits: Value::is_string,
        reason: "equal beginnings of prompts are found without it",
    },
    FieldWithoutEffect {
        name: "prompt_cache_retention",
        expected: "a string",
        fits: Value::is_string,
        reason: "what is kept of a prompt depends on the memory",
    },
];

/// A field of OpenAI's that is refused.
pub(super) struct RefusedField {
    /// Its name.
    pub(super) name: &'static str,
    /// Why, and what to do instead.
    pub(super) instead: &'static str,
}

/// What a route takes.
pub(crate) struct RouteFields {
    /// Its own fields, beside the shared ones.
    pub(super) own: &'static [&'static str],
    /// The fields that it refuses, unless they are null.
    pub(super) refused: &'static [RefusedField],
    /// A body, for errors.
    pub(super) example: &'static str,
}

impl RouteFields {
    /// Every field that is not refused.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let ignored = WITHOUT_EFFECT.iter().map(|field| field.name);
        self.own.iter().chain(SHARED_FIELDS).chain(OPTION_FIELDS).copied().chain(ignored).collect()
    }

    /// The fields of a body. One that is refused or unknown is an error; so is one without effect that has a
    /// wrong type.
    pub(super) fn read(&self, bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
        let mut object = any_object(bytes, self.example)?;
        for refused in self.refused {
            match object.remove(refused.name) {
                None | Some(Value::Null) => {}
                Some(_) => return Err(ApiError::field(refused.name, refused.instead)),
            }
        }
        refuse_unknown(&object, &self.names())?;
        for field in WITHOUT_EFFECT {
            let given = object.get(field.name).filter(|value| !value.is_null());
            if let Some(value) = given.filter(|value| !(field.fits)(value)) {
                let FieldWithoutEffect { expected, reason, .. } = field;
                let why = format!("expected {expected} ({reason}), found {}", found(value));
                return Err(ApiError::field(field.name, why));
            }
        }
        Ok(object)
    }
}

/// How an answer is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Choices for each prompt, 1 to [`MAX_CHOICES`].
    pub(super) choices: u32,
    /// As a stream of chunks.
    pub(super) stream: bool,
    /// With a last chunk that counts the tokens.
    pub(super) include_usage: bool,
}

impl Delivery {
    pub(super) fn from_json(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let expected = format!("a whole number from 1 to {MAX_CHOICES}");
        let choices = take(object, "n", &expected, |value| {
            whole(value).filter(|count| (1..=MAX_CHOICES).contains(count))
        })?;
        let stream = take(object, "stream", "true or false", Value::as_bool)?.unwrap_or(false);
        let include_usage = match object.get("stream_options") {
            None | Some(Value::Null) => false,
            Some(_) if !stream => {
                return Err(ApiError::field("stream_options", "is only for \"stream\": true; leave it out"));
            }
            Some(Value::Object(options)) => include_usage(options)?,
            Some(other) => {
                let why =
                    format!("expected an object such as {{\"include_usage\": true}}, found {}", found(other));
                return Err(ApiError::field("stream_options", why));
            }
        };
        Ok(Self { choices: choices.unwrap_or(1), stream, include_usage })
    }
}

fn include_usage(options: &Map<String, Value>) -> Result<bool, ApiError> {
    const KNOWN: &[&str] = &["include_usage", "include_obfuscation"];
    let flag = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => {
            let why = format!("expected true or false, found {}", found(other));
            Err(ApiError::field(&format!("stream_options.{name}"), why))
        }
    };
    if let Some(unknown) = options.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        let why = format!("there is no such field; {}", nearest::hint(unknown, KNOWN));
        return Err(ApiError::field(&format!("stream_options.{unknown}"), why));
    }
    if flag("include_obfuscation")? {
        let why = "chunks are not padded to equal lengths here; leave it out or give false";
        return Err(ApiError::field("stream_options.include_obfuscation", why));
    }
    flag("include_usage")
}

/// A request for the answer to `prompt`, without what headers say. `bytes` is the text of `object`.
pub(super) fn asked(object: &Map<String, Value>, bytes: &[u8], prompt: Prompt) -> Result<Asked, ApiError> {
    Ok(Asked {
        prompt,
        model: take(object, "model", "a string", |value| value.as_str().map(str::to_owned))?,
        max_tokens: max_tokens(object)?,
        temperature: take(object, "temperature", "a number", float)?,
        top_p: take(object, "top_p", "a number", float)?,
        seed: take(object, "seed", "a whole number of 64 bits", |value| {
            value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned))
        })?,
        priority: priority::of_json(object)?,
        options: Options::from_json(object, bytes)?,
        ..Asked::default()
    })
}

/// The bound on new tokens, under its old or its new name.
fn max_tokens(object: &Map<String, Value>) -> Result<Option<u32>, ApiError> {
    let count = |field: &str| {
        take(object, field, "a whole number from 1 to 4294967295", |value| {
            whole(value).filter(|count| *count > 0)
        })
    };
    match (count("max_tokens")?, count("max_completion_tokens")?) {
        (Some(old), Some(new)) if old != new => {
            let why = format!("{new} contradicts \"max_tokens\": {old}; give one of them");
            Err(ApiError::field("max_completion_tokens", why))
        }
        (old, new) => Ok(new.or(old)),
    }
}

/// A whole number of 32 bits.
pub(super) fn whole(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}
