//! A file that is being fetched: its bytes, and a journal of the chunks that are complete.
//!
//! The journal is 16 bytes (length and chunk size, little-endian) and a byte for each chunk, written after
//! the chunk's own bytes. A process that is killed leaves both in the page cache in that order; where the
//! machine fails, the digest of the whole file tells.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use tokio::sync::watch;

use crate::cache::CacheDir;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::lock::FileLock;
use crate::written::{RecentBlocks, WrittenRuns};

const HEADER_BYTES: u64 = 16;
const DONE: u8 = 1;
/// While so much waits to be hashed, the connection that brings what comes next receives no further block.
/// The blocks that wait are still in memory then (8 MiB are kept, and one more may be being written), so
/// that none is read back, and the thread that hashes gets its part of the processor: else it would go on
/// alone when the rest is done.
const LEAD_BYTES: u64 = 6 << 20;
/// More than this is there where an earlier transfer left it, or where the first of several ranges came last.
/// It is read back in any case, so that nothing waits for it.
const LARGEST_LEAD_BYTES: u64 = 64 << 20;

/// A transfer's file. Whoever holds it is the only writer.
#[derive(Debug)]
pub(crate) struct Partial {
    path: PathBuf,
    journal_path: PathBuf,
    data: File,
    journal: File,
    total_bytes: u64,
    chunk_bytes: u64,
    state: Mutex<PartialState>,
    /// Bytes from the start without a gap, for the one that hashes behind the transfer.
    contiguous: watch::Sender<u64>,
    /// Bytes from the start that are hashed; the largest number where nobody hashes.
    hashed: watch::Sender<u64>,
    /// How often all chunks were forgotten. Held for reading while a block is written.
    attempt: RwLock<u64>,
    /// Whether bytes of an earlier transfer are in it.
    is_resumed: bool,
    _lock: FileLock,
}

/// What is there of the file.
#[derive(Debug, Default)]
struct PartialState {
    /// For each chunk, whether the journal says that it is complete.
    done: Vec<bool>,
    runs: WrittenRuns,
    recent: RecentBlocks,
}

/// Where a block goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockPlace {
    /// The attempt whose answer it is of: see [`Partial::attempt`].
    pub(crate) attempt: u64,
    /// The block's position.
    pub(crate) at: u64,
}

/// What is to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PartialSize {
    pub(crate) total_bytes: u64,
    pub(crate) chunk_bytes: u64,
}

impl Partial {
    /// Opens a transfer, with the chunks of an earlier one of the same size.
    pub(crate) fn open(
        cache: &CacheDir,
        key: &Digest,
        size: PartialSize,
        lock: FileLock,
    ) -> Result<Self, StoreError> {
        let (path, journal_path) = (cache.partial_path(key, "data"), cache.partial_path(key, "journal"));
        let open = |path: &Path| {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
            file.map_err(|error| StoreError::cache(path, "opening", error))
        };
        let (data, journal) = (open(&path)?, open(&journal_path)?);
        let done = resumable(&data, &journal, size);
        let partial = Self {
            path,
            journal_path,
            data,
            journal,
            total_bytes: size.total_bytes,
            chunk_bytes: size.chunk_bytes,
            is_resumed: done.as_ref().is_some_and(|done| done.contains(&true)),
            state: Mutex::default(),
            contiguous: watch::channel(0).0,
            hashed: watch::channel(u64::MAX).0,
            attempt: RwLock::default(),
            _lock: lock,
        };
        match done {
            Some(done) => {
                partial.resume(done);
                partial.allocate()?;
            }
            None => partial.reset()?,
        }
        Ok(partial)
    }

    /// Takes over the complete chunks of an earlier transfer.
    fn resume(&self, done: Vec<bool>) {
        let mut state = self.state();
        for (chunk, _) in (0_u64..).zip(&done).filter(|(_, done)| **done) {
            let start = chunk * self.chunk_bytes;
            state.runs.insert(start..start + self.length_of(chunk));
        }
        state.done = done;
        self.contiguous.send_replace(state.runs.contiguous_bytes());
    }

