//! Who decides which models are loaded while the process runs, and how: callers of the API, a configuration
//! that changed, or the operator alone.

use std::str::FromStr;
use std::time::Duration;

use trustformers_api::model_control::LoadModel;
use trustformers_api::{ApiError, Inference};
use trustformers_proto::v1::{ModelState, ModelStatus};
use trustformers_store::Source;

use crate::device::DeviceChoice;
use crate::failure::Failure;
use crate::generate::RETRY_AFTER_S;
use crate::model_table::ControlError;
use crate::models::ModelServer;
use crate::spec::{ModelSpec, TextBatching, numerics_of};

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

    /// Adds a model and waits until it is ready. The load goes on when the future is dropped.
    ///
    /// # Errors
    /// As for [`ModelServer::add`], and why it could not be loaded; nothing of it is left then.
    pub async fn load(&self, spec: ModelSpec) -> Result<ModelStatus, ControlError> {
        self.table.load(spec).await
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
        let unloading = self.table.unload(name, self.drain_timeout)?;
        // It cannot fail but by a panic, whose message is in the log, or because the process ends.
        unloading.await.map_err(|_| ControlError::NotServing)
    }

    /// The state of the model that answers to a name; none where there is no such model.
    pub fn state_of(&self, name: &str) -> Option<ModelState> {
        let managed = self.table.snapshot().named(name).cloned()?;
        Some(self.statuses().status(managed.id).state())
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

    pub(crate) async fn load_asked(&self, request: LoadModel) -> Result<ModelStatus, ApiError> {
        let spec = spec_of(request, self.load_defaults()?)?;
        self.load(spec).await.map_err(|error| self.refused(error))
    }

    pub(crate) async fn unload_asked(&self, model: &str) -> Result<ModelStatus, ApiError> {
        self.load_defaults()?;
        self.unload(model).await.map_err(|error| self.refused(error))
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
        "InternalError" | "WarmUpFailed" | "NoThread" => ApiError::Internal { message },
        _ => ApiError::InvalidRequest { field: None, message },
    }
}

fn spec_of(request: LoadModel, defaults: &LoadDefaults) -> Result<ModelSpec, ApiError> {
    let LoadModel { name, path, files, sha256, task, device, numerics, context_tokens, max_batch_size } =
        request;
    let source = Source::from_str(&path).map_err(|error| ApiError::field("path", error.to_string()))?;
    let mut spec = ModelSpec::new(name, source);
    spec.files = files;
    spec.sha256 = sha256;
    spec.task = task;
    spec.threads = defaults.threads;
    spec.batching = defaults.batching;
    if let Some(device) = device {
        let choice = DeviceChoice::from_str(&device);
        spec.device = choice.map_err(|error| ApiError::field("device", error.to_string()))?;
    }
    if let Some(numerics) = numerics {
        spec.engine.numerics = numerics_of(&numerics).map_err(|error| ApiError::field("numerics", error))?;
    }
    spec.engine.context_tokens = context_tokens.map(|tokens| tokens as usize);
    if let Some(size) = max_batch_size.filter(|size| *size > MAX_BATCH_SIZE) {
        return Err(ApiError::field("max_batch_size", format!("{size} is not within 1 to {MAX_BATCH_SIZE}")));
    }
    if let Some(size) = max_batch_size.map(|size| size as usize).or(defaults.max_batch_size) {
        spec.set_max_batch_size(size);
    }
    Ok(spec)
}
