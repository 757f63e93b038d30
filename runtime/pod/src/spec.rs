//! What to load and with which settings: the validated form of `pod.yaml`, and of a model in `config.yaml`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use trustformers_engine::encoder::{BatchStrategy, EncoderConfig, MAX_WAIT_MS};
use trustformers_engine::{EngineConfig, KvType, Numerics};
use trustformers_proto::Task;
use trustformers_proto::pod_config::{PodAdapter, PodConfig, PodGoldenPrompt};
use trustformers_store::Source;

use crate::adapters::AdapterSpec;
use crate::device::DeviceChoice;
use crate::probe::GoldenProbe;

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
    /// How a source of another machine is fetched; without it only files of this machine are read.
    pub fetch: Option<FetchSpec>,
    /// The task that the files must serve. None: the task that the files state.
    pub task: Option<Task>,
    /// The task to serve where `task` is not set and the files serve several. Other files keep their own.
    pub preferred_task: Option<Task>,
    /// Where it runs.
    pub device: DeviceChoice,
    /// Threads of a CPU device; none takes what the process may use.
    pub threads: Option<usize>,
    /// Settings of its engine; `model_label` is the first name.
    pub engine: EngineConfig,
    /// Speculative decoding, of a model that generates.
    pub speculation: Option<SpeculationSpec>,
    /// Adapters of a model that generates; callers choose one as `model:adapter`, or by its own name.
    pub adapters: Vec<AdapterSpec>,
    /// How the engine of a model that embeds gathers texts; the other figures are those of `engine`.
    pub batching: TextBatching,
    /// What it must answer before it may serve.
    pub probes: Vec<GoldenProbe>,
}

/// Where the files of other machines go, and what they are fetched with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchSpec {
    /// The cache directory, which processes may share.
    pub cache_dir: PathBuf,
    /// A folder in which each file is a credential, by its name (`HF_TOKEN`); it goes before the environment.
    pub secret_dir: Option<PathBuf>,
    /// Size that the cache does not exceed while it holds files that nothing uses.
    pub max_cache_bytes: Option<u64>,
}

impl FetchSpec {
    /// The cache of the user who runs this process: `TRUSTFORMERS_CACHE_DIR`, else `trustformers` below
    /// `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// The variable to set, where none is set.
    pub fn of_user() -> Result<Self, String> {
        Self::of_variables(&|name| std::env::var_os(name))
    }

    fn of_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, String> {
        let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let below = |name: &str, path: &str| folder(name).map(|folder| folder.join(path));
        let cache_dir = folder("TRUSTFORMERS_CACHE_DIR")
            .or_else(|| below("XDG_CACHE_HOME", "trustformers"))
            .or_else(|| below("HOME", ".cache/trustformers"));
        let cache_dir = cache_dir.ok_or("set TRUSTFORMERS_CACHE_DIR to a folder for fetched models")?;
        Ok(Self { cache_dir, secret_dir: None, max_cache_bytes: None })
    }
}

/// How draft tokens are proposed, so that one step checks several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpeculationSpec {
    /// The tokens that followed the same tokens before.
    Ngram,
    /// A smaller model of the same vocabulary at this source.
    Draft(Source),
}

/// How texts are gathered into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextBatching {
    /// When a step begins.
    pub strategy: BatchStrategy,
    /// Longest time that a free device waits for more texts, 1 to 1000 ms.
    pub max_wait_ms: u32,
    /// Whether the priority class of a request decides its order.
    pub priority: bool,
}

impl Default for TextBatching {
    fn default() -> Self {
        let EncoderConfig { strategy, max_wait_ms, priority, .. } = EncoderConfig::default();
        Self { strategy, max_wait_ms, priority }
    }
}

