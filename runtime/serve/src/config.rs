//! `config.yaml` of the one-process server.
//!
//! A key that is not known is an error with its path and the nearest known one; a key that is promised and
//! not built yet is refused as such. Neither is ever silently ignored, because its user would believe that it
//! holds. A file may hold `InferenceModel` documents as well, or nothing else ([`crate::inference_model`]).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use trustformers_api::browser::AllowedOrigins;
use trustformers_engine::{EngineConfig, KvType, Numerics};
use trustformers_proto::Task;
use trustformers_proto::yaml::{self, YamlError};
use trustformers_runtime::adapters::AdapterSpec;
use trustformers_runtime::admin::{AdminSettings, TokenRules};
use trustformers_runtime::control::{LoadDefaults, ModelControl};
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::process::Listen;
use trustformers_runtime::spec::{FetchSpec, ModelSpec, SpeculationSpec, TextBatching};
use trustformers_store::Source;
use trustformers_telemetry::traces::TraceOptions;

use crate::config_file::ConfigFile;
use crate::config_source::SourceOverrides;
use crate::documents;
use crate::remote::{EndpointConfig, HighAvailabilityConfig, LoadBalancerConfig};

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
    /// Sequences or texts that are computed together, 1 to 256; none: those of [`Config::batching`].
    pub max_batch_size: Option<usize>,
    /// Requests that may wait; none: the engine's default.
    pub max_queue: Option<usize>,
    /// How texts are gathered; none: as [`Config::batching`] says.
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

