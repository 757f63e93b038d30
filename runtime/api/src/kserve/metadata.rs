//! The tensors of each task, and how the protocol describes models: metadata, configuration, versions,
//! states.
//!
//! The tables here are the only place where the tensors are listed: requests are read by them, and
//! ModelMetadata and ModelConfig repeat them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};
use trustformers_proto::inference::{self, model_metadata_response, repository_index_response};
use trustformers_proto::{Task, v1};

use super::infer::{EMBED_PARAMETERS, MAX_PROMPTS, MAX_TEXTS, generate_parameters};
use super::scores::SCORE_PARAMETERS;
use super::tensors::Datatype;
use crate::echo::echo;
use crate::error::ApiError;
use crate::http::state_word;
use crate::rerank::MAX_DOCUMENTS;

/// The name of this server in its metadata, and the backend of every model.
const SERVER_NAME: &str = "trustformers-serve";
const BACKEND: &str = "trustformers";
/// Extensions of the protocol, by the names that Triton gives them.
const EXTENSIONS: &[&str] =
    &["binary_tensor_data", "generate", "model_configuration", "parameters", "statistics"];
/// The version of a model whose configuration names no revision.
const ONLY_VERSION: &str = "1";
/// A dimension of any length.
const ANY: i64 = -1;

/// One tensor that a task takes or gives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorRule {
    pub(crate) name: &'static str,
    /// The type that is described. Requests may use another width of the same kind.
    pub(crate) datatype: Datatype,
    shape: &'static [i64],
    optional: bool,
}

const fn rule(name: &'static str, datatype: Datatype, shape: &'static [i64]) -> TensorRule {
    TensorRule { name, datatype, shape, optional: false }
}

/// A tensor of one value that stands for the parameter of its name.
const fn setting(name: &'static str, datatype: Datatype) -> TensorRule {
    TensorRule { name, datatype, shape: &[1], optional: true }
}

/// Inputs of a model that generates: the prompts, then settings that may be given as parameters instead.
pub(crate) const GENERATE_INPUTS: &[TensorRule] = &[
    rule("text_input", Datatype::Bytes, &[ANY]),
    setting("max_tokens", Datatype::Int32),
    setting("temperature", Datatype::Fp32),
    setting("top_p", Datatype::Fp32),
    TensorRule { name: "stop", datatype: Datatype::Bytes, shape: &[ANY], optional: true },
    setting("stream", Datatype::Bool),
    setting("seed", Datatype::Uint64),
    setting("top_k", Datatype::Int32),
    setting("min_p", Datatype::Fp32),
    setting("typical_p", Datatype::Fp32),
    setting("repetition_penalty", Datatype::Fp32),
    setting("presence_penalty", Datatype::Fp32),
    setting("frequency_penalty", Datatype::Fp32),
];

/// Outputs of a model that generates, each with one element for each prompt.
pub(crate) const GENERATE_OUTPUTS: &[TensorRule] = &[
    rule("text_output", Datatype::Bytes, &[ANY]),
    rule("finish_reason", Datatype::Bytes, &[ANY]),
    rule("prompt_tokens", Datatype::Uint32, &[ANY]),
    rule("completion_tokens", Datatype::Uint32, &[ANY]),
];

/// Inputs of a model that embeds: the texts, or their token ids.
pub(crate) const EMBED_INPUTS: &[TensorRule] = &[
    TensorRule { name: "text", datatype: Datatype::Bytes, shape: &[ANY], optional: true },
    TensorRule { name: "input_ids", datatype: Datatype::Int64, shape: &[ANY, ANY], optional: true },
    TensorRule { name: "attention_mask", datatype: Datatype::Int64, shape: &[ANY, ANY], optional: true },
];

/// Outputs of a model that embeds: a vector for each text, and whether the text was cut.
pub(crate) const EMBED_OUTPUTS: &[TensorRule] =
    &[rule("embedding", Datatype::Fp32, &[ANY, ANY]), rule("truncated", Datatype::Bool, &[ANY])];

