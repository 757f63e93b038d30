//! The bodies of HTTP: a JSON object, which may be followed by the bytes of its tensors.
//!
//! The header `Inference-Header-Content-Length` says how long the JSON is; without it the whole body is. A
//! tensor with the parameter `binary_data_size` has its values behind the JSON, in the order of the tensors.

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};

use super::infer::{InferAnswer, InferRequest, TextRequest, refuse_key, unexpected};
use super::tensors::{Datatype, InputTensor, OutputData, OutputTensor, TensorData};
use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::{found, member_text, object, take};
use crate::nearest;

/// Bytes of the JSON at the beginning of a body, in requests and in answers.
pub(crate) const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The model that a path names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct NamedModel {
    pub(crate) name: String,
    /// Empty: the version that serves.
    pub(crate) version: String,
}

/// Which outputs are returned as bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct BinaryOutputs {
    all: bool,
    /// What single outputs say, which overrides `all`.
    single: Vec<(String, bool)>,
}

impl BinaryOutputs {
    fn of(&self, name: &str) -> bool {
        self.single.iter().find(|(output, _)| output == name).map_or(self.all, |(_, binary)| *binary)
    }
}

/// A request with the form of its answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParsedInfer {
    pub(crate) request: InferRequest,
    pub(crate) binary: BinaryOutputs,
}

pub(crate) const REQUEST_FIELDS: &[&str] = &["id", "model_name", "parameters", "inputs", "outputs"];
const INPUT_FIELDS: &[&str] = &["name", "shape", "datatype", "parameters", "data"];
const OUTPUT_FIELDS: &[&str] = &["name", "parameters"];
const EXAMPLE: &str =
    r#"{"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Hello"]}]}"#;

/// The length of the JSON in a body, from the request's header.
///
/// # Errors
/// No number, or more than the body has.
pub(crate) fn json_length(headers: &HeaderMap, body_bytes: usize) -> Result<usize, ApiError> {
    let Some(value) = headers.get(&JSON_LENGTH) else { return Ok(body_bytes) };
    let length = value.to_str().ok().and_then(|text| text.trim().parse::<usize>().ok());
    match length {
        Some(length) if length <= body_bytes => Ok(length),
        Some(length) => {
            let why = format!("{length} bytes of JSON are more than the {body_bytes} bytes of the body");
            Err(ApiError::field(JSON_LENGTH.as_str(), why))
        }
        None => {
            let given = String::from_utf8_lossy(value.as_bytes());
            let why = format!("expected the bytes of the JSON as a number, found {:?}", echo(&given));
            Err(ApiError::field(JSON_LENGTH.as_str(), why))
        }
    }
}

/// Reads the body of an infer request whose JSON has `json_bytes` bytes.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the field or the tensor.
pub(crate) fn parse_infer(
    model: NamedModel,
    body: &Bytes,
    json_bytes: usize,
) -> Result<ParsedInfer, ApiError> {
    let json_bytes = json_bytes.min(body.len());
    let mut fields = object(&body[..json_bytes], REQUEST_FIELDS, EXAMPLE)?;
    check_model_name(&fields, &model.name)?;
    let id = take(&fields, "id", "a string", text)?.unwrap_or_default();
    let mut parameters = parameters("parameters", fields.remove("parameters"))?;
    let all = take(&parameters, "binary_data_output", "true or false", Value::as_bool)?.unwrap_or(false);
    parameters.remove("binary_data_output");
    check_scalars(&parameters)?;
    let mut binary = BinaryOutputs { all, single: Vec::new() };
    let mut outputs = Vec::new();
    for (index, output) in list("outputs", fields.remove("outputs"))?.into_iter().enumerate() {
        let (name, is_binary) = parse_output(index, output)?;
        binary.single.extend(is_binary.map(|is_binary| (name.clone(), is_binary)));
        outputs.push(name);
    }
    let mut rest = BinarySection { bytes: body.slice(json_bytes..) };
    let mut inputs = Vec::new();
    for (index, input) in list("inputs", fields.remove("inputs"))?.into_iter().enumerate() {
        inputs.push(parse_input(index, input, &mut rest)?);
    }
    if !rest.bytes.is_empty() {
        let why = format!("{} bytes follow the binary data of the last input", rest.bytes.len());
        return Err(ApiError::field("inputs", why));
    }
    let request = InferRequest { model: model.name, version: model.version, id, parameters, inputs, outputs };
    Ok(ParsedInfer { request, binary })
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// KServe's client repeats the name of the model in the body.
fn check_model_name(fields: &Map<String, Value>, in_path: &str) -> Result<(), ApiError> {
    match take(fields, "model_name", "a string", text)? {
        Some(name) if name != in_path => {
            let why =
                format!("{:?} is not {:?}, the model of the path; leave it out", echo(&name), echo(in_path));
            Err(ApiError::field("model_name", why))
        }
        _ => Ok(()),
    }
}

/// A list; none and null are an empty one.
fn list(field: &str, value: Option<Value>) -> Result<Vec<Value>, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(unexpected(field, "a list", &other)),
    }
}

