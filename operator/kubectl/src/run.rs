//! Starts the command of the command line.

use std::process::ExitCode;

use crate::args::{Cli, Command};
use crate::cluster::{Cluster, CommandError};
use crate::{doctor, logs, report, rollout, status};

/// Runs the command, and says how the program ends.
///
/// # Errors
/// When the cluster cannot be reached, a request fails, or there is nothing to do.
pub async fn run(cli: Cli) -> Result<ExitCode, CommandError> {
    let cluster = Cluster::connect(&cli.target).await?;
    match cli.command {
        Command::Status(args) => status::run(&cluster, args).await,
        Command::Rollout(command) => rollout::run(&cluster, command).await,
        Command::Logs(args) => logs::run(&cluster, &args).await,
        Command::Doctor(args) => doctor::run(&cluster, &args).await,
        Command::Report(args) => report::run(&cluster, args).await,
    }
}
