//! From files to an engine: resolve, digest, pin, read, put on the device. Blocking; run it on a thread of
//! its own.
//!
//! A file is read twice, once for its digest (while it is fetched, or where it lies) and once by the model's
//! reader ([`crate::reading`]).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};
use tokio::sync::{Mutex, OwnedMutexGuard};
use trustformers_engine::{LoadProgress, Speculation};
use trustformers_model::Model;
use trustformers_proto::Task;
use trustformers_store::{Digest, Fetched, Source};

use crate::adapters;
use crate::device::OpenDevice;
use crate::failure::Failure;
use crate::memory::MemoryBudget;
use crate::model_files::{self, Listener, WantedFiles};
use crate::reading::{self, ReadFiles, ReadListener, model_files, mul_div};
use crate::runner::{Runner, RunnerMetrics};
use crate::spec::{ModelSpec, SpeculationSpec};
use crate::status::LoadedFacts;

/// Receives the progress of loading: bytes done and bytes in all, of the model's files. The digest, the
/// reading and the way to the device count a third of the bytes each, so the figure rises once from nothing
/// to all.
pub type OnProgress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// The passes over a model's bytes.
const PASSES: u64 = 3;

/// What loading needs beside the model's own settings; one for a process.
pub struct Loader {
    open_device: OpenDevice,
    runners: RunnerMetrics,
    seconds: GaugeVec,
    swaps: IntCounterVec,
    /// The task of each model.
    info: IntGaugeVec,
    memory: MemoryBudget,
    /// One load at a time: two at once would only share the same disk and cores.
    one_load: Arc<Mutex<()>>,
    /// By the names of their models.
    cached_files: std::sync::Mutex<HashMap<String, Fetched>>,
}

/// A model on its device, not warmed up yet.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What runs it.
    pub runner: Runner,
    /// sha256 of its files.
    pub digest: Digest,
    /// Where the time went.
    pub timings: LoadTimings,
}

/// Where the time of a load went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadTimings {
    /// Computing the digest of the files, as far as nothing else was done meanwhile.
    pub digest: Duration,
    /// Finding and reading the files, and checking the model.
    pub read: Duration,
    /// Putting it on the device.
    pub device: Duration,
}

impl Loader {
    /// A loader that counts in `registry`.
    ///
    /// # Errors
    /// When the registry already holds metrics of these names: one loader serves a whole process.
    pub fn new(open_device: OpenDevice, registry: &Registry) -> Result<Self, prometheus::Error> {
        let options = Opts::new(
            "trustformers_model_load_seconds",
            "How long the last load of a model took, by phase: digest, read, device, warm_up.",
        );
        let seconds = GaugeVec::new(options, &["model", "phase"])?;
        registry.register(Box::new(seconds.clone()))?;
        let options = Opts::new(
            "trustformers_model_swaps_total",
            "Swaps of a model's versions, by result: swapped, rolled_back, refused.",
        );
        let swaps = IntCounterVec::new(options, &["model", "result"])?;
        registry.register(Box::new(swaps.clone()))?;
        let options = Opts::new(
            "trustformers_model_info",
            "Always 1, with the task of a model that was loaded: joined with other series it gives them a task.",
        );
        let info = IntGaugeVec::new(options, &["model", "task"])?;
        registry.register(Box::new(info.clone()))?;
        let runners = RunnerMetrics::register(registry)?;
        let (memory, one_load, cached_files) = (MemoryBudget::default(), Arc::default(), Default::default());
        Ok(Self { open_device, runners, seconds, swaps, info, memory, one_load, cached_files })
    }

    /// Loads a model.
    ///
    /// # Errors
    /// Whatever stands in the way, with its reason.
    pub fn load(&self, spec: &ModelSpec, progress: &OnProgress) -> Result<Loaded, Failure> {
        self.load_while(spec, progress, &|| true)
    }