/// An object of parameters; none and null are an empty one.
fn parameters(field: &str, value: Option<Value>) -> Result<Map<String, Value>, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(other) => Err(unexpected(field, "an object", &other)),
    }
}

/// Parameters of an infer request are texts, numbers and booleans, as the protocol says; a list is a tensor.
fn check_scalars(parameters: &Map<String, Value>) -> Result<(), ApiError> {
    match parameters.iter().find(|(_, value)| value.is_array() || value.is_object()) {
        Some((name, value)) => Err(unexpected(
            name,
            "a string, a number or a boolean (of a structure its JSON as a string)",
            value,
        )),
        None => Ok(()),
    }
}

/// The object in a list, without fields that mean nothing.
fn item(list: &str, index: usize, value: Value, known: &[&str]) -> Result<Map<String, Value>, ApiError> {
    let field = format!("{list}[{index}]");
    let Value::Object(object) = value else { return Err(unexpected(&field, "an object", &value)) };
    if let Some(unknown) = object.keys().find(|key| !known.contains(&key.as_str())) {
        let (field, hint) = (format!("{field}.{}", echo(unknown)), nearest::hint(unknown, known));
        return Err(ApiError::field(&field, format!("there is no such field; {hint}")));
    }
    Ok(object)
}

fn name_of(list: &str, index: usize, item: &Map<String, Value>) -> Result<String, ApiError> {
    let field = format!("{list}[{index}].name");
    match item.get("name") {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => Err(unexpected(&field, "a string", other)),
        None => Err(ApiError::field(&field, "is missing")),
    }
}

/// An output that is asked for: its name, and whether it is returned as bytes, where the request says so.
fn parse_output(index: usize, value: Value) -> Result<(String, Option<bool>), ApiError> {
    let mut output = item("outputs", index, value, OUTPUT_FIELDS)?;
    let name = name_of("outputs", index, &output)?;
    let parameters = parameters(&name, output.remove("parameters"))?;
    if let Some(key) = parameters.keys().find(|key| *key != "binary_data") {
        return Err(refuse_key(&name, key, &["binary_data"]));
    }
    let binary = match parameters.get("binary_data") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(binary)) => Some(*binary),
        Some(other) => return Err(unexpected(&name, "true or false as binary_data", other)),
    };
    Ok((name, binary))
}

/// What follows the JSON and has not been read yet.
struct BinarySection {
    bytes: Bytes,
}

impl BinarySection {
    fn take(&mut self, tensor: &str, size: u64) -> Result<Bytes, ApiError> {
        let left = self.bytes.len();
        match usize::try_from(size).ok().filter(|size| *size <= left) {
            Some(size) => Ok(self.bytes.split_to(size)),
            None => {
                let why = format!(
                    "binary_data_size is {size}, but {left} bytes are left in the body behind its JSON; \
                     {JSON_LENGTH} says where the JSON ends"
                );
                Err(ApiError::field(tensor, why))
            }
        }
    }
}