    fn state(&self) -> MutexGuard<'_, PartialState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all chunks. Waits for the blocks that are being written; later ones of before are dropped.
    pub(crate) fn reset(&self) -> Result<(), StoreError> {
        let mut attempt = self.attempt.write().unwrap_or_else(PoisonError::into_inner);
        *attempt += 1;
        let count = usize::try_from(self.total_bytes.div_ceil(self.chunk_bytes)).unwrap_or(usize::MAX);
        let header = [self.total_bytes.to_le_bytes(), self.chunk_bytes.to_le_bytes()].concat();
        let written = self
            .journal
            .set_len(0)
            .and_then(|()| self.journal.write_all_at(&header, 0))
            .and_then(|()| self.journal.set_len(HEADER_BYTES + count as u64))
            .and_then(|()| self.data.set_len(0));
        written.map_err(|error| StoreError::cache(&self.path, "emptying", error))?;
        let mut state = self.state();
        state.done = vec![false; count];
        state.runs = WrittenRuns::default();
        state.recent.forget();
        drop(state);
        self.contiguous.send_replace(0);
        self.allocate()
    }

    /// Takes the volume's room for the whole file before its bytes come in any order: a volume that other
    /// pods fill ends the transfer at its start, and the file's blocks lie together.
    fn allocate(&self) -> Result<(), StoreError> {
        if self.total_bytes == 0 {
            return Ok(());
        }
        // The length stays as it is: it tells how far the bytes of an earlier transfer go.
        match fallocate(&self.data, FallocateFlags::KEEP_SIZE, 0, self.total_bytes) {
            // Volumes that cannot do this give room as bytes are written.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(error) => Err(StoreError::cache(&self.path, "taking room for the file", error.into())),
        }
    }

