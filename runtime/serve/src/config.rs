//! `config.yaml` of the one-process server.
//!
//! A key that is not known is an error with its path and the nearest known one; a key that is promised and
//! not built yet is refused as such. Neither is ever silently ignored, because its user would believe that it
//! holds. A file may hold `InferenceModel` documents as well, or nothing else ([`crate::inference_model`]).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use trustformers_api::browser::AllowedOrigins;
use trustformers_engine::EngineConfig;
use trustformers_proto::yaml;
use trustformers_runtime::admin::{AdminSettings, TokenRules};
use trustformers_runtime::control::{LoadDefaults, ModelControl};
use trustformers_runtime::process::Listen;
use trustformers_runtime::spec::{ModelSpec, TextBatching};
use trustformers_telemetry::traces::TraceOptions;

use crate::config_file::ConfigFile;
use crate::config_source::SourceOverrides;
use crate::documents;
use crate::remote::{HighAvailabilityConfig, LoadBalancerConfig};

mod error;
mod model;

pub use error::ConfigError;
pub(crate) use error::wrong;
pub use model::ModelConfig;
pub use trustformers_engine::encoder::BatchStrategy as BatchingStrategy;

/// Name of the file in the working directory.
pub const FILE_NAME: &str = "config.yaml";

/// Sequences or texts that are computed together, at most.
const MAX_BATCH_SIZE: usize = 256;

/// A file that works as it stands once its path names a model.
pub const EXAMPLE: &str = "\
# Everything but `models` may be left out; these are the defaults. While the server runs, a change of `models` or
# `batching` in this file is applied within two seconds; the rest takes effect at the next start.
server:
  host: \"0.0.0.0\"        # every address, IPv6 too; \"127.0.0.1\" for this machine alone
  port: 8080             # HTTP: /v1/chat/completions, /v1/generate, /v1/embeddings, /v1/models, /health, /metrics
  grpc_port: 9090
  # allowed_origins: [\"https://app.example.com\"]    # the pages that may call in browsers; by default every page
  model_control: true    # whether POST /v1/models/load and /v1/models/unload are allowed to every caller
  drain_timeout_ms: 30000  # how long answers in flight may take when the server ends or a model is unloaded
  # A port on which models are loaded, swapped and unloaded by whoever sends a token signed with one of these keys:
  # admin: {port: 9091, keys: /etc/trustformers/jwks.json, audience: trustformers, subject: deployer}
batching:
  max_batch_size: 32     # 1-256: sequences or texts that are computed together
  # Generation joins and leaves the batch between any two steps. For models that embed:
  strategy: dynamic      # dynamic | time | size | priority: when the texts that wait become a step
  max_wait_time_ms: 10   # 1-1000: longest time that a free device waits for more texts
  enable_priority: false # whether a request's priority (high, normal, low) decides its order
models:
  - name: smollm2
    path: /models/SmolLM2-135M-Instruct.Q4_1.gguf    # a .gguf file, or a folder with one or with a checkpoint
    device: auto         # auto | cpu
    max_batch_size: 32
    # aliases: [chat]      # further names
    # context_tokens: 4096 # longest prompt plus answer; by default the model's own limit, at most 8192
    # numerics: fast       # fast | exact: f32 activations, answers that do not depend on other requests
    # kv_cache: auto       # auto | f32 | f16 | bf16: the type in which keys and values are cached
    # max_queue: 512       # requests that may wait; one more is answered 429
    # task: generate       # generate | embed | classify | rerank: refuses files that are made for another task
    # files: [\"*.gguf\"]    # picks the files of a folder
    # sha256: ...          # the digest that the files must have
    # batching: {strategy: dynamic, max_wait_time_ms: 10, enable_priority: false}    # of this model alone
    # Guesses tokens and checks several in one step: the same answers, sooner where few requests run at once.
    # speculation: {ngram: {}}                          # from the text itself
    # speculation: {draft: {path: /models/small.gguf}}  # by a smaller model of the same vocabulary
  # A model that other servers have. Its requests are balanced among them, and what fails is retried:
  # - {name: large, endpoints: [{url: \"http://gpu-1:8080\", weight: 2}, {url: \"http://gpu-2:8080\"}]}
