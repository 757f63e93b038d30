//! The encoder engine as its callers see it.

use super::config::{EncoderConfig, EncoderSizes};
use super::device::{Caller, Job, Start};
use super::metrics::{EncoderMetrics, EncoderSeries};
use super::request::{EncodeError, EncodeParams, Encoded, MAX_TEXTS};
use super::strategy::BatchStrategy;
use crate::census::Census;
use crate::config::StartError;
use crate::metrics::Counted;
use crate::priority::Priority;
use crate::request::{MAX_TENANT_BYTES, Prompt};
use crate::shared::{Heartbeat, Shared, Ticket};
use crate::tenants::Tenant;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use trustformers_model::{Model, Task};
use trustformers_plan::{Backend, LoadProgress, MemoryReport, Numerics};

/// Tokens of the texts that the warm-up encodes, one after the other. The first touches all memory; then short and long
/// ones in turn show what a step costs whatever is in it.
const WARM_UP_TOKENS: [usize; 7] = [32, 4, 64, 4, 64, 4, 64];

/// What travels from the device thread to a caller.
pub(super) type Outcome = Result<Encoded, EncodeError>;

/// What an encoder engine runs and how large it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderInfo {
    /// The device in its own words, such as `cpu avx512-vnni, 2 threads`.
    pub device: String,
    /// How closely it follows f32 arithmetic.
    pub numerics: Numerics,
    /// When the texts that wait become a step.
    pub strategy: BatchStrategy,
    /// Longest time that a free device waits for more texts.
    pub max_wait: Duration,
    /// Whether a request's class decides who goes first.
    pub priority: bool,
    /// Longest text in tokens, special tokens included.
    pub context_tokens: usize,
    /// Most texts of one step.
    pub max_batch_size: usize,
    /// Texts that may wait beyond those of one step before requests are refused.
    pub max_queue: usize,
    /// Most tokens of one step.
    pub token_budget: usize,
    /// Bytes that the model takes on the device, by purpose.
    pub memory: MemoryReport,
}

/// A running encoder engine. Clones are handles to the same one; it ends when `stop` is called, or when all handles
/// are gone and what was submitted has been answered.
#[derive(Debug, Clone)]
pub struct Encoder {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    model: Arc<Model>,
    info: EncoderInfo,
    sizes: EncoderSizes,
    shared: Arc<Shared>,
    census: Arc<Census>,
    series: EncoderSeries,
    /// Taken by `stop`, which is what wakes an idle device thread.
    jobs: Mutex<Option<SyncSender<Job>>>,
    /// Only one warm-up at a time, because the job channel has one place for it.
    warming: tokio::sync::Mutex<()>,
}

/// Texts that were taken in; a future of their rows. Dropping it cancels the work: texts that have not been computed
/// yet never are.
#[derive(Debug)]
pub struct Encoding {
    reply: oneshot::Receiver<Outcome>,
}

impl Encoding {
    /// Waits on the current thread; for programs and tests without an async runtime.
    ///
    /// # Errors
    /// As the future itself.
    ///
    /// # Panics
    /// When called from within an async runtime.
    pub fn blocking_wait(self) -> Result<Encoded, EncodeError> {
        self.reply.blocking_recv().unwrap_or(Err(EncodeError::Stopped))
    }
}

impl Future for Encoding {
    type Output = Result<Encoded, EncodeError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(ready!(Pin::new(&mut self.reply).poll(context)).unwrap_or(Err(EncodeError::Stopped)))
    }
}

