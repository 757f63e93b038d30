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
    /// The weights of an encoder are split over several files.
    #[error(
        "it is missing; the weights are split over several files ({found}), which cannot be read by this version: save \
         the model as one file, with save_pretrained(folder, max_shard_size=\"1000GB\")"
    )]
    Shards {
        /// One of the files, or their index.
        found: String,
    },
    /// A file that the list of split weights names.
    #[error("it is named by model.safetensors.index.json and missing; fetch every file that the list names")]
    MissingShard,
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
    /// A key of a decoder's configuration with a value that cannot be used.
    #[error("key {key}: {why}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it, and what is supported.
        why: String,
    },
    /// A key of a decoder's configuration that may change what the model computes and is not read.
    #[error(
        "key {key} is not part of {model_type} as supported here; without it the model could answer wrongly, so the \
         checkpoint is refused"
    )]
    UnreadConfigKey {
        /// The key.
        key: String,
        /// The model type, or the object that the key is in.
        model_type: String,
    },
    /// Keys that do not fit each other or the tensors.
    #[error("{0}")]
    Configuration(String),
    /// A folder without the files of an adapter.
    #[error(
        "it is missing; an adapter's folder holds adapter_config.json and adapter_model.safetensors, as PEFT's \
         save_pretrained writes them"
    )]
    NoAdapter,
    /// A key of an adapter's configuration that may change what it computes, and that is not read.
    #[error(
        "key {key} is {found}, which is not read by this version; train the adapter without it, or merge the adapter \
         into the model and serve that"
    )]
    UnreadKey {
        /// The key.
        key: String,
        /// What the file says.
        found: String,
    },
    /// A tensor that is missing, of another shape or type, or unknown.
    #[error(transparent)]
    Tensor(#[from] TensorProblem),
}

impl CheckpointProblem {
    /// Whether the checkpoint may be sound and needs a feature that this version does not have.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            Self::Unsupported { .. }
                | Self::UnreadKey { .. }
                | Self::UnreadConfigKey { .. }
                | Self::OtherWeights { .. }
                | Self::Shards { .. }
        )
    }

    pub(crate) fn key(key: &str, why: String) -> Self {
        Self::Key { key: key.to_owned(), why }
    }

    pub(crate) fn unsupported(key: &'static str, found: impl Into<String>, supported: &'static str) -> Self {
        Self::Unsupported { key, found: found.into(), supported }
    }
}
