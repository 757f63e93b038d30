//! The cache directory: files by the sha256 of their bytes, safe for several processes on one volume.
//!
//! ```text
//! blobs/SHA256      a complete file, checked before it got this name
//! partial/KEY.*     a transfer: its bytes, the chunks that are there, and the lock of whoever writes it
//! index/KEY         the sha256 of a file whose source does not name it
//! records/KEY       the files of a source as they were last, and what an unpacked layer holds
//! tmp/              files that are being written; each is locked by its writer
//! ```
//!
//! A name appears by a rename, complete or not at all. Nothing is synced: after a power failure a blob may
//! hold other bytes, and each use checks its digest.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::lock::{Lease, remove_unused};

const FOLDERS: [&str; 5] = ["blobs", "partial", "index", "records", "tmp"];
/// A transfer that nobody has gone on with for this long is given up.
const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// A directory of fetched files.
#[derive(Debug)]
pub(crate) struct CacheDir {
    root: PathBuf,
    max_bytes: Option<u64>,
    /// Numbers the files in `tmp` of this process.
    next_temporary: AtomicU64,
}

/// A file in `tmp`, locked; it goes when it is dropped before it is installed.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    file: File,
    path: PathBuf,
    is_installed: bool,
}

/// A file that may be removed.
struct Removable {
    paths: Vec<PathBuf>,
    bytes: u64,
    used: SystemTime,
}

