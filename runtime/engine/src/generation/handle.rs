//! The generation engine as its callers see it: a handle that is cheap to clone and never blocks on the
//! device.

mod adapters;

use super::buffer::{ANSWER_BUFFER_BYTES, AnswerBudget};
use super::completion::{Completion, CompletionLimits};
use super::device::{DeviceJob, GenerationStart};
use super::sequence::GenerationJob;
use super::stream::Generation;
use crate::adapters::AdapterRegistry;
use crate::config::{EngineConfig, EngineSizes, MAX_DISPLACING, StartError};
use crate::device_thread::{Heartbeat, Permit, Shared};
use crate::estimate;
use crate::faults::check_tokenizer_ids;
use crate::grammar::{Constraint, Grammars};
use crate::metrics::{EngineMetrics, GaugeGuard, ModelMetrics};
use crate::request::{
    GenerateError, GenerateParams, GenerationEvent, GenerationObserver, Prompt, SubmitError,
};
use crate::scheduling::admission::AdmissionCounts;
use crate::scheduling::priority::Priority;
use crate::scheduling::tenants::Tenant;
use futures::StreamExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use trustformers_model::Model;
use trustformers_plan::{Backend, KvType, LoadProgress, MemoryReport, Numerics};

/// Prompt tokens of the warm-up generation: enough to run the batched kernels.
const WARM_UP_PROMPT_TOKENS: usize = 32;

/// Tokens that the warm-up generation produces: the first from the prompt, the second from a decode step.
const WARM_UP_TOKENS: usize = 2;

/// The text of the warm-up prompt. It goes through the tokenizer, so that ids which do not belong to the
/// weights are found before the model is ready.
const WARM_UP_TEXT: &str = "warm up";

/// What an engine runs, and its sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// The device's description of itself, such as `cpu avx512-vnni, 2 threads`.
    pub device: String,
    /// How closely it follows f32 arithmetic.
    pub numerics: Numerics,
    /// Longest sequence in tokens, prompt and answer together.
    pub context_tokens: usize,
    /// Most sequences computed at once.
    pub max_batch_size: usize,
    /// Most requests waiting beyond those.
    pub max_queue: usize,
    /// Most token rows of one step.
    pub token_budget: usize,
    /// The most KV blocks of 16 tokens.
    pub kv_blocks: usize,
    /// Bytes of the KV cache at its largest; at first it has those in `memory`.
    pub kv_limit_bytes: u64,
    /// The type in which keys and values are cached.
    pub kv_type: KvType,
    /// Bytes that the model takes on the device after the load, by purpose.
    pub memory: MemoryReport,
}

/// A running engine. Clones are handles to the same one. It ends when `stop` is called, or when all handles
/// are dropped and all generations have ended.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<EngineInner>,
}

#[derive(Debug)]
struct EngineInner {
    model: Arc<Model>,
    info: EngineInfo,
    sizes: EngineSizes,
    /// Whether priority classes count.
    priority: bool,
    shared: Arc<Shared>,
    admission: Arc<AdmissionCounts>,
    answers: Arc<AnswerBudget>,
    metrics: ModelMetrics,
    grammars: Grammars,
    /// `stop` drops the sender, which wakes an idle device thread.
    jobs: Mutex<Option<SyncSender<DeviceJob>>>,
    adapters: Arc<AdapterRegistry>,
    /// Only one warm-up at a time, because the job channel has room for one.
    warming_up: tokio::sync::Mutex<()>,
}

/// A checked request on its way to the device thread.
struct CheckedRequest<'a> {
    params: &'a GenerateParams,
    prompt: Arc<[u32]>,
    constraint: Option<Constraint>,
    /// `None` for the engine's own requests.
    metrics: Option<ModelMetrics>,
    observer: Option<Box<dyn GenerationObserver>>,
    permit: Permit,
}

impl Engine {
    /// Loads `model` into `backend` on a new device thread and returns when the engine is ready for requests.
    /// Blocks for as long as the backend takes to load: call it from a blocking context.
    ///
    /// # Errors
    /// A setting that cannot be honoured, a backend that refuses the model, or no thread.
    pub fn start(
        model: Arc<Model>,
        backend: Box<dyn Backend>,
        config: &EngineConfig,
        metrics: &EngineMetrics,
    ) -> Result<Self, StartError> {
        Self::start_with_progress(model, backend, config, metrics, Box::new(|_| {}))
    }