impl TextBatching {
    /// Sets the window.
    ///
    /// # Errors
    /// What is allowed, for a figure outside of 1 to 1000.
    pub fn set_max_wait_ms(&mut self, max_wait_ms: u32) -> Result<(), String> {
        if !MAX_WAIT_MS.contains(&max_wait_ms) {
            return Err(format!(
                "{max_wait_ms} is not within {} to {}",
                MAX_WAIT_MS.start(),
                MAX_WAIT_MS.end()
            ));
        }
        self.max_wait_ms = max_wait_ms;
        Ok(())
    }
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
            fetch: None,
            task: None,
            preferred_task: None,
            device: DeviceChoice::Auto,
            threads: None,
            engine,
            speculation: None,
            adapters: Vec::new(),
            batching: TextBatching::default(),
            probes: Vec::new(),
        }
    }

    /// Whether a request for another version asks for the same source and settings, so that it would load the
    /// same again. Names and revision do not count, and a task that it leaves out is any.
    pub fn same_settings(&self, other: &Self) -> bool {
        let Self { names: _, revision: _, source, files, sha256, device, .. } = self;
        let Self { threads, engine: _, speculation, adapters, batching, probes, .. } = self;
        let same_task = other.task.is_none() || other.task == self.task;
        let what = same_task && (source, files, sha256) == (&other.source, &other.files, &other.sha256);
        let how = (device, threads, batching) == (&other.device, &other.threads, &other.batching);
        let EngineConfig { numerics, kv_cache, context_tokens, max_batch_size, max_queue, .. } = self.engine;
        let engine = (numerics, kv_cache, context_tokens, max_batch_size, max_queue)
            == (
                other.engine.numerics,
                other.engine.kv_cache,
                other.engine.context_tokens,
                other.engine.max_batch_size,
                other.engine.max_queue,
            );
        let beside = (speculation, adapters, probes) == (&other.speculation, &other.adapters, &other.probes);
        what && how && engine && beside
    }

    /// The task that decides what files are that serve several.
    pub fn asked_task(&self) -> Option<Task> {
        self.task.or(self.preferred_task)
    }

    /// The first name.
    pub fn name(&self) -> &str {
        &self.engine.model_label
    }

    /// What a `pod.yaml` asks for.
    ///
    /// # Errors
    /// The setting that cannot be honoured. Figures that depend on the model (a context longer than its own)
    /// are checked when it is loaded.
    pub fn from_pod(config: &PodConfig, threads: Option<usize>) -> Result<Self, SpecError> {
        let PodConfig { model, engine, drain_timeout_ms: _, admin: _ } = config;
        let name =
            model.names.first().ok_or_else(|| SpecError::new("model.names", "give at least one name"))?;
        let source = Source::from_str(&model.path).map_err(|error| SpecError::new("model.path", error))?;
        let fetch = model.fetch.as_ref();
        if source.remote().is_some() && fetch.is_none() {
            let why = format!("{source} must be fetched, and model.fetch.cacheDir does not say where to");
            return Err(SpecError::new("model.path", why));
        }
        let revision = fetch.and_then(|fetch| fetch.revision.as_deref());
        let source = source.with_revision(revision);
        let source = source.map_err(|error| SpecError::new("model.fetch.revision", error))?;
        let mut spec = Self::new(name.clone(), source);
        spec.fetch = fetch.map(|fetch| FetchSpec {
            cache_dir: fetch.cache_dir.clone().into(),
            secret_dir: fetch.secret_dir.clone().map(PathBuf::from),
            max_cache_bytes: fetch.max_cache_bytes,
        });
        spec.names.clone_from(&model.names);
        spec.revision.clone_from(&model.revision);
        spec.files.clone_from(&model.files);
        spec.sha256.clone_from(&model.sha256);
        spec.task = model.task;
        spec.threads = threads;
        spec.probes = golden_probes(&model.golden_prompts)?;
        spec.adapters = adapters_of_pod(&model.adapters, spec.fetch.is_some())?;
        if let Some(device) = &engine.device {
            spec.device = device.parse().map_err(|error| SpecError::new("engine.device", error))?;
        }
        if let Some(numerics) = &engine.numerics {
            spec.engine.numerics =
                numerics_of(numerics).map_err(|error| SpecError::new("engine.numerics", error))?;
        }
        if let Some(kv_cache) = &engine.kv_cache {
            spec.engine.kv_cache =
                kv_cache_of(kv_cache).map_err(|error| SpecError::new("engine.kvCache", error))?;
        }
        spec.engine.context_tokens = engine.context_tokens.map(|tokens| tokens as usize);
        if let Some(size) = engine.max_batch_size {
            spec.set_max_batch_size(size as usize);
        }
        if let Some(length) = engine.max_queue {
            spec.engine.max_queue = length as usize;
        }
        spec.batching.priority = engine.priority.unwrap_or(spec.batching.priority);
        if let Some(strategy) = &engine.batch_strategy {
            spec.batching.strategy =
                strategy.parse().map_err(|error| SpecError::new("engine.batchStrategy", error))?;
        }
        if let Some(max_wait_ms) = engine.max_wait_ms {
            let set = spec.batching.set_max_wait_ms(max_wait_ms);
            set.map_err(|error| SpecError::new("engine.maxWaitMs", error))?;
        }
        Ok(spec)
    }

    /// The settings of an engine that generates.
    pub fn engine_config(&self) -> EngineConfig {
        let TextBatching { strategy, max_wait_ms: _, priority } = self.batching;
        EngineConfig { priority: priority || strategy == BatchStrategy::Priority, ..self.engine.clone() }
    }

    /// The settings of an engine that encodes texts.
    pub fn encoder_config(&self) -> EncoderConfig {
        let TextBatching { strategy, max_wait_ms, priority } = self.batching;
        EncoderConfig {
            model_label: self.engine.model_label.clone(),
            strategy,
            max_batch_size: self.engine.max_batch_size,
            max_wait_ms,
            priority,
            max_queue: self.engine.max_queue,
            context_tokens: self.engine.context_tokens,
            token_budget: None,
            numerics: self.engine.numerics,
        }
    }

    /// Sets the batch, and the token budget with it where the batch would not fit in.
    pub fn set_max_batch_size(&mut self, size: usize) {
        self.engine.max_batch_size = size;
        self.engine.token_budget = self.engine.token_budget.max(size);
    }
}

