//! Sources of every kind against servers on loopback, which cut, stall, corrupt and refuse.
#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod buckets;
mod cache;
mod hugging_face;
mod registry;
mod server;
mod web;

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use trustformers_store::{
    Environment, FetchLimits, FetchProgress, FetchRequest, Fetched, Source, Store, StoreError, StoreSettings,
};

/// Small chunks and short waits, so that a file of a MiB takes every path.
pub(crate) const LIMITS: FetchLimits = FetchLimits {
    connections: 4,
    chunk_bytes: 64 << 10,
    request_bytes: 256 << 10,
    stall_timeout: Duration::from_millis(400),
    connect_timeout: Duration::from_secs(2),
    attempts: 3,
    first_delay: Duration::from_millis(1),
    longest_delay: Duration::from_millis(5),
    files: 2,
};

pub(crate) fn store(cache: &Path, environment: Environment) -> Store {
    store_with(cache, environment, LIMITS)
}

pub(crate) fn store_with(cache: &Path, environment: Environment, limits: FetchLimits) -> Store {
    let cache_dir = cache.to_owned();
    Store::open(StoreSettings { cache_dir, max_cache_bytes: None, environment, limits }).unwrap()
}

/// What a test fetches.
#[derive(Clone, Copy, Default)]
pub(crate) struct Wanted<'a> {
    pub(crate) uri: &'a str,
    pub(crate) revision: Option<&'a str>,
    pub(crate) files: &'a [&'a str],
    pub(crate) sha256: Option<&'a str>,
}

pub(crate) async fn fetch(store: &Store, wanted: Wanted<'_>) -> Result<Fetched, StoreError> {
    watched(store, wanted, watch::channel(FetchProgress::default()).0).await
}

pub(crate) async fn watched(
    store: &Store,
    wanted: Wanted<'_>,
    progress: watch::Sender<FetchProgress>,
) -> Result<Fetched, StoreError> {
    let source = wanted.uri.parse::<Source>()?.with_revision(wanted.revision)?;
    let files: Vec<String> = wanted.files.iter().map(ToString::to_string).collect();
    let source = source.remote().unwrap();
    store.fetch(&FetchRequest { source, files: &files, sha256: wanted.sha256 }, progress).await
}

/// The names and contents of what was fetched.
pub(crate) fn contents(fetched: &Fetched) -> Vec<NamedContent> {
    let files = fetched.resolved().files().iter();
    files
        .map(|file| NamedContent { name: file.name.clone(), bytes: std::fs::read(&file.path).unwrap() })
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NamedContent {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

impl NamedContent {
    pub(crate) fn new(name: &str, bytes: &[u8]) -> Self {
        Self { name: name.to_owned(), bytes: bytes.to_vec() }
    }
}

/// Bytes without a period, so that a range at a wrong position shows.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
