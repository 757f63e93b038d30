//! Runs a prepared request and makes tensors of what the model answers.

use std::time::Duration;

use axum::http::HeaderMap;
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::BoxStream;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout_at};

use super::infer::{InferAnswer, InferWork, PreparedInfer};
use super::scores::{classified_tensors, reranked_tensors, token_parameter, truncated_tensor};
use super::statistics::Outcome;
use super::tensors::{OutputData, OutputTensor};
use crate::Api;
use crate::embed::Embedded;
use crate::error::ApiError;
use crate::fields::Generation;
use crate::inference::{Event, FinishReason, Inference, Usage};

/// An answer with the headers that name what gave it.
pub(crate) struct WholeAnswer {
    pub(crate) headers: HeaderMap,
    pub(crate) answer: InferAnswer,
}

/// An answer in parts, of which the first one exists.
pub(crate) struct AnswerParts {
    pub(crate) headers: HeaderMap,
    /// The parts; after an error nothing follows.
    pub(crate) parts: BoxStream<'static, Result<InferAnswer, ApiError>>,
}

/// The events of an answer.
type Events = BoxStream<'static, Result<Event, ApiError>>;

/// The whole answer to one prompt.
struct GeneratedText {
    headers: HeaderMap,
    text: String,
    reason: FinishReason,
    usage: Usage,
}

impl PreparedInfer {
    /// Runs the request to its end.
    ///
    /// # Errors
    /// What the server of models answers; a request for pieces; the request's own timeout.
    pub(crate) async fn answer(self, api: &Api) -> Result<WholeAnswer, ApiError> {
        if self.stream == Some(true) {
            let why =
                "true asks for pieces, which ModelStreamInfer and generate_stream give; leave it out here";
            return Err(ApiError::field("stream", why));
        }
        let outcome = Outcome::new(&self.head.model_name, self.work.items());
        let deadline = deadline_of(self.timeout);
        let answer = within(deadline, self.run(api.inference.as_ref())).await;
        api.kserve_counts.record(&outcome, answer.is_ok());
        answer
    }

    async fn run(self, inference: &dyn Inference) -> Result<WholeAnswer, ApiError> {
        let (headers, parameters, all) = match self.work {
            InferWork::Generate { requests, shape } => {
                let texts = try_join_all(requests.into_iter().map(|one| generate(inference, one))).await?;
                let headers = texts.first().map(|one| one.headers.clone()).unwrap_or_default();
                (headers, Map::new(), generated_tensors(texts, &shape))
            }
            InferWork::Embed(request) => {
                let embedded = inference.embed(request).await?;
                (embedded.head_headers(), embedding_parameters(&embedded), embedding_tensors(embedded))
            }
            InferWork::Classify(request) => {
                let classified = inference.classify(request).await?;
                let parameters = token_parameter(classified.tokens);
                (classified.head_headers(), parameters, classified_tensors(classified)?)
            }
            InferWork::Rerank(request) => {
                let reranked = inference.rerank(request).await?;
                let parameters = token_parameter(reranked.tokens);
                (reranked.head_headers(), parameters, reranked_tensors(reranked))
            }
        };
        let outputs = select(all, &self.outputs);
        Ok(WholeAnswer { headers, answer: InferAnswer { head: self.head, parameters, outputs, last: true } })
    }

    /// Runs the request and gives its answer in parts: text as it is made, then a last part with the reason
    /// of the end and the counts. Where the request says nothing of `stream`, `by_default` counts; without
    /// it, and for vectors, there is one part.
    ///
    /// # Errors
    /// As [`Self::answer`], as long as there is no part.
    pub(crate) async fn parts(self, api: &Api, by_default: bool) -> Result<AnswerParts, ApiError> {
        let Self { head, outputs, stream, timeout, work } = self;
        let (mut requests, shape) = match work {
            InferWork::Generate { requests, shape } if stream.unwrap_or(by_default) => (requests, shape),
            work => {
                let whole = Self { head, outputs, stream: None, timeout, work }.answer(api).await?;
                let parts = futures::stream::once(async { Ok(whole.answer) }).boxed();
                return Ok(AnswerParts { headers: whole.headers, parts });
            }
        };
        let outcome = Outcome::new(&head.model_name, requests.len());
        let (Some(request), None) = (requests.pop(), requests.pop()) else {
            return Err(ApiError::field(
                "text_input",
                "holds several prompts; give one where stream is true",
            ));
        };
        let deadline = deadline_of(timeout);
        let first = async { api.inference.generate(request).await?.wait_for_first().await };
        let answer = match within(deadline, first).await {
            Ok(answer) => answer,
            Err(error) => {
                api.kserve_counts.record(&outcome, false);
                return Err(error);
            }
        };
        let headers = answer.head_headers();
        let counts = api.kserve_counts.clone();
        let parts = until(deadline, answer.events).filter_map(move |event| {
            if !matches!(event, Ok(Event::Token { .. })) {
                counts.record(&outcome, event.is_ok());
            }
            let part = event.map(|event| {
                let last = matches!(event, Event::Finished { .. });
                let outputs = select(tensors_of_event(event, &shape), &outputs);
                let answer = InferAnswer { head: head.clone(), parameters: Map::new(), outputs, last };
                (!answer.outputs.is_empty() || last).then_some(answer)
            });
            std::future::ready(part.transpose())
        });
        Ok(AnswerParts { headers, parts: parts.boxed() })
    }
}

