//! How an answer ended, for the gateway in front of this server: HTTP trailers behind the body; and how many
//! requests of all gateways are in flight here, in the head.
//!
//! The head of an answer is sent before its end is known, so a stream that fails has a head of success. A
//! gateway that counts outcomes and tokens asks for trailers with [`REPORT_HEADER`]; no other client sees
//! them.
//!
//! The answer itself is taken apart nowhere: a wrapper of `Inference` sees the events of the models, and a
//! layer adds what it saw to the body of the same request.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt;
use futures::future::BoxFuture;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::watch;
use trustformers_proto::v1;
pub use trustformers_proto::{LOAD_HEADER, REPORT_HEADER};

use crate::error::ApiError;
use crate::fields::Generation;
use crate::health::{Health, Verdict};
use crate::inference::{Answer, CountRequest, Event, Inference, Models};
use crate::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel};
use crate::{Arrival, Classified, ClassifyRequest, EmbedRequest, Embedded, RerankRequest, Reranked};

/// Trailer: [`END_OK`], or the kind of the error that ended the answer after its head.
pub const END_TRAILER: &str = "x-trustformers-end";
/// The value of [`END_TRAILER`] for an answer that is complete.
pub const END_OK: &str = "ok";
/// Trailer: tokens of the prompts of the request.
pub const PROMPT_TOKENS_TRAILER: &str = "x-trustformers-prompt-tokens";
/// Trailer: tokens that were produced for the request.
pub const COMPLETION_TOKENS_TRAILER: &str = "x-trustformers-completion-tokens";

tokio::task_local! {
    /// Where the end of the request that this task handles is noted.
    static END: SharedEnd;
}

type SharedEnd = Arc<Mutex<AnswerEnd>>;

/// Requests of gateways that are in flight.
#[derive(Debug, Clone, Default)]
pub(crate) struct GatewayLoad(Arc<AtomicUsize>);

/// Counts one of them until dropped.
#[derive(Debug)]
struct GatewayRequest(GatewayLoad);

impl GatewayLoad {
    fn enter(&self) -> GatewayRequest {
        self.0.fetch_add(1, Ordering::AcqRel);
        GatewayRequest(self.clone())
    }

    /// How many there are beside one that is refused at once, and this one.
    pub(crate) fn with_refused(&self) -> usize {
        self.0.load(Ordering::Acquire) + 1
    }
}

impl Drop for GatewayRequest {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What is known of the end of an answer.
#[derive(Debug, Default)]
struct AnswerEnd {
    prompt_tokens: u32,
    completion_tokens: u32,
    /// The kind of the error that ended it.
    failure: Option<&'static str>,
    /// Whether a model has answered at all.
    began: bool,
}

impl AnswerEnd {
    /// The trailers, where a model has answered.
    fn trailers(&self) -> Option<HeaderMap> {
        if !self.began {
            return None;
        }
        Some(HeaderMap::from_iter([
            (HeaderName::from_static(END_TRAILER), HeaderValue::from_static(self.failure.unwrap_or(END_OK))),
            (HeaderName::from_static(PROMPT_TOKENS_TRAILER), HeaderValue::from(self.prompt_tokens)),
            (HeaderName::from_static(COMPLETION_TOKENS_TRAILER), HeaderValue::from(self.completion_tokens)),
        ]))
    }

    fn event(&mut self, event: &Result<Event, ApiError>) {
        match event {
            Ok(Event::Token { .. }) => self.completion_tokens += 1,
            Ok(Event::Finished { .. }) => {}
            Err(error) => self.failure = Some(error.kind()),
        }
    }
}

fn lock(end: &Mutex<AnswerEnd>) -> MutexGuard<'_, AnswerEnd> {
    end.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The end of the request that is being handled, where somebody wants to know it.
fn current() -> Option<SharedEnd> {
    END.try_with(Arc::clone).ok()
}

/// A server of models that notes how its answers end.
pub(crate) struct ReportingInference(pub(crate) Arc<dyn Inference>);

impl Health for ReportingInference {
    fn liveness(&self) -> Verdict {
        self.0.liveness()
    }
    fn startup(&self) -> Verdict {
        self.0.startup()
    }
    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.0.readiness()
    }
}

/// An answer that comes as a whole, with the tokens that were read for it.
fn whole<T: Send + 'static>(
    answering: BoxFuture<'_, Result<T, ApiError>>,
    tokens: fn(&T) -> u32,
) -> BoxFuture<'_, Result<T, ApiError>> {
    let Some(end) = current() else { return answering };
    Box::pin(async move {
        let answer = answering.await?;
        let mut end = lock(&end);
        end.began = true;
        end.prompt_tokens = end.prompt_tokens.saturating_add(tokens(&answer));
        drop(end);
        Ok(answer)
    })
}

impl Inference for ReportingInference {
    fn is_full(&self) -> bool {
        self.0.is_full()
    }

    fn refuse(&self, arrival: &Arrival<'_>) -> Option<ApiError> {
        self.0.refuse(arrival)
    }

    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        let answering = self.0.generate(request);
        let Some(end) = current() else { return answering };
        Box::pin(async move {
            let mut answer = answering.await?;
            {
                let mut end = lock(&end);
                end.began = true;
                end.prompt_tokens = end.prompt_tokens.saturating_add(answer.prompt_tokens);
            }
            answer.events = answer.events.inspect(move |event| lock(&end).event(event)).boxed();
            Ok(answer)
        })
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        whole(self.0.embed(request), |embedded| embedded.tokens)
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        whole(self.0.classify(request), |classified| classified.tokens)
    }

    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        whole(self.0.rerank(request), |reranked| reranked.tokens)
    }

    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        self.0.count_tokens(request)
    }

    fn load_model(&self, request: LoadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        self.0.load_model(request)
    }

    fn unload_model(&self, request: UnloadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        self.0.unload_model(request)
    }

    fn swap_model(&self, request: SwapModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        self.0.swap_model(request)
    }

    fn rollback_model(&self, request: RollbackModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        self.0.rollback_model(request)
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.0.watch_models()
    }
}

