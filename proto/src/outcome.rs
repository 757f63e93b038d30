//! The words of [`Outcome`], and which outcomes count against a revision.

use crate::control::v1::Outcome;

impl Outcome {
    /// Every outcome that an attempt can have, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Ok,
        Self::PodError,
        Self::Overloaded,
        Self::Unavailable,
        Self::ConnectFailed,
        Self::ResetBefore,
        Self::ResetInStream,
        Self::Timeout,
        Self::Cancelled,
        Self::CallerError,
    ];

    /// Its position in [`Outcome::ALL`]; none where a newer gateway names an outcome of its own.
    #[must_use]
    pub const fn index(self) -> Option<usize> {
        (self as usize).checked_sub(1)
    }

    /// The word of metric labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Ok => "ok",
            Self::PodError => "pod_error",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::ConnectFailed => "connect_failed",
            Self::ResetBefore => "reset_before",
            Self::ResetInStream => "reset_in_stream",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::CallerError => "caller_error",
        }
    }

    /// Whether the pod failed at a request that it should have answered. Its revision is to blame, or the
    /// node is; a pod that is ended in order is asked by nobody any more. A full queue is a matter of
    /// capacity, and what callers do is no fault of a revision.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        match self {
            Self::PodError
            | Self::Unavailable
            | Self::ConnectFailed
            | Self::ResetBefore
            | Self::ResetInStream
            | Self::Timeout => true,
            Self::Unspecified | Self::Ok | Self::Overloaded | Self::Cancelled | Self::CallerError => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_position_and_word() {
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome.index(), Some(index));
            assert_eq!(outcome as usize, index + 1);
            let wire = format!("OUTCOME_{}", outcome.as_str().to_uppercase());
            assert_eq!(Outcome::from_str_name(&wire), Some(outcome));
        }
        // The next number is free, so the list is complete.
        assert!(Outcome::try_from(11).is_err());
        assert_eq!(Outcome::Unspecified.index(), None);
    }
}
