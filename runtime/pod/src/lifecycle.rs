//! Takes one version of a model from Pending to Ready or Failed, in the background.
//!
//! Each version has its own task, and no request waits for it. A transient failure (a slow volume) is retried
//! with growing pauses. A permanent failure (a wrong digest, a malformed file) becomes the state Failed and
//! stays, because a restart would only hide it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trustformers_proto::v1::ModelState;

use crate::failure::Failure;
use crate::inflight::InflightRequests;
use crate::load::{Loader, OnProgress, not_wanted};
use crate::runner::Runner;
use crate::spec::ModelSpec;
use crate::status::ModelStatuses;

/// First pause before another attempt; it doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Progress is published at most this often, so that watchers over the network are not flooded.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// One version of a model and what serves it. A model has at most two.
pub struct ManagedModel {
    /// What is to be loaded.
    pub spec: ModelSpec,
    /// Its id in the statuses.
    pub id: u64,
    serving: ArcSwapOption<Serving>,
    /// Whether it was Ready, so that it may answer; it then answers until it is unloaded.
    warm: AtomicBool,
    /// How its load ended, once it has.
    outcome: watch::Sender<Option<Result<(), Failure>>>,
    inflight: Arc<InflightRequests>,
    /// Cancelled once no request finds the model any more.
    retired: CancellationToken,
    loading: Mutex<Option<JoinHandle<()>>>,
    born: Instant,
    /// Milliseconds from `born` to the last sign that loading goes on.
    progress_ms: AtomicU64,
}

/// What answers requests.
#[derive(Debug)]
pub struct Serving {
    /// The engine of the model's task.
    pub runner: Runner,
    /// sha256 of the weights.
    pub digest: String,
}

impl ManagedModel {
    /// A model whose loading has not started. Its requests count in `inflight`.
    pub fn new(spec: ModelSpec, id: u64, inflight: Arc<InflightRequests>) -> Self {
        Self {
            spec,
            id,
            serving: ArcSwapOption::empty(),
            warm: AtomicBool::new(false),
            outcome: watch::Sender::new(None),
            inflight,
            retired: CancellationToken::new(),
            loading: Mutex::default(),
            born: Instant::now(),
            progress_ms: AtomicU64::new(0),
        }
    }

    /// The engine, once the model is on its device, which may be before it is warm.
    pub fn serving(&self) -> Option<Arc<Serving>> {
        self.serving.load_full()
    }

    /// The engine, where it may answer requests.
    pub fn answering(&self) -> Option<Arc<Serving>> {
        if self.warm.load(Ordering::Acquire) { self.serving() } else { None }
    }

    /// sha256 of its files; empty until known.
    pub fn digest(&self) -> String {
        self.serving().map(|serving| serving.digest.clone()).unwrap_or_default()
    }

    /// Notes how the load ended. What waits for it is answered.
    pub fn settle(&self, outcome: Result<(), Failure>) {
        self.outcome.send_replace(Some(outcome));
    }

    /// Waits until the load has ended, one way or the other.
    ///
    /// # Errors
    /// Why it was not loaded.
    pub async fn outcome(&self) -> Result<(), Failure> {
        let mut outcome = self.outcome.subscribe();
        let settled = async {
            // The channel cannot close while this value lives.
            let settled = outcome.wait_for(Option::is_some).await.ok()?;
            settled.clone()
        };
        tokio::select! {
            settled = settled => settled.unwrap_or_else(|| Err(not_wanted())),
            () = self.retired.cancelled() => Err(not_wanted()),
        }
    }

    /// The requests that it is answering.
    pub fn inflight(&self) -> &Arc<InflightRequests> {
        &self.inflight
    }

    /// Whether the model is being unloaded: no further request may begin.
    pub fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// Waits until the model is being unloaded.
    pub async fn until_retired(&self) {
        self.retired.cancelled().await;
    }

    /// Time since loading last gave a sign of life.
    pub fn progress_age(&self) -> Duration {
        let last = Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
        self.born.elapsed().saturating_sub(last)
    }

