//! The messages of gRPC as requests and answers in tensors.
//!
//! An answer mirrors its request: raw bytes where the inputs came as raw bytes, else typed lists. Triton's
//! client reads raw bytes alone, and KServe's client what it sent.

use std::collections::HashMap;

use axum::body::Bytes;
use serde_json::{Map, Number, Value};
use trustformers_proto::inference::infer_parameter::ParameterChoice;
use trustformers_proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use trustformers_proto::inference::model_infer_response::InferOutputTensor;
use trustformers_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};

use super::infer::{InferAnswer, InferRequest, refuse_key, unexpected};
use super::json::datatype;
use super::tensors::{InputTensor, OutputTensor, TensorData};
use crate::error::ApiError;

/// Parameter of a request in a stream: its last answer is an empty one.
const EMPTY_FINAL: &str = "triton_enable_empty_final_response";
/// Parameter of an answer in a stream: whether it is the last one of its request.
const FINAL: &str = "triton_final_response";
/// Parameter of a request: whether its outputs are raw bytes, whatever its inputs are.
const BINARY_OUTPUT: &str = "binary_data_output";
/// Parameter of an input, which KServe's client sends beside raw bytes: their number.
const BINARY_SIZE: &str = "binary_data_size";

/// How the answers to a message are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MessageForm {
    raw: bool,
    empty_final: bool,
}

/// A message as a request, with the form of its answers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParsedMessage {
    pub(crate) request: InferRequest,
    pub(crate) form: MessageForm,
}

/// Reads a message.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the tensor, the parameter or the field.
pub(crate) fn parse(message: ModelInferRequest) -> Result<ParsedMessage, ApiError> {
    let mut parameters = read_parameters(message.parameters)?;
    let mut flag = |name: &str| match parameters.remove(name) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(flag)),
        Some(other) => Err(unexpected(name, "a boolean", &other)),
    };
    let empty_final = flag(EMPTY_FINAL)?.unwrap_or(false);
    let raw_outputs = flag(BINARY_OUTPUT)?;
    let is_raw = !message.raw_input_contents.is_empty();
    let (inputs, raw) = (message.inputs.len(), message.raw_input_contents.len());
    if is_raw && inputs != raw {
        let why = format!("has {raw} entries for {inputs} inputs: give one for each, or none");
        return Err(ApiError::field("raw_input_contents", why));
    }
    let raw = message.raw_input_contents.into_iter().map(|bytes| Some(Bytes::from(bytes)));
    let raw = raw.chain(std::iter::repeat(None));
    let inputs = message.inputs.into_iter().zip(raw).map(|(tensor, raw)| read_input(tensor, raw));
    let request = InferRequest {
        inputs: inputs.collect::<Result<_, _>>()?,
        outputs: message.outputs.into_iter().map(read_output).collect::<Result<_, _>>()?,
        model: message.model_name,
        version: message.model_version,
        id: message.id,
        parameters,
    };
    Ok(ParsedMessage { request, form: MessageForm { raw: raw_outputs.unwrap_or(is_raw), empty_final } })
}

impl ParsedMessage {
    /// Refuses what only a stream can do.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the parameter.
    pub(crate) fn outside_a_stream(self) -> Result<Self, ApiError> {
        if self.form.empty_final {
            return Err(ApiError::field(EMPTY_FINAL, "is for ModelStreamInfer: leave it out here"));
        }
        Ok(self)
    }
}

/// Parameters as JSON, in the order of their names, so that the same request gives the same refusal.
fn read_parameters(parameters: HashMap<String, InferParameter>) -> Result<Map<String, Value>, ApiError> {
    let mut sorted: Vec<(String, InferParameter)> = parameters.into_iter().collect();
    sorted.sort_unstable_by(|(first, _), (second, _)| first.cmp(second));
    let one = |(name, parameter): (String, InferParameter)| {
        let value = match parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(flag)) => Value::from(flag),
            Some(ParameterChoice::Int64Param(number)) => Value::from(number),
            Some(ParameterChoice::StringParam(text)) => Value::from(text),
            Some(ParameterChoice::Uint64Param(number)) => Value::from(number),
            Some(ParameterChoice::DoubleParam(number)) => Number::from_f64(number)
                .map(Value::Number)
                .ok_or_else(|| ApiError::field(&name, format!("{number} is not a finite number")))?,
            None => return Err(ApiError::field(&name, "has no value")),
        };
        Ok((name, value))
    };
    sorted.into_iter().map(one).collect()
}

