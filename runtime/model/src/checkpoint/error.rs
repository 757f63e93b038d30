//! What can be wrong with a file of a checkpoint.

use crate::arch::TensorProblem;
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
    /// The weights are in files that are not read.
    #[error(
        "it is missing, and {found} cannot be read by this version; save the model as one file model.safetensors"
    )]
    OtherWeights {
        /// What is there instead.
        found: String,
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
    /// A key with a value that is not honoured here.
    #[error("key {key} is {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What the file says.
        found: String,
        /// What could be served.
        supported: &'static str,
    },
    /// A tensor that is missing, of another shape or type, or unknown.
    #[error(transparent)]
    Tensor(#[from] TensorProblem),
}

impl CheckpointProblem {
    /// Whether the checkpoint is sound and only asks for what is not built here.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::OtherWeights { .. })
    }

    pub(crate) fn unsupported(key: &'static str, found: impl Into<String>, supported: &'static str) -> Self {
        Self::Unsupported { key, found: found.into(), supported }
    }
}
