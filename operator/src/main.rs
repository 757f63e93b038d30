//! `trustformers-operator`: the control plane of trustformers-serve.

use clap::Parser;
use trustformers_operator::args::{Cli, Command};
use trustformers_operator::{crd, run};
use trustformers_telemetry::logs;

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => {
            logs::init(&args.log.options())?;
            // One thread does all of it: a leader of 1,000 models needs a twentieth of a core while all of
            // them start, and each thread more costs wake-ups between threads and memory of its own.
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            runtime.block_on(run::run(*args))?;
        }
        Command::Crd => crd::print(&mut std::io::stdout().lock())?,
    }
    Ok(())
}
