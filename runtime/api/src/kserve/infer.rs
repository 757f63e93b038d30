//! What a request in tensors asks of a model: the tensors and parameters are read by the tables of
//! `metadata.rs` and become requests of [`crate::Inference`].
//!
//! Nothing is ignored: an input, an output or a parameter that the model does not have is refused by its
//! name.

use std::time::Duration;

use axum::http::HeaderMap;
use serde_json::{Map, Value};
use trustformers_proto::{Task, v1};

use super::metadata::{self, TensorRule};
use super::scores::{SCORE_PARAMETERS, classify_request, rerank_request};
use super::tensors::{InputTensor, OutputTensor, TensorValues, shape_text};
use crate::classify::ClassifyRequest;
use crate::echo::echo;
use crate::embed::{EmbedInput, EmbedRequest};
use crate::error::ApiError;
use crate::fields::{Asked, Generation, HTTP_DEFAULTS};
use crate::json_body::{float, found, take};
use crate::options::{OPTION_FIELDS, Options};
use crate::rerank::RerankRequest;
use crate::{nearest, priority, revision, tenant};

/// Prompts of one request, each of which becomes one request of the engine: a 32nd of the 512 that may wait
/// there, so that one batch does not fill the queue. Each has its own copy of the parameters, of which the
/// texts have at most 256 KiB each.
pub(crate) const MAX_PROMPTS: usize = 16;
/// Texts of one request for vectors: what the engine's encoder takes.
pub(crate) const MAX_TEXTS: usize = 2048;
/// Token ids of one request for vectors: 2,048 texts of 512 tokens. Widened they take 8 MiB.
const MAX_TOKEN_IDS: usize = MAX_TEXTS * 512;
/// Stop texts of one request: what the engine takes.
const MAX_STOPS: usize = 16;
/// The longest parameter that is a text: the longest format of an answer that the engine takes.
const MAX_PARAMETER_BYTES: usize = 256 * 1024;

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

/// A request in tensors, whatever it came in.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct InferRequest {
    /// A model's name; may be empty over gRPC.
    pub(crate) model: String,
    /// Empty: the version that serves.
    pub(crate) version: String,
    /// The caller's name of the request; empty: none.
    pub(crate) id: String,
    pub(crate) parameters: Map<String, Value>,
    pub(crate) inputs: Vec<InputTensor>,
    /// Names of the outputs to return, in this order; empty: all of them.
    pub(crate) outputs: Vec<String>,
}

/// The names that every answer repeats.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct AnswerHead {
    pub(crate) model_name: String,
    pub(crate) model_version: String,
    /// Empty where the request gave none.
    pub(crate) id: String,
}

/// An answer in tensors, or one part of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct InferAnswer {
    pub(crate) head: AnswerHead,
    pub(crate) parameters: Map<String, Value>,
    pub(crate) outputs: Vec<OutputTensor>,
    /// Whether no part follows.
    pub(crate) last: bool,
}

/// A request that fits its model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PreparedInfer {
    pub(super) head: AnswerHead,
    /// The outputs to return.
    pub(super) outputs: Vec<&'static str>,
    /// Whether the answer comes in pieces, where the request says so.
    pub(super) stream: Option<bool>,
    pub(super) timeout: Option<Duration>,
    pub(super) work: InferWork,
}

/// What the model is asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum InferWork {
    Generate {
        /// One for each prompt.
        requests: Vec<Generation>,
        /// The shape of the prompts, which is that of each output.
        shape: Vec<u64>,
    },
    Embed(EmbedRequest),
    Classify(ClassifyRequest),
    Rerank(RerankRequest),
}

impl InferWork {
    /// Prompts or texts.
    pub(super) fn items(&self) -> usize {
        match self {
            Self::Generate { requests, .. } => requests.len(),
            Self::Embed(request) => request.input.len(),
            Self::Classify(request) => request.input.len(),
            Self::Rerank(request) => request.documents.len(),
        }
    }
}

