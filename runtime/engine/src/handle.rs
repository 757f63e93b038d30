//! The engine as its callers see it: a handle that is cheap to clone and never blocks on the device.

use crate::answer::Answer;
use crate::census::Census;
use crate::config::{EngineConfig, Sizes, Speculation, StartError};
use crate::device::Start;
use crate::generation::Generation;
use crate::grammar::{Constraint, Grammars};
use crate::metrics::{Counted, EngineMetrics, ModelMetrics};
use crate::priority::Priority;
use crate::request::{GenerateError, GenerateParams, GenerationEvent, Prompt, SubmitError};
use crate::sequence::Job;
use crate::shared::{Heartbeat, Shared, Ticket};
use crate::speculation;
use crate::tenants::Tenant;
use futures::StreamExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use trustformers_model::{Model, ModelFacts};
use trustformers_plan::{Backend, KV_BLOCK_TOKENS, LoadProgress, MemoryReport, Numerics};

/// Requests that may come beyond a full queue at once, because they have precedence over some in it. Those leave it
/// before the next step.
const DISPLACING: usize = 16;

/// Prompt tokens of the warm-up generation: enough to run the batched kernels once.
const WARM_UP_PROMPT_TOKENS: usize = 32;

/// Tokens that the warm-up generation produces: the first comes from the prompt, the second from a decode step.
const WARM_UP_TOKENS: usize = 2;

/// What an engine runs and how large it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// The device in its own words, such as `cpu avx512-vnni, 2 threads`.
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
    /// KV blocks of 16 tokens.
    pub kv_blocks: usize,
    /// Bytes that the model takes on the device, by purpose.
    pub memory: MemoryReport,
}

/// A running engine. Clones are handles to the same one; it ends when `stop` is called, or when all handles are gone
/// and all generations have ended.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    model: Arc<Model>,
    info: EngineInfo,
    sizes: Sizes,
    /// Whether classes count.
    priority: bool,
    shared: Arc<Shared>,
    census: Arc<Census>,
    metrics: ModelMetrics,
    grammars: Grammars,
    /// Taken by `stop`, which is what wakes an idle device thread.
    jobs: Mutex<Option<SyncSender<Job>>>,
    /// Only one warm-up at a time, because the job channel has one place for it.
    warming: tokio::sync::Mutex<()>,
}

/// A checked request on its way to the device thread.
struct Request<'a> {
    params: &'a GenerateParams,
    prompt: Arc<[u32]>,
    constraint: Option<Constraint>,
    /// `None` for the engine's own.
    metrics: Option<ModelMetrics>,
    ticket: Ticket,
}

impl Engine {
    /// Loads `model` into `backend` on a new thread of the engine's own and returns when it is ready for requests.
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

