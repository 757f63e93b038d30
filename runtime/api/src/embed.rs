//! Embeddings: the request and the answer, `POST /v1/embeddings` in OpenAI's shape, and the gRPC messages.
//!
//! The answer has two more fields than OpenAI's: how vectors were pooled and which texts were cut. Both
//! decide what a vector means.

use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use trustformers_proto::v1;

use crate::classify::TokensRead;
use crate::error::ApiError;
use crate::http::generate::milliseconds;
use crate::inference::Usage;
use crate::json_body::{found, object, take};
use crate::priority::{self, Priority};
use crate::revision::{self, answer_headers};
use crate::{Api, request_body, tenant};

/// The fields of a request. `user` is OpenAI's name of an end user; it changes nothing, as it does there.
pub(crate) const FIELDS: &[&str] =
    &["input", "model", "encoding_format", "dimensions", "truncate", "priority", "user"];

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmbedInput {
    /// As it is written; may be empty.
    Text(String),
    /// As token ids, special tokens and all.
    Tokens(Vec<u32>),
}

/// A request for vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbedRequest {
    /// At least one text.
    pub input: Vec<EmbedInput>,
    /// A model's name; none where the caller left the choice open.
    pub model: Option<String>,
    /// The revision that must answer; none: any.
    pub revision: Option<String>,
    /// Whether texts that are too long are cut instead of refused.
    pub truncate: bool,
    /// Values that each vector is to have; none: what the model gives.
    pub dimensions: Option<u32>,
    /// The priority class.
    pub priority: Priority,
    /// The tenant that the request belongs to; empty: none.
    pub tenant: String,
}

/// How the tokens of a text become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingMode {
    /// The mean over all tokens.
    Mean,
    /// The first token, `[CLS]`. The word in answers is `first`.
    Cls,
    /// The largest of each column.
    Max,
    /// The last token.
    Last,
}

impl PoolingMode {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "first",
            Self::Max => "max",
            Self::Last => "last",
        }
    }
}

/// The vectors of a request's texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedded {
    /// Unique id of this answer.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the model's files, 64 hex digits.
    pub model_digest: String,
    /// The revision that the server's configuration names; may be empty.
    pub revision: String,
    /// One vector for each text, in order, each of `width` values.
    pub values: Vec<f32>,
    /// Values of a vector, at least 1.
    pub width: usize,
    /// Tokens of all texts together.
    pub tokens: u32,
    /// Indices of the texts that were cut, ascending.
    pub truncated: Vec<u32>,
    /// How vectors were made of tokens.
    pub pooling: PoolingMode,
    /// A note about the pooling, where the model's files do not configure it.
    pub pooling_note: Option<String>,
}

/// An answer of more values is written away from the threads that serve connections: a million values take
/// some tens of milliseconds, and this many about one.
const VALUES_AT_ONCE: usize = 32 * 1024;

/// `POST /v1/embeddings`.
pub(crate) async fn embeddings(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let bytes = request_body::read(&parts, body).await?;
    let headers = parts.headers;
    let (asked, encoding) = api.parse(bytes, move |bytes| parse(bytes, &headers)).await?;
    let embedded = api.inference.embed(asked).await?;
    let headers = embedded.head_headers();
    let many = embedded.values.len() > VALUES_AT_ONCE;
    let failed = |why: String| ApiError::Internal { message: format!("the answer cannot be written: {why}") };
    let write = move || serde_json::to_vec(&AnswerBody::new(&embedded, encoding, milliseconds(started)));
    let json = if many { api.large_bodies.run(write).await? } else { write() };
    let json = json.map_err(|error| failed(error.to_string()))?;
    let content_type = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((headers, content_type, json).into_response())
}

/// How vectors are written in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

