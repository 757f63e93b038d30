//! The memory of a key/value cache: the layers of its blocks one after the other, each with room for the most
//! blocks that the cache may have.
//!
//! A cache that may grow is a range of addresses, in which the system holds pages only for the blocks that
//! the cache has; blocks that are gone give their pages back. So growing moves nothing, kernels see one
//! address for each layer, and what the process takes is what the cache has.

use std::sync::atomic::{AtomicUsize, Ordering};

use trustformers_plan::BackendError;

use crate::{memory::SharedF32, pool::share};

/// What it is called in errors.
const WHAT: &str = "the key/value cache";

/// The sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvSizes {
    /// Layers of a block.
    pub(crate) layers: usize,
    /// Bytes of a block in one layer.
    pub(crate) block_bytes: usize,
    /// The most blocks that it may have.
    pub(crate) room: usize,
}

/// The memory of a cache.
pub(crate) struct KvMemory {
    pages: KvPages,
    sizes: KvSizes,
    /// Bytes from a layer to the next.
    layer_step: usize,
    /// Blocks that it has.
    blocks: AtomicUsize,
}

enum KvPages {
    /// Of a cache that keeps its size.
    Whole(SharedF32),
    #[cfg(target_os = "linux")]
    Mapped(mapped::MappedRange),
}