fn adapters_of_pod(adapters: &[PodAdapter], can_fetch: bool) -> Result<Vec<AdapterSpec>, SpecError> {
    let read = |(index, one): (usize, &PodAdapter)| {
        let at = |field: &str| format!("model.adapters[{index}].{field}");
        let source = Source::from_str(&one.path).map_err(|error| SpecError::new(at("path"), error))?;
        if source.remote().is_some() && !can_fetch {
            let why = format!("{source} must be fetched, and model.fetch.cacheDir does not say where to");
            return Err(SpecError::new(at("path"), why));
        }
        let source = source.with_revision(one.revision.as_deref());
        let source = source.map_err(|error| SpecError::new(at("revision"), error))?;
        Ok(AdapterSpec { name: one.name.clone(), source, sha256: one.sha256.clone() })
    };
    let read: Result<Vec<AdapterSpec>, SpecError> = adapters.iter().enumerate().map(read).collect();
    let adapters = read?;
    AdapterSpec::check_names(adapters.iter().map(|adapter| adapter.name.as_str()))
        .map_err(|(index, why)| SpecError::new(format!("model.adapters[{index}].name"), why))?;
    Ok(adapters)
}

fn golden_probes(prompts: &[PodGoldenPrompt]) -> Result<Vec<GoldenProbe>, SpecError> {
    let probe = |(index, one): (usize, &PodGoldenPrompt)| {
        GoldenProbe::of_beginning(&one.prompt, &one.expect)
            .map_err(|error| SpecError::new(format!("model.goldenPrompts[{index}]"), error))
    };
    prompts.iter().enumerate().map(probe).collect()
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

/// The type of the KV cache, `f32`, `f16` or `bf16`; none for `auto`.
///
/// # Errors
/// What is allowed, for any other word.
pub fn kv_cache_of(text: &str) -> Result<Option<KvType>, String> {
    match text {
        "auto" => Ok(None),
        text => text.parse().map(Some).map_err(|error: String| error + "; or \"auto\""),
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
            "model: {names: [ns/a, a], revision: r1, path: /m, files: ['*.gguf'], sha256: ab, task: embed, \
             goldenPrompts: [{prompt: a, expect: b}]}\n\
             engine: {device: cpu, numerics: exact, kvCache: bf16, contextTokens: 64, maxBatchSize: 200, maxQueue: 3, \
             batchStrategy: size, maxWaitMs: 7, priority: true}\n",
        )
        .unwrap();
        assert_eq!((spec.name(), spec.names.len(), spec.revision.as_str()), ("ns/a", 2, "r1"));
        assert_eq!(
            (spec.device, spec.threads, spec.sha256.as_deref()),
            (DeviceChoice::Cpu, Some(2), Some("ab"))
        );
        assert_eq!(spec.task, Some(Task::Embed));
        assert_eq!(spec.probes[0].begins_with.as_deref(), Some("b"));
        let encoder = spec.encoder_config();
        assert_eq!((encoder.strategy, encoder.max_wait_ms, encoder.priority), (BatchStrategy::Size, 7, true));
        assert!(spec.engine_config().priority, "classes count for generation, too");
        assert_eq!(
            (encoder.max_batch_size, encoder.max_queue, encoder.context_tokens, encoder.numerics),
            (200, 3, Some(64), Numerics::Exact)
        );
        assert_eq!(spec.engine.kv_cache, Some(KvType::Bf16));
        let EngineConfig { numerics, context_tokens, max_batch_size, max_queue, token_budget, .. } =
            spec.engine;
        assert_eq!(
            (numerics, context_tokens, max_batch_size, max_queue),
            (Numerics::Exact, Some(64), 200, 3)
        );
        assert_eq!(token_budget, 200, "a step holds at least one row for each sequence");
    }

    #[test]
    fn a_source_of_another_machine_has_a_cache_and_a_revision() {
        let fetched = spec(
            "model: {names: [a], revision: r, path: 'hf://o/n', fetch: {cacheDir: /c, secretDir: /s, revision: v1, maxCacheBytes: 9}}",
        );
        let fetched = fetched.unwrap();
        assert_eq!(fetched.source.to_string(), "hf://o/n@v1");
        let expected =
            FetchSpec { cache_dir: "/c".into(), secret_dir: Some("/s".into()), max_cache_bytes: Some(9) };
        assert_eq!(fetched.fetch, Some(expected));
        let cache_dir = |set: &[(&str, &str)]| {
            let find = |name: &str| set.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
            FetchSpec::of_variables(&find).map(|fetch| fetch.cache_dir)
        };
        assert_eq!(cache_dir(&[("HOME", "/h"), ("XDG_CACHE_HOME", "")]), Ok("/h/.cache/trustformers".into()));
        assert_eq!(cache_dir(&[("HOME", "/h"), ("TRUSTFORMERS_CACHE_DIR", "/c")]), Ok("/c".into()));
        assert!(cache_dir(&[]).unwrap_err().contains("TRUSTFORMERS_CACHE_DIR"));
    }

    #[test]
    fn adapters_of_pod_yaml_are_read_where_they_lie_or_from_their_address() {
        let read = |adapters: &str| {
            spec(&format!(
                "model: {{names: [a], revision: r, path: /m, fetch: {{cacheDir: /c}}, adapters: {adapters}}}"
            ))
        };
        let two =
            "[{name: sql, path: /adapters/sql, sha256: ab}, {name: tone, path: 'hf://o/n', revision: v1}]";
        let adapters = read(two).unwrap().adapters;
        assert_eq!((adapters[0].name.as_str(), adapters[0].sha256.as_deref()), ("sql", Some("ab")));
        assert_eq!(adapters[0].source, Source::from_path("/adapters/sql"));
        assert_eq!(adapters[1].source.to_string(), "hf://o/n@v1");
        for (adapters, field) in [
            ("[{name: 'a:b', path: /b}]", "model.adapters[0].name"),
            ("[{name: a, path: /b}, {name: a, path: /c}]", "model.adapters[1].name"),
            ("[{name: a, path: 'ftp://b/c'}]", "model.adapters[0].path"),
            ("[{name: a, path: 's3://b/c', revision: v1}]", "model.adapters[0].revision"),
        ] {
            assert_eq!(read(adapters).unwrap_err().field, field);
        }
        let unfetched =
            spec("model: {names: [a], revision: r, path: /m, adapters: [{name: b, path: 'hf://o/n'}]}");
        assert_eq!(unfetched.unwrap_err().field, "model.adapters[0].path");
    }

    #[test]
    fn settings_that_cannot_be_honoured_have_their_path() {
        for (text, field) in [
            ("model: {names: [a], revision: r, path: 'hf://a/b'}", "model.path"),
            ("model: {names: [a], revision: r, path: 'ftp://a/b'}", "model.path"),
            (
                "model: {names: [a], revision: r, path: 's3://a/b', fetch: {cacheDir: /c, revision: v1}}",
                "model.fetch.revision",
            ),
            ("model: {names: [a], revision: r, path: /m}\nengine: {device: tpu}", "engine.device"),
            ("model: {names: [a], revision: r, path: /m}\nengine: {numerics: best}", "engine.numerics"),
            ("model: {names: [a], revision: r, path: /m}\nengine: {kvCache: int8}", "engine.kvCache"),
            (
                "model: {names: [a], revision: r, path: /m}\nengine: {batchStrategy: best}",
                "engine.batchStrategy",
            ),
            ("model: {names: [a], revision: r, path: /m}\nengine: {maxWaitMs: 0}", "engine.maxWaitMs"),
            (
                "model: {names: [a], revision: r, path: /m, goldenPrompts: [{prompt: a, expect: ''}]}",
                "model.goldenPrompts[0]",
            ),
        ] {
            assert_eq!(spec(text).unwrap_err().field, field);
        }
    }
}
