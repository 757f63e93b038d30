//! Aligned memory that several threads write at the same time, each its own range.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ptr::NonNull,
    sync::Arc,
};

use trustformers_plan::{BackendError, Buf};

use crate::pool::share;

/// Bytes of a cache line; the unit of alignment.
const LINE_BYTES: usize = 64;

/// Zeroed bytes that begin at a cache line, in large pages where the system has some. A step reads all
/// weights; with pages of four kilobytes it would wait for address translations.
struct Lines {
    start: NonNull<u8>,
    bytes: usize,
    /// What the allocator gave; `None` for no bytes.
    allocation: Option<Allocation>,
}

/// Memory of the global allocator.
struct Allocation {
    start: NonNull<u8>,
    layout: Layout,
}

impl Lines {
    /// Whole lines of at least `bytes` bytes. The system gives the pages when they are written for the first
    /// time: the allocator asks it for zeros, which it does only for alignments that every allocation has.
    fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        let failed = || BackendError::OutOfMemory { what, needed_bytes: bytes as u64 };
        let bytes = bytes.checked_next_multiple_of(LINE_BYTES).ok_or_else(failed)?;
        if bytes == 0 {
            return Ok(Self { start: NonNull::dangling(), bytes, allocation: None });
        }
        let needed = bytes.checked_add(LINE_BYTES).ok_or_else(failed)?;
        let layout = Layout::from_size_align(needed, align_of::<f64>()).map_err(|_| failed())?;
        // SAFETY: the layout is not empty.
        let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
        let skipped = allocated.as_ptr().align_offset(LINE_BYTES);
        // SAFETY: at most a line is skipped, and there is one more than needed.
        let start = unsafe { allocated.add(skipped) };
        advise_large_pages(start.as_ptr(), bytes);
        Ok(Self { start, bytes, allocation: Some(Allocation { start: allocated, layout }) })
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Some(Allocation { start, layout }) = &self.allocation {
            // SAFETY: the allocator gave this memory for this layout, and nothing uses it any more.
            unsafe { dealloc(start.as_ptr(), *layout) };
        }
    }
}

/// Bytes of a small page.
const PAGE_BYTES: usize = 4096;

/// Advises the system to use large pages, before the memory is written for the first time. It may ignore the
/// advice.
#[cfg(target_os = "linux")]
fn advise_large_pages(start: *mut u8, bytes: usize) {
    let skipped = start.align_offset(PAGE_BYTES);
    let whole = bytes.saturating_sub(skipped) / PAGE_BYTES * PAGE_BYTES;
    if whole >= LARGE_PAGE_BYTES {
        // SAFETY: these pages lie inside allocated memory without content; the advice changes none.
        let advised = unsafe {
            rustix::mm::madvise(start.add(skipped).cast(), whole, rustix::mm::Advice::LinuxHugepage)
        };
        if let Err(error) = advised {
            tracing::debug!(%error, "no large pages");
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_: *mut u8, _: usize) {}

/// Bytes of a large page; smaller memory has no use for them.
#[cfg(target_os = "linux")]
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// One allocation that is handed out in pieces, from its start.
pub(crate) struct Store {
    memory: Arc<SharedF32>,
    used_bytes: usize,
}

impl Store {
    /// A store of `bytes` zero bytes. Whoever fills a piece makes the system give its pages, so that several
    /// threads share that work.
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self { memory: Arc::new(SharedF32::untouched(what, bytes)?), used_bytes: 0 })
    }

    /// The next `bytes`, as a piece of their own; they start at a cache line.
    ///
    /// # Panics
    /// When the store is too small.
    pub(crate) fn take(&mut self, bytes: usize) -> Piece {
        let start = self.used_bytes;
        self.used_bytes += bytes.next_multiple_of(LINE_BYTES);
        assert!(self.used_bytes as u64 <= self.memory.bytes(), "the store is too small");
        Piece { memory: self.memory.clone(), start, bytes }
    }
}

/// A range of a [`Store`]'s memory, which it keeps alive.
pub(crate) struct Piece {
    memory: Arc<SharedF32>,
    start: usize,
    bytes: usize,
}

impl Piece {
    /// First byte, on a cache line. Like [`SharedF32::ptr`] it may be written through.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.memory.ptr().cast::<u8>().wrapping_add(self.start)
    }

    /// Bytes it has.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
}

/// f32 memory shared by the threads of a step. Threads write disjoint ranges, and a barrier lies between a
/// write and any access to the same range by another thread.
pub(crate) struct SharedF32 {
    lines: Lines,
}

// SAFETY: the memory is accessed through raw pointers only, whose users keep the rule above; it belongs to no
// thread.
unsafe impl Sync for SharedF32 {}
// SAFETY: as above.
unsafe impl Send for SharedF32 {}

impl SharedF32 {
    /// `len` zeros.
    pub(crate) fn new(what: &'static str, len: usize) -> Result<Self, BackendError> {
        let bytes = len.checked_mul(size_of::<f32>());
        let bytes = bytes.ok_or(BackendError::OutOfMemory { what, needed_bytes: u64::MAX })?;
        let memory = Self::untouched(what, bytes)?;
        memory.touch(1, 0);
        Ok(memory)
    }

    /// `bytes` zero bytes, whose pages the system gives when they are written for the first time.
    pub(crate) fn untouched(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self { lines: Lines::new(what, bytes)? })
    }

    /// Makes the system give the pages of thread `number`'s share of new memory, so that no step waits for
    /// them.
    pub(crate) fn touch(&self, threads: usize, number: usize) {
        let own = share(self.lines.bytes, threads, number);
        for at in own.clone().step_by(PAGE_BYTES).chain(own.last()) {
            // SAFETY: the byte is inside the memory, which is new: it holds zeros, and no thread reads it.
            unsafe { self.lines.start.as_ptr().add(at).write_volatile(0) };
        }
    }

    /// First value. It may be written through, from several threads.
    pub(crate) fn ptr(&self) -> *mut f32 {
        self.lines.start.as_ptr().cast()
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        self.lines.bytes as u64
    }

    /// Bytes that `len` values take.
    pub(crate) const fn bytes_of(len: usize) -> u64 {
        let line_bytes = LINE_BYTES as u64;
        (len as u64).saturating_mul(size_of::<f32>() as u64).div_ceil(line_bytes).saturating_mul(line_bytes)
    }

    /// First value of a buffer's row.
    ///
    /// # Safety
    /// This is the arena of the buffer's plan, and `row` is below the plan's limit for the buffer's rows.
    pub(crate) unsafe fn row(&self, buf: Buf, row: usize) -> *mut f32 {
        // SAFETY: the plan placed the row inside the arena.
        unsafe { self.ptr().add(buf.offset / size_of::<f32>() + row * buf.stride) }
    }
}
