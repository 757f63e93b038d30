//! Requests in tensors for models that give scores, and the tensors of their answers.
//!
//! Scores come for all labels and documents in a fixed order, as tensors have it; the HTTP routes of this
//! server sort them.

use axum::http::HeaderMap;
use serde_json::{Map, Value, json};

use super::infer::{Addressee, MAX_TEXTS, input, rows_of_texts};
use super::tensors::{InputTensor, OutputData, OutputTensor};
use crate::classify::{Classified, ClassifyInput, ClassifyRequest};
use crate::error::ApiError;
use crate::json_body::take;
use crate::priority::{self, Priority};
use crate::rerank::{MAX_DOCUMENTS, RerankRequest, Reranked};
use crate::{revision, tenant};

/// Parameters of a model that gives scores.
pub(crate) const SCORE_PARAMETERS: &[&str] = &["truncate", "raw_scores", "priority", "timeout"];

/// What every request for scores says.
struct ScoreSettings {
    truncate: bool,
    raw_scores: bool,
    revision: Option<String>,
    priority: Priority,
    tenant: String,
}

impl ScoreSettings {
    fn read(parameters: &Map<String, Value>, addressee: &Addressee<'_>) -> Result<Self, ApiError> {
        let headers: &HeaderMap = addressee.headers;
        let flag = |name: &str| take(parameters, name, "true or false", Value::as_bool);
        let class = priority::of_json(parameters)?.or(priority::of_headers(headers)?);
        Ok(Self {
            truncate: flag("truncate")?.unwrap_or(true),
            raw_scores: flag("raw_scores")?.unwrap_or(false),
            revision: match &addressee.revision {
                Some(revision) => Some(revision.clone()),
                None => revision::of_headers(headers)?,
            },
            priority: class.unwrap_or_default(),
            tenant: tenant::of_headers(headers)?.unwrap_or_default(),
        })
    }
}

/// The texts of an input that must be there.
fn texts(inputs: &[InputTensor], name: &str, most: usize) -> Result<Vec<String>, ApiError> {
    let tensor = input(inputs, name)
        .ok_or_else(|| ApiError::field(name, "is missing among the inputs: give texts as BYTES"))?;
    rows_of_texts(tensor, most)
}

/// The request for the scores of texts.
pub(super) fn classify_request(
    parameters: &Map<String, Value>,
    inputs: &[InputTensor],
    addressee: &Addressee<'_>,
) -> Result<ClassifyRequest, ApiError> {
    let ScoreSettings { truncate, raw_scores, revision, priority, tenant } =
        ScoreSettings::read(parameters, addressee)?;
    let first = texts(inputs, "text", MAX_TEXTS)?;
    let input = match input(inputs, "text_pair") {
        None => first.into_iter().map(ClassifyInput::Text).collect(),
        Some(tensor) => {
            let second = rows_of_texts(tensor, MAX_TEXTS)?;
            if second.len() != first.len() {
                let (given, wanted) = (second.len(), first.len());
                return Err(tensor.error(format!("has {given} texts for the {wanted} of text")));
            }
            let pairs = first.into_iter().zip(second);
            pairs.map(|(first, second)| ClassifyInput::Pair { first, second }).collect()
        }
    };
    let model = revision::addressed(addressee.headers, Some(addressee.model.name.clone()));
    let aggregation = None;
    Ok(ClassifyRequest { input, model, revision, truncate, raw_scores, aggregation, priority, tenant })
}

/// The request for the scores of documents.
pub(super) fn rerank_request(
    parameters: &Map<String, Value>,
    inputs: &[InputTensor],
    addressee: &Addressee<'_>,
) -> Result<RerankRequest, ApiError> {
    let ScoreSettings { truncate, raw_scores, revision, priority, tenant } =
        ScoreSettings::read(parameters, addressee)?;
    let mut queries = texts(inputs, "query", 1)?;
    let query = queries.pop().unwrap_or_default();
    let documents = texts(inputs, "documents", MAX_DOCUMENTS)?;
    let model = revision::addressed(addressee.headers, Some(addressee.model.name.clone()));
    RerankRequest { query, documents, model, revision, truncate, raw_scores, priority, tenant }.checked()
}