fn read_input(tensor: InferInputTensor, raw: Option<Bytes>) -> Result<InputTensor, ApiError> {
    let name = tensor.name;
    if name.is_empty() {
        return Err(ApiError::field("inputs", "have a tensor without a name"));
    }
    let raw_bytes = raw.as_ref().map(Bytes::len);
    for (key, value) in read_parameters(tensor.parameters)? {
        if key != BINARY_SIZE {
            return Err(refuse_key(&name, &key, &[BINARY_SIZE]));
        }
        if value.as_u64() != raw_bytes.map(|bytes| bytes as u64) {
            let given = raw_bytes.unwrap_or(0);
            let why = format!("{BINARY_SIZE} is {value}, but raw_input_contents hold {given} bytes of it");
            return Err(ApiError::field(&name, why));
        }
    }
    let length = |length: &i64| {
        u64::try_from(*length)
            .map_err(|_| ApiError::field(&name, format!("{length} is no length in a shape")))
    };
    let shape = tensor.shape.iter().map(length).collect::<Result<Vec<u64>, ApiError>>()?;
    let datatype = datatype(&name, &tensor.datatype)?;
    let data = match (raw, tensor.contents) {
        (Some(_), Some(contents)) if contents != InferTensorContents::default() => {
            return Err(ApiError::field(&name, "has contents beside raw_input_contents: give one of them"));
        }
        (Some(raw), _) => TensorData::Raw(raw),
        (None, contents) => TensorData::Typed(Box::new(contents.unwrap_or_default())),
    };
    Ok(InputTensor { name, datatype, shape, data })
}

fn read_output(output: InferRequestedOutputTensor) -> Result<String, ApiError> {
    match output.parameters.keys().min() {
        Some(key) => Err(refuse_key(&output.name, key, &[])),
        None => Ok(output.name),
    }
}

