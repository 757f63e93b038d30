//! Measurements of an engine that generates: reading prompts and producing tokens.

use std::time::Instant;

use futures::StreamExt;
use futures::stream::select_all;
use serde_json::{Map, Value, json};
use trustformers_engine::{Engine, GenerateParams, GenerationEvent, Prompt};

use crate::bench::flags::EngineFlags;
use crate::bench::{BenchFailure, prompts};

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GenerateMeasurement {
    /// Reading a prompt of so many tokens, until the first token of the answer.
    Prefill { prompt_tokens: usize },
    /// Producing tokens, `sequences` at once, each with `prompt_tokens` before.
    Decode { sequences: usize, prompt_tokens: usize },
}

impl GenerateMeasurement {
    /// The measurements that the flags ask for.
    pub(super) fn of(flags: &EngineFlags) -> Vec<Self> {
        let prefill = flags.prefill.iter().filter(|tokens| **tokens > 0);
        let depth = flags.depth.iter().map(|depth| Self::Decode { sequences: 1, prompt_tokens: *depth });
        let sequences = flags.sequences.iter().filter(|sequences| **sequences > 0);
        let together =
            |sequences: &usize| Self::Decode { sequences: *sequences, prompt_tokens: flags.prompt_tokens };
        prefill
            .map(|prompt_tokens| Self::Prefill { prompt_tokens: *prompt_tokens })
            .chain(depth)
            .chain(sequences.map(together))
            .collect()
    }

    /// For people.
    pub(super) fn label(self) -> String {
        match self {
            Self::Prefill { prompt_tokens } => format!("prefill of {prompt_tokens}"),
            Self::Decode { sequences: 1, prompt_tokens } => format!("decode at depth {prompt_tokens}"),
            Self::Decode { sequences, prompt_tokens } => {
                format!("decode of {sequences} sequences after {prompt_tokens}")
            }
        }
    }

    /// For programs.
    pub(super) fn to_json(self) -> Map<String, Value> {
        let fields = [
            ("what", json!(self.name())),
            ("prompt_tokens", json!(self.prompt_tokens())),
            ("sequences", json!(self.sequences())),
        ];
        fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Prefill { .. } => "prefill",
            Self::Decode { .. } => "decode",
        }
    }

    pub(super) fn sequences(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { sequences, .. } => sequences,
        }
    }

    /// Tokens in the cache before, of each sequence. One is always fed.
    pub(super) fn prompt_tokens(self) -> usize {
        match self {
            Self::Prefill { prompt_tokens } | Self::Decode { prompt_tokens, .. } => prompt_tokens.max(1),
        }
    }

    /// Tokens of each answer. The first of a decode comes from its prompt and is not measured.
    pub(super) fn max_tokens(self, tokens: usize) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { .. } => tokens + 1,
        }
    }
}

/// One measurement, in tokens per second. `fresh` numbers prompts, so that none comes twice.
pub(super) async fn measure(
    engine: &Engine,
    what: GenerateMeasurement,
    tokens: usize,
    fresh: &mut usize,
) -> Result<f64, BenchFailure> {
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
        GenerateMeasurement::Prefill { prompt_tokens } => {
            prompt_tokens as f64 / times[0].first().copied().unwrap_or(f64::NAN)
        }
        GenerateMeasurement::Decode { .. } => steady_rate(&times).unwrap_or(f64::NAN),
    })
}

fn params(engine: &Engine, what: GenerateMeasurement, tokens: usize, fresh: usize) -> GenerateParams {
    let model = engine.model();
    let mut params = GenerateParams::greedy(String::new(), what.max_tokens(tokens));
    params.prompt = Prompt::Tokens(prompts::ids(fresh, what.prompt_tokens(), model.facts().vocabulary));
    // An answer that ends early would end the measurement: the bias costs one pass over a row of logits per
    // token.
    params.logit_bias = model.tokenizer().eos_ids().iter().map(|id| (*id, -100.0)).collect();
    params
}

/// Tokens per second of all sequences together while all of them decode: from the moment at which the last
/// one has started to that at which the first one ends. `None` when there is no such time.
fn steady_rate(times: &[Vec<f64>]) -> Option<f64> {
    let started = times.iter().map(|times| times.first().copied()).collect::<Option<Vec<_>>>()?;
    let ended = times.iter().map(|times| times.last().copied()).collect::<Option<Vec<_>>>()?;
    let from = started.into_iter().reduce(f64::max)?;
    let until = ended.into_iter().reduce(f64::min)?;
    let tokens = times.iter().flatten().filter(|time| (from..=until).contains(*time)).count();
    // Those at `from` itself came out of the step before.
    let before = times.iter().flatten().filter(|time| **time == from).count();
    (until > from).then(|| (tokens - before) as f64 / (until - from))
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
