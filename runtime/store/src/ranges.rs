//! The ranges of a file that are still to be asked for, and how many connections ask for them.
//!
//! Several connections are faster than one where the network or the server limits each of them. Where the
//! source is ahead of this machine they only cost: as much as each of them may have on its way lies in the
//! memory of the system, and bytes come out of order, so that what is hashed next has left the processor's
//! caches. Whether the source is ahead shows in the length of what is read at once.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::http::READ_BUFFER_BYTES;

/// How the bytes of an answer came.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SourcePace {
    bytes: u64,
    /// Those in reads that filled their buffer: more was waiting.
    full_bytes: u64,
}

impl SourcePace {
    /// Counts what was read at once.
    pub(crate) fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if bytes >= READ_BUFFER_BYTES {
            self.full_bytes += bytes as u64;
        }
    }

    /// Whether the source sends faster than this machine takes its bytes: more than half of them waited.
    /// Reads within TLS end with a record, so that this is never so there.
    fn is_ahead(self) -> bool {
        self.full_bytes > self.bytes / 2
    }

    /// How many connections of at most `most` are used after an answer that came so, where `used` were
    /// before.
    fn connections(self, used: usize, most: usize) -> usize {
        if self.is_ahead() { (used / 2).max(1) } else { used.saturating_mul(2).min(most) }
    }
}

/// What the connections of a transfer share.
#[derive(Debug)]
pub(crate) struct RangeQueue {
    missing: Mutex<VecDeque<Range<u64>>>,
    /// Connections in use: those whose number is lower. Changed with `missing` locked.
    used: watch::Sender<usize>,
    most: usize,
    /// The most that one request asks for.
    request_bytes: u64,
}

impl RangeQueue {
    /// Ranges in the order of the file, for at most `most` connections, after a first answer that came so.
    pub(crate) fn new(
        missing: VecDeque<Range<u64>>,
        most: usize,
        request_bytes: u64,
        first: SourcePace,
    ) -> Self {
        let used = if first.is_ahead() { 1 } else { most };
        Self { missing: Mutex::new(missing), used: watch::channel(used).0, most, request_bytes }
    }

    /// The next range for the connection of this number, from 0, once it is used; none when all are taken.
    pub(crate) async fn next(&self, number: usize) -> Option<Range<u64>> {
        // The sender lives in this very value, so the channel cannot be closed.
        let _ = self.used.subscribe().wait_for(|used| *used > number).await;
        self.take()
    }

    fn take(&self) -> Option<Range<u64>> {
        let mut missing = self.lock();
        let mut range = missing.pop_front()?;
        // One connection has everything in order, so that nothing speaks for short requests.
        let is_alone = *self.used.borrow() == 1;
        while is_alone && let Some(next) = missing.front().cloned() {
            if next.start != range.end || next.end - range.start > self.request_bytes {
                break;
            }
            range.end = next.end;
            missing.pop_front();
        }
        if missing.is_empty() {
            // Whoever waits has nothing to wait for.
            self.used.send_replace(self.most);
        }
        Some(range)
    }

    /// A range has come, in this way.
    pub(crate) fn ended(&self, pace: SourcePace) {
        let missing = self.lock();
        if missing.is_empty() {
            return;
        }
        self.used.send_if_modified(|used| {
            let before = *used;
            *used = pace.connections(before, self.most);
            before != *used
        });
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Range<u64>>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const AHEAD: SourcePace = SourcePace { bytes: 100, full_bytes: 51 };
    const WAITED_FOR: SourcePace = SourcePace { bytes: 100, full_bytes: 50 };

    /// Ranges of one byte each.
    fn queue(count: u64, most: usize, first: SourcePace) -> RangeQueue {
        RangeQueue::new((0..count).map(|at| at..at + 1).collect(), most, 4, first)
    }

    /// What a connection gets now; none where it waits.
    fn next(queue: &RangeQueue, number: usize) -> Option<Option<Range<u64>>> {
        queue.next(number).now_or_never()
    }

    #[test]
    fn a_source_is_ahead_where_most_bytes_fill_their_buffer() {
        let mut pace = SourcePace::default();
        assert!(!pace.is_ahead());
        pace.add(READ_BUFFER_BYTES - 1);
        assert!(!pace.is_ahead());
        pace.add(READ_BUFFER_BYTES);
        assert!(pace.is_ahead());
        assert_eq!([8, 3, 1].map(|used| pace.connections(used, 8)), [4, 1, 1]);
        assert_eq!([1, 3, 8].map(|used| WAITED_FOR.connections(used, 5)), [2, 5, 5]);
    }

    #[test]
    fn one_connection_asks_for_long_ranges_while_the_source_is_ahead() {
        let queue = queue(9, 4, AHEAD);
        assert_eq!(next(&queue, 1), None, "it waits");
        assert_eq!(next(&queue, 0), Some(Some(0..4)));
        queue.ended(WAITED_FOR);
        assert_eq!([0, 1, 2].map(|number| next(&queue, number)), [Some(Some(4..5)), Some(Some(5..6)), None]);
        queue.ended(WAITED_FOR);
        assert_eq!(next(&queue, 3), Some(Some(6..7)));
        queue.ended(AHEAD);
        queue.ended(AHEAD);
        assert_eq!([3, 0].map(|number| next(&queue, number)), [None, Some(Some(7..9))]);
    }

    #[test]
    fn a_gap_ends_a_range() {
        let queue = RangeQueue::new(VecDeque::from([0..1, 2..3, 3..4]), 2, 4, AHEAD);
        assert_eq!(
            [0, 0, 0].map(|number| next(&queue, number)),
            [Some(Some(0..1)), Some(Some(2..4)), Some(None)]
        );
    }

    #[tokio::test]
    async fn connections_that_wait_end_when_every_range_is_taken() {
        let queue = queue(2, 3, AHEAD);
        let waiting = queue.next(2);
        let taking = async {
            assert_eq!(queue.next(0).await, Some(0..2));
            // The range that was taken last comes when nothing is left to wait for.
            queue.ended(AHEAD);
        };
        let (waited, ()) = tokio::join!(waiting, taking);
        assert_eq!((waited, queue.next(1).await), (None, None));
    }
}