fn parse_input(index: usize, value: Value, rest: &mut BinarySection) -> Result<InputTensor, ApiError> {
    let mut input = item("inputs", index, value, INPUT_FIELDS)?;
    let name = name_of("inputs", index, &input)?;
    let shape = match input.remove("shape") {
        Some(Value::Array(shape)) => shape,
        Some(other) => return Err(unexpected(&name, "a list of lengths as shape", &other)),
        None => return Err(ApiError::field(&name, "has no shape: give the length of each dimension")),
    };
    let length = |value: &Value| {
        value.as_u64().ok_or_else(|| unexpected(&name, "whole numbers from 0 on in shape", value))
    };
    let shape = shape.iter().map(length).collect::<Result<Vec<u64>, ApiError>>()?;
    let datatype = match input.get("datatype") {
        Some(Value::String(word)) => datatype(&name, word)?,
        Some(other) => return Err(unexpected(&name, "a string as datatype", other)),
        None => return Err(ApiError::field(&name, "has no datatype, such as BYTES")),
    };
    let parameters = parameters(&name, input.remove("parameters"))?;
    if let Some(key) = parameters.keys().find(|key| *key != "binary_data_size") {
        return Err(refuse_key(&name, key, &["binary_data_size"]));
    }
    let size = match parameters.get("binary_data_size") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            value
                .as_u64()
                .ok_or_else(|| unexpected(&name, "a whole number from 0 on as binary_data_size", value))?,
        ),
    };
    let data = match (input.remove("data").filter(|data| !data.is_null()), size) {
        (Some(Value::Array(list)), None) => TensorData::Json(list),
        (None, Some(size)) => TensorData::Raw(rest.take(&name, size)?),
        (Some(other), None) => return Err(unexpected(&name, "a list as data", &other)),
        (Some(_), Some(_)) => {
            return Err(ApiError::field(&name, "has data and a binary_data_size: give one of them"));
        }
        (None, None) => {
            return Err(ApiError::field(&name, "has no values: give data, or binary_data_size and bytes"));
        }
    };
    Ok(InputTensor { name, datatype, shape, data })
}

/// The data type of a tensor.
///
/// # Errors
/// Another word than those of the protocol.
pub(crate) fn datatype(tensor: &str, word: &str) -> Result<Datatype, ApiError> {
    Datatype::from_word(word).ok_or_else(|| {
        let all: Vec<&str> = Datatype::ALL.iter().map(|one| one.as_str()).collect();
        let why = format!("{:?} is no datatype; the datatypes are {}", echo(word), all.join(", "));
        ApiError::field(tensor, why)
    })
}

/// A request of the generate extension: `text_input`, and parameters in `parameters` or beside it.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the field.
pub(crate) fn parse_text(model: NamedModel, body: &[u8]) -> Result<TextRequest, ApiError> {
    let example = r#"{"text_input": "Hello", "parameters": {"max_tokens": 32}}"#;
    let value: Value = serde_json::from_slice(body).map_err(|error| ApiError::InvalidRequest {
        field: None,
        message: format!("the body is not JSON ({error}); send an object such as {example}"),
    })?;
    let Value::Object(mut fields) = value else {
        let message = format!("the body must be a JSON object such as {example}");
        return Err(ApiError::InvalidRequest { field: None, message });
    };
    check_model_name(&fields, &model.name)?;
    fields.remove("model_name");
    let id = take(&fields, "id", "a string", text)?.unwrap_or_default();
    fields.remove("id");
    let prompt = match fields.remove("text_input") {
        Some(Value::String(text)) if text.is_empty() => {
            return Err(ApiError::field(
                "text_input",
                "is empty: give the text that the model is to continue",
            ));
        }
        Some(Value::String(text)) => text,
        Some(other) => {
            return Err(ApiError::field("text_input", format!("expected a string, found {}", found(&other))));
        }
        None => {
            return Err(ApiError::field(
                "text_input",
                "is missing: give the text that the model is to continue",
            ));
        }
    };
    let inner = parameters("parameters", fields.remove("parameters"))?;
    // A schema is passed on as it was written: a number that is parsed and written again loses digits.
    let parameters_json = if inner.contains_key("response_format") {
        member_text(body, &["parameters"]).unwrap_or_default()
    } else {
        String::from_utf8_lossy(body).into_owned()
    };
    for (name, value) in inner {
        if fields.insert(name.clone(), value).is_some() {
            return Err(ApiError::field(&name, "is given twice: in parameters and beside it"));
        }
    }
    Ok(TextRequest {
        model: model.name,
        version: model.version,
        id,
        prompt,
        parameters: fields,
        parameters_json,
    })
}

/// The JSON of an answer. Written from types, not from JSON values: an f32 then has as many digits as it
/// needs.
#[derive(Serialize)]
struct AnswerJson<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    #[serde(skip_serializing_if = "Map::is_empty")]
    parameters: &'a Map<String, Value>,
    outputs: Vec<OutputJson<'a>>,
}

#[derive(Serialize)]
struct OutputJson<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a OutputData>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

