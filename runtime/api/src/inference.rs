//! What a server of models can do, in the words that both protocols share.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use serde_json::{Value, json};
use tokio::sync::watch;
use trustformers_proto::v1;

use crate::classify::{Classified, ClassifyRequest};
use crate::conversation::Prompt;
use crate::embed::{EmbedRequest, Embedded};
use crate::error::ApiError;
use crate::fields::Generation;
use crate::health::Health;
use crate::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel, not_changed_here};
use crate::overload::Arrival;
use crate::rerank::{RerankRequest, Reranked};
use crate::revision::answer_headers;
use crate::tools::AnswerSyntax;

/// The models at one moment, in the shape that goes over the wire.
pub type Models = Arc<[v1::ModelStatus]>;

/// A server of models. Implemented over engines in one process; the codecs know nothing else.
pub trait Inference: Health {
    /// Whether only requests to generate that precede others are admitted at this moment, whichever model
    /// they name: one version of one model serves, and it is full. Listeners ask this for every request.
    fn is_full(&self) -> bool {
        false
    }

    /// Refuses a request to generate as [`Inference::generate`] would at this moment, before anything else is
    /// known of it. None: it has to be asked. A refusal counts as that of a request.
    fn refuse(&self, _arrival: &Arrival<'_>) -> Option<ApiError> {
        None
    }

    /// Takes a request. The future ends when the request is admitted or refused, not when tokens exist.
    /// Dropping the future or the answer's stream cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>>;

    /// Turns texts into vectors. The future ends when all are there. Dropping it cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>>;

    /// Gives texts the scores of a model's labels. The future ends when all are there. Dropping it
    /// cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>>;

    /// Gives documents scores for a query. The future ends when all are there. Dropping it cancels the work.
    ///
    /// # Errors
    /// Any [`ApiError`]; a request that was refused left nothing behind.
    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>>;

    /// Tokens that a prompt has, special tokens and the model's chat template included. Nothing is generated.
    ///
    /// # Errors
    /// Any [`ApiError`].
    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>>;

    /// Loads a model, or another revision of one, and waits until it is ready. Dropping the future does not
    /// stop the load.
    ///
    /// # Errors
    /// Any [`ApiError`]; a model that could not be loaded left nothing behind. A server whose models do not
    /// change while it runs refuses.
    fn load_model(&self, _request: LoadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(async { Err(not_changed_here()) })
    }

    /// Unloads a model, or one of its versions, and waits until its answers in flight have ended and its
    /// memory is free. Dropping the future does not stop it.
    ///
    /// # Errors
    /// As for [`Inference::load_model`].
    fn unload_model(&self, _request: UnloadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(async { Err(not_changed_here()) })
    }

    /// Lets another version answer for a model.
    ///
    /// # Errors
    /// As for [`Inference::load_model`]; `Conflict` where the versions of the model do not allow it.
    fn swap_model(&self, _request: SwapModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(async { Err(not_changed_here()) })
    }

    /// Lets the version before the last swap answer again.
    ///
    /// # Errors
    /// As for [`Inference::swap_model`].
    fn rollback_model(&self, _request: RollbackModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(async { Err(not_changed_here()) })
    }

    /// The models now, and after each change. The channel closes when the server ends.
    fn watch_models(&self) -> watch::Receiver<Models>;
}

/// The text of each of these token ids, by the model that answers; it works until it is dropped, even if the
/// model is unloaded meanwhile. An id outside the model's vocabulary is refused.
pub type TokenTexts = Arc<dyn Fn(&[u32]) -> Result<Vec<TokenText>, ApiError> + Send + Sync>;

/// An admitted request.
pub struct Answer {
    /// Unique id of this answer.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the weights that answer, 64 hex digits.
    pub model_digest: String,
    /// The revision that the server's configuration names; may be empty.
    pub revision: String,
    /// Time of admission, in seconds since the Unix epoch.
    pub created_unix_s: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How this model writes tool calls and reasoning. The default for a prompt of text or tokens.
    pub syntax: AnswerSyntax,
    /// For answers that repeat tokens: the prompt of a request that gave ids, or the best tokens beside the
    /// one that was produced.
    pub texts: TokenTexts,
    /// Tokens, then exactly one [`Event::Finished`]; or an error, after which nothing follows.
    pub events: BoxStream<'static, Result<Event, ApiError>>,
}

impl Answer {
    /// The headers that name what answers.
    #[must_use]
    pub fn head_headers(&self) -> HeaderMap {
        answer_headers(&self.revision, &self.model_digest)
    }

    /// Waits for the first event. Until then an answer that fails is an ordinary failed request, which may be
    /// sent to another server; the head of a stream goes out afterwards.
    ///
    /// # Errors
    /// The failure, where that is the first event.
    pub async fn wait_for_first(mut self) -> Result<Self, ApiError> {
        let first = self.events.next().await.ok_or_else(ApiError::ended_early)??;
        let rest = std::mem::replace(&mut self.events, futures::stream::empty().boxed());
        self.events = futures::stream::once(async { Ok(first) }).chain(rest).boxed();
        Ok(self)
    }
}

