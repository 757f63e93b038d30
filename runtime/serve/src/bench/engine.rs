//! `bench engine`: what the engine gives in this process.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::select_all;
use serde_json::{Value, json};
use trustformers_engine::{Engine, GenerateParams, GenerationEvent, Prompt};
use trustformers_runtime::device;
use trustformers_runtime::load::{Loader, OnProgress};
use trustformers_runtime::runner::Runner;
use trustformers_runtime::spec::{ModelSpec, numerics_of};
use trustformers_store::Source;

use super::flags::EngineFlags;
use super::spread::{Spread, rounded};
use super::{BenchFailure, print, prompts};

/// One thing that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Reading a prompt of so many tokens, until the first token of the answer.
    Prefill { prompt_tokens: usize },
    /// Producing tokens, `sequences` at once, each with `prompt_tokens` before.
    Decode { sequences: usize, prompt_tokens: usize },
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Prefill { .. } => "prefill",
            Self::Decode { .. } => "decode",
        }
    }

    fn sequences(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { sequences, .. } => sequences,
        }
    }

    /// Tokens in the cache before, of each sequence. One is always fed.
    fn prompt_tokens(self) -> usize {
        match self {
            Self::Prefill { prompt_tokens } | Self::Decode { prompt_tokens, .. } => prompt_tokens.max(1),
        }
    }

    /// Tokens of each answer. The first of a decode comes from its prompt and is not measured.
    fn max_tokens(self, tokens: usize) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { .. } => tokens + 1,
        }
    }
}

/// What is measured and how often.
#[derive(Debug)]
struct Task {
    spec: ModelSpec,
    measures: Vec<What>,
    tokens: usize,
    repeat: usize,
}

/// Runs the subcommand.
pub(super) async fn run(flags: EngineFlags) -> Result<(), BenchFailure> {
    let json = flags.json;
    let Task { spec, measures, tokens, repeat } = task(&flags)?;
    let loader = Loader::new(device::real(), &prometheus::Registry::new())?;
    let quiet: OnProgress = Arc::new(|_, _| {});
    let Runner::Generate(engine) = loader.load(&spec, &quiet)?.runner else {
        return Err(BenchFailure::flag(
            "model",
            "it turns texts into vectors; see bench load --protocol for a server of it",
        ));
    };
    let mut speeds = vec![Vec::new(); measures.len()];
    let mut fresh = 0;
    for turn in 0..=repeat {
        for (what, speeds) in measures.iter().zip(&mut speeds) {
            let speed = measure(&engine, *what, tokens, &mut fresh).await?;
            if turn > 0 {
                speeds.push(speed);
            }
        }
    }
    let results: Vec<(What, Spread)> =
        measures.into_iter().zip(speeds.into_iter().map(Spread::new)).collect();
    let text = if json { to_json(&spec, &engine, &results).to_string() } else { to_text(&engine, &results) };
    engine.stop().await;
    print(&text)
}

fn task(flags: &EngineFlags) -> Result<Task, BenchFailure> {
    let source = Source::from_str(&flags.model)?;
    if !(2..=65_536).contains(&flags.tokens) {
        return Err(BenchFailure::flag("tokens", format!("{} is not between 2 and 65536", flags.tokens)));
    }
    if !(1..=1000).contains(&flags.repeat) {
        return Err(BenchFailure::flag("repeat", format!("{} is not between 1 and 1000", flags.repeat)));
    }
    let prefill = flags.prefill.iter().filter(|tokens| **tokens > 0);
    let depth = flags.depth.iter().map(|depth| What::Decode { sequences: 1, prompt_tokens: *depth });
    let sequences = flags.sequences.iter().filter(|sequences| **sequences > 0);
    let together =
        |sequences: &usize| What::Decode { sequences: *sequences, prompt_tokens: flags.prompt_tokens };
    let measures: Vec<What> = prefill
        .map(|prompt_tokens| What::Prefill { prompt_tokens: *prompt_tokens })
        .chain(depth)
        .chain(sequences.map(together))
        .collect();
    if measures.is_empty() {
        return Err(BenchFailure::flag(
            "prefill",
            "nothing is left to measure; see also --depth and --sequences",
        ));
    }
    let name =
        source.path().file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned());
    let mut spec = ModelSpec::new(name, source);
    spec.engine.numerics = numerics_of(&flags.numerics).map_err(|why| BenchFailure::flag("numerics", why))?;
    spec.threads = flags.threads.map(usize::from);
    let longest = measures.iter().map(|what| what.prompt_tokens() + what.max_tokens(flags.tokens)).max();
    spec.engine.context_tokens = longest;
    if let Some(budget) = flags.token_budget {
        spec.engine.token_budget = budget;
    }
    let together = measures.iter().map(|what| what.sequences()).max().unwrap_or(1);
    if together > 256 {
        return Err(BenchFailure::flag("sequences", format!("{together} is more than 256")));
    }
    spec.set_max_batch_size(together);
    // Room for all of them at full length: a sequence that waits for memory would be measured as a slow one. What
    // would not be used is not taken.
    spec.engine.kv_memory_bytes = Some(u64::MAX);
    Ok(Task { spec, measures, tokens: flags.tokens, repeat: flags.repeat })
}