fn write_parameter(value: Value) -> InferParameter {
    let choice = match value {
        Value::Bool(flag) => ParameterChoice::BoolParam(flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => ParameterChoice::Int64Param(number),
            (None, Some(number)) => ParameterChoice::Uint64Param(number),
            (None, None) => ParameterChoice::DoubleParam(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => ParameterChoice::StringParam(text),
        other => ParameterChoice::StringParam(other.to_string()),
    };
    InferParameter { parameter_choice: Some(choice) }
}

/// Writes an answer.
pub(crate) fn write(answer: InferAnswer, form: MessageForm) -> ModelInferResponse {
    let parameters = answer.parameters.into_iter();
    let mut response = ModelInferResponse {
        model_name: answer.head.model_name,
        model_version: answer.head.model_version,
        id: answer.head.id,
        parameters: parameters.map(|(name, value)| (name, write_parameter(value))).collect(),
        ..Default::default()
    };
    for OutputTensor { name, shape, data } in answer.outputs {
        // Shapes of answers are numbers of prompts and lengths of vectors.
        let shape = shape.into_iter().map(|length| i64::try_from(length).unwrap_or(i64::MAX)).collect();
        let datatype = data.datatype().as_str().to_owned();
        let contents = if form.raw {
            response.raw_output_contents.push(data.to_raw());
            None
        } else {
            Some(data.into_typed())
        };
        let parameters = HashMap::new();
        response.outputs.push(InferOutputTensor {
            name: name.to_owned(),
            datatype,
            shape,
            parameters,
            contents,
        });
    }
    response
}

/// Writes an answer of a stream: with it, where the request asked, the empty answer that is the last one.
pub(crate) fn write_in_stream(answer: InferAnswer, form: MessageForm) -> Vec<ModelStreamInferResponse> {
    let (head, last) = (answer.head.clone(), answer.last);
    let with_flag = |mut response: ModelInferResponse, last: bool| {
        response.parameters.insert(FINAL.to_owned(), write_parameter(Value::from(last)));
        ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
    };
    let empty_follows = last && form.empty_final;
    let mut messages = vec![with_flag(write(answer, form), last && !empty_follows)];
    if empty_follows {
        let empty = ModelInferResponse {
            model_name: head.model_name,
            model_version: head.model_version,
            id: head.id,
            ..Default::default()
        };
        messages.push(with_flag(empty, true));
    }
    messages
}

/// Writes the failure of a request in a stream, with the names that say which request it was.
pub(crate) fn write_failure(error: &ApiError, model_name: &str, id: &str) -> ModelStreamInferResponse {
    let response =
        ModelInferResponse { model_name: model_name.to_owned(), id: id.to_owned(), ..Default::default() };
    ModelStreamInferResponse { error_message: error.message(), infer_response: Some(response) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kserve::infer::AnswerHead;
    use crate::kserve::tensors::{Datatype, OutputData};
    use proptest::prelude::*;

    fn tensor(name: &str) -> InferInputTensor {
        InferInputTensor { name: name.into(), datatype: "INT32".into(), shape: vec![1], ..Default::default() }
    }

    fn parameter(choice: ParameterChoice) -> InferParameter {
        InferParameter { parameter_choice: Some(choice) }
    }

    fn with_parameter(name: &str, choice: ParameterChoice) -> ModelInferRequest {
        ModelInferRequest {
            parameters: HashMap::from([(name.to_owned(), parameter(choice))]),
            ..Default::default()
        }
    }

    #[test]
    fn raw_and_typed_values_are_read_and_the_answer_mirrors_them() {
        let typed = InferInputTensor {
            contents: Some(InferTensorContents { int_contents: vec![5], ..Default::default() }),
            ..tensor("a")
        };
        let parsed = parse(ModelInferRequest { inputs: vec![typed], ..Default::default() }).unwrap();
        assert!(!parsed.form.raw && matches!(&parsed.request.inputs[0].data, TensorData::Typed(_)));
        // KServe's client says beside raw bytes how many they are.
        let size = HashMap::from([(BINARY_SIZE.to_owned(), parameter(ParameterChoice::Int64Param(4)))]);
        let sized = InferInputTensor { parameters: size, ..tensor("a") };
        let raw = ModelInferRequest {
            inputs: vec![sized, tensor("b")],
            raw_input_contents: vec![vec![5, 0, 0, 0], vec![]],
            ..Default::default()
        };
        let parsed = parse(raw.clone()).unwrap();
        assert_eq!(parsed.request.inputs[0].data, TensorData::Raw(Bytes::from_static(&[5, 0, 0, 0])));
        assert_eq!((parsed.request.inputs[0].datatype, parsed.form.raw), (Datatype::Int32, true));
        let typed_answer = with_parameter(BINARY_OUTPUT, ParameterChoice::BoolParam(false)).parameters;
        assert!(!parse(ModelInferRequest { parameters: typed_answer, ..raw }).unwrap().form.raw);
    }

    #[test]
    fn parameters_of_every_type_are_read() {
        for (choice, expected) in [
            (ParameterChoice::BoolParam(true), Value::from(true)),
            (ParameterChoice::Int64Param(-3), Value::from(-3)),
            (ParameterChoice::StringParam("a".into()), Value::from("a")),
            (ParameterChoice::DoubleParam(0.5), Value::from(0.5)),
            (ParameterChoice::Uint64Param(u64::MAX), Value::from(u64::MAX)),
        ] {
            let parsed = parse(with_parameter("p", choice.clone())).unwrap();
            assert_eq!(parsed.request.parameters["p"], expected);
            assert_eq!(write_parameter(expected), parameter(choice));
        }
    }

    #[test]
    fn what_is_wrong_in_a_message_is_named() {
        let with_input =
            |tensor: InferInputTensor| ModelInferRequest { inputs: vec![tensor], ..Default::default() };
        let unknown =
            HashMap::from([("shared_memory_region".to_owned(), parameter(ParameterChoice::BoolParam(true)))]);
        let size = HashMap::from([(BINARY_SIZE.to_owned(), parameter(ParameterChoice::Int64Param(4)))]);
        let contents = Some(InferTensorContents { int_contents: vec![5], ..Default::default() });
        let output = InferRequestedOutputTensor { name: "o".into(), parameters: unknown.clone() };
        for (message, text) in [
            (with_parameter("p", ParameterChoice::DoubleParam(f64::NAN)), "p: NaN is not a finite number"),
            (
                ModelInferRequest {
                    parameters: HashMap::from([("p".into(), InferParameter::default())]),
                    ..Default::default()
                },
                "p: has no value",
            ),
            (
                with_parameter(EMPTY_FINAL, ParameterChoice::Int64Param(1)),
                "triton_enable_empty_final_response: expected a boolean",
            ),
            (
                ModelInferRequest { raw_input_contents: vec![vec![]], ..Default::default() },
                "raw_input_contents: has 1 entries for 0 inputs",
            ),
            (
                ModelInferRequest {
                    raw_input_contents: vec![vec![5]],
                    ..with_input(InferInputTensor { contents, ..tensor("t") })
                },
                "t: has contents beside raw_input_contents",
            ),
            (
                with_input(InferInputTensor { parameters: unknown, ..tensor("t") }),
                "t: there is no parameter \"shared_memory_region\"",
            ),
            (
                with_input(InferInputTensor { parameters: size, ..tensor("t") }),
                "t: binary_data_size is 4, but raw_input_contents hold 0",
            ),
            (with_input(InferInputTensor { shape: vec![-1], ..tensor("t") }), "t: -1 is no length"),
            (
                with_input(InferInputTensor { datatype: "FLOAT".into(), ..tensor("t") }),
                "t: \"FLOAT\" is no datatype",
            ),
            (with_input(tensor("")), "inputs: have a tensor without a name"),
            (
                ModelInferRequest { outputs: vec![output], ..Default::default() },
                "o: there is no parameter \"shared_memory_region\"; none is known",
            ),
        ] {
            let error = parse(message).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }

    #[test]
    fn the_last_answer_of_a_stream_is_marked_and_empty_where_that_is_asked() {
        let head = AnswerHead { model_name: "m".into(), model_version: "1".into(), id: "7".into() };
        let outputs = vec![OutputTensor { name: "o", shape: vec![1], data: OutputData::Counts(vec![9]) }];
        let answer =
            |last| InferAnswer { head: head.clone(), parameters: Map::new(), outputs: outputs.clone(), last };
        let is_final = |message: &ModelStreamInferResponse| {
            let response = message.infer_response.as_ref().unwrap();
            (response.parameters[FINAL].clone(), response.outputs.len())
        };
        let flag = |flag| parameter(ParameterChoice::BoolParam(flag));
        let plain = MessageForm { raw: true, empty_final: false };
        let messages = write_in_stream(answer(true), plain);
        assert_eq!(messages.iter().map(is_final).collect::<Vec<_>>(), [(flag(true), 1)]);
        assert_eq!(messages[0].infer_response.as_ref().unwrap().raw_output_contents, [[9, 0, 0, 0]]);
        let with_empty = MessageForm { raw: false, empty_final: true };
        assert_eq!(
            write_in_stream(answer(false), with_empty).iter().map(is_final).collect::<Vec<_>>(),
            [(flag(false), 1)]
        );
        let messages = write_in_stream(answer(true), with_empty);
        assert_eq!(messages.iter().map(is_final).collect::<Vec<_>>(), [(flag(false), 1), (flag(true), 0)]);
        let (first, last) =
            (messages[0].infer_response.as_ref().unwrap(), messages[1].infer_response.as_ref().unwrap());
        assert_eq!(first.outputs[0].contents.as_ref().unwrap().uint_contents, [9]);
        assert_eq!((last.id.as_str(), last.model_name.as_str()), ("7", "m"));
    }

    proptest! {
        #[test]
        fn no_message_makes_the_reader_panic(
            datatype in prop::sample::select(vec!["BOOL", "INT8", "INT64", "FP16", "FP32", "BYTES", "x"]),
            shape in prop::collection::vec(any::<i64>(), 0..3),
            raw in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..3),
            ints in prop::collection::vec(any::<i32>(), 0..3),
        ) {
            let contents = Some(InferTensorContents { int_contents: ints, ..Default::default() });
            let tensor = InferInputTensor { name: "t".into(), datatype: datatype.into(), shape, contents, ..Default::default() };
            let message = ModelInferRequest { inputs: vec![tensor], raw_input_contents: raw, ..Default::default() };
            if let Ok(parsed) = parse(message) {
                let _ = parsed.request.inputs[0].values(16);
            }
        }
    }
}