impl Encoder {
    /// Loads `model` into `backend` on a new thread of the engine's own and returns when it is ready for requests.
    /// Blocks for as long as the backend takes to load: call it from a blocking context. `progress` is told on the
    /// engine's thread how far the device has taken the weights in.
    ///
    /// # Errors
    /// A model of another task, a setting that cannot be honoured, a backend that refuses the model, or no thread.
    pub fn start(
        model: Arc<Model>,
        backend: Box<dyn Backend>,
        config: &EncoderConfig,
        metrics: &EncoderMetrics,
        progress: Box<dyn FnMut(LoadProgress) + Send>,
    ) -> Result<Self, StartError> {
        if model.task() == Task::Generate {
            let why = "it continues texts, which an encoder does not; start a generation engine".to_owned();
            return Err(StartError::Invalid { field: "model", why });
        }
        let sizes = config.sizes(model.facts().context_tokens, model.tokenizer().special_tokens())?;
        let places = sizes.rules.max_texts + sizes.max_queue;
        let shared = Arc::new(Shared::new(places));
        let series = metrics.for_model(&config.model_label);
        // Every request takes at least one of the places that `Shared` counts, `max_queue` beyond them included, and the
        // warm-up one more: a send never finds the channel full.
        let (sender, receiver) = sync_channel(places + sizes.max_queue + 1);
        let device = backend.caps().description.clone();
        let start = Start {
            model: Arc::clone(&model),
            backend,
            numerics: config.numerics,
            sizes,
            jobs: receiver,
            shared: Arc::clone(&shared),
            series: series.clone(),
            progress,
        };
        let memory = start.spawn()?;
        metrics.engines.watch(&config.model_label, &shared);
        let info = EncoderInfo {
            device,
            numerics: config.numerics,
            strategy: sizes.rules.strategy,
            max_wait: sizes.rules.max_wait,
            priority: sizes.rules.by_class,
            context_tokens: sizes.context_tokens,
            max_batch_size: sizes.rules.max_texts,
            max_queue: sizes.max_queue,
            token_budget: sizes.rules.max_tokens,
            memory,
        };
        let jobs = Mutex::new(Some(sender));
        let warming = tokio::sync::Mutex::new(());
        let inner = Inner { model, info, sizes, shared, census: Arc::default(), series, jobs, warming };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes a request, or says at once why not. Tokenises on the caller's thread (about a millisecond for a thousand
    /// tokens) and never waits for the device.
    ///
    /// # Errors
    /// Overload, a text that does not fit, a field out of range, or an engine that ends.
    pub fn submit(&self, params: &EncodeParams) -> Result<Encoding, EncodeError> {
        let result = self.try_submit(params);
        match &result {
            Err(EncodeError::Overloaded { .. }) => self.inner.series.overloaded.inc(),
            Err(EncodeError::Invalid { .. } | EncodeError::TooLong { .. }) => self.inner.series.invalid.inc(),
            _ => {}
        }
        result
    }

    fn try_submit(&self, params: &EncodeParams) -> Result<Encoding, EncodeError> {
        let count = params.texts.len();
        if !(1..=MAX_TEXTS).contains(&count) {
            let why = format!("{count} texts are not between 1 and {MAX_TEXTS}; send several requests");
            return Err(EncodeError::Invalid { field: "input", why });
        }
        let bytes = params.tenant.len();
        if bytes > MAX_TENANT_BYTES {
            let why = format!("{bytes} bytes are more than the {MAX_TENANT_BYTES} that are allowed");
            return Err(EncodeError::Invalid { field: "tenant", why });
        }
        let ticket = self.enter(params)?;
        let submitted = Instant::now();
        let (mut texts, mut truncated) = (Vec::with_capacity(count), Vec::new());
        for (index, text) in params.texts.iter().enumerate() {
            let (ids, cut) = self.ids(text)?;
            if cut {
                if !params.truncate {
                    return Err(EncodeError::TooLong { index, limit: self.inner.sizes.context_tokens });
                }
                truncated.push(index);
            }
            texts.push(ids);
        }
        let (reply, answer) = oneshot::channel();
        let series = Some(self.inner.series.clone());
        let counted = Some(Counted::new(&self.inner.series.waiting));
        let (class, tenant) = (self.class_of(params), Tenant::from(params.tenant.as_str()));
        let enrolled = Some(self.inner.census.enrol(class, Tenant::clone(&tenant), count));
        let caller = Caller { reply, series, counted, enrolled, ticket };
        self.send(Job { texts, truncated, class, tenant, submitted, caller })?;
        Ok(Encoding { reply: answer })
    }

    /// Places for the texts of a request. A full queue has some more for those with precedence over what is in it.
    fn enter(&self, params: &EncodeParams) -> Result<Ticket, EncodeError> {
        let (shared, count) = (&self.inner.shared, params.texts.len());
        let (waiting, retry_after) = (shared.waiting(), shared.retry_after());
        let beyond = || {
            let precedes = self.inner.census.has_precedence(self.class_of(params), &params.tenant, count);
            if precedes { shared.enter_many(count, self.inner.sizes.max_queue) } else { None }
        };
        let ticket = shared.enter_many(count, 0).or_else(beyond);
        // Asked only after entering, so that a drain which saw nobody in flight can rely on nobody coming.
        if !shared.accepting() {
            return Err(EncodeError::Stopped);
        }
        ticket.ok_or(EncodeError::Overloaded { waiting, retry_after })
    }

    /// The class that counts.
    fn class_of(&self, params: &EncodeParams) -> Priority {
        if self.inner.sizes.rules.by_class { params.priority } else { Priority::Normal }
    }

    fn send(&self, job: Job) -> Result<(), EncodeError> {
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.as_ref().ok_or(EncodeError::Stopped)?;
        sender.try_send(job).map_err(|_| EncodeError::Stopped)
    }

    /// The ids that are computed, and whether the text has more.
    fn ids(&self, text: &Prompt) -> Result<(Vec<u32>, bool), EncodeError> {
        let invalid = |why: String| EncodeError::Invalid { field: "input", why };
        let limit = self.inner.sizes.context_tokens;
        match text {
            Prompt::Text(text) => {
                let encoded =
                    self.inner.model.encode_up_to(text, limit).map_err(|error| invalid(error.to_string()))?;
                Ok((encoded.ids, encoded.cut))
            }
            Prompt::Tokens(ids) => {
                let vocabulary = self.inner.model.facts().vocabulary;
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                    let why = format!("token id {id} is outside the model's vocabulary of {vocabulary}");
                    return Err(invalid(why));
                }
                if ids.is_empty() {
                    return Err(invalid("a list of token ids is empty; at least one is needed".to_owned()));
                }
                Ok((ids[..ids.len().min(limit)].to_vec(), ids.len() > limit))
            }
        }
    }

