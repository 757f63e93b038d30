//! The encoder engine as its callers see it: a handle that is cheap to clone and never blocks on the device.

use super::config::{EncoderConfig, EncoderSizes};
use super::device::{Caller, EncodeJob, EncoderStart, TextTokens};
use super::metrics::{EncoderMetrics, EncoderSeries};
use super::request::{EncodeError, EncodeInput, EncodeParams, Encoded, MAX_TEXTS};
use super::strategy::BatchStrategy;
use crate::config::StartError;
use crate::device_thread::{Heartbeat, Permit, Shared};
use crate::faults::check_tokenizer_ids;
use crate::metrics::GaugeGuard;
use crate::request::MAX_TENANT_BYTES;
use crate::scheduling::admission::AdmissionCounts;
use crate::scheduling::priority::Priority;
use crate::scheduling::tenants::Tenant;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use trustformers_model::{Model, Task};
use trustformers_plan::{Backend, LoadProgress, MemoryReport, Numerics};

/// Tokens of the texts that the warm-up encodes, one after the other. The first uses all memory for the first
/// time; then short and long texts alternate, which gives the fixed cost of a step.
const WARM_UP_LENGTHS: [usize; 7] = [32, 4, 64, 4, 64, 4, 64];

/// The text of the warm-up. It goes through the tokenizer, so that ids which do not belong to the weights are
/// found before the model is ready.
const WARM_UP_TEXT: &str = "warm up";

/// The message from the device thread to a caller.
pub(super) type EncodeResult = Result<Encoded, EncodeError>;

/// What an encoder engine runs, and its sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderInfo {
    /// The device's description of itself, such as `cpu avx512-vnni, 2 threads`.
    pub device: String,
    /// How closely it follows f32 arithmetic.
    pub numerics: Numerics,
    /// When the waiting texts become a step.
    pub strategy: BatchStrategy,
    /// Longest time that a free device waits for more texts.
    pub max_wait: Duration,
    /// Whether priority classes count.
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

/// A running encoder engine. Clones are handles to the same one. It ends when `stop` is called, or when all
/// handles are dropped and all submitted requests are answered.
#[derive(Debug, Clone)]
pub struct Encoder {
    inner: Arc<EncoderInner>,
}

#[derive(Debug)]
struct EncoderInner {
    model: Arc<Model>,
    info: EncoderInfo,
    sizes: EncoderSizes,
    shared: Arc<Shared>,
    admission: Arc<AdmissionCounts>,
    series: EncoderSeries,
    /// `stop` drops the sender, which wakes an idle device thread.
    jobs: Mutex<Option<SyncSender<EncodeJob>>>,
    /// Only one warm-up at a time, because the job channel has room for one.
    warming_up: tokio::sync::Mutex<()>,
}

