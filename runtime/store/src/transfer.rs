//! Fetches one file: ranges over several connections, resumed where they stopped, hashed behind the transfer.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_RANGE, ETAG};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::timeout;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::http::Answer;
use crate::origin::{Origin, RemoteFile};
use crate::partial::{BlockPlace, Partial};
use crate::progress::FileProgress;
use crate::retry::Pauses;
use crate::settings::FetchLimits;

/// Bytes that are written at once. Each connection has two such buffers, one that is filled while the other
/// one is written: with 8 connections and 2 files at a time 32 MiB.
const WRITE_BYTES: usize = 1 << 20;
/// Bytes that are hashed at once. They fit a core's second-level cache (512 KiB at least), so that they are
/// copied out of the page cache and hashed without going to memory between.
const HASH_BYTES: usize = 256 << 10;

/// What a transfer needs; shared by its connections.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) origin: Arc<Origin>,
    pub(crate) file: RemoteFile,
    pub(crate) partial: Partial,
    pub(crate) limits: FetchLimits,
    pub(crate) progress: FileProgress,
}

/// How a range ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RangeOutcome {
    Complete,
    /// The server sends the whole file whatever it is asked for.
    NoRanges,
}

impl Transfer {
    /// Fetches what is missing and returns the sha256 of the whole file.
    pub(crate) async fn run(self: Arc<Self>) -> Result<Digest, StoreError> {
        let hashing = self.hash_behind();
        let mut missing = self.partial.missing(self.limits.request_bytes_of(self.partial.total_bytes()));
        let Some(first) = missing.pop_front() else { return hashing.digest().await };
        match self.range_with_retries(first).await? {
            RangeOutcome::Complete => {
                self.ranges(missing).await?;
                hashing.digest().await
            }
            RangeOutcome::NoRanges => {
                drop(hashing);
                self.whole_with_retries().await
            }
        }
    }