impl CacheDir {
    /// Opens the directory, makes what is missing, and removes what killed processes left.
    pub(crate) fn open(root: &Path, max_bytes: Option<u64>) -> Result<Self, StoreError> {
        for folder in FOLDERS {
            let path = root.join(folder);
            fs::create_dir_all(&path)
                .map_err(|error| StoreError::cache(&path, "making the folder", error))?;
        }
        let cache = Self { root: root.to_owned(), max_bytes, next_temporary: AtomicU64::new(0) };
        cache.remove_leftovers()?;
        Ok(cache)
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.as_str())
    }

    /// The files of a transfer: its bytes, its journal, its lock.
    pub(crate) fn partial_path(&self, key: &Digest, suffix: &str) -> PathBuf {
        self.root.join("partial").join(format!("{key}.{suffix}"))
    }

    /// A lease on a file that is there.
    pub(crate) fn lease(&self, digest: &Digest) -> Result<Option<Lease>, StoreError> {
        let path = self.blob_path(digest);
        let lease = Lease::acquire(&path).map_err(|error| StoreError::cache(&path, "locking", error))?;
        if let Some(lease) = &lease {
            lease.touch();
        }
        Ok(lease)
    }

    /// Makes a complete, checked file a blob.
    pub(crate) fn install(&self, file: File, path: &Path, digest: &Digest) -> Result<Lease, StoreError> {
        let blob = self.blob_path(digest);
        let lease = Lease::of_new(file, &blob).map_err(|error| StoreError::cache(path, "locking", error))?;
        fs::rename(path, &blob).map_err(|error| StoreError::cache(&blob, "renaming", error))?;
        Ok(lease)
    }

    /// Removes a file that is not what its name says. Whoever reads it keeps what it opened.
    pub(crate) fn discard(&self, lease: Lease) -> Result<(), StoreError> {
        let path = lease.path().to_owned();
        drop(lease);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::cache(path, "removing", error))
            }
            _ => Ok(()),
        }
    }

    /// The digest that a file of this key had when it was fetched.
    pub(crate) fn indexed(&self, key: &Digest) -> Option<Digest> {
        let text = fs::read_to_string(self.root.join("index").join(key.as_str())).ok()?;
        Digest::from_hex(text.trim())
    }

    pub(crate) fn set_index(&self, key: &Digest, digest: &Digest) -> Result<(), StoreError> {
        self.write("index", key, format!("{digest}\n").as_bytes())
    }

    /// What was noted under a key; none where there is nothing, or nothing that this version can read.
    pub(crate) fn record<T: DeserializeOwned>(&self, key: &Digest) -> Option<T> {
        let content = fs::read(self.root.join("records").join(key.as_str())).ok()?;
        serde_json::from_slice(&content).ok()
    }

    pub(crate) fn set_record<T: Serialize>(&self, key: &Digest, record: &T) -> Result<(), StoreError> {
        let content = serde_json::to_vec(record)
            .map_err(|error| StoreError::cache(&self.root, "writing a record", error.into()))?;
        self.write("records", key, &content)
    }

    fn write(&self, folder: &str, key: &Digest, content: &[u8]) -> Result<(), StoreError> {
        let path = self.root.join(folder).join(key.as_str());
        let mut temporary = self.temporary()?;
        let written = temporary.file.write_all(content).and_then(|()| fs::rename(&temporary.path, &path));
        temporary.is_installed = written.is_ok();
        written.map_err(|error| StoreError::cache(path, "writing", error))
    }

    /// A new file to write.
    pub(crate) fn temporary(&self) -> Result<TemporaryFile, StoreError> {
        loop {
            let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
            let nanos =
                SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
            // Process ids repeat between pods on one volume, so that the time is needed, too.
            let name = format!("{}-{nanos:x}-{number}", std::process::id());
            let path = self.root.join("tmp").join(name);
            let io = |error| StoreError::cache(&path, "making the file", error);
            let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(io)?;
            file.lock().map_err(io)?;
            // Another process may have taken it for a leftover before it was locked.
            if file.metadata().map_err(io)?.nlink() > 0 {
                return Ok(TemporaryFile { file, path, is_installed: false });
            }
        }
    }

    /// Makes a temporary file with this digest a blob.
    pub(crate) fn install_temporary(
        &self,
        mut temporary: TemporaryFile,
        digest: &Digest,
    ) -> Result<Lease, StoreError> {
        let file = temporary.file.try_clone();
        let file = file.map_err(|error| StoreError::cache(&temporary.path, "opening", error))?;
        let lease = self.install(file, &temporary.path, digest)?;
        temporary.is_installed = true;
        Ok(lease)
    }

    /// Bytes that the volume has free.
    fn free_bytes(&self) -> Result<u64, StoreError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(|error| StoreError::cache(&self.root, "asking for its free space", error.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Makes room for bytes that are about to come: removes files that nobody uses, the least recently used
    /// first, until they fit the volume and the limit. Transfers of other processes stay.
    pub(crate) fn make_room(&self, needed_bytes: u64, own: &[Digest]) -> Result<(), StoreError> {
        let mut removable = self.removable(own)?;
        removable.sort_by_key(|file| std::cmp::Reverse(file.used));
        loop {
            let free_bytes = self.free_bytes()?;
            let left = match self.max_bytes {
                Some(max) => free_bytes.min(max.saturating_sub(self.used_bytes()?)),
                None => free_bytes,
            };
            if needed_bytes <= left {
                return Ok(());
            }
            let Some(oldest) = removable.pop() else {
                return Err(StoreError::DiskFull { path: self.root.clone(), needed_bytes, free_bytes: left });
            };
            if self.remove(&oldest)? {
                tracing::info!(file = %oldest.paths[0].display(), bytes = oldest.bytes, "removed from the cache");
            }
        }
    }

    fn remove(&self, file: &Removable) -> Result<bool, StoreError> {
        for path in &file.paths {
            // The lock of a transfer comes first: whoever has it, keeps all of its files.
            if !remove_unused(path).map_err(|error| StoreError::cache(path, "removing", error))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn used_bytes(&self) -> Result<u64, StoreError> {
        let mut sum = 0;
        for entry in self.entries("blobs")?.iter().chain(&self.entries("tmp")?) {
            sum += entry.metadata.len();
        }
        for entry in self.entries("partial")? {
            // Its chunks come in any order, so that it has holes.
            sum += entry.metadata.blocks() * 512;
        }
        Ok(sum)
    }

    fn removable(&self, own: &[Digest]) -> Result<Vec<Removable>, StoreError> {
        let mut found = Vec::new();
        for entry in self.entries("blobs")? {
            found.push(entry.removable(Vec::new()));
        }
        for entry in self.entries("partial")? {
            let Some(stem) = entry.path.to_str().and_then(|path| path.strip_suffix(".data")) else {
                continue;
            };
            if own.iter().any(|key| stem.ends_with(key.as_str())) {
                continue;
            }
            let lock = PathBuf::from(format!("{stem}.lock"));
            let journal = PathBuf::from(format!("{stem}.journal"));
            // Without a lock file nobody can be writing it.
            let beside = [lock, journal].into_iter().filter(|path| path.exists()).collect();
            found.push(entry.removable(beside));
        }
        Ok(found)
    }

    fn entries(&self, folder: &str) -> Result<Vec<CacheEntry>, StoreError> {
        let path = self.root.join(folder);
        let io = |error| StoreError::cache(&path, "listing", error);
        let mut entries = Vec::new();
        for entry in fs::read_dir(&path).map_err(io)? {
            let entry = entry.map_err(io)?;
            match entry.metadata() {
                Ok(metadata) => entries.push(CacheEntry { path: entry.path(), metadata }),
                // Another process removed it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io(error)),
            }
        }
        Ok(entries)
    }

    /// Files that killed processes were writing, and transfers that nobody goes on with.
    fn remove_leftovers(&self) -> Result<(), StoreError> {
        for entry in self.entries("tmp")? {
            remove_unused(&entry.path).map_err(|error| StoreError::cache(&entry.path, "removing", error))?;
        }
        let is_old = |used: SystemTime| used.elapsed().is_ok_and(|age| age > ABANDONED_AFTER);
        let partial = self.root.join("partial");
        for file in self.removable(&[])?.iter().filter(|file| is_old(file.used)) {
            if file.paths.iter().any(|path| path.starts_with(&partial)) {
                self.remove(file)?;
            }
        }
        // Locks and journals stay behind where a transfer was completed.
        for entry in self.entries("partial")? {
            let is_alone = !entry.path.with_extension("data").exists();
            let file = entry.removable(Vec::new());
            if is_alone && is_old(file.used) {
                self.remove(&file)?;
            }
        }
        Ok(())
    }
}

struct CacheEntry {
    path: PathBuf,
    metadata: fs::Metadata,
}

impl CacheEntry {
    fn removable(self, mut beside: Vec<PathBuf>) -> Removable {
        let used = self.metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let bytes = self.metadata.blocks() * 512;
        beside.push(self.path);
        Removable { paths: beside, bytes, used }
    }
}

impl TemporaryFile {
    pub(crate) fn file(&mut self) -> &mut File {
        &mut self.file
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.is_installed {
            // What cannot be removed now is a leftover that the next start removes.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(cache: &CacheDir, bytes: &[u8], age: Duration) -> Digest {
        let digest = Digest::of_bytes(bytes);
        let mut temporary = cache.temporary().unwrap();
        temporary.file().write_all(bytes).unwrap();
        drop(cache.install_temporary(temporary, &digest).unwrap());
        let file = File::options().write(true).open(cache.blob_path(&digest)).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
        digest
    }

    #[test]
    fn the_least_recently_used_goes_first_and_what_is_used_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), Some(3 << 20)).unwrap();
        let content = |byte: u8| vec![byte; 1 << 20];
        let ages = [30, 20, 10].map(Duration::from_secs);
        let [oldest, middle, newest] = [0, 1, 2].map(|at| add(&cache, &content(at as u8), ages[at as usize]));
        let lease = cache.lease(&oldest).unwrap().unwrap();
        cache.make_room(1 << 20, &[]).unwrap();
        let is_there = |digest: &Digest| cache.blob_path(digest).exists();
        assert_eq!([&oldest, &middle, &newest].map(is_there), [true, false, true]);
        let error = cache.make_room(3 << 20, &[]).unwrap_err();
        assert_eq!(error.reason(), "DiskFull", "{error}");
        drop(lease);
        cache.make_room(3 << 20, &[]).unwrap();
        assert_eq!([&oldest, &middle, &newest].map(is_there), [false; 3]);
    }

    #[test]
    fn a_volume_that_is_too_small_is_refused_before_a_byte_comes() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let error = cache.make_room(u64::MAX, &[]).unwrap_err();
        assert!(matches!(error, StoreError::DiskFull { needed_bytes: u64::MAX, .. }), "{error}");
    }

    #[test]
    fn opening_removes_what_killed_processes_left_and_nothing_that_is_written_now() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let leftover = folder.path().join("tmp/1-2-3");
        let abandoned = cache.partial_path(&Digest::of_text("a"), "data");
        let recent = cache.partial_path(&Digest::of_text("b"), "data");
        let alone = cache.partial_path(&Digest::of_text("c"), "lock");
        for path in [&leftover, &abandoned, &recent, &alone] {
            fs::write(path, b"x").unwrap();
        }
        let long_ago = SystemTime::now() - 2 * ABANDONED_AFTER;
        for path in [&abandoned, &alone] {
            File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
        let written_now = cache.temporary().unwrap();
        let _second = CacheDir::open(folder.path(), None).unwrap();
        let is_there = |path: &PathBuf| path.exists();
        assert_eq!([&leftover, &abandoned, &alone].map(is_there), [false; 3]);
        assert_eq!([&recent, &written_now.path].map(is_there), [true; 2]);
    }
}
