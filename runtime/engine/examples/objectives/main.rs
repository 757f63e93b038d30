//! The engine's objectives on the real SmolLM2 on this processor: quality of fast numerics, fairness between
//! tenants, priority classes, memory. Prints one line each, `name value need ok|MISS`, and exits with 1 where
//! one is missed.
//!
//! `make test-engine`, or `cargo run --profile ci -p trustformers-engine --example objectives -- [short]`.
//! The long form takes a quarter of an hour, ten minutes of which are the mixed run for memory. It checks
//! times too, so it needs an idle machine. The short form takes about a minute and checks only what is equal
//! on every machine: numbers, orders, and the rows and steps that a request waits for. It prints times
//! without checking them.

mod fairness;
mod memory;
mod observed;
mod priority;
mod quality;
mod texts;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use observed::{EngineWork, Observed};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics};
use trustformers_model::Model;
use trustformers_plan::Backend;

type AnyError = Box<dyn std::error::Error>;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The duration and the checks of a run.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Whether times are checked.
    checks_times: bool,
    /// Positions of text that are compared.
    quality_tokens: usize,
    /// Requests of the second tenant to an idle engine, and beside the first tenant.
    fairness_requests: usize,
    /// Time between them beside the first tenant; half of it on an idle engine.
    fairness_gap: Duration,
    /// Requests of the second tenant whose steps are counted.
    fairness_counted: usize,
    /// Requests of the mixed run, and its shortest duration.
    memory_requests: usize,
    memory_time: Duration,
}

const LONG: Form = Form {
    checks_times: true,
    quality_tokens: 3000,
    fairness_requests: 150,
    fairness_gap: Duration::from_secs(1),
    fairness_counted: 50,
    memory_requests: 400,
    memory_time: Duration::from_secs(600),
};

const SHORT: Form = Form {
    checks_times: false,
    quality_tokens: 600,
    fairness_requests: 10,
    fairness_gap: Duration::from_millis(500),
    fairness_counted: 10,
    memory_requests: 60,
    memory_time: Duration::ZERO,
};

/// Prints the results and counts the missed objectives.
#[derive(Debug, Default)]
struct ObjectiveReport {
    missed: usize,
}

impl ObjectiveReport {
    /// One objective.
    fn objective(
        &mut self,
        name: &str,
        value: impl std::fmt::Display,
        need: impl std::fmt::Display,
        holds: bool,
    ) {
        self.missed += usize::from(!holds);
        println!("{name:<44} {value:>12} {need:>12} {}", if holds { "ok" } else { "MISS" });
    }

    /// An objective about time.
    fn time(&mut self, form: Form, name: &str, value: f64, limit: f64) {
        if form.checks_times {
            self.objective(name, format!("{value:.2}"), format!("<= {limit}"), value <= limit);
        } else {
            self.number(name, format!("{value:.2}"));
        }
    }

    /// A number without an objective.
    fn number(&mut self, name: &str, value: impl std::fmt::Display) {
        println!("{name:<44} {value:>12} {:>12}", "-");
    }
}

/// The folder of the test models, as in scripts and tests.
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
        Some(other) => return Err(format!("{other:?} is no form; use \"short\" or no argument").into()),
    };
    let path = model_path();
    if !path.exists() {
        return Err(format!("{} is missing: get it with `make models`", path.display()).into());
    }
    let model = Arc::new(Model::load(&path, &mut |_| {})?);
    println!("{:<44} {:>12} {:>12}", "objective", "value", "need");
    let mut report = ObjectiveReport::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Memory is first: memory that other runs have freed would hide its growth.
    runtime.block_on(async {
        memory::run(&model, form, &mut report).await?;
        priority::run(&model, &mut report).await?;
        fairness::run(&model, form, &mut report).await
    })?;
    quality::run(&model, form, &mut report)?;
    Ok(if report.missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An engine after its warm-up, with the work of its backend and its metrics.
struct Started {
    engine: Engine,
    work: Arc<EngineWork>,
    registry: prometheus::Registry,
}

async fn start(model: &Arc<Model>, config: &EngineConfig) -> Result<Started, AnyError> {
    let (work, registry) = (Arc::new(EngineWork::new()), prometheus::Registry::new());
    let metrics = EngineMetrics::register(&registry)?;
    let backend = Box::new(Observed::new(cpu()?, Arc::clone(&work)));
    let (model, config) = (Arc::clone(model), config.clone());
    let starting = tokio::task::spawn_blocking(move || Engine::start(model, backend, &config, &metrics));
    let engine = starting.await??;
    engine.warm_up().await?;
    Ok(Started { engine, work, registry })
}
