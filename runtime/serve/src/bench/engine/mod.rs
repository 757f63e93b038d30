//! `bench engine`: what the engine gives in this process.

mod encode;
mod generate;

use std::sync::Arc;

use serde_json::{Map, Value, json};
use trustformers_proto::Task;
use trustformers_runtime::device;
use trustformers_runtime::failure::Failure;
use trustformers_runtime::load::{Loader, OnProgress};
use trustformers_runtime::runner::Runner;
use trustformers_runtime::spec::ModelSpec;

use super::flags::EngineFlags;
use super::percentiles::{Percentiles, rounded};
use super::{BenchFailure, print};
use crate::loading;
use encode::EncodeMeasurement;
use generate::GenerateMeasurement;

/// What is measured.
#[derive(Debug)]
enum Measures {
    /// Of a model that generates, with the tokens of each measurement of decoding.
    Generate(Vec<GenerateMeasurement>, usize),
    /// Of a model that embeds.
    Embed(Vec<EncodeMeasurement>),
}

/// What is measured, how often, and with which settings.
#[derive(Debug)]
struct BenchPlan {
    spec: ModelSpec,
    measures: Measures,
    repeat: usize,
}

/// The result of one measurement.
#[derive(Debug)]
struct Measured {
    label: String,
    fields: Map<String, Value>,
    speeds: Percentiles,
}

/// Runs the subcommand.
pub(super) async fn run(flags: EngineFlags) -> Result<(), BenchFailure> {
    let json = flags.json;
    let BenchPlan { spec, measures, repeat } = plan(&flags)?;
    let loader = Loader::new(device::real(), &prometheus::Registry::new())?;
    let quiet: OnProgress = Arc::new(|_, _| {});
    let runner = loader.load(&spec, &quiet).map_err(|failure| other_task(failure, &measures))?.runner;
    let mut fresh = 0;
    let (unit, results) = match (&runner, &measures) {
        (Runner::Generate(engine), Measures::Generate(measures, tokens)) => {
            let mut speeds = vec![Vec::new(); measures.len()];
            for turn in 0..=repeat {
                for (what, speeds) in measures.iter().zip(&mut speeds) {
                    let speed = generate::measure(engine, *what, *tokens, &mut fresh).await?;
                    speeds.extend((turn > 0).then_some(speed));
                }
            }
            let results = measures.iter().zip(speeds);
            (
                "tokens/s",
                results.map(|(what, speeds)| measured(what.label(), what.to_json(), speeds)).collect(),
            )
        }
        (Runner::Embed(encoder), Measures::Embed(measures)) => {
            let mut speeds = vec![Vec::new(); measures.len()];
            for turn in 0..=repeat {
                for (what, speeds) in measures.iter().zip(&mut speeds) {
                    let speed = encode::measure(encoder, *what, &mut fresh).await?;
                    speeds.extend((turn > 0).then_some(speed));
                }
            }
            let results = measures.iter().zip(speeds);
            (
                "texts/s",
                results.map(|(what, speeds)| measured(what.label(), what.to_json(), speeds)).collect(),
            )
        }
        // The task was asked for, so loading has refused every other.
        _ => {
            return Err(BenchFailure::flag("model", "its task is not the one that was asked for"));
        }
    };
    let results: Vec<Measured> = results;
    let text = if json {
        to_json(&spec, runner.device(), unit, &results).to_string()
    } else {
        to_text(runner.device(), unit, &results)
    };
    runner.stop().await;
    print(&text)
}

/// The error when the model is made for the other task.
fn other_task(failure: Failure, measures: &Measures) -> BenchFailure {
    match measures {
        _ if failure.reason != "TaskMismatch" => failure.into(),
        Measures::Generate(..) => {
            let why = "it generates no text; one that turns texts into vectors is measured with --texts, such as \
                --texts 1,32";
            BenchFailure::flag("model", why)
        }
        Measures::Embed(_) => BenchFailure::flag(
            "texts",
            "the model generates text or scores and has no vectors; leave this flag away",
        ),
    }
}

fn measured(label: String, fields: Map<String, Value>, speeds: Vec<f64>) -> Measured {
    Measured { label, fields, speeds: Percentiles::new(speeds) }
}

