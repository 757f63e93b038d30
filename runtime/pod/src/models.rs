//! The `Inference` over engines in this process: finds the model that is asked for and passes the request on.
//!
//! A request that is refused is refused here, at once and with what to do. Liveness asks the engines'
//! heartbeats and the progress of loading, never an engine's queue.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use trustformers_api::inference::Models;
use trustformers_api::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel};
use trustformers_api::{
    Answer, ApiError, Arrival, BlockingWork, Classified, ClassifyRequest, CountRequest, EmbedInput,
    EmbedRequest, Embedded, Generation, Health, Inference, Prompt, RerankRequest, Reranked, Verdict,
};
use trustformers_engine::encoder::{EncodeParams, Encoded, Encoder};
use trustformers_proto::Task;
use trustformers_proto::v1::{ModelState, ModelStatus};
use trustformers_telemetry::traces::Trace;

use crate::control::ModelControl;
use crate::entities::TokenLabelling;
use crate::generate::{LONG_PROMPT_BYTES, Submitted};
use crate::inflight::InflightRequests;
use crate::lifecycle::{ManagedModel, Serving};
use crate::liveness::{ENGINE_STALL, engine_fault, load_fault};
use crate::load::Loader;
use crate::model_table::ModelTable;
use crate::runner::Runner;
use crate::spec::{ModelSpec, SpecError};
use crate::status::ModelStatuses;
use crate::{embed, generate, params, scores, trace};

mod selection;

use selection::{AcquiredModel, Asked};

/// Long requests that are tokenised at a time. Tokenising takes at most some 340 bytes for each byte of a
/// text; a prompt that fits a context of 8,192 tokens has at most some 400 KiB, which makes 140 MiB for each
/// request.
const LONG_REQUESTS: usize = 2;

/// Conversations that are rendered at a time. A template may make 32 MiB of text (500,000 steps of 64 bytes
/// each), so that four take some 130 MiB; tokenising what fits takes less. Most take less than a millisecond.
const CONVERSATIONS: usize = 4;

/// Requests with a format that are prepared at a time: rendered and tokenised as above, and their grammar
/// compiled, which may take seconds. They have places of their own, so that plain requests do not wait for
/// them. At 32 MiB of text and 140 MiB for its tokens each, some 340 MiB.
const FORMATTED_REQUESTS: usize = 2;

/// How long an unload waits for answers in flight where nothing else is configured.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// All models of this process.
pub struct ModelServer {
    pub(crate) table: Arc<ModelTable>,
    /// Who may load and unload models.
    pub(crate) control: ModelControl,
    /// How long an unload may wait for answers in flight.
    pub(crate) drain_timeout: Duration,
    /// Liveness fails when an engine with work has made no step for so long.
    engine_stall: Duration,
    /// Tokenises long requests.
    long_requests: BlockingWork,
    /// Prepares requests whose answer has a format, and compiles the format.
    formatted: BlockingWork,
    /// Renders conversations, and tokenises them.
    conversations: BlockingWork,
}

impl ModelServer {
    /// Takes the models, Pending. There may be none yet.
    ///
    /// # Errors
    /// When two claim one name.
    pub fn new(specs: Vec<ModelSpec>) -> Result<Self, SpecError> {
        Ok(Self {
            table: Arc::new(ModelTable::new(specs)?),
            control: ModelControl::default(),
            drain_timeout: DRAIN_TIMEOUT,
            engine_stall: ENGINE_STALL,
            long_requests: BlockingWork::new(LONG_REQUESTS),
            formatted: BlockingWork::new(FORMATTED_REQUESTS),
            conversations: BlockingWork::new(CONVERSATIONS),
        })
    }

    /// Sets how long an engine with work may make no step until liveness fails.
    #[must_use]
    pub fn with_engine_stall(mut self, stall: Duration) -> Self {
        self.engine_stall = stall;
        self
    }

    /// Begins to load every model. The loader takes them one at a time, but one that has to be tried again
    /// does not hold up the others.
    pub fn start_loading(&self, loader: &Arc<Loader>) {
        self.table.start_loading(loader);
    }

    /// The published states.
    pub fn statuses(&self) -> &Arc<ModelStatuses> {
        self.table.statuses()
    }

    /// The requests that are being answered.
    pub fn inflight(&self) -> &Arc<InflightRequests> {
        &self.table.inflight
    }

    /// Stops loading and ends every engine; what they were answering ends with an error.
    pub async fn stop(&self) {
        self.table.stop().await;
    }