/// An admitted request: a future of its rows. Dropping it cancels the texts that have not been computed yet.
#[derive(Debug)]
pub struct Encoding {
    reply: oneshot::Receiver<EncodeResult>,
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
    /// Loads `model` into `backend` on a new device thread and returns when the engine is ready for requests.
    /// Blocks for as long as the backend takes to load: call it from a blocking context. `progress` is called
    /// on the device thread with the progress of loading the weights.
    ///
    /// # Errors
    /// A model of another task, a setting that cannot be honoured, a backend that refuses the model, or no
    /// thread.
    pub fn start(
        model: Arc<Model>,
        backend: Box<dyn Backend>,
        config: &EncoderConfig,
        metrics: &EncoderMetrics,
        progress: Box<dyn FnMut(LoadProgress) + Send>,
    ) -> Result<Self, StartError> {
        if model.task() == Task::Generate {
            let why = "it generates text, which an encoder does not; start a generation engine".to_owned();
            return Err(StartError::Invalid { field: "model", why });
        }
        let sizes = config.sizes(model.facts().context_tokens, model.special_tokens())?;
        let limit = sizes.rules.max_texts + sizes.max_queue;
        let shared = Arc::new(Shared::new(limit));
        let series = metrics.for_model(&config.model_label);
        // Every request holds at least one permit, of the limit or of the `max_queue` extra ones, and there
        // is one warm-up: a send never finds the channel full.
        let (sender, receiver) = sync_channel(limit + sizes.max_queue + 1);
        let device = backend.caps().description.clone();
        let start = EncoderStart {
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
        metrics.engines.track_step_age(&config.model_label, &shared);
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
        let warming_up = tokio::sync::Mutex::new(());
        let admission = Arc::default();
        let inner = EncoderInner { model, info, sizes, shared, admission, series, jobs, warming_up };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Admits a request or refuses it at once. It tokenises on the caller's thread (about a millisecond for a
    /// thousand tokens) and never waits for the device.
    ///
    /// # Errors
    /// Overload, a text that does not fit, a field out of range, wrong model files, or an engine that is
    /// stopping.
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
        let permit = self.acquire(params)?;
        let submitted = Instant::now();
        let (mut texts, mut truncated) = (Vec::with_capacity(count), Vec::new());
        for (index, text) in params.texts.iter().enumerate() {
            let (tokens, cut) = self.tokens_of(text)?;
            if cut {
                if !params.truncate {
                    return Err(EncodeError::TooLong { index, limit: self.inner.sizes.context_tokens });
                }
                truncated.push(index);
            }
            texts.push(tokens);
        }
        let (reply, result) = oneshot::channel();
        let series = Some(self.inner.series.clone());
        let gauge = Some(GaugeGuard::new(&self.inner.series.waiting));
        let (class, tenant) = (self.effective_class(params), Tenant::from(params.tenant.as_str()));
        let inflight = Some(self.inner.admission.register(class, Tenant::clone(&tenant), count));
        let caller = Caller { reply, series, gauge, inflight, permit };
        self.send(EncodeJob { texts, truncated, class, tenant, submitted, caller })?;
        Ok(Encoding { reply: result })
    }

    /// A permit for the texts of a request. A full queue has extra permits for requests with precedence.
    fn acquire(&self, params: &EncodeParams) -> Result<Permit, EncodeError> {
        let (shared, count) = (&self.inner.shared, params.texts.len());
        let (waiting, retry_after) = (shared.waiting(), shared.retry_after());
        let extra = || {
            let class = self.effective_class(params);
            let precedes = self.inner.admission.has_precedence(class, &params.tenant, count);
            if precedes { shared.acquire_many(count, self.inner.sizes.max_queue) } else { None }
        };
        let permit = shared.acquire_many(count, 0).or_else(extra);
        // Checked only with a permit, so that a drain which found nothing in flight can rely on nothing
        // arriving.
        if !shared.accepting() {
            return Err(EncodeError::Stopped);
        }
        permit.ok_or(EncodeError::Overloaded { waiting, retry_after })
    }

    /// The class of a request; all are of class normal where classes do not count.
    fn effective_class(&self, params: &EncodeParams) -> Priority {
        if self.inner.sizes.rules.by_class { params.priority } else { Priority::Normal }
    }

    fn send(&self, job: EncodeJob) -> Result<(), EncodeError> {
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.as_ref().ok_or(EncodeError::Stopped)?;
        sender.try_send(job).map_err(|_| EncodeError::Stopped)
    }

    /// The tokens that are computed, and whether the text was truncated.
    fn tokens_of(&self, text: &EncodeInput) -> Result<(TextTokens, bool), EncodeError> {
        let invalid = |why: String| EncodeError::Invalid { field: "input", why };
        let (limit, vocabulary) = (self.inner.sizes.context_tokens, self.inner.model.facts().vocabulary);
        match text {
            EncodeInput::Text(text) => {
                let encoded =
                    self.inner.model.encode_up_to(text, limit).map_err(|error| invalid(error.to_string()))?;
                check_tokenizer_ids(&encoded.ids, vocabulary)?;
                Ok((TextTokens::of_one_text(encoded.ids), encoded.cut))
            }
            EncodeInput::Pair { first, second } => {
                let pair = self.inner.model.encode_pair(first, second, limit);
                let pair = pair.map_err(|error| invalid(error.to_string()))?;
                check_tokenizer_ids(&pair.ids, vocabulary)?;
                Ok((TextTokens { ids: pair.ids, second_segment: pair.second_segment }, pair.cut))
            }
            EncodeInput::Tokens(ids) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                    let why = format!("token id {id} is outside the model's vocabulary of {vocabulary}");
                    return Err(invalid(why));
                }
                if ids.is_empty() {
                    return Err(invalid("a list of token ids is empty; at least one is needed".to_owned()));
                }
                let cut_ids = ids[..ids.len().min(limit)].to_vec();
                Ok((TextTokens::of_one_text(cut_ids), ids.len() > limit))
            }
        }
    }

    /// Encodes a few texts of different lengths through the whole path and returns the time that it took. It
    /// is not counted in the metrics of requests and may run beside others.
    ///
    /// # Errors
    /// The device fails, the model's files are wrong, or the engine is stopping.
    pub async fn warm_up(&self) -> Result<Duration, EncodeError> {
        let _one_at_a_time = self.inner.warming_up.lock().await;
        let started = Instant::now();
        let ids = self.warm_up_ids()?;
        for tokens in WARM_UP_LENGTHS {
            let (reply, result) = oneshot::channel();
            let length = tokens.min(self.inner.sizes.context_tokens);
            let texts = vec![TextTokens::of_one_text(ids.iter().copied().cycle().take(length).collect())];
            let permit = self.inner.shared.acquire_unbounded();
            let caller = Caller { reply, series: None, gauge: None, inflight: None, permit };
            let (class, tenant) = (Priority::High, Tenant::from(""));
            let (truncated, submitted) = (Vec::new(), Instant::now());
            self.send(EncodeJob { texts, truncated, class, tenant, submitted, caller })?;
            result.await.unwrap_or(Err(EncodeError::Stopped))?;
        }
        Ok(started.elapsed())
    }

    /// The ids of a text with its special tokens; at least one.
    fn warm_up_ids(&self) -> Result<Vec<u32>, EncodeError> {
        match self.tokens_of(&EncodeInput::Text(WARM_UP_TEXT.to_owned())) {
            Ok((tokens, _)) if !tokens.ids.is_empty() => Ok(tokens.ids),
            Err(error @ EncodeError::Model(_)) => Err(error),
            // A vocabulary without these letters is no fault.
            _ => Ok(vec![0]),
        }
    }

    /// What this engine runs, and its sizes.
    pub fn info(&self) -> &EncoderInfo {
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

    /// Texts of admitted requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.inner.shared.in_flight()
    }

    /// Refuses new requests from now on and waits until those in flight have ended. It has no time limit:
    /// wrap it in one, and then call [`Encoder::stop`].
    pub async fn drain(&self) {
        self.inner.shared.refuse_new();
        self.inner.shared.until_idle().await;
    }

    /// Ends the engine after the current step. Requests in flight end with [`EncodeError::Stopped`]. When
    /// this returns, the backend and its memory are released.
    pub async fn stop(&self) {
        self.inner.shared.stop();
        drop(self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.inner.shared.until_ended().await;
    }
}