fn plan(flags: &EngineFlags) -> Result<BenchPlan, BenchFailure> {
    if !(1..=1000).contains(&flags.repeat) {
        return Err(BenchFailure::flag("repeat", format!("{} is not between 1 and 1000", flags.repeat)));
    }
    let mut spec = loading::spec_of(&flags.model, &flags.device)?;
    // Before anything is made: figures of the one task make no sense in the other.
    spec.task = Some(if flags.texts.is_empty() { Task::Generate } else { Task::Embed });
    let measures =
        if flags.texts.is_empty() { generation(flags, &mut spec)? } else { embedding(flags, &mut spec)? };
    Ok(BenchPlan { spec, measures, repeat: flags.repeat })
}

fn generation(flags: &EngineFlags, spec: &mut ModelSpec) -> Result<Measures, BenchFailure> {
    let measures = GenerateMeasurement::of(flags);
    if measures.is_empty() {
        return Err(BenchFailure::flag(
            "prefill",
            "nothing is left to measure; see also --depth and --sequences",
        ));
    }
    if !(2..=65_536).contains(&flags.tokens) {
        return Err(BenchFailure::flag("tokens", format!("{} is not between 2 and 65536", flags.tokens)));
    }
    let together = measures.iter().map(|what| what.sequences()).max().unwrap_or(1);
    if together > 256 {
        return Err(BenchFailure::flag("sequences", format!("{together} is more than 256")));
    }
    let longest = measures.iter().map(|what| what.prompt_tokens() + what.max_tokens(flags.tokens)).max();
    spec.engine.context_tokens = longest;
    if let Some(budget) = flags.token_budget {
        spec.engine.token_budget = budget;
    }
    spec.set_max_batch_size(together);
    // Room for all of them at full length: a sequence that waits for memory would be measured as a slow one.
    // Flags that would have no effect are refused.
    spec.engine.kv_memory_bytes = Some(u64::MAX);
    Ok(Measures::Generate(measures, flags.tokens))
}

fn embedding(flags: &EngineFlags, spec: &mut ModelSpec) -> Result<Measures, BenchFailure> {
    let most = flags.texts.iter().copied().max().unwrap_or(0);
    if flags.texts.contains(&0) || most > 256 {
        return Err(BenchFailure::flag("texts", "each is 1 to 256"));
    }
    if flags.text_tokens == 0 {
        return Err(BenchFailure::flag("text-tokens", "is at least 1"));
    }
    spec.set_max_batch_size(most);
    let texts =
        flags.texts.iter().map(|texts| EncodeMeasurement { texts: *texts, tokens: flags.text_tokens });
    Ok(Measures::Embed(texts.collect()))
}

fn to_json(spec: &ModelSpec, device: &str, unit: &str, results: &[Measured]) -> Value {
    let result = |Measured { fields, speeds, .. }: &Measured| {
        let mut result = fields.clone();
        result.extend([
            ("unit".to_owned(), json!(unit)),
            ("median".to_owned(), json!(speeds.median().map(rounded))),
            ("min".to_owned(), json!(speeds.min().map(rounded))),
            ("max".to_owned(), json!(speeds.max().map(rounded))),
            ("values".to_owned(), json!(speeds.values().map(rounded).collect::<Vec<_>>())),
        ]);
        Value::Object(result)
    };
    json!({
        "model": spec.name(),
        "device": device,
        "numerics": if spec.engine.numerics == trustformers_engine::Numerics::Exact { "exact" } else { "fast" },
        "results": results.iter().map(result).collect::<Vec<_>>(),
    })
}

fn to_text(device: &str, unit: &str, results: &[Measured]) -> String {
    let mut lines = vec![device.to_owned(), format!("{unit:<44}{:>10}{:>10}{:>10}", "median", "min", "max")];
    for Measured { label, speeds, .. } in results {
        let at = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        let (median, min, max) = (at(speeds.median()), at(speeds.min()), at(speeds.max()));
        lines.push(format!("{label:<44}{median:>10}{min:>10}{max:>10}"));
    }
    lines.join("\n")
}
