//! Why a model's files could not be found, fetched, read or trusted.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::source::SUPPORTED;

/// Why a source gave no model. Each names the path or the value and the next step.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The scheme is one that this program cannot read.
    #[error(
        "{scheme}:// sources cannot be read by this version (found {text:?}); supported are: {SUPPORTED}"
    )]
    UnsupportedScheme {
        /// The scheme, without `://`.
        scheme: String,
        /// The whole source.
        text: String,
    },
    /// A source that cannot be read as what its scheme says.
    #[error("{text:?} is not a source: {why}; write {form}")]
    InvalidUri {
        /// The whole source.
        text: String,
        /// What is wrong.
        why: &'static str,
        /// What to write instead.
        form: &'static str,
    },
    /// A revision was given for a kind of source that has none.
    #[error("revision: {text} has no revisions; leave it out (hf:// has branches, tags and commits)")]
    RevisionNotSupported {
        /// The whole source.
        text: String,
    },
    /// A remote source where only files of this machine can be read.
    #[error(
        "{text} must be fetched, and there is no cache directory for it; set TRUSTFORMERS_CACHE_DIR, or \
         model.fetch.cacheDir of a pod"
    )]
    NotFetched {
        /// The whole source.
        text: String,
    },
    /// Nothing lies at the path.
    #[error("{} does not exist; check the path, or that the volume holds the model", path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The path is neither a file nor a folder: a pipe, a socket or a device, which may never end.
    #[error("{} is neither a file nor a folder (a pipe, a socket or a device); name the model's file or folder", path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// The file changed while it was read.
    #[error("{} became longer while it was read; load it again once it is written completely", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Whoever wanted the digest wants it no more.
    #[error("reading was stopped")]
    Stopped,
    /// A pattern cannot be read.
    #[error("files: the pattern {pattern:?} cannot be read: {why}")]
    InvalidPattern {
        /// The pattern.
        pattern: String,
        /// What the parser said.
        why: String,
    },
    /// Patterns were given for a source that is one file.
    #[error("{} is a file, so \"files\" has nothing to pick from; leave it out or name the folder", path.display())]
    PatternsForFile {
        /// The file.
        path: PathBuf,
    },
    /// A pattern picks nothing.
    #[error("files: {pattern:?} matches nothing in {}; it holds: {}", folder.display(), list(holds))]
    NothingMatches {
        /// The pattern.
        pattern: String,
        /// The folder.
        folder: PathBuf,
        /// What the folder holds, cut after the first few.
        holds: Vec<String>,
    },
    /// The folder has no model file.
    #[error("{} holds no .gguf file and no model.safetensors; it holds: {}", folder.display(), list(holds))]
    NoModelFile {
        /// The folder.
        folder: PathBuf,
        /// What the folder holds, cut after the first few.
        holds: Vec<String>,
    },
    /// The folder has the weights of a model in a form that is not read.
    #[error(
        "{} holds the weights as {found}, which cannot be read by this version: save the model as one file \
         model.safetensors, with save_pretrained(folder, max_shard_size=\"1000GB\", safe_serialization=True)",
        folder.display()
    )]
    OtherWeights {
        /// The folder.
        folder: PathBuf,
        /// One of the files of weights.
        found: String,
    },
    /// The folder has several model files and nothing selects one.
    #[error(
        "{} holds several .gguf files that are not all the parts of one model; pick one with \"files\" or by its path: {}",
        folder.display(),
        list(found)
    )]
    SeveralModelFiles {
        /// The folder.
        folder: PathBuf,
        /// The candidates.
        found: Vec<String>,
    },
    /// The folder has more entries than any model.
    #[error("{} holds more than {limit} files; name the model's own folder", folder.display())]
    TooManyFiles {
        /// The folder.
        folder: PathBuf,
        /// Entries that are looked at.
        limit: usize,
    },
    /// A name that is not text cannot be matched or listed.
    #[error("{} has a name that is not UTF-8; rename it", path.display())]
    NameNotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// The pin is not a sha256.
    #[error("sha256: {found:?} is not a sha256; give its 64 hex digits, lower case")]
    InvalidPin {
        /// What was given.
        found: String,
    },
    /// The bytes are not the ones that were pinned.
    #[error(
        "the model's digest is {found}, but {expected} is pinned: the source has changed or is damaged; fetch it \
         again, or change the pin if the new bytes are wanted"
    )]
    DigestMismatch {
        /// The pin, 64 hex digits.
        expected: String,
        /// What the bytes give, 64 hex digits.
        found: String,
    },
    /// The name of the host has no address.
    #[error(
        "the host {host} is not known to DNS; check the source's spelling and the network policy for DNS"
    )]
    UnknownHost {
        /// The host.
        host: String,
    },
    /// No connection, or it was lost before the answer.
    #[error("{host} cannot be reached ({why}); check that the host runs and that egress to it is allowed")]
    Unreachable {
        /// The host.
        host: String,
        /// What the system said.
        why: String,
    },
    /// The other side's certificate is not trusted, or TLS failed otherwise.
    #[error(
        "TLS with {host} failed ({why}); for a private certificate authority, mount its PEM file and set SSL_CERT_FILE"
    )]
    Tls {
        /// The host.
        host: String,
        /// What TLS said.
        why: String,
    },
    /// 401: no credentials, or wrong ones.
    #[error("{host} asks for credentials for {what}, or refuses those that it got (401); {fix}")]
    Unauthorized {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// Which credentials this kind of source takes.
        fix: &'static str,
    },
    /// 403: these credentials may not read it.
    #[error("{host} does not allow reading {what} (403): {why}; grant read access, or {fix}")]
    AccessDenied {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// What the server said.
        why: String,
        /// Which credentials this kind of source takes.
        fix: &'static str,
    },
    /// 404: it does not exist there.
    #[error("{host} has no {what} (404); check its spelling and the revision")]
    NotAtSource {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// 429 or 503: later.
    #[error("{host} is busy ({status}); it is asked again")]
    Busy {
        /// The host.
        host: String,
        /// The status.
        status: u16,
        /// How long the server wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// Another answer than was asked for.
    #[error("{host} answered {status} for {what}: {why}")]
    ServerFailed {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// The status.
        status: u16,
        /// What the server said.
        why: String,
    },
    /// An answer that cannot be understood.
    #[error(
        "the answer of {host} for {what} cannot be used: {why}; check that the address is that of {expected}"
    )]
    InvalidAnswer {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with the answer.
        why: String,
        /// The kind of server that the source should be.
        expected: &'static str,
    },
    /// No byte for the allowed time.
    #[error("{host} sent nothing of {what} for {seconds} s; the transfer resumes where it stopped")]
    Stalled {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
        /// The allowed time.
        seconds: u64,
    },
    /// The connection ended before all bytes had come.
    #[error(
        "the connection to {host} ended before all of {what} had come; the transfer resumes where it stopped"
    )]
    Interrupted {
        /// The host.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The remote file is another one than when it was listed.
    #[error("{what} changed at its source while it was fetched; it is fetched again from the start")]
    SourceChanged {
        /// The file.
        what: String,
    },
    /// A file whose bytes are not those that its source names.
    #[error(
        "{what} has the digest {found}, but its source says {expected}: the bytes were damaged on the way or at the \
         source; nothing of it was kept"
    )]
    WrongBytes {
        /// The file.
        what: String,
        /// What the source says.
        expected: String,
        /// What the bytes give.
        found: String,
    },
    /// Less free space than the files need.
    #[error(
        "{} has {free_bytes} bytes free and the model needs {needed_bytes} more; enlarge the volume, or free space on it",
        path.display()
    )]
    DiskFull {
        /// The cache directory.
        path: PathBuf,
        /// Bytes that the missing files need.
        needed_bytes: u64,
        /// Bytes free after everything unused was removed.
        free_bytes: u64,
    },
    /// The cache directory cannot be used.
    #[error("the cache {} cannot be used ({action}): {source}; it must be a writable volume with file locks", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Credentials that cannot be used.
    #[error("{name}: {why}")]
    Credentials {
        /// The variable or file.
        name: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// An artifact whose content cannot be unpacked.
    #[error("{what} cannot be unpacked: {why}")]
    InvalidArchive {
        /// The layer.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The system could not read it.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Names in a row, for a message.
fn list(names: &[String]) -> String {
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

/// Whether an error of the system is the same at each attempt.
fn lasts(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, NotADirectory, PermissionDenied};
    matches!(kind, PermissionDenied | InvalidFilename | InvalidInput | NotADirectory)
}

impl StoreError {
    /// The cause as one CamelCase word, for states and conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnsupportedScheme { .. } | Self::InvalidUri { .. } => "UnsupportedSource",
            Self::NotFound { .. } | Self::NotAtSource { .. } => "SourceNotFound",
            Self::InvalidPattern { .. } | Self::PatternsForFile { .. } | Self::InvalidPin { .. } => {
                "InvalidSource"
            }
            Self::NothingMatches { .. } | Self::NoModelFile { .. } => "ModelFileNotFound",
            Self::SeveralModelFiles { .. } => "SeveralModelFiles",
            Self::OtherWeights { .. } => "UnsupportedModel",
            Self::TooManyFiles { .. }
            | Self::NameNotUtf8 { .. }
            | Self::NotAFile { .. }
            | Self::RevisionNotSupported { .. }
            | Self::NotFetched { .. } => "InvalidSource",
            Self::Changed { .. } | Self::SourceChanged { .. } => "SourceChanged",
            Self::UnknownHost { .. } => "UnknownHost",
            Self::Unreachable { .. } => "SourceUnreachable",
            Self::Tls { .. } => "TlsFailed",
            Self::Unauthorized { .. } => "Unauthorized",
            Self::AccessDenied { .. } => "AccessDenied",
            Self::Busy { .. } => "SourceBusy",
            Self::ServerFailed { .. } | Self::InvalidAnswer { .. } => "SourceFailed",
            Self::Stalled { .. } => "SourceStalled",
            Self::Interrupted { .. } => "SourceInterrupted",
            Self::DiskFull { .. } => "DiskFull",
            Self::Cache { .. } => "CacheUnusable",
            Self::Credentials { .. } => "InvalidCredentials",
            Self::InvalidArchive { .. } => "InvalidArtifact",
            Self::Stopped => "Unloaded",
            Self::DigestMismatch { .. } | Self::WrongBytes { .. } => "DigestMismatch",
            Self::Io { .. } => "SourceUnreadable",
        }
    }

    /// Whether the same attempt may succeed later without a change by the user. A missing permission
    /// stays missing, and a name that no file can have stays wrong; a short failure of a network volume
    /// passes.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Io { source, .. } => !lasts(source.kind()),
            Self::Changed { .. }
            | Self::SourceChanged { .. }
            | Self::UnknownHost { .. }
            | Self::DiskFull { .. }
            | Self::Cache { .. } => true,
            other => other.is_retried_at_once(),
        }
    }

    /// Whether the transfer goes on after a short pause: what a network does now and then. A host without an
    /// address, a full disk and the like pass too, but not within seconds.
    pub(crate) fn is_retried_at_once(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Busy { .. }
            | Self::Stalled { .. }
            | Self::Interrupted { .. } => true,
            Self::ServerFailed { status, .. } => *status >= 500,
            _ => false,
        }
    }

    /// A failure of the cache directory; a volume that is full has its own reason.
    pub(crate) fn cache(path: impl Into<PathBuf>, action: &'static str, source: io::Error) -> Self {
        let path = path.into();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Self::DiskFull { path, needed_bytes: 1, free_bytes: 0 };
        }
        Self::Cache { path, action, source }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::NotFound {
            Self::NotFound { path }
        } else {
            Self::Io { path, source }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_read_error_that_may_pass_is_transient() {
        let io = |kind| StoreError::io("/m", io::Error::from(kind));
        assert!(io(io::ErrorKind::TimedOut).is_transient());
        assert!(io(io::ErrorKind::Other).is_transient());
        assert!(!io(io::ErrorKind::PermissionDenied).is_transient());
        assert!(!io(io::ErrorKind::NotFound).is_transient());
        // A name that is too long, one with a zero byte, and a file in place of a folder.
        for kind in
            [io::ErrorKind::InvalidFilename, io::ErrorKind::InvalidInput, io::ErrorKind::NotADirectory]
        {
            assert!(!io(kind).is_transient(), "{kind}");
        }
        assert_eq!(io(io::ErrorKind::NotFound).reason(), "SourceNotFound");
    }
}
