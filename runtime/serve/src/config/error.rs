//! Why a configuration cannot be used.

use std::path::PathBuf;

use trustformers_proto::yaml::YamlError;

/// Why a configuration cannot be used. Each names the file or the path of the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "{} cannot be read: {cause}; name a file with --config (trustformers-serve --print-config-example shows one), or \
         a folder of models with --models",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// A folder of models cannot be read.
    #[error("{} cannot be read: {cause}; name a folder with models", path.display())]
    UnreadableFolder {
        /// The folder or what lies in it.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// A folder of models is empty.
    #[error(
        "{} holds no model: put a .gguf file there, or a folder with model.safetensors and config.json (in a container: \
         mount a volume that has one), or give a configuration with --config",
        folder.display()
    )]
    NoModels {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder of models cannot be served as it is.
    #[error("{}: {message}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// The text is not YAML, or a value does not fit.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// No such key.
    #[error("{path}: there is no such key; {hint}")]
    UnknownKey {
        /// The key's path.
        path: String,
        /// The nearest known key, or all of them.
        hint: String,
    },
    /// The key or value is promised and not built yet.
    #[error("{path}: not available in this version; {advice}")]
    NotAvailable {
        /// The key's path.
        path: String,
        /// What to do meanwhile.
        advice: String,
    },
    /// A value is wrong.
    #[error("{path}: {message}")]
    Value {
        /// The key's path.
        path: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// A wrong value at a path.
pub(crate) fn wrong(path: &str, message: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { path: path.to_owned(), message: message.to_string() }
}
