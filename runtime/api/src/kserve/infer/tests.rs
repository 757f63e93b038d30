//! Requests in tensors, and the requests of models that they become.

use super::parameters::MAX_PARAMETER_BYTES;
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
    refused("embed", request(vec![text()], json!({"max_tokens": 1})), "max_tokens", "known are: truncate");
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