    /// Encodes a few texts of different lengths through the whole path and gives the time that it took. It is not
    /// counted in the metrics' requests and may run while others do.
    ///
    /// # Errors
    /// The backend fails, the values are not numbers, or the engine ends.
    pub async fn warm_up(&self) -> Result<Duration, EncodeError> {
        let _one_at_a_time = self.inner.warming.lock().await;
        let started = Instant::now();
        for tokens in WARM_UP_TOKENS {
            let (reply, answer) = oneshot::channel();
            let texts = vec![vec![0; tokens.min(self.inner.sizes.context_tokens)]];
            let ticket = self.inner.shared.enter_unbounded();
            let caller = Caller { reply, series: None, counted: None, enrolled: None, ticket };
            let (class, tenant) = (Priority::High, Tenant::from(""));
            let (truncated, submitted) = (Vec::new(), Instant::now());
            self.send(Job { texts, truncated, class, tenant, submitted, caller })?;
            answer.await.unwrap_or(Err(EncodeError::Stopped))?;
        }
        Ok(started.elapsed())
    }

    /// What this engine runs and how large it was made.
    pub fn info(&self) -> &EncoderInfo {
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

    /// Texts that were taken and whose request has not ended.
    pub fn in_flight(&self) -> usize {
        self.inner.shared.in_flight()
    }

    /// Refuses new requests from now on and waits until those in flight have ended. There is no time limit: wrap it
    /// in one and call [`Encoder::stop`] after.
    pub async fn drain(&self) {
        self.inner.shared.refuse_new();
        self.inner.shared.until_idle().await;
    }

    /// Ends the engine after the current step. Requests in flight end with [`EncodeError::Stopped`]; when this returns,
    /// the backend and its memory are gone.
    pub async fn stop(&self) {
        self.inner.shared.stop();
        drop(self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.inner.shared.until_ended().await;
    }
}