    /// The pool for work on this prompt that may take long.
    fn pool(&self, prompt: &Prompt) -> &BlockingWork {
        match prompt {
            Prompt::Text(_) | Prompt::Tokens(_) => &self.long_requests,
            Prompt::Conversation(_) => &self.conversations,
        }
    }

    async fn admit(&self, request: Generation) -> Result<Answer, ApiError> {
        let trace = Trace::current();
        let (model, revision) = (request.model.as_deref(), request.revision.as_deref());
        let AcquiredModel { name, version, serving, adapter, busy } =
            self.acquire(&Asked { model, revision, task: Task::Generate })?;
        let Runner::Generate(engine) = &serving.runner else {
            return Err(wrong_task(name, &serving));
        };
        trace::describe_request(&trace, &request, &name);
        let Submitted { generation, syntax } = if generate::is_long(&request) {
            let (engine, trace) = (engine.clone(), trace.clone());
            let pool =
                if generate::has_format(&request) { &self.formatted } else { self.pool(&request.prompt) };
            pool.run(move || generate::submit(&engine, request, adapter, &trace)).await??
        } else {
            generate::submit(engine, request, adapter, &trace)?
        };
        // The tokenizer and what describes the model; the engine with its weights ends without it.
        let model = Arc::clone(engine.model());
        Ok(Answer {
            id: format!("gen-{}", uuid::Uuid::new_v4().simple()),
            model: name,
            model_digest: serving.digest.clone(),
            revision: version.spec.revision.clone(),
            created_unix_s: generate::now_unix_s(),
            prompt_tokens: u32::try_from(generation.prompt_ids().len()).unwrap_or(u32::MAX),
            syntax,
            texts: Arc::new(move |ids| generate::texts(&model, ids)),
            events: generation
                .map(move |event| {
                    let event = generate::translate(event, &busy);
                    trace::describe_end(&trace, &event);
                    event
                })
                .boxed(),
        })
    }

    async fn count(&self, request: CountRequest) -> Result<u32, ApiError> {
        let (model, revision) = (request.model.as_deref(), request.revision.as_deref());
        let AcquiredModel { serving, busy: _busy, .. } =
            self.acquire(&Asked { model, revision, task: Task::Generate })?;
        self.pool(&request.prompt).run(move || generate::count(&serving.runner, &request)).await?
    }

    async fn encode(&self, request: EmbedRequest) -> Result<Embedded, ApiError> {
        let (model, revision) = (request.model.as_deref(), request.revision.as_deref());
        let AcquiredModel { name, version, serving, busy: _busy, adapter: _ } =
            self.acquire(&Asked { model, revision, task: Task::Embed })?;
        let Runner::Embed(encoder) = &serving.runner else {
            return Err(wrong_task(name, &serving));
        };
        let facts = embed::facts(encoder.model())?;
        embed::check_dimensions(&request, facts)?;
        embed::check_ids(&request, encoder.model().facts().vocabulary)?;
        let bytes = |input: &EmbedInput| match input {
            EmbedInput::Text(text) => text.len(),
            EmbedInput::Tokens(_) => 0,
        };
        let long = request.input.iter().map(bytes).sum::<usize>() > LONG_PROMPT_BYTES;
        let dimensions = request.dimensions;
        let params = embed::encode_params(request);
        let submitted = if long {
            let encoder = encoder.clone();
            self.long_requests.run(move || encoder.submit(&params)).await?
        } else {
            encoder.submit(&params)
        };
        let failed = |error| embed::failed(&error);
        let span = Trace::current().child("encode");
        let encoded = submitted.map_err(failed)?.await.map_err(failed)?;
        drop(span);
        let by = identity(name, &serving, &version);
        Ok(embed::embedded(by, facts, encoded, dimensions))
    }

    async fn classify_texts(&self, request: ClassifyRequest) -> Result<Classified, ApiError> {
        let (model, revision) = (request.model.as_deref(), request.revision.as_deref());
        let AcquiredModel { name, version, serving, busy: _busy, adapter: _ } =
            self.acquire(&Asked { model, revision, task: Task::Classify })?;
        let Runner::Classify(encoder) = &serving.runner else {
            return Err(wrong_task(name, &serving));
        };
        let raw = request.raw_scores;
        let labelling = TokenLabelling::of(&request, encoder)?;
        let params = scores::classify_params(request);
        let long = scores::text_bytes(&params.texts) > LONG_PROMPT_BYTES;
        let encoded = self.encode_inputs(encoder, params).await?;
        let by = identity(name, &serving, &version);
        let Some(labelling) = labelling else {
            return scores::classified(by, encoder.model(), &encoded, raw);
        };
        if !long {
            return scores::labelled(by, encoder.model(), &encoded, &labelling);
        }
        // The texts are tokenised again, for the places of their tokens.
        let model = Arc::clone(encoder.model());
        self.long_requests.run(move || scores::labelled(by, &model, &encoded, &labelling)).await?
    }

