//! A server of models for the codecs' own tests: it plays a script and counts what runs.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use trustformers_proto::{Task, v1};

use crate::health::{Health, Verdict};
use crate::inference::{
    Answer, CountRequest, Event, FinishReason, Inference, Logprobs, Models, StoppedBy, TokenText, Usage,
};
use crate::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel};
use crate::tools::AnswerSyntax;
use crate::{
    Api, ApiError, Arrival, Classified, ClassifyRequest, EmbedRequest, Embedded, Entity, Generation,
    PoolingMode, Priority, Prompt, RerankRequest, Reranked,
};

/// What each request gets.
#[derive(Clone, Default)]
pub(crate) struct Script {
    refusal: Option<ApiError>,
    full: Option<ApiError>,
    pieces: Vec<String>,
    failure: Option<ApiError>,
    hangs: bool,
    logprobs: Option<Logprobs>,
    stopped_by: Option<StoppedBy>,
    reason: Option<FinishReason>,
    syntax: AnswerSyntax,
}

impl Script {
    pub(crate) fn tokens(pieces: &[&str]) -> Self {
        Self { pieces: pieces.iter().map(ToString::to_string).collect(), ..Self::default() }
    }
    pub(crate) fn refused(error: ApiError) -> Self {
        Self { refusal: Some(error), ..Self::default() }
    }
    /// Requests that nothing precedes are refused with this before they are looked at.
    pub(crate) fn full(self, error: ApiError) -> Self {
        Self { full: Some(error), ..self }
    }
    pub(crate) fn fails_before_a_token(error: ApiError) -> Self {
        Self::default().then_fails(error)
    }
    pub(crate) fn then_fails(self, error: ApiError) -> Self {
        Self { failure: Some(error), ..self }
    }
    pub(crate) fn then_hangs(self) -> Self {
        Self { hangs: true, ..self }
    }
    pub(crate) fn with_logprobs(self) -> Self {
        Self { logprobs: Some(Logprobs { logprob: -0.5, top: vec![(7, -0.25)] }), ..self }
    }
    pub(crate) fn ends_with(self, reason: FinishReason) -> Self {
        Self { reason: Some(reason), ..self }
    }
    pub(crate) fn with_syntax(self, syntax: AnswerSyntax) -> Self {
        Self { syntax, ..self }
    }
    pub(crate) fn stopped_by(self, stop: StoppedBy) -> Self {
        Self { stopped_by: Some(stop), ..self }
    }
}

#[derive(Clone)]
pub(crate) struct Fake {
    script: Script,
    running: Arc<watch::Sender<usize>>,
    last: Arc<Mutex<Option<Generation>>>,
    last_embedding: Arc<Mutex<Option<EmbedRequest>>>,
    last_classification: Arc<Mutex<Option<ClassifyRequest>>>,
    last_order: Arc<Mutex<Option<RerankRequest>>>,
    last_count: Arc<Mutex<Option<CountRequest>>>,
    last_load: Arc<Mutex<Option<LoadModel>>>,
    last_change: Arc<Mutex<String>>,
    models: Arc<watch::Sender<Models>>,
    ready: Arc<watch::Sender<Verdict>>,
    closing: CancellationToken,
}