    /// The attempt that blocks which arrive now belong to.
    pub(crate) fn attempt(&self) -> u64 {
        *self.attempt.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a block and marks the chunks that are complete. Returns whether it counts: one of an attempt
    /// that was given up is dropped.
    pub(crate) fn write_block(&self, block: Vec<u8>, place: BlockPlace) -> Result<bool, StoreError> {
        let attempt = self.attempt.read().unwrap_or_else(PoisonError::into_inner);
        if *attempt != place.attempt {
            self.release(block);
            return Ok(false);
        }
        self.write(&block, place.at)?;
        self.note(block, place.at)?;
        Ok(true)
    }

    /// An empty buffer for a block of so many bytes.
    pub(crate) fn buffer(&self, bytes: usize) -> Vec<u8> {
        self.state().recent.buffer(bytes)
    }

    /// Takes back a buffer that is not used any more.
    pub(crate) fn release(&self, block: Vec<u8>) {
        self.state().recent.release(block);
    }

    /// The block at this position, where it is still in memory.
    pub(crate) fn recent_block(&self, at: u64) -> Option<Vec<u8>> {
        self.state().recent.take(at)
    }

    /// Where the first block that is in memory begins, of those from a position on.
    pub(crate) fn next_recent(&self, at: u64) -> Option<u64> {
        self.state().recent.next_start(at)
    }

    pub(crate) fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    pub(crate) fn contiguous(&self) -> watch::Receiver<u64> {
        self.contiguous.subscribe()
    }

    /// Says how far the one that hashes is; the largest number: it has ended.
    pub(crate) fn set_hashed(&self, bytes: u64) {
        self.hashed.send_replace(bytes);
    }

    /// For a connection that has written up to a position: waits while it is the one that brings what is
    /// hashed next, and more waits to be hashed than should.
    pub(crate) async fn until_hashed(&self, written: u64) {
        let may_go_on = |hashed: &u64| {
            let contiguous = *self.contiguous.borrow();
            written > contiguous || !is_ahead_of_hash(contiguous, *hashed)
        };
        // The sender lives in this very value, so the channel cannot be closed.
        let _ = self.hashed.subscribe().wait_for(may_go_on).await;
    }

    /// Bytes in complete chunks.
    pub(crate) fn done_bytes(&self) -> u64 {
        let state = self.state();
        (0..).zip(&state.done).filter(|(_, done)| **done).map(|(chunk, _)| self.length_of(chunk)).sum()
    }

    /// What is missing, in order, in ranges of whole chunks and at most `most_bytes`. The first is one chunk:
    /// it shows whether the server has ranges.
    pub(crate) fn missing(&self, most_bytes: u64) -> VecDeque<Range<u64>> {
        let state = self.state();
        let mut ranges: VecDeque<Range<u64>> = VecDeque::new();
        for (chunk, _) in (0_u64..).zip(&state.done).filter(|(_, done)| !**done) {
            let start = chunk * self.chunk_bytes;
            let end = start + self.length_of(chunk);
            let is_second = ranges.len() == 1;
            match ranges.back_mut() {
                Some(last) if !is_second && last.end == start && end - last.start <= most_bytes => {
                    last.end = end;
                }
                _ => ranges.push_back(start..end),
            }
        }
        ranges
    }

    /// Writes bytes at their position.
    fn write(&self, bytes: &[u8], at: u64) -> Result<(), StoreError> {
        let written = self.data.write_all_at(bytes, at);
        written.map_err(|error| StoreError::cache(&self.path, "writing", error))
    }

    /// Notes a block that is written: the chunks that it completes, and the block itself, which is perhaps
    /// hashed before it leaves the memory.
    fn note(&self, block: Vec<u8>, at: u64) -> Result<(), StoreError> {
        let written = at..at + block.len() as u64;
        let mut state = self.state();
        let run = state.runs.insert(written.clone());
        state.recent.keep(at, block);
        let (contiguous, complete) = (state.runs.contiguous_bytes(), self.chunks_of(&written, &run));
        drop(state);
        for chunk in complete {
            let marked = self.journal.write_all_at(&[DONE], HEADER_BYTES + chunk);
            marked.map_err(|error| StoreError::cache(&self.journal_path, "writing", error))?;
            let mut state = self.state();
            if let Some(entry) = usize::try_from(chunk).ok().and_then(|chunk| state.done.get_mut(chunk)) {
                *entry = true;
            }
        }
        self.contiguous.send_if_modified(|bytes| {
            let is_more = contiguous > *bytes;
            *bytes = contiguous.max(*bytes);
            is_more
        });
        Ok(())
    }

    /// The chunks with bytes of `written` that lie within `run`.
    fn chunks_of(&self, written: &Range<u64>, run: &Range<u64>) -> Range<u64> {
        let (mut first, mut after) =
            (written.start / self.chunk_bytes, written.end.div_ceil(self.chunk_bytes));
        if first * self.chunk_bytes < run.start {
            first += 1;
        }
        if run.end < (after * self.chunk_bytes).min(self.total_bytes) {
            after -= 1;
        }
        first..after
    }

    fn length_of(&self, chunk: u64) -> u64 {
        self.chunk_bytes.min(self.total_bytes - chunk * self.chunk_bytes)
    }

    /// Reads bytes that are written.
    pub(crate) fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), StoreError> {
        let read = self.data.read_exact_at(bytes, at);
        read.map_err(|error| StoreError::cache(&self.path, "reading", error))
    }