    /// [`Self::load`], which ends early once the model is not wanted any more. It asks after every MiB of the
    /// two passes over the files, and before each further step.
    ///
    /// # Errors
    /// As [`Self::load`]; `Unloaded` where it ended early.
    pub fn load_while(
        &self,
        spec: &ModelSpec,
        progress: &OnProgress,
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<Loaded, Failure> {
        let check_wanted = || if is_wanted() { Ok(()) } else { Err(not_wanted()) };
        let started = Instant::now();
        // The third pass is that to the device.
        let report = |passes_bytes: u64, total: u64| progress(passes_bytes / PASSES, total);
        let read = reading::read(spec, &ReadListener { progress: &report, is_wanted });
        check_wanted()?;
        let ReadFiles { total_bytes: total, digest, fetched, model, digest_time } = read?;
        check_task(spec, &model)?;
        if spec.speculation.is_some() && model.task() != Task::Generate {
            let why = format!(
                "speculation: {} generates no text and has no tokens to guess; remove it",
                spec.name()
            );
            return Err(Failure::permanent("InvalidConfiguration", why));
        }
        let mut spec = spec.clone();
        let drafts =
            spec.speculation.as_ref().map(|guessing| speculation(guessing, &spec, is_wanted)).transpose();
        check_wanted()?;
        spec.engine.speculation = drafts?;
        let adapters = adapters::read(&spec, &model, is_wanted);
        check_wanted()?;
        let adapters = adapters?;
        spec.engine.adapters = adapters::room(&adapters);
        let device_from = Instant::now();
        let backend = (self.open_device)(&spec)?;
        let backend = self.memory.admit(&mut spec, &model, backend, adapters::bytes(&adapters))?;
        let spec = &spec;
        let on_device = {
            let progress = Arc::clone(progress);
            move |taken: LoadProgress| {
                let share = if taken.total_bytes == 0 {
                    0
                } else {
                    mul_div(total, taken.done_bytes.min(taken.total_bytes), taken.total_bytes * PASSES)
                };
                progress(mul_div(total, PASSES - 1, PASSES) + share, total);
            }
        };
        let runner = Runner::start(model, backend, spec, &self.runners, Box::new(on_device))?;
        adapters::put(&runner, adapters)?;
        progress(total, total);
        self.keep_files(spec.name(), fetched);
        let read = (device_from - started).saturating_sub(digest_time);
        let timings = LoadTimings { digest: digest_time, read, device: device_from.elapsed() };
        self.note(spec, &runner, &digest, timings);
        Ok(Loaded { runner, digest, timings })
    }

    /// Waits until no other load runs. The next one waits until the permit is dropped.
    pub async fn permit(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.one_load).lock_owned().await
    }

    /// Memory that the models of this process have reserved, in bytes.
    pub fn reserved_bytes(&self) -> u64 {
        self.memory.reserved_bytes()
    }

    /// The versions of a model were swapped, or that was refused.
    pub(crate) fn note_swap(&self, model: &str, result: &str) {
        self.swaps.with_label_values(&[model, result]).inc();
    }

    /// Files of the cache that a model reads while it serves stay there until it is forgotten, or another
    /// version of it is loaded.
    fn keep_files(&self, model: &str, fetched: Option<Fetched>) {
        let mut kept = self.cached_files.lock().unwrap_or_else(PoisonError::into_inner);
        match fetched {
            Some(fetched) => drop(kept.insert(model.to_owned(), fetched)),
            None => drop(kept.remove(model)),
        }
    }

    /// How long the warm-up took, beside the phases of the load.
    pub fn note_warm_up(&self, spec: &ModelSpec, took: Duration) {
        self.seconds.with_label_values(&[spec.name(), "warm_up"]).set(took.as_secs_f64());
    }

    /// Takes the times of a model that is gone out of the metrics.
    pub fn forget(&self, spec: &ModelSpec) {
        self.keep_files(spec.name(), None);
        for phase in ["digest", "read", "device", "warm_up"] {
            // An error means that there is no such series: the model was never loaded.
            let _ = self.seconds.remove_label_values(&[spec.name(), phase]);
        }
        self.forget_task(spec);
    }

