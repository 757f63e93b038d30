//! The digest of a model: the name of exactly these bytes.
//!
//! Of one file it is the file's sha256, so that it equals what `sha256sum` and model hubs print. Of several
//! it is the sha256 of their sorted lines `<sha256>  <path>`, each ending in a newline: what
//! `sha256sum FILES | LC_ALL=C sort | sha256sum` prints in the model's folder.

use std::fmt;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use crate::error::StoreError;
use crate::select::ModelFile;

/// Bytes read at once. They fit a core's second-level cache (512 KiB at least), so that they are hashed where
/// the copy out of the page cache put them. The system reads ahead whatever the length of one read.
const CHUNK_BYTES: usize = 256 * 1024;

/// A sha256 as 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Digest(String);

/// How far hashing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashProgress {
    /// Bytes hashed so far, of all files.
    pub done_bytes: u64,
    /// Bytes of all files when they were picked.
    pub total_bytes: u64,
}

impl Digest {
    /// The 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Compares with a pinned digest, which may be written in either case and with `sha256:` before it.
    ///
    /// # Errors
    /// [`StoreError::InvalidPin`] for a pin that is no sha256, [`StoreError::DigestMismatch`] with both.
    pub fn check_pin(&self, pin: &str) -> Result<(), StoreError> {
        let Some(Self(expected)) = Self::from_hex(pin) else {
            return Err(StoreError::InvalidPin { found: pin.to_owned() });
        };
        if expected == self.0 {
            Ok(())
        } else {
            Err(StoreError::DigestMismatch { expected, found: self.0.clone() })
        }
    }

    /// Reads 64 hex digits in either case, with or without `sha256:` before them.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let is_sha256 = digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_sha256.then(|| Self(digits.to_ascii_lowercase()))
    }

    /// The digest of these 32 bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self::from_hex(&digits)
    }

    /// The digest of a model whose files have these names and digests; at least one.
    pub(crate) fn of_files(files: &[NamedDigest<'_>]) -> Self {
        if let [only] = files {
            return only.digest.clone();
        }
        let mut lines: Vec<String> =
            files.iter().map(|file| format!("{}  {}\n", file.digest, file.name)).collect();
        lines.sort_unstable();
        let mut hasher = Sha256::new();
        for line in &lines {
            hasher.update(line.as_bytes());
        }
        Self::of(hasher)
    }

    pub(crate) fn of_text(text: &str) -> Self {
        Self::of_bytes(text.as_bytes())
    }

    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self::of(Sha256::new_with_prefix(bytes))
    }

    pub(crate) fn of(hasher: Sha256) -> Self {
        let mut text = String::with_capacity(64);
        for byte in hasher.finalize() {
            // Writing into a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }
}

/// A file of a model as it counts in the model's digest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NamedDigest<'a> {
    pub(crate) name: &'a str,
    pub(crate) digest: &'a Digest,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn hash_files(
    files: &[ModelFile],
    total_bytes: u64,
    progress: &mut dyn FnMut(HashProgress) -> ControlFlow<()>,
) -> Result<Digest, StoreError> {
    let mut done_bytes = 0;
    let mut digests = Vec::with_capacity(files.len());
    for file in files {
        digests.push(hash_file(&file.path, &mut |bytes| {
            done_bytes += bytes;
            progress(HashProgress { done_bytes, total_bytes })
        })?);
    }
    let named = files.iter().zip(&digests).map(|(file, digest)| NamedDigest { name: &file.name, digest });
    Ok(Digest::of_files(&named.collect::<Vec<_>>()))
}

/// Opens a file without waiting: opening a pipe would otherwise wait for its other end, and what was a file
/// when it was picked may be a pipe by now. On regular files the flag has no effect.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)
}

