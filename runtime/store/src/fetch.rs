//! Brings a model from its source into the cache, every byte checked, and keeps it there while it is used.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::cache::CacheDir;
use crate::digest::{Digest, hash_file};
use crate::error::StoreError;
use crate::fetched::{Fetched, ReadyFile};
use crate::http::Http;
use crate::lock::{FileLock, Lease};
use crate::origin::{Archive, Check, Listing, Origin, RemoteFile};
use crate::partial::{Partial, PartialSize, allocated_bytes, bytes_of_other};
use crate::progress::{FetchPhase, FetchProgress, FileProgress, ProgressSink};
use crate::retry::retried;
use crate::select::{ModelFile, pick_listed};
use crate::settings::StoreSettings;
use crate::source::{RemoteSource, Scheme};
use crate::transfer::Transfer;
use crate::unpack::{CachedFile, UnpackedLayer, add_layer, unpack};

/// How often a process looks whether another one has fetched what it waits for.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);
/// How often [`Store::fetch_blocking`] reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Transfers of one file: one more where the first gave other bytes than the source says, or the source
/// changed meanwhile.
const TRANSFERS: usize = 2;

/// Fetches models into a cache directory.
#[derive(Debug, Clone)]
pub struct Store {
    settings: StoreSettings,
    cache: Arc<CacheDir>,
    http: Http,
}

/// What is wanted of a source.
#[derive(Debug, Clone, Copy)]
pub struct FetchRequest<'a> {
    /// Where it lies.
    pub source: &'a RemoteSource,
    /// Patterns that pick its files, as [`Source::resolve`](crate::Source::resolve) takes them.
    pub files: &'a [String],
    /// The digest that the model must have.
    pub sha256: Option<&'a str>,
}

/// What a source held when it was fetched last.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SourceRecord {
    version: Option<String>,
    digest: String,
    files: Vec<CachedFile>,
}

impl Store {
    /// Opens the cache directory.
    ///
    /// # Errors
    /// [`StoreError::Cache`] where it cannot be made or written.
    pub fn open(settings: StoreSettings) -> Result<Self, StoreError> {
        let cache = Arc::new(CacheDir::open(&settings.cache_dir, settings.max_cache_bytes)?);
        let http = Http::new(&settings.limits);
        Ok(Self { settings, cache, http })
    }

