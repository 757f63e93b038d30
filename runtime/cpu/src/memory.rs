//! Aligned memory that several threads write at once, each its own part.

use std::{cell::UnsafeCell, sync::Arc};

use trustformers_plan::{BackendError, Buf};

/// One cache line; the unit of alignment.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes that start at a cache line, in large pages where the system has some: a step reads all weights, and with
/// pages of four kilobytes waits for translations.
fn lines(what: &'static str, bytes: usize) -> Result<Vec<Line>, BackendError> {
    let count = bytes.div_ceil(64);
    let mut lines: Vec<Line> = Vec::new();
    lines
        .try_reserve_exact(count)
        .map_err(|_| BackendError::OutOfMemory { what, needed_bytes: bytes as u64 })?;
    ask_for_large_pages(lines.as_mut_ptr().cast(), count * size_of::<Line>());
    lines.resize(count, Line([0; 64]));
    Ok(lines)
}

/// Advises the system before the memory is touched for the first time; what comes of it is the system's business.
#[cfg(target_os = "linux")]
fn ask_for_large_pages(start: *mut u8, bytes: usize) {
    const PAGE: usize = 4096;
    let skipped = start.align_offset(PAGE);
    let whole = bytes.saturating_sub(skipped) / PAGE * PAGE;
    if whole >= LARGE_PAGE {
        // SAFETY: these pages lie inside memory that was allocated and holds nothing yet; the advice changes no content.
        let advised = unsafe {
            rustix::mm::madvise(start.add(skipped).cast(), whole, rustix::mm::Advice::LinuxHugepage)
        };
        if let Err(error) = advised {
            tracing::debug!(%error, "no large pages");
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_: *mut u8, _: usize) {}

/// Bytes of a large page; smaller memory has no use for them.
#[cfg(target_os = "linux")]
const LARGE_PAGE: usize = 2 << 20;

/// Memory that several things share, given out from its start.
pub(crate) struct Store {
    memory: Arc<SharedF32>,
    taken_bytes: usize,
}

impl Store {
    /// So many bytes to give out.
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self { memory: Arc::new(SharedF32::of_bytes(what, bytes)?), taken_bytes: 0 })
    }

    /// The next `bytes`, which nobody else is given; starts at a cache line.
    ///
    /// # Panics
    /// When the store was made too small.
    pub(crate) fn take(&mut self, bytes: usize) -> Piece {
        let start = self.taken_bytes;
        self.taken_bytes += bytes.next_multiple_of(size_of::<Line>());
        assert!(self.taken_bytes as u64 <= self.memory.bytes(), "the store is too small");
        Piece { memory: self.memory.clone(), start, bytes }
    }
}

/// A part of a [`Store`], which it keeps alive.
pub(crate) struct Piece {
    memory: Arc<SharedF32>,
    start: usize,
    bytes: usize,
}

impl Piece {
    /// First byte, on a cache line.
    pub(crate) fn ptr(&self) -> *const u8 {
        self.memory.ptr().cast::<u8>().wrapping_add(self.start).cast_const()
    }

    /// Bytes it has.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its content as plain numbers.
    pub(crate) fn as_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: the store gave these bytes to this piece alone, and any bytes are a plain number; cache lines are aligned
        // for all of them.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().cast_mut().cast(), self.bytes / size_of::<T>()) }
    }
}

/// Numbers of which any bytes are one.
pub(crate) trait Plain {}
impl Plain for u8 {}
impl Plain for u16 {}

/// f32 memory shared by the threads of a step. Who may touch what, when, is the plan's business: threads write disjoint
/// parts, and a barrier lies between a write and any access to the same part by another thread.
pub(crate) struct SharedF32 {
    lines: Box<[UnsafeCell<Line>]>,
}

// SAFETY: the memory is plain numbers, and only reached through raw pointers whose users keep the rule above.
unsafe impl Sync for SharedF32 {}

impl SharedF32 {
    /// `len` zeros.
    pub(crate) fn new(what: &'static str, len: usize) -> Result<Self, BackendError> {
        let bytes = len.checked_mul(size_of::<f32>());
        let bytes = bytes.ok_or(BackendError::OutOfMemory { what, needed_bytes: u64::MAX })?;
        Ok(Self { lines: lines(what, bytes)?.into_iter().map(UnsafeCell::new).collect() })
    }

    /// So many zero bytes.
    pub(crate) fn of_bytes(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Self::new(what, bytes.div_ceil(size_of::<f32>()))
    }

    /// First value. `UnsafeCell` makes writing through it from a shared reference legal.
    pub(crate) fn ptr(&self) -> *mut f32 {
        self.lines.as_ptr().cast_mut().cast()
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        (self.lines.len() * 64) as u64
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