/// Reads a file of the length that it has when it is opened. One that grows all the time would never end.
pub(crate) fn hash_file(
    path: &Path,
    read_bytes: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Digest, StoreError> {
    let io = |error| StoreError::io(path, error);
    let mut file = open(path).map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        return Err(StoreError::NotAFile { path: path.to_owned() });
    }
    let mut left_bytes = about.len();
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(Digest::of(hasher)),
            Ok(count) => {
                hasher.update(&chunk[..count]);
                left_bytes = left_bytes
                    .checked_sub(count as u64)
                    .ok_or_else(|| StoreError::Changed { path: path.to_owned() })?;
                if read_bytes(count as u64).is_break() {
                    return Err(StoreError::Stopped);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(StoreError::io(path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use std::fs;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn digest(files: &[(&str, &[u8])], patterns: &[&str]) -> Digest {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        let resolved = Source::from_path(folder.path()).resolve(&patterns).unwrap();
        resolved.digest(&mut |_| {}).unwrap()
    }

    #[test]
    fn one_file_has_its_own_sha256() {
        assert_eq!(digest(&[("m.gguf", b"abc")], &[]).as_str(), ABC);
        assert_eq!(digest(&[("m.gguf", b"")], &[]).as_str(), EMPTY);
    }

    #[test]
    fn several_files_have_the_sha256_of_their_sorted_lines() {
        // printf '%s  b\n%s  a\n' ba78... e3b0... | LC_ALL=C sort | sha256sum
        let found = digest(&[("a", b""), ("b", b"abc")], &["*"]);
        let mut hasher = Sha256::new();
        hasher.update(format!("{ABC}  b\n{EMPTY}  a\n"));
        assert_eq!(found, Digest::of(hasher), "lines are sorted by digest, not by name");
        assert_ne!(digest(&[("a", b""), ("c", b"abc")], &["*"]), found, "names count");
    }

    #[test]
    fn progress_ends_at_the_total() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("m.gguf"), vec![7; CHUNK_BYTES + 5]).unwrap();
        let resolved = Source::from_path(folder.path()).resolve(&[]).unwrap();
        let mut seen = Vec::new();
        resolved.digest(&mut |progress| seen.push(progress)).unwrap();
        assert!(seen.len() >= 2 && seen.is_sorted_by_key(|progress| progress.done_bytes));
        let total_bytes = resolved.total_bytes();
        assert_eq!(seen.last(), Some(&HashProgress { done_bytes: total_bytes, total_bytes }));
    }

    #[test]
    fn reading_ends_where_nobody_wants_the_digest_any_more() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("m.gguf"), vec![7; 3 * CHUNK_BYTES]).unwrap();
        let resolved = Source::from_path(folder.path()).resolve(&[]).unwrap();
        let mut calls = 0;
        let stopped = resolved.digest_while(&mut |_| {
            calls += 1;
            ControlFlow::Break(())
        });
        assert!(matches!(stopped, Err(StoreError::Stopped)));
        assert_eq!(calls, 1);
    }

    #[test]
    fn a_file_that_grows_while_it_is_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, vec![7; CHUNK_BYTES]).unwrap();
        let grow = |_: u64| {
            fs::write(&path, vec![7; 2 * CHUNK_BYTES]).unwrap();
            ControlFlow::Continue(())
        };
        assert!(matches!(hash_file(&path, &mut { grow }), Err(StoreError::Changed { .. })));
    }

    #[test]
    fn a_file_that_became_a_pipe_is_refused_without_waiting_for_a_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        fs::write(&path, b"abc").unwrap();
        let resolved = Source::from_path(folder.path()).resolve(&[]).unwrap();
        fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        let error = resolved.digest(&mut |_| {}).unwrap_err();
        assert!(matches!(error, StoreError::NotAFile { .. }), "{error}");
    }

    #[test]
    fn a_pin_must_be_a_sha256_and_match() {
        let found = digest(&[("m.gguf", b"abc")], &[]);
        for pin in [ABC.to_owned(), ABC.to_uppercase(), format!("sha256:{ABC}")] {
            found.check_pin(&pin).unwrap();
        }
        let error = found.check_pin(EMPTY).unwrap_err();
        assert!(
            matches!(&error, StoreError::DigestMismatch { expected, found } if expected == EMPTY && found == ABC)
        );
        for pin in ["", "abc", &ABC[1..], "sha256:xyz"] {
            assert!(matches!(found.check_pin(pin), Err(StoreError::InvalidPin { .. })), "{pin}");
        }
    }
}
