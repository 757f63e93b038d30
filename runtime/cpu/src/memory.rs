//! Aligned memory that several threads write at the same time, each its own range.

use std::{cell::UnsafeCell, sync::Arc};

use trustformers_plan::{BackendError, Buf};

/// One cache line; the unit of alignment.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes that start at a cache line, in large pages where the system has some. A step reads all
/// weights; with pages of four kilobytes it would wait for address translations.
fn lines(what: &'static str, bytes: usize) -> Result<Vec<Line>, BackendError> {
    let count = bytes.div_ceil(64);
    let mut lines: Vec<Line> = Vec::new();
    lines
        .try_reserve_exact(count)
        .map_err(|_| BackendError::OutOfMemory { what, needed_bytes: bytes as u64 })?;
    advise_large_pages(lines.as_mut_ptr().cast(), count * size_of::<Line>());
    lines.resize(count, Line([0; 64]));
    Ok(lines)
}

/// Advises the system to use large pages, before the memory is written for the first time. It may ignore the
/// advice.
#[cfg(target_os = "linux")]
fn advise_large_pages(start: *mut u8, bytes: usize) {
    const PAGE_BYTES: usize = 4096;
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
    /// A store of `bytes` bytes.
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Ok(Self { memory: Arc::new(SharedF32::of_bytes(what, bytes)?), used_bytes: 0 })
    }

    /// The next `bytes`, as a piece of their own; they start at a cache line.
    ///
    /// # Panics
    /// When the store is too small.
    pub(crate) fn take(&mut self, bytes: usize) -> Piece {
        let start = self.used_bytes;
        self.used_bytes += bytes.next_multiple_of(size_of::<Line>());
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
    /// First byte, on a cache line.
    pub(crate) fn ptr(&self) -> *const u8 {
        self.memory.ptr().cast::<u8>().wrapping_add(self.start).cast_const()
    }

    /// Bytes it has.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its content as numbers.
    pub(crate) fn as_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: the store gave these bytes to this piece only; any bytes are a valid number, and cache
        // lines are aligned for all number types.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().cast_mut().cast(), self.bytes / size_of::<T>()) }
    }
}

/// Numbers for which any bytes are valid.
pub(crate) trait Plain {}
impl Plain for u8 {}
impl Plain for u16 {}

/// f32 memory shared by the threads of a step. Threads write disjoint ranges, and a barrier lies between a
/// write and any access to the same range by another thread.
pub(crate) struct SharedF32 {
    lines: Box<[UnsafeCell<Line>]>,
}

// SAFETY: the memory is accessed through raw pointers only, whose users keep the rule above.
unsafe impl Sync for SharedF32 {}

impl SharedF32 {
    /// `len` zeros.
    pub(crate) fn new(what: &'static str, len: usize) -> Result<Self, BackendError> {
        let bytes = len.checked_mul(size_of::<f32>());
        let bytes = bytes.ok_or(BackendError::OutOfMemory { what, needed_bytes: u64::MAX })?;
        Ok(Self { lines: lines(what, bytes)?.into_iter().map(UnsafeCell::new).collect() })
    }

    /// `bytes` zero bytes.
    pub(crate) fn of_bytes(what: &'static str, bytes: usize) -> Result<Self, BackendError> {
        Self::new(what, bytes.div_ceil(size_of::<f32>()))
    }

    /// First value. `UnsafeCell` makes writing through it from a shared reference legal.
    pub(crate) fn ptr(&self) -> *mut f32 {
        self.lines.as_ptr().cast_mut().cast()
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        (self.lines.len() * size_of::<Line>()) as u64
    }

    /// Bytes that `len` values take.
    pub(crate) const fn bytes_of(len: usize) -> u64 {
        let line_bytes = size_of::<Line>() as u64;
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