fn parse(bytes: &[u8], headers: &HeaderMap) -> Result<(EmbedRequest, Encoding), ApiError> {
    let object = object(bytes, FIELDS, r#"{"input": "Hello, world!"}"#)?;
    let number = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
    let encoding =
        take(&object, "encoding_format", "\"float\" or \"base64\"", |value| match value.as_str() {
            Some("float") => Some(Encoding::Float),
            Some("base64") => Some(Encoding::Base64),
            _ => None,
        })?;
    let _who: Option<()> = take(&object, "user", "a string", |value| value.is_string().then_some(()))?;
    let class = priority::of_json(&object)?.or(priority::of_headers(headers)?);
    let request = EmbedRequest {
        input: input(&object)?,
        model: revision::addressed(
            headers,
            take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?
                .filter(|name| !name.is_empty()),
        ),
        revision: revision::of_headers(headers)?,
        truncate: take(&object, "truncate", "true or false", Value::as_bool)?.unwrap_or(true),
        dimensions: take(&object, "dimensions", "a whole number from 1 on", number)?,
        priority: class.unwrap_or_default(),
        tenant: tenant::of_headers(headers)?.unwrap_or_default(),
    };
    request.check()?;
    Ok((request, encoding.unwrap_or(Encoding::Float)))
}

/// A text, a list of texts, the ids of one text, or a list of the ids of several.
fn input(object: &Map<String, Value>) -> Result<Vec<EmbedInput>, ApiError> {
    let expected = "a text, a list of texts, or token ids";
    let list = match object.get("input") {
        None | Some(Value::Null) => {
            return Err(ApiError::field("input", format!("is missing: give {expected}")));
        }
        Some(Value::String(text)) => return Ok(vec![EmbedInput::Text(text.clone())]),
        Some(Value::Array(list)) => list,
        Some(other) => {
            let found = found(other);
            return Err(ApiError::field("input", format!("expected {expected}, found {found}")));
        }
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![EmbedInput::Tokens(token_ids("input", list)?)]);
    }
    let one = |(index, value): (usize, &Value)| match value {
        Value::String(text) => Ok(EmbedInput::Text(text.clone())),
        Value::Array(list) => Ok(EmbedInput::Tokens(token_ids(&format!("input[{index}]"), list)?)),
        other => {
            let why = format!("expected a text or a list of token ids, found {}", found(other));
            Err(ApiError::field(&format!("input[{index}]"), why))
        }
    };
    list.iter().enumerate().map(one).collect()
}

pub(crate) fn token_ids(field: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |(index, value): (usize, &Value)| {
        value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            ApiError::field(
                &format!("{field}[{index}]"),
                format!("expected a token id, found {}", found(value)),
            )
        })
    };
    list.iter().enumerate().map(id).collect()
}

impl EmbedRequest {
    /// What can be checked without a model.
    fn check(&self) -> Result<(), ApiError> {
        if self.input.is_empty() {
            return Err(ApiError::field("input", "is empty: give at least one text"));
        }
        if self.dimensions == Some(0) {
            return Err(ApiError::field("dimensions", "0 is no length of a vector: leave it out"));
        }
        Ok(())
    }

    /// A message's request. Metadata names the tenant, and the class where the message gives none.
    pub(crate) fn from_proto(request: v1::EmbedRequest, metadata: &HeaderMap) -> Result<Self, ApiError> {
        let from_metadata = priority::of_headers(metadata)?;
        let v1::EmbedRequest { input, input_tokens, truncate, dimensions, model, priority } = request;
        if !input.is_empty() && !input_tokens.is_empty() {
            return Err(ApiError::field("input_tokens", "is given beside input: give one of them"));
        }
        let texts = input.into_iter().map(EmbedInput::Text);
        let tokens = input_tokens.into_iter().map(|tokens| EmbedInput::Tokens(tokens.ids));
        let request = Self {
            input: texts.chain(tokens).collect(),
            model: revision::addressed(metadata, Some(model).filter(|name| !name.is_empty())),
            revision: revision::of_headers(metadata)?,
            truncate: truncate.unwrap_or(true),
            dimensions,
            priority: priority::of_proto(priority)?.or(from_metadata).unwrap_or_default(),
            tenant: tenant::of_headers(metadata)?.unwrap_or_default(),
        };
        request.check()?;
        Ok(request)
    }
}

