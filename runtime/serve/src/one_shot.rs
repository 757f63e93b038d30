//! Runs a command that does one job and ends, or ends early on a signal.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use trustformers_runtime::process::{EndSignals, StartError};

/// Status of a process that was interrupted, as shells give it.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why the output could not be written.
#[derive(Debug, thiserror::Error)]
#[error("stdout cannot be written: {0}")]
pub(crate) struct OutputError(#[from] io::Error);

/// Writes a piece of the output to stdout, so that a reader has it at once.
pub(crate) fn print(text: &str) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Why such a command cannot begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OneShotError {
    /// The system gives no threads, or none that can wait for events.
    #[error("no threads to work on: {0}")]
    Runtime(io::Error),
    /// The process could not be set up.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Runs `work` on a runtime of its own. SIGTERM and SIGINT end it at once. A closed stdout pipe is success:
/// `output` finds that error in a failure.
pub(crate) fn run<E>(
    work: impl Future<Output = Result<(), E>>,
    output: impl FnOnce(&E) -> Option<&OutputError>,
) -> Result<ExitCode, E>
where
    E: Error + From<OneShotError>,
{
    let work = |mut signals: EndSignals| async move {
        tokio::select! {
            done = work => done.map(|()| ExitCode::SUCCESS),
            _ = signals.received() => Ok(ExitCode::from(INTERRUPTED)),
        }
    };
    run_with_signals(work, output)
}

/// [`run`] for work that decides itself what a signal ends, and with which status.
pub(crate) fn run_with_signals<E, F>(
    work: impl FnOnce(EndSignals) -> F,
    output: impl FnOnce(&E) -> Option<&OutputError>,
) -> Result<ExitCode, E>
where
    E: Error + From<OneShotError>,
    F: Future<Output = Result<ExitCode, E>>,
{
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(OneShotError::Runtime)?;
    let outcome = runtime.block_on(async {
        let signals = EndSignals::new().map_err(OneShotError::Start)?;
        work(signals).await
    });
    // A load that was interrupted sits on a blocking thread and must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Err(error) if output(&error).is_some_and(|error| error.0.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(ExitCode::SUCCESS)
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum TestFailure {
        #[error(transparent)]
        Output(#[from] OutputError),
        #[error(transparent)]
        OneShot(#[from] OneShotError),
    }

    fn outcome(kind: Option<io::ErrorKind>) -> Result<ExitCode, TestFailure> {
        let work = async { kind.map_or(Ok(()), |kind| Err(OutputError(kind.into()).into())) };
        run(work, |failed| match failed {
            TestFailure::Output(error) => Some(error),
            TestFailure::OneShot(_) => None,
        })
    }

    #[test]
    fn a_closed_pipe_is_success_and_a_full_disk_is_not() {
        assert!(outcome(None).is_ok());
        assert!(outcome(Some(io::ErrorKind::BrokenPipe)).is_ok());
        let full = outcome(Some(io::ErrorKind::StorageFull)).unwrap_err().to_string();
        assert!(full.starts_with("stdout cannot be written"), "{full}");
    }
}