/// Ends the answer with trailers, and tells the load in its head, where the request asks for it. It belongs
/// outside every layer that takes bodies apart.
pub(crate) async fn report_end(
    State(load): State<GatewayLoad>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.headers_mut().remove(REPORT_HEADER).is_none() {
        return next.run(request).await;
    }
    let in_flight = load.enter();
    let end = SharedEnd::default();
    let mut response = END.scope(Arc::clone(&end), next.run(request)).await;
    let count = load.0.load(Ordering::Acquire);
    response.headers_mut().insert(HeaderName::from_static(LOAD_HEADER), HeaderValue::from(count));
    if response.body().is_end_stream() {
        return response;
    }
    response.map(|inner| Body::new(ReportedBody { inner, end, ended: false, _in_flight: in_flight }))
}

/// A body with trailers behind it.
struct ReportedBody {
    inner: Body,
    end: SharedEnd,
    ended: bool,
    _in_flight: GatewayRequest,
}

impl HttpBody for ReportedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let told = match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            Some(Ok(frame)) => match frame.into_trailers() {
                Ok(trailers) => Some(trailers),
                Err(data) => return Poll::Ready(Some(Ok(data))),
            },
            Some(Err(error)) => {
                self.ended = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => None,
        };
        self.ended = true;
        let ours = lock(&self.end).trailers();
        let trailers = match (told, ours) {
            (Some(mut told), Some(ours)) => {
                told.extend(ours);
                Some(told)
            }
            (one, other) => one.or(other),
        };
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use http_body_util::BodyExt;
    use serde_json::json;
    use tower::ServiceExt;

    /// The trailers of an answer; none where it has none.
    async fn trailers(script: Script, path: &str, ask: bool) -> Option<Vec<(String, String)>> {
        let field = if path.ends_with("embeddings") { "input" } else { "prompt" };
        let body = json!({field: "Hi"});
        let mut request = Request::post(path);
        if ask {
            request = request.header(REPORT_HEADER, "1");
        }
        let request = request.body(Body::from(body.to_string())).unwrap();
        let response = crate::http::router(Fake::with(script).api()).oneshot(request).await.unwrap();
        let collected = response.into_body().collect().await.unwrap();
        let trailers = collected.trailers()?.clone();
        let mut found: Vec<(String, String)> = trailers
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        found.sort();
        Some(found)
    }

    fn expected(end: &str, prompt: u32, completion: u32) -> Option<Vec<(String, String)>> {
        let all = [
            (COMPLETION_TOKENS_TRAILER, completion.to_string()),
            (END_TRAILER, end.to_owned()),
            (PROMPT_TOKENS_TRAILER, prompt.to_string()),
        ];
        Some(all.map(|(name, value)| (name.to_owned(), value)).to_vec())
    }

    #[tokio::test]
    async fn the_trailers_tell_tokens_and_how_a_stream_failed() {
        let failing = || {
            Script::tokens(&["a", "b"]).then_fails(ApiError::Unavailable {
                message: "the engine ended".to_owned(),
                retry_after_s: None,
            })
        };
        let whole = || Script::tokens(&["a", "b", "c"]);
        assert_eq!(trailers(whole(), "/v1/generate", true).await, expected(END_OK, 3, 3));
        assert_eq!(trailers(whole(), "/v1/generate/stream", true).await, expected(END_OK, 3, 3));
        assert_eq!(trailers(failing(), "/v1/generate/stream", true).await, expected("unavailable", 3, 2));
        assert_eq!(trailers(whole(), "/v1/embeddings", true).await, expected(END_OK, 3, 0));
    }

    #[tokio::test]
    async fn the_head_tells_how_many_requests_of_gateways_are_in_flight() {
        let router = crate::http::router(Fake::with(Script::tokens(&["a"])).api());
        let send = async |reported: bool| {
            let mut request = Request::post("/v1/generate/stream");
            if reported {
                request = request.header(REPORT_HEADER, "1");
            }
            let request = request.body(Body::from(r#"{"prompt": "Hi"}"#)).unwrap();
            router.clone().oneshot(request).await.unwrap()
        };
        let load = |response: &Response| response.headers().get(LOAD_HEADER).cloned();
        let (one, two) = (send(true).await, send(true).await);
        assert_eq!((load(&one).unwrap(), load(&two).unwrap()), ("1".parse().unwrap(), "2".parse().unwrap()));
        assert_eq!(load(&send(false).await), None);
        // Read to its end, or left.
        two.into_body().collect().await.unwrap();
        drop(one);
        assert_eq!(load(&send(true).await).unwrap(), "1");
    }

    #[tokio::test]
    async fn nobody_else_gets_trailers() {
        assert_eq!(trailers(Script::tokens(&["a"]), "/v1/generate", false).await, None);
        let refused = Script::refused(ApiError::field("prompt", "no"));
        assert_eq!(trailers(refused, "/v1/generate", true).await, None);
    }
}
