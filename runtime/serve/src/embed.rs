//! `trustformers-serve embed`: load a model, turn texts into vectors, end.
//!
//! stdout carries the vectors alone (a line for each text, or one JSON object), so that it can be piped;
//! progress and logs go to stderr.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use trustformers_engine::encoder::{EncodeError, EncodeInput, EncodeParams, MAX_TEXTS};
use trustformers_proto::Task;
use trustformers_runtime::runner::Runner;
use trustformers_runtime::spec::ModelSpec;

use crate::flags::EmbedFlags;
use crate::loading::{self, FileError, LoadingError, ModelFlagError};
use crate::one_shot::{self, OneShotError, OutputError};

/// Why there are no vectors.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EmbedFailure {
    /// The flags about the model are wrong.
    #[error(transparent)]
    Model(#[from] ModelFlagError),
    /// The file that is named cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file has no line.
    #[error("--input-file: it is empty; give one text a line")]
    NoText,
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadingError),
    /// The model is made for something else.
    #[error("--model: its task is {0} and it has no vectors to give; use trustformers-serve {0}")]
    WrongTask(Task),
    /// A text cannot be encoded, or the engine failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The command could not begin.
    #[error(transparent)]
    OneShot(#[from] OneShotError),
    /// The vectors could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl EmbedFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(_)
            | Self::File(_)
            | Self::NoText
            | Self::WrongTask(_)
            | Self::Encode(EncodeError::TooLong { .. } | EncodeError::Invalid { .. }) => 2,
            _ => 1,
        }
    }
}

/// What is to be done, checked.
struct EmbedJob {
    spec: ModelSpec,
    texts: Vec<String>,
    truncate: bool,
    json: bool,
}

/// All vectors.
#[derive(Debug, Default)]
struct Vectors {
    values: Vec<f32>,
    width: usize,
    tokens: usize,
    truncated: Vec<usize>,
    pooling_note: Option<String>,
    load: Duration,
    encode: Duration,
}

/// The JSON object; its numbers are f32 and have no more digits than that.
#[derive(Serialize)]
struct Object<'a> {
    data: Vec<Item<'a>>,
    usage: Usage,
    #[serde(skip_serializing_if = "<[usize]>::is_empty")]
    truncated: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    pooling_note: Option<&'a str>,
    timings_ms: Timings,
}

#[derive(Serialize)]
struct Item<'a> {
    index: usize,
    embedding: &'a [f32],
}

/// Tokens of an answer without new ones.
#[derive(Serialize)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(crate) const fn of(tokens: usize) -> Self {
        Self { prompt_tokens: tokens, total_tokens: tokens }
    }
}

/// Milliseconds by phase.
#[derive(Serialize)]
pub(crate) struct Timings {
    load: f64,
    encode: f64,
}

impl Timings {
    pub(crate) fn of(load: Duration, encode: Duration) -> Self {
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        Self { load: ms(load), encode: ms(encode) }
    }
}

/// Runs the subcommand.
pub(crate) fn run(flags: EmbedFlags) -> Result<ExitCode, EmbedFailure> {
    let began = Instant::now();
    let job = job(flags)?;
    one_shot::run(embed(job, began), |failure| match failure {
        EmbedFailure::Output(error) => Some(error),
        _ => None,
    })
}

fn job(flags: EmbedFlags) -> Result<EmbedJob, EmbedFailure> {
    let EmbedFlags { model, input, input_file, no_truncate, device, json } = flags;
    let mut spec = loading::spec_of(&model, &device)?;
    // One request is under way at a time, and all of it waits at once.
    spec.engine.max_queue = MAX_TEXTS;
    let texts = match input_file {
        Some(path) => lines(&loading::text_of("--input-file", &path)?),
        None => input,
    };
    if texts.is_empty() {
        return Err(EmbedFailure::NoText);
    }
    Ok(EmbedJob { spec, texts, truncate: !no_truncate, json })
}

/// The lines of a text, empty ones too. Each ends in `\n`; the last may do without.
pub(crate) fn lines(text: &str) -> Vec<String> {
    if text.is_empty() {
        return Vec::new();
    }
    text.strip_suffix('\n').unwrap_or(text).split('\n').map(str::to_owned).collect()
}

async fn embed(job: EmbedJob, began: Instant) -> Result<(), EmbedFailure> {
    let EmbedJob { spec, texts, truncate, json } = job;
    let loaded = loading::load(spec).await?;
    let Runner::Embed(encoder) = &loaded.runner else {
        return Err(EmbedFailure::WrongTask(loaded.runner.task()));
    };
    let facts = encoder.model().facts().embedding.as_ref();
    let mut all = Vectors {
        load: began.elapsed(),
        pooling_note: facts.and_then(|facts| facts.pooling_note.clone()),
        ..Vectors::default()
    };
    let (started, mut first) = (Instant::now(), 0);
    for texts in texts.chunks(MAX_TEXTS) {
        let prompts = texts.iter().cloned().map(EncodeInput::Text).collect();
        let params = EncodeParams { texts: prompts, truncate, ..EncodeParams::texts([""; 0]) };
        let encoded = match encoder.submit(&params) {
            // Counted from the first text of all, as the caller does.
            Err(EncodeError::TooLong { index, limit }) => {
                return Err(EncodeError::TooLong { index: first + index, limit }.into());
            }
            submitted => submitted?.await?,
        };
        all.values.extend_from_slice(&encoded.values);
        all.width = encoded.width;
        all.tokens += encoded.tokens;
        all.truncated.extend(encoded.truncated.iter().map(|index| first + index));
        first += texts.len();
    }
    all.encode = started.elapsed();
    all.print(json).map_err(OutputError::from)?;
    encoder.stop().await;
    Ok(())
}

impl Vectors {
    fn print(&self, json: bool) -> Result<(), std::io::Error> {
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        if json {
            serde_json::to_writer(&mut stdout, &self.object())?;
            writeln!(stdout)?;
        } else {
            for vector in self.rows() {
                serde_json::to_writer(&mut stdout, vector)?;
                writeln!(stdout)?;
            }
        }
        stdout.flush()
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.width.max(1))
    }

    fn object(&self) -> Object<'_> {
        let data = self.rows().enumerate().map(|(index, embedding)| Item { index, embedding });
        Object {
            data: data.collect(),
            usage: Usage::of(self.tokens),
            truncated: &self.truncated,
            pooling_note: self.pooling_note.as_deref(),
            timings_ms: Timings::of(self.load, self.encode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_text_and_a_last_newline_begins_none() {
        for (text, wanted) in [
            ("", vec![]),
            ("\n", vec![""]),
            ("a", vec!["a"]),
            ("a\n", vec!["a"]),
            ("a\n\n b \n\n", vec!["a", "", " b ", ""]),
            ("a\r\nb", vec!["a\r", "b"]),
        ] {
            assert_eq!(lines(text), wanted, "{text:?}");
        }
    }
}
