//! Aligned memory that several threads write at once, each its own part.

use std::cell::UnsafeCell;

use trustformers_plan::{BackendError, Buf};

/// One cache line; the unit of alignment.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Zeroed bytes that start at a cache line.
pub(crate) fn lines(what: &'static str, bytes: usize) -> Result<Vec<Line>, BackendError> {
    let count = bytes.div_ceil(64);
    let mut lines = Vec::new();
    lines
        .try_reserve_exact(count)
        .map_err(|_| BackendError::OutOfMemory { what, needed_bytes: bytes as u64 })?;
    lines.resize(count, Line([0; 64]));
    Ok(lines)
}

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