# load_balancing: {algorithm: least_connections, health_check_interval_sec: 30, unhealthy_threshold: 3, healthy_threshold: 2}
#   algorithm: least_connections | round_robin | weighted | latency | consistent_hash
# high_availability: {enable_circuit_breaker: true, circuit_breaker_threshold: 5, circuit_breaker_timeout_sec: 60,
#                     retry_max_attempts: 3, retry_backoff_ms: [100, 200, 400]}
    # Small changes of the model (LoRA, in a folder as PEFT writes it): callers name the model smollm2:sql.
    # adapters: [{name: sql, path: /models/sql-lora}]
monitoring:
  prometheus: {enabled: true, port: 9090}    # may equal grpc_port; /metrics is always on server.port too
  # Spans of requests go to one collector: otlp, jaeger (its older ports become that of OTLP) or zipkin.
  # otlp: {enabled: true, endpoint: \"http://localhost:4317\", sampling_rate: 1.0}
  #   service_name: its name there; model_attributes: true adds gen_ai.*; baggage: [key] values of callers
";

/// Keys that are promised and not built yet, each with what to do until then.
pub(crate) const NOT_YET: &[(&str, &str)] = &[("cache", "remove it; answers are not cached")];

/// What to serve and where. The default is every default of the file, without a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    /// Where to listen, and what callers may do.
    pub server: ServerConfig,
    /// How requests share an engine, for models that do not say themselves.
    pub batching: BatchingConfig,
    /// The models, loaded in this order.
    pub models: Vec<ModelConfig>,
    /// One more port for `GET /metrics`; may equal the gRPC port.
    pub prometheus_port: Option<u16>,
    /// Where the spans of requests go; none: nothing is traced.
    pub tracing: Option<TraceOptions>,
    /// How the endpoints of models are chosen and checked; none: as the default says.
    pub load_balancing: Option<LoadBalancerConfig>,
    /// What happens when endpoints fail; none: as the default says.
    pub high_availability: Option<HighAvailabilityConfig>,
}

/// Where to listen, and what callers may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// The address; unspecified (`0.0.0.0`, `::`) means every address of both families.
    pub host: IpAddr,
    /// HTTP's port; 0 takes any that is free.
    pub port: u16,
    /// gRPC's port; 0 takes any that is free.
    pub grpc_port: u16,
    /// The origins whose pages may call in browsers.
    pub allowed_origins: AllowedOrigins,
    /// Whether callers may load and unload models.
    pub model_control: bool,
    /// How long answers in flight may take when the server ends or a model is unloaded, in milliseconds.
    pub drain_timeout_ms: u64,
    /// The port on which whoever has a token may change the models.
    pub admin: Option<AdminConfig>,
}

/// The admin port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    /// Its port.
    pub port: u16,
    /// A file with the public keys of tokens, a JSON Web Key Set.
    pub keys: String,
    /// The audience that a token must be made for.
    pub audience: String,
    /// The subject that a token must have.
    pub subject: String,
    /// The issuer that a token must have, where it is checked.
    pub issuer: Option<String>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: Ipv4Addr::UNSPECIFIED.into(),
            port: 8080,
            grpc_port: 9090,
            allowed_origins: AllowedOrigins::Any,
            model_control: true,
            drain_timeout_ms: 30_000,
            admin: None,
        }
    }
}

/// How requests share an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchingConfig {
    /// Sequences or texts that are computed together, 1 to 256.
    pub max_batch_size: usize,
    /// Longest time that a free device waits for more texts to embed, 1 to 1000 ms. Generation never waits.
    pub max_wait_time_ms: u32,
    /// When the texts that wait become a step.
    pub strategy: BatchingStrategy,
    /// Whether the priority class of a request decides its order.
    pub enable_priority: bool,
}

impl Default for BatchingConfig {
    fn default() -> Self {
        Self::of(TextBatching::default(), EngineConfig::default().max_batch_size)
    }
}

impl BatchingConfig {
    fn of(texts: TextBatching, max_batch_size: usize) -> Self {
        let TextBatching { strategy, max_wait_ms, priority } = texts;
        Self { max_batch_size, max_wait_time_ms: max_wait_ms, strategy, enable_priority: priority }
    }

    /// How texts are gathered.
    pub(crate) fn texts(&self) -> TextBatching {
        let Self { max_batch_size: _, max_wait_time_ms, strategy, enable_priority } = *self;
        TextBatching { strategy, max_wait_ms: max_wait_time_ms, priority: enable_priority }
    }