/// Why a configuration cannot be used. Each names the file or the path of the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "{} cannot be read: {cause}; name a file with --config (trustformers-serve --print-config-example shows one), or \
         a folder of models with --models",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// A folder of models cannot be read.
    #[error("{} cannot be read: {cause}; name a folder with models", path.display())]
    UnreadableFolder {
        /// The folder or what lies in it.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// A folder of models is empty.
    #[error(
        "{} holds no model: put a .gguf file there, or a folder with model.safetensors and config.json (in a container: \
         mount a volume that has one), or give a configuration with --config",
        folder.display()
    )]
    NoModels {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder of models cannot be served as it is.
    #[error("{}: {message}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// The text is not YAML, or a value does not fit.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// No such key.
    #[error("{path}: there is no such key; {hint}")]
    UnknownKey {
        /// The key's path.
        path: String,
        /// The nearest known key, or all of them.
        hint: String,
    },
    /// The key or value is promised and not built yet.
    #[error("{path}: not available in this version; {advice}")]
    NotAvailable {
        /// The key's path.
        path: String,
        /// What to do meanwhile.
        advice: String,
    },
    /// A value is wrong.
    #[error("{path}: {message}")]
    Value {
        /// The key's path.
        path: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// A wrong value at a path.
pub(crate) fn wrong(path: &str, message: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { path: path.to_owned(), message: message.to_string() }
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
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::from_str(text).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_the_defaults() {
        let config = Config::from_str(EXAMPLE).unwrap();
        assert_eq!(config.server, ServerConfig::default());
        assert_eq!(config.prometheus_port, Some(9090));
        assert_eq!(config.batching, BatchingConfig::default());
        assert_eq!(config.models[0].name, "smollm2");
        assert_eq!(config.listen().metrics, Some(config.listen().grpc));
    }

    #[test]
    fn several_models_take_their_own_batch_or_the_common_one() {
        let config = Config::from_str(
            "batching: {max_batch_size: 200, strategy: size, max_wait_time_ms: 7, enable_priority: true}\n\
             models: [{name: a, path: /a, max_batch_size: 16}, {name: b, path: 'file:///b', device: cpu}]",
        )
        .unwrap();
        let specs = config.specs(Some(3)).unwrap();
        assert_eq!(specs.iter().map(|spec| spec.engine.max_batch_size).collect::<Vec<_>>(), [16, 200]);
        let encoder = specs[0].encoder_config();
        assert_eq!((encoder.strategy.as_str(), encoder.max_wait_ms, encoder.priority), ("size", 7, true));
        assert_eq!(encoder.max_batch_size, 16);
        assert_eq!((specs[1].name(), specs[1].device, specs[1].threads), ("b", DeviceChoice::Cpu, Some(3)));
        assert_eq!(specs[1].source, Source::from_path("/b"));
    }

    #[test]
    fn a_model_speculates_in_one_of_two_ways() {
        let speculation = |text: &str| {
            let config = Config::from_str(&format!("models: [{{name: a, path: /a, speculation: {text}}}]"))?;
            Ok(config.specs(None)?[0].speculation.clone())
        };
        assert_eq!(speculation("{ngram: {}}").unwrap(), Some(SpeculationSpec::Ngram));
        let draft = SpeculationSpec::Draft(Source::from_path("/b.gguf"));
        assert_eq!(speculation("{draft: {path: /b.gguf}}").unwrap(), Some(draft));
        assert_eq!(speculation("null").unwrap(), None);
        for (text, says) in [
            ("{}", "models[0].speculation: give one of"),
            ("{ngram: {}, draft: {path: /b}}", "models[0].speculation: give one of"),
            ("{draft: {}}", "models[0].speculation.draft.path: is missing"),
            ("{draft: {path: 'ftp://b/c'}}", "models[0].speculation.draft.path: ftp://"),
            ("{ngram: {n: 3}}", "models[0].speculation.ngram.n: there is no such key"),
        ] {
            let error: ConfigError = speculation(text).unwrap_err();
            assert!(error.to_string().starts_with(says), "{error}");
        }
    }

    #[test]
    fn adapters_have_a_name_and_a_path() {
        let adapters = |text: &str| {
            let config = Config::from_str(&format!("models: [{{name: a, path: /a, adapters: {text}}}]"))?;
            Ok(config.specs(None)?.remove(0).adapters)
        };
        let adapter = |name: &str, path: &str| AdapterSpec {
            name: name.into(),
            source: Source::from_path(path),
            sha256: None,
        };
        let two = adapters("[{name: sql, path: /b, sha256: ab}, {name: chat, path: 'file:///c'}]").unwrap();
        let pinned = AdapterSpec { sha256: Some("ab".into()), ..adapter("sql", "/b") };
        assert_eq!(two, [pinned, adapter("chat", "/c")]);
        assert!(adapters("[]").unwrap().is_empty());
        for (text, says) in [
            ("[{path: /b}]", "models[0].adapters[0].name: is missing"),
            ("[{name: sql}]", "models[0].adapters[0].path: is missing"),
            ("[{name: 'a:b', path: /b}]", "models[0].adapters[0].name: \"a:b\" must have"),
            (
                "[{name: a, path: /b}, {name: a, path: /c}]",
                "models[0].adapters[1].name: \"a\" is the name of another",
            ),
            ("[{name: a, path: 'ftp://b/c'}]", "models[0].adapters[0].path: ftp://"),
            ("[{name: a, path: /b, rank: 3}]", "models[0].adapters[0].rank: there is no such key"),
        ] {
            let error: ConfigError = adapters(text).unwrap_err();
            assert!(error.to_string().starts_with(says), "{error}");
        }
    }

    #[test]
    fn every_key_of_a_model_reaches_its_engine() {
        let text = "models: [{name: a, aliases: [b], path: /a, files: ['*.gguf'], sha256: ab, task: embed, numerics: exact, kv_cache: bf16, \
             context_tokens: 64, max_batch_size: 200, max_queue: 3, \
             batching: {strategy: size, max_wait_time_ms: 7, enable_priority: true}}]";
        let spec = Config::from_str(text).unwrap().specs(None).unwrap().remove(0);
        assert_eq!(spec.names, ["a", "b"]);
        assert_eq!(spec.files, ["*.gguf"]);
        assert_eq!((spec.sha256.as_deref(), spec.task), (Some("ab"), Some(Task::Embed)));
        assert_eq!(spec.engine.kv_cache, Some(KvType::Bf16));
        let encoder = spec.encoder_config();
        assert_eq!(
            (encoder.strategy, encoder.max_wait_ms, encoder.priority),
            (BatchingStrategy::Size, 7, true)
        );
        assert_eq!((encoder.max_batch_size, encoder.max_queue), (200, 3));
        assert_eq!((encoder.context_tokens, encoder.numerics), (Some(64), Numerics::Exact));
    }

    #[test]
    fn what_is_printed_is_read_back_with_every_default() {
        let text = "server: {host: '::1', port: 1, allowed_origins: ['https://a.example'], model_control: false, drain_timeout_ms: 5, admin: {port: 2, keys: /k, audience: a, subject: s, issuer: i}}\nbatching: {strategy: time}\n\
             models: [{name: a, path: 'file:///a%20b'}, {name: b, path: /b, aliases: [c], speculation: {ngram: {}}}, \
             {name: d, path: /d, speculation: {draft: {path: /e}}, adapters: [{name: sql, path: /f}]}]\nmonitoring: {prometheus: {port: 7}}";
        for text in [text, "models: [{name: a, path: /a}]", EXAMPLE] {
            let config = Config::from_str(text).unwrap();
            let printed = config.effective().to_yaml().unwrap();
            assert_eq!(Config::from_str(&printed).unwrap(), config.effective(), "{printed}");
            let specs = |config: &Config| format!("{:?}", config.specs(None).unwrap());
            assert_eq!(specs(&Config::from_str(&printed).unwrap()), specs(&config));
        }
        let printed =
            Config::from_str("models: [{name: a, path: /a}]").unwrap().effective().to_yaml().unwrap();
        for line in [
            "  port: 8080\n",
            "  model_control: true\n",
            "  drain_timeout_ms: 30000\n",
            "  max_wait_time_ms: 10\n",
            "  device: auto\n",
            "  numerics: fast\n",
            "  kv_cache: auto\n",
            "  max_queue: 512\n",
        ] {
            assert!(printed.contains(line), "{line} {printed}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_path_and_a_hint() {
        for (text, path, hint) in [
            ("sever: {}", "sever: ", "\"server\""),
            ("server: {grpcPort: 1}\nmodels: []", "server.grpcPort: ", "\"grpc_port\""),
            ("models: [{name: a, path: /a}, {nam: b, path: /b}]", "models[1].nam: ", "\"name\""),
            (
                "monitoring: {prometheus: {ports: 1}}\nmodels: [{name: a, path: /a}]",
                "monitoring.prometheus.ports",
                "port",
            ),
            (
                "models: [{name: a, path: /a, batching: {strategi: size}}]",
                "models[0].batching.strategi",
                "\"strategy\"",
            ),
            ("completely_different: 1", "completely_different", "known are: server"),
        ] {
            let error = error(text);
            assert!(error.starts_with(path) && error.contains(hint), "{error}");
        }
    }

    #[test]
    fn keys_that_are_not_built_yet_are_refused_as_such() {
        let models = "models: [{name: a, path: /a}]";
        let cache = error(&format!("cache: {{enabled: true}}\n{models}"));
        assert!(cache.starts_with("cache") && cache.contains("not available in this version"), "{cache}");
        let error = error("models: [{name: a, path: /a, device: 'cuda:0'}]");
        assert!(
            error.starts_with("models[0].device: device \"cuda:0\" is not available in this version"),
            "{error}"
        );
    }

    #[test]
    fn one_section_of_monitoring_says_where_spans_go() {
        let models = "models: [{name: a, path: /a}]";
        let of = |text: &str| -> Config { format!("monitoring: {{{text}}}\n{models}").parse().unwrap() };
        let jaeger =
            of("jaeger: {enabled: true, endpoint: 'http://localhost:14268/api/traces', sampling_rate: 0.1}");
        let options = jaeger.tracing.clone().unwrap();
        assert_eq!(options.destination.to_string(), "http://localhost:4317 (OTLP over gRPC)");
        assert_eq!((options.sampling_ratio, options.service_name.as_str()), (0.1, "trustformers-serve"));
        // What is effective can be written and read again.
        for config in [jaeger, of("zipkin: {endpoint: z, model_attributes: true, baggage: [team]}")] {
            assert_eq!(config.to_yaml().unwrap().parse::<Config>().unwrap().tracing, config.tracing);
        }
        assert_eq!(of("otlp: {enabled: false, endpoint: c}").tracing, None);
        for (text, wanted) in [
            ("otlp: {}", "monitoring.otlp.endpoint: is missing"),
            (
                "otlp: {endpoint: 'https://c'}",
                "monitoring.otlp.endpoint: trace endpoint \"https://c\" needs http",
            ),
            ("zipkin: {endpoint: z, sampling_rate: 2}", "monitoring.zipkin.sampling_rate: 2 is not"),
            (
                "otlp: {endpoint: a}, jaeger: {endpoint: b}",
                "monitoring.jaeger: is enabled beside monitoring.otlp",
            ),
            ("otlp: {endpoin: a}", "monitoring.otlp.endpoin: "),
        ] {
            let error = error(&format!("monitoring: {{{text}}}\n{models}"));
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn wrong_values_are_named_with_their_path() {
        let models = "models: [{name: a, path: /a}]";
        for (text, path) in [
            (String::new(), "models: is missing"),
            ("models: []".into(), "models: is empty"),
            ("models: [{path: /a}]".into(), "models[0].name: is missing"),
            ("models: [a]".into(), "models[0]: invalid type: string \"a\", expected keys and values"),
            (
                "models: [{name: a, path: /a}, {name: a, path: /b}]".into(),
                "models[1].name: \"a\" is given twice",
            ),
            ("models: [{name: a, path: /a, aliases: [a]}]".into(), "models[0].aliases: \"a\" is given twice"),
            ("models: [{name: a, path: /a, context_tokens: 0}]".into(), "models[0].context_tokens: 0"),
            ("models: [{name: a, path: /a, max_queue: 0}]".into(), "models[0].max_queue: 0"),
            ("models: [{name: a, path: /a, numerics: best}]".into(), "models[0].numerics: \"best\""),
            ("models: [{name: a, path: /a, kv_cache: int8}]".into(), "models[0].kv_cache: \"int8\""),
            ("models: [{name: a, path: /a, task: dance}]".into(), "models[0].task: \"dance\""),
            (
                "models: [{name: a, path: /a, batching: {max_wait_time_ms: 0}}]".into(),
                "models[0].batching.max_wait_time_ms: 0",
            ),
            (format!("server: {{drain_timeout_ms: 0}}\n{models}"), "server.drain_timeout_ms: 0"),
            (format!("server: {{admin: {{port: 1}}}}\n{models}"), "server.admin.keys: is missing"),
            (
                format!("server: {{allowed_origins: [here]}}\n{models}"),
                "server.allowed_origins: \"here\" is not",
            ),
            (format!("server: {{allowed_origins: []}}\n{models}"), "server.allowed_origins: is empty"),
            (format!("server: {{port: 70000}}\n{models}"), "server.port: "),
            (format!("server: {{host: here}}\n{models}"), "server.host: \"here\" is not an address"),
            (format!("server: {{port: 9090}}\n{models}"), "server.grpc_port: is the same"),
            (format!("batching: {{max_batch_size: 257}}\n{models}"), "batching.max_batch_size: 257"),
            (format!("batching: {{strategy: fast}}\n{models}"), "batching.strategy: \"fast\""),
            (
                format!("batching: {{max_wait_time_ms: 0}}\n{models}"),
                "batching.max_wait_time_ms: 0 is not within",
            ),
            (format!("batching: {{max_wait_time_ms: 1001}}\n{models}"), "batching.max_wait_time_ms: 1001"),
        ] {
            let error = error(&text);
            assert!(error.starts_with(path), "{error}");
        }
        assert!(error("server: [").contains("not valid YAML"));
        let config = Config::from_str("models: [{name: a, path: 'ftp://org/a'}]").unwrap();
        let error = config.specs(None).unwrap_err().to_string();
        assert!(error.starts_with("models[0].path: ftp://"), "{error}");
    }
}