/// Counts an answer for as long as its stream lives.
struct Running(Arc<watch::Sender<usize>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Fake {
    pub(crate) fn with(script: Script) -> Self {
        let mut model = v1::ModelStatus {
            name: "fake".into(),
            names: vec!["fake".into(), "ns/fake".into()],
            digest: "d1".into(),
            revision: "r1".into(),
            device: "cpu".into(),
            ..Default::default()
        };
        model.set_state(v1::ModelState::Ready);
        Self {
            script,
            running: Arc::new(watch::Sender::new(0)),
            last: Arc::default(),
            last_embedding: Arc::default(),
            last_classification: Arc::default(),
            last_order: Arc::default(),
            last_count: Arc::default(),
            last_load: Arc::default(),
            last_change: Arc::default(),
            models: Arc::new(watch::Sender::new(vec![model].into())),
            ready: Arc::new(watch::Sender::new(Verdict::yes("ready"))),
            closing: CancellationToken::new(),
        }
    }

    /// The model says that this is its task.
    pub(crate) fn with_task(self, task: Task) -> Self {
        self.models.send_modify(|models| {
            let serving = |model: &v1::ModelStatus| v1::ModelStatus {
                task: Task::to_wire(Some(task)),
                ..model.clone()
            };
            *models = models.iter().map(serving).collect();
        });
        self
    }

    pub(crate) fn api(&self) -> Api {
        Api::new(Arc::new(self.clone()), self.closing.clone())
    }

    pub(crate) fn last_request(&self) -> Generation {
        self.last.lock().unwrap().clone().unwrap()
    }

    /// Whether it was asked to generate.
    pub(crate) fn was_asked(&self) -> bool {
        self.last.lock().unwrap().is_some()
    }

    pub(crate) fn last_embedding(&self) -> EmbedRequest {
        self.last_embedding.lock().unwrap().clone().unwrap()
    }

    pub(crate) fn last_classification(&self) -> ClassifyRequest {
        self.last_classification.lock().unwrap().clone().unwrap()
    }

    pub(crate) fn last_order(&self) -> RerankRequest {
        self.last_order.lock().unwrap().clone().unwrap()
    }

    pub(crate) fn last_count(&self) -> CountRequest {
        self.last_count.lock().unwrap().clone().unwrap()
    }

    pub(crate) fn last_load(&self) -> LoadModel {
        self.last_load.lock().unwrap().clone().unwrap()
    }

    /// The last swap or rollback, as text.
    pub(crate) fn last_change(&self) -> String {
        self.last_change.lock().unwrap().clone()
    }

    fn changed(&self, request: &dyn std::fmt::Debug) -> v1::ModelStatus {
        *self.last_change.lock().unwrap() = format!("{request:?}");
        self.models.borrow()[0].clone()
    }

    pub(crate) fn running(&self) -> usize {
        *self.running.borrow()
    }

    pub(crate) async fn until_running(&self, wanted: usize) {
        self.running.subscribe().wait_for(|count| *count == wanted).await.unwrap();
    }
}

impl Health for Fake {
    fn liveness(&self) -> Verdict {
        Verdict::yes("alive")
    }
    fn startup(&self) -> Verdict {
        Verdict::yes("started")
    }
    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.ready.subscribe()
    }
}

/// `t1` for the id 1.
fn texts(ids: &[u32]) -> Result<Vec<TokenText>, ApiError> {
    let text = |id: &u32| TokenText { text: format!("t{id}"), bytes: format!("t{id}").into_bytes() };
    Ok(ids.iter().map(text).collect())
}

impl Inference for Fake {
    fn is_full(&self) -> bool {
        self.script.full.is_some()
    }

