//! Why a model's files could not be found, read or trusted.

use std::io;
use std::path::PathBuf;

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
    /// A `file://` source that names no absolute path of this machine.
    #[error("{text:?} is not a file URI: {why}; write file:///absolute/path")]
    InvalidUri {
        /// The whole source.
        text: String,
        /// What is wrong.
        why: &'static str,
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
        "{} holds several .gguf files; pick one with \"files\" or by its path, and join the parts of one model with \
         \"llama-gguf-split --merge\" first: {}",
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

impl StoreError {
    /// The cause as one CamelCase word, for states and conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnsupportedScheme { .. } | Self::InvalidUri { .. } => "UnsupportedSource",
            Self::NotFound { .. } => "SourceNotFound",
            Self::InvalidPattern { .. } | Self::PatternsForFile { .. } | Self::InvalidPin { .. } => {
                "InvalidSource"
            }
            Self::NothingMatches { .. } | Self::NoModelFile { .. } => "ModelFileNotFound",
            Self::SeveralModelFiles { .. } => "SeveralModelFiles",
            Self::OtherWeights { .. } => "UnsupportedModel",
            Self::TooManyFiles { .. } | Self::NameNotUtf8 { .. } | Self::NotAFile { .. } => "InvalidSource",
            Self::Changed { .. } => "SourceChanged",
            Self::Stopped => "Unloaded",
            Self::DigestMismatch { .. } => "DigestMismatch",
            Self::Io { .. } => "SourceUnreadable",
        }
    }

    /// Whether the same attempt may succeed later without a change by the user. A missing permission
    /// stays missing; a short failure of a network volume passes.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() != io::ErrorKind::PermissionDenied,
            Self::Changed { .. } => true,
            _ => false,
        }
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
        assert_eq!(io(io::ErrorKind::NotFound).reason(), "SourceNotFound");
    }
}
