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
use crate::fields::Generation;
use crate::json_body::{found, take};
use crate::rerank::RerankRequest;
use crate::{nearest, priority, revision, tenant};

mod parameters;

pub(crate) use parameters::{EMBED_PARAMETERS, generate_parameters};
use parameters::{GenerateSettings, add_settings, normalized, timeout};

/// Prompts of one request, each of which becomes one request of the engine: a 32nd of the 512 that may wait
/// there, so that one batch does not fill the queue. Each has its own copy of the parameters, of which the
/// texts have at most 256 KiB each.
pub(crate) const MAX_PROMPTS: usize = 16;
/// Texts of one request for vectors: what the engine's encoder takes.
pub(crate) const MAX_TEXTS: usize = 2048;
/// Token ids of one request for vectors: 2,048 texts of 512 tokens. Widened they take 8 MiB.
const MAX_TOKEN_IDS: usize = MAX_TEXTS * 512;

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
mod tests;