/// Inputs of a model that classifies: the texts, and perhaps another one that is read beside each.
pub(crate) const CLASSIFY_INPUTS: &[TensorRule] = &[
    rule("text", Datatype::Bytes, &[ANY]),
    TensorRule { name: "text_pair", datatype: Datatype::Bytes, shape: &[ANY], optional: true },
];

/// Outputs of a model that classifies: the labels, for each text a score of each, and whether it was cut.
pub(crate) const CLASSIFY_OUTPUTS: &[TensorRule] = &[
    rule("label", Datatype::Bytes, &[ANY]),
    rule("score", Datatype::Fp32, &[ANY, ANY]),
    rule("truncated", Datatype::Bool, &[ANY]),
];

/// Inputs of a model that ranks: one query, and the documents.
pub(crate) const RERANK_INPUTS: &[TensorRule] =
    &[rule("query", Datatype::Bytes, &[1]), rule("documents", Datatype::Bytes, &[ANY])];

/// Outputs of a model that ranks: a score for each document in the order of the request, and whether it was
/// cut.
pub(crate) const RERANK_OUTPUTS: &[TensorRule] =
    &[rule("score", Datatype::Fp32, &[ANY]), rule("truncated", Datatype::Bool, &[ANY])];

/// The tensors of a task.
pub(crate) fn inputs_of(task: Task) -> &'static [TensorRule] {
    match task {
        Task::Generate => GENERATE_INPUTS,
        Task::Embed => EMBED_INPUTS,
        Task::Classify => CLASSIFY_INPUTS,
        Task::Rerank => RERANK_INPUTS,
    }
}

/// The tensors that a task gives.
pub(crate) fn outputs_of(task: Task) -> &'static [TensorRule] {
    match task {
        Task::Generate => GENERATE_OUTPUTS,
        Task::Embed => EMBED_OUTPUTS,
        Task::Classify => CLASSIFY_OUTPUTS,
        Task::Rerank => RERANK_OUTPUTS,
    }
}

/// The only version of a model: the revision of its configuration, or 1 where that names none.
pub(crate) fn version_of(model: &v1::ModelStatus) -> &str {
    if model.revision.is_empty() { ONLY_VERSION } else { &model.revision }
}

/// The model that a request names by any of its names. Without a name: the only model there is.
///
/// # Errors
/// No such model, another version than the one that serves, or several models and no name.
pub(crate) fn find<'a>(
    models: &'a [v1::ModelStatus],
    asked: &str,
    version: &str,
) -> Result<&'a v1::ModelStatus, ApiError> {
    let choices = || models.iter().map(|model| model.name.clone()).collect();
    let model = match (asked, models) {
        ("", [only]) => only,
        ("", _) => return Err(ApiError::ModelRequired { choices: choices() }),
        _ => {
            let answers = |model: &&v1::ModelStatus| {
                model.name == asked || model.names.iter().any(|name| name == asked)
            };
            let found = models.iter().find(answers);
            found.ok_or_else(|| ApiError::UnknownModel { asked: asked.to_owned(), choices: choices() })?
        }
    };
    let serves = version_of(model);
    if version.is_empty() || version == serves {
        return Ok(model);
    }
    let why =
        format!("model {:?} has version {serves:?} only, not {:?}; leave it out", model.name, echo(version));
    Err(ApiError::field("model_version", why))
}

/// The task of a model.
///
/// # Errors
/// A model that is not loaded yet: which tensors it takes is not known.
pub(crate) fn task_of(model: &v1::ModelStatus) -> Result<Task, ApiError> {
    Task::from_wire(&model.task).ok_or_else(|| ApiError::Unavailable {
        message: format!("{}; its tensors are known once it is loaded", describe(model)),
        retry_after_s: None,
    })
}

/// Whether a model takes requests. One that drains still does: routers learn of it later than the pod.
pub(crate) fn is_ready(model: &v1::ModelStatus) -> bool {
    matches!(model.state(), v1::ModelState::Ready | v1::ModelState::Draining)
}

