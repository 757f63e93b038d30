//! Why a model could not be loaded: one word for machines, one sentence for people, and whether to try again.

use trustformers_engine::encoder::EncodeError;
use trustformers_engine::{GenerateError, ModelFault, StartError};
use trustformers_model::{LoadError, TokenizerProblem};
use trustformers_store::StoreError;

use crate::device::DeviceError;
use crate::spec::SpecError;

/// Why a model could not be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// CamelCase, as it stands in states and conditions: `SourceNotFound`, `DigestMismatch`,
    /// `MalformedModel`, ...
    pub reason: &'static str,
    /// What is wrong and what to do.
    pub message: String,
    /// Whether the same attempt may succeed later without a change by the user.
    pub transient: bool,
}

impl Failure {
    /// A failure that stays.
    pub fn permanent(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), transient: false }
    }
}

impl From<SpecError> for Failure {
    fn from(error: SpecError) -> Self {
        Self::permanent("InvalidConfiguration", error.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self { reason: error.reason(), transient: error.is_transient(), message: error.to_string() }
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let reason = match &error {
            LoadError::Io { .. } => "SourceUnreadable",
            LoadError::Stopped => "Unloaded",
            LoadError::NotAFile { .. } => "InvalidSource",
            LoadError::Gguf(wrong) if wrong.problem.is_unsupported() => "UnsupportedModel",
            LoadError::Gguf(_) => "MalformedModel",
            LoadError::Checkpoint { problem, .. } if !problem.is_unsupported() => "MalformedModel",
            LoadError::Checkpoint { .. }
            | LoadError::Architecture { .. }
            | LoadError::Plan { .. }
            | LoadError::Tokenizer { problem: TokenizerProblem::Unsupported { .. }, .. } => {
                "UnsupportedModel"
            }
            LoadError::Tokenizer { .. } | LoadError::Weights { .. } => "MalformedModel",
        };
        Self { reason, transient: error.is_transient(), message: error.to_string() }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::permanent("DeviceUnavailable", error.to_string())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let reason = match &error {
            StartError::Invalid { .. } => "InvalidConfiguration",
            StartError::KvTooSmall { .. } => "InsufficientMemory",
            StartError::Backend { .. } | StartError::Draft { .. } => "UnsupportedModel",
            StartError::Thread(_) => "NoThread",
        };
        Self::permanent(reason, error.to_string())
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        let is_broken = matches!(error, GenerateError::Model(ModelFault::NotFinite));
        Self::permanent(warm_up_reason(is_broken), format!("the warm-up generation failed: {error}"))
    }
}

impl From<EncodeError> for Failure {
    fn from(error: EncodeError) -> Self {
        let is_broken = matches!(error, EncodeError::Model(ModelFault::NotFinite));
        Self::permanent(warm_up_reason(is_broken), format!("the warm-up texts could not be encoded: {error}"))
    }
}

fn warm_up_reason(is_broken: bool) -> &'static str {
    if is_broken { "NotFinite" } else { "WarmUpFailed" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fault_of_a_file_decides_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let load = |bytes: Vec<u8>| {
            let file = folder.path().join("m.gguf");
            std::fs::write(&file, bytes).unwrap();
            Failure::from(trustformers_model::Model::load(&file, &mut |_| {}).unwrap_err())
        };
        let garbage = load(b"not a model at all".to_vec());
        assert_eq!((garbage.reason, garbage.transient), ("MalformedModel", false));
        assert!(garbage.message.contains("m.gguf"), "{garbage}");
        let version = load([b"GGUF".as_slice(), &9_u32.to_le_bytes(), &[0; 16]].concat());
        assert_eq!(version.reason, "UnsupportedModel", "{version}");
    }

    #[test]
    fn an_io_error_is_tried_again() {
        let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
        let failure = Failure::from(LoadError::Io { path: "m".into(), action: "read", source });
        assert_eq!((failure.reason, failure.transient), ("SourceUnreadable", true));
    }
}