/// The model of a request, with what the request's headers ask of it.
pub(super) struct Addressee<'a> {
    pub(super) model: &'a v1::ModelStatus,
    /// The revision that must answer, where the request named a version.
    pub(super) revision: Option<String>,
    pub(super) headers: &'a HeaderMap,
}

/// Finds the model and reads the request by the tables of its task.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the tensor or the parameter; no such model; a model that is not
/// loaded yet.
pub(crate) fn prepare(
    models: &[v1::ModelStatus],
    request: InferRequest,
    headers: &HeaderMap,
) -> Result<PreparedInfer, ApiError> {
    let model = metadata::find(models, &request.model, &request.version)?;
    let task = metadata::task_of(model)?;
    let named = !request.version.is_empty() && !model.revision.is_empty();
    let addressee = Addressee { model, revision: named.then(|| request.version.clone()), headers };
    let head = AnswerHead {
        model_name: model.name.clone(),
        model_version: metadata::version_of(model).to_owned(),
        id: request.id,
    };
    let outputs = wanted_outputs(metadata::outputs_of(task), &request.outputs)?;
    check_inputs(metadata::inputs_of(task), &request.inputs)?;
    let prepared = match task {
        Task::Generate => {
            let mut parameters = normalized(request.parameters, &generate_parameters())?;
            add_settings(&mut parameters, &request.inputs)?;
            let (prompts, shape) = prompts(&request.inputs)?;
            let settings = GenerateSettings::read(&parameters, b"")?;
            PreparedInfer {
                head,
                outputs,
                stream: settings.stream,
                timeout: settings.timeout,
                work: InferWork::Generate { requests: settings.requests(prompts, &addressee)?, shape },
            }
        }
        Task::Embed => {
            let parameters = normalized(request.parameters, EMBED_PARAMETERS)?;
            let work = InferWork::Embed(embed_request(&parameters, &request.inputs, &addressee)?);
            PreparedInfer { head, outputs, stream: None, timeout: timeout(&parameters)?, work }
        }
        Task::Classify | Task::Rerank => {
            let parameters = normalized(request.parameters, SCORE_PARAMETERS)?;
            let work = if task == Task::Classify {
                InferWork::Classify(classify_request(&parameters, &request.inputs, &addressee)?)
            } else {
                InferWork::Rerank(rerank_request(&parameters, &request.inputs, &addressee)?)
            };
            PreparedInfer { head, outputs, stream: None, timeout: timeout(&parameters)?, work }
        }
    };
    Ok(prepared)
}

/// A request of the generate extension: one prompt, and parameters beside it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct TextRequest {
    pub(crate) model: String,
    pub(crate) version: String,
    pub(crate) id: String,
    pub(crate) prompt: String,
    pub(crate) parameters: Map<String, Value>,
    /// The text of the JSON object that holds the parameters.
    pub(crate) parameters_json: String,
}

/// [`prepare`] for a request of the generate extension.
///
/// # Errors
/// As [`prepare`], and [`ApiError::WrongTask`] for a model that does not generate.
pub(crate) fn prepare_text(
    models: &[v1::ModelStatus],
    request: TextRequest,
    headers: &HeaderMap,
) -> Result<PreparedInfer, ApiError> {
    let model = metadata::find(models, &request.model, &request.version)?;
    let task = metadata::task_of(model)?;
    if task != Task::Generate {
        return Err(ApiError::WrongTask { model: model.name.clone(), task });
    }
    let named = !request.version.is_empty() && !model.revision.is_empty();
    let addressee = Addressee { model, revision: named.then_some(request.version), headers };
    let parameters = normalized(request.parameters, &generate_parameters())?;
    let settings = GenerateSettings::read(&parameters, request.parameters_json.as_bytes())?;
    Ok(PreparedInfer {
        head: AnswerHead {
            model_name: model.name.clone(),
            model_version: metadata::version_of(model).to_owned(),
            id: request.id,
        },
        outputs: metadata::GENERATE_OUTPUTS.iter().map(|rule| rule.name).collect(),
        stream: settings.stream,
        timeout: settings.timeout,
        work: InferWork::Generate {
            requests: settings.requests(vec![request.prompt], &addressee)?,
            shape: vec![1],
        },
    })
}

