//! `trustformers-serve`: models behind HTTP and gRPC in one process; one prompt, texts or a conversation on
//! the command line; or a measurement.

mod bench;
mod chat;
mod embed;
mod flags;
mod generate;
mod inspect;
mod loading;
mod one_shot;
mod score;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use trustformers_serve::config::{self, ConfigError};
use trustformers_serve::config_source::Overrides;
use trustformers_serve::{ConfigSource, ServerError, TrustformersServer};
use trustformers_telemetry::logs::{self, LogOptions};

use flags::{Command, Flags, RunFlags, ServeFlags, ServerFlags};

/// A command line or input that cannot be right, as clap itself answers.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let Flags { command, serve: serve_flags, log_format, log } = Flags::parse();
    // One prompt on a terminal is about the answer; a server is about what happens to it.
    let serves = matches!(command, None | Some(Command::Run(_)));
    let default = if serves { "info" } else { "warn" };
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
        Some(Command::Chat(flags)) => match chat::run(flags) {
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
        Some(Command::Classify(flags)) => scored(score::classify(flags)),
        Some(Command::Rerank(flags)) => scored(score::rerank(flags)),
        Some(Command::Inspect(flags)) => inspect::run(flags).unwrap_or_else(|error| failed(&error.into(), 1)),
        Some(Command::Bench(flags)) => match bench::run(flags) {
            Ok(code) => code,
            Err(error) => {
                let code = error.exit_code();
                failed(&error.into(), code)
            }
        },
        Some(Command::Run(RunFlags { file, server })) => {
            ended(serve(ConfigSource::file_or_model(file), server))
        }
        None => {
            let ServeFlags { config, models, print_config_example, server } = serve_flags;
            if print_config_example {
                print!("{}", config::EXAMPLE);
                return ExitCode::SUCCESS;
            }
            let source = match (config, models) {
                (Some(file), _) => ConfigSource::file(file),
                (None, Some(folder)) => ConfigSource::file_or_folder(folder),
                (None, None) => ConfigSource::file(config::FILE_NAME),
            };
            ended(serve(source, server))
        }
    }
}

fn scored(outcome: Result<ExitCode, score::ScoreFailure>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        let code = error.exit_code();
        failed(&error.into(), code)
    })
}

fn ended(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, 1),
    }
}

fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("trustformers-serve: {error:#}");
    ExitCode::from(code)
}

fn serve(source: ConfigSource, flags: ServerFlags) -> anyhow::Result<()> {
    let ServerFlags { host, port, grpc_port, source: sources, threads, metrics_compat, print_config } = flags;
    let sources = sources.into_iter().collect();
    let source = source.with_overrides(Overrides { host, port, grpc_port, sources });
    let path = source.path().to_owned();
    let mut server = match TrustformersServer::open(source) {
        Err(ServerError::Config(error)) if names_its_path(&error) => return Err(error.into()),
        opened => opened.with_context(|| format!("{} cannot be used", path.display()))?,
    };
    if print_config {
        print!("{}", server.config().effective().to_yaml()?);
        return Ok(());
    }
    if let Some(threads) = threads {
        server = server.with_threads(usize::from(threads));
    }
    if let Some(compat) = metrics_compat {
        server = server.with_metrics_compat(compat);
    }
    let models: Vec<&str> = server.config().models.iter().map(|model| model.name.as_str()).collect();
    tracing::info!(configuration = %path.display(), models = models.join(", "), "serving");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(server.run());
    // A load under way on a blocking thread must not hold up the end.
    runtime.shutdown_background();
    outcome.with_context(|| format!("{} cannot be served", path.display()))
}

/// Whether the message of an error says which file or folder it is about.
fn names_its_path(error: &ConfigError) -> bool {
    matches!(
        error,
        ConfigError::Unreadable { .. }
            | ConfigError::UnreadableFolder { .. }
            | ConfigError::NoModels { .. }
            | ConfigError::Folder { .. }
    )
}
