//! The parameters of a request in tensors, and the inputs that are settings.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Addressee;
use crate::error::ApiError;
use crate::fields::{Asked, Generation, HTTP_DEFAULTS};
use crate::json_body::{float, take};
use crate::kserve::tensors::{InputTensor, shape_text};
use crate::options::{OPTION_FIELDS, Options};
use crate::{nearest, priority};

/// Stop texts of one request: what the engine takes.
const MAX_STOPS: usize = 16;
/// The longest parameter that is a text: the longest format of an answer that the engine takes.
pub(super) const MAX_PARAMETER_BYTES: usize = 256 * 1024;

/// Parameters of a model that embeds.
pub(crate) const EMBED_PARAMETERS: &[&str] = &["truncate", "dimensions", "priority", "timeout"];
/// Parameters whose values are lists or objects. Where a parameter can only be a text it holds them as JSON.
const STRUCTURED: &[&str] = &["stop_token_ids", "logit_bias", "response_format"];
/// Lists that LiteLLM sends with every request, with one empty text, which asks for nothing.
const EMPTY_LISTS: &[&str] = &["bad_words", "stop_words"];

/// Parameters of a model that generates: the fields of `POST /v1/generate`. Log probabilities are left out,
/// because no output tensor has them.
pub(crate) fn generate_parameters() -> Vec<&'static str> {
    let own = ["max_tokens", "temperature", "top_p", "seed", "stream", "priority", "timeout"];
    let options = OPTION_FIELDS.iter().copied().filter(|field| *field != "logprobs");
    own.into_iter().chain(options).collect()
}

/// Adds the inputs that are settings to the parameters.
pub(super) fn add_settings(
    parameters: &mut Map<String, Value>,
    inputs: &[InputTensor],
) -> Result<(), ApiError> {
    for tensor in inputs.iter().filter(|tensor| tensor.name != "text_input") {
        let not_finite = || tensor.error("is not a finite number");
        let value = if tensor.name == "stop" {
            let values = tensor.values(MAX_STOPS)?;
            let all = (0..values.len()).map(|index| values.json(index).ok_or_else(not_finite));
            Value::Array(all.collect::<Result<_, _>>()?)
        } else {
            if tensor.count()? != 1 {
                let shape = shape_text(&tensor.shape);
                return Err(tensor.error(format!("expected one value for all prompts, found shape {shape}")));
            }
            tensor.values(1)?.json(0).ok_or_else(not_finite)?
        };
        if parameters.insert(tensor.name.clone(), value).is_some() {
            return Err(tensor.error("is given as an input and as a parameter: give one of them"));
        }
    }
    Ok(())
}

/// Parameters under the names and in the types of `POST /v1/generate`. One that is not `known` is refused.
pub(super) fn normalized(
    parameters: Map<String, Value>,
    known: &[&str],
) -> Result<Map<String, Value>, ApiError> {
    let mut normalized = Map::new();
    for (name, value) in parameters {
        if EMPTY_LISTS.contains(&name.as_str()) && known.contains(&"stop") {
            refuse_words(&name, &value)?;
            continue;
        }
        if !known.contains(&name.as_str()) {
            let hint = nearest::hint(&name, known);
            return Err(ApiError::field(&name, format!("there is no such parameter; {hint}")));
        }
        if let Some(text) = value.as_str().filter(|text| text.len() > MAX_PARAMETER_BYTES) {
            let (given, most) = (text.len(), MAX_PARAMETER_BYTES);
            return Err(ApiError::field(&name, format!("has {given} bytes; at most {most} are accepted")));
        }
        let value = match (name.as_str(), value) {
            ("priority", Value::Number(number)) => priority_word(&number)?,
            (structured, Value::String(text)) if STRUCTURED.contains(&structured) => {
                serde_json::from_str(&text)
                    .map_err(|error| ApiError::field(&name, format!("its text is not JSON ({error})")))?
            }
            (_, value) => value,
        };
        normalized.insert(name, value);
    }
    Ok(normalized)
}

/// Refuses a list of words unless it is empty or holds empty texts alone.
fn refuse_words(name: &str, value: &Value) -> Result<(), ApiError> {
    let is_empty = |text: &Value| text.as_str().is_some_and(str::is_empty);
    let asks_nothing = match value {
        Value::Null => true,
        Value::Array(all) => all.iter().all(is_empty),
        other => is_empty(other),
    };
    if asks_nothing {
        return Ok(());
    }
    Err(ApiError::field(name, "is not supported; give texts that end the answer in \"stop\""))
}

/// The class of a number as Triton's clients give it: the lower, the more urgent; 0 is the default.
fn priority_word(number: &serde_json::Number) -> Result<Value, ApiError> {
    match number.as_u64() {
        Some(0) => Ok(Value::Null),
        Some(1) => Ok("high".into()),
        Some(2) => Ok("normal".into()),
        Some(3) => Ok("low".into()),
        _ => {
            let why = format!("{number} is none of the classes 1 (high), 2 (normal) and 3 (low)");
            Err(ApiError::field("priority", why))
        }
    }
}

/// The time in which the answer must be complete; 0 and none: no limit.
pub(super) fn timeout(parameters: &Map<String, Value>) -> Result<Option<Duration>, ApiError> {
    let microseconds = take(parameters, "timeout", "a whole number of microseconds", Value::as_u64)?;
    Ok(microseconds.filter(|count| *count > 0).map(Duration::from_micros))
}

/// The parameters of a model that generates.
pub(super) struct GenerateSettings {
    asked: Asked,
    pub(super) stream: Option<bool>,
    pub(super) timeout: Option<Duration>,
}

impl GenerateSettings {
    /// Reads them from normalized parameters, and a schema from the text that they came in.
    pub(super) fn read(parameters: &Map<String, Value>, json: &[u8]) -> Result<Self, ApiError> {
        let asked = Asked {
            max_tokens: take(parameters, "max_tokens", "a whole number from 1 to 4294967295", |value| {
                value.as_u64().and_then(|count| u32::try_from(count).ok())
            })?,
            temperature: take(parameters, "temperature", "a number", float)?,
            top_p: take(parameters, "top_p", "a number", float)?,
            seed: take(parameters, "seed", "a whole number from 0 to 18446744073709551615", Value::as_u64)?,
            priority: priority::of_json(parameters)?,
            options: Options::from_json(parameters, json)?,
            ..Asked::default()
        };
        let stream = take(parameters, "stream", "true or false", Value::as_bool)?;
        Ok(Self { asked, stream, timeout: timeout(parameters)? })
    }

    /// One request for each prompt.
    pub(super) fn requests(
        &self,
        prompts: Vec<String>,
        addressee: &Addressee<'_>,
    ) -> Result<Vec<Generation>, ApiError> {
        let base = Asked { model: Some(addressee.model.name.clone()), ..self.asked.clone() };
        let base = base.with_headers(addressee.headers)?;
        let one = |prompt: String| {
            let revision = addressee.revision.clone().or(base.revision.clone());
            Asked { prompt: prompt.into(), revision, ..base.clone() }.check(&HTTP_DEFAULTS)
        };
        prompts.into_iter().map(one).collect()
    }
}