/// The tokens that were read.
pub(super) fn token_parameter(tokens: u32) -> Map<String, Value> {
    Map::from_iter([("prompt_tokens".to_owned(), json!(tokens))])
}

/// Whether each text was cut.
pub(super) fn truncated_tensor(truncated: &[u32], rows: usize) -> OutputTensor {
    let mut flags = vec![false; rows];
    for index in truncated {
        let index = usize::try_from(*index).unwrap_or(usize::MAX);
        if let Some(flag) = flags.get_mut(index) {
            *flag = true;
        }
    }
    OutputTensor { name: "truncated", shape: vec![rows as u64], data: OutputData::Flags(flags) }
}

/// The outputs of a model that classifies, with one row of scores for each text.
///
/// # Errors
/// A model that labels tokens: texts have different numbers of entities.
pub(super) fn classified_tensors(classified: Classified) -> Result<Vec<OutputTensor>, ApiError> {
    if classified.entities.is_some() {
        let why = "this model labels tokens, for which there are no tensors: ask POST /v1/classify, or Classify of \
             trustformers.v1.InferenceService";
        return Err(ApiError::field("text", why));
    }
    let width = classified.labels.len().max(1);
    let rows = classified.scores.len() / width;
    let truncated = truncated_tensor(&classified.truncated, rows);
    Ok(vec![
        OutputTensor {
            name: "label",
            shape: vec![classified.labels.len() as u64],
            data: OutputData::Texts(classified.labels.to_vec()),
        },
        OutputTensor {
            name: "score",
            shape: vec![rows as u64, width as u64],
            data: OutputData::Floats(classified.scores),
        },
        truncated,
    ])
}

/// The outputs of a model that ranks, with one score for each document.
pub(super) fn reranked_tensors(reranked: Reranked) -> Vec<OutputTensor> {
    let rows = reranked.scores.len();
    let truncated = truncated_tensor(&reranked.truncated, rows);
    vec![
        OutputTensor { name: "score", shape: vec![rows as u64], data: OutputData::Floats(reranked.scores) },
        truncated,
    ]
}

#[cfg(test)]
mod tests {
    use crate::fake::{Fake, Script};
    use crate::test_client;
    use axum::http::{Request, StatusCode};
    use serde_json::{Value, json};
    use trustformers_proto::Task;

    async fn infer(fake: &Fake, inputs: Value) -> (StatusCode, Value) {
        let body = json!({"inputs": inputs}).to_string();
        test_client::send(fake, Request::post("/v2/models/fake/infer"), body).await.status_and_json()
    }

    fn bytes(name: &str, texts: &[&str]) -> Value {
        json!({"name": name, "shape": [texts.len()], "datatype": "BYTES", "data": texts})
    }

    fn output<'a>(answer: &'a Value, name: &str) -> &'a Value {
        let outputs = answer["outputs"].as_array().unwrap();
        outputs.iter().find(|output| output["name"] == name).unwrap()
    }

    #[tokio::test]
    async fn texts_get_a_row_of_scores_each() {
        let fake = Fake::with(Script::tokens(&[])).with_task(Task::Classify);
        let (status, answer) = infer(&fake, json!([bytes("text", &["a", "b"])])).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(output(&answer, "label")["data"], json!(["HAM", "SPAM"]));
        let score = output(&answer, "score");
        assert_eq!((&score["shape"], &score["data"]), (&json!([2, 2]), &json!([0.25, 0.75, 0.25, 0.75])));
        assert_eq!(output(&answer, "truncated")["data"], json!([true, false]));
        let pairs = json!([bytes("text", &["a", "b"]), bytes("text_pair", &["c"])]);
        let (status, answer) = infer(&fake, pairs).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(answer["error"].as_str().unwrap().contains("has 1 texts for the 2 of text"), "{answer}");
    }

    #[tokio::test]
    async fn documents_get_a_score_each_in_their_own_order() {
        let fake = Fake::with(Script::tokens(&[])).with_task(Task::Rerank);
        let asked = json!([bytes("query", &["q"]), bytes("documents", &["a", "b"])]);
        let (status, answer) = infer(&fake, asked).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(output(&answer, "score")["data"], json!([0.0, 0.25]));
        let (status, answer) = infer(&fake, json!([bytes("query", &["q"])])).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(answer["error"].as_str().unwrap().contains("documents"), "{answer}");
    }
}