/// The outputs that a request names, or all of them.
fn wanted_outputs(rules: &[TensorRule], asked: &[String]) -> Result<Vec<&'static str>, ApiError> {
    let names: Vec<&'static str> = rules.iter().map(|rule| rule.name).collect();
    if asked.is_empty() {
        return Ok(names);
    }
    let mut wanted = Vec::with_capacity(names.len());
    for name in asked {
        let Some(known) = names.iter().find(|known| *known == name) else {
            let hint = nearest::hint(name, &names);
            return Err(ApiError::field(name, format!("the model has no such output; {hint}")));
        };
        if wanted.contains(known) {
            return Err(ApiError::field(name, "is asked for twice among the outputs"));
        }
        wanted.push(*known);
    }
    Ok(wanted)
}

/// Whether the inputs are among those of the model, each once and of a data type that it takes.
fn check_inputs(rules: &[TensorRule], inputs: &[InputTensor]) -> Result<(), ApiError> {
    for (index, tensor) in inputs.iter().enumerate() {
        let Some(rule) = rules.iter().find(|rule| rule.name == tensor.name) else {
            let names: Vec<&str> = rules.iter().map(|rule| rule.name).collect();
            let hint = nearest::hint(&tensor.name, &names);
            return Err(tensor.error(format!("the model has no such input; {hint}")));
        };
        // Unknown names and second ones end the loop, so that it is as short as the table.
        if inputs[..index].iter().any(|other| other.name == tensor.name) {
            return Err(tensor.error("is given twice among the inputs"));
        }
        if !tensor.datatype.serves_as(rule.datatype) {
            let (wanted, given) = (rule.datatype, tensor.datatype);
            return Err(tensor.error(format!("expected datatype {wanted}, found {given}")));
        }
    }
    Ok(())
}

pub(super) fn input<'a>(inputs: &'a [InputTensor], name: &str) -> Option<&'a InputTensor> {
    inputs.iter().find(|tensor| tensor.name == name)
}

/// The texts of a tensor with one text a row: a single value, `[n]` or `[n, 1]`.
pub(super) fn rows_of_texts(tensor: &InputTensor, max: usize) -> Result<Vec<String>, ApiError> {
    if !matches!(tensor.shape[..], [] | [_] | [_, 1]) {
        let shape = shape_text(&tensor.shape);
        return Err(tensor.error(format!("expected the shape [n] or [n, 1], found {shape}")));
    }
    match tensor.values(max)? {
        TensorValues::Texts(texts) if texts.is_empty() => {
            Err(tensor.error("holds no text: give at least one"))
        }
        TensorValues::Texts(texts) => Ok(texts),
        _ => Err(tensor.error("expected datatype BYTES")),
    }
}

/// The prompts with the shape of their tensor.
fn prompts(inputs: &[InputTensor]) -> Result<(Vec<String>, Vec<u64>), ApiError> {
    let name = "text_input";
    let tensor = input(inputs, name).ok_or_else(|| {
        ApiError::field(name, "is missing among the inputs: give the text that the model is to continue")
    })?;
    let texts = rows_of_texts(tensor, MAX_PROMPTS)?;
    if let Some(index) = texts.iter().position(String::is_empty) {
        return Err(tensor.error(format!("element {index} is empty: give a text to continue")));
    }
    Ok((texts, tensor.shape.clone()))
}

