//! Scores of labels: the request and the answer, `POST /v1/classify`, and the gRPC messages.
//!
//! Requests may also come in the words of two other servers: `input` as in vLLM, and `inputs` as in
//! text-embeddings-inference, where a flat list is one text or one pair of texts.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use trustformers_proto::v1;

use crate::entities::{self, Aggregation, Entity, EntityBody};
use crate::error::ApiError;
use crate::http::generate::milliseconds;
use crate::inference::Usage;
use crate::json_body::{found, object, take};
use crate::priority::{self, Priority};
use crate::revision::{self, answer_headers};
use crate::{Api, request_body, tenant};

/// The fields of a request.
pub(crate) const FIELDS: &[&str] =
    &["input", "inputs", "model", "top_k", "raw_scores", entities::FIELD, "truncate", "priority"];

/// Texts, or pairs of texts, of one request: what the engine's encoder takes.
pub(crate) const MAX_TEXTS: usize = 2048;

/// What gets scores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClassifyInput {
    /// A text; may be empty.
    Text(String),
    /// Two texts that the model reads together.
    Pair {
        /// The first one.
        first: String,
        /// The second one.
        second: String,
    },
}

/// A request for the scores of texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassifyRequest {
    /// 1 to 2048 texts.
    pub input: Vec<ClassifyInput>,
    /// A model's name; none where the caller left the choice open.
    pub model: Option<String>,
    /// The revision that must answer; none: any.
    pub revision: Option<String>,
    /// Whether texts that are too long are cut instead of refused.
    pub truncate: bool,
    /// Whether the scores are the model's logits.
    pub raw_scores: bool,
    /// How the labels of tokens become entities; only of a model that labels tokens, and none says `none`.
    pub aggregation: Option<Aggregation>,
    /// The priority class.
    pub priority: Priority,
    /// The tenant that the request belongs to; empty: none.
    pub tenant: String,
}

/// The scores of a request's texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Classified {
    /// Unique id of this answer.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the model's files, 64 hex digits.
    pub model_digest: String,
    /// The revision that the server's configuration names; may be empty.
    pub revision: String,
    /// The model's labels, at least one.
    pub labels: Arc<[String]>,
    /// For each text, in order, a score for each label; empty of a model that labels tokens.
    pub scores: Vec<f32>,
    /// For each text, in order, its entities; only of a model that labels tokens.
    pub entities: Option<Vec<Vec<Entity>>>,
    /// Tokens of all texts together.
    pub tokens: u32,
    /// Indices of the texts that were cut, ascending.
    pub truncated: Vec<u32>,
}

/// A label with its score.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LabelScore<'a> {
    /// The label.
    pub label: &'a str,
    /// Its score.
    pub score: f32,
}

impl Classified {
    /// The headers that name what answers.
    #[must_use]
    pub fn head_headers(&self) -> HeaderMap {
        answer_headers(&self.revision, &self.model_digest)
    }

    /// The labels of each text with their scores, highest first, at most `most` of them; of equal scores the
    /// label that the model has first.
    pub fn best(&self, most: Option<u32>) -> impl Iterator<Item = Vec<LabelScore<'_>>> {
        let most = most.map_or(usize::MAX, |most| most as usize);
        self.scores.chunks_exact(self.labels.len().max(1)).map(move |scores| {
            let named = self.labels.iter().zip(scores);
            let mut all: Vec<LabelScore<'_>> =
                named.map(|(label, score)| LabelScore { label, score: *score }).collect();
            all.sort_by(|one, other| other.score.total_cmp(&one.score));
            all.truncate(most);
            all
        })
    }

    /// Refuses what only has a meaning for scores of whole texts.
    pub(crate) fn check_top_k(&self, top_k: Option<u32>) -> Result<(), ApiError> {
        if top_k.is_none() || self.entities.is_none() {
            return Ok(());
        }
        let why = "is for labels of whole texts, and this model labels tokens: leave it out";
        Err(ApiError::field("top_k", why))
    }

    pub(crate) fn into_proto(mut self, most: Option<u32>, latency_ms: f64) -> v1::ClassifyResponse {
        let score = |one: LabelScore<'_>| v1::LabelScore { label: one.label.to_owned(), score: one.score };
        let results = match self.entities.take() {
            Some(entities) => {
                let of_text = |entities: Vec<Entity>| v1::Classification {
                    scores: Vec::new(),
                    entities: entities.into_iter().map(Entity::into_proto).collect(),
                };
                entities.into_iter().map(of_text).collect()
            }
            None => {
                let of_text = |scores: Vec<LabelScore<'_>>| v1::Classification {
                    scores: scores.into_iter().map(score).collect(),
                    entities: Vec::new(),
                };
                self.best(most).map(of_text).collect()
            }
        };
        let usage = Usage { prompt_tokens: self.tokens, completion_tokens: 0 };
        v1::ClassifyResponse {
            results,
            id: self.id,
            model: self.model,
            usage: Some(usage.to_proto()),
            latency_ms,
            model_digest: self.model_digest,
            truncated: self.truncated,
            revision: self.revision,
        }
    }
}