    /// [`Self::fetch`] for callers without a runtime; call it on a thread that may block. `report` is called
    /// several times a second and ends the fetch with [`ControlFlow::Break`].
    ///
    /// # Errors
    /// As [`Self::fetch`], and [`StoreError::Stopped`].
    pub fn fetch_blocking(
        &self,
        request: &FetchRequest<'_>,
        report: &mut dyn FnMut(FetchProgress) -> ControlFlow<()>,
    ) -> Result<Fetched, StoreError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime
            .map_err(|error| StoreError::cache(&self.settings.cache_dir, "starting the transfer", error))?;
        runtime.block_on(async {
            let (sender, receiver) = watch::channel(FetchProgress::default());
            let mut fetch = std::pin::pin!(self.fetch(request, sender));
            loop {
                tokio::select! {
                    fetched = &mut fetch => {
                        // The last figures, which are those of the whole; nobody has to stop any more.
                        let _ = report(*receiver.borrow());
                        return fetched;
                    }
                    () = sleep(REPORT_INTERVAL) => {
                        if report(*receiver.borrow()).is_break() {
                            return Err(StoreError::Stopped);
                        }
                    }
                }
            }
        })
    }

    /// Fetches what is missing of a model, checks every byte, and returns its files. Dropping the future ends
    /// all transfers; the next call goes on where they stopped.
    ///
    /// A branch or tag is resolved anew each time. Where the source cannot be reached, the files that it held
    /// last are used, and the log says so.
    ///
    /// # Errors
    /// What stands in the way, after a bounded number of attempts.
    pub async fn fetch(
        &self,
        request: &FetchRequest<'_>,
        progress: watch::Sender<FetchProgress>,
    ) -> Result<Fetched, StoreError> {
        let source = request.source;
        if source.scheme == Scheme::Http && request.sha256.is_none() {
            return Err(StoreError::InvalidUri {
                text: source.to_string(),
                why: "http:// does not protect the model on its way",
                form: "https://, or pin the model with sha256",
            });
        }
        let progress = Arc::new(ProgressSink::new(progress));
        let key = record_key(request);
        let record = self.cache.record::<SourceRecord>(&key);
        if let Some(record) = record.as_ref().filter(|record| is_final(request, record))
            && let Some(fetched) = self.of_record(record, &progress).await?
        {
            return Ok(fetched);
        }
        let origin = Arc::new(Origin::new(source, &self.http, &self.settings.environment)?);
        progress.enter(FetchPhase::Listing);
        let listing = match retried(&self.settings.limits, || origin.list()).await {
            Ok(listing) => listing,
            Err(error) => {
                let Some(record) = record.filter(|_| error.is_transient()) else { return Err(error) };
                let Some(fetched) = self.of_record(&record, &progress).await? else { return Err(error) };
                tracing::warn!(source = %source, %error, "the source cannot be asked; using its last state");
                return check_pin(request, fetched);
            }
        };
        let job = Job { store: self, origin, progress };
        let fetched = check_pin(request, job.fetch(request, listing).await?)?;
        let files = fetched.files_of_record(&self.cache);
        let record = SourceRecord {
            version: fetched.version().map(str::to_owned),
            digest: fetched.digest().to_string(),
            files,
        };
        self.cache.set_record(&key, &record)?;
        Ok(fetched)
    }

    /// The files of a record, where all of them are still there and whole.
    async fn of_record(
        &self,
        record: &SourceRecord,
        progress: &Arc<ProgressSink>,
    ) -> Result<Option<Fetched>, StoreError> {
        let total_bytes = record.files.iter().map(|file| file.bytes).sum();
        progress.update(|meter, _| {
            *meter = Default::default();
            meter.enter(FetchPhase::Verifying);
            meter.set_total(total_bytes);
        });
        let mut files = Vec::with_capacity(record.files.len());
        for file in &record.files {
            let Some(digest) = file.digest() else { return Ok(None) };
            let Some(lease) = self.verified(&digest, progress).await? else {
                progress.update(|meter, _| *meter = Default::default());
                return Ok(None);
            };
            files.push(ReadyFile { name: file.name.clone(), bytes: file.bytes, digest, lease });
        }
        Ok(Some(Fetched::of(files, record.version.clone())))
    }

    /// A lease on a file of the cache whose bytes are those of its name. A damaged one is removed.
    async fn verified(
        &self,
        digest: &Digest,
        progress: &Arc<ProgressSink>,
    ) -> Result<Option<Lease>, StoreError> {
        let Some(lease) = self.cache.lease(digest)? else { return Ok(None) };
        let sink = Arc::clone(progress);
        sink.enter(FetchPhase::Verifying);
        let path = lease.path().to_owned();
        let hashing = spawn_blocking(move || {
            let mut counted = 0;
            let found = hash_file(&path, &mut |bytes| {
                counted += bytes;
                sink.add(bytes);
                // The sink's other owner is the fetch itself: without it nobody waits for the digest.
                if Arc::strong_count(&sink) > 1 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            (found, counted)
        });
        let (found, counted) = hashing
            .await
            .map_err(|error| StoreError::cache(lease.path(), "hashing", std::io::Error::other(error)))?;
        match found {
            Ok(found) if found == *digest => return Ok(Some(lease)),
            Ok(_) => {
                tracing::warn!(file = %lease.path().display(), "a damaged file was removed from the cache");
            }
            Err(StoreError::Stopped) => return Err(StoreError::Stopped),
            Err(error) => tracing::warn!(%error, "a file of the cache cannot be read; it is fetched again"),
        }
        progress.take_back(counted);
        self.cache.discard(lease)?;
        Ok(None)
    }
}

/// One fetch from a source that was listed.
struct Job<'a> {
    store: &'a Store,
    origin: Arc<Origin>,
    progress: Arc<ProgressSink>,
}