    fn refuse(&self, arrival: &Arrival<'_>) -> Option<ApiError> {
        self.script.full.clone().filter(|_| arrival.priority != Priority::High)
    }

    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        *self.last.lock().unwrap() = Some(request);
        let script = self.script.clone();
        if let Some(error) = script.refusal {
            return Box::pin(async { Err(error) });
        }
        self.running.send_modify(|count| *count += 1);
        let running = Running(self.running.clone());
        let completion_tokens = u32::try_from(script.pieces.len()).unwrap();
        let mut steps: Vec<Result<Event, ApiError>> = Vec::new();
        for (id, text) in (0..).zip(script.pieces) {
            steps.push(Ok(Event::Token { id, text, logprobs: script.logprobs.clone() }));
        }
        let usage = Usage { prompt_tokens: 3, completion_tokens };
        steps.push(match script.failure {
            Some(error) => Err(error),
            None => Ok(Event::Finished {
                reason: script.reason.unwrap_or(FinishReason::Stop),
                stopped_by: script.stopped_by,
                usage,
            }),
        });
        if script.hangs {
            steps.pop();
        }
        let tail =
            if script.hangs { futures::stream::pending().boxed() } else { futures::stream::empty().boxed() };
        let events = futures::stream::iter(steps)
            .chain(tail)
            .map(move |event| {
                let _alive_with_the_stream = &running;
                event
            })
            .boxed();
        Box::pin(async move {
            Ok(Answer {
                id: "gen-1".into(),
                model: "fake".into(),
                model_digest: "d1".into(),
                revision: "r1".into(),
                created_unix_s: 1_700_000_000,
                prompt_tokens: usage.prompt_tokens,
                syntax: script.syntax,
                texts: Arc::new(texts),
                events,
            })
        })
    }

    /// Vectors of two values each, the first of them said to be cut.
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        let texts = u16::try_from(request.input.len()).unwrap();
        *self.last_embedding.lock().unwrap() = Some(request);
        if let Some(error) = self.script.refusal.clone() {
            return Box::pin(async { Err(error) });
        }
        self.running.send_modify(|count| *count += 1);
        let running = Running(self.running.clone());
        let hangs = self.script.hangs;
        Box::pin(async move {
            let _alive_with_the_future = running;
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok(Embedded {
                id: "emb-1".into(),
                model: "fake".into(),
                model_digest: "d1".into(),
                revision: "r1".into(),
                values: (0..texts).flat_map(|text| [f32::from(text), 0.1]).collect(),
                width: 2,
                tokens: u32::from(texts) * 3,
                truncated: vec![0],
                pooling: PoolingMode::Mean,
                pooling_note: Some("not configured".into()),
            })
        })
    }

    /// A quarter for HAM and the rest for SPAM, the first text said to be cut; an entity for each text where
    /// the request names a way to aggregate.
    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        let texts = request.input.len();
        let entity =
            Entity { label: "PER".into(), score: 0.75, index: None, word: "a".into(), start: 0, end: 1 };
        let entities = request.aggregation.map(|_| vec![vec![entity]; texts]);
        *self.last_classification.lock().unwrap() = Some(request);
        let refusal = self.script.refusal.clone();
        let classified = Classified {
            id: "cls-1".into(),
            model: "fake".into(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            labels: ["HAM".to_owned(), "SPAM".to_owned()].into(),
            scores: [0.25, 0.75].repeat(texts),
            entities,
            tokens: u32::try_from(texts).unwrap() * 3,
            truncated: vec![0],
        };
        Box::pin(async move { refusal.map_or(Ok(classified), Err) })
    }

    /// The later a document, the better: a quarter more for each.
    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        let documents = u16::try_from(request.documents.len()).unwrap();
        *self.last_order.lock().unwrap() = Some(request);
        let refusal = self.script.refusal.clone();
        let reranked = Reranked {
            id: "rnk-1".into(),
            model: "fake".into(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            scores: (0..documents).map(|index| f32::from(index) / 4.0).collect(),
            tokens: u32::from(documents) * 3,
            truncated: Vec::new(),
        };
        Box::pin(async move { refusal.map_or(Ok(reranked), Err) })
    }

    /// As many as the prompt has words, ids or messages.
    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        let count = match &request.prompt {
            Prompt::Text(text) => text.split_whitespace().count(),
            Prompt::Tokens(ids) => ids.len(),
            Prompt::Conversation(conversation) => conversation.messages.len(),
        };
        *self.last_count.lock().unwrap() = Some(request);
        let refusal = self.script.refusal.clone();
        Box::pin(async move { refusal.map_or(Ok(u32::try_from(count).unwrap()), Err) })
    }

    /// A model of that name, ready.
    fn load_model(&self, request: LoadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        let mut model = v1::ModelStatus { name: request.name.clone(), ..Default::default() };
        model.set_state(v1::ModelState::Ready);
        *self.last_load.lock().unwrap() = Some(request);
        self.running.send_modify(|count| *count += 1);
        let running = Running(self.running.clone());
        let hangs = self.script.hangs;
        Box::pin(async move {
            let _alive_with_the_future = running;
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok(model)
        })
    }

    fn swap_model(&self, request: SwapModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(std::future::ready(Ok(self.changed(&request))))
    }

    fn rollback_model(&self, request: RollbackModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        Box::pin(std::future::ready(Ok(self.changed(&request))))
    }

    /// Knows the model that it serves. It stays.
    fn unload_model(&self, request: UnloadModel) -> BoxFuture<'_, Result<v1::ModelStatus, ApiError>> {
        let models = self.models.borrow().clone();
        Box::pin(async move {
            let asked = request.model;
            let found = models.iter().find(|model| model.name == asked).cloned();
            let mut model = found.ok_or(ApiError::UnknownModel { asked, choices: Vec::new() })?;
            model.set_state(v1::ModelState::Unloaded);
            Ok(model)
        })
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }
}
