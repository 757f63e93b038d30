//! Why a model could not be loaded. Every message names the file.

use crate::checkpoint::CheckpointProblem;
use crate::gguf::{GgufError, GgufProblem};
use std::path::{Path, PathBuf};
use thiserror::Error;
use trustformers_plan::{PlanError, WeightError};

/// Why a model could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file could not be opened or read. Remote storage may recover.
    #[error("{}: cannot be {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operation: `opened`, `read` or `mapped`.
        action: &'static str,
        /// The operating system's message.
        source: std::io::Error,
    },
    /// The caller asked to end before the file was read.
    #[error("reading was ended before the model was read")]
    Stopped,
    /// The path is neither a file nor a folder.
    #[error(
        "{}: it is neither a file nor a folder; give the path of one .gguf file, or of a folder with config.json and \
         model.safetensors",
        path.display()
    )]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file is not a GGUF file that can be served.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A file of a checkpoint cannot be served.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: CheckpointProblem,
    },
    /// The architecture is not supported.
    #[error("{}: architecture {found:?} is not supported; supported: {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The name in the file.
        found: String,
        /// The supported names.
        supported: String,
    },
    /// The tokenizer in the file cannot be used.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: TokenizerProblem,
    },
    /// The tensors do not make weights.
    #[error("{}: {problem}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        #[source]
        problem: WeightError,
    },
    /// The model cannot be lowered to a plan.
    #[error("{}: {problem}", path.display())]
    Plan {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: PlanError,
    },
}

impl LoadError {
    /// Whether trying again may help: the storage failed, not the content.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Io { .. })
    }

    /// A GGUF problem in the file `path`.
    pub(crate) fn gguf(path: &Path, problem: GgufProblem) -> Self {
        GgufError { path: path.to_owned(), problem }.into()
    }
}

/// What is wrong with a tokenizer.
#[derive(Debug, Error)]
pub enum TokenizerProblem {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Key(#[from] GgufProblem),
    /// The kind of tokenizer, or its rule to split text, is not supported.
    #[error("key {key} is {found:?}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// The value in the file.
        found: String,
        /// The supported values.
        supported: &'static str,
    },
    /// A key or list of the tokenizer has an invalid entry.
    #[error("key {key}: {why}; convert the model again")]
    Entry {
        /// The key.
        key: &'static str,
        /// Which entry and what is wrong.
        why: String,
    },
    /// The tokenizer library refused the vocabulary or a text.
    #[error("the tokenizer failed: {0}")]
    Library(String),
}