/// A written answer: its body, and the length of the JSON where bytes follow it.
pub(crate) struct InferBody {
    bytes: Vec<u8>,
    json_bytes: Option<usize>,
}

/// Writes an answer.
///
/// # Errors
/// What the writer of JSON says; the types here give it no cause.
pub(crate) fn write_infer(
    answer: &InferAnswer,
    binary: &BinaryOutputs,
) -> Result<InferBody, serde_json::Error> {
    let mut tail = Vec::new();
    let mut has_binary = false;
    let mut outputs = Vec::with_capacity(answer.outputs.len());
    for OutputTensor { name, shape, data } in &answer.outputs {
        let is_binary = binary.of(name);
        let size = is_binary.then(|| {
            let raw = data.to_raw();
            tail.extend_from_slice(&raw);
            BinarySize { binary_data_size: raw.len() }
        });
        has_binary |= is_binary;
        let datatype = data.datatype().as_str();
        outputs.push(OutputJson {
            name,
            datatype,
            shape,
            parameters: size,
            data: (!is_binary).then_some(data),
        });
    }
    let json = AnswerJson {
        model_name: &answer.head.model_name,
        model_version: &answer.head.model_version,
        id: &answer.head.id,
        parameters: &answer.parameters,
        outputs,
    };
    let mut bytes = serde_json::to_vec(&json)?;
    let json_bytes = has_binary.then_some(bytes.len());
    bytes.append(&mut tail);
    Ok(InferBody { bytes, json_bytes })
}

impl IntoResponse for InferBody {
    fn into_response(self) -> Response {
        let kind = if self.json_bytes.is_some() { "application/octet-stream" } else { "application/json" };
        let mut response =
            ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], self.bytes).into_response();
        if let Some(length) = self.json_bytes {
            response.headers_mut().insert(JSON_LENGTH, HeaderValue::from(length));
        }
        response
    }
}