/// Adds the inputs that are settings to the parameters.
fn add_settings(parameters: &mut Map<String, Value>, inputs: &[InputTensor]) -> Result<(), ApiError> {
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
fn normalized(parameters: Map<String, Value>, known: &[&str]) -> Result<Map<String, Value>, ApiError> {
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
fn timeout(parameters: &Map<String, Value>) -> Result<Option<Duration>, ApiError> {
    let microseconds = take(parameters, "timeout", "a whole number of microseconds", Value::as_u64)?;
    Ok(microseconds.filter(|count| *count > 0).map(Duration::from_micros))
}

/// The parameters of a model that generates.
struct GenerateSettings {
    asked: Asked,
    stream: Option<bool>,
    timeout: Option<Duration>,
}

impl GenerateSettings {
    /// Reads them from normalized parameters, and a schema from the text that they came in.
    fn read(parameters: &Map<String, Value>, json: &[u8]) -> Result<Self, ApiError> {
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
    fn requests(&self, prompts: Vec<String>, addressee: &Addressee<'_>) -> Result<Vec<Generation>, ApiError> {
        let base = Asked { model: Some(addressee.model.name.clone()), ..self.asked.clone() };
        let base = base.with_headers(addressee.headers)?;
        let one = |prompt: String| {
            let revision = addressee.revision.clone().or(base.revision.clone());
            Asked { prompt: prompt.into(), revision, ..base.clone() }.check(&HTTP_DEFAULTS)
        };
        prompts.into_iter().map(one).collect()
    }
}

/// The request for vectors.
fn embed_request(
    parameters: &Map<String, Value>,
    inputs: &[InputTensor],
    addressee: &Addressee<'_>,
) -> Result<EmbedRequest, ApiError> {
    let number = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
    let mask = input(inputs, "attention_mask");
    let input = match (input(inputs, "text"), input(inputs, "input_ids")) {
        (Some(texts), None) => {
            if let Some(mask) = mask {
                return Err(mask.error("is given without input_ids, whose tokens it selects"));
            }
            rows_of_texts(texts, MAX_TEXTS)?.into_iter().map(EmbedInput::Text).collect()
        }
        (None, Some(ids)) => rows_of_ids(ids, mask)?,
        (None, None) => {
            return Err(ApiError::field("text", "is missing among the inputs: give texts, or input_ids"));
        }
        (Some(_), Some(ids)) => return Err(ids.error("is given beside text: give one of them")),
    };
    let class = priority::of_json(parameters)?.or(priority::of_headers(addressee.headers)?);
    Ok(EmbedRequest {
        input,
        model: revision::addressed(addressee.headers, Some(addressee.model.name.clone())),
        revision: match &addressee.revision {
            Some(revision) => Some(revision.clone()),
            None => revision::of_headers(addressee.headers)?,
        },
        truncate: take(parameters, "truncate", "true or false", Value::as_bool)?.unwrap_or(true),
        dimensions: take(parameters, "dimensions", "a whole number from 1 on", number)?,
        priority: class.unwrap_or_default(),
        tenant: tenant::of_headers(addressee.headers)?.unwrap_or_default(),
    })
}

/// The token ids of each text. Those that the mask marks with 0 are left out: they only fill up the rows.
fn rows_of_ids(tensor: &InputTensor, mask: Option<&InputTensor>) -> Result<Vec<EmbedInput>, ApiError> {
    let (rows, width) = match tensor.shape[..] {
        [width] => (1, width),
        [rows, width] => (rows, width),
        _ => {
            let shape = shape_text(&tensor.shape);
            return Err(tensor.error(format!("expected the shape [tokens] or [n, tokens], found {shape}")));
        }
    };
    let most = MAX_TEXTS as u64;
    if rows == 0 || width == 0 || rows > most {
        let shape = shape_text(&tensor.shape);
        return Err(tensor.error(format!("shape {shape}: give 1 to {most} texts of at least one token")));
    }
    let ids = whole_numbers(tensor, "token id")?;
    let kept: Vec<bool> = match mask {
        None => vec![true; ids.len()],
        Some(mask) if mask.shape != tensor.shape => {
            let (given, wanted) = (shape_text(&mask.shape), shape_text(&tensor.shape));
            return Err(mask.error(format!("expected the shape {wanted} of input_ids, found {given}")));
        }
        Some(mask) => whole_numbers(mask, "mark 0 or 1")?.into_iter().map(|mark| mark != 0).collect(),
    };
    // The number of ids is bounded, and the width with it.
    let width = usize::try_from(width).unwrap_or(usize::MAX);
    let row = |(index, (ids, kept)): (usize, (&[u32], &[bool]))| {
        let tokens: Vec<u32> = ids.iter().zip(kept).filter(|(_, kept)| **kept).map(|(id, _)| *id).collect();
        if tokens.is_empty() {
            return Err(tensor.error(format!("attention_mask leaves no token of text {index}")));
        }
        Ok(EmbedInput::Tokens(tokens))
    };
    ids.chunks(width).zip(kept.chunks(width)).enumerate().map(row).collect()
}

/// The values of a tensor as whole numbers from 0 to 4294967295.
fn whole_numbers(tensor: &InputTensor, what: &str) -> Result<Vec<u32>, ApiError> {
    let outside = |index: usize, value: &dyn std::fmt::Display| {
        tensor.error(format!("element {index} is {value}, which is no {what}"))
    };
    match tensor.values(MAX_TOKEN_IDS)? {
        TensorValues::Signed(all) => {
            let one = |(index, value): (usize, i64)| u32::try_from(value).map_err(|_| outside(index, &value));
            all.into_iter().enumerate().map(one).collect()
        }
        TensorValues::Unsigned(all) => {
            let one = |(index, value): (usize, u64)| u32::try_from(value).map_err(|_| outside(index, &value));
            all.into_iter().enumerate().map(one).collect()
        }
        _ => Err(tensor.error("expected whole numbers")),
    }
}

/// A parameter of a tensor, or another key, that means nothing here.
pub(crate) fn refuse_key(tensor: &str, key: &str, known: &[&str]) -> ApiError {
    let hint = if known.is_empty() { "none is known".to_owned() } else { nearest::hint(key, known) };
    ApiError::field(tensor, format!("there is no parameter {:?}; {hint}", echo(key)))
}

/// A value of a request's field as errors show it.
pub(crate) fn unexpected(field: &str, expected: &str, value: &Value) -> ApiError {
    ApiError::field(field, format!("expected {expected}, found {}", found(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kserve::metadata::tests::model;
    use crate::kserve::tensors::{Datatype, TensorData};
    use crate::{Priority, Prompt};
    use serde_json::json;

    fn tensor(name: &str, datatype: Datatype, shape: &[u64], data: Value) -> InputTensor {
        let Value::Array(list) = data else { panic!("{data}") };
        InputTensor { name: name.into(), datatype, shape: shape.to_vec(), data: TensorData::Json(list) }
    }

    fn text_input() -> InputTensor {
        tensor("text_input", Datatype::Bytes, &[1], json!(["Hi"]))
    }

    fn request(inputs: Vec<InputTensor>, parameters: Value) -> InferRequest {
        let Value::Object(parameters) = parameters else { panic!("{parameters}") };
        InferRequest { model: "m".into(), id: "7".into(), parameters, inputs, ..InferRequest::default() }
    }

    fn prepared(task: &str, request: InferRequest) -> Result<PreparedInfer, ApiError> {
        prepare(&[model(task)], request, &HeaderMap::new())
    }

    fn generations(prepared: PreparedInfer) -> Vec<Generation> {
        let InferWork::Generate { requests, .. } = prepared.work else { panic!("{:?}", prepared.work) };
        requests
    }

    fn embedding(prepared: PreparedInfer) -> EmbedRequest {
        let InferWork::Embed(request) = prepared.work else { panic!("{:?}", prepared.work) };
        request
    }

    #[track_caller]
    fn refused(task: &str, request: InferRequest, field: &str, text: &str) {
        let error = prepared(task, request).unwrap_err();
        assert!(
            matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
            "{error:?}"
        );
        assert!(error.to_string().contains(text), "{error}");
    }

    #[test]
    fn settings_are_inputs_or_parameters_and_have_the_defaults_of_http() {
        let defaults = generations(prepared("generate", request(vec![text_input()], json!({}))).unwrap());
        let [one] = &defaults[..] else { panic!("{defaults:?}") };
        assert_eq!((&one.prompt, one.model.as_deref()), (&Prompt::from("Hi"), Some("ns/m")));
        assert_eq!((one.max_tokens, one.temperature, one.top_p, one.seed), (100, 0.7, 0.9, None));
        let inputs = vec![
            text_input(),
            tensor("max_tokens", Datatype::Int32, &[1], json!([5])),
            tensor("temperature", Datatype::Int64, &[], json!([0])),
            tensor("top_p", Datatype::Fp64, &[1, 1], json!([0.5])),
            tensor("stop", Datatype::Bytes, &[2], json!(["a", "b"])),
            tensor("stream", Datatype::Bool, &[1], json!([true])),
        ];
        let by_inputs = prepared("generate", request(inputs, json!({"seed": 3, "priority": 1}))).unwrap();
        let parameters = json!({
            "max_tokens": 5, "temperature": 0, "top_p": 0.5, "stop": ["a", "b"], "stream": true, "seed": 3,
            "priority": "high",
        });
        let by_parameters = prepared("generate", request(vec![text_input()], parameters)).unwrap();
        assert_eq!(by_inputs, by_parameters);
        assert_eq!(by_inputs.stream, Some(true));
        let one = generations(by_inputs).remove(0);
        assert_eq!((one.max_tokens, one.temperature, one.top_p, one.seed), (5, 0.0, 0.5, Some(3)));
        assert_eq!((one.options.stop, one.priority), (vec!["a".to_owned(), "b".to_owned()], Priority::High));
    }

    #[test]
    fn structures_may_be_texts_and_empty_lists_of_words_ask_for_nothing() {
        let parameters = json!({
            "response_format": "{\"type\": \"json_object\"}", "stop_token_ids": "[3]", "timeout": 1500,
            "stop_words": [""], "bad_words": "",
        });
        let prepared = prepared("generate", request(vec![text_input()], parameters)).unwrap();
        assert_eq!(prepared.timeout, Some(Duration::from_micros(1500)));
        let options = generations(prepared).remove(0).options;
        assert_eq!((options.format, options.stop_token_ids), (Some(crate::Format::JsonObject), vec![3]));
        assert!(options.stop.is_empty());
    }

    #[test]
    fn each_prompt_of_a_batch_is_a_request_and_the_version_is_the_revision() {
        let prompts = tensor("text_input", Datatype::Bytes, &[2, 1], json!([["a"], ["b"]]));
        let asked = InferRequest { version: "r1".into(), ..request(vec![prompts], json!({})) };
        let prepared = prepared("generate", asked).unwrap();
        let InferWork::Generate { requests, shape } = &prepared.work else { panic!("{prepared:?}") };
        assert_eq!((requests.len(), shape.as_slice()), (2, [2, 1].as_slice()));
        assert_eq!((&requests[1].prompt, requests[1].revision.as_deref()), (&Prompt::from("b"), Some("r1")));
        let head = AnswerHead { model_name: "ns/m".into(), model_version: "r1".into(), id: "7".into() };
        assert_eq!(prepared.head, head);
        assert_eq!(prepared.outputs, ["text_output", "finish_reason", "prompt_tokens", "completion_tokens"]);
    }

    #[test]
    fn texts_or_ids_without_their_padding_become_vectors() {
        let texts = tensor("text", Datatype::Bytes, &[2], json!(["a", ""]));
        let parameters = json!({"truncate": false, "dimensions": 2, "priority": "low"});
        let asked = embedding(prepared("embed", request(vec![texts], parameters)).unwrap());
        assert_eq!(asked.input, [EmbedInput::Text("a".into()), EmbedInput::Text(String::new())]);
        assert_eq!((asked.truncate, asked.dimensions, asked.priority), (false, Some(2), Priority::Low));
        let ids = || tensor("input_ids", Datatype::Int64, &[2, 3], json!([[5, 6, 0], [7, 0, 0]]));
        let mask = tensor("attention_mask", Datatype::Int32, &[2, 3], json!([[1, 1, 0], [1, 0, 0]]));
        let asked = embedding(prepared("embed", request(vec![ids(), mask], json!({}))).unwrap());
        assert_eq!(asked.input, [EmbedInput::Tokens(vec![5, 6]), EmbedInput::Tokens(vec![7])]);
        assert!(asked.truncate);
        let asked = embedding(prepared("embed", request(vec![ids()], json!({}))).unwrap());
        assert_eq!(asked.input[1], EmbedInput::Tokens(vec![7, 0, 0]));
        let one = tensor("input_ids", Datatype::Uint32, &[2], json!([1, 2]));
        let asked = embedding(prepared("embed", request(vec![one], json!({}))).unwrap());
        assert_eq!(asked.input, [EmbedInput::Tokens(vec![1, 2])]);
    }

    #[test]
    fn what_a_model_that_generates_does_not_have_is_refused_by_name() {
        let number = |name: &str, value: Value| tensor(name, Datatype::Fp32, &[1], json!([value]));
        let with = |tensor: InputTensor| request(vec![text_input(), tensor], json!({}));
        refused("generate", request(vec![], json!({})), "text_input", "is missing among the inputs");
        refused(
            "generate",
            with(number("txt_input", json!(1))),
            "txt_input",
            "no such input; did you mean \"text_input\"?",
        );
        refused("generate", with(text_input()), "text_input", "given twice");
        refused(
            "generate",
            with(number("max_tokens", json!(5))),
            "max_tokens",
            "expected datatype INT32, found FP32",
        );
        let two = tensor("top_k", Datatype::Int32, &[2], json!([1, 2]));
        refused("generate", with(two), "top_k", "one value for all prompts, found shape [2]");
        let not_a_number = InputTensor {
            data: TensorData::Raw(f32::NAN.to_le_bytes().to_vec().into()),
            ..number("temperature", json!(0))
        };
        refused("generate", with(not_a_number), "temperature", "not a finite number");
        let many = tensor("text_input", Datatype::Bytes, &[17], json!(vec!["a"; 17]));
        refused("generate", request(vec![many], json!({})), "text_input", "at most 16 are accepted");
        let wide = tensor("text_input", Datatype::Bytes, &[1, 2], json!(["a", "b"]));
        refused("generate", request(vec![wide], json!({})), "text_input", "expected the shape [n] or [n, 1]");
        let empty = tensor("text_input", Datatype::Bytes, &[1], json!([""]));
        refused("generate", request(vec![empty], json!({})), "text_input", "element 0 is empty");
        let none = tensor("text_input", Datatype::Bytes, &[0], json!([]));
        refused("generate", request(vec![none], json!({})), "text_input", "holds no text");
        let both = InferRequest {
            parameters: request(vec![], json!({"top_k": 1})).parameters,
            ..with(tensor("top_k", Datatype::Int32, &[1], json!([1])))
        };
        refused("generate", both, "top_k", "as an input and as a parameter");
        for (parameters, field, text) in [
            (json!({"temprature": 1}), "temprature", "did you mean \"temperature\"?"),
            (json!({"logprobs": 1}), "logprobs", "there is no such parameter"),
            (json!({"sequence_id": 1}), "sequence_id", "there is no such parameter"),
            (json!({"max_tokens": "5"}), "max_tokens", "expected a whole number"),
            (json!({"temperature": -1}), "temperature", "-1 is not within 0"),
            (json!({"priority": 4}), "priority", "none of the classes 1 (high)"),
            (json!({"bad_words": ["no"]}), "bad_words", "is not supported"),
            (json!({"response_format": "{"}), "response_format", "its text is not JSON"),
            (json!({"stop": "a".repeat(MAX_PARAMETER_BYTES + 1)}), "stop", "262145 bytes; at most 262144"),
        ] {
            refused("generate", request(vec![text_input()], parameters), field, text);
        }
        let outputs = |names: &[&str]| InferRequest {
            outputs: names.iter().map(ToString::to_string).collect(),
            ..request(vec![text_input()], json!({}))
        };
        refused("generate", outputs(&["text_outputs"]), "text_outputs", "did you mean \"text_output\"?");
        refused("generate", outputs(&["text_output", "text_output"]), "text_output", "asked for twice");
    }

    #[test]
    fn what_a_model_that_embeds_does_not_have_is_refused_by_name() {
        let text = || tensor("text", Datatype::Bytes, &[1], json!(["a"]));
        let ids = |shape: &[u64], data: Value| tensor("input_ids", Datatype::Int64, shape, data);
        let mask = |shape: &[u64], data: Value| tensor("attention_mask", Datatype::Int64, shape, data);
        for (inputs, field, message) in [
            (vec![], "text", "give texts, or input_ids"),
            (vec![text(), ids(&[1], json!([1]))], "input_ids", "beside text"),
            (vec![text(), mask(&[1], json!([1]))], "attention_mask", "without input_ids"),
            (vec![text_input()], "text_input", "no such input"),
            (vec![ids(&[1, 1, 1], json!([1]))], "input_ids", "[tokens] or [n, tokens], found [1, 1, 1]"),
            (vec![ids(&[2, 0], json!([]))], "input_ids", "of at least one token"),
            (vec![ids(&[2049, 1], json!([]))], "input_ids", "give 1 to 2048 texts"),
            (vec![ids(&[1], json!([-1]))], "input_ids", "element 0 is -1, which is no token id"),
            (
                vec![ids(&[2], json!([1, 2])), mask(&[1], json!([1]))],
                "attention_mask",
                "the shape [2] of input_ids",
            ),
            (vec![ids(&[1], json!([1])), mask(&[1], json!([0]))], "input_ids", "leaves no token of text 0"),
            (vec![tensor("text", Datatype::Bytes, &[2049], json!([]))], "text", "at most 2048 are accepted"),
            (
                vec![tensor("text", Datatype::Int64, &[1], json!([1]))],
                "text",
                "expected datatype BYTES, found INT64",
            ),
        ] {
            refused("embed", request(inputs, json!({})), field, message);
        }
        refused(
            "embed",
            request(vec![text()], json!({"max_tokens": 1})),
            "max_tokens",
            "known are: truncate",
        );
        let words = json!({"stop_words": [""]});
        refused("embed", request(vec![text()], words), "stop_words", "there is no such parameter");
    }

    #[test]
    fn a_model_that_embeds_does_not_generate_and_headers_count() {
        let text = || TextRequest { model: "m".into(), prompt: "Hi".into(), ..TextRequest::default() };
        let error = prepare_text(&[model("embed")], text(), &HeaderMap::new()).unwrap_err();
        assert!(matches!(error, ApiError::WrongTask { task: Task::Embed, .. }), "{error:?}");
        let headers = HeaderMap::from_iter([
            ("x-trustformers-priority".parse().unwrap(), "low".parse().unwrap()),
            ("x-trustformers-revision".parse().unwrap(), "r9".parse().unwrap()),
        ]);
        let prepared = prepare_text(&[model("generate")], text(), &headers).unwrap();
        let one = generations(prepared).remove(0);
        assert_eq!((one.priority, one.revision.as_deref()), (Priority::Low, Some("r9")));
        let asked = request(vec![tensor("text", Datatype::Bytes, &[1], json!(["a"]))], json!({}));
        let asked = embedding(prepare(&[model("embed")], asked, &headers).unwrap());
        assert_eq!((asked.priority, asked.revision.as_deref()), (Priority::Low, Some("r9")));
    }
}