impl Embedded {
    /// The headers that name what answers.
    #[must_use]
    pub fn head_headers(&self) -> HeaderMap {
        answer_headers(&self.revision, &self.model_digest)
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.width.max(1))
    }

    pub(crate) fn into_proto(self, latency_ms: f64) -> v1::EmbedResponse {
        let data = self.rows().map(|values| v1::Embedding { values: values.to_vec() }).collect();
        let usage = Usage { prompt_tokens: self.tokens, completion_tokens: 0 };
        let pooling = match self.pooling {
            PoolingMode::Mean => v1::Pooling::Mean,
            PoolingMode::Cls => v1::Pooling::First,
            PoolingMode::Max => v1::Pooling::Max,
            PoolingMode::Last => v1::Pooling::Last,
        };
        v1::EmbedResponse {
            data,
            id: self.id,
            model: self.model,
            usage: Some(usage.to_proto()),
            latency_ms,
            model_digest: self.model_digest,
            revision: self.revision,
            pooling: pooling as i32,
            pooling_note: self.pooling_note.unwrap_or_default(),
            truncated: self.truncated,
        }
    }
}

/// The body of an answer. Written from types, not from JSON values: an f32 then has as many digits as it
/// needs.
#[derive(Serialize)]
struct AnswerBody<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: TokensRead,
    id: &'a str,
    model_digest: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    revision: &'a str,
    latency_ms: f64,
    pooling: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pooling_note: Option<&'a str>,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    truncated: &'a [u32],
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Floats(&'a [f32]),
    /// The values' bytes, little-endian.
    Base64(String),
}

