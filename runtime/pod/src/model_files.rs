//! The files of a model, where they lie or fetched into a cache, with the digest of every byte.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use trustformers_store::{
    Digest, Environment, FetchLimits, FetchProgress, FetchRequest, Fetched, Resolved, Source, Store,
    StoreError, StoreSettings,
};

use crate::failure::Failure;
use crate::spec::FetchSpec;

/// How often the log says how far fetching is.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WantedFiles<'a> {
    /// The model's name, for the log.
    pub(crate) model: &'a str,
    pub(crate) source: &'a Source,
    /// Patterns that pick its files.
    pub(crate) files: &'a [String],
    pub(crate) sha256: Option<&'a str>,
    /// How a source of another machine is fetched.
    pub(crate) fetch: Option<&'a FetchSpec>,
}

/// The files of a model.
#[derive(Debug)]
pub(crate) struct ModelFiles {
    pub(crate) resolved: Resolved,
    pub(crate) digest: Digest,
    /// The folder that their names count from.
    pub(crate) root: PathBuf,
    /// Keeps files of the cache there.
    pub(crate) fetched: Option<Fetched>,
}

/// Hears of progress, in bytes done and bytes in all, and whether to go on.
pub(crate) struct Listener<'a> {
    pub(crate) progress: &'a dyn Fn(u64, u64),
    pub(crate) is_wanted: &'a dyn Fn() -> bool,
}

impl Listener<'_> {
    fn hear(&self, done_bytes: u64, total_bytes: u64) -> ControlFlow<()> {
        (self.progress)(done_bytes, total_bytes);
        if (self.is_wanted)() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// Finds the files, or fetches them, and reads every byte once. Blocking.
pub(crate) fn find(wanted: &WantedFiles<'_>, listener: &Listener<'_>) -> Result<ModelFiles, Failure> {
    let Some(root) = wanted.source.path() else { return fetched(wanted, listener) };
    let resolved = wanted.source.resolve(wanted.files)?;
    let digest = resolved.digest_while(&mut |hashed| listener.hear(hashed.done_bytes, hashed.total_bytes))?;
    if let Some(pin) = wanted.sha256 {
        digest.check_pin(pin)?;
    }
    Ok(ModelFiles { resolved, digest, root: root.to_owned(), fetched: None })
}

fn fetched(wanted: &WantedFiles<'_>, listener: &Listener<'_>) -> Result<ModelFiles, Failure> {
    let (Some(source), Some(fetch)) = (wanted.source.remote(), wanted.fetch) else {
        return Err(StoreError::NotFetched { text: wanted.source.to_string() }.into());
    };
    let store = Store::open(StoreSettings {
        cache_dir: fetch.cache_dir.clone(),
        max_cache_bytes: fetch.max_cache_bytes,
        environment: Environment::of_process().with_secret_dir(fetch.secret_dir.clone()),
        limits: FetchLimits::default(),
    })?;
    let request = FetchRequest { source, files: wanted.files, sha256: wanted.sha256 };
    let start = Instant::now();
    let mut logged = start;
    let fetched = store.fetch_blocking(&request, &mut |progress| {
        if logged.elapsed() >= LOG_INTERVAL {
            logged = Instant::now();
            log_progress(wanted, &progress);
        }
        listener.hear(progress.done_bytes, progress.total_bytes)
    })?;
    let resolved = fetched.resolved().clone();
    tracing::info!(
        model = wanted.model,
        source = %wanted.source,
        version = fetched.version().unwrap_or_default(),
        digest = fetched.digest().as_str(),
        bytes = resolved.total_bytes(),
        seconds = start.elapsed().as_secs_f64(),
        "the model's files are here"
    );
    let digest = fetched.digest().clone();
    // Each file has its own path, so that nothing counts from the root.
    Ok(ModelFiles { resolved, digest, root: fetch.cache_dir.clone(), fetched: Some(fetched) })
}

fn log_progress(wanted: &WantedFiles<'_>, progress: &FetchProgress) {
    tracing::info!(
        model = wanted.model,
        source = %wanted.source,
        phase = ?progress.phase,
        done_bytes = progress.done_bytes,
        total_bytes = progress.total_bytes,
        bytes_per_second = progress.bytes_per_second.round(),
        eta_seconds = progress.eta.map(|eta| eta.as_secs()),
        "fetching the model"
    );
}