    /// # Errors
    /// The figure that is out of its range, with its key below `section`.
    pub(crate) fn check(&self, section: &str) -> Result<(), ConfigError> {
        check_batch_size(section, self.max_batch_size)?;
        let mut texts = TextBatching::default();
        let set = texts.set_max_wait_ms(self.max_wait_time_ms);
        set.map_err(|error| wrong(&format!("{section}.max_wait_time_ms"), error))
    }
}

/// # Errors
/// A batch that is empty or too large.
pub(crate) fn check_batch_size(section: &str, size: usize) -> Result<(), ConfigError> {
    if !(1..=MAX_BATCH_SIZE).contains(&size) {
        let message = format!("{size} is not within 1 to {MAX_BATCH_SIZE}");
        return Err(wrong(&format!("{section}.max_batch_size"), message));
    }
    Ok(())
}

impl FromStr for Config {
    type Err = ConfigError;

    /// Reads the text of a `config.yaml`, or `InferenceModel` documents.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        documents::read(text, &SourceOverrides::default())
    }
}

impl Config {
    /// The addresses to listen on.
    pub fn listen(&self) -> Listen {
        let ServerConfig { host, port, grpc_port, ref allowed_origins, .. } = self.server;
        Listen {
            http: SocketAddr::new(host, port),
            grpc: SocketAddr::new(host, grpc_port),
            metrics: self.prometheus_port.map(|port| SocketAddr::new(host, port)),
            allowed_origins: allowed_origins.clone(),
        }
    }

    /// How long answers in flight may take when the server ends or a model is unloaded.
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.server.drain_timeout_ms)
    }

    /// Who may load and unload models while the server runs.
    pub fn model_control(&self, threads: Option<usize>) -> ModelControl {
        if !self.server.model_control {
            return ModelControl::Disabled;
        }
        ModelControl::Allowed(self.load_defaults(threads))
    }

    fn load_defaults(&self, threads: Option<usize>) -> LoadDefaults {
        LoadDefaults {
            threads,
            max_batch_size: Some(self.batching.max_batch_size),
            batching: self.batching.texts(),
            fetch: None,
        }
    }

    /// The admin port, where one is configured.
    pub fn admin(&self, threads: Option<usize>) -> Option<AdminSettings> {
        let AdminConfig { port, keys, audience, subject, issuer } = self.server.admin.clone()?;
        let tokens = TokenRules { keys_file: keys.into(), audience, subject, issuer };
        let address = SocketAddr::new(self.server.host, port);
        Some(AdminSettings { address, tokens, pod_config: None, defaults: self.load_defaults(threads) })
    }

    /// The models that are loaded here, with everything that an engine needs.
    ///
    /// # Errors
    /// A path whose scheme cannot be read, with the model's place in the list.
    pub fn specs(&self, threads: Option<usize>) -> Result<Vec<ModelSpec>, ConfigError> {
        let spec = |(index, model): (usize, &ModelConfig)| {
            model.spec(&format!("models[{index}]"), &self.batching, threads)
        };
        let local = self.models.iter().enumerate().filter(|(_, model)| !model.is_remote());
        local.map(spec).collect()
    }

    /// The same configuration with each default written out in each model, where it does not depend on the
    /// model's files.
    #[must_use]
    pub fn effective(&self) -> Self {
        let mut config = self.clone();
        for model in config.models.iter_mut().filter(|model| !model.is_remote()) {
            model.max_batch_size.get_or_insert(self.batching.max_batch_size);
            model.max_queue.get_or_insert(EngineConfig::default().max_queue);
            model.batching.get_or_insert(self.batching.texts());
        }
        config
    }

    /// The text of a `config.yaml` that means this configuration.
    ///
    /// # Errors
    /// A value that YAML has no form for.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        Ok(yaml::write(&ConfigFile::of(self))?)
    }

    /// # Errors
    /// The first name that two models claim, with its place.
    pub(crate) fn check_names(&self) -> Result<(), ConfigError> {
        let mut taken = std::collections::HashSet::new();
        for (index, model) in self.models.iter().enumerate() {
            let mut names = model.names().enumerate();
            if let Some((place, name)) = names.find(|(_, name)| !taken.insert(name.as_str())) {
                let key = if place == 0 { "name" } else { "aliases" };
                let message = format!("{name:?} is given twice; give each model its own names");
                return Err(wrong(&format!("models[{index}].{key}"), message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