/// The moment at which a time that begins now is over; none for one that is longer than the clock counts.
fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    Instant::now().checked_add(timeout?)
}

fn late() -> ApiError {
    let message = "the answer was not complete within the time that the parameter timeout allows".to_owned();
    ApiError::Timeout { message }
}

async fn within<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    match deadline {
        None => work.await,
        Some(deadline) => timeout_at(deadline, work).await.unwrap_or_else(|_| Err(late())),
    }
}

/// The events until the deadline, which ends them with an error.
fn until(deadline: Option<Instant>, events: Events) -> Events {
    let Some(deadline) = deadline else { return events };
    let next = move |events: Option<Events>| async move {
        let mut events = events?;
        match timeout_at(deadline, events.next()).await {
            Ok(event) => event.map(|event| (event, Some(events))),
            Err(_) => Some((Err(late()), None)),
        }
    };
    futures::stream::unfold(Some(events), next).boxed()
}

/// Collects the answer to one prompt.
async fn generate(inference: &dyn Inference, request: Generation) -> Result<GeneratedText, ApiError> {
    let mut answer = inference.generate(request).await?;
    let headers = answer.head_headers();
    let mut text = String::new();
    while let Some(event) = answer.events.next().await {
        match event? {
            Event::Token { text: piece, .. } => text.push_str(&piece),
            Event::Finished { reason, usage, .. } => {
                return Ok(GeneratedText { headers, text, reason, usage });
            }
        }
    }
    Err(ApiError::ended_early())
}

/// The outputs of a model that generates, with one element for each prompt.
fn generated_tensors(all: Vec<GeneratedText>, shape: &[u64]) -> Vec<OutputTensor> {
    let tensor = |name, data| OutputTensor { name, shape: shape.to_vec(), data };
    let reasons = all.iter().map(|one| one.reason.as_str().to_owned()).collect();
    let prompt_tokens = all.iter().map(|one| one.usage.prompt_tokens).collect();
    let completion_tokens = all.iter().map(|one| one.usage.completion_tokens).collect();
    vec![
        tensor("text_output", OutputData::Texts(all.into_iter().map(|one| one.text).collect())),
        tensor("finish_reason", OutputData::Texts(reasons)),
        tensor("prompt_tokens", OutputData::Counts(prompt_tokens)),
        tensor("completion_tokens", OutputData::Counts(completion_tokens)),
    ]
}

/// The outputs of one event: the text of a token, if it has one, or everything else at the end.
fn tensors_of_event(event: Event, shape: &[u64]) -> Vec<OutputTensor> {
    match event {
        Event::Token { text, .. } if text.is_empty() => Vec::new(),
        Event::Token { text, .. } => {
            let data = OutputData::Texts(vec![text]);
            vec![OutputTensor { name: "text_output", shape: shape.to_vec(), data }]
        }
        Event::Finished { reason, usage, .. } => {
            let end = GeneratedText { headers: HeaderMap::new(), text: String::new(), reason, usage };
            generated_tensors(vec![end], shape)
        }
    }
}

/// How the vectors were made, which decides what they mean.
fn embedding_parameters(embedded: &Embedded) -> Map<String, Value> {
    let mut parameters = Map::new();
    parameters.insert("pooling".to_owned(), json!(embedded.pooling.as_str()));
    if let Some(note) = &embedded.pooling_note {
        parameters.insert("pooling_note".to_owned(), json!(note));
    }
    parameters.insert("prompt_tokens".to_owned(), json!(embedded.tokens));
    parameters
}

/// The outputs of a model that embeds, with one row for each text.
fn embedding_tensors(embedded: Embedded) -> Vec<OutputTensor> {
    let width = embedded.width.max(1);
    let rows = embedded.values.len() / width;
    let truncated = truncated_tensor(&embedded.truncated, rows);
    vec![
        OutputTensor {
            name: "embedding",
            shape: vec![rows as u64, width as u64],
            data: OutputData::Floats(embedded.values),
        },
        truncated,
    ]
}

/// The tensors that were asked for, in the order in which they were.
fn select(mut all: Vec<OutputTensor>, wanted: &[&'static str]) -> Vec<OutputTensor> {
    let take = |name: &&'static str| {
        let index = all.iter().position(|tensor| tensor.name == *name)?;
        Some(all.swap_remove(index))
    };
    wanted.iter().filter_map(take).collect()
}