/// A prompt whose tokens are to be counted.
#[derive(Debug, Clone, PartialEq)]
pub struct CountRequest {
    /// A model's name; none where the caller left the choice open.
    pub model: Option<String>,
    /// The only revision that may count; none where any may.
    pub revision: Option<String>,
    /// What is counted.
    pub prompt: Prompt,
}

/// What a token adds to a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// As text; bytes that are no whole character are U+FFFD.
    pub text: String,
    /// The bytes themselves; none for tokens without a text.
    pub bytes: Vec<u8>,
}

/// One step of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A new token; the end token too.
    Token {
        /// Its id.
        id: u32,
        /// Text that became final with it; may be empty while a character is incomplete or a stop text may
        /// begin.
        text: String,
        /// What the model thinks of it, where the request asked.
        logprobs: Option<Logprobs>,
    },
    /// The end.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What of the request ended it, where that was not the model, its format or a limit.
        stopped_by: Option<StoppedBy>,
        /// What was counted.
        usage: Usage,
    },
}

/// What of a request ended its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoppedBy {
    /// This one of its stop texts.
    Text(String),
    /// This one of its stop tokens.
    Token(u32),
}

impl StoppedBy {
    /// The text or the id.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Token(id) => json!(id),
        }
    }
}

/// What the model thinks of a token, as natural logarithms of probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Ids of the best tokens with theirs, best first.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// `{"logprob", "top": [{"token", "logprob"}]}`.
    pub fn to_json(&self) -> Value {
        // Six places say all that an f32 knows of a logarithm.
        let places = |logprob: f32| (f64::from(logprob) * 1e6).round() / 1e6;
        let top: Vec<Value> = (self.top.iter())
            .map(|(token, logprob)| json!({"token": token, "logprob": places(*logprob)}))
            .collect();
        json!({"logprob": places(self.logprob), "top": top})
    }
}

impl From<Logprobs> for v1::Logprobs {
    fn from(logprobs: Logprobs) -> Self {
        let top = logprobs.top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token, logprob });
        Self { logprob: logprobs.logprob, top: top.collect() }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced its end token, a stop text or a stop token, or the format is complete.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
}

impl FinishReason {
    /// The word in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }

    /// The value on the wire.
    pub fn to_proto(self) -> v1::FinishReason {
        match self {
            Self::Stop => v1::FinishReason::Stop,
            Self::Length => v1::FinishReason::Length,
        }
    }
}

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// New tokens, the end token included.
    pub completion_tokens: u32,
}

impl Usage {
    /// The message on the wire.
    pub fn to_proto(self) -> v1::Usage {
        v1::Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::fields::{Asked, HTTP_DEFAULTS};
    use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
    use crate::tools::CallSyntax;

    fn generation() -> Generation {
        Asked { prompt: "a b".into(), ..Asked::default() }.check(&HTTP_DEFAULTS).unwrap()
    }

    #[tokio::test]
    async fn waiting_for_the_first_event_loses_none_and_gives_an_early_failure() {
        let syntax = AnswerSyntax { calls: Some(CallSyntax::Hermes), ..AnswerSyntax::default() };
        let fake = Fake::with(Script::tokens(&["a"]).with_syntax(syntax).ends_with(FinishReason::Length));
        let answer = fake.generate(generation()).await.unwrap().wait_for_first().await.unwrap();
        let headers = answer.head_headers();
        assert!(headers[REVISION_HEADER] == "r1" && headers[DIGEST_HEADER] == "d1", "{headers:?}");
        assert_eq!((answer.syntax, answer.prompt_tokens), (syntax, 3));
        let events: Vec<_> = answer.events.map(Result::unwrap).collect().await;
        assert!(matches!(
            &events[..],
            [Event::Token { id: 0, .. }, Event::Finished { reason: FinishReason::Length, .. }]
        ));
        let error = ApiError::Internal { message: "broken".into() };
        let failing = Fake::with(Script::fails_before_a_token(error.clone()));
        let answer = failing.generate(generation()).await.unwrap();
        assert_eq!(answer.wait_for_first().await.err(), Some(error));
    }

    #[tokio::test]
    async fn tokens_are_counted_and_have_texts() {
        let fake = Fake::with(Script::tokens(&[]));
        let request = CountRequest { model: None, revision: None, prompt: "a b".into() };
        assert_eq!(fake.count_tokens(request.clone()).await, Ok(2));
        assert_eq!(fake.last_count(), request);
        let texts = (fake.generate(generation()).await.unwrap().texts)(&[7]).unwrap();
        assert_eq!(texts, [TokenText { text: "t7".into(), bytes: b"t7".to_vec() }]);
    }
}
