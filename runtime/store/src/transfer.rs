//! Fetches one file: ranges over as many connections as help, resumed where they stopped, hashed behind the
//! transfer from the blocks that are still in memory.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
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
use crate::ranges::{RangeQueue, SourcePace};
use crate::retry::Pauses;
use crate::settings::FetchLimits;

/// Bytes that are written at once. Each connection has two such buffers, one that is filled while the other
/// one is written: with 8 connections and 2 files at a time 32 MiB, beside those of [`crate::written`].
const WRITE_BYTES: usize = 1 << 20;
/// Bytes that are read back at once to be hashed. They fit a core's second-level cache (512 KiB at least), so
/// that they are copied out of the page cache and hashed without going to memory between.
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

/// How far a range is.
#[derive(Debug, Clone, Copy)]
struct RangeProgress {
    /// Bytes up to here are written.
    at: u64,
    pace: SourcePace,
}

impl RangeProgress {
    fn from(at: u64) -> Self {
        Self { at, pace: SourcePace::default() }
    }
}

/// How a range ended.
#[derive(Debug, Clone, Copy)]
enum RangeOutcome {
    Complete(SourcePace),
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
            RangeOutcome::Complete(pace) => {
                self.ranges(missing, pace).await?;
                hashing.digest().await
            }
            RangeOutcome::NoRanges => {
                drop(hashing);
                self.whole_with_retries().await
            }
        }
    }

    /// All other ranges, over as many connections as the source needs. The first range came at this pace.
    async fn ranges(
        self: &Arc<Self>,
        missing: VecDeque<Range<u64>>,
        pace: SourcePace,
    ) -> Result<(), StoreError> {
        let most = self.limits.connections.max(1).min(missing.len());
        let queue = Arc::new(RangeQueue::new(missing, most, self.limits.request_bytes, pace));
        let mut workers = JoinSet::new();
        for number in 0..most {
            let (transfer, queue) = (Arc::clone(self), Arc::clone(&queue));
            workers.spawn(async move {
                while let Some(range) = queue.next(number).await {
                    match transfer.range_with_retries(range).await? {
                        RangeOutcome::Complete(pace) => queue.ended(pace),
                        // It had them a moment ago: another server answers, perhaps with other bytes.
                        RangeOutcome::NoRanges => return Err(transfer.changed()),
                    }
                }
                Ok(())
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
        let mut progress = RangeProgress::from(range.start);
        loop {
            let before = progress.at;
            match self.range(&range, &mut progress).await {
                Ok(RangeOutcome::NoRanges) => {
                    // What an earlier attempt brought comes again with all the rest.
                    self.progress.take_back(progress.at - range.start);
                    return Ok(RangeOutcome::NoRanges);
                }
                Ok(complete) => return Ok(complete),
                Err(error) => {
                    if progress.at > before {
                        pauses.reset();
                    }
                    pauses.after(error).await?;
                }
            }
        }
    }

    /// Fetches what is left of a range.
    async fn range(
        self: &Arc<Self>,
        range: &Range<u64>,
        progress: &mut RangeProgress,
    ) -> Result<RangeOutcome, StoreError> {
        let at = progress.at;
        let answer = self.origin.get(&self.file, Some(at..range.end)).await?;
        self.check_version(answer.headers())?;
        let is_all = at == 0 && range.end == self.partial.total_bytes();
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => self.check_range(answer.headers(), at)?,
            _ if is_all => {}
            _ => return Ok(RangeOutcome::NoRanges),
        }
        self.receive(answer, range.end, progress).await?;
        Ok(RangeOutcome::Complete(progress.pace))
    }

    /// Writes the body of an answer up to `end`.
    async fn receive(
        self: &Arc<Self>,
        answer: Answer,
        end: u64,
        progress: &mut RangeProgress,
    ) -> Result<(), StoreError> {
        let mut body = BodyReader::new(self, answer);
        let mut writing = Writing::new(self, progress.at);
        let mut failure = None;
        while failure.is_none() && writing.end() < end {
            self.partial.until_hashed(writing.written()).await;
            let received = body.next_block(self.partial.buffer(WRITE_BYTES), end - writing.end()).await;
            failure = received.failure;
            // What came before a failure counts, so it is written before the failure is told.
            let written = writing.then(received.block).await;
            progress.at = writing.written();
            written?;
        }
        let finished = writing.finish().await;
        progress.at = writing.written();
        finished?;
        progress.pace = body.pace;
        failure.map_or(Ok(()), Err)
    }

    /// For servers without ranges: everything, from the start at each attempt.
    async fn whole_with_retries(self: &Arc<Self>) -> Result<Digest, StoreError> {
        let mut pauses = Pauses::new(&self.limits);
        loop {
            self.progress.take_all_back();
            self.partial.reset()?;
            let hashing = self.hash_behind();
            match self.whole().await {
                Ok(()) => return hashing.digest().await,
                Err(error) => {
                    drop(hashing);
                    pauses.after(error).await?;
                }
            }
        }
    }

    async fn whole(self: &Arc<Self>) -> Result<(), StoreError> {
        let answer = self.origin.get(&self.file, None).await?;
        self.check_version(answer.headers())?;
        self.receive(answer, self.partial.total_bytes(), &mut RangeProgress::from(0)).await
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
        let is_wanted = Arc::new(AtomicBool::new(true));
        self.partial.set_hashed(0);
        let follower = HashFollower {
            transfer: Arc::downgrade(self),
            total_bytes: self.partial.total_bytes(),
            contiguous: self.partial.contiguous(),
            is_wanted: Arc::clone(&is_wanted),
        };
        let handle = Handle::current();
        Hashing { task: spawn_blocking(move || follower.run(&handle)), is_wanted }
    }
}

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

/// Hashes behind a transfer. While nothing arrives it holds only the receiver, so that a transfer that was
/// dropped ends it.
struct HashFollower {
    transfer: Weak<Transfer>,
    total_bytes: u64,
    contiguous: watch::Receiver<u64>,
    is_wanted: Arc<AtomicBool>,
}

impl HashFollower {
    fn run(mut self, handle: &Handle) -> Result<Digest, StoreError> {
        let mut hasher = Sha256::new();
        let mut read_back = Vec::new();
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
            let transfer = self.transfer.upgrade().ok_or(StoreError::Stopped)?;
            let partial = &transfer.partial;
            if let Some(block) = partial.recent_block(at) {
                hasher.update(&block);
                at += block.len() as u64;
                partial.release(block);
                partial.set_hashed(at);
                continue;
            }
            // Up to the next block that is still in memory, so that it is not read back, too.
            let end = partial.next_recent(at).map_or(available, |start| start.min(available));
            read_back.resize(HASH_BYTES, 0);
            let count = (end - at).min(HASH_BYTES as u64);
            let bytes = &mut read_back[..count as usize];
            partial.read(bytes, at)?;
            hasher.update(&*bytes);
            at += count;
            partial.set_hashed(at);
        }
        Ok(Digest::of(hasher))
    }
}