/// An answer of the generate extension, or one piece of it: each tensor of one element as a field.
pub(crate) fn text_json(answer: &InferAnswer) -> Value {
    let mut fields = Map::new();
    fields.insert("model_name".to_owned(), answer.head.model_name.as_str().into());
    fields.insert("model_version".to_owned(), answer.head.model_version.as_str().into());
    if !answer.head.id.is_empty() {
        fields.insert("id".to_owned(), answer.head.id.as_str().into());
    }
    for output in &answer.outputs {
        let value = match &output.data {
            OutputData::Flags(all) => all.first().copied().map(Value::from),
            OutputData::Counts(all) => all.first().copied().map(Value::from),
            OutputData::Floats(all) => all.first().copied().map(Value::from),
            OutputData::Texts(all) => all.first().cloned().map(Value::from),
        };
        fields.insert(output.name.to_owned(), value.unwrap_or(Value::Null));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kserve::infer::AnswerHead;
    use proptest::prelude::*;
    use serde_json::json;

    fn model() -> NamedModel {
        NamedModel { name: "m".into(), version: String::new() }
    }

    /// A body of this JSON and these bytes.
    fn parse(json: &Value, binary: &[u8]) -> Result<ParsedInfer, ApiError> {
        let json = json.to_string().into_bytes();
        let length = json.len();
        parse_infer(model(), &Bytes::from([json, binary.to_vec()].concat()), length)
    }

    #[test]
    fn tensors_are_read_from_json_and_from_the_bytes_behind_it_in_their_order() {
        let body = json!({
            "id": "7", "model_name": "m", "parameters": {"seed": 1, "binary_data_output": true},
            "inputs": [
                {"name": "a", "shape": [1], "datatype": "INT32", "parameters": {"binary_data_size": 4}},
                {"name": "b", "shape": [2], "datatype": "BYTES", "data": ["x", "y"], "parameters": null},
                {"name": "c", "shape": [0], "datatype": "FP16", "data": null, "parameters": {"binary_data_size": 0}},
                {"name": "d", "shape": [], "datatype": "UINT8", "parameters": {"binary_data_size": 1}},
            ],
            "outputs": [{"name": "o"}, {"name": "p", "parameters": {"binary_data": false}}],
        });
        let ParsedInfer { request, binary } = parse(&body, &[1, 2, 3, 4, 9]).unwrap();
        let data: Vec<_> = request.inputs.iter().map(|tensor| tensor.data.clone()).collect();
        let raw = |bytes: &'static [u8]| TensorData::Raw(Bytes::from_static(bytes));
        let list = TensorData::Json(vec![json!("x"), json!("y")]);
        assert_eq!(data, [raw(&[1, 2, 3, 4]), list, raw(&[]), raw(&[9])]);
        assert_eq!(
            (request.inputs[0].datatype, request.inputs[1].shape.as_slice()),
            (Datatype::Int32, [2].as_slice())
        );
        assert_eq!((request.id.as_str(), request.outputs), ("7", vec!["o".to_owned(), "p".to_owned()]));
        assert_eq!(Value::from(request.parameters), json!({"seed": 1}));
        assert!(binary.of("o") && !binary.of("p"));
    }

    #[test]
    fn what_is_wrong_in_a_body_is_named() {
        let tensor = |fields: Value| {
            let mut tensor = json!({"name": "t", "shape": [1], "datatype": "INT8", "data": [1]});
            for (key, value) in fields.as_object().unwrap() {
                tensor[key] = value.clone();
            }
            json!({"inputs": [tensor]})
        };
        for (body, field, text) in [
            (json!({"input": []}), "input", "did you mean \"inputs\"?"),
            (json!({"inputs": 3}), "inputs", "expected a list, found 3"),
            (json!({"inputs": [3]}), "inputs[0]", "expected an object, found 3"),
            (json!({"inputs": [{"shape": [1]}]}), "inputs[0].name", "is missing"),
            (tensor(json!({"name": 3})), "inputs[0].name", "expected a string, found 3"),
            (tensor(json!({"dtype": "INT8"})), "inputs[0].dtype", "there is no such field"),
            (tensor(json!({"shape": null})), "t", "a list of lengths as shape, found null"),
            (tensor(json!({"shape": [-1]})), "t", "whole numbers from 0 on in shape, found -1"),
            (
                tensor(json!({"datatype": "int8"})),
                "t",
                "\"int8\" is no datatype; the datatypes are BOOL, UINT8",
            ),
            (tensor(json!({"data": 3})), "t", "expected a list as data, found 3"),
            (tensor(json!({"data": null})), "t", "has no values"),
            (tensor(json!({"parameters": {"binary_data_size": 1}})), "t", "give one of them"),
            (tensor(json!({"parameters": {"binary_data_size": -1}})), "t", "as binary_data_size, found -1"),
            (
                tensor(json!({"parameters": {"shared_memory_region": "r"}})),
                "t",
                "no parameter \"shared_memory_region\"",
            ),
            (
                tensor(json!({"data": null, "parameters": {"binary_data_size": 9}})),
                "t",
                "binary_data_size is 9, but 2 bytes are left in the body behind its JSON",
            ),
            (tensor(json!({})), "inputs", "2 bytes follow the binary data of the last input"),
            (json!({"id": 7}), "id", "expected a string, found 7"),
            (json!({"model_name": "n"}), "model_name", "\"n\" is not \"m\""),
            (json!({"parameters": {"stop": ["a"]}}), "stop", "a string, a number or a boolean"),
            (json!({"parameters": {"binary_data_output": 1}}), "binary_data_output", "true or false"),
            (
                json!({"outputs": [{"name": "o", "parameters": {"classification": 2}}]}),
                "o",
                "\"classification\"",
            ),
            (
                json!({"outputs": [{"name": "o", "parameters": {"binary_data": 2}}]}),
                "o",
                "as binary_data, found 2",
            ),
        ] {
            let error = parse(&body, &[1, 2]).unwrap_err();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
                "{body}: {error:?}"
            );
            assert!(error.to_string().contains(text), "{body}: {error}");
        }
        let error = parse_infer(model(), &Bytes::from_static(b"{]"), 2).unwrap_err().to_string();
        assert!(error.contains("not JSON") && error.contains("text_input"), "{error}");
    }

    #[test]
    fn the_length_of_the_json_is_that_of_the_header_or_of_the_body() {
        let read = |value: &'static str| {
            json_length(&HeaderMap::from_iter([(JSON_LENGTH, HeaderValue::from_static(value))]), 10)
        };
        assert_eq!(json_length(&HeaderMap::new(), 10), Ok(10));
        assert_eq!(read("7"), Ok(7));
        for (value, text) in [("11", "11 bytes of JSON are more than the 10"), ("x", "found \"x\"")] {
            let error = read(value).unwrap_err().to_string();
            assert!(
                error.starts_with("inference-header-content-length: ") && error.contains(text),
                "{error}"
            );
        }
    }

    #[test]
    fn an_answer_is_json_or_json_and_bytes() {
        let head = AnswerHead { model_name: "m".into(), model_version: "1".into(), id: String::new() };
        let outputs = vec![
            OutputTensor { name: "a", shape: vec![1], data: OutputData::Texts(vec!["x".into()]) },
            OutputTensor { name: "b", shape: vec![1, 2], data: OutputData::Floats(vec![0.1, -2.0]) },
        ];
        let mut answer = InferAnswer { head, parameters: Map::new(), outputs, last: true };
        let plain = write_infer(&answer, &BinaryOutputs::default()).unwrap();
        let expected = r#"{"model_name":"m","model_version":"1","outputs":[{"name":"a","datatype":"BYTES","shape":[1],"data":["x"]},{"name":"b","datatype":"FP32","shape":[1,2],"data":[0.1,-2.0]}]}"#;
        assert_eq!((String::from_utf8(plain.bytes).unwrap().as_str(), plain.json_bytes), (expected, None));
        answer.head.id = "7".into();
        let single = BinaryOutputs { all: true, single: vec![("b".into(), false)] };
        let mixed = write_infer(&answer, &single).unwrap();
        let (json, tail) = mixed.bytes.split_at(mixed.json_bytes.unwrap());
        assert_eq!(tail, [1, 0, 0, 0, b'x']);
        let json: Value = serde_json::from_slice(json).unwrap();
        assert_eq!(
            (&json["id"], &json["outputs"][0]["parameters"]),
            (&json!("7"), &json!({"binary_data_size": 5}))
        );
        assert!(json["outputs"][0].get("data").is_none() && json["outputs"][1].get("parameters").is_none());
    }

    #[test]
    fn a_text_request_has_its_parameters_inside_or_beside() {
        let body = br#"{"id": "7", "text_input": "Hi", "stream": true, "parameters": {"max_tokens": 3}}"#;
        let request = parse_text(model(), body).unwrap();
        assert_eq!((request.prompt.as_str(), request.id.as_str(), request.model.as_str()), ("Hi", "7", "m"));
        assert_eq!(Value::from(request.parameters), json!({"stream": true, "max_tokens": 3}));
        let schema = br#"{"text_input": "Hi", "parameters": {"response_format": {"type": "json_schema"}}}"#;
        let inner = parse_text(model(), schema).unwrap().parameters_json;
        assert_eq!(inner, r#"{"response_format": {"type": "json_schema"}}"#);
        for (body, field) in [
            (json!({}), "text_input"),
            (json!({"text_input": ""}), "text_input"),
            (json!({"text_input": ["a"]}), "text_input"),
            (json!({"text_input": "a", "parameters": []}), "parameters"),
            (json!({"text_input": "a", "seed": 1, "parameters": {"seed": 1}}), "seed"),
        ] {
            let error = parse_text(model(), body.to_string().as_bytes()).unwrap_err();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(name), .. } if name == field),
                "{body}: {error:?}"
            );
        }
        assert!(parse_text(model(), b"[]").unwrap_err().to_string().contains("must be a JSON object"));
    }

    /// Fields that the parser looks into, with values of every kind.
    fn some_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            prop::sample::select(vec!["BYTES", "INT64", "FP32", "text_input", "a"]).prop_map(Value::from),
        ];
        let keys = vec![
            "inputs",
            "outputs",
            "parameters",
            "id",
            "name",
            "shape",
            "datatype",
            "data",
            "binary_data_size",
            "binary_data",
            "binary_data_output",
            "text_input",
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((prop::sample::select(keys.clone()), inner), 0..6).prop_map(|fields| {
                    Value::Object(fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_body_makes_the_parser_panic(json in some_json(), binary in prop::collection::vec(any::<u8>(), 0..32)) {
            let text = json.to_string();
            for length in [text.len(), text.len() / 2] {
                let body = Bytes::from([text.as_bytes(), &binary].concat());
                if let Ok(parsed) = parse_infer(model(), &body, length) {
                    for tensor in &parsed.request.inputs {
                        let _ = tensor.values(16);
                    }
                }
            }
            let _ = parse_text(model(), text.as_bytes());
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let body = Bytes::from(bytes);
            let _ = parse_infer(model(), &body, body.len());
            let _ = parse_text(model(), &body);
        }
    }
}
