//! A model in the cache, and its files with the leases that keep them there.

use std::sync::Arc;

use crate::cache::CacheDir;
use crate::digest::{Digest, NamedDigest};
use crate::lock::Lease;
use crate::select::{ModelFile, Resolved};
use crate::unpack::CachedFile;

/// A model in the cache. Its files stay there while this or a clone of it lives.
#[derive(Debug, Clone)]
pub struct Fetched {
    resolved: Resolved,
    digest: Digest,
    version: Option<String>,
    leases: Arc<Vec<Lease>>,
}

impl Fetched {
    /// The files, by the names that the source gives them.
    pub fn resolved(&self) -> &Resolved {
        &self.resolved
    }

    /// The model's digest; every byte was read for it.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The commit, or the digest of the artifact, that the revision stood for.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    pub(crate) fn of(files: Vec<ReadyFile>, version: Option<String>) -> Self {
        let named: Vec<NamedDigest<'_>> =
            files.iter().map(|file| NamedDigest { name: &file.name, digest: &file.digest }).collect();
        let digest = Digest::of_files(&named);
        let (mut model, mut leases) = (Vec::new(), Vec::new());
        for file in files {
            let path = file.lease.path().to_owned();
            model.push(ModelFile { name: file.name, path, bytes: file.bytes });
            leases.push(file.lease);
        }
        Self { resolved: Resolved::of(model), digest, version, leases: Arc::new(leases) }
    }

    /// The files for a record: a blob's name is its digest.
    pub(crate) fn files_of_record(&self, cache: &CacheDir) -> Vec<CachedFile> {
        let files = self.resolved.files().iter().zip(self.leases.iter()).map(|(file, lease)| {
            let digest = lease.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
            debug_assert!(
                Digest::from_hex(&digest).is_some_and(|digest| cache.blob_path(&digest) == file.path)
            );
            CachedFile { name: file.name.clone(), bytes: file.bytes, sha256: digest }
        });
        files.collect()
    }
}

/// A file that is in the cache, whole.
pub(crate) struct ReadyFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) digest: Digest,
    pub(crate) lease: Lease,
}