/// The state of a model in one sentence.
pub(crate) fn describe(model: &v1::ModelStatus) -> String {
    let why = if model.message.is_empty() { String::new() } else { format!(": {}", model.message) };
    format!("model {:?} is {}{why}", model.name, state_word(model.state()))
}

/// What the server says of itself.
pub(crate) fn server() -> inference::ServerMetadataResponse {
    inference::ServerMetadataResponse {
        name: SERVER_NAME.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: EXTENSIONS.iter().map(ToString::to_string).collect(),
    }
}

/// The description of a model, in the words of both transports.
#[derive(Debug, Serialize)]
pub(crate) struct ModelDescription {
    name: String,
    versions: Vec<String>,
    platform: &'static str,
    inputs: Vec<TensorDescription>,
    outputs: Vec<TensorDescription>,
    properties: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct TensorDescription {
    name: &'static str,
    datatype: &'static str,
    shape: Vec<i64>,
}

/// The shape of a tensor, with the model's own length of vectors.
fn shape_of(rule: &TensorRule, model: &v1::ModelStatus) -> Vec<i64> {
    match (rule.name, model.embedding_dimensions) {
        ("embedding", width) if width > 0 => vec![ANY, i64::from(width)],
        _ => rule.shape.to_vec(),
    }
}

/// Describes a model.
///
/// # Errors
/// As [`task_of`].
pub(crate) fn describe_model(model: &v1::ModelStatus) -> Result<ModelDescription, ApiError> {
    let task = task_of(model)?;
    let tensors = |rules: &[TensorRule]| {
        let one = |rule: &TensorRule| TensorDescription {
            name: rule.name,
            datatype: rule.datatype.as_str(),
            shape: shape_of(rule, model),
        };
        rules.iter().map(one).collect()
    };
    let mut properties = BTreeMap::from([
        ("task".to_owned(), task.as_str().to_owned()),
        ("digest".to_owned(), model.digest.clone()),
        ("context_tokens".to_owned(), model.context_tokens.to_string()),
    ]);
    match task {
        Task::Generate => {
            properties.insert("max_prompts".to_owned(), MAX_PROMPTS.to_string());
            properties.insert("parameters".to_owned(), generate_parameters().join(", "));
        }
        Task::Embed => {
            properties.insert("max_texts".to_owned(), MAX_TEXTS.to_string());
            properties.insert("parameters".to_owned(), EMBED_PARAMETERS.join(", "));
        }
        Task::Classify => {
            properties.insert("max_texts".to_owned(), MAX_TEXTS.to_string());
            properties.insert("parameters".to_owned(), SCORE_PARAMETERS.join(", "));
        }
        Task::Rerank => {
            properties.insert("max_documents".to_owned(), MAX_DOCUMENTS.to_string());
            properties.insert("parameters".to_owned(), SCORE_PARAMETERS.join(", "));
        }
    }
    Ok(ModelDescription {
        name: model.name.clone(),
        versions: vec![version_of(model).to_owned()],
        platform: BACKEND,
        inputs: tensors(inputs_of(task)),
        outputs: tensors(outputs_of(task)),
        properties,
    })
}

impl From<ModelDescription> for inference::ModelMetadataResponse {
    fn from(model: ModelDescription) -> Self {
        let tensors = |all: Vec<TensorDescription>| {
            let one = |tensor: TensorDescription| model_metadata_response::TensorMetadata {
                name: tensor.name.to_owned(),
                datatype: tensor.datatype.to_owned(),
                shape: tensor.shape,
            };
            all.into_iter().map(one).collect()
        };
        Self {
            name: model.name,
            versions: model.versions,
            platform: model.platform.to_owned(),
            inputs: tensors(model.inputs),
            outputs: tensors(model.outputs),
            properties: model.properties.into_iter().collect(),
        }
    }
}

fn config_type(datatype: Datatype) -> inference::DataType {
    match datatype {
        Datatype::Bool => inference::DataType::TypeBool,
        Datatype::Uint8 => inference::DataType::TypeUint8,
        Datatype::Uint16 => inference::DataType::TypeUint16,
        Datatype::Uint32 => inference::DataType::TypeUint32,
        Datatype::Uint64 => inference::DataType::TypeUint64,
        Datatype::Int8 => inference::DataType::TypeInt8,
        Datatype::Int16 => inference::DataType::TypeInt16,
        Datatype::Int32 => inference::DataType::TypeInt32,
        Datatype::Int64 => inference::DataType::TypeInt64,
        Datatype::Fp16 => inference::DataType::TypeFp16,
        Datatype::Bf16 => inference::DataType::TypeBf16,
        Datatype::Fp32 => inference::DataType::TypeFp32,
        Datatype::Fp64 => inference::DataType::TypeFp64,
        Datatype::Bytes => inference::DataType::TypeString,
    }
}

/// The configuration of a model, as far as it says how to ask the model.
///
/// # Errors
/// As [`task_of`].
pub(crate) fn config(model: &v1::ModelStatus) -> Result<inference::ModelConfig, ApiError> {
    let task = task_of(model)?;
    let input = |rule: &TensorRule| inference::ModelInput {
        name: rule.name.to_owned(),
        data_type: config_type(rule.datatype) as i32,
        dims: shape_of(rule, model),
        optional: rule.optional,
    };
    let output = |rule: &TensorRule| inference::ModelOutput {
        name: rule.name.to_owned(),
        data_type: config_type(rule.datatype) as i32,
        dims: shape_of(rule, model),
    };
    Ok(inference::ModelConfig {
        name: model.name.clone(),
        platform: String::new(),
        max_batch_size: 0,
        input: inputs_of(task).iter().map(input).collect(),
        output: outputs_of(task).iter().map(output).collect(),
        backend: BACKEND.to_owned(),
        model_transaction_policy: Some(inference::ModelTransactionPolicy {
            decoupled: task == Task::Generate,
        }),
    })
}

/// The configuration in the JSON form of its message.
pub(crate) fn config_json(config: &inference::ModelConfig) -> Value {
    let input = |one: &inference::ModelInput| {
        json!({
            "name": one.name,
            "data_type": one.data_type().as_str_name(),
            "dims": one.dims,
            "optional": one.optional,
        })
    };
    let output = |one: &inference::ModelOutput| {
        let data_type = one.data_type().as_str_name();
        json!({"name": one.name, "data_type": data_type, "dims": one.dims})
    };
    let decoupled = config.model_transaction_policy.as_ref().is_some_and(|policy| policy.decoupled);
    json!({
        "name": config.name,
        "platform": config.platform,
        "backend": config.backend,
        "max_batch_size": config.max_batch_size,
        "input": config.input.iter().map(input).collect::<Vec<_>>(),
        "output": config.output.iter().map(output).collect::<Vec<_>>(),
        "model_transaction_policy": {"decoupled": decoupled},
    })
}

/// The models with their states, in Triton's words; with `only_ready` those that take requests.
pub(crate) fn index(
    models: &[v1::ModelStatus],
    only_ready: bool,
) -> Vec<repository_index_response::ModelIndex> {
    let entry = |model: &v1::ModelStatus| repository_index_response::ModelIndex {
        name: model.name.clone(),
        version: version_of(model).to_owned(),
        state: match model.state() {
            v1::ModelState::Ready => "READY",
            v1::ModelState::Pending | v1::ModelState::Loading | v1::ModelState::Warming => "LOADING",
            v1::ModelState::Draining => "UNLOADING",
            v1::ModelState::Unspecified | v1::ModelState::Unloaded | v1::ModelState::Failed => "UNAVAILABLE",
        }
        .to_owned(),
        reason: model.message.clone(),
    };
    let listed = models.iter().filter(|model| !only_ready || model.state() == v1::ModelState::Ready);
    listed.map(entry).collect()
}

/// [`index`] as JSON.
pub(crate) fn index_json(models: &[v1::ModelStatus], only_ready: bool) -> Value {
    let entry = |one: repository_index_response::ModelIndex| {
        let (name, version, state) = (one.name, one.version, one.state);
        json!({"name": name, "version": version, "state": state, "reason": one.reason})
    };
    index(models, only_ready).into_iter().map(entry).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model that answers to two names.
    pub(crate) fn model(task: &str) -> v1::ModelStatus {
        let mut model = v1::ModelStatus {
            name: "ns/m".into(),
            names: vec!["ns/m".into(), "m".into()],
            task: task.into(),
            revision: "r1".into(),
            digest: "d1".into(),
            context_tokens: 128,
            ..Default::default()
        };
        model.set_state(v1::ModelState::Ready);
        model
    }

    #[test]
    fn a_model_is_found_by_each_of_its_names_and_its_only_version() {
        let models = [model("generate"), v1::ModelStatus { name: "x".into(), ..Default::default() }];
        for (asked, version) in [("m", ""), ("ns/m", "r1"), ("m", "r1")] {
            assert_eq!(find(&models, asked, version).unwrap().name, "ns/m");
        }
        assert_eq!(find(&models, "x", "1").unwrap().name, "x");
        assert!(matches!(find(&models, "n", ""), Err(ApiError::UnknownModel { .. })));
        assert!(matches!(find(&models, "", ""), Err(ApiError::ModelRequired { .. })));
        assert_eq!(find(&models[..1], "", "").unwrap().name, "ns/m");
        let error = find(&models, "m", "2").unwrap_err().to_string();
        assert!(error.starts_with("model_version: ") && error.contains("\"r1\" only, not \"2\""), "{error}");
    }

    #[test]
    fn tensors_are_described_alike_in_metadata_and_configuration() {
        let cases =
            [("generate", "text_input"), ("embed", "text"), ("classify", "text"), ("rerank", "query")];
        for (task, first) in cases {
            let model = v1::ModelStatus { embedding_dimensions: 384, ..model(task) };
            let described = inference::ModelMetadataResponse::from(describe_model(&model).unwrap());
            let config = config(&model).unwrap();
            assert_eq!((described.inputs[0].name.as_str(), config.input[0].name.as_str()), (first, first));
            let shapes: Vec<_> = described.outputs.iter().map(|one| one.shape.clone()).collect();
            assert_eq!(shapes, config.output.iter().map(|one| one.dims.clone()).collect::<Vec<_>>());
            if task == "embed" {
                assert_eq!(shapes[0], [-1, 384]);
            }
            assert_eq!(
                (described.versions, described.properties["digest"].as_str()),
                (vec!["r1".into()], "d1")
            );
            let json = config_json(&config);
            assert_eq!(json["input"][0]["data_type"], "TYPE_STRING");
            assert_eq!(json["model_transaction_policy"]["decoupled"], task == "generate");
        }
        let error = describe_model(&v1::ModelStatus { name: "m".into(), ..Default::default() }).unwrap_err();
        assert!(matches!(error, ApiError::Unavailable { .. }), "{error:?}");
    }

    #[test]
    fn the_index_has_the_words_of_triton() {
        let models: Vec<v1::ModelStatus> = [
            (v1::ModelState::Ready, "READY"),
            (v1::ModelState::Loading, "LOADING"),
            (v1::ModelState::Failed, "UNAVAILABLE"),
        ]
        .into_iter()
        .map(|(state, word)| {
            let mut model =
                v1::ModelStatus { name: word.into(), message: "why".into(), ..Default::default() };
            model.set_state(state);
            model
        })
        .collect();
        let all = index_json(&models, false);
        for entry in all.as_array().unwrap() {
            assert_eq!((&entry["state"], &entry["version"]), (&entry["name"], &json!("1")));
        }
        assert_eq!(index(&models, true).len(), 1);
    }
}
