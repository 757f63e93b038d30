//! Fetches one file: ranges over several connections, resumed where they stopped, hashed behind the transfer.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
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
use crate::partial::Partial;
use crate::progress::ProgressSink;
use crate::retry::Pauses;
use crate::settings::FetchLimits;

/// Bytes that are written at once. With 8 connections 8 MiB wait in memory.
const WRITE_BYTES: usize = 1 << 20;

/// What a transfer needs; shared by its connections.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) origin: Arc<Origin>,
    pub(crate) file: RemoteFile,
    pub(crate) partial: Partial,
    pub(crate) limits: FetchLimits,
    pub(crate) progress: Arc<ProgressSink>,
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
        let mut missing = self.partial.missing(self.limits.request_bytes);
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
        // Dropping the set, on an error or when nobody waits any more, ends all connections.
        while let Some(ended) = workers.join_next().await {
            ended.map_err(broken)??;
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
        let mut body = BodyReader::new(self, answer);
        let mut writing = Writing::new(self, range.start, *at);
        while writing.end() < range.end {
            let (bytes, failure) = body.next_block(range.end - writing.end()).await;
            // What came before a failure counts, so it is written before the failure is told.
            let written = writing.then(bytes).await;
            *at = writing.written();
            written?;
            if let Some(error) = failure {
                let finished = writing.finish().await;
                *at = writing.written();
                finished?;
                return Err(error);
            }
        }
        let finished = writing.finish().await;
        *at = writing.written();
        finished?;
        Ok(RangeOutcome::Complete)
    }

    /// For servers without ranges: everything, from the start at each attempt.
    async fn whole_with_retries(self: &Arc<Self>) -> Result<Digest, StoreError> {
        let mut pauses = Pauses::new(&self.limits);
        loop {
            self.progress.take_back(self.partial.done_bytes());
            self.partial.reset()?;
            let hashing = self.hash_behind();
            let mut at = 0;
            match self.whole(&mut at).await {
                Ok(()) => return hashing.digest().await,
                Err(error) => {
                    drop(hashing);
                    self.progress.take_back(at - self.partial.done_bytes());
                    pauses.after(error).await?;
                }
            }
        }
    }

    async fn whole(self: &Arc<Self>, at: &mut u64) -> Result<(), StoreError> {
        let answer = self.origin.get(&self.file, None).await?;
        self.check_version(answer.headers())?;
        let mut body = BodyReader::new(self, answer);
        let mut writing = Writing::new(self, 0, 0);
        while writing.end() < self.partial.total_bytes() {
            let (bytes, failure) = body.next_block(self.partial.total_bytes() - writing.end()).await;
            let written = writing.then(bytes).await;
            *at = writing.written();
            written?;
            if let Some(error) = failure {
                let finished = writing.finish().await;
                *at = writing.written();
                finished?;
                return Err(error);
            }
        }
        let finished = writing.finish().await;
        *at = writing.written();
        finished
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
        let mut block = vec![0; WRITE_BYTES];
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
            let count = (available - at).min(WRITE_BYTES as u64);
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

/// Writes the blocks of one range on another thread, each while the next one is received.
struct Writing<'a> {
    transfer: &'a Arc<Transfer>,
    /// Where the range begins: chunks are marked from here.
    start: u64,
    /// Bytes up to here are written.
    written: u64,
    /// The block that is being written, and its length.
    running: Option<(JoinHandle<Result<(), StoreError>>, u64)>,
}

impl<'a> Writing<'a> {
    fn new(transfer: &'a Arc<Transfer>, start: u64, at: u64) -> Self {
        Self { transfer, start, written: at, running: None }
    }

    fn written(&self) -> u64 {
        self.written
    }

    /// The end of what was given, which may still be being written.
    fn end(&self) -> u64 {
        self.written + self.running.as_ref().map_or(0, |(_, length)| *length)
    }

    /// Begins to write a block once the one before is written.
    async fn then(&mut self, bytes: BytesMut) -> Result<(), StoreError> {
        self.finish().await?;
        if bytes.is_empty() {
            return Ok(());
        }
        let (transfer, start, at) = (Arc::clone(self.transfer), self.start, self.written);
        let length = bytes.len() as u64;
        let task = spawn_blocking(move || {
            transfer.partial.write(&bytes, at)?;
            transfer.progress.add(length);
            transfer.partial.mark(start..at + length)
        });
        self.running = Some((task, length));
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), StoreError> {
        if let Some((task, length)) = self.running.take() {
            task.await.map_err(broken)??;
            self.written += length;
        }
        Ok(())
    }
}

/// Reads a body in blocks, and ends where nothing comes for too long.
struct BodyReader<'a> {
    transfer: &'a Transfer,
    body: Incoming,
    /// A block is filled up to here before it is written.
    block: BytesMut,
    stall_timeout: Duration,
}

impl<'a> BodyReader<'a> {
    fn new(transfer: &'a Transfer, answer: Answer) -> Self {
        let stall_timeout = transfer.limits.stall_timeout;
        let block = BytesMut::with_capacity(2 * WRITE_BYTES);
        Self { transfer, body: answer.into_body(), block, stall_timeout }
    }

    /// The next bytes, at most `left`, and why there are no more. What came before a failure is not lost.
    async fn next_block(&mut self, left: u64) -> (BytesMut, Option<StoreError>) {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(WRITE_BYTES);
        let mut failure = None;
        while self.block.len() < wanted {
            match timeout(self.stall_timeout, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.block.extend_from_slice(&data);
                    }
                }
                Ok(Some(Err(_)) | None) => {
                    let (host, what) = (self.host(), self.transfer.file.name.clone());
                    failure = Some(StoreError::Interrupted { host, what });
                    break;
                }
                Err(_) => {
                    let (host, what) = (self.host(), self.transfer.file.name.clone());
                    let seconds = self.stall_timeout.as_secs().max(1);
                    failure = Some(StoreError::Stalled { host, what, seconds });
                    break;
                }
            }
        }
        let count = self.block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        (self.block.split_to(count), failure)
    }

    fn host(&self) -> String {
        self.transfer.origin.host()
    }
}
