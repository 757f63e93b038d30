//! A model file in memory: read once, then mapped.
//!
//! The file is read from start to end before it is mapped. That fills the page cache at the storage's full
//! speed, gives an exact progress, and a failing disk becomes an error here instead of a bus error inside a
//! step later.

use crate::error::LoadError;
use memmap2::Mmap;
use std::fs::File;
use std::io::Read;
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

/// Reads and maps a file.
pub(crate) fn open(path: &Path, progress: &mut dyn FnMut(ReadProgress)) -> Result<WeightBytes, LoadError> {
    let io = |action, source| LoadError::Io { path: path.to_owned(), action, source };
    let mut file = File::open(path).map_err(|error| io("opened", error))?;
    let about = file.metadata().map_err(|error| io("opened", error))?;
    if !about.is_file() {
        return Err(LoadError::NotAFile { path: path.to_owned() });
    }
    let total_bytes = about.len();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    progress(ReadProgress { bytes, total_bytes });
    loop {
        let count = file.read(&mut chunk).map_err(|error| io("read", error))?;
        if count == 0 {
            break;
        }
        // The file may grow while it is read; the progress still ends at the total.
        bytes = (bytes + count as u64).min(total_bytes);
        progress(ReadProgress { bytes, total_bytes });
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
        let source = open(file.path(), &mut |p| seen.push(p)).unwrap();
        assert_eq!((*source).as_ref(), content);
        assert!(seen.len() > 3 && seen.is_sorted_by_key(|p| p.bytes));
        assert_eq!(seen[0].bytes, 0);
        assert_eq!(seen.last().unwrap().bytes, 3_000_000);
        assert!(seen.iter().all(|p| p.total_bytes == 3_000_000));
    }

    #[test]
    fn other_paths_than_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path(), &mut |_| {}).err().unwrap();
        assert!(matches!(error, LoadError::NotAFile { .. }) && !error.is_transient());
        let error = open(&folder.path().join("absent.gguf"), &mut |_| {}).err().unwrap();
        assert!(
            error.is_transient() && error.to_string().contains("absent.gguf: cannot be opened"),
            "{error}"
        );
    }
}
