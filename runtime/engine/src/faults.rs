//! Faults of requests, of models and of devices: three types, because they have three causes and three cures.
//!
//! A request fault concerns one caller, who can change the request. A model fault means that the model's
//! files are wrong. A device fault means that the device failed; only these count against liveness.

use thiserror::Error;
use trustformers_plan::{BackendError, StepError, StepInput};

/// The request cannot be completed as it was asked for. Other requests are not affected.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RequestFault {
    /// The grammar became too complex on the way, or it requires text that no token of the model can write.
    #[error("response_format: the answer cannot go on: {message}")]
    Grammar {
        /// What went wrong.
        message: String,
    },
    /// The device refused a step because of this request. Nothing was computed.
    #[error("the device refused this request before computing anything: {message}; send other tokens")]
    RefusedStep {
        /// The refusal.
        message: String,
    },
    /// The answer was not read while it was computed, and the memory for unread answers is used up.
    #[error(
        "the answer was discarded because {unread_bytes} bytes of it were not read and the {limit_bytes} bytes for \
         unread answers of this model are used up; read the stream as it comes, or ask for fewer tokens or logprobs"
    )]
    UnreadAnswer {
        /// Bytes of this answer that waited for the reader.
        unread_bytes: usize,
        /// Bytes that all unread answers may take together.
        limit_bytes: usize,
    },
}

/// The model's files are wrong. Every request may be affected, and a restart does not help.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum ModelFault {
    /// The model produced a value that is not finite.
    #[error("the model produced a value that is not a finite number; the weights or the device are broken")]
    NotFinite,
    /// The tokenizer gives an id that has no row in the weights.
    #[error(
        "the tokenizer of this model gives token id {id}, but its weights have only {vocabulary} tokens; the files do \
         not belong together: get the tokenizer and the weights of one model"
    )]
    TokenOutsideVocabulary {
        /// The id.
        id: u32,
        /// Tokens of the weights.
        vocabulary: usize,
    },
}

/// The device failed. All requests of the step end.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum DeviceFault {
    /// A step failed.
    #[error("the backend failed: {message}")]
    FailedStep {
        /// The backend's message.
        message: String,
    },
}

/// Why a step gave no result.
#[derive(Debug)]
pub(crate) enum StepFault {
    /// The step was refused: nothing was computed, and the device is fine.
    Refused(StepError),
    Device(DeviceFault),
}

impl From<BackendError> for StepFault {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::Step(refusal) => Self::Refused(refusal),
            error => Self::Device(DeviceFault::FailedStep { message: error.to_string() }),
        }
    }
}

/// The sequence of the step that a refusal is about; `None` where it is about the step as a whole.
pub(crate) fn refused_sequence(refusal: &StepError, input: &StepInput) -> Option<usize> {
    match *refusal {
        StepError::Token { row, .. } | StepError::Slot { row, .. } | StepError::Position { row, .. } => {
            (0..input.sequences()).find(|sequence| input.rows_of(*sequence).contains(&row))
        }
        StepError::Context { sequence, .. }
        | StepError::Blocks { sequence, .. }
        | StepError::BlockId { sequence, .. }
        | StepError::Uncached { sequence, .. }
        | StepError::Adapter { sequence, .. }
        | StepError::EmptySlot { sequence, .. } => Some(sequence),
        _ => None,
    }
}

/// Checks ids that come from the model's own tokenizer.
///
/// # Errors
/// [`ModelFault::TokenOutsideVocabulary`] that names the first id without a row in the weights.
pub(crate) fn check_tokenizer_ids(ids: &[u32], vocabulary: usize) -> Result<(), ModelFault> {
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        Some(id) => Err(ModelFault::TokenOutsideVocabulary { id: *id, vocabulary }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_plan::{LogitsRows, SequenceStep};

    #[test]
    fn a_refusal_names_the_sequence_of_its_row() {
        let mut input = StepInput::new();
        for tokens in [&[1, 2, 3][..], &[9], &[4, 5]] {
            let step = SequenceStep { tokens, cached_tokens: 0, blocks: &[], logits: LogitsRows::None };
            input.push_sequence(step);
        }
        let of_row = |row| refused_sequence(&StepError::Token { row, token: 9, vocab: 5 }, &input);
        assert_eq!([0, 2, 3, 4, 5, 6].map(of_row), [Some(0), Some(0), Some(1), Some(2), Some(2), None]);
        let context = StepError::Context { sequence: 1, tokens: 9, context: 8 };
        assert_eq!(refused_sequence(&context, &input), Some(1));
        assert_eq!(refused_sequence(&StepError::Empty, &input), None);
    }

    #[test]
    fn only_a_refused_step_is_no_device_fault() {
        let refused = StepFault::from(BackendError::Step(StepError::Empty));
        assert!(matches!(refused, StepFault::Refused(StepError::Empty)));
        let failed = StepFault::from(BackendError::Device("unplugged".to_owned()));
        assert!(matches!(failed, StepFault::Device(DeviceFault::FailedStep { message })
            if message.contains("unplugged")));
    }

    #[test]
    fn ids_of_the_tokenizer_are_checked_against_the_weights() {
        assert_eq!(check_tokenizer_ids(&[0, 4], 5), Ok(()));
        let error = check_tokenizer_ids(&[0, 5, 6], 5).unwrap_err();
        assert_eq!(error, ModelFault::TokenOutsideVocabulary { id: 5, vocabulary: 5 });
        assert!(error.to_string().contains("do not belong together"));
    }
}
