//! What can be wrong with a file of a checkpoint.

use crate::arch::TensorProblem;
use crate::foreign::ForeignFile;
use thiserror::Error;

/// What is wrong with a file of a checkpoint; [`crate::LoadError::Checkpoint`] says which file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CheckpointProblem {
    /// A file that every checkpoint has is not there.
    #[error(
        "it is missing; a checkpoint's folder holds config.json, model.safetensors and tokenizer.json (where files \
         are picked by name, pick these and all other .json files)"
    )]
    Missing,
    /// The weights are split over several files.
    #[error(
        "it is missing; the weights are split over several files ({found}), which cannot be read by this version: save \
         the model as one file, with save_pretrained(folder, max_shard_size=\"1000GB\")"
    )]
    Shards {
        /// One of the files, or their index.
        found: String,
    },
    /// The weights are in another format.
    #[error(
        "it is missing, and {found} holds the weights in a format that cannot be read by this version: save the model \
         as one file model.safetensors, with save_pretrained(folder, safe_serialization=True)"
    )]
    OtherWeights {
        /// The file that is there instead.
        found: String,
    },
    /// Something else was saved under the name of the file.
    #[error("it is {0}")]
    Foreign(ForeignFile),
    /// A file that is too large to be what its name says.
    #[error("it has {bytes} bytes; at most {most} are read, and no known model has such a large one")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The most that is read.
        most: u64,
    },
    /// Not JSON, or not with the keys that are needed.
    #[error("it cannot be read as JSON with the expected keys: {0}")]
    Json(String),
    /// Not text.
    #[error("it is not UTF-8; download it again")]
    NotText,
    /// The library refused the file of weights.
    #[error("it is not a whole safetensors file ({0}); download it again")]
    Safetensors(String),
    /// A key with a value that cannot be right.
    #[error("key {key}: {why}")]
    Malformed {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A key with a value that is not supported.
    #[error("key {key} is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What the file says.
        found: String,
        /// The supported values.
        supported: &'static str,
    },
    /// A tensor that is missing, of another shape or type, or unknown.
    #[error(transparent)]
    Tensor(#[from] TensorProblem),
}

impl CheckpointProblem {
    /// Whether the checkpoint may be sound and needs a feature that this version does not have.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::OtherWeights { .. } | Self::Shards { .. })
    }

    pub(crate) fn unsupported(key: &'static str, found: impl Into<String>, supported: &'static str) -> Self {
        Self::Unsupported { key, found: found.into(), supported }
    }
}