    /// [`Engine::start`] that calls `progress` on the device thread with the progress of loading the weights.
    ///
    /// # Errors
    /// As for [`Engine::start`].
    pub fn start_with_progress(
        model: Arc<Model>,
        backend: Box<dyn Backend>,
        config: &EngineConfig,
        metrics: &EngineMetrics,
        progress: Box<dyn FnMut(LoadProgress) + Send>,
    ) -> Result<Self, StartError> {
        let sizes = estimate::sizes(&model, backend.caps(), config)?;
        let shared = Arc::new(Shared::new(sizes.max_batch_size + sizes.max_queue));
        let own = metrics.for_model(&config.model_label);
        let adapters = Arc::new(AdapterRegistry::new(sizes.adapters.slots));
        let requests = sizes.max_batch_size + sizes.max_queue + MAX_DISPLACING + 1;
        // Room for every request that `Shared` admits and for one warm-up, and for adding and dropping each
        // adapter: a send never finds the channel full.
        let (sender, receiver) = sync_channel(requests + 2 * sizes.adapters.slots);
        let device = backend.caps().description.clone();
        let start = GenerationStart {
            model: Arc::clone(&model),
            backend,
            numerics: config.numerics,
            speculation: config.speculation.clone(),
            speculation_costs: config.speculation_costs,
            sizes,
            jobs: receiver,
            adapters: Arc::clone(&adapters),
            shared: Arc::clone(&shared),
            metrics: own.clone(),
            progress,
        };
        let memory = start.spawn()?;
        metrics.track_step_age(&config.model_label, &shared);
        let info = EngineInfo {
            device,
            numerics: config.numerics,
            context_tokens: sizes.context_tokens,
            max_batch_size: sizes.max_batch_size,
            max_queue: sizes.max_queue,
            token_budget: sizes.token_budget,
            kv_blocks: sizes.kv_blocks,
            kv_limit_bytes: sizes.kv_blocks as u64 * sizes.kv_block_bytes,
            kv_type: sizes.kv_type,
            memory,
        };
        let inner = EngineInner {
            grammars: Grammars::new(Arc::clone(&model), config.grammar_memory_bytes),
            model,
            info,
            sizes,
            priority: config.priority,
            shared,
            admission: Arc::default(),
            answers: AnswerBudget::new(ANSWER_BUFFER_BYTES),
            metrics: own,
            jobs: Mutex::new(Some(sender)),
            adapters,
            warming_up: tokio::sync::Mutex::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Admits a request or refuses it at once. It tokenises on the caller's thread (about a millisecond for a
    /// thousand tokens) and never waits for the device. It compiles a grammar there too, which takes
    /// milliseconds, and some hundred more for the first grammar of a model without a warm-up: call it where
    /// blocking is allowed.
    ///
    /// # Errors
    /// Overload, a prompt that does not fit, a field out of range, wrong model files, or an engine that is
    /// stopping.
    pub fn submit(&self, params: &GenerateParams) -> Result<Generation, SubmitError> {
        self.submit_observed(params, None)
    }

    /// [`Engine::submit`] of a generation whose course `observer` is told. A request that is refused here is
    /// not observed.
    ///
    /// # Errors
    /// As for [`Engine::submit`].
    pub fn submit_observed(
        &self,
        params: &GenerateParams,
        observer: Option<Box<dyn GenerationObserver>>,
    ) -> Result<Generation, SubmitError> {
        let result = self.try_submit(params, observer);
        match &result {
            Err(SubmitError::Overloaded { .. } | SubmitError::Busy { .. }) => {
                self.inner.metrics.overloaded.inc();
            }
            Err(SubmitError::Invalid { .. } | SubmitError::PromptTooLong { .. }) => {
                self.inner.metrics.invalid.inc();
            }
            Ok(_) | Err(SubmitError::Model(_) | SubmitError::Stopped) => {}
        }
        result
    }

    /// Whether only requests that precede others in flight are admitted at this moment.
    pub fn is_full(&self) -> bool {
        !self.inner.shared.has_permit()
    }

    /// Refuses a request of this class and tenant as [`Engine::submit`] would at this moment, before anything
    /// else is known of it. `None`: it has to be submitted. A refusal counts as that of a request.
    pub fn refuse(&self, priority: Priority, tenant: &str) -> Option<SubmitError> {
        let shared = &self.inner.shared;
        if shared.has_permit() || !shared.accepting() {
            return None;
        }
        let (queue, retry_after) = (shared.waiting(), shared.retry_after());
        if self.inner.admission.has_precedence(self.effective_class(priority), tenant, 1) {
            return None;
        }
        self.inner.metrics.overloaded.inc();
        Some(SubmitError::Overloaded { queue, retry_after })
    }

    fn try_submit(
        &self,
        params: &GenerateParams,
        observer: Option<Box<dyn GenerationObserver>>,
    ) -> Result<Generation, SubmitError> {
        params.check()?;
        params.check_ids(self.inner.model.facts().vocabulary)?;
        params.adapter.as_deref().map_or(Ok(()), |name| self.inner.adapters.check(name))?;
        let shared = &self.inner.shared;
        let (queue, retry_after) = (shared.waiting(), shared.retry_after());
        let displace = || {
            let class = self.effective_class(params.priority);
            let precedes = self.inner.admission.has_precedence(class, &params.tenant, 1);
            if precedes { shared.acquire_many(1, MAX_DISPLACING) } else { None }
        };
        let Some(permit) = shared.acquire().or_else(displace) else {
            return Err(if shared.accepting() {
                SubmitError::Overloaded { queue, retry_after }
            } else {
                SubmitError::Stopped
            });
        };
        // Checked only with a permit, so that a drain which found nothing in flight can rely on nothing
        // arriving.
        if !shared.accepting() {
            return Err(SubmitError::Stopped);
        }
        let prompt = self.prompt_ids(&params.prompt)?;
        let constraint =
            params.grammar.as_ref().map(|grammar| self.inner.grammars.start(grammar)).transpose()?;
        let metrics = Some(self.inner.metrics.clone());
        self.send(CheckedRequest { params, prompt, constraint, metrics, observer, permit })
    }

    /// The class of a request; all are of class normal where classes do not count.
    fn effective_class(&self, priority: Priority) -> Priority {
        if self.inner.priority { priority } else { Priority::Normal }
    }

    fn prompt_ids(&self, prompt: &Prompt) -> Result<Arc<[u32]>, SubmitError> {
        let invalid = |why: String| SubmitError::Invalid { field: "prompt", why };
        let vocabulary = self.inner.model.facts().vocabulary;
        let ids: Arc<[u32]> = match prompt {
            Prompt::Text(text) => {
                let encoded = self.inner.model.tokenizer().encode(text);
                let ids = encoded.map_err(|error| invalid(error.to_string()))?;
                check_tokenizer_ids(&ids, vocabulary)?;
                ids.into()
            }
            Prompt::Tokens(ids) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                    return Err(invalid(format!(
                        "token id {id} is outside the model's vocabulary of {vocabulary}"
                    )));
                }
                ids.as_slice().into()
            }
        };
        if ids.is_empty() {
            let empty = match prompt {
                Prompt::Text(text) if !text.is_empty() => {
                    "the model's vocabulary has no token for any character of it; give other text"
                }
                _ => "it is empty; at least one token is needed",
            };
            return Err(invalid(empty.to_owned()));
        }
        let limit = self.inner.sizes.context_tokens - 1;
        if ids.len() > limit {
            return Err(SubmitError::PromptTooLong { tokens: ids.len(), limit });
        }
        Ok(ids)
    }

