//! `trustformers-serve`: models behind HTTP and gRPC in one process, one prompt or texts to embed on the
//! command line, or a measurement.

mod bench;
mod embed;
mod flags;
mod generate;
mod loading;
mod one_shot;

use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use clap::Parser;
use trustformers_serve::TrustformersServer;
use trustformers_serve::config::{self, Config, ConfigError};
use trustformers_telemetry::logs::{self, LogOptions};

use flags::{Command, Flags, ServeFlags};

/// A command line or input that cannot be right, as clap itself answers.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let Flags { command, serve: serve_flags, log_format, log } = Flags::parse();
    // One prompt on a terminal is about the answer; a server is about what happens to it.
    let default = if command.is_some() { "warn" } else { "info" };
    let filter = log.unwrap_or_else(|| default.to_owned());
    if let Err(error) = logs::init(&LogOptions { format: log_format, filter }) {
        return failed(&error.into(), USAGE);
    }
    match command {
        Some(Command::Generate(flags)) => match generate::run(flags) {
            Ok(code) => code,
            Err(error) => {
                let code = error.exit_code();
                failed(&error.into(), code)
            }
        },
        Some(Command::Embed(flags)) => match embed::run(flags) {
            Ok(code) => code,
            Err(error) => {
                let code = error.exit_code();
                failed(&error.into(), code)
            }
        },
        Some(Command::Bench(flags)) => match bench::run(flags) {
            Ok(code) => code,
            Err(error) => {
                let code = error.exit_code();
                failed(&error.into(), code)
            }
        },
        None => match serve(serve_flags) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error, 1),
        },
    }
}

fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("trustformers-serve: {error:#}");
    ExitCode::from(code)
}

fn serve(flags: ServeFlags) -> anyhow::Result<()> {
    let ServeFlags { config: file, print_config_example, threads } = flags;
    if print_config_example {
        print!("{}", config::EXAMPLE);
        return Ok(());
    }
    let file = file.unwrap_or_else(|| config::FILE_NAME.into());
    let text = std::fs::read_to_string(&file)
        .map_err(|cause| ConfigError::Unreadable { path: file.clone(), cause })?;
    let config = Config::from_str(&text).with_context(|| format!("{} cannot be used", file.display()))?;
    let mut server = TrustformersServer::new(config);
    if let Some(threads) = threads {
        server = server.with_threads(usize::from(threads));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(server.run());
    // A load under way on a blocking thread must not hold up the end.
    runtime.shutdown_background();
    outcome.with_context(|| format!("{} cannot be served", file.display()))
}
