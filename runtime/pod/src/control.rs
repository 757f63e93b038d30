//! Who decides which models are loaded while the process runs, and how: callers of the API, a configuration
//! that changed, or the operator alone.

use std::str::FromStr;
use std::time::Duration;

use trustformers_api::model_control::{
    LoadAdapter, LoadModel, Probe, RollbackModel, SwapModel, SwapSource, UnloadModel,
};
use trustformers_api::{ApiError, Inference};
use trustformers_proto::v1::{ModelState, ModelStatus};
use trustformers_store::Source;

use crate::adapters::AdapterSpec;
use crate::device::DeviceChoice;
use crate::failure::Failure;
use crate::generate::RETRY_AFTER_S;
use crate::model_table::ControlError;
use crate::models::ModelServer;
use crate::probe::{DEFAULT_PROBE_TOKENS, GoldenProbe, beginning_tokens};
use crate::slots::{SwapTarget, VersionFilter};
use crate::spec::{FetchSpec, ModelSpec, TextBatching, kv_cache_of, numerics_of};

/// Most sequences or texts that are computed together.
const MAX_BATCH_SIZE: u32 = 256;

/// Whether callers of the API may load and unload models.
#[derive(Debug, Clone, Default)]
pub enum ModelControl {
    /// They may.
    Allowed(LoadDefaults),
    /// The configuration says that they may not.
    Disabled,
    /// The operator decides what this pod serves.
    #[default]
    Operator,
}

/// The settings of a model that a caller loads, where the request does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadDefaults {
    /// Threads of the CPU device; none takes what the process may use.
    pub threads: Option<usize>,
    /// Sequences or texts that are computed together; none: the engine's default.
    pub max_batch_size: Option<usize>,
    /// How texts are gathered.
    pub batching: TextBatching,
    /// How sources of other machines are fetched. None: a request may not make the process fetch.
    pub fetch: Option<FetchSpec>,
}

impl ModelServer {
    /// Adds a model, as one of the configuration: it loads in the background, its state shows a failure, and
    /// a failure that may pass is tried again.
    ///
    /// # Errors
    /// A name that is taken, or a server that does not serve yet.
    pub fn add(&self, spec: ModelSpec) -> Result<(), ControlError> {
        self.table.add(spec)
    }

    /// Adds a model, or loads another revision of one beside it, and waits until it is ready. The load goes
    /// on when the future is dropped, and the same request joins it.
    ///
    /// # Errors
    /// As for [`ModelServer::add`], a model whose slots are in use, and why it could not be loaded. Nothing
    /// is left of a new model then; a revision of another one stays Failed in its slot until the next load.
    pub async fn load(&self, spec: ModelSpec) -> Result<ModelStatus, ControlError> {
        self.table.load(spec, self.drain_timeout).await
    }

    /// Lets another version answer for a model. Requests that have begun are answered by the version that
    /// began them. The version before stays loaded for a rollback, until another load needs its slot or its
    /// memory. Asking for the version that answers already changes nothing.
    ///
    /// # Errors
    /// No such model or version, a version that is not ready, or another current digest than is expected.
    pub fn swap(
        &self,
        model: &str,
        target: &SwapTarget,
        expected_digest: Option<&str>,
    ) -> Result<ModelStatus, ControlError> {
        self.table.swap(model, target, expected_digest, self.drain_timeout)
    }

    /// Lets the version before the last swap answer again.
    ///
    /// # Errors
    /// No such model, no such version, or another current digest than is expected.
    pub fn rollback(&self, model: &str, expected_digest: Option<&str>) -> Result<ModelStatus, ControlError> {
        self.table.rollback(model, expected_digest)
    }

    /// Loads a model beside the one of the same first name, which it then replaces. What the old one has
    /// begun to answer is answered by it.
    ///
    /// # Errors
    /// Why the old one stays: the new one cannot be loaded, or both do not fit in memory.
    pub async fn replace(&self, spec: ModelSpec) -> Result<(), ControlError> {
        self.table.replace(spec, self.drain_timeout).await
    }

    /// Unloads a model and waits until its answers in flight have ended, at most for the timeout of a drain,
    /// and its memory is free. Requests are refused as for an unknown name from now on. The unloading goes on
    /// when the future is dropped.
    ///
    /// # Errors
    /// No model has this name.
    pub async fn unload(&self, name: &str) -> Result<ModelStatus, ControlError> {
        self.unload_version(name, &VersionFilter::default()).await
    }