    fn send(&self, request: CheckedRequest<'_>) -> Result<Generation, SubmitError> {
        let CheckedRequest { params, prompt, constraint, metrics, observer, permit } = request;
        // The last token of a full context is produced but never computed, so it needs no room in the cache.
        let max_tokens = params.max_tokens.min(self.inner.sizes.context_tokens - prompt.len());
        // Only the warm-up is no caller's request: it must reach a decode step whatever it produces.
        let limits = CompletionLimits { max_tokens, ends_at_eos: metrics.is_some() };
        let (events, receiver) = self.inner.answers.channel();
        let class = self.effective_class(params.priority);
        let tenant: Tenant = params.tenant.as_str().into();
        let admission = &self.inner.admission;
        let mut job = GenerationJob {
            completion: Completion::new(params, &prompt, limits, constraint)
                .excluding(self.inner.model.tokenizer().unused_ids()),
            prompt: Arc::clone(&prompt),
            class,
            adapter: None,
            _inflight: metrics.is_some().then(|| admission.register(class, Arc::clone(&tenant), 1)),
            tenant,
            submitted: Instant::now(),
            events,
            waiting: metrics.as_ref().map(|metrics| GaugeGuard::new(&metrics.waiting)),
            served_tokens: metrics.as_ref().map(|metrics| metrics.tenants.served_tokens(&params.tenant)),
            metrics,
            observer,
            _permit: permit,
        };
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.as_ref().ok_or(SubmitError::Stopped)?;
        // Under the lock, so that an adapter that is removed is removed before this or after it.
        job.adapter = params.adapter.as_deref().map(|name| self.inner.adapters.find(name)).transpose()?;
        sender.try_send(DeviceJob::Generate(Box::new(job))).map_err(|_| SubmitError::Stopped)?;
        Ok(Generation::new(receiver, prompt))
    }