    async fn rank_documents(&self, request: RerankRequest) -> Result<Reranked, ApiError> {
        let (model, revision) = (request.model.as_deref(), request.revision.as_deref());
        let AcquiredModel { name, version, serving, busy: _busy, adapter: _ } =
            self.acquire(&Asked { model, revision, task: Task::Rerank })?;
        let Runner::Rerank(encoder) = &serving.runner else {
            return Err(wrong_task(name, &serving));
        };
        let raw = request.raw_scores;
        let encoded = self.encode_inputs(encoder, scores::rerank_params(request)).await?;
        let by = identity(name, &serving, &version);
        scores::reranked(by, encoder.model(), &encoded, raw)
    }

    /// Encodes texts. Many or long ones are tokenised away from the threads that serve connections.
    async fn encode_inputs(&self, encoder: &Encoder, params: EncodeParams) -> Result<Encoded, ApiError> {
        let submitted = if scores::text_bytes(&params.texts) > LONG_PROMPT_BYTES {
            let encoder = encoder.clone();
            self.long_requests.run(move || encoder.submit(&params)).await?
        } else {
            encoder.submit(&params)
        };
        let failed = |error| embed::failed(&error);
        let _span = Trace::current().child("encode");
        submitted.map_err(failed)?.await.map_err(failed)
    }
}

fn identity(name: String, serving: &Serving, version: &ManagedModel) -> embed::ModelIdentity {
    embed::ModelIdentity { name, digest: serving.digest.clone(), revision: version.spec.revision.clone() }
}

fn wrong_task(model: String, serving: &Serving) -> ApiError {
    ApiError::WrongTask { model, task: serving.runner.task() }
}

impl Health for ModelServer {
    fn liveness(&self) -> Verdict {
        let models = self.table.snapshot();
        for managed in models.models().iter().flat_map(|model| model.versions()) {
            let status = self.statuses().status(managed.id);
            let name = managed.spec.name();
            match (managed.serving(), status.state()) {
                (_, ModelState::Draining | ModelState::Failed) => {}
                (Some(serving), _) => {
                    if let Some(fault) = engine_fault(name, serving.runner.heartbeat(), self.engine_stall) {
                        return fault;
                    }
                }
                (None, ModelState::Loading) => {
                    if let Some(fault) = load_fault(name, managed.progress_age()) {
                        return fault;
                    }
                }
                _ => {}
            }
        }
        Verdict::yes("alive")
    }

    fn startup(&self) -> Verdict {
        self.statuses().startup()
    }

    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.statuses().watch_readiness()
    }
}

impl Inference for ModelServer {
    fn is_full(&self) -> bool {
        let serving = self.only_version().and_then(|version| version.answering());
        serving.is_some_and(|serving| matches!(&serving.runner, Runner::Generate(engine) if engine.is_full()))
    }

    fn refuse(&self, arrival: &Arrival<'_>) -> Option<ApiError> {
        let version = self.only_version()?;
        let serving = version.answering()?;
        let Runner::Generate(engine) = &serving.runner else { return None };
        let error = engine.refuse(params::class(arrival.priority), arrival.tenant)?;
        // Nothing of it stays, but it has come: a process that ends waits until no request comes any more.
        drop(version.inflight().register());
        Some(generate::refused(&error))
    }

    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        Box::pin(self.admit(request))
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        Box::pin(self.encode(request))
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        Box::pin(self.classify_texts(request))
    }

    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        Box::pin(self.rank_documents(request))
    }

    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        Box::pin(self.count(request))
    }

    fn load_model(&self, request: LoadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(self.load_asked(request))
    }

    fn unload_model(&self, request: UnloadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(async move {
            self.check_allowed()?;
            self.unload_with(request).await
        })
    }

    fn swap_model(&self, request: SwapModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(std::future::ready(self.check_allowed().and_then(|()| self.swap_with(request))))
    }

    fn rollback_model(&self, request: RollbackModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(std::future::ready(self.check_allowed().and_then(|()| self.rollback_with(&request))))
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.statuses().watch()
    }
}

#[cfg(test)]
mod tests;
