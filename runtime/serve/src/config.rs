//! `config.yaml` of the one-process server.
//!
//! A key that is not known is an error with its path and the nearest known one; a key that is promised and
//! not built yet is refused as such. Neither is ever silently ignored, because its user would believe that it
//! holds.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use trustformers_proto::yaml::YamlError;
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::process::Listen;
use trustformers_runtime::spec::{ModelSpec, SpeculationSpec, TextBatching};
use trustformers_store::Source;

use crate::config_file::ConfigFile;

/// Name of the file in the working directory.
pub const FILE_NAME: &str = "config.yaml";

/// A file that works as it stands once its path names a model.
pub const EXAMPLE: &str = "\
# Everything but `models` may be left out; these are the defaults.
server:
  host: \"0.0.0.0\"        # every address, IPv6 too; \"127.0.0.1\" for this machine alone
  port: 8080             # HTTP: /v1/generate, /v1/embeddings, /v1/models, /health, /metrics
  grpc_port: 9090
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
    # Guesses tokens and checks several in one step: the same answers, sooner where few requests run at once.
    # speculation: {ngram: {}}                          # from the text itself
    # speculation: {draft: {path: /models/small.gguf}}  # by a smaller model of the same vocabulary
monitoring:
  prometheus: {enabled: true, port: 9090}    # may equal grpc_port; /metrics is always on server.port too
";

/// Keys that are promised and not built yet, each with what to do until then.
pub(crate) const NOT_YET: &[(&str, &str)] = &[
    ("cache", "remove it; answers are not cached"),
    ("monitoring.jaeger", "remove it; traces are not exported"),
    ("monitoring.otlp", "remove it; traces are not exported"),
    ("monitoring.zipkin", "remove it; traces are not exported"),
];

/// What to serve and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen.
    pub server: ServerConfig,
    /// Sequences that are computed together, 1 to 256, for models that do not say themselves.
    pub max_batch_size: Option<usize>,
    /// How texts are gathered, for the models that embed.
    pub batching: TextBatching,
    /// The models, loaded in this order.
    pub models: Vec<ModelConfig>,
    /// One more port for `GET /metrics`; may equal the gRPC port.
    pub prometheus_port: Option<u16>,
}

/// Where to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerConfig {
    /// The address; unspecified (`0.0.0.0`, `::`) means every address of both families.
    pub host: IpAddr,
    /// HTTP's port; 0 takes any that is free.
    pub port: u16,
    /// gRPC's port; 0 takes any that is free.
    pub grpc_port: u16,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { host: Ipv4Addr::UNSPECIFIED.into(), port: 8080, grpc_port: 9090 }
    }
}

/// One model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// The name that callers use.
    pub name: String,
    /// A file, or a folder that holds one model file or a checkpoint; a relative path counts from the working
    /// directory. Also
    /// `file://` URIs.
    pub path: String,
    /// Where it runs.
    pub device: DeviceChoice,
    /// Sequences that are computed together, 1 to 256.
    pub max_batch_size: Option<usize>,
    /// How tokens are guessed.
    pub speculation: Option<SpeculationSpec>,
}

/// Why a configuration cannot be used. Each names the file or the path of the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "{} cannot be read: {cause}; name a file with --config (trustformers-serve --print-config-example shows one)",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
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

    /// Reads the text of a `config.yaml`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        ConfigFile::read(text)?.check()
    }
}

impl Config {
    /// The addresses to listen on.
    pub fn listen(&self) -> Listen {
        let ServerConfig { host, port, grpc_port } = self.server;
        Listen {
            http: SocketAddr::new(host, port),
            grpc: SocketAddr::new(host, grpc_port),
            metrics: self.prometheus_port.map(|port| SocketAddr::new(host, port)),
        }
    }

    /// The models with everything that an engine needs.
    ///
    /// # Errors
    /// A path whose scheme cannot be read, with the model's place in the list.
    pub fn specs(&self, threads: Option<usize>) -> Result<Vec<ModelSpec>, ConfigError> {
        (0..).zip(&self.models).map(|(index, model): (usize, _)| self.spec(index, model, threads)).collect()
    }

    fn spec(
        &self,
        index: usize,
        model: &ModelConfig,
        threads: Option<usize>,
    ) -> Result<ModelSpec, ConfigError> {
        let ModelConfig { name, path, device, max_batch_size, speculation } = model;
        let source =
            Source::from_str(path).map_err(|error| wrong(&format!("models[{index}].path"), error))?;
        let mut spec = ModelSpec::new(name.clone(), source);
        spec.device = *device;
        spec.threads = threads;
        spec.batching = self.batching;
        spec.speculation.clone_from(speculation);
        if let Some(size) = max_batch_size.or(self.max_batch_size) {
            spec.set_max_batch_size(size);
        }
        Ok(spec)
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
        assert_eq!((config.max_batch_size, config.prometheus_port), (Some(32), Some(9090)));
        assert_eq!(config.batching, TextBatching::default());
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
            ("{draft: {path: 'hf://b/c'}}", "models[0].speculation.draft.path: hf://"),
            ("{ngram: {n: 3}}", "models[0].speculation.ngram.n: there is no such key"),
        ] {
            let error: ConfigError = speculation(text).unwrap_err();
            assert!(error.to_string().starts_with(says), "{error}");
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
            ("completely_different: 1", "completely_different", "known are: server"),
        ] {
            let error = error(text);
            assert!(error.starts_with(path) && error.contains(hint), "{error}");
        }
    }

    #[test]
    fn keys_that_are_not_built_yet_are_refused_as_such() {
        let models = "models: [{name: a, path: /a}]";
        for (text, path) in [
            ("cache: {enabled: true}", "cache"),
            ("monitoring: {jaeger: {enabled: true}}", "monitoring.jaeger"),
        ] {
            let error = error(&format!("{text}\n{models}"));
            assert!(error.starts_with(path) && error.contains("not available in this version"), "{error}");
        }
        let error = error("models: [{name: a, path: /a, device: 'cuda:0'}]");
        assert!(
            error.starts_with("models[0].device: device \"cuda:0\" is not available in this version"),
            "{error}"
        );
    }

    #[test]
    fn wrong_values_are_named_with_their_path() {
        let models = "models: [{name: a, path: /a}]";
        for (text, path) in [
            (String::new(), "models: is missing"),
            ("models: []".into(), "models: is empty"),
            ("models: [{path: /a}]".into(), "models[0].name: is missing"),
            ("models: [a]".into(), "models[0]: invalid type: string \"a\", expected keys and values"),
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
        let config = Config::from_str("models: [{name: a, path: 'hf://org/a'}]").unwrap();
        let error = config.specs(None).unwrap_err().to_string();
        assert!(error.starts_with("models[0].path: hf://"), "{error}");
    }
}
