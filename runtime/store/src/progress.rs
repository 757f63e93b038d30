//! How far fetching a model is: bytes, rate and the time left.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// The rate is an average over about this time: short enough to show a stall, long enough not to jump.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// The rate is computed anew at most this often: shorter intervals measure the size of one read.
const RATE_INTERVAL: Duration = Duration::from_millis(250);

/// What fetching is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FetchPhase {
    /// Asking the source which files there are.
    #[default]
    Listing,
    /// Another process fetches the same file into the same cache.
    Waiting,
    /// Reading bytes from the source.
    Downloading,
    /// Reading files of the cache to check their digest.
    Verifying,
    /// Unpacking an archive.
    Unpacking,
}

/// How far fetching is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FetchProgress {
    /// What it is doing.
    pub phase: FetchPhase,
    /// Bytes of the model that are in the cache and checked, or about to be.
    pub done_bytes: u64,
    /// Bytes of the model; 0 until its files are listed.
    pub total_bytes: u64,
    /// Bytes a second lately.
    pub bytes_per_second: f64,
    /// Time left at that rate; none while nothing arrives.
    pub eta: Option<Duration>,
}

/// Measures progress. It has no clock: every call is told the time since any fixed moment.
#[derive(Debug, Clone, Default)]
pub struct ProgressMeter {
    progress: FetchProgress,
    /// Bytes and time at the end of the last interval.
    measured: Option<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    bytes: u64,
    at: Duration,
}

impl ProgressMeter {
    /// The figures so far.
    pub fn progress(&self) -> FetchProgress {
        self.progress
    }

    /// Another phase; bytes stay.
    pub fn enter(&mut self, phase: FetchPhase) {
        self.progress.phase = phase;
    }

    /// How many bytes there are in all.
    pub fn set_total(&mut self, total_bytes: u64) {
        self.progress.total_bytes = total_bytes;
    }

    /// Bytes that are there without having arrived now: of an earlier attempt, or checked in the cache. They
    /// count in no rate.
    pub fn add_present(&mut self, bytes: u64) {
        self.progress.done_bytes += bytes;
        if let Some(sample) = &mut self.measured {
            sample.bytes += bytes;
        }
    }

    /// Bytes that have to come once more.
    pub fn take_back(&mut self, bytes: u64) {
        self.progress.done_bytes = self.progress.done_bytes.saturating_sub(bytes);
        if let Some(sample) = &mut self.measured {
            sample.bytes = sample.bytes.min(self.progress.done_bytes);
        }
    }

    /// Bytes that have arrived by `now`.
    pub fn add(&mut self, bytes: u64, now: Duration) {
        let before_bytes = self.progress.done_bytes;
        self.progress.done_bytes += bytes;
        let Some(last) = self.measured else {
            self.measured = Some(Sample { bytes: before_bytes, at: now });
            return;
        };
        let elapsed = now.saturating_sub(last.at);
        if elapsed < RATE_INTERVAL {
            return;
        }
        let rate = (self.progress.done_bytes - last.bytes) as f64 / elapsed.as_secs_f64();
        let share = (elapsed.as_secs_f64() / RATE_WINDOW.as_secs_f64()).min(1.0);
        let before = self.progress.bytes_per_second;
        self.progress.bytes_per_second = if before == 0.0 { rate } else { before + (rate - before) * share };
        self.measured = Some(Sample { bytes: self.progress.done_bytes, at: now });
        let left = self.progress.total_bytes.saturating_sub(self.progress.done_bytes) as f64;
        let seconds = left / self.progress.bytes_per_second;
        self.progress.eta = Duration::try_from_secs_f64(seconds).ok();
    }
}

/// A meter that several transfers share and that others watch.
#[derive(Debug)]
pub(crate) struct ProgressSink {
    start: Instant,
    meter: Mutex<ProgressMeter>,
    watchers: watch::Sender<FetchProgress>,
}

