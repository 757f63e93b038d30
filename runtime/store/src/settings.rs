//! What fetching may use and how long it waits: credentials and addresses by their usual names, and limits.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Credentials and addresses by the names that the tools of each kind of source use: `HF_TOKEN`,
/// `AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS` and so on. A mounted Secret goes before the
/// environment: each of its keys is a file of that name.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    secret_dir: Option<PathBuf>,
}

impl fmt::Debug for Environment {
    /// Without values: they are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").field("secret_dir", &self.secret_dir).finish_non_exhaustive()
    }
}

impl Environment {
    /// The process's own environment, read now.
    pub fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self { variables: std::env::vars_os().filter_map(text).collect(), secret_dir: None }
    }

    /// These variables alone.
    pub fn from_variables<K: Into<String>, V: Into<String>>(
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { variables, secret_dir: None }
    }

    /// With a folder in which each file is a variable. Files are read when they are needed, so that a Secret
    /// that is rotated counts without a restart.
    #[must_use]
    pub fn with_secret_dir(mut self, folder: Option<PathBuf>) -> Self {
        self.secret_dir = folder;
        self
    }

    /// The value of the first of `names` that has one. White space around it is left out, because files end
    /// in a newline.
    pub(crate) fn first(&self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| self.get(name))
    }

    pub(crate) fn get(&self, name: &str) -> Option<String> {
        let file = self.secret_file(name).and_then(|path| std::fs::read_to_string(path).ok());
        let value = file.or_else(|| self.variables.get(name).cloned())?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// The file of the Secret that has this name.
    pub(crate) fn secret_file(&self, name: &str) -> Option<PathBuf> {
        self.secret_dir.as_deref().map(|folder| folder.join(name)).filter(|path| Path::is_file(path))
    }

    /// An address that replaces a service's own, without a slash at its end.
    pub(crate) fn endpoint(&self, names: &[&str]) -> Option<String> {
        self.first(names).map(|address| address.trim_end_matches('/').to_owned())
    }
}

/// How long fetching waits, how often it tries again, and in which pieces it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchLimits {
    /// The most requests at the same time for one file. One alone where the source sends faster than this
    /// machine takes its bytes.
    pub connections: usize,
    /// What is lost of a transfer when the process is killed, for each connection.
    pub chunk_bytes: u64,
    /// The most that one request asks for. Several at a time ask for less of a small file: see
    /// [`Self::request_bytes_of`].
    pub request_bytes: u64,
    /// Longest time without a byte.
    pub stall_timeout: Duration,
    /// Longest time until a connection stands.
    pub connect_timeout: Duration,
    /// Attempts in a row that bring no byte, the first included.
    pub attempts: usize,
    /// First pause before another attempt; it doubles.
    pub first_delay: Duration,
    /// Longest pause.
    pub longest_delay: Duration,
    /// Files of one model at the same time.
    pub files: usize,
}

/// The requests that run at a time cover at most this share of a file, `1 / 16`. A sha256 is computed in
/// order, so that bytes behind the first gap wait to be hashed: what waits when the last byte arrives is
/// hashed after the transfer.
const WINDOWS_OF_A_FILE: u64 = 16;

impl FetchLimits {
    /// The most that each of several requests asks for of a file of this length.
    pub(crate) fn request_bytes_of(&self, total_bytes: u64) -> u64 {
        let share = total_bytes / (WINDOWS_OF_A_FILE * self.connections.max(1) as u64);
        share.min(self.request_bytes).max(self.chunk_bytes)
    }
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            // One connection rarely fills a link of 10 Gbit/s; object stores recommend 8 to 16.
            connections: 8,
            // 8 connections lose 32 MiB at most, and 100 GiB have 25,600 chunks, a byte each in the journal.
            chunk_bytes: 4 << 20,
            // 100 GiB are 1,600 requests: hubs count requests, and each is redirected once more.
            request_bytes: 64 << 20,
            stall_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            // 0.5, 1, 2, 4 and 8 s: a restart of the other side is waited for, a dead one ends in 16 s.
            attempts: 6,
            first_delay: Duration::from_millis(500),
            longest_delay: Duration::from_secs(30),
            // One is hashed to its end while the next one arrives; a core hashes 1 to 2 GB/s.
            files: 2,
        }
    }
}

/// Where fetched files are kept, and with what they are fetched.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The cache directory; made where it is missing. Several processes may share it.
    pub cache_dir: PathBuf,
    /// Files that nothing uses are removed, the least recently used first, before the cache becomes larger.
    /// None: only where the volume would be full.
    pub max_cache_bytes: Option<u64>,
    /// Credentials and addresses.
    pub environment: Environment,
    /// Times and sizes.
    pub limits: FetchLimits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_small_beside_their_file_and_bounded() {
        let limits = FetchLimits::default();
        for (total_mib, request_mib) in [(1, 4), (512, 4), (1024, 8), (8 << 10, 64), (100 << 10, 64)] {
            assert_eq!(limits.request_bytes_of(total_mib << 20), request_mib << 20, "{total_mib} MiB");
        }
        let none = FetchLimits { connections: 0, ..limits };
        assert_eq!(none.request_bytes_of(512 << 20), 32 << 20);
    }

    #[test]
    fn a_file_of_the_secret_goes_before_the_variable_and_is_read_anew() {
        let folder = tempfile::tempdir().unwrap();
        let environment = Environment::from_variables([("HF_TOKEN", "old"), ("EMPTY", " ")])
            .with_secret_dir(Some(folder.path().to_owned()));
        assert_eq!(environment.first(&["EMPTY", "HF_TOKEN"]).as_deref(), Some("old"));
        std::fs::write(folder.path().join("HF_TOKEN"), "new\n").unwrap();
        assert_eq!(environment.get("HF_TOKEN").as_deref(), Some("new"));
        assert!(!format!("{environment:?}").contains("old"));
    }
}