impl<'a> AnswerBody<'a> {
    fn new(embedded: &'a Embedded, encoding: Encoding, latency_ms: f64) -> Self {
        let vector = |values: &'a [f32]| match encoding {
            Encoding::Float => Vector::Floats(values),
            Encoding::Base64 => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
        };
        let item = |(index, values)| Item { object: "embedding", index, embedding: vector(values) };
        Self {
            object: "list",
            data: embedded.rows().enumerate().map(item).collect(),
            model: &embedded.model,
            usage: TokensRead::of(embedded.tokens),
            id: &embedded.id,
            model_digest: &embedded.model_digest,
            revision: &embedded.revision,
            latency_ms,
            pooling: embedded.pooling.as_str(),
            pooling_note: embedded.pooling_note.as_deref(),
            truncated: &embedded.truncated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::test_client;
    use axum::http::StatusCode;
    use serde_json::json;

    async fn post(fake: &Fake, body: &str, class: Option<&str>) -> (StatusCode, Value) {
        let mut request = Request::post("/v1/embeddings").header(tenant::TENANT_HEADER, "team-1");
        if let Some(class) = class {
            request = request.header(priority::PRIORITY_HEADER, class);
        }
        test_client::send(fake, request, body.to_owned()).await.status_and_json()
    }

    fn fake() -> Fake {
        Fake::with(Script::tokens(&[]))
    }

    #[tokio::test]
    async fn an_answer_has_the_shape_of_openai_and_names_its_pooling() {
        let (status, body) = post(&fake(), r#"{"input": ["a", ""], "user": "me"}"#, None).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        assert_eq!(body["object"], "list");
        assert_eq!(
            body["data"],
            json!([
                {"object": "embedding", "index": 0, "embedding": [0.0, 0.1]},
                {"object": "embedding", "index": 1, "embedding": [1.0, 0.1]},
            ])
        );
        assert_eq!(body["usage"], json!({"prompt_tokens": 6, "total_tokens": 6}));
        assert_eq!((&body["model"], &body["model_digest"]), (&json!("fake"), &json!("d1")));
        assert_eq!((&body["pooling"], &body["pooling_note"]), (&json!("mean"), &json!("not configured")));
        assert_eq!(body["truncated"], json!([0]));
    }

    #[tokio::test]
    async fn base64_holds_the_bytes_of_the_values() {
        let (_, body) = post(&fake(), r#"{"input": "a", "encoding_format": "base64"}"#, None).await;
        let bytes = STANDARD.decode(body["data"][0]["embedding"].as_str().unwrap()).unwrap();
        assert_eq!(bytes, [0f32.to_le_bytes(), 0.1f32.to_le_bytes()].concat());
    }

    #[tokio::test]
    async fn every_form_of_input_and_every_field_arrives() {
        let text = |text: &str| EmbedInput::Text(text.into());
        for (input, wanted) in [
            (json!("a"), vec![text("a")]),
            (json!(""), vec![text("")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([3, 4]), vec![EmbedInput::Tokens(vec![3, 4])]),
            (json!([[3, 4], [5]]), vec![EmbedInput::Tokens(vec![3, 4]), EmbedInput::Tokens(vec![5])]),
            (json!(["a", [5]]), vec![text("a"), EmbedInput::Tokens(vec![5])]),
        ] {
            let fake = fake();
            let body = json!({"input": input, "model": "m", "dimensions": 2, "truncate": false});
            assert_eq!(post(&fake, &body.to_string(), Some("low")).await.0, StatusCode::OK);
            let asked = fake.last_embedding();
            assert_eq!((asked.input, asked.model.as_deref()), (wanted, Some("m")));
            assert_eq!((asked.dimensions, asked.truncate, asked.priority), (Some(2), false, Priority::Low));
        }
        let fake = fake();
        post(&fake, r#"{"input": "a", "priority": "high", "model": ""}"#, Some("low")).await;
        let asked = fake.last_embedding();
        assert_eq!((asked.priority, asked.truncate, asked.model), (Priority::High, true, None));
        assert_eq!(asked.tenant, "team-1");
    }

    #[tokio::test]
    async fn what_is_wrong_is_named() {
        for (body, field, text) in [
            (r#"{}"#, "input", "is missing"),
            (r#"{"input": null}"#, "input", "is missing"),
            (r#"{"input": []}"#, "input", "is empty"),
            (r#"{"input": 3}"#, "input", "expected a text, a list of texts"),
            (r#"{"input": ["a", 3]}"#, "input[1]", "expected a text or a list of token ids, found 3"),
            (r#"{"input": [3, "a"]}"#, "input[1]", "expected a token id"),
            (r#"{"input": [[3, -1]]}"#, "input[0][1]", "expected a token id, found -1"),
            (r#"{"input": "a", "encoding_format": "hex"}"#, "encoding_format", "\"base64\""),
            (r#"{"input": "a", "dimensions": 0}"#, "dimensions", "0 is no length"),
            (r#"{"input": "a", "priority": "urgent"}"#, "priority", "\"normal\""),
            (r#"{"inputs": "a"}"#, "inputs", "\"input\""),
        ] {
            let (status, answer) = post(&fake(), body, None).await;
            let error = &answer["error"];
            assert_eq!((status, &error["field"]), (StatusCode::BAD_REQUEST, &json!(field)), "{answer}");
            assert!(error["message"].as_str().unwrap().contains(text), "{answer}");
        }
        let (_, answer) = post(&fake(), r#"{"input": "a"}"#, Some("x")).await;
        assert_eq!(answer["error"]["field"], priority::PRIORITY_HEADER);
    }

    #[tokio::test]
    async fn refusals_keep_their_status_and_leaving_cancels() {
        let error = ApiError::WrongTask { model: "m".into(), task: trustformers_proto::Task::Generate };
        let (status, body) = post(&Fake::with(Script::refused(error)), r#"{"input": "a"}"#, None).await;
        assert_eq!((status, &body["error"]["code"]), (StatusCode::BAD_REQUEST, &json!("wrong_task")));
        assert!(body["error"]["message"].as_str().unwrap().contains("POST /v1/generate"), "{body}");
        let fake = Fake::with(Script::tokens(&[]).then_hangs());
        let asking = fake.clone();
        let pending = tokio::spawn(async move { post(&asking, r#"{"input": "a"}"#, None).await });
        fake.until_running(1).await;
        pending.abort();
        fake.until_running(0).await;
    }
}