    /// Runs one short generation through the whole path, builds the vocabulary for formats beside it, and
    /// returns the time that both took. It is not counted in the metrics of requests and may run beside
    /// others.
    ///
    /// # Errors
    /// The device fails, the model's files are wrong, or the engine is stopping.
    pub async fn warm_up(&self) -> Result<Duration, GenerateError> {
        let _one_at_a_time = self.inner.warming_up.lock().await;
        let started = Instant::now();
        let prompt = self.warm_up_prompt()?;
        let params = GenerateParams::greedy(String::new(), WARM_UP_TOKENS);
        let permit = self.inner.shared.acquire_unbounded();
        let request = CheckedRequest {
            params: &params,
            prompt,
            constraint: None,
            metrics: None,
            observer: None,
            permit,
        };
        let mut events = self.send(request).map_err(|_| GenerateError::Stopped)?;
        // Beside the device: the vocabulary for formats takes some hundred milliseconds of a processor.
        let inner = Arc::clone(&self.inner);
        let grammars = tokio::task::spawn_blocking(move || inner.grammars.prepare());
        let mut generated = Ok(());
        while let Some(event) = events.next().await {
            match event {
                Ok(GenerationEvent::Finished { .. }) => break,
                Ok(GenerationEvent::Token { .. }) => {}
                Err(error) => {
                    generated = Err(error);
                    break;
                }
            }
        }
        // Awaited in either case: it holds the model. A model without structured output serves everything
        // else, and requests with a format are told why.
        if let Ok(Err(why)) = grammars.await {
            tracing::warn!(why, "the model has no structured output");
        }
        generated.map(|()| started.elapsed())
    }

    /// The ids of a text, repeated.
    fn warm_up_prompt(&self) -> Result<Arc<[u32]>, GenerateError> {
        let (model, context_tokens) = (&self.inner.model, self.inner.sizes.context_tokens);
        let tokenizer = model.tokenizer();
        let mut ids = tokenizer.encode(WARM_UP_TEXT).unwrap_or_default();
        ids.extend(tokenizer.eos_ids());
        check_tokenizer_ids(&ids, model.facts().vocabulary)?;
        if ids.is_empty() {
            ids.push(0);
        }
        let room = context_tokens.saturating_sub(WARM_UP_TOKENS).max(1);
        Ok(ids.iter().copied().cycle().take(WARM_UP_PROMPT_TOKENS.min(room)).collect())
    }

    /// What this engine runs, and its sizes.
    pub fn info(&self) -> &EngineInfo {
        &self.inner.info
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.inner.model
    }

    /// Whether the engine makes progress. Does not involve the device thread.
    pub fn heartbeat(&self) -> Heartbeat {
        self.inner.shared.heartbeat()
    }

    /// Requests that were admitted and have not ended, waiting ones included.
    pub fn in_flight(&self) -> usize {
        self.inner.shared.in_flight()
    }

    /// Requests that wait for room in a batch.
    pub fn queued(&self) -> usize {
        self.inner.shared.waiting()
    }

    /// Bytes of the events that callers have not read yet, of finished answers too.
    pub fn unread_bytes(&self) -> usize {
        self.inner.answers.unread_bytes()
    }

    /// Refuses new requests from now on and waits until those in flight have ended. It has no time limit:
    /// wrap it in one, and then call [`Engine::stop`].
    pub async fn drain(&self) {
        self.inner.shared.refuse_new();
        self.inner.shared.until_idle().await;
    }

    /// Ends the engine after the current step. Generations in flight end with [`GenerateError::Stopped`].
    /// When this returns, the backend and its memory are released.
    pub async fn stop(&self) {
        self.inner.shared.stop();
        drop(self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.inner.shared.until_ended().await;
    }
}
