//! Documents ordered by how well they answer a query: the request and the answer, `POST /v1/rerank`, and the
//! gRPC messages.
//!
//! Requests are read in the words of Cohere and Jina (`documents`, `top_n`, `return_documents`) and of
//! text-embeddings-inference (`texts`, `raw_scores`, `return_text`). Answers have each score under the names
//! that both kinds of clients read.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use trustformers_proto::v1;

use crate::classify::{ScoresBody, TokensRead};
use crate::error::ApiError;
use crate::http::generate::milliseconds;
use crate::inference::Usage;
use crate::json_body::{found, object, take};
use crate::priority::{self, Priority};
use crate::revision::{self, answer_headers};
use crate::{Api, request_body, tenant};

/// The fields of a request.
pub(crate) const FIELDS: &[&str] = &[
    "query",
    "documents",
    "texts",
    "model",
    "top_n",
    "return_documents",
    "return_text",
    "raw_scores",
    "truncate",
    "priority",
];

/// Documents of one request: the limit of Cohere's API.
pub(crate) const MAX_DOCUMENTS: usize = 1000;

/// Bytes of all pairs of query and document. The query is read again with each document: 8 MiB are some two
/// million tokens, which take seconds to make and hours to compute for most models.
const MAX_PAIR_BYTES: usize = 8 * 1024 * 1024;

/// A request for an order of documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RerankRequest {
    /// What the documents are compared with; not empty.
    pub query: String,
    /// 1 to 1000 documents; at most 8 MiB where the query counts with each of them.
    pub documents: Vec<String>,
    /// A model's name; none where the caller left the choice open.
    pub model: Option<String>,
    /// The revision that must answer; none: any.
    pub revision: Option<String>,
    /// Whether documents that are too long are cut instead of refused.
    pub truncate: bool,
    /// Whether the scores are the model's logits.
    pub raw_scores: bool,
    /// The priority class.
    pub priority: Priority,
    /// The tenant that the request belongs to; empty: none.
    pub tenant: String,
}

/// The scores of a request's documents.
#[derive(Debug, Clone, PartialEq)]
pub struct Reranked {
    /// Unique id of this answer.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the model's files, 64 hex digits.
    pub model_digest: String,
    /// The revision that the server's configuration names; may be empty.
    pub revision: String,
    /// One for each document, in the order of the request.
    pub scores: Vec<f32>,
    /// Tokens of all pairs together.
    pub tokens: u32,
    /// Indices of the documents that were cut, or whose query was, ascending.
    pub truncated: Vec<u32>,
}

/// A document with its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedIndex {
    /// The place of the document in the request.
    pub index: usize,
    /// Its score.
    pub score: f32,
}

impl Reranked {
    /// The headers that name what answers.
    #[must_use]
    pub fn head_headers(&self) -> HeaderMap {
        answer_headers(&self.revision, &self.model_digest)
    }

    /// The documents, best first, at most `most` of them; of equal scores the one that stands first.
    #[must_use]
    pub fn best(&self, most: Option<u32>) -> Vec<RankedIndex> {
        let scores = self.scores.iter().enumerate();
        let mut all: Vec<RankedIndex> =
            scores.map(|(index, score)| RankedIndex { index, score: *score }).collect();
        all.sort_by(|one, other| other.score.total_cmp(&one.score));
        all.truncate(most.map_or(usize::MAX, |most| most as usize));
        all
    }
}

/// What the answer shows of the order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShownOrder {
    /// Documents of the answer; none: all.
    pub(crate) top_n: Option<u32>,
    /// The documents, where the answer repeats them.
    documents: Option<Vec<String>>,
}

impl ShownOrder {
    fn document(&self, index: usize) -> Option<&str> {
        self.documents.as_ref().and_then(|documents| documents.get(index)).map(String::as_str)
    }

    pub(crate) fn into_proto(self, reranked: Reranked, latency_ms: f64) -> v1::RerankResponse {
        let ranked = |RankedIndex { index, score }| v1::RankedDocument {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            score,
            document: self.document(index).map(str::to_owned),
        };
        let results = reranked.best(self.top_n).into_iter().map(ranked).collect();
        let usage = Usage { prompt_tokens: reranked.tokens, completion_tokens: 0 };
        v1::RerankResponse {
            results,
            id: reranked.id,
            model: reranked.model,
            usage: Some(usage.to_proto()),
            latency_ms,
            model_digest: reranked.model_digest,
            truncated: reranked.truncated,
            revision: reranked.revision,
        }
    }
}

/// A request, and what its answer shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AskedOrder {
    pub(crate) request: RerankRequest,
    pub(crate) shown: ShownOrder,
}

/// `POST /v1/rerank`.
pub(crate) async fn rerank(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let bytes = request_body::read(&parts, body).await?;
    let headers = parts.headers;
    let AskedOrder { request, shown } = api.parse(bytes, move |bytes| parse(bytes, &headers)).await?;
    let reranked = api.inference.rerank(request).await?;
    let headers = reranked.head_headers();
    let body = answer_body(&reranked, &shown, milliseconds(started));
    Ok((headers, axum::Json(body)).into_response())
}