    /// All other ranges, over several connections.
    async fn ranges(self: &Arc<Self>, missing: VecDeque<Range<u64>>) -> Result<(), StoreError> {
        let connections = self.limits.connections.min(missing.len());
        let missing = Arc::new(Mutex::new(missing));
        let mut workers = JoinSet::new();
        for _ in 0..connections {
            let (transfer, missing) = (Arc::clone(self), Arc::clone(&missing));
            workers.spawn(async move {
                loop {
                    let next = missing.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(range) = next else { return Ok(()) };
                    if transfer.range_with_retries(range).await? == RangeOutcome::NoRanges {
                        // It had them a moment ago: another server answers, perhaps with other bytes.
                        return Err(transfer.changed());
                    }
                }
            });
        }
        // Dropping the set, when nobody waits any more, ends all connections.
        while let Some(ended) = workers.join_next().await {
            if let Err(error) = ended.map_err(broken).and_then(|ended| ended) {
                // None of them may receive for the next attempt.
                workers.shutdown().await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn range_with_retries(self: &Arc<Self>, range: Range<u64>) -> Result<RangeOutcome, StoreError> {
        let mut pauses = Pauses::new(&self.limits);
        let mut at = range.start;
        loop {
            let before = at;
            match self.range(&range, &mut at).await {
                Ok(RangeOutcome::NoRanges) => {
                    // What an earlier attempt brought comes again with all the rest.
                    self.progress.take_back(at - range.start);
                    return Ok(RangeOutcome::NoRanges);
                }
                Ok(RangeOutcome::Complete) => return Ok(RangeOutcome::Complete),
                Err(error) => {
                    if at > before {
                        pauses.reset();
                    }
                    pauses.after(error).await?;
                }
            }
        }
    }

    /// Fetches from `at` to the end of a range; `at` moves with what is written.
    async fn range(self: &Arc<Self>, range: &Range<u64>, at: &mut u64) -> Result<RangeOutcome, StoreError> {
        let answer = self.origin.get(&self.file, Some(*at..range.end)).await?;
        self.check_version(answer.headers())?;
        let is_all = *at == 0 && range.end == self.partial.total_bytes();
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => self.check_range(answer.headers(), *at)?,
            _ if is_all => {}
            _ => return Ok(RangeOutcome::NoRanges),
        }
        self.receive(answer, range, at).await?;
        Ok(RangeOutcome::Complete)
    }

    /// Writes the body of an answer from `at` to the end of `range`; `at` moves with what is written.
    async fn receive(
        self: &Arc<Self>,
        answer: Answer,
        range: &Range<u64>,
        at: &mut u64,
    ) -> Result<(), StoreError> {
        let mut body = BodyReader::new(self, answer);
        let mut writing = Writing::new(self, range.start, *at);
        let mut failure = None;
        while failure.is_none() && writing.end() < range.end {
            let received = body.next_block(writing.spare_block(), range.end - writing.end()).await;
            failure = received.failure;
            // What came before a failure counts, so it is written before the failure is told.
            let written = writing.then(received.block).await;
            *at = writing.written();
            written?;
        }
        let finished = writing.finish().await;
        *at = writing.written();
        finished?;
        failure.map_or(Ok(()), Err)
    }

    /// For servers without ranges: everything, from the start at each attempt.
    async fn whole_with_retries(self: &Arc<Self>) -> Result<Digest, StoreError> {
        let mut pauses = Pauses::new(&self.limits);
        loop {
            self.progress.take_all_back();
            self.partial.reset()?;
            let hashing = self.hash_behind();
            let mut at = 0;
            match self.whole(&mut at).await {
                Ok(()) => return hashing.digest().await,
                Err(error) => {
                    drop(hashing);
                    pauses.after(error).await?;
                }
            }
        }
    }

    async fn whole(self: &Arc<Self>, at: &mut u64) -> Result<(), StoreError> {
        let answer = self.origin.get(&self.file, None).await?;
        self.check_version(answer.headers())?;
        self.receive(answer, &(0..self.partial.total_bytes()), at).await
    }

    /// An answer from another version of the file must not be mixed with what is there.
    fn check_version(&self, headers: &HeaderMap) -> Result<(), StoreError> {
        let found = headers.get(ETAG).and_then(|etag| etag.to_str().ok());
        match (&self.file.etag, found) {
            (Some(expected), Some(found)) if expected != found => Err(self.changed()),
            _ => Ok(()),
        }
    }

    fn check_range(&self, headers: &HeaderMap, at: u64) -> Result<(), StoreError> {
        let value = headers.get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
        let (range, total) = value.trim_start_matches("bytes ").split_once('/').unwrap_or_default();
        let start = range.split('-').next().and_then(|start| start.parse::<u64>().ok());
        let is_same_length = total == "*" || total.parse() == Ok(self.partial.total_bytes());
        if start == Some(at) && is_same_length { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> StoreError {
        StoreError::SourceChanged { what: self.file.name.clone() }
    }

    /// Hashes the file on a thread of its own, as far as it is there without a gap.
    fn hash_behind(self: &Arc<Self>) -> Hashing {
        // While nothing arrives only the receiver is held, so that a transfer that was dropped ends this.
        let transfer = Arc::downgrade(self);
        let total_bytes = self.partial.total_bytes();
        let (handle, contiguous) = (Handle::current(), self.partial.contiguous());
        let is_wanted = Arc::new(AtomicBool::new(true));
        let follower = HashFollower { total_bytes, contiguous, is_wanted: Arc::clone(&is_wanted) };
        let task = spawn_blocking(move || {
            let read = |bytes: &mut [u8], at| match transfer.upgrade() {
                Some(transfer) => transfer.partial.read(bytes, at),
                None => Err(StoreError::Stopped),
            };
            follower.run(&handle, &read)
        });
        Hashing { task, is_wanted }
    }
}

/// Fills a block with the bytes from a position.
type ReadAt<'a> = &'a dyn Fn(&mut [u8], u64) -> Result<(), StoreError>;

/// The thread that hashes; it ends soon after this is dropped.
struct Hashing {
    task: JoinHandle<Result<Digest, StoreError>>,
    is_wanted: Arc<AtomicBool>,
}

impl Hashing {
    async fn digest(mut self) -> Result<Digest, StoreError> {
        (&mut self.task).await.map_err(broken)?
    }
}

impl Drop for Hashing {
    fn drop(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
    }
}

struct HashFollower {
    total_bytes: u64,
    contiguous: watch::Receiver<u64>,
    is_wanted: Arc<AtomicBool>,
}

impl HashFollower {
    fn run(mut self, handle: &Handle, read: ReadAt<'_>) -> Result<Digest, StoreError> {
        let mut hasher = Sha256::new();
        let mut block = vec![0; HASH_BYTES];
        let mut at = 0;
        while at < self.total_bytes {
            if !self.is_wanted.load(Ordering::Relaxed) {
                return Err(StoreError::Stopped);
            }
            let available = *self.contiguous.borrow_and_update();
            if available <= at {
                handle.block_on(self.contiguous.changed()).map_err(|_| StoreError::Stopped)?;
                continue;
            }
            let count = (available - at).min(HASH_BYTES as u64);
            let block = &mut block[..count as usize];
            read(block, at)?;
            hasher.update(&*block);
            at += count;
        }
        Ok(Digest::of(hasher))
    }
}

fn broken(error: tokio::task::JoinError) -> StoreError {
    StoreError::cache("", "running the transfer", std::io::Error::other(error))
}

/// Writes the blocks of one range on another thread, each while the next one is received. Buffers are used
/// again: a new one for each block would cost a page fault for every 4 KiB.
struct Writing<'a> {
    transfer: &'a Arc<Transfer>,
    /// The attempt that the answer is of.
    attempt: u64,
    /// Where the range begins: chunks are marked from here.
    start: u64,
    /// Bytes up to here are written.
    written: u64,
    running: Option<RunningWrite>,
    /// The buffer of a block that is written.
    spare: Option<Vec<u8>>,
}

/// A block that is being written.
struct RunningWrite {
    task: JoinHandle<Result<Vec<u8>, StoreError>>,
    bytes: u64,
}

impl<'a> Writing<'a> {
    fn new(transfer: &'a Arc<Transfer>, start: u64, at: u64) -> Self {
        let attempt = transfer.partial.attempt();
        Self { transfer, attempt, start, written: at, running: None, spare: None }
    }

    fn written(&self) -> u64 {
        self.written
    }

    /// The end of what was given, which may still be being written.
    fn end(&self) -> u64 {
        self.written + self.running.as_ref().map_or(0, |running| running.bytes)
    }

    /// An empty buffer for the next block.
    fn spare_block(&mut self) -> Vec<u8> {
        self.spare.take().unwrap_or_else(|| Vec::with_capacity(WRITE_BYTES))
    }

    /// Begins to write a block once the one before is written.
    async fn then(&mut self, block: Vec<u8>) -> Result<(), StoreError> {
        self.finish().await?;
        if block.is_empty() {
            return Ok(());
        }
        let place = BlockPlace { attempt: self.attempt, start: self.start, at: self.written };
        let (transfer, bytes) = (Arc::clone(self.transfer), block.len() as u64);
        let task = spawn_blocking(move || {
            if transfer.partial.write_block(&block, place)? {
                transfer.progress.add(bytes);
            }
            Ok(block)
        });
        self.running = Some(RunningWrite { task, bytes });
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), StoreError> {
        if let Some(RunningWrite { task, bytes }) = self.running.take() {
            let mut block = task.await.map_err(broken)??;
            self.written += bytes;
            block.clear();
            self.spare = Some(block);
        }
        Ok(())
    }
}

/// The next bytes of a body, and why there are no more after them.
struct ReceivedBlock {
    block: Vec<u8>,
    failure: Option<StoreError>,
}

/// Reads a body in blocks, and ends where nothing comes for too long.
struct BodyReader<'a> {
    transfer: &'a Transfer,
    body: Incoming,
    /// The end of a frame that did not fit the block before.
    rest: Bytes,
    stall_timeout: Duration,
}

impl<'a> BodyReader<'a> {
    fn new(transfer: &'a Transfer, answer: Answer) -> Self {
        let stall_timeout = transfer.limits.stall_timeout;
        Self { transfer, body: answer.into_body(), rest: Bytes::new(), stall_timeout }
    }

    /// Fills a block with the next bytes, at most `left`.
    async fn next_block(&mut self, mut block: Vec<u8>, left: u64) -> ReceivedBlock {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(WRITE_BYTES);
        loop {
            let count = self.rest.len().min(wanted - block.len());
            block.extend_from_slice(&self.rest.split_to(count));
            if block.len() == wanted {
                return ReceivedBlock { block, failure: None };
            }
            let failure = match timeout(self.stall_timeout, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    self.rest = frame.into_data().unwrap_or_default();
                    continue;
                }
                Ok(Some(Err(_)) | None) => self.interrupted(),
                Err(_) => self.stalled(),
            };
            return ReceivedBlock { block, failure: Some(failure) };
        }
    }

    fn interrupted(&self) -> StoreError {
        StoreError::Interrupted { host: self.transfer.origin.host(), what: self.transfer.file.name.clone() }
    }

    fn stalled(&self) -> StoreError {
        let seconds = self.stall_timeout.as_secs().max(1);
        let (host, what) = (self.transfer.origin.host(), self.transfer.file.name.clone());
        StoreError::Stalled { host, what, seconds }
    }
}