    /// Another version of a model may have another task.
    fn forget_task(&self, spec: &ModelSpec) {
        for task in Task::ALL {
            let _ = self.info.remove_label_values(&[spec.name(), task.as_str()]);
        }
    }

    fn note(&self, spec: &ModelSpec, runner: &Runner, digest: &Digest, timings: LoadTimings) {
        let phases = [("digest", timings.digest), ("read", timings.read), ("device", timings.device)];
        for (phase, took) in phases {
            self.seconds.with_label_values(&[spec.name(), phase]).set(took.as_secs_f64());
        }
        self.forget_task(spec);
        self.info.with_label_values(&[spec.name(), runner.task().as_str()]).set(1);
        let (facts, memory) = (runner.model().facts(), runner.memory());
        tracing::info!(
            model = spec.name(),
            task = runner.task().as_str(),
            architecture = facts.architecture,
            parameters = facts.parameters,
            digest = digest.as_str(),
            device = runner.device(),
            "model loaded"
        );
        for warning in &facts.warnings {
            tracing::warn!(model = spec.name(), "{warning}");
        }
        runner.log_sizes(spec.name());
        tracing::info!(
            model = spec.name(),
            weights_mib = mib(memory.weights_bytes),
            kv_mib = mib(memory.kv_bytes),
            activations_mib = mib(memory.arena_bytes),
            other_mib = mib(memory.other_bytes),
            total_mib = mib(memory.total_bytes()),
            file_mib = mib(facts.file_bytes),
            "memory of the model on its device (the file itself is mapped and can be dropped by the system)"
        );
    }
}

impl Loaded {
    /// What the model's status shows of it.
    pub fn facts(&self) -> LoadedFacts {
        let embedding = self.runner.model().facts().embedding.as_ref();
        LoadedFacts {
            task: Some(self.runner.task()),
            digest: self.digest.to_string(),
            // One word, as users write it in a specification and read it in tables; the log has the rest.
            device: self.runner.device().split_whitespace().next().unwrap_or_default().to_owned(),
            context_tokens: u32::try_from(self.runner.context_tokens()).unwrap_or(u32::MAX),
            embedding_dimensions: embedding.map_or(0, |facts| u32::try_from(facts.width).unwrap_or(u32::MAX)),
            memory_bytes: self.runner.memory().total_bytes(),
        }
    }
}

pub(crate) fn wanted_files<'a>(spec: &'a ModelSpec, source: &'a Source) -> WantedFiles<'a> {
    WantedFiles {
        model: spec.name(),
        source,
        files: &spec.files,
        sha256: spec.sha256.as_deref(),
        fetch: spec.fetch.as_ref(),
    }
}