fn parse(bytes: &[u8], headers: &HeaderMap) -> Result<AskedOrder, ApiError> {
    let object =
        object(bytes, FIELDS, r#"{"query": "What is a panda?", "documents": ["A bear.", "A car."]}"#)?;
    let number = |value: &Value| value.as_u64().and_then(|count| u32::try_from(count).ok());
    let string = |value: &Value| value.as_str().map(str::to_owned);
    let class = priority::of_json(&object)?.or(priority::of_headers(headers)?);
    let flag = |field: &str| take(&object, field, "true or false", Value::as_bool);
    let repeats = flag("return_documents")?.or(flag("return_text")?).unwrap_or(false);
    let query = take(&object, "query", "a string", string)?
        .ok_or_else(|| ApiError::field("query", "is missing: give what the documents are to answer"))?;
    let request = RerankRequest {
        query,
        documents: documents(&object)?,
        model: revision::addressed(
            headers,
            take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?
                .filter(|name| !name.is_empty()),
        ),
        revision: revision::of_headers(headers)?,
        truncate: flag("truncate")?.unwrap_or(true),
        raw_scores: flag("raw_scores")?.unwrap_or(false),
        priority: class.unwrap_or_default(),
        tenant: tenant::of_headers(headers)?.unwrap_or_default(),
    };
    AskedOrder::checked(request, take(&object, "top_n", "a whole number from 1 on", number)?, repeats)
}

/// The documents of a body, in one of its two fields: texts, or objects with a `text`.
fn documents(object: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let given =
        |field: &'static str| object.get(field).filter(|value| !value.is_null()).map(|value| (field, value));
    let (field, value) = match (given("documents"), given("texts")) {
        (Some(_), Some(_)) => {
            return Err(ApiError::field("texts", "is given beside documents: give one of them"));
        }
        (Some(given), None) | (None, Some(given)) => given,
        (None, None) => return Err(ApiError::field("documents", "is missing: give a list of texts")),
    };
    let Value::Array(list) = value else {
        return Err(ApiError::field(field, format!("expected a list of texts, found {}", found(value))));
    };
    let one = |(index, value): (usize, &Value)| {
        let text = match value {
            Value::Object(document) => document.get("text").and_then(Value::as_str),
            other => other.as_str(),
        };
        text.map(str::to_owned).ok_or_else(|| {
            let why = format!("expected a text, or an object with a text, found {}", found(value));
            ApiError::field(&format!("{field}[{index}]"), why)
        })
    };
    list.iter().enumerate().map(one).collect()
}

impl RerankRequest {
    /// What can be checked without a model.
    pub(crate) fn checked(self) -> Result<Self, ApiError> {
        if self.query.is_empty() {
            return Err(ApiError::field("query", "is empty: give what the documents are to answer"));
        }
        let count = self.documents.len();
        if !(1..=MAX_DOCUMENTS).contains(&count) {
            let why =
                format!("{count} documents are not between 1 and {MAX_DOCUMENTS}; send several requests");
            return Err(ApiError::field("documents", why));
        }
        let own: usize = self.documents.iter().map(String::len).sum();
        let bytes = own.saturating_add(self.query.len().saturating_mul(count));
        if bytes > MAX_PAIR_BYTES {
            let why = format!(
                "{count} documents of {own} bytes together, each read with a query of {}, are {bytes} bytes; at most \
                 {MAX_PAIR_BYTES} are accepted: shorten the query, or send several requests",
                self.query.len()
            );
            return Err(ApiError::field("documents", why));
        }
        Ok(self)
    }
}

impl AskedOrder {
    fn checked(request: RerankRequest, top_n: Option<u32>, repeats: bool) -> Result<Self, ApiError> {
        let request = request.checked()?;
        if top_n == Some(0) {
            return Err(ApiError::field("top_n", "0 asks for no document: leave it out for all of them"));
        }
        let documents = repeats.then(|| request.documents.clone());
        Ok(Self { request, shown: ShownOrder { top_n, documents } })
    }

    /// A message's request. Metadata names the tenant, and the class where the message gives none.
    pub(crate) fn from_proto(request: v1::RerankRequest, metadata: &HeaderMap) -> Result<Self, ApiError> {
        let from_metadata = priority::of_headers(metadata)?;
        let v1::RerankRequest {
            query,
            documents,
            truncate,
            top_n,
            model,
            priority,
            raw_scores,
            return_documents,
        } = request;
        let request = RerankRequest {
            query,
            documents,
            model: revision::addressed(metadata, Some(model).filter(|name| !name.is_empty())),
            revision: revision::of_headers(metadata)?,
            truncate: truncate.unwrap_or(true),
            raw_scores,
            priority: priority::of_proto(priority)?.or(from_metadata).unwrap_or_default(),
            tenant: tenant::of_headers(metadata)?.unwrap_or_default(),
        };
        Self::checked(request, top_n, return_documents)
    }
}

#[derive(Serialize)]
struct RankedItem<'a> {
    index: usize,
    score: f32,
    /// The same, as clients of Cohere and Jina read it.
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<DocumentText<'a>>,
}