    /// As [`ModelServer::unload`], of one version of a model, which must not be the one that answers. One
    /// that is not there is unloaded already.
    ///
    /// # Errors
    /// No model has this name, or the version answers for it.
    pub async fn unload_version(
        &self,
        name: &str,
        version: &VersionFilter,
    ) -> Result<ModelStatus, ControlError> {
        let unloading = self.table.unload(name, version, self.drain_timeout)?;
        // It cannot fail but by a panic, whose message is in the log, or because the process ends.
        unloading.await.map_err(|_| ControlError::NotServing)
    }

    /// The state of the model that answers to a name; none where there is no such model.
    pub fn state_of(&self, name: &str) -> Option<ModelState> {
        let current = self.table.snapshot().named(name)?.model.current.id;
        Some(self.statuses().status(current).state())
    }

    /// Sets who decides which models are loaded, and how long an unload may wait for answers in flight.
    #[must_use]
    pub fn with_control(mut self, control: ModelControl, drain_timeout: Duration) -> Self {
        self.control = control;
        self.drain_timeout = drain_timeout;
        self
    }

    fn load_defaults(&self) -> Result<&LoadDefaults, ApiError> {
        let message = match &self.control {
            ModelControl::Allowed(defaults) => return Ok(defaults),
            ModelControl::Disabled => "the server's configuration does not allow it (server.model_control)",
            ModelControl::Operator => {
                "the operator decides which models this pod serves; create, change or delete an InferenceModel"
            }
        };
        let message = format!("models cannot be loaded or unloaded here: {message}");
        Err(ApiError::Forbidden { message })
    }

    /// # Errors
    /// Callers of the API may not change the models.
    pub(crate) fn check_allowed(&self) -> Result<(), ApiError> {
        self.load_defaults().map(|_| ())
    }

    pub(crate) async fn load_asked(&self, request: LoadModel) -> Result<ModelStatus, ApiError> {
        let defaults = self.load_defaults()?;
        self.load_with(request, defaults).await
    }

    pub(crate) async fn load_with(
        &self,
        request: LoadModel,
        defaults: &LoadDefaults,
    ) -> Result<ModelStatus, ApiError> {
        let spec = spec_of(request, defaults)?;
        self.load(spec).await.map_err(|error| self.refused(error))
    }

    pub(crate) async fn unload_with(&self, request: UnloadModel) -> Result<ModelStatus, ApiError> {
        let UnloadModel { model, digest, revision } = request;
        let unloaded = self.unload_version(&model, &VersionFilter { digest, revision }).await;
        unloaded.map_err(|error| self.refused(error))
    }

    pub(crate) fn swap_with(&self, request: SwapModel) -> Result<ModelStatus, ApiError> {
        let SwapModel { model, to, expected_digest } = request;
        let target = match to {
            SwapSource::Digest(digest) => {
                SwapTarget::Version(VersionFilter { digest: Some(digest), revision: None })
            }
            SwapSource::Revision(revision) => {
                SwapTarget::Version(VersionFilter { digest: None, revision: Some(revision) })
            }
            SwapSource::OtherModel(name) => SwapTarget::OtherModel(name),
        };
        let swapped = self.swap(&model, &target, expected_digest.as_deref());
        swapped.map_err(|error| self.refused(error))
    }

    pub(crate) fn rollback_with(&self, request: &RollbackModel) -> Result<ModelStatus, ApiError> {
        let RollbackModel { model, expected_digest } = request;
        self.rollback(model, expected_digest.as_deref()).map_err(|error| self.refused(error))
    }

    fn refused(&self, error: ControlError) -> ApiError {
        let message = error.to_string();
        match error {
            ControlError::NameTaken { .. } => ApiError::field("name", message),
            ControlError::Unknown { name } => {
                let choices = self.watch_models().borrow().iter().map(|model| model.name.clone()).collect();
                ApiError::UnknownModel { asked: name, choices }
            }
            ControlError::NotLoaded { failure, .. } => not_loaded(&failure, message),
            ControlError::Unloaded { .. } => unloaded(&message),
            ControlError::Refused { .. } => ApiError::Conflict { message },
            ControlError::NotServing => ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) },
        }
    }
}

/// Another caller's unload came in between.
fn unloaded(message: &str) -> ApiError {
    ApiError::Conflict { message: format!("{message}; load it again if it is still wanted") }
}

/// The files or the settings are the caller's, the memory and the device are the server's.
fn not_loaded(failure: &Failure, message: String) -> ApiError {
    if failure.transient {
        return ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) };
    }
    match failure.reason {
        "InsufficientMemory" => ApiError::Unavailable { message, retry_after_s: None },
        "Unloaded" => unloaded(&message),
        "InternalError" | "WarmUpFailed" | "NotFinite" | "NoThread" => ApiError::Internal { message },
        _ => ApiError::InvalidRequest { field: None, message },
    }
}