    fn sign_of_life(&self) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress_ms.store(now, Ordering::Relaxed);
    }

    /// Runs `loading` as this model's own task, which ends before the model is unloaded.
    pub fn spawn(&self, loading: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(loading);
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    fn take_task(&self) -> Option<JoinHandle<()>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Stops loading and ends the engine; what it was answering ends with an error.
    pub async fn stop(&self) {
        if let Some(task) = self.take_task() {
            task.abort();
        }
        self.outcome.send_if_modified(|outcome| {
            let is_open = outcome.is_none();
            outcome.get_or_insert_with(|| Err(not_wanted()));
            is_open
        });
        if let Some(serving) = self.serving() {
            serving.runner.stop().await;
        }
    }

    /// Unloads the model, which no request finds any more: waits until its loading has ended and its requests
    /// are answered, at most for `drain_timeout`, then ends the engine and frees the memory. Returns whether
    /// all were answered.
    pub async fn retire(&self, drain_timeout: Duration) -> bool {
        self.retired.cancel();
        if let Some(task) = self.take_task() {
            // The load ends at its next step, or within a MiB of its files. An error means that the task
            // panicked, which its thread reported.
            let _ = task.await;
        }
        let all_answered = tokio::time::timeout(drain_timeout, self.inflight.until_idle()).await.is_ok();
        if !all_answered {
            let in_flight = self.inflight.count();
            let model = self.spec.name();
            tracing::warn!(model, in_flight, "the model is unloaded while it still answers; cutting off");
        }
        if let Some(serving) = self.serving.swap(None) {
            serving.runner.stop().await;
        }
        all_answered
    }

    /// Loads, warms up and publishes each step in its status. Ends when the model is Ready or Failed, or is
    /// being unloaded.
    pub async fn run(self: Arc<Self>, statuses: Arc<ModelStatuses>, loader: Arc<Loader>) {
        let mut wait = RETRY_FIRST;
        while !self.is_retired() {
            match self.run_once(&statuses, &loader).await {
                Ok(()) => return self.settle(Ok(())),
                Err(_) if self.is_retired() => return,
                Err(failure) if failure.transient => {
                    tracing::warn!(model = self.spec.name(), reason = failure.reason, "{failure}");
                    statuses.will_retry(self.id, &failure);
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.retired.cancelled() => {}
                    }
                    wait = (wait * 2).min(RETRY_MOST);
                }
                Err(failure) => {
                    statuses.failed(self.id, &failure);
                    return self.settle(Err(failure));
                }
            }
        }
    }

    /// As [`ManagedModel::run`], with one attempt.
    ///
    /// # Errors
    /// What stood in the way. The status does not show it yet.
    pub async fn run_once(
        self: &Arc<Self>,
        statuses: &Arc<ModelStatuses>,
        loader: &Arc<Loader>,
    ) -> Result<(), Failure> {
        self.sign_of_life();
        self.attempt(statuses, loader).await?;
        self.warm.store(true, Ordering::Release);
        statuses.enter(self.id, ModelState::Ready);
        Ok(())
    }

    async fn attempt(
        self: &Arc<Self>,
        statuses: &Arc<ModelStatuses>,
        loader: &Arc<Loader>,
    ) -> Result<(), Failure> {
        // An unload waits for this task, so that it must not wait for the load of another model.
        let permit = tokio::select! {
            permit = loader.permit() => permit,
            () = self.retired.cancelled() => return Err(not_wanted()),
        };
        self.check_wanted()?;
        self.sign_of_life();
        statuses.enter(self.id, ModelState::Loading);
        let progress = self.publisher(Arc::clone(statuses));
        let (managed, with) = (Arc::clone(self), Arc::clone(loader));
        let loading = tokio::task::spawn_blocking(move || {
            // Held by the work, so that a load that nothing waits for any more still keeps the next one out.
            let _permit = permit;
            with.load_while(&managed.spec, &progress, &|| !managed.is_retired())
        });
        let broken = |error| Failure::permanent("InternalError", format!("loading broke off: {error}"));
        let loaded = loading.await.map_err(broken)??;
        statuses.loaded(self.id, &loaded.facts());
        self.serving.store(Some(Arc::new(Serving {
            runner: loaded.runner.clone(),
            digest: loaded.digest.to_string(),
        })));
        statuses.enter(self.id, ModelState::Warming);
        let warmed = async {
            let took = loaded.runner.warm_up().await?;
            for probe in &self.spec.probes {
                loaded.runner.check_golden(probe).await?;
            }
            Ok::<_, Failure>(took)
        };
        match warmed.await {
            Ok(took) => {
                loader.note_warm_up(&self.spec, took);
                self.check_wanted()
            }
            Err(failure) => {
                // A model that cannot answer must not keep the memory of its weights.
                self.serving.store(None);
                loaded.runner.stop().await;
                Err(failure)
            }
        }
    }

    /// A model that is being unloaded is not loaded any further, and does not become Ready.
    fn check_wanted(&self) -> Result<(), Failure> {
        if self.is_retired() {
            return Err(not_wanted());
        }
        Ok(())
    }

    /// Passes progress on to the statuses, a few times a second and at the end.
    fn publisher(self: &Arc<Self>, statuses: Arc<ModelStatuses>) -> OnProgress {
        let managed = Arc::clone(self);
        let last = Mutex::new(None::<Instant>);
        Arc::new(move |done, total| {
            managed.sign_of_life();
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            if done == total || last.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
                *last = Some(Instant::now());
                statuses.progress(managed.id, done, total);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::OpenDevice;
    use trustformers_plan::oracle::Oracle;
    use trustformers_plan::{
        Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan,
        SampleInput, StepInput, StepOutput,
    };
    use trustformers_store::Source;

    fn model_at(path: &std::path::Path) -> (Arc<ManagedModel>, Arc<ModelStatuses>, Arc<Loader>) {
        let spec = ModelSpec::new("m", Source::from_path(path));
        let statuses = Arc::new(ModelStatuses::new(std::slice::from_ref(&spec)));
        let loader =
            Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new()).unwrap();
        (Arc::new(ManagedModel::new(spec, 0, InflightRequests::new())), statuses, Arc::new(loader))
    }

    #[tokio::test]
    async fn a_good_model_becomes_ready_with_its_facts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        let (managed, statuses, loader) = model_at(&file);
        managed.clone().run(statuses.clone(), loader).await;
        let status = statuses.status(0);
        assert_eq!(status.state(), ModelState::Ready, "{status:?}");
        assert_eq!((status.loaded_bytes, status.digest.len()), (status.total_bytes, 64));
        assert!(managed.serving().is_some());
    }

    #[tokio::test]
    async fn a_missing_or_malformed_model_fails_once_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let bad = folder.path().join("bad.gguf");
        std::fs::write(&bad, b"GGUF\x03\0\0\0 and then nothing").unwrap();
        for (path, reason) in [(bad, "MalformedModel"), (folder.path().join("none.gguf"), "SourceNotFound")] {
            let (managed, statuses, loader) = model_at(&path);
            managed.run(statuses.clone(), loader).await;
            let status = statuses.status(0);
            let file = path.file_name().unwrap().to_str().unwrap();
            assert!(status.message.contains(file), "{status:?}");
            assert_eq!((status.state(), status.reason.as_str()), (ModelState::Failed, reason), "{status:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_transient_failure_is_retried_until_it_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        // Reading the start of one's own memory is an I/O error, not a missing file: the kind that a volume
        // gives.
        std::os::unix::fs::symlink("/proc/self/mem", &file).unwrap();
        let (managed, statuses, loader) = model_at(&file);
        let mut watch = statuses.watch();
        let task = tokio::spawn(managed.run(statuses.clone(), loader));
        watch.wait_for(|models| models[0].message.contains("it is tried again")).await.unwrap();
        assert_eq!(statuses.status(0).reason, "SourceUnreadable");
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        task.await.unwrap();
        assert_eq!(statuses.status(0).state(), ModelState::Ready);
    }

    /// A backend whose steps fail. `alive` is held for as long as a model is loaded.
    struct Broken<T: ?Sized> {
        alive: Arc<()>,
        inner: Box<T>,
    }

    impl Backend for Broken<dyn Backend> {
        fn caps(&self) -> &Caps {
            self.inner.caps()
        }
        fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
            self.inner.estimate(spec)
        }
        fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
            Ok(Box::new(Broken { alive: self.alive.clone(), inner: self.inner.load(spec)? }))
        }
    }

    impl Loaded for Broken<dyn Loaded> {
        fn memory(&self) -> MemoryReport {
            self.inner.memory()
        }
        fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
            Ok(Box::new(Broken { alive: self.alive.clone(), inner: self.inner.compile(plan)? }))
        }

        fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
            self.inner.resize_kv(blocks)
        }
    }

    impl Executable for Broken<dyn Executable> {
        fn submit(&mut self, _: &StepInput) -> Result<(), BackendError> {
            Err(BackendError::Device("it is broken".into()))
        }
        fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
            self.inner.sample(input)
        }
        fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
            self.inner.wait(output)
        }
    }

    #[tokio::test]
    async fn a_failed_warm_up_frees_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        let (managed, statuses, _) = model_at(&file);
        let alive = Arc::new(());
        let loaded = Arc::downgrade(&alive);
        let open: OpenDevice = Box::new(move |_| {
            // Held by loaded models alone, once the backend itself is dropped.
            let inner: Box<dyn Backend> = Box::new(Oracle::new());
            Ok(Box::new(Broken { alive: alive.clone(), inner }) as Box<dyn Backend>)
        });
        let loader = Arc::new(Loader::new(open, &prometheus::Registry::new()).unwrap());
        managed.clone().run(statuses.clone(), loader).await;
        let status = statuses.status(0);
        assert_eq!(
            (status.state(), status.reason.as_str()),
            (ModelState::Failed, "WarmUpFailed"),
            "{status:?}"
        );
        assert!(managed.serving().is_none());
        assert_eq!(loaded.strong_count(), 0, "the weights are still held");
    }

    #[tokio::test]
    async fn unloading_waits_for_the_answers_and_frees_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        let (managed, statuses, loader) = model_at(&file);
        managed.clone().run(statuses.clone(), loader).await;
        let request = managed.inflight().register();
        let unloading = {
            let managed = managed.clone();
            tokio::spawn(async move { managed.retire(Duration::from_secs(60)).await })
        };
        managed.retired.cancelled().await;
        assert!(managed.serving().is_some(), "a request is in flight");
        drop(request);
        assert!(unloading.await.unwrap());
        assert!(managed.serving().is_none());
    }

    #[tokio::test]
    async fn unloading_a_model_that_waits_for_its_load_does_not_wait_for_the_load_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let (managed, statuses, loader) = model_at(&folder.path().join("m.gguf"));
        let _other_loads = loader.permit().await;
        managed.spawn(managed.clone().run(statuses, Arc::clone(&loader)));
        assert!(managed.retire(Duration::from_secs(60)).await);
        assert!(managed.take_task().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn unloading_ends_the_pause_between_two_attempts_and_a_drain_that_takes_too_long() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::os::unix::fs::symlink("/proc/self/mem", &file).unwrap();
        let (managed, statuses, loader) = model_at(&file);
        let mut watch = statuses.watch();
        managed.spawn(managed.clone().run(statuses.clone(), loader));
        watch.wait_for(|models| models[0].message.contains("it is tried again")).await.unwrap();
        let _request = managed.inflight().register();
        assert!(!managed.retire(Duration::from_secs(60)).await, "the request was never answered");
        assert!(managed.take_task().is_none());
    }
}
