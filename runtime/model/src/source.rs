//! A model file in memory: read once, then mapped.
//!
//! The file is read from start to end before it is mapped. That fills the page cache at the storage's full
//! speed, gives an exact progress, and a failing disk becomes an error here instead of a bus error inside a
//! step later.

use crate::error::LoadError;
use memmap2::Mmap;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use trustformers_plan::WeightBytes;

/// Bytes of one read: large enough for network storage, small beside a model.
const CHUNK_BYTES: usize = 1 << 20;

/// How far reading a file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadProgress {
    /// Bytes read so far; never falls and ends at `total_bytes`.
    pub bytes: u64,
    /// The file's size.
    pub total_bytes: u64,
}

/// Called after each chunk that was read; says whether to go on.
pub type OnRead<'a> = dyn FnMut(ReadProgress) -> ControlFlow<()> + 'a;

/// Opens a regular file and gives its size in bytes. It never waits: opening a pipe would otherwise wait for
/// its other end. On regular files the flag has no effect.
pub(crate) fn open_file(path: &Path) -> Result<(File, u64), LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), action: "opened", source };
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        return Err(LoadError::NotAFile { path: path.to_owned() });
    }
    Ok((file, about.len()))
}

/// Reads and maps a file.
pub(crate) fn open(path: &Path, progress: &mut OnRead<'_>) -> Result<WeightBytes, LoadError> {
    let io = |action, source| LoadError::Io { path: path.to_owned(), action, source };
    let (mut file, total_bytes) = open_file(path)?;
    let mut report = |bytes| match progress(ReadProgress { bytes, total_bytes }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(LoadError::Stopped),
    };
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    report(bytes)?;
    loop {
        let count = file.read(&mut chunk).map_err(|error| io("read", error))?;
        if count == 0 {
            break;
        }
        // The file may grow while it is read; the progress still ends at the total.
        bytes = (bytes + count as u64).min(total_bytes);
        report(bytes)?;
    }
    if total_bytes == 0 {
        // An empty file cannot be mapped; the parser says what is wrong with it.
        return Ok(Arc::new(Vec::new()));
    }
    // SAFETY: the mapping is private and only ever read. Model files are replaced by renaming, never written
    // in place (the documented rule for every source); a file that is truncated under a running server would
    // end the process with SIGBUS, never corrupt it.
    let mapped = unsafe { Mmap::map(&file) }.map_err(|error| io("mapped", error))?;
    Ok(Arc::new(mapped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn progress_rises_to_the_file_size() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&content).unwrap();
        let mut seen = Vec::new();
        let source = open(file.path(), &mut |p| {
            seen.push(p);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!((*source).as_ref(), content);
        assert!(seen.len() > 3 && seen.is_sorted_by_key(|p| p.bytes));
        assert_eq!(seen[0].bytes, 0);
        assert_eq!(seen.last().unwrap().bytes, 3_000_000);
        assert!(seen.iter().all(|p| p.total_bytes == 3_000_000));
    }

    #[test]
    fn reading_ends_where_nobody_wants_the_model_any_more() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; 3 * CHUNK_BYTES]).unwrap();
        let mut calls = 0;
        let stopped = open(file.path(), &mut |read| {
            calls += 1;
            if read.bytes == 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        assert!(matches!(stopped, Err(LoadError::Stopped)));
        assert_eq!(calls, 2, "it stops after the first chunk");
    }

    #[test]
    fn other_paths_than_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe.gguf");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let opened = |path: &Path| open(path, &mut |_| ControlFlow::Continue(()));
        for path in [folder.path(), &pipe] {
            let error = opened(path).err().unwrap();
            assert!(matches!(error, LoadError::NotAFile { .. }) && !error.is_transient());
        }
        let error = opened(&folder.path().join("absent.gguf")).err().unwrap();
        assert!(
            error.is_transient() && error.to_string().contains("absent.gguf: cannot be opened"),
            "{error}"
        );
    }
}