/// Reads the draft model, where there is one. It has no digest of its own: answers do not depend on it.
fn speculation(
    guessing: &SpeculationSpec,
    spec: &ModelSpec,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Speculation, Failure> {
    let SpeculationSpec::Draft(source) = guessing else { return Ok(Speculation::Ngram) };
    let read = || {
        let files = match source.remote() {
            Some(_) => {
                let wanted = WantedFiles { files: &[], sha256: None, ..wanted_files(spec, source) };
                // Its bytes are not those of the model, whose progress is shown.
                let listener = Listener { progress: &|_, _| {}, is_wanted };
                model_files::find(&wanted, &listener)?.resolved
            }
            None => source.resolve(&[])?,
        };
        Ok(Model::load_files_while(&model_files(&files)?, &mut |_| go_on(is_wanted))?)
    };
    let draft = read().map_err(|failure: Failure| Failure {
        message: format!("the draft model: {}", failure.message),
        ..failure
    })?;
    Ok(Speculation::Draft(Arc::new(draft)))
}

pub(crate) fn go_on(is_wanted: &dyn Fn() -> bool) -> ControlFlow<()> {
    if is_wanted() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

/// Why a load ended early.
pub(crate) fn not_wanted() -> Failure {
    Failure::permanent("Unloaded", "it was unloaded before it was loaded")
}

/// Mebibytes with one decimal, for people.
fn mib(bytes: u64) -> f64 {
    (bytes as f64 / 104_857.6).round() / 10.0
}

/// A task that is asked for must be the one that the files are made for.
fn check_task(spec: &ModelSpec, model: &Model) -> Result<(), Failure> {
    let found = model.task();
    match spec.task {
        Some(asked) if asked != found => Err(Failure::permanent(
            "TaskMismatch",
            format!(
                "{} is to serve the task {asked}, and its files are made for the task {found}; leave the task out, or \
                 take other files",
                spec.name()
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use trustformers_model::seeded::{SeededAdapter, SeededEncoder, SeededModel};
    use trustformers_plan::oracle::Oracle;

    fn loader() -> Loader {
        Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &Registry::new()).unwrap()
    }

    #[test]
    fn a_seeded_model_loads_and_progress_rises_once_to_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = SeededModel::default().gguf();
        std::fs::write(folder.path().join("m.gguf"), &bytes).unwrap();
        let spec = ModelSpec::new("m", Source::from_path(folder.path()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let progress: OnProgress = {
            let seen = seen.clone();
            Arc::new(move |done, total| seen.lock().unwrap().push((done, total)))
        };
        let loaded = loader().load(&spec, &progress).unwrap();
        let seen = seen.lock().unwrap();
        let total = bytes.len() as u64;
        assert!(seen.is_sorted() && seen.iter().all(|(_, of)| *of == total), "{seen:?}");
        assert_eq!(seen.last(), Some(&(total, total)));
        assert_eq!(loaded.facts().digest.len(), 64);
        assert_eq!(loaded.facts().context_tokens, 256);
    }

    /// The bytes that were reported when a load of 3 MiB ended, which was not wanted from
    /// `wanted_until_bytes` on.
    fn reported_bytes(spec: &ModelSpec, wanted_until_bytes: u64) -> u64 {
        let done_bytes = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let progress: OnProgress = {
            let done_bytes = done_bytes.clone();
            Arc::new(move |done, _| done_bytes.store(done, std::sync::atomic::Ordering::Relaxed))
        };
        let is_wanted = || done_bytes.load(std::sync::atomic::Ordering::Relaxed) < wanted_until_bytes;
        let failure = loader().load_while(spec, &progress, &is_wanted).unwrap_err();
        assert_eq!(failure.reason, "Unloaded", "{failure}");
        done_bytes.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[test]
    fn an_unload_ends_the_passes_that_run() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), vec![7; 3 << 20]).unwrap();
        let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
        // The digest may be whole when the reader has its first MiB; each pass counts as a third.
        for wanted_until_bytes in [1, 1 << 20, (3 << 20) / 3 + (1 << 19)] {
            let last = reported_bytes(&spec, wanted_until_bytes);
            assert!(last <= wanted_until_bytes + (4 << 20) / 3, "{last} bytes after {wanted_until_bytes}");
        }
        // With a pin one pass follows the other, and a MiB of one adds a third of a MiB.
        let digest = spec.source.resolve(&[]).unwrap().digest(&mut |_| {}).unwrap();
        spec.sha256 = Some(digest.to_string());
        for wanted_until_bytes in [1, 1 << 20, (3 << 20) / 3 + (1 << 19)] {
            let last = reported_bytes(&spec, wanted_until_bytes);
            assert!(last < wanted_until_bytes + 400_000, "{last} bytes after {wanted_until_bytes}");
        }
    }

    #[test]
    fn a_wrong_pin_stops_before_the_model_is_parsed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), b"not a model").unwrap();
        let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
        let quiet: OnProgress = Arc::new(|_, _| {});
        assert_eq!(loader().load(&spec, &quiet).unwrap_err().reason, "MalformedModel");
        spec.sha256 = Some("0".repeat(64));
        let failure = loader().load(&spec, &quiet).unwrap_err();
        assert_eq!((failure.reason, failure.transient), ("DigestMismatch", false));
    }

    #[test]
    fn a_load_has_the_same_digest_with_a_pin_and_without() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
        let quiet: OnProgress = Arc::new(|_, _| {});
        let beside = loader().load(&spec, &quiet).unwrap().digest;
        spec.sha256 = Some(beside.to_string());
        assert_eq!(loader().load(&spec, &quiet).unwrap().digest, beside);
    }

    #[test]
    fn a_wrong_pin_of_an_adapter_fails_the_load_with_its_name() {
        let (folder, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        SeededAdapter::of(SeededModel::default(), 7).write(own.path()).unwrap();
        let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
        let source = Source::from_path(own.path());
        let files = ["adapter_config.json", "adapter_model.safetensors"].map(str::to_owned);
        let right = source.resolve(&files).unwrap().digest(&mut |_| {}).unwrap().to_string();
        let mut load = |pin: &str| {
            let sha256 = Some(pin.to_owned());
            let name = "sql".to_owned();
            spec.adapters = vec![adapters::AdapterSpec { name, source: source.clone(), sha256 }];
            loader().load(&spec, &(Arc::new(|_, _| {}) as OnProgress))
        };
        load(&right).unwrap();
        let failure = load(&"0".repeat(64)).unwrap_err();
        assert_eq!((failure.reason, failure.transient), ("DigestMismatch", false));
        assert!(failure.message.starts_with("adapter sql: "), "{failure}");
    }

    #[test]
    fn a_checkpoint_is_read_from_the_picked_files_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bert")).unwrap();
        SeededEncoder::default().write(&folder.path().join("bert")).unwrap();
        let load = |source: &std::path::Path, files: &[&str], task: Option<Task>| {
            let mut spec = ModelSpec::new("bert", Source::from_path(source));
            spec.files = files.iter().map(ToString::to_string).collect();
            spec.task = task;
            loader().load(&spec, &(Arc::new(|_, _| {}) as OnProgress))
        };
        let whole = load(&folder.path().join("bert"), &[], None).unwrap();
        let picked = load(folder.path(), &["bert/**"], Some(Task::Embed)).unwrap();
        for loaded in [&whole, &picked] {
            let facts = loaded.facts();
            let found = (facts.task, facts.context_tokens, facts.embedding_dimensions);
            assert_eq!(found, (Some(Task::Embed), 64, 64));
        }
        assert_ne!(whole.digest, picked.digest, "the names of the files count");
        let partial = load(folder.path(), &["bert/model.safetensors", "bert/config.json"], None).unwrap_err();
        assert_eq!(partial.reason, "MalformedModel");
        assert!(partial.message.contains("bert/tokenizer.json: it is missing"), "{partial}");
        let mut guessing = ModelSpec::new("bert", Source::from_path(folder.path().join("bert")));
        guessing.speculation = Some(SpeculationSpec::Ngram);
        let refused = loader().load(&guessing, &(Arc::new(|_, _| {}) as OnProgress)).unwrap_err();
        assert_eq!(refused.reason, "InvalidConfiguration", "{refused}");
        let mut drafted = ModelSpec::new("m", Source::from_path(folder.path().join("m.gguf")));
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        drafted.speculation = Some(SpeculationSpec::Draft(Source::from_path(folder.path().join("bert"))));
        let refused = loader().load(&drafted, &(Arc::new(|_, _| {}) as OnProgress)).unwrap_err();
        assert!(refused.message.starts_with("the draft model: none of the picked"), "{refused}");
        let other = load(folder.path(), &["bert/**"], Some(Task::Generate)).unwrap_err();
        assert_eq!((other.reason, other.transient), ("TaskMismatch", false));
        assert!(other.message.contains("made for the task embed"), "{other}");
    }

    #[test]
    fn two_model_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.gguf", "b.gguf"] {
            std::fs::write(folder.path().join(name), b"x").unwrap();
        }
        let mut spec = ModelSpec::new("m", Source::from_path(folder.path()));
        spec.files = vec!["*.gguf".into()];
        let failure = loader().load(&spec, &(Arc::new(|_, _| {}) as OnProgress)).unwrap_err();
        assert!(failure.message.contains("a.gguf and b.gguf"), "{failure}");
    }
}
