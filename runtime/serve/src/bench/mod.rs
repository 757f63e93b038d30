//! `trustformers-serve bench`: how fast a model is in this process, and how a server answers under load.
//!
//! `engine` measures the engine (the scheduler, the sampler and the device, no network); `load` is an HTTP
//! client that speaks to this server and to others in the same way, so that both are measured by one clock.

mod arrivals;
mod client;
mod drive;
mod engine;
mod flags;
mod load;
mod percentiles;
mod prompts;
mod protocol;
mod summary;

use std::process::ExitCode;

use trustformers_engine::encoder::EncodeError;
use trustformers_engine::{GenerateError, SubmitError};
use trustformers_runtime::failure::Failure;

use crate::loading::ModelFlagError;

pub(crate) use flags::BenchFlags;
use flags::BenchWhat;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchFailure {
    /// A flag's value cannot be honoured.
    #[error("--{flag}: {why}")]
    Flag {
        /// The flag's name without dashes.
        flag: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The flags about the model are wrong.
    #[error(transparent)]
    Model(#[from] ModelFlagError),
    /// The model could not be loaded.
    #[error("{} ({})", .0, .0.reason)]
    Load(Failure),
    /// The process's metrics do not fit together.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The engine refused a request of the measurement.
    #[error("the engine refused to be measured: {0}; fewer tokens or sequences may fit")]
    Refused(#[from] SubmitError),
    /// A generation broke off.
    #[error(transparent)]
    Broken(#[from] GenerateError),
    /// Texts were not embedded.
    #[error("the engine could not be measured: {0}")]
    Encode(#[from] EncodeError),
    /// Not one request was answered.
    #[error(
        "none of {asked} requests was answered ({errors}); is {url} the right address and --api its protocol?"
    )]
    NoAnswer {
        /// Requests made.
        asked: usize,
        /// How many of each class.
        errors: String,
        /// Where they went.
        url: String,
    },
    /// A file cannot be read, or stdout cannot be written.
    #[error("{what}: {cause}")]
    Io {
        /// The file, or what was to be done.
        what: String,
        /// What the system said.
        cause: std::io::Error,
    },
}

// No `#[from]`: the message holds the failure already, and a source would be printed after it once more.
impl From<Failure> for BenchFailure {
    fn from(failure: Failure) -> Self {
        Self::Load(failure)
    }
}

impl BenchFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Flag { .. } | Self::Model(_) => 2,
            _ => 1,
        }
    }

    fn flag(flag: &'static str, why: impl Into<String>) -> Self {
        Self::Flag { flag, why: why.into() }
    }
}

/// Runs the subcommand.
pub(crate) fn run(flags: BenchFlags) -> Result<ExitCode, BenchFailure> {
    // One thread: on a small machine the client must leave the cores to what it measures.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| BenchFailure::Io { what: "no runtime".to_owned(), cause })?;
    match flags.what {
        BenchWhat::Engine(flags) => runtime.block_on(engine::run(flags))?,
        BenchWhat::Load(flags) => runtime.block_on(load::run(flags))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a result to stdout. A closed pipe is success.
fn print(text: &str) -> Result<(), BenchFailure> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(BenchFailure::Io { what: "stdout cannot be written".to_owned(), cause: error })
        }
        _ => Ok(()),
    }
}