/// One measurement, in tokens per second. `fresh` numbers prompts, so that none comes twice.
async fn measure(engine: &Engine, what: What, tokens: usize, fresh: &mut usize) -> Result<f64, BenchFailure> {
    let began = Instant::now();
    let mut generations = Vec::new();
    for sequence in 0..what.sequences() {
        *fresh += 1;
        let generation = engine.submit(&params(engine, what, tokens, *fresh))?;
        generations.push(generation.map(move |event| (sequence, event)));
    }
    let mut times = vec![Vec::with_capacity(tokens + 1); generations.len()];
    let mut events = select_all(generations);
    while let Some((sequence, event)) = events.next().await {
        if let GenerationEvent::Token { .. } = event? {
            times[sequence].push(began.elapsed().as_secs_f64());
        }
    }
    Ok(match what {
        What::Prefill { prompt_tokens } => {
            prompt_tokens as f64 / times[0].first().copied().unwrap_or(f64::NAN)
        }
        What::Decode { .. } => steady_rate(&times).unwrap_or(f64::NAN),
    })
}

fn params(engine: &Engine, what: What, tokens: usize, fresh: usize) -> GenerateParams {
    let model = engine.model();
    let mut params = GenerateParams::greedy(String::new(), what.max_tokens(tokens));
    params.prompt = Prompt::Tokens(prompts::ids(fresh, what.prompt_tokens(), model.facts().vocabulary));
    // An answer that ends early would end the measurement: the bias costs one pass over a row of logits per token.
    params.logit_bias = model.tokenizer().eos_ids().iter().map(|id| (*id, -100.0)).collect();
    params
}

/// Tokens per second of all sequences together while all of them decode: from the moment at which the last one has begun
/// to that at which the first one ends. `None` when there is no such time.
fn steady_rate(times: &[Vec<f64>]) -> Option<f64> {
    let begun = times.iter().map(|times| times.first().copied()).collect::<Option<Vec<_>>>()?;
    let ended = times.iter().map(|times| times.last().copied()).collect::<Option<Vec<_>>>()?;
    let from = begun.into_iter().reduce(f64::max)?;
    let until = ended.into_iter().reduce(f64::min)?;
    let tokens = times.iter().flatten().filter(|time| (from..=until).contains(*time)).count();
    // Those at `from` itself came out of the step before.
    let before = times.iter().flatten().filter(|time| **time == from).count();
    (until > from).then(|| (tokens - before) as f64 / (until - from))
}

fn to_json(spec: &ModelSpec, engine: &Engine, results: &[(What, Spread)]) -> Value {
    let result = |(what, speeds): &(What, Spread)| {
        json!({
            "what": what.name(),
            "prompt_tokens": what.prompt_tokens(),
            "sequences": what.sequences(),
            "unit": "tokens/s",
            "median": speeds.median().map(rounded),
            "min": speeds.min().map(rounded),
            "max": speeds.max().map(rounded),
            "values": speeds.values().map(rounded).collect::<Vec<_>>(),
        })
    };
    let info = engine.info();
    json!({
        "model": spec.name(),
        "device": info.device,
        "numerics": if info.numerics == trustformers_engine::Numerics::Exact { "exact" } else { "fast" },
        "token_budget": info.token_budget,
        "results": results.iter().map(result).collect::<Vec<_>>(),
    })
}

fn to_text(engine: &Engine, results: &[(What, Spread)]) -> String {
    let mut lines = vec![
        engine.info().device.clone(),
        format!("{:<44}{:>10}{:>10}{:>10}", "tokens per second", "median", "min", "max"),
    ];
    for (what, speeds) in results {
        let name = match what {
            What::Prefill { prompt_tokens } => format!("prefill of {prompt_tokens}"),
            What::Decode { sequences: 1, prompt_tokens } => format!("decode at depth {prompt_tokens}"),
            What::Decode { sequences, prompt_tokens } => {
                format!("decode of {sequences} sequences after {prompt_tokens}")
            }
        };
        let at = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        let (median, min, max) = (at(speeds.median()), at(speeds.min()), at(speeds.max()));
        lines.push(format!("{name:<44}{median:>10}{min:>10}{max:>10}"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sequence_is_measured_from_its_first_token_on() {
        // The first comes out of the prompt: four more in two seconds.
        assert_eq!(steady_rate(&[vec![5.0, 5.5, 6.0, 6.5, 7.0]]), Some(2.0));
        assert_eq!(steady_rate(&[vec![5.0]]), None);
        assert_eq!(steady_rate(&[vec![]]), None);
    }

    #[test]
    fn several_sequences_are_measured_while_all_of_them_decode() {
        // The second begins at 2 and the first ends at 4: in between there are tokens at 3 and 4 of both.
        let times = [vec![1.0, 2.0, 3.0, 4.0], vec![2.0, 3.0, 4.0, 5.0]];
        assert_eq!(steady_rate(&times), Some(2.0));
        assert_eq!(steady_rate(&[vec![1.0, 2.0], vec![3.0, 4.0]]), None, "they never ran together");
    }
}