impl Job<'_> {
    async fn fetch(&self, request: &FetchRequest<'_>, listing: Listing) -> Result<Fetched, StoreError> {
        let root = PathBuf::from(request.source.to_string());
        let mut leases = Vec::new();
        let mut unpacked = BTreeMap::new();
        for archive in &listing.archives {
            add_layer(&mut unpacked, &self.layer(archive, &mut leases).await?);
        }
        let mut all: Vec<ModelFile> = listing.files.iter().map(RemoteFile::listed).collect();
        all.extend(unpacked.values().map(|file| ModelFile {
            name: file.name.clone(),
            path: PathBuf::new(),
            bytes: file.bytes,
        }));
        let picked = match request.files {
            [] if listing.is_one_file => all,
            [_, ..] if listing.is_one_file => return Err(StoreError::PatternsForFile { path: root }),
            patterns => pick_listed(&root, patterns, &all)?,
        };
        let mut remote = Vec::new();
        for file in &picked {
            if let Some(listed) = listing.files.iter().find(|listed| listed.name == file.name) {
                let mut listed = listed.clone();
                retried(&self.store.settings.limits, || {
                    let (origin, mut file) = (Arc::clone(&self.origin), listed.clone());
                    async move { origin.describe(&mut file).await.map(|()| file) }
                })
                .await
                .map(|described| listed = described)?;
                remote.push(listed);
            }
        }
        self.progress.update(|meter, _| {
            *meter = Default::default();
            meter.set_total(picked.iter().map(|file| file.bytes).sum());
        });
        self.make_room(&remote)?;
        let mut ready = self.obtain_all(remote).await?;
        for file in picked.iter().filter_map(|file| unpacked.get(&file.name)) {
            let digest = file.digest();
            let lease = match &digest {
                Some(digest) => self.store.verified(digest, &self.progress).await?,
                None => None,
            };
            let (Some(digest), Some(lease)) = (digest, lease) else {
                // It was there when its layer was looked up: the volume damages files as they are read.
                return Err(StoreError::Changed { path: file.name.clone().into() });
            };
            ready.push(ReadyFile { name: file.name.clone(), bytes: file.bytes, digest, lease });
        }
        ready.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Fetched::of(ready, listing.version))
    }

    /// Refuses before a byte comes what the volume cannot hold.
    fn make_room(&self, files: &[RemoteFile]) -> Result<(), StoreError> {
        let cache = &self.store.cache;
        let mut leases = Vec::new();
        let mut needed_bytes = 0;
        let mut own = Vec::new();
        for file in files {
            let key = self.transfer_key(file);
            let cached = match self.expected(file, &key) {
                Some(digest) => cache.lease(&digest)?,
                None => None,
            };
            match cached {
                Some(lease) => leases.push(lease),
                None => needed_bytes += file.bytes.saturating_sub(allocated_bytes(cache, &key)),
            }
            own.push(key);
        }
        cache.make_room(needed_bytes, &own)
    }

    /// The digest that a file should have: as the source says, or as it had when it was fetched before.
    fn expected(&self, file: &RemoteFile, key: &Digest) -> Option<Digest> {
        match &file.check {
            Some(Check::Sha256(digest)) => Some(digest.clone()),
            _ => self.store.cache.indexed(key),
        }
    }

    /// Names a transfer: the same for everybody who fetches the same bytes.
    fn transfer_key(&self, file: &RemoteFile) -> Digest {
        match (&file.check, &file.version) {
            (Some(Check::Sha256(digest)), _) => digest.clone(),
            (Some(Check::GitBlob(id)), _) => Digest::of_text(&format!("git {id}")),
            (None, Some(version)) => {
                Digest::of_text(&format!("{} {} {version}", self.origin.host(), file.address))
            }
            // Nothing tells whether the bytes are the same next time, so that this is used once.
            (None, None) => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                Digest::of_text(&format!("{} {} {}", file.address, std::process::id(), now.as_nanos()))
            }
        }
    }

    /// Several files at a time, so that one arrives while another one is hashed to its end.
    async fn obtain_all(&self, files: Vec<RemoteFile>) -> Result<Vec<ReadyFile>, StoreError> {
        let lanes = self.store.settings.limits.files.clamp(1, files.len().max(1));
        let queue = Mutex::new(VecDeque::from(files));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        // An error drops the other lanes, which ends their transfers.
        let obtained = try_join_all((0..lanes).map(|_| async {
            let mut ready = Vec::new();
            while let Some(file) = next() {
                ready.push(self.obtain(&file).await?);
            }
            Ok::<_, StoreError>(ready)
        }));
        Ok(obtained.await?.into_iter().flatten().collect())
    }

    /// A file, from the cache or from its source. Where another process fetches it, waits for that.
    async fn obtain(&self, file: &RemoteFile) -> Result<ReadyFile, StoreError> {
        let cache = &self.store.cache;
        let key = self.transfer_key(file);
        let lock_path = cache.partial_path(&key, "lock");
        let mut shown_bytes = 0;
        loop {
            let lock = FileLock::try_acquire(&lock_path)
                .map_err(|error| StoreError::cache(&lock_path, "locking", error))?;
            // Looked up with the lock held, so that a file that another process has just completed is seen.
            if let Some(digest) = self.expected(file, &key)
                && cache.blob_path(&digest).exists()
            {
                self.progress.take_back(std::mem::take(&mut shown_bytes));
                if let Some(lease) = self.store.verified(&digest, &self.progress).await? {
                    return Ok(ReadyFile { name: file.name.clone(), bytes: file.bytes, digest, lease });
                }
            }
            let Some(lock) = lock else {
                let there_bytes = bytes_of_other(cache, &key).min(file.bytes);
                self.progress.update(|meter, _| {
                    meter.enter(FetchPhase::Waiting);
                    meter.take_back(shown_bytes);
                    meter.add_present(there_bytes);
                });
                shown_bytes = there_bytes;
                sleep(WAIT_INTERVAL).await;
                continue;
            };
            self.progress.take_back(shown_bytes);
            return self.transfer(file, &key, lock).await;
        }
    }

    async fn transfer(
        &self,
        file: &RemoteFile,
        key: &Digest,
        lock: FileLock,
    ) -> Result<ReadyFile, StoreError> {
        let limits = self.store.settings.limits;
        let size = PartialSize { total_bytes: file.bytes, chunk_bytes: limits.chunk_bytes };
        let partial = Partial::open(&self.store.cache, key, size, lock)?;
        let is_resumed = partial.is_resumed();
        let progress = FileProgress::new(Arc::clone(&self.progress));
        self.progress.enter(FetchPhase::Downloading);
        progress.add_present(partial.done_bytes());
        if is_resumed {
            tracing::info!(
                file = file.name,
                bytes = partial.done_bytes(),
                "going on with an earlier transfer"
            );
        }
        let transfer = Arc::new(Transfer {
            origin: Arc::clone(&self.origin),
            file: file.clone(),
            partial,
            limits,
            progress,
        });
        let mut last = StoreError::SourceChanged { what: file.name.clone() };
        for _ in 0..TRANSFERS {
            let ended = Arc::clone(&transfer).run().await;
            let failure = match ended.and_then(|digest| self.check(file, &transfer.partial, digest)) {
                Ok(digest) => return self.complete(file, key, &transfer.partial, digest),
                Err(error) => error,
            };
            // Bytes of another version of the file, or damaged ones: nothing of them can be used.
            if !matches!(failure, StoreError::WrongBytes { .. } | StoreError::SourceChanged { .. }) {
                if file.version.is_none() {
                    transfer.partial.discard();
                }
                return Err(failure);
            }
            tracing::warn!(error = %failure, "fetching the file again from its start");
            last = failure;
            transfer.progress.take_all_back();
            transfer.partial.reset()?;
        }
        transfer.partial.discard();
        Err(last)
    }

    fn complete(
        &self,
        file: &RemoteFile,
        key: &Digest,
        partial: &Partial,
        digest: Digest,
    ) -> Result<ReadyFile, StoreError> {
        let cache = &self.store.cache;
        let lease = partial.install(cache, &digest)?;
        if file.version.is_some() && !matches!(file.check, Some(Check::Sha256(_))) {
            cache.set_index(key, &digest)?;
        }
        Ok(ReadyFile { name: file.name.clone(), bytes: file.bytes, digest, lease })
    }

    /// Compares with what the source says.
    fn check(&self, file: &RemoteFile, partial: &Partial, found: Digest) -> Result<Digest, StoreError> {
        let wrong = |expected: String, found: String| {
            Err(StoreError::WrongBytes { what: file.name.clone(), expected, found })
        };
        match &file.check {
            Some(Check::Sha256(expected)) if *expected != found => {
                wrong(expected.to_string(), found.to_string())
            }
            Some(Check::GitBlob(expected)) => {
                let id = partial.git_blob_id()?;
                if id == *expected {
                    Ok(found)
                } else {
                    wrong(format!("git {expected}"), format!("git {id}"))
                }
            }
            _ => Ok(found),
        }
    }

    /// The files of a layer, unpacked now or before.
    async fn layer(&self, archive: &Archive, leases: &mut Vec<Lease>) -> Result<UnpackedLayer, StoreError> {
        let cache = &self.store.cache;
        let key = Digest::of_text(&format!("layer {}", archive.file.address));
        if let Some(layer) = cache.record::<UnpackedLayer>(&key) {
            let found = layer.files.iter().map(|file| match file.digest() {
                Some(digest) => cache.lease(&digest),
                None => Ok(None),
            });
            let found: Option<Vec<Lease>> = found.collect::<Result<_, _>>()?;
            if let Some(found) = found {
                leases.extend(found);
                return Ok(layer);
            }
        }
        self.progress.update(|meter, _| {
            *meter = Default::default();
            meter.set_total(archive.file.bytes);
        });
        self.make_room(std::slice::from_ref(&archive.file))?;
        let blob = self.obtain(&archive.file).await?;
        self.progress.enter(FetchPhase::Unpacking);
        let (store, packing, what) = (Arc::clone(cache), archive.packing, archive.file.name.clone());
        let path = blob.lease.path().to_owned();
        let unpacking = spawn_blocking(move || unpack(&store, &path, packing, &what));
        let broken = |error| StoreError::cache(blob.lease.path(), "unpacking", std::io::Error::other(error));
        let unpacked = unpacking.await.map_err(broken)??;
        cache.set_record(&key, &unpacked.layer)?;
        leases.extend(unpacked.leases);
        // Its files are there now; the packed bytes would only take space.
        cache.discard(blob.lease)?;
        Ok(unpacked.layer)
    }
}

fn check_pin(request: &FetchRequest<'_>, fetched: Fetched) -> Result<Fetched, StoreError> {
    if let Some(pin) = request.sha256 {
        fetched.digest().check_pin(pin)?;
    }
    Ok(fetched)
}

/// Whether a record cannot become out of date: its digest is pinned, or it is of a commit or an artifact's
/// digest.
fn is_final(request: &FetchRequest<'_>, record: &SourceRecord) -> bool {
    if let Some(pin) = request.sha256 {
        return Digest::from_hex(pin).is_some_and(|pin| pin.as_str() == record.digest);
    }
    let source = request.source;
    match source.scheme {
        Scheme::HuggingFace => {
            let is_commit = |revision: &str| {
                revision.len() == 40 && revision.bytes().all(|digit| digit.is_ascii_hexdigit())
            };
            source.revision.as_deref().is_some_and(is_commit)
        }
        Scheme::Registry => source.address.contains("@sha256:"),
        _ => false,
    }
}

fn record_key(request: &FetchRequest<'_>) -> Digest {
    let mut lines = format!("{}\n{}\n", request.source, request.source.address);
    for pattern in request.files {
        lines.push_str(pattern);
        lines.push('\n');
    }
    Digest::of_text(&lines)
}