/// A request, and how many labels of each text its answer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AskedClassification {
    pub(crate) request: ClassifyRequest,
    pub(crate) top_k: Option<u32>,
}

/// `POST /v1/classify`.
pub(crate) async fn classify(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let bytes = request_body::read(&parts, body).await?;
    let headers = parts.headers;
    let asked = api.parse(bytes, move |bytes| parse(bytes, &headers)).await?;
    let classified = api.inference.classify(asked.request).await?;
    classified.check_top_k(asked.top_k)?;
    let headers = classified.head_headers();
    let body = answer_body(&classified, asked.top_k, milliseconds(started));
    Ok((headers, axum::Json(body)).into_response())
}

fn parse(bytes: &[u8], headers: &HeaderMap) -> Result<AskedClassification, ApiError> {
    let object = object(bytes, FIELDS, r#"{"input": "Is this spam?"}"#)?;
    let number = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
    let class = priority::of_json(&object)?.or(priority::of_headers(headers)?);
    let aggregation = take(&object, entities::FIELD, "a string", |value| value.as_str().map(str::to_owned))?;
    let request = ClassifyRequest {
        input: inputs(&object)?,
        model: revision::addressed(
            headers,
            take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?
                .filter(|name| !name.is_empty()),
        ),
        revision: revision::of_headers(headers)?,
        truncate: take(&object, "truncate", "true or false", Value::as_bool)?.unwrap_or(true),
        raw_scores: take(&object, "raw_scores", "true or false", Value::as_bool)?.unwrap_or(false),
        aggregation: aggregation.as_deref().map(Aggregation::of_field).transpose()?,
        priority: class.unwrap_or_default(),
        tenant: tenant::of_headers(headers)?.unwrap_or_default(),
    };
    let top_k = take(&object, "top_k", "a whole number from 1 on", number)?;
    AskedClassification { request, top_k }.checked()
}

/// The texts of a body, in one of its two fields.
fn inputs(object: &Map<String, Value>) -> Result<Vec<ClassifyInput>, ApiError> {
    let given = |field: &str| object.get(field).filter(|value| !value.is_null());
    match (given("input"), given("inputs")) {
        (Some(_), Some(_)) => Err(ApiError::field("inputs", "is given beside input: give one of them")),
        (Some(value), None) => input(value),
        (None, Some(value)) => predict_inputs(value),
        (None, None) => Err(ApiError::field("input", "is missing: give a text, or a list of texts")),
    }
}

/// A text, or a list of texts and pairs.
fn input(value: &Value) -> Result<Vec<ClassifyInput>, ApiError> {
    let one = |(index, value): (usize, &Value)| {
        let field = format!("input[{index}]");
        match value {
            Value::String(text) => Ok(ClassifyInput::Text(text.clone())),
            Value::Array(list) => pair(&field, list),
            other => {
                let why = format!("expected a text, or a list of two texts, found {}", found(other));
                Err(ApiError::field(&field, why))
            }
        }
    };
    match value {
        Value::String(text) => Ok(vec![ClassifyInput::Text(text.clone())]),
        Value::Array(list) => list.iter().enumerate().map(one).collect(),
        other => {
            let why = format!("expected a text or a list of texts, found {}", found(other));
            Err(ApiError::field("input", why))
        }
    }
}

/// The form of text-embeddings-inference: a text, a list of one or two texts that are read together, or a
/// list of such lists.
fn predict_inputs(value: &Value) -> Result<Vec<ClassifyInput>, ApiError> {
    match value {
        Value::String(text) => Ok(vec![ClassifyInput::Text(text.clone())]),
        Value::Array(list) if list.first().is_some_and(Value::is_array) => {
            let one = |(index, value): (usize, &Value)| match value {
                Value::Array(list) => pair(&format!("inputs[{index}]"), list),
                other => {
                    let why = format!("expected a list of one or two texts, found {}", found(other));
                    Err(ApiError::field(&format!("inputs[{index}]"), why))
                }
            };
            list.iter().enumerate().map(one).collect()
        }
        Value::Array(list) => Ok(vec![pair("inputs", list)?]),
        other => {
            let why = format!("expected a text, or a list of one or two texts, found {}", found(other));
            Err(ApiError::field("inputs", why))
        }
    }
}

/// One text, or two that are read together.
fn pair(field: &str, list: &[Value]) -> Result<ClassifyInput, ApiError> {
    match list {
        [Value::String(text)] => Ok(ClassifyInput::Text(text.clone())),
        [Value::String(first), Value::String(second)] => {
            Ok(ClassifyInput::Pair { first: first.clone(), second: second.clone() })
        }
        _ => {
            let why = format!(
                "a list of {} is no text and no pair of texts: give one or two texts (several texts go into input)",
                list.len()
            );
            Err(ApiError::field(field, why))
        }
    }
}

impl AskedClassification {
    /// What can be checked without a model.
    fn checked(self) -> Result<Self, ApiError> {
        let count = self.request.input.len();
        if !(1..=MAX_TEXTS).contains(&count) {
            let why = format!("{count} texts are not between 1 and {MAX_TEXTS}; send several requests");
            return Err(ApiError::field("input", why));
        }
        if self.top_k == Some(0) {
            return Err(ApiError::field("top_k", "0 asks for no label: leave it out for all of them"));
        }
        Ok(self)
    }

    /// A message's request. Metadata names the tenant, and the class where the message gives none.
    pub(crate) fn from_proto(request: v1::ClassifyRequest, metadata: &HeaderMap) -> Result<Self, ApiError> {
        let from_metadata = priority::of_headers(metadata)?;
        let aggregation = request.aggregation_strategy.as_deref().map(Aggregation::of_field).transpose()?;
        let v1::ClassifyRequest { input, pairs, truncate, top_k, model, priority, raw_scores, .. } = request;
        if !input.is_empty() && !pairs.is_empty() {
            return Err(ApiError::field("pairs", "is given beside input: give one of them"));
        }
        let pairs =
            pairs.into_iter().map(|v1::TextPair { first, second }| ClassifyInput::Pair { first, second });
        let request = ClassifyRequest {
            input: input.into_iter().map(ClassifyInput::Text).chain(pairs).collect(),
            model: revision::addressed(metadata, Some(model).filter(|name| !name.is_empty())),
            revision: revision::of_headers(metadata)?,
            truncate: truncate.unwrap_or(true),
            raw_scores,
            aggregation,
            priority: priority::of_proto(priority)?.or(from_metadata).unwrap_or_default(),
            tenant: tenant::of_headers(metadata)?.unwrap_or_default(),
        };
        Self { request, top_k }.checked()
    }
}

/// The body of an answer with scores. Written from types, so that an f32 has as many digits as it needs.
#[derive(Serialize)]
pub(crate) struct ScoresBody<'a, T> {
    pub(crate) results: Vec<T>,
    pub(crate) model: &'a str,
    pub(crate) usage: TokensRead,
    pub(crate) id: &'a str,
    pub(crate) model_digest: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) revision: &'a str,
    pub(crate) latency_ms: f64,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    pub(crate) truncated: &'a [u32],
}