impl ProgressSink {
    pub(crate) fn new(watchers: watch::Sender<FetchProgress>) -> Self {
        Self { start: Instant::now(), meter: Mutex::default(), watchers }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut ProgressMeter, Duration)) {
        let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut meter, self.start.elapsed());
        self.watchers.send_replace(meter.progress());
    }

    pub(crate) fn enter(&self, phase: FetchPhase) {
        self.update(|meter, _| meter.enter(phase));
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.update(|meter, now| meter.add(bytes, now));
    }

    pub(crate) fn add_present(&self, bytes: u64) {
        self.update(|meter, _| meter.add_present(bytes));
    }

    pub(crate) fn take_back(&self, bytes: u64) {
        self.update(|meter, _| meter.take_back(bytes));
    }
}

/// What one file has added to the figures of its model. Several files arrive at a time.
#[derive(Debug)]
pub(crate) struct FileProgress {
    sink: Arc<ProgressSink>,
    counted_bytes: AtomicU64,
}

impl FileProgress {
    pub(crate) fn new(sink: Arc<ProgressSink>) -> Self {
        Self { sink, counted_bytes: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.counted_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.sink.add(bytes);
    }

    pub(crate) fn add_present(&self, bytes: u64) {
        self.counted_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.sink.add_present(bytes);
    }

    /// Bytes of this file that have to come once more; at most those that it has added.
    pub(crate) fn take_back(&self, bytes: u64) {
        let mut taken_bytes = 0;
        let taken = self.counted_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |counted| {
            taken_bytes = bytes.min(counted);
            Some(counted - taken_bytes)
        });
        if taken.is_ok() {
            self.sink.take_back(taken_bytes);
        }
    }

    /// All bytes of this file have to come once more.
    pub(crate) fn take_all_back(&self) {
        self.sink.take_back(self.counted_bytes.swap(0, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_transfer_has_its_rate_and_the_time_left() {
        let mut meter = ProgressMeter::default();
        meter.set_total(1000);
        meter.add_present(100);
        for second in 0..=8 {
            meter.add(if second == 0 { 0 } else { 50 }, Duration::from_secs(second));
        }
        let progress = meter.progress();
        assert_eq!(progress.done_bytes, 500);
        assert!((progress.bytes_per_second - 50.0).abs() < 1e-6, "{progress:?}");
        assert_eq!(progress.eta, Some(Duration::from_secs(10)));
    }

    #[test]
    fn what_was_there_before_is_no_rate_and_what_comes_again_is_taken_back() {
        let mut meter = ProgressMeter::default();
        meter.set_total(1 << 30);
        meter.add(0, Duration::ZERO);
        meter.add_present(1 << 29);
        meter.add(1000, Duration::from_secs(1));
        assert!((meter.progress().bytes_per_second - 1000.0).abs() < 1e-6);
        meter.take_back(500);
        assert_eq!(meter.progress().done_bytes, (1 << 29) + 500);
    }

    #[test]
    fn a_slower_transfer_shows_within_the_window() {
        let mut meter = ProgressMeter::default();
        meter.set_total(1 << 40);
        meter.add(0, Duration::ZERO);
        meter.add(1_000_000, Duration::from_secs(1));
        meter.add(0, Duration::from_secs(20));
        assert!(meter.progress().bytes_per_second < 1.0, "{:?}", meter.progress());
    }

    #[test]
    fn a_file_takes_back_only_what_it_added() {
        let (sender, progress) = watch::channel(FetchProgress::default());
        let sink = Arc::new(ProgressSink::new(sender));
        let files = [0, 1].map(|_| FileProgress::new(Arc::clone(&sink)));
        files[0].add_present(300);
        files[0].add(200);
        files[1].add(1000);
        files[0].take_back(9999);
        assert_eq!(progress.borrow().done_bytes, 1000);
        files[0].take_back(1);
        assert_eq!(progress.borrow().done_bytes, 1000);
        files[1].take_all_back();
        assert_eq!(progress.borrow().done_bytes, 0);
    }
}
