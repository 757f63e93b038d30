//! How an attempt ended, decided in one place from what the pod says: at its head, and at its end.
//!
//! A head of success says little, since a stream that failed has one too. What a caller does wrong and a
//! method that the pod does not have are never the pod's failure: otherwise any caller could make a rollout
//! fail.

use http::StatusCode;
use tonic::Code;
use trustformers_proto::control::v1::Outcome;

use crate::answer_end::EndOutcome;

/// The outcome of an answer with this status, and this end.
pub(crate) fn of_answer(status: StatusCode, end: &EndOutcome) -> Outcome {
    match end {
        // The pod's own word for a failure stands in the head.
        EndOutcome::Complete | EndOutcome::Failed { .. } if !status.is_success() => of_status(status),
        EndOutcome::Complete => Outcome::Ok,
        EndOutcome::Failed { kind } => of_kind(kind),
        // A proxy on the way answers in HTTP's words.
        EndOutcome::Grpc(_) | EndOutcome::NoStatus if is_error(status) => of_status(status),
        EndOutcome::Grpc(code) => of_code(*code),
        // A gRPC answer without a status was cut.
        EndOutcome::NoStatus | EndOutcome::Reset => Outcome::ResetInStream,
    }
}

fn is_error(status: StatusCode) -> bool {
    status.is_client_error() || status.is_server_error()
}

/// The outcome of an answer with this head, and nothing behind it that says more.
pub(crate) fn of_status(status: StatusCode) -> Outcome {
    match status.as_u16() {
        429 => Outcome::Overloaded,
        503 => Outcome::Unavailable,
        // The path or the method is not served.
        501 => Outcome::CallerError,
        // nginx's word for a caller that has left.
        499 => Outcome::Cancelled,
        500.. => Outcome::PodError,
        400..500 => Outcome::CallerError,
        _ => Outcome::Ok,
    }
}

/// The outcome of a gRPC answer.
fn of_code(code: Code) -> Outcome {
    match code {
        Code::Ok => Outcome::Ok,
        Code::Cancelled => Outcome::Cancelled,
        Code::ResourceExhausted => Outcome::Overloaded,
        Code::Unavailable => Outcome::Unavailable,
        Code::Unknown | Code::Internal | Code::DataLoss => Outcome::PodError,
        // A deadline is the caller's own: pods have none.
        Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unauthenticated => Outcome::CallerError,
    }
}

/// The outcome of an error of this kind (`trustformers_api::ApiError`). Whatever is not known to be the
/// caller's is the pod's.
pub(crate) fn of_kind(kind: &str) -> Outcome {
    match kind {
        "overloaded" => Outcome::Overloaded,
        "unavailable" => Outcome::Unavailable,
        "conflict"
        | "forbidden"
        | "invalid_request"
        | "method_not_allowed"
        | "model_required"
        | "timeout"
        | "too_long"
        | "unknown_model"
        | "unknown_revision"
        | "unknown_route"
        | "unsupported_encoding"
        | "wrong_task" => Outcome::CallerError,
        _ => Outcome::PodError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_end_decides_and_a_callers_mistake_is_no_failure() {
        let failed = |kind: &str| EndOutcome::Failed { kind: kind.to_owned() };
        for (status, end, outcome) in [
            (200, EndOutcome::Complete, Outcome::Ok),
            (200, failed("internal"), Outcome::PodError),
            (200, failed("unavailable"), Outcome::Unavailable),
            (200, failed("error_event"), Outcome::PodError),
            (200, failed("overloaded"), Outcome::Overloaded),
            (200, failed("timeout"), Outcome::CallerError),
            (200, EndOutcome::Reset, Outcome::ResetInStream),
            (500, EndOutcome::Reset, Outcome::ResetInStream),
            (200, EndOutcome::NoStatus, Outcome::ResetInStream),
            (502, EndOutcome::NoStatus, Outcome::PodError),
            (404, EndOutcome::Complete, Outcome::CallerError),
            (405, EndOutcome::Complete, Outcome::CallerError),
            (408, EndOutcome::Complete, Outcome::CallerError),
            (429, EndOutcome::Complete, Outcome::Overloaded),
            (499, EndOutcome::Complete, Outcome::Cancelled),
            (500, EndOutcome::Complete, Outcome::PodError),
            (500, failed("internal"), Outcome::PodError),
            (501, EndOutcome::Complete, Outcome::CallerError),
            (503, failed("unavailable"), Outcome::Unavailable),
            (200, EndOutcome::Grpc(Code::Ok), Outcome::Ok),
            (200, EndOutcome::Grpc(Code::Internal), Outcome::PodError),
            (200, EndOutcome::Grpc(Code::Unknown), Outcome::PodError),
            (200, EndOutcome::Grpc(Code::Unavailable), Outcome::Unavailable),
            (200, EndOutcome::Grpc(Code::ResourceExhausted), Outcome::Overloaded),
            (200, EndOutcome::Grpc(Code::Unimplemented), Outcome::CallerError),
            (200, EndOutcome::Grpc(Code::InvalidArgument), Outcome::CallerError),
            (200, EndOutcome::Grpc(Code::DeadlineExceeded), Outcome::CallerError),
            (200, EndOutcome::Grpc(Code::Cancelled), Outcome::Cancelled),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(of_answer(status, &end), outcome, "{status}, {end:?}");
        }
    }
}
