//! The engine's bars on the real SmolLM2 on this processor: quality of fast numerics, fairness between tenants, classes,
//! memory. Prints one line each, `name value need ok|MISS`, and ends with 1 where one is missed.
//!
//! `make test-engine`, or `cargo run --profile ci -p trustformers-engine --example bars -- [short]`. The long form takes a
//! quarter of an hour, ten minutes of which are the mixed run for memory; it judges times too, so it wants a machine with
//! nothing else to do. The short one takes about a minute and judges only what is the same on every machine: figures,
//! orders, and the rows and steps that a request has to wait for. Times are printed there and not judged.

mod fairness;
mod memory;
mod priority;
mod quality;
mod texts;
mod watched;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics};
use trustformers_model::Model;
use trustformers_plan::Backend;
use watched::{Watched, Work};

type AnyError = Box<dyn std::error::Error>;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// How long things run.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Whether times are judged.
    judges_times: bool,
    /// Positions of text that are compared.
    quality_tokens: usize,
    /// Requests of the second tenant to an idle engine, and beside the first one.
    fairness_requests: usize,
    /// Time between them beside the first one; half of it alone.
    fairness_gap: Duration,
    /// Requests of the second tenant whose steps are counted.
    fairness_counted: usize,
    /// Requests of the mixed run, and the time that it takes at least.
    memory_requests: usize,
    memory_time: Duration,
}

const LONG: Form = Form {
    judges_times: true,
    quality_tokens: 3000,
    fairness_requests: 150,
    fairness_gap: Duration::from_secs(1),
    fairness_counted: 50,
    memory_requests: 400,
    memory_time: Duration::from_secs(600),
};

const SHORT: Form = Form {
    judges_times: false,
    quality_tokens: 600,
    fairness_requests: 10,
    fairness_gap: Duration::from_millis(500),
    fairness_counted: 10,
    memory_requests: 60,
    memory_time: Duration::ZERO,
};

/// The lines, and whether all bars hold.
#[derive(Debug, Default)]
struct Report {
    missed: usize,
}

impl Report {
    /// One bar.
    fn bar(&mut self, name: &str, value: impl std::fmt::Display, need: impl std::fmt::Display, holds: bool) {
        self.missed += usize::from(!holds);
        println!("{name:<44} {value:>12} {need:>12} {}", if holds { "ok" } else { "MISS" });
    }

    /// A bar about time.
    fn time(&mut self, form: Form, name: &str, value: f64, most: f64) {
        if form.judges_times {
            self.bar(name, format!("{value:.2}"), format!("<= {most}"), value <= most);
        } else {
            self.figure(name, format!("{value:.2}"));
        }
    }

    /// A figure without a bar.
    fn figure(&mut self, name: &str, value: impl std::fmt::Display) {
        println!("{name:<44} {value:>12} {:>12}", "-");
    }
}

/// The test models' folder, as scripts and tests have it.
fn model_path() -> PathBuf {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let folder = set("TRUSTFORMERS_MODELS")
        .or_else(|| cache().map(|cache| cache.join("trustformers").join("models")))
        .unwrap_or_default();
    folder.join(FILE)
}

fn cpu() -> Result<Box<dyn Backend>, AnyError> {
    Ok(Box::new(CpuBackend::new(CpuConfig::default())?))
}

fn main() -> Result<ExitCode, AnyError> {
    let form = match std::env::args().nth(1).as_deref() {
        None => LONG,
        Some("short") => SHORT,
        Some(other) => return Err(format!("{other:?} is no form; give none, or short").into()),
    };
    let path = model_path();
    if !path.exists() {
        return Err(format!("{} is missing: get it with `make models`", path.display()).into());
    }
    let model = Arc::new(Model::load(&path, &mut |_| {})?);
    println!("{:<44} {:>12} {:>12}", "bar", "value", "need");
    let mut report = Report::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Memory comes first: what others had and gave back would hide what it takes.
    runtime.block_on(async {
        memory::run(&model, form, &mut report).await?;
        priority::run(&model, &mut report).await?;
        fairness::run(&model, form, &mut report).await
    })?;
    quality::run(&model, form, &mut report)?;
    Ok(if report.missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An engine that has warmed up, with what its backend does and its metrics.
struct Started {
    engine: Engine,
    work: Arc<Work>,
    registry: prometheus::Registry,
}

async fn start(model: &Arc<Model>, config: &EngineConfig) -> Result<Started, AnyError> {
    let (work, registry) = (Arc::new(Work::new()), prometheus::Registry::new());
    let metrics = EngineMetrics::register(&registry)?;
    let backend = Box::new(Watched::new(cpu()?, Arc::clone(&work)));
    let (model, config) = (Arc::clone(model), config.clone());
    let starting = tokio::task::spawn_blocking(move || Engine::start(model, backend, &config, &metrics));
    let engine = starting.await??;
    engine.warm_up().await?;
    Ok(Started { engine, work, registry })
}