    /// [`Engine::start`] that tells `progress`, on the engine's thread, how far the device has taken the weights in.
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
        let facts = model.facts();
        let bytes = |facts| kv_block_bytes(facts, backend.caps().kv_element_bytes);
        let mut block_bytes = bytes(facts);
        if let Some(Speculation::Draft(draft)) = &config.speculation {
            speculation::check(&model, draft)?;
            block_bytes += bytes(draft.facts());
        }
        let sizes = config.sizes(facts.context_tokens, block_bytes)?;
        if let Some(Speculation::Draft(draft)) = &config.speculation {
            speculation::check_context(draft, sizes.context_tokens)?;
        }
        let shared = Arc::new(Shared::new(sizes.max_batch_size + sizes.max_queue));
        let own = metrics.for_model(&config.model_label);
        // One place for every request that `Shared` lets in flight and one for a warm-up: a send never finds the
        // channel full.
        let (sender, receiver) = sync_channel(sizes.max_batch_size + sizes.max_queue + DISPLACING + 1);
        let device = backend.caps().description.clone();
        let start = Start {
            model: Arc::clone(&model),
            backend,
            numerics: config.numerics,
            speculation: config.speculation.clone(),
            sizes,
            jobs: receiver,
            shared: Arc::clone(&shared),
            metrics: own.clone(),
            progress,
        };
        let memory = start.spawn()?;
        metrics.watch(&config.model_label, &shared);
        let info = EngineInfo {
            device,
            numerics: config.numerics,
            context_tokens: sizes.context_tokens,
            max_batch_size: sizes.max_batch_size,
            max_queue: sizes.max_queue,
            token_budget: sizes.token_budget,
            kv_blocks: sizes.kv_blocks,
            memory,
        };
        let inner = Inner {
            grammars: Grammars::new(Arc::clone(&model), config.grammar_memory_bytes),
            model,
            info,
            sizes,
            priority: config.priority,
            shared,
            census: Arc::default(),
            metrics: own,
            jobs: Mutex::new(Some(sender)),
            warming: tokio::sync::Mutex::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes a request, or says at once why not. Tokenises on the caller's thread (about a millisecond for a
    /// thousand tokens) and never waits for the device. A grammar is compiled there too, which takes milliseconds, and
    /// some hundred of them for the first of a model: do that where blocking is allowed.
    ///
    /// # Errors
    /// Overload, a prompt that does not fit, a field out of range, or an engine that ends.
    pub fn submit(&self, params: &GenerateParams) -> Result<Generation, SubmitError> {
        let result = self.try_submit(params);
        match &result {
            Err(SubmitError::Overloaded { .. } | SubmitError::Busy { .. }) => {
                self.inner.metrics.overloaded.inc()
            }
            Err(SubmitError::Invalid { .. } | SubmitError::PromptTooLong { .. }) => {
                self.inner.metrics.invalid.inc();
            }
            Ok(_) | Err(SubmitError::Stopped) => {}
        }
        result
    }

    fn try_submit(&self, params: &GenerateParams) -> Result<Generation, SubmitError> {
        params.check()?;
        params.check_ids(self.inner.model.facts().vocabulary)?;
        let shared = &self.inner.shared;
        let (queue, retry_after) = (shared.waiting(), shared.retry_after());
        let beyond = || {
            let precedes = self.inner.census.has_precedence(self.class_of(params), &params.tenant, 1);
            if precedes { shared.enter_many(1, DISPLACING) } else { None }
        };
        let Some(ticket) = shared.enter().or_else(beyond) else {
            return Err(if shared.accepting() {
                SubmitError::Overloaded { queue, retry_after }
            } else {
                SubmitError::Stopped
            });
        };
        // Asked only after entering, so that a drain which saw nobody in flight can rely on nobody coming.
        if !shared.accepting() {
            return Err(SubmitError::Stopped);
        }
        let prompt = self.prompt_ids(&params.prompt)?;
        let constraint =
            params.grammar.as_ref().map(|grammar| self.inner.grammars.start(grammar)).transpose()?;
        self.send(Request { params, prompt, constraint, metrics: Some(self.inner.metrics.clone()), ticket })
    }

    /// The class that counts.
    fn class_of(&self, params: &GenerateParams) -> Priority {
        if self.inner.priority { params.priority } else { Priority::Normal }
    }

    fn prompt_ids(&self, prompt: &Prompt) -> Result<Arc<[u32]>, SubmitError> {
        let invalid = |why: String| SubmitError::Invalid { field: "prompt", why };
        let ids: Arc<[u32]> = match prompt {
            Prompt::Text(text) => {
                self.inner.model.tokenizer().encode(text).map_err(|error| invalid(error.to_string()))?.into()
            }
            Prompt::Tokens(ids) => {
                let vocabulary = self.inner.model.facts().vocabulary;
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

    fn send(&self, request: Request<'_>) -> Result<Generation, SubmitError> {
        let Request { params, prompt, constraint, metrics, ticket } = request;
        // The last token of a full context is produced but never computed on, hence no place in the cache for it.
        let max_tokens = params.max_tokens.min(self.inner.sizes.context_tokens - prompt.len());
        // Every token of the answer and one end fit: the device thread never waits for a slow reader. The channel
        // takes memory only as it fills.
        let (events, receiver) = mpsc::channel(max_tokens + 1);
        let class = self.class_of(params);
        let tenant: Tenant = params.tenant.as_str().into();
        let job = Job {
            // Only the warm-up is not a caller's request: it must reach a decode step whatever it produces.
            answer: Answer::new(params, &prompt, max_tokens, metrics.is_some(), constraint),
            prompt: Arc::clone(&prompt),
            class,
            _enrolled: metrics.is_some().then(|| self.inner.census.enrol(class, Arc::clone(&tenant), 1)),
            tenant,
            submitted: Instant::now(),
            events,
            waiting: metrics.as_ref().map(|metrics| Counted::new(&metrics.waiting)),
            metrics,
            _ticket: ticket,
        };
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.as_ref().ok_or(SubmitError::Stopped)?;
        sender.try_send(job).map_err(|_| SubmitError::Stopped)?;
        Ok(Generation::new(receiver, prompt))
    }

    /// Runs one short generation through the whole path and gives the time that it took. It is not counted in the
    /// metrics' requests and may run while others do.
    ///
    /// # Errors
    /// The backend fails, the logits are not numbers, or the engine ends.
    pub async fn warm_up(&self) -> Result<Duration, GenerateError> {
        let _one_at_a_time = self.inner.warming.lock().await;
        let started = Instant::now();
        let room = self.inner.sizes.context_tokens.saturating_sub(WARM_UP_TOKENS).max(1);
        let id = self.inner.model.tokenizer().eos_ids().first().copied().unwrap_or(0);
        let prompt: Arc<[u32]> = vec![id; WARM_UP_PROMPT_TOKENS.min(room)].into();
        let params = GenerateParams::greedy(String::new(), WARM_UP_TOKENS);
        let ticket = self.inner.shared.enter_unbounded();
        let request = Request { params: &params, prompt, constraint: None, metrics: None, ticket };
        let mut events = self.send(request).map_err(|_| GenerateError::Stopped)?;
        while let Some(event) = events.next().await {
            if let GenerationEvent::Finished { .. } = event? {
                break;
            }
        }
        Ok(started.elapsed())
    }

    /// What this engine runs and how large it was made.
    pub fn info(&self) -> &EngineInfo {
        &self.inner.info
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.inner.model
    }

    /// Signs of life, without asking the device thread.
    pub fn heartbeat(&self) -> Heartbeat {
        self.inner.shared.heartbeat()
    }

    /// Requests that were taken and have not ended, waiting ones included.
    pub fn in_flight(&self) -> usize {
        self.inner.shared.in_flight()
    }

    /// Requests that wait for room in a batch.
    pub fn queued(&self) -> usize {
        self.inner.shared.waiting()
    }

    /// Refuses new requests from now on and waits until those in flight have ended. There is no time limit: wrap it
    /// in one and call [`Engine::stop`] after.
    pub async fn drain(&self) {
        self.inner.shared.refuse_new();
        self.inner.shared.until_idle().await;
    }

    /// Ends the engine after the current step. Generations in flight end with [`GenerateError::Stopped`]; when this
    /// returns, the backend and its memory are gone.
    pub async fn stop(&self) {
        self.inner.shared.stop();
        drop(self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.inner.shared.until_ended().await;
    }
}

/// Bytes that one KV block takes in all layers, keys and values together.
fn kv_block_bytes(facts: &ModelFacts, element_bytes: usize) -> u64 {
    let per_token = facts.layers as u64 * 2 * facts.kv_heads as u64 * facts.head_dim as u64;
    per_token * (KV_BLOCK_TOKENS * element_bytes) as u64
}
