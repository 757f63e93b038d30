//! Which bytes of a transfer are written, and its last blocks, which are still in memory for the thread that
//! hashes.

use std::collections::BTreeMap;
use std::ops::Range;

/// Blocks that are kept for the thread that hashes, and as many empty buffers: with blocks of 1 MiB 16 MiB
/// for each file. One connection brings its blocks in order, so that a few bridge the time in which this
/// thread has no processor. Of several connections only the first in the file brings what is hashed next.
const MAX_BLOCKS: usize = 8;

/// Bytes of a file without their gaps.
#[derive(Debug, Default)]
pub(crate) struct WrittenRuns {
    /// The end of each run by its start. Runs neither overlap nor touch.
    end_by_start: BTreeMap<u64, u64>,
}

impl WrittenRuns {
    /// Adds bytes. Returns the run that they are part of now.
    pub(crate) fn insert(&mut self, written: Range<u64>) -> Range<u64> {
        let mut run = written;
        let before = self.end_by_start.range(..=run.start).next_back();
        if let Some((start, end)) = before
            && *end >= run.start
        {
            run = *start..run.end.max(*end);
        }
        loop {
            let next = self.end_by_start.range(run.start..=run.end).next();
            let Some((start, end)) = next.map(|(start, end)| (*start, *end)) else { break };
            self.end_by_start.remove(&start);
            run.end = run.end.max(end);
        }
        self.end_by_start.insert(run.start, run.end);
        run
    }

    /// Bytes from the start of the file without a gap.
    pub(crate) fn contiguous_bytes(&self) -> u64 {
        self.end_by_start.get(&0).copied().unwrap_or(0)
    }
}

/// The last blocks that were written, and buffers for the next ones. A new buffer for each block would cost a
/// page fault for every 4 KiB.
#[derive(Debug, Default)]
pub(crate) struct RecentBlocks {
    by_start: BTreeMap<u64, Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

impl RecentBlocks {
    /// An empty buffer with room for so many bytes.
    pub(crate) fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| Vec::with_capacity(bytes))
    }

    /// Takes a buffer back whose bytes nobody needs.
    pub(crate) fn release(&mut self, mut block: Vec<u8>) {
        if self.spare.len() < MAX_BLOCKS {
            block.clear();
            self.spare.push(block);
        }
    }

    /// Keeps a block that was written at this position. Of too many the last in the file goes: it is hashed
    /// last, and is read back then.
    pub(crate) fn keep(&mut self, start: u64, block: Vec<u8>) {
        if let Some(replaced) = self.by_start.insert(start, block) {
            self.release(replaced);
        }
        while self.by_start.len() > MAX_BLOCKS
            && let Some((_, last)) = self.by_start.pop_last()
        {
            self.release(last);
        }
    }

    /// The block at exactly this position, where it is still there. Those before it go: they have been read
    /// back.
    pub(crate) fn take(&mut self, at: u64) -> Option<Vec<u8>> {
        while let Some(first) = self.by_start.first_entry()
            && *first.key() < at
        {
            let passed = first.remove();
            self.release(passed);
        }
        self.by_start.remove(&at)
    }

    /// Where the first block behind a position begins.
    pub(crate) fn next_start(&self, at: u64) -> Option<u64> {
        self.by_start.range(at..).next().map(|(start, _)| *start)
    }

    /// Forgets all blocks, and keeps their buffers.
    pub(crate) fn forget(&mut self) {
        while let Some((_, block)) = self.by_start.pop_first() {
            self.release(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_grow_together_in_whatever_order_their_bytes_come() {
        let mut runs = WrittenRuns::default();
        assert_eq!(runs.insert(30..40), 30..40);
        assert_eq!(runs.insert(10..20), 10..20);
        assert_eq!(runs.contiguous_bytes(), 0);
        assert_eq!(runs.insert(20..25), 10..25, "it touches the one before");
        assert_eq!(runs.insert(0..5), 0..5);
        assert_eq!(runs.contiguous_bytes(), 5);
        assert_eq!(runs.insert(3..30), 0..40, "it closes every gap");
        assert_eq!(runs.contiguous_bytes(), 40);
        assert_eq!(runs.insert(2..7), 0..40, "what is there stays");
        assert_eq!(runs.end_by_start.len(), 1);
    }

    #[test]
    fn a_block_is_there_at_its_own_position_until_it_is_passed() {
        let mut blocks = RecentBlocks::default();
        for start in [0, 4, 8] {
            blocks.keep(start, vec![start as u8; 4]);
        }
        assert_eq!(blocks.take(0), Some(vec![0; 4]));
        assert_eq!(blocks.take(0), None);
        assert_eq!(blocks.next_start(1), Some(4));
        assert_eq!(blocks.take(6), None, "no block begins there");
        assert_eq!((blocks.next_start(0), blocks.take(8)), (Some(8), Some(vec![8; 4])));
        assert_eq!(blocks.buffer(4), Vec::<u8>::new(), "the buffer of the block that was passed");
    }

    #[test]
    fn of_too_many_blocks_the_last_in_the_file_go() {
        let mut blocks = RecentBlocks::default();
        for start in (0..2 * MAX_BLOCKS as u64).rev() {
            blocks.keep(start, vec![1]);
        }
        assert_eq!(blocks.by_start.len(), MAX_BLOCKS);
        assert!(blocks.spare.len() <= MAX_BLOCKS);
        assert_eq!(blocks.take(MAX_BLOCKS as u64 - 1), Some(vec![1]));
        assert_eq!(blocks.next_start(MAX_BLOCKS as u64), None);
        blocks.keep(7, vec![1]);
        blocks.forget();
        assert_eq!(blocks.next_start(0), None);
    }
}