    /// The id of a git blob with the bytes of the complete file.
    pub(crate) fn git_blob_id(&self) -> Result<String, StoreError> {
        let mut hasher = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
        hasher.update(format!("blob {}\0", self.total_bytes).as_bytes());
        let mut block = vec![0; 1 << 20];
        let mut at = 0;
        while at < self.total_bytes {
            let count = (self.total_bytes - at).min(block.len() as u64);
            let block = &mut block[..count as usize];
            self.read(block, at)?;
            hasher.update(block);
            at += count;
        }
        Ok(hasher.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Makes the complete file a blob and ends the transfer.
    pub(crate) fn install(
        &self,
        cache: &CacheDir,
        digest: &Digest,
    ) -> Result<crate::lock::Lease, StoreError> {
        let io = |error| StoreError::cache(&self.path, "completing", error);
        // A file without bytes has no chunk that wrote it; a longer one of before is cut.
        self.data.set_len(self.total_bytes).map_err(io)?;
        let file = File::options().read(true).open(&self.path).map_err(io)?;
        let lease = cache.install(file, &self.path, digest)?;
        // What stays behind is removed with the abandoned transfers.
        let _ = fs::remove_file(&self.journal_path);
        Ok(lease)
    }

    /// Removes what has come.
    pub(crate) fn discard(&self) {
        // What cannot be removed now is emptied by the next transfer.
        let _ = fs::remove_file(&self.journal_path);
        let _ = fs::remove_file(&self.path);
    }
}

/// Bytes that another process's transfer has, by its journal.
pub(crate) fn bytes_of_other(cache: &CacheDir, key: &Digest) -> u64 {
    let Ok(journal) = fs::read(cache.partial_path(key, "journal")) else { return 0 };
    let number = |at: usize| {
        let bytes = journal.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let done = journal.iter().skip(HEADER_BYTES as usize).filter(|byte| **byte == DONE).count() as u64;
    done.saturating_mul(number(8)).min(number(0))
}

/// Bytes of the volume that a transfer has taken already, by this process or another one.
pub(crate) fn allocated_bytes(cache: &CacheDir, key: &Digest) -> u64 {
    // The unit of `blocks` is 512 bytes on every volume.
    fs::metadata(cache.partial_path(key, "data")).map_or(0, |file| file.blocks().saturating_mul(512))
}

/// Whether what is written should wait for what is hashed, both from the start of the file.
fn is_ahead_of_hash(written_bytes: u64, hashed_bytes: u64) -> bool {
    (LEAD_BYTES..=LARGEST_LEAD_BYTES).contains(&written_bytes.saturating_sub(hashed_bytes))
}

/// The chunks of an earlier transfer; none where it was of another size.
fn resumable(data: &File, journal: &File, size: PartialSize) -> Option<Vec<bool>> {
    let count = size.total_bytes.div_ceil(size.chunk_bytes);
    if journal.metadata().ok()?.len() != HEADER_BYTES + count {
        return None;
    }
    let mut content = vec![0; usize::try_from(HEADER_BYTES + count).ok()?];
    journal.read_exact_at(&mut content, 0).ok()?;
    let header = [size.total_bytes.to_le_bytes(), size.chunk_bytes.to_le_bytes()].concat();
    let (found, chunks) = content.split_at(HEADER_BYTES as usize);
    if found != header.as_slice() {
        return None;
    }
    let data_bytes = data.metadata().ok()?.len();
    let done: Vec<bool> = (0..)
        .zip(chunks)
        .map(|(chunk, byte)| {
            let end = ((chunk + 1) * size.chunk_bytes).min(size.total_bytes);
            *byte == DONE && end <= data_bytes
        })
        .collect();
    Some(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const SIZE: PartialSize = PartialSize { total_bytes: 10, chunk_bytes: 3 };

    fn open(cache: &CacheDir, size: PartialSize) -> Partial {
        let key = Digest::of_text("k");
        let lock = FileLock::try_acquire(&cache.partial_path(&key, "lock")).unwrap().unwrap();
        Partial::open(cache, &key, size, lock).unwrap()
    }

    /// Writes a block of the present attempt.
    fn write(partial: &Partial, bytes: &[u8], at: u64) -> bool {
        partial.write_block(bytes.to_vec(), BlockPlace { attempt: partial.attempt(), at }).unwrap()
    }

    #[test]
    fn complete_chunks_are_there_after_a_restart_and_the_rest_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, SIZE);
        assert_eq!(partial.missing(100), [0..3, 3..10]);
        assert!(write(&partial, b"34567", 3));
        assert_eq!((partial.done_bytes(), *partial.contiguous().borrow()), (3, 0), "6..9 is not complete");
        assert_eq!(bytes_of_other(&cache, &Digest::of_text("k")), 3);
        drop(partial);
        let partial = open(&cache, SIZE);
        assert!(partial.is_resumed());
        assert_eq!(partial.missing(100), [0..3, 6..10]);
        assert_eq!(partial.missing(3), [0..3, 6..9, 9..10]);
        write(&partial, b"012", 0);
        assert_eq!(*partial.contiguous().borrow(), 6);
        assert_eq!(partial.recent_block(3), None, "what an earlier transfer wrote is read back");
        write(&partial, b"6789", 6);
        assert_eq!((partial.missing(100).len(), *partial.contiguous().borrow()), (0, 10));
        let digest = Digest::of_text("0123456789");
        let lease = partial.install(&cache, &digest).unwrap();
        assert_eq!(fs::read(lease.path()).unwrap(), b"0123456789");
    }

    #[test]
    fn a_chunk_is_complete_with_its_last_byte_in_whatever_order_they_come() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, SIZE);
        let journalled = || bytes_of_other(&cache, &Digest::of_text("k"));
        write(&partial, b"45", 4);
        write(&partial, b"12", 1);
        assert_eq!((partial.done_bytes(), journalled()), (0, 0));
        write(&partial, b"3", 3);
        assert_eq!((partial.done_bytes(), journalled()), (3, 3));
        write(&partial, b"0", 0);
        assert_eq!((partial.done_bytes(), journalled(), *partial.contiguous().borrow()), (6, 6, 6));
        write(&partial, b"6789", 6);
        assert_eq!((partial.done_bytes(), *partial.contiguous().borrow()), (10, 10), "the short last one");
    }

