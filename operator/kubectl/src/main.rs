//! `kubectl-trustformers`, which kubectl starts as `kubectl trustformers`.

use std::process::ExitCode;

use clap::Parser;
use trustformers_kubectl::args::Cli;
use trustformers_kubectl::run;

fn main() -> ExitCode {
    match start(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(run::run(cli))?)
}