impl Drop for HashFollower {
    /// Whatever ended it: what waits for it goes on.
    fn drop(&mut self) {
        if let Some(transfer) = self.transfer.upgrade() {
            transfer.partial.set_hashed(u64::MAX);
        }
    }
}

fn broken(error: tokio::task::JoinError) -> StoreError {
    StoreError::cache("", "running the transfer", std::io::Error::other(error))
}

/// Writes the blocks of one range on another thread, each while the next one is received.
struct Writing<'a> {
    transfer: &'a Arc<Transfer>,
    /// The attempt that the answer is of.
    attempt: u64,
    /// Bytes up to here are written.
    written: u64,
    running: Option<RunningWrite>,
}

/// A block that is being written.
struct RunningWrite {
    task: JoinHandle<Result<(), StoreError>>,
    bytes: u64,
}

impl<'a> Writing<'a> {
    fn new(transfer: &'a Arc<Transfer>, at: u64) -> Self {
        Self { transfer, attempt: transfer.partial.attempt(), written: at, running: None }
    }

    fn written(&self) -> u64 {
        self.written
    }

    /// The end of what was given, which may still be being written.
    fn end(&self) -> u64 {
        self.written + self.running.as_ref().map_or(0, |running| running.bytes)
    }

    /// Begins to write a block once the one before is written.
    async fn then(&mut self, block: Vec<u8>) -> Result<(), StoreError> {
        self.finish().await?;
        if block.is_empty() {
            self.transfer.partial.release(block);
            return Ok(());
        }
        let place = BlockPlace { attempt: self.attempt, at: self.written };
        let (transfer, bytes) = (Arc::clone(self.transfer), block.len() as u64);
        let task = spawn_blocking(move || {
            if transfer.partial.write_block(block, place)? {
                transfer.progress.add(bytes);
            }
            Ok(())
        });
        self.running = Some(RunningWrite { task, bytes });
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), StoreError> {
        if let Some(RunningWrite { task, bytes }) = self.running.take() {
            task.await.map_err(broken)??;
            self.written += bytes;
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
    pace: SourcePace,
    stall_timeout: Duration,
}

impl<'a> BodyReader<'a> {
    fn new(transfer: &'a Transfer, answer: Answer) -> Self {
        let stall_timeout = transfer.limits.stall_timeout;
        let pace = SourcePace::default();
        Self { transfer, body: answer.into_body(), rest: Bytes::new(), pace, stall_timeout }
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
                    self.pace.add(self.rest.len());
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