/// What a text has: scores of labels, or entities.
#[derive(Serialize)]
#[serde(untagged)]
enum TextResult<'a> {
    Scores { scores: Vec<LabelScore<'a>> },
    Entities { entities: Vec<EntityBody<'a>> },
}

/// Tokens of an answer without new ones.
#[derive(Serialize)]
pub(crate) struct TokensRead {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl TokensRead {
    pub(crate) const fn of(count: u32) -> Self {
        Self { prompt_tokens: count, total_tokens: count }
    }
}

fn answer_body(
    classified: &Classified,
    most: Option<u32>,
    latency_ms: f64,
) -> ScoresBody<'_, TextResult<'_>> {
    let results = match &classified.entities {
        None => classified.best(most).map(|scores| TextResult::Scores { scores }).collect(),
        Some(entities) => {
            let bodies = entities.iter().map(|own| own.iter().map(Entity::body).collect());
            bodies.map(|entities| TextResult::Entities { entities }).collect()
        }
    };
    ScoresBody {
        results,
        model: &classified.model,
        usage: TokensRead::of(classified.tokens),
        id: &classified.id,
        model_digest: &classified.model_digest,
        revision: &classified.revision,
        latency_ms,
        truncated: &classified.truncated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::test_client;
    use axum::http::StatusCode;
    use serde_json::json;

    async fn post(fake: &Fake, body: Value) -> (StatusCode, Value) {
        test_client::send(fake, Request::post("/v1/classify"), body.to_string()).await.status_and_json()
    }

    fn text(text: &str) -> ClassifyInput {
        ClassifyInput::Text(text.into())
    }

    fn pair_of(first: &str, second: &str) -> ClassifyInput {
        ClassifyInput::Pair { first: first.into(), second: second.into() }
    }

    #[tokio::test]
    async fn every_text_has_its_labels_best_first() {
        let fake = Fake::with(Script::tokens(&[]));
        let (status, body) = post(&fake, json!({"input": ["a", "b"]})).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let scores = json!([{"label": "SPAM", "score": 0.75}, {"label": "HAM", "score": 0.25}]);
        assert_eq!(body["results"][0]["scores"], scores);
        assert_eq!(body["results"].as_array().unwrap().len(), 2);
        assert_eq!(body["usage"], json!({"prompt_tokens": 6, "total_tokens": 6}));
        assert_eq!(
            (&body["model"], &body["revision"], &body["truncated"]),
            (&json!("fake"), &json!("r1"), &json!([0]),)
        );
        let (_, best) = post(&fake, json!({"input": "a", "top_k": 1, "raw_scores": true})).await;
        assert_eq!(best["results"], json!([{"scores": [scores[0]]}]));
        assert!(fake.last_classification().raw_scores && fake.last_classification().truncate);
    }

    #[tokio::test]
    async fn labels_of_tokens_are_entities() {
        let fake = Fake::with(Script::tokens(&[]));
        let body = json!({"input": ["a", "b"], "aggregation_strategy": "simple"});
        let (status, answer) = post(&fake, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let entity = json!({"entity_group": "PER", "score": 0.75, "word": "a", "start": 0, "end": 1});
        assert_eq!(answer["results"], json!([{"entities": [entity]}, {"entities": [entity]}]));
        assert_eq!(fake.last_classification().aggregation, Some(Aggregation::Simple));
        let cases = [
            (json!({"input": "a", "aggregation_strategy": "mean"}), "aggregation_strategy: it must be none"),
            (json!({"input": "a", "aggregation_strategy": 1}), "aggregation_strategy: "),
            (
                json!({"input": "a", "aggregation_strategy": "max", "top_k": 1}),
                "top_k: is for labels of whole",
            ),
        ];
        for (body, wanted) in cases {
            let (status, answer) = post(&fake, body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.starts_with(wanted), "{message}");
        }
    }

    #[tokio::test]
    async fn both_forms_of_requests_are_read() {
        let fake = Fake::with(Script::tokens(&[]));
        let cases = [
            (json!({"input": "a"}), vec![text("a")]),
            (json!({"input": ["a", ["b", "c"], ["d"]]}), vec![text("a"), pair_of("b", "c"), text("d")]),
            (json!({"inputs": "a"}), vec![text("a")]),
            (json!({"inputs": ["a", "b"]}), vec![pair_of("a", "b")]),
            (json!({"inputs": [["a"], ["b", "c"]]}), vec![text("a"), pair_of("b", "c")]),
        ];
        for (body, wanted) in cases {
            let (status, answer) = post(&fake, body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{body}: {answer}");
            assert_eq!(fake.last_classification().input, wanted, "{body}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_refused_by_its_field() {
        let fake = Fake::with(Script::tokens(&[]));
        let cases = [
            (json!({}), "input: is missing"),
            (json!({"input": []}), "input: 0 texts"),
            (json!({"input": vec!["a"; 2049]}), "input: 2049 texts are not between 1 and 2048"),
            (json!({"input": [1]}), "input[0]: expected a text, or a list of two texts"),
            (json!({"input": [["a", "b", "c"]]}), "input[0]: a list of 3"),
            (json!({"inputs": ["a", "b", "c"]}), "inputs: a list of 3"),
            (json!({"input": "a", "inputs": "b"}), "inputs: is given beside input"),
            (json!({"input": "a", "top_k": 0}), "top_k: 0 asks for no label"),
            (json!({"input": "a", "top_n": 1}), "top_n: there is no such field"),
        ];
        for (body, wanted) in cases {
            let (status, answer) = post(&fake, body).await;
            assert_eq!(status, StatusCode::BAD_REQUEST);
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.starts_with(wanted), "{message}");
        }
    }

    #[test]
    fn messages_become_the_same_request() {
        let message = v1::ClassifyRequest {
            pairs: vec![v1::TextPair { first: "a".into(), second: "b".into() }],
            top_k: Some(1),
            truncate: Some(false),
            model: "m".into(),
            aggregation_strategy: Some("max".into()),
            ..Default::default()
        };
        let asked = AskedClassification::from_proto(message.clone(), &HeaderMap::new()).unwrap();
        assert_eq!((asked.request.input, asked.top_k), (vec![pair_of("a", "b")], Some(1)));
        assert_eq!(asked.request.aggregation, Some(Aggregation::Max));
        assert!(!asked.request.truncate && asked.request.model.as_deref() == Some("m"));
        let both = v1::ClassifyRequest { input: vec!["c".into()], ..message };
        let error = AskedClassification::from_proto(both, &HeaderMap::new()).unwrap_err().to_string();
        assert!(error.starts_with("pairs: is given beside input"), "{error}");
        assert!(AskedClassification::from_proto(v1::ClassifyRequest::default(), &HeaderMap::new()).is_err());
    }
}