fn spec_of(request: LoadModel, defaults: &LoadDefaults) -> Result<ModelSpec, ApiError> {
    let LoadModel { name, path, files, sha256, task, revision, device, numerics, kv_cache, .. } = &request;
    let source = fetchable(path, "path", defaults)?;
    let mut spec = ModelSpec::new(name.clone(), source);
    spec.fetch.clone_from(&defaults.fetch);
    spec.files.clone_from(files);
    spec.sha256.clone_from(sha256);
    spec.task = *task;
    spec.revision = revision.clone().unwrap_or_default();
    spec.threads = defaults.threads;
    spec.batching = defaults.batching;
    if let Some(device) = device {
        let choice = DeviceChoice::from_str(device);
        spec.device = choice.map_err(|error| ApiError::field("device", error.to_string()))?;
    }
    if let Some(numerics) = numerics {
        spec.engine.numerics = numerics_of(numerics).map_err(|error| ApiError::field("numerics", error))?;
    }
    if let Some(kv_cache) = kv_cache {
        spec.engine.kv_cache = kv_cache_of(kv_cache).map_err(|error| ApiError::field("kv_cache", error))?;
    }
    set_sizes(&mut spec, &request, defaults)?;
    spec.adapters = adapters_of(&request.adapters, defaults)?;
    spec.probes = request.probes.into_iter().map(golden_probe).collect::<Result<_, _>>()?;
    Ok(spec)
}

fn adapters_of(adapters: &[LoadAdapter], defaults: &LoadDefaults) -> Result<Vec<AdapterSpec>, ApiError> {
    let read = |(index, adapter): (usize, &LoadAdapter)| {
        let at = |field: &str| format!("adapters[{index}].{field}");
        let source = fetchable(&adapter.path, &at("path"), defaults)?;
        Ok(AdapterSpec { name: adapter.name.clone(), source, sha256: adapter.sha256.clone() })
    };
    let read: Result<Vec<AdapterSpec>, ApiError> = adapters.iter().enumerate().map(read).collect();
    let adapters = read?;
    AdapterSpec::check_names(adapters.iter().map(|adapter| adapter.name.as_str()))
        .map_err(|(index, why)| ApiError::field(&format!("adapters[{index}].name"), why))?;
    Ok(adapters)
}

/// # Errors
/// The text is no source, or would have to be fetched: callers must not choose what this process fetches, and
/// with whose credentials.
fn fetchable(text: &str, field: &str, defaults: &LoadDefaults) -> Result<Source, ApiError> {
    let source = Source::from_str(text).map_err(|error| ApiError::field(field, error.to_string()))?;
    if source.remote().is_some() && defaults.fetch.is_none() {
        let why = format!("{source} cannot be fetched for a request; name it in the configuration");
        return Err(ApiError::field(field, why));
    }
    Ok(source)
}

/// How many sequences, texts and tokens there may be, and in which order.
fn set_sizes(spec: &mut ModelSpec, request: &LoadModel, defaults: &LoadDefaults) -> Result<(), ApiError> {
    let LoadModel {
        context_tokens, max_batch_size, max_queue, batch_strategy, max_wait_ms, priority, ..
    } = request;
    spec.engine.context_tokens = context_tokens.map(|tokens| tokens as usize);
    if let Some(size) = max_batch_size.filter(|size| *size > MAX_BATCH_SIZE) {
        return Err(ApiError::field("max_batch_size", format!("{size} is not within 1 to {MAX_BATCH_SIZE}")));
    }
    if let Some(size) = max_batch_size.map(|size| size as usize).or(defaults.max_batch_size) {
        spec.set_max_batch_size(size);
    }
    if let Some(length) = max_queue {
        spec.engine.max_queue = *length as usize;
    }
    if let Some(strategy) = batch_strategy {
        let parsed = strategy.parse();
        spec.batching.strategy = parsed.map_err(|error| ApiError::field("batch_strategy", error))?;
    }
    if let Some(max_wait_ms) = max_wait_ms {
        let set = spec.batching.set_max_wait_ms(*max_wait_ms);
        set.map_err(|error| ApiError::field("max_wait_ms", error))?;
    }
    spec.batching.priority = priority.unwrap_or(spec.batching.priority);
    Ok(())
}

fn golden_probe(probe: Probe) -> Result<GoldenProbe, ApiError> {
    let Probe { prompt, max_tokens, text, begins_with, tokens_sha256 } = probe;
    let beginning = begins_with.as_deref().map(beginning_tokens);
    let max_tokens = max_tokens.or(beginning).unwrap_or(DEFAULT_PROBE_TOKENS);
    let checked = GoldenProbe { prompt, max_tokens, text, begins_with, tokens_sha256 }.check();
    checked.map_err(|error| ApiError::field(&error.field, error.message))
}