#[derive(Serialize)]
struct DocumentText<'a> {
    text: &'a str,
}

fn answer_body<'a>(
    reranked: &'a Reranked,
    shown: &'a ShownOrder,
    latency_ms: f64,
) -> ScoresBody<'a, RankedItem<'a>> {
    let item = |RankedIndex { index, score }| RankedItem {
        index,
        score,
        relevance_score: score,
        document: shown.document(index).map(|text| DocumentText { text }),
    };
    ScoresBody {
        results: reranked.best(shown.top_n).into_iter().map(item).collect(),
        model: &reranked.model,
        usage: TokensRead::of(reranked.tokens),
        id: &reranked.id,
        model_digest: &reranked.model_digest,
        revision: &reranked.revision,
        latency_ms,
        truncated: &reranked.truncated,
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
        test_client::send(fake, Request::post("/v1/rerank"), body.to_string()).await.status_and_json()
    }

    #[tokio::test]
    async fn documents_come_best_first_and_as_many_as_are_asked_for() {
        let fake = Fake::with(Script::tokens(&[]));
        let documents = ["a", "b", "c"];
        let (status, body) = post(&fake, json!({"query": "q", "documents": documents})).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        // The later a document, the better the fake likes it.
        let results = json!([
            {"index": 2, "score": 0.5, "relevance_score": 0.5},
            {"index": 1, "score": 0.25, "relevance_score": 0.25},
            {"index": 0, "score": 0.0, "relevance_score": 0.0},
        ]);
        assert_eq!((&body["results"], &body["usage"]["total_tokens"]), (&results, &json!(9)));
        let asked = json!({"query": "q", "documents": documents, "top_n": 1, "return_documents": true});
        let (_, best) = post(&fake, asked).await;
        let wanted = json!([{"index": 2, "score": 0.5, "relevance_score": 0.5, "document": {"text": "c"}}]);
        assert_eq!(best["results"], wanted);
    }

    #[tokio::test]
    async fn both_forms_of_requests_are_read() {
        let fake = Fake::with(Script::tokens(&[]));
        let cases = [
            json!({"query": "q", "documents": ["a", {"text": "b", "id": 7}], "model": "fake"}),
            json!({"query": "q", "texts": ["a", "b"], "raw_scores": false, "return_text": false}),
        ];
        for body in cases {
            let (status, answer) = post(&fake, body).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let asked = fake.last_order();
            assert_eq!((asked.query.as_str(), asked.documents), ("q", vec!["a".into(), "b".into()]));
        }
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_refused_by_its_field() {
        let fake = Fake::with(Script::tokens(&[]));
        let cases = [
            (json!({"documents": ["a"]}), "query: is missing"),
            (json!({"query": "", "documents": ["a"]}), "query: is empty"),
            (json!({"query": "q"}), "documents: is missing"),
            (json!({"query": "q", "documents": []}), "documents: 0 documents"),
            (
                json!({"query": "q", "documents": vec!["a"; 1001]}),
                "documents: 1001 documents are not between",
            ),
            (json!({"query": "q", "documents": "a"}), "documents: expected a list of texts"),
            (json!({"query": "q", "texts": [{"title": "a"}]}), "texts[0]: expected a text, or an object"),
            (json!({"query": "q", "documents": ["a"], "texts": ["b"]}), "texts: is given beside documents"),
            (json!({"query": "q", "documents": ["a"], "top_n": 0}), "top_n: 0 asks for no document"),
            (
                json!({"query": "q".repeat(10_000), "documents": vec!["a"; 1000]}),
                "documents: 1000 documents of 1000",
            ),
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
        let message = v1::RerankRequest {
            query: "q".into(),
            documents: vec!["a".into(), "b".into()],
            top_n: Some(1),
            return_documents: true,
            ..Default::default()
        };
        let asked = AskedOrder::from_proto(message, &HeaderMap::new()).unwrap();
        let reranked = Reranked {
            id: "rnk-1".into(),
            model: "m".into(),
            model_digest: "d".into(),
            revision: String::new(),
            scores: vec![0.5, 0.5],
            tokens: 8,
            truncated: vec![1],
        };
        let answer = asked.shown.into_proto(reranked, 1.0);
        let best = v1::RankedDocument { index: 0, score: 0.5, document: Some("a".into()) };
        assert_eq!((answer.results, answer.truncated), (vec![best], vec![1]));
        assert!(AskedOrder::from_proto(v1::RerankRequest::default(), &HeaderMap::new()).is_err());
    }
}
