//! One model of the configuration, and what its engine needs.

use std::str::FromStr;

use trustformers_engine::{KvType, Numerics};
use trustformers_proto::Task;
use trustformers_runtime::adapters::AdapterSpec;
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::spec::{FetchSpec, ModelSpec, SpeculationSpec, TextBatching};
use trustformers_store::Source;

use super::{BatchingConfig, ConfigError, wrong};
use crate::remote::EndpointConfig;

/// One model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// The name that callers use and that answers carry.
    pub name: String,
    /// Further names.
    pub aliases: Vec<String>,
    /// A file, or a folder that holds one model file or a checkpoint; a relative path counts from the working
    /// directory. Also `file://` URIs. Empty where the model has endpoints.
    pub path: String,
    /// Servers that have the model, which then is not loaded here: its requests are forwarded.
    pub endpoints: Vec<EndpointConfig>,
    /// Patterns that pick the model's files in its folder; empty picks the only one there is.
    pub files: Vec<String>,
    /// The digest that the files must have, 64 hex digits.
    pub sha256: Option<String>,
    /// The task that the files must serve; none: the task that they state.
    pub task: Option<Task>,
    /// Where it runs.
    pub device: DeviceChoice,
    /// How closely the device follows f32 arithmetic.
    pub numerics: Numerics,
    /// The type in which keys and values are cached; none: the device's choice.
    pub kv_cache: Option<KvType>,
    /// Longest prompt plus answer, in tokens; none: the model's own limit, at most 8192.
    pub context_tokens: Option<u32>,
    /// Sequences or texts that are computed together, 1 to 256; none: those of `Config::batching`.
    pub max_batch_size: Option<usize>,
    /// Requests that may wait; none: the engine's default.
    pub max_queue: Option<usize>,
    /// How texts are gathered; none: as `Config::batching` says.
    pub batching: Option<TextBatching>,
    /// How tokens are guessed.
    pub speculation: Option<SpeculationSpec>,
    /// Adapters that callers choose as `model:adapter`.
    pub adapters: Vec<AdapterSpec>,
}

impl ModelConfig {
    /// A model with the defaults of the configuration that it is part of.
    pub fn new(name: impl Into<String>, path: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            aliases: Vec::new(),
            path: path.into(),
            endpoints: Vec::new(),
            files: Vec::new(),
            sha256: None,
            task: None,
            device: DeviceChoice::Auto,
            numerics: Numerics::Fast,
            kv_cache: None,
            context_tokens: None,
            max_batch_size: None,
            max_queue: None,
            batching: None,
            speculation: None,
            adapters: Vec::new(),
        }
    }

    /// Whether other servers have it.
    pub fn is_remote(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// The name, then the further ones.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        [&self.name].into_iter().chain(&self.aliases)
    }

    /// The model with everything that an engine needs, where the defaults are those of `batching`.
    ///
    /// # Errors
    /// A path whose scheme cannot be read; `section` is the model's place in its file.
    pub(crate) fn spec(
        &self,
        section: &str,
        batching: &BatchingConfig,
        threads: Option<usize>,
    ) -> Result<ModelSpec, ConfigError> {
        let Self {
            name,
            aliases,
            path,
            endpoints: _,
            files,
            sha256,
            task,
            device,
            numerics,
            kv_cache,
            context_tokens,
            max_batch_size,
            max_queue,
            batching: own,
            speculation,
            adapters,
        } = self;
        let source = Source::from_str(path).map_err(|error| wrong(&format!("{section}.path"), error))?;
        let mut spec = ModelSpec::new(name.clone(), source);
        // Without a cache directory only a source that needs one is refused, when it is loaded.
        spec.fetch = FetchSpec::of_user().ok();
        spec.names.extend(aliases.iter().cloned());
        spec.files.clone_from(files);
        spec.sha256.clone_from(sha256);
        spec.task = *task;
        spec.device = *device;
        spec.threads = threads;
        spec.engine.numerics = *numerics;
        spec.engine.kv_cache = *kv_cache;
        spec.engine.context_tokens = context_tokens.map(|tokens| tokens as usize);
        spec.engine.max_queue = max_queue.unwrap_or(spec.engine.max_queue);
        spec.batching = own.unwrap_or_else(|| batching.texts());
        spec.speculation.clone_from(speculation);
        spec.adapters.clone_from(adapters);
        spec.set_max_batch_size(max_batch_size.unwrap_or(batching.max_batch_size));
        Ok(spec)
    }
}
