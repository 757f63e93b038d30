//! The gateway's program: flags, log, signals.

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use trustformers_gateway::{Settings, start};
use trustformers_telemetry::logs;

fn main() -> anyhow::Result<()> {
    let settings = Settings::parse();
    logs::init(&logs::LogOptions { format: settings.log_format, filter: settings.log_filter.clone() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the threads of the gateway could not be started")?;
    runtime.block_on(async {
        let mut terminated =
            signal(SignalKind::terminate()).context("the handler for SIGTERM could not be installed")?;
        let mut interrupted =
            signal(SignalKind::interrupt()).context("the handler for SIGINT could not be installed")?;
        let running = start(settings).await?;
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        running.finish().await;
        Ok(())
    })
}
