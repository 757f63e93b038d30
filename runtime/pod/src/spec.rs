//! What to load and with which settings: the validated form of `pod.yaml`, and of a model in `config.yaml`.

use std::str::FromStr;

use trustformers_engine::{EngineConfig, Numerics};
use trustformers_proto::pod_config::PodConfig;
use trustformers_store::Source;

use crate::device::DeviceChoice;

/// One model to load.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Names that callers may use; the first is the one that answers carry. Not empty.
    pub names: Vec<String>,
    /// The revision this stands for; empty outside a cluster.
    pub revision: String,
    /// Where the model lies.
    pub source: Source,
    /// Patterns that pick its files; empty picks the only one there is.
    pub files: Vec<String>,
    /// The digest that the files must have.
    pub sha256: Option<String>,
    /// Where it runs.
    pub device: DeviceChoice,
    /// Threads of a CPU device; none takes what the process may use.
    pub threads: Option<usize>,
    /// Settings of its engine; `model_label` is the first name.
    pub engine: EngineConfig,
}

/// A setting that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct SpecError {
    /// The setting, with its path in the file.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl SpecError {
    /// A wrong setting.
    pub fn new(field: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self { field: field.into(), message: message.to_string() }
    }
}

impl ModelSpec {
    /// A model with its engine's default settings.
    pub fn new(name: impl Into<String>, source: Source) -> Self {
        let name = name.into();
        let engine = EngineConfig { model_label: name.clone(), ..EngineConfig::default() };
        Self {
            names: vec![name],
            revision: String::new(),
            source,
            files: Vec::new(),
            sha256: None,
            device: DeviceChoice::Auto,
            threads: None,
            engine,
        }
    }

    /// The first name.
    pub fn name(&self) -> &str {
        &self.engine.model_label
    }

    /// What a `pod.yaml` asks for.
    ///
    /// # Errors
    /// The setting that cannot be honoured. Figures that depend on the model (a context longer than its own) are
    /// checked when it is loaded.
    pub fn from_pod(config: &PodConfig, threads: Option<usize>) -> Result<Self, SpecError> {
        let PodConfig { model, engine, drain_timeout_ms: _ } = config;
        let name =
            model.names.first().ok_or_else(|| SpecError::new("model.names", "give at least one name"))?;
        let source = Source::from_str(&model.path).map_err(|error| SpecError::new("model.path", error))?;
        let mut spec = Self::new(name.clone(), source);
        spec.names.clone_from(&model.names);
        spec.revision.clone_from(&model.revision);
        spec.files.clone_from(&model.files);
        spec.sha256.clone_from(&model.sha256);
        spec.threads = threads;
        if let Some(device) = &engine.device {
            spec.device = device.parse().map_err(|error| SpecError::new("engine.device", error))?;
        }
        if let Some(numerics) = &engine.numerics {
            spec.engine.numerics =
                numerics_of(numerics).map_err(|error| SpecError::new("engine.numerics", error))?;
        }
        spec.engine.context_tokens = engine.context_tokens.map(|tokens| tokens as usize);
        if let Some(size) = engine.max_batch_size {
            spec.set_max_batch_size(size as usize);
        }
        if let Some(length) = engine.max_queue {
            spec.engine.max_queue = length as usize;
        }
        Ok(spec)
    }

    /// Sets the batch, and the token budget with it where the batch would not fit in.
    pub fn set_max_batch_size(&mut self, size: usize) {
        self.engine.max_batch_size = size;
        self.engine.token_budget = self.engine.token_budget.max(size);
    }
}

/// `fast` or `exact`.
///
/// # Errors
/// What is allowed, for any other word.
pub fn numerics_of(text: &str) -> Result<Numerics, String> {
    match text {
        "fast" => Ok(Numerics::Fast),
        "exact" => Ok(Numerics::Exact),
        other => Err(format!("{other:?} is neither \"fast\" nor \"exact\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_pod(&PodConfig::parse(text).unwrap(), Some(2))
    }

    #[test]
    fn every_setting_of_pod_yaml_reaches_the_engine() {
        let spec = spec(
            "model: {names: [ns/a, a], revision: r1, path: /m, files: ['*.gguf'], sha256: ab}\n\
             engine: {device: cpu, numerics: exact, contextTokens: 64, maxBatchSize: 200, maxQueue: 3}\n",
        )
        .unwrap();
        assert_eq!((spec.name(), spec.names.len(), spec.revision.as_str()), ("ns/a", 2, "r1"));
        assert_eq!(
            (spec.device, spec.threads, spec.sha256.as_deref()),
            (DeviceChoice::Cpu, Some(2), Some("ab"))
        );
        let EngineConfig { numerics, context_tokens, max_batch_size, max_queue, token_budget, .. } =
            spec.engine;
        assert_eq!(
            (numerics, context_tokens, max_batch_size, max_queue),
            (Numerics::Exact, Some(64), 200, 3)
        );
        assert_eq!(token_budget, 200, "a step holds at least one row for each sequence");
    }

    #[test]
    fn what_cannot_be_honoured_is_named_with_its_path() {
        for (text, field) in [
            ("model: {names: [a], revision: r, path: 'hf://a/b'}", "model.path"),
            ("model: {names: [a], revision: r, path: /m}\nengine: {device: tpu}", "engine.device"),
            ("model: {names: [a], revision: r, path: /m}\nengine: {numerics: best}", "engine.numerics"),
        ] {
            assert_eq!(spec(text).unwrap_err().field, field);
        }
    }
}