impl KvMemory {
    /// A cache of `blocks` blocks.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub(crate) fn new(sizes: KvSizes, blocks: usize) -> Result<Self, BackendError> {
        let KvSizes { layers, block_bytes, room } = sizes;
        let failed = || BackendError::OutOfMemory { what: WHAT, needed_bytes: u64::MAX };
        let layer_bytes = room.checked_mul(block_bytes).ok_or_else(failed)?;
        let (pages, layer_step) = Self::pages(layers, layer_bytes, room > blocks)?;
        let own = Self { pages, sizes, layer_step, blocks: AtomicUsize::new(blocks) };
        own.advise(blocks);
        Ok(own)
    }

    /// The memory, and the bytes from a layer to the next.
    #[cfg(target_os = "linux")]
    fn pages(layers: usize, layer_bytes: usize, grows: bool) -> Result<(KvPages, usize), BackendError> {
        let failed = || BackendError::OutOfMemory { what: WHAT, needed_bytes: u64::MAX };
        if !grows {
            return Ok((Self::whole(layers, layer_bytes)?, layer_bytes));
        }
        let step = layer_bytes.checked_next_multiple_of(mapped::PAGE_BYTES).ok_or_else(failed)?;
        let bytes = step.checked_mul(layers).ok_or_else(failed)?;
        Ok((KvPages::Mapped(mapped::MappedRange::new(WHAT, bytes)?), step))
    }

    /// The memory, and the bytes from a layer to the next. Other systems keep the pages of blocks that are
    /// gone.
    #[cfg(not(target_os = "linux"))]
    fn pages(layers: usize, layer_bytes: usize, _: bool) -> Result<(KvPages, usize), BackendError> {
        Ok((Self::whole(layers, layer_bytes)?, layer_bytes))
    }

    fn whole(layers: usize, layer_bytes: usize) -> Result<KvPages, BackendError> {
        let bytes = layer_bytes.checked_mul(layers);
        let bytes = bytes.ok_or(BackendError::OutOfMemory { what: WHAT, needed_bytes: u64::MAX })?;
        Ok(KvPages::Whole(SharedF32::untouched(WHAT, bytes)?))
    }

    /// Blocks that it has.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.load(Ordering::Relaxed)
    }

    /// Bytes of the blocks that it has.
    pub(crate) fn bytes(&self) -> u64 {
        (self.blocks() * self.sizes.block_bytes * self.sizes.layers) as u64
    }

    /// First byte of a layer of the blocks. It may be written through, from several threads.
    pub(crate) fn layer(&self, layer: usize) -> *mut u8 {
        let start = match &self.pages {
            KvPages::Whole(memory) => memory.ptr().cast::<u8>(),
            #[cfg(target_os = "linux")]
            KvPages::Mapped(range) => range.ptr(),
        };
        start.wrapping_add(layer * self.layer_step)
    }

    /// Makes the system give the pages of thread `number`'s share of new memory, so that no step waits for
    /// them.
    pub(crate) fn touch(&self, threads: usize, number: usize) {
        match &self.pages {
            KvPages::Whole(memory) => memory.touch(threads, number),
            #[cfg(target_os = "linux")]
            KvPages::Mapped(range) => {
                let layer_bytes = self.blocks() * self.sizes.block_bytes;
                for layer in 0..self.sizes.layers {
                    let own = share(layer_bytes, threads, number);
                    let first = layer * self.layer_step;
                    range.touch(first + own.start..first + own.end);
                }
            }
        }
    }

    /// Changes how many blocks it has. No step runs meanwhile.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`] above the room.
    pub(crate) fn resize(&self, blocks: usize) -> Result<(), BackendError> {
        if blocks > self.sizes.room {
            return Err(BackendError::Mismatch("more blocks than the plan has room for"));
        }
        let before = self.blocks.swap(blocks, Ordering::Relaxed);
        if blocks < before {
            self.release(blocks, before);
        } else {
            self.advise(blocks);
        }
        Ok(())
    }

    /// Gives back the pages of blocks `from..to` of each layer.
    #[cfg(target_os = "linux")]
    fn release(&self, from: usize, to: usize) {
        let KvPages::Mapped(range) = &self.pages else { return };
        for layer in 0..self.sizes.layers {
            let first = layer * self.layer_step;
            // What lies between the last block and the next layer belongs to no block.
            let end = (to * self.sizes.block_bytes).next_multiple_of(mapped::PAGE_BYTES);
            range.release(&(first + from * self.sizes.block_bytes..first + end.min(self.layer_step)));
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn release(&self, _: usize, _: usize) {}

    /// Advises large pages for the blocks that it has, and only for them: a large page beyond would take
    /// memory that the cache does not have.
    #[cfg(target_os = "linux")]
    fn advise(&self, blocks: usize) {
        let KvPages::Mapped(range) = &self.pages else { return };
        for layer in 0..self.sizes.layers {
            let first = layer * self.layer_step;
            range.advise_large_pages(&(first..first + blocks * self.sizes.block_bytes));
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn advise(&self, _: usize) {}
}

/// A range of addresses without memory behind it until it is written.
#[cfg(target_os = "linux")]
mod mapped {
    use std::{ops::Range, ptr::NonNull};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
    use trustformers_plan::BackendError;

    /// Bytes of a small page.
    pub(super) const PAGE_BYTES: usize = 4096;

    /// Bytes of a large page; smaller ranges have no use for them.
    const LARGE_PAGE_BYTES: usize = 2 << 20;

    pub(super) struct MappedRange {
        start: NonNull<u8>,
        bytes: usize,
    }

    // SAFETY: the memory is accessed through raw pointers only, whose users write disjoint ranges with a
    // barrier before any access by another thread; it belongs to no thread.
    unsafe impl Sync for MappedRange {}
    // SAFETY: as above.
    unsafe impl Send for MappedRange {}

    impl MappedRange {
        pub(super) fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
            let failed = || BackendError::OutOfMemory { what, needed_bytes: bytes as u64 };
            if bytes == 0 {
                return Ok(Self { start: NonNull::dangling(), bytes });
            }
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            // SAFETY: a new private mapping at an address that the system chooses touches no other memory.
            let start = unsafe {
                mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags)
            };
            let start = start.ok().and_then(|start| NonNull::new(start.cast::<u8>())).ok_or_else(failed)?;
            Ok(Self { start, bytes })
        }

        pub(super) fn ptr(&self) -> *mut u8 {
            self.start.as_ptr()
        }

        /// Writes a zero to each page of a range without content.
        pub(super) fn touch(&self, range: Range<usize>) {
            for at in range.clone().step_by(PAGE_BYTES).chain(range.last()) {
                assert!(at < self.bytes, "byte {at} of {}", self.bytes);
                // SAFETY: the byte is inside the mapping, which is new: it holds zeros, and no thread reads
                // it.
                unsafe { self.start.as_ptr().add(at).write_volatile(0) };
            }
        }

        /// The pages that lie in a range whole.
        fn whole_pages(&self, range: &Range<usize>) -> Range<usize> {
            let start = range.start.next_multiple_of(PAGE_BYTES);
            let end = range.end.min(self.bytes) / PAGE_BYTES * PAGE_BYTES;
            start..end.max(start)
        }

        /// Gives the pages that lie in a range whole back to the system. They hold zeros afterwards.
        pub(super) fn release(&self, range: &Range<usize>) {
            let pages = self.whole_pages(range);
            // Large pages would come back with the first byte that is written.
            for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontNeed] {
                self.advise(&pages, advice);
            }
        }

        pub(super) fn advise_large_pages(&self, range: &Range<usize>) {
            let pages = self.whole_pages(range);
            if pages.len() >= LARGE_PAGE_BYTES {
                self.advise(&pages, Advice::LinuxHugepage);
            }
        }

        fn advise(&self, pages: &Range<usize>, advice: Advice) {
            if pages.is_empty() {
                return;
            }
            // SAFETY: whole pages inside the mapping; callers give back only what nothing reads any more.
            let advised =
                unsafe { madvise(self.start.as_ptr().add(pages.start).cast(), pages.len(), advice) };
            if let Err(error) = advised {
                tracing::debug!(%error, ?advice, "the system did not take an advice");
            }
        }
    }

    impl Drop for MappedRange {
        fn drop(&mut self) {
            if self.bytes == 0 {
                return;
            }
            // SAFETY: this mapping was made here with this size, and nothing uses it any more.
            let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
            if let Err(error) = unmapped {
                tracing::error!(%error, bytes = self.bytes, "memory of a cache was not returned");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: KvSizes = KvSizes { layers: 3, block_bytes: 1536, room: 40 };

    fn write(memory: &KvMemory, layer: usize, block: usize, value: u8) {
        let at = memory.layer(layer).wrapping_add(block * SIZES.block_bytes);
        // SAFETY: the block lies inside the cache, and the test has one thread.
        unsafe { std::ptr::write_bytes(at, value, SIZES.block_bytes) };
    }

    fn read(memory: &KvMemory, layer: usize, block: usize) -> Vec<u8> {
        let at = memory.layer(layer).wrapping_add(block * SIZES.block_bytes);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(at, SIZES.block_bytes).to_vec() }
    }

    #[test]
    fn blocks_that_stay_keep_their_content() {
        let memory = KvMemory::new(SIZES, 10).unwrap();
        memory.touch(1, 0);
        let value = |layer: usize, block: usize| (layer * 50 + block + 1) as u8;
        memory.resize(40).unwrap();
        for (layer, block) in (0..3).flat_map(|layer| (0..40).map(move |block| (layer, block))) {
            write(&memory, layer, block, value(layer, block));
        }
        // A page holds two blocks and a part of a third: blocks beside those that are gone must stay.
        for blocks in [37, 11, 1] {
            memory.resize(blocks).unwrap();
            assert_eq!(memory.bytes(), (3 * blocks * SIZES.block_bytes) as u64);
            for (layer, block) in (0..3).flat_map(|layer| (0..blocks).map(move |block| (layer, block))) {
                let wanted = vec![value(layer, block); SIZES.block_bytes];
                assert_eq!(read(&memory, layer, block), wanted, "{blocks}: layer {layer}, block {block}");
            }
        }
        assert!(memory.resize(41).is_err());
        assert_eq!(memory.blocks(), 1);
    }

    #[test]
    fn a_cache_that_keeps_its_size_has_no_gaps() {
        let memory = KvMemory::new(SIZES, 40).unwrap();
        let step = memory.layer(1) as usize - memory.layer(0) as usize;
        assert_eq!(step, SIZES.room * SIZES.block_bytes);
    }
}
