//! One model's way from Pending to Ready or Failed, in the background.
//!
//! Its own task and its own state: nothing that serves requests waits for it. What may pass by itself (a volume that
//! stutters) is tried again with growing pauses; what will not (a wrong digest, a malformed file) is shown as Failed and
//! stays, because a restart would only hide it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::time::Instant;
use trustformers_proto::v1::ModelState;

use crate::board::Board;
use crate::failure::Failure;
use crate::load::{Loader, OnProgress};
use crate::runner::Runner;
use crate::spec::ModelSpec;

/// First pause before another attempt; it doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Progress is published at most this often, so that watchers over the network are not flooded.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// One model and what serves it.
pub struct Slot {
    /// What is to be loaded.
    pub spec: ModelSpec,
    /// Its place on the board.
    pub index: usize,
    serving: ArcSwapOption<Serving>,
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

impl Slot {
    /// A model that nobody has begun to load.
    pub fn new(spec: ModelSpec, index: usize) -> Self {
        Self {
            spec,
            index,
            serving: ArcSwapOption::empty(),
            born: Instant::now(),
            progress_ms: AtomicU64::new(0),
        }
    }

    /// The engine, once the model is on its device; whether requests may come is the board's word.
    pub fn serving(&self) -> Option<Arc<Serving>> {
        self.serving.load_full()
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

    /// Loads, warms up and publishes each step on the board. Ends when the model is Ready or Failed.
    pub async fn run(self: Arc<Self>, board: Arc<Board>, loader: Arc<Loader>) {
        let mut wait = RETRY_FIRST;
        loop {
            self.sign_of_life();
            match self.attempt(&board, &loader).await {
                Ok(()) => return board.enter(self.index, ModelState::Ready),
                Err(failure) if failure.transient => {
                    tracing::warn!(model = self.spec.name(), reason = failure.reason, "{failure}");
                    board.will_retry(self.index, &failure);
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MOST);
                }
                Err(failure) => return board.failed(self.index, &failure),
            }
        }
    }

    async fn attempt(self: &Arc<Self>, board: &Arc<Board>, loader: &Arc<Loader>) -> Result<(), Failure> {
        let turn = loader.turn().await;
        self.sign_of_life();
        board.enter(self.index, ModelState::Loading);
        let progress = self.publisher(Arc::clone(board));
        let (slot, with) = (Arc::clone(self), Arc::clone(loader));
        let loaded = tokio::task::spawn_blocking(move || with.load(&slot.spec, &progress))
            .await
            .map_err(|error| Failure::permanent("InternalError", format!("loading broke off: {error}")))??;
        drop(turn);
        board.loaded(self.index, &loaded.facts());
        self.serving.store(Some(Arc::new(Serving {
            runner: loaded.runner.clone(),
            digest: loaded.digest.to_string(),
        })));
        board.enter(self.index, ModelState::Warming);
        let took = loaded.runner.warm_up().await?;
        loader.note_warm_up(&self.spec, took);
        Ok(())
    }

    /// Passes progress on to the board, a few times a second and at the end.
    fn publisher(self: &Arc<Self>, board: Arc<Board>) -> OnProgress {
        let slot = Arc::clone(self);
        let last = std::sync::Mutex::new(None::<Instant>);
        Arc::new(move |done, total| {
            slot.sign_of_life();
            let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if done == total || last.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
                *last = Some(Instant::now());
                board.progress(slot.index, done, total);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_plan::oracle::Oracle;
    use trustformers_store::Source;

    fn slot(path: &std::path::Path) -> (Arc<Slot>, Arc<Board>, Arc<Loader>) {
        let spec = ModelSpec::new("m", Source::from_path(path));
        let board = Arc::new(Board::new(std::slice::from_ref(&spec)));
        let loader =
            Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new()).unwrap();
        (Arc::new(Slot::new(spec, 0)), board, Arc::new(loader))
    }

    #[tokio::test]
    async fn a_good_model_becomes_ready_with_its_facts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        let (slot, board, loader) = slot(&file);
        slot.clone().run(board.clone(), loader).await;
        let status = board.status(0);
        assert_eq!(status.state(), ModelState::Ready, "{status:?}");
        assert_eq!((status.loaded_bytes, status.digest.len()), (status.total_bytes, 64));
        assert!(slot.serving().is_some());
    }

    #[tokio::test]
    async fn a_missing_or_malformed_model_fails_once_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let bad = folder.path().join("bad.gguf");
        std::fs::write(&bad, b"GGUF\x03\0\0\0 and then nothing").unwrap();
        for (path, reason) in [(bad, "MalformedModel"), (folder.path().join("none.gguf"), "SourceNotFound")] {
            let (slot, board, loader) = slot(&path);
            slot.run(board.clone(), loader).await;
            let status = board.status(0);
            let file = path.file_name().unwrap().to_str().unwrap();
            assert!(status.message.contains(file), "{status:?}");
            assert_eq!((status.state(), status.reason.as_str()), (ModelState::Failed, reason), "{status:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_until_it_passes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        // Reading the start of one's own memory is an I/O error, not a missing file: the kind that a volume gives.
        std::os::unix::fs::symlink("/proc/self/mem", &file).unwrap();
        let (slot, board, loader) = slot(&file);
        let mut watch = board.watch();
        let task = tokio::spawn(slot.run(board.clone(), loader));
        watch.wait_for(|models| models[0].message.contains("it is tried again")).await.unwrap();
        assert_eq!(board.status(0).reason, "SourceUnreadable");
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, trustformers_model::seeded::SeededModel::default().gguf()).unwrap();
        task.await.unwrap();
        assert_eq!(board.status(0).state(), ModelState::Ready);
    }
}