    #[test]
    fn what_is_hashed_next_is_still_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, SIZE);
        write(&partial, b"01", 0);
        assert_eq!(*partial.contiguous().borrow(), 2, "no whole chunk is needed");
        write(&partial, b"56", 5);
        assert_eq!((partial.next_recent(1), partial.recent_block(0)), (Some(5), Some(b"01".to_vec())));
        partial.reset().unwrap();
        assert_eq!(partial.recent_block(5), None, "it is of an attempt that was given up");
    }

    #[tokio::test]
    async fn receiving_waits_for_the_one_that_hashes_and_not_for_an_earlier_transfer() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, PartialSize { total_bytes: 2 * LEAD_BYTES, chunk_bytes: 1 << 20 });
        write(&partial, &vec![1; LEAD_BYTES as usize], 0);
        let goes_on = |written: u64| partial.until_hashed(written).now_or_never().is_some();
        assert!(goes_on(LEAD_BYTES), "nobody hashes");
        partial.set_hashed(0);
        assert!(!goes_on(LEAD_BYTES));
        assert!(goes_on(LEAD_BYTES + 1), "another connection brings what comes before");
        tokio::join!(partial.until_hashed(LEAD_BYTES), async { partial.set_hashed(1) });
        partial.set_hashed(0);
        partial.set_hashed(u64::MAX);
        assert!(goes_on(LEAD_BYTES), "it has ended");
        assert!(is_ahead_of_hash(LARGEST_LEAD_BYTES, 0) && !is_ahead_of_hash(LARGEST_LEAD_BYTES + 1, 0));
    }

    #[test]
    fn a_block_of_an_attempt_that_was_given_up_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, SIZE);
        let place = BlockPlace { attempt: partial.attempt(), at: 0 };
        assert!(partial.write_block(b"012".to_vec(), place).unwrap());
        assert_eq!(partial.done_bytes(), 3);
        partial.reset().unwrap();
        assert!(!partial.write_block(b"old".to_vec(), place).unwrap());
        assert_eq!((partial.done_bytes(), *partial.contiguous().borrow()), (0, 0));
        assert_eq!(partial.recent_block(0), None);
        assert!(write(&partial, b"new", 0));
        let mut bytes = [0; 3];
        partial.read(&mut bytes, 0).unwrap();
        assert_eq!((&bytes, partial.done_bytes()), (b"new", 3));
    }

    #[test]
    fn a_transfer_of_another_size_starts_anew() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let partial = open(&cache, SIZE);
        write(&partial, &[1; 10], 0);
        drop(partial);
        for other in [PartialSize { total_bytes: 9, ..SIZE }, PartialSize { chunk_bytes: 5, ..SIZE }] {
            let partial = open(&cache, other);
            assert_eq!((partial.done_bytes(), partial.is_resumed()), (0, false));
        }
        let empty = open(&cache, PartialSize { total_bytes: 0, chunk_bytes: 3 });
        assert!(empty.missing(100).is_empty());
        fs::write(&empty.path, b"left").unwrap();
        let lease = empty.install(&cache, &Digest::of_text("")).unwrap();
        assert_eq!(fs::read(lease.path()).unwrap(), b"");
    }
}
