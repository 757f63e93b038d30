//! `trustformers-serve generate`: load a model, answer one prompt, end.
//!
//! stdout carries the answer alone (text as it is made, or one JSON object), so that it can be piped; progress and logs
//! go to stderr.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use trustformers_api::fields::HTTP_DEFAULTS;
use trustformers_api::{Asked, Format, Logprobs, Options};
use trustformers_engine::{
    GenerateError, GenerateParams, Generation, GenerationEvent, StopCause, SubmitError, TokenLogprobs,
};
use trustformers_runtime::device;
use trustformers_runtime::failure::Failure;
use trustformers_runtime::load::{Loaded, Loader, OnProgress};
use trustformers_runtime::params::generate_params;
use trustformers_runtime::process::{EndSignals, StartError};
use trustformers_runtime::spec::{ModelSpec, numerics_of};
use trustformers_store::{Source, StoreError};

use crate::flags::{GenerateFlags, OptionFlags};

/// Status of a process that was interrupted, as shells give it.
const INTERRUPTED: u8 = 130;

/// Why no answer was given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerateFailure {
    /// `--model` names nothing that can be read.
    #[error("--model: {0}")]
    Model(StoreError),
    /// `--numerics` is no such word.
    #[error("--numerics: {0}")]
    Numerics(String),
    /// What a flag says is wrong; the text begins with the flag.
    #[error("{0}")]
    Flag(String),
    /// A file that a flag names cannot be read.
    #[error("{flag}: {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that a flag names is not text.
    #[error(
        "{flag}: {} is not UTF-8 (byte {at} cannot be read); convert it, for example with iconv",
        path.display()
    )]
    NotUtf8 {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Place of the first wrong byte.
        at: usize,
    },
    /// The model could not be loaded.
    #[error("{} ({})", .0, .0.reason)]
    Load(Failure),
    /// The engine refused the request.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The generation broke off.
    #[error(transparent)]
    Broken(#[from] GenerateError),
    /// The process could not be set up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The answer could not be written.
    #[error("stdout cannot be written: {0}")]
    Output(#[from] std::io::Error),
}

// No `#[from]`: the message holds the failure already, and a source would be printed after it once more.
impl From<Failure> for GenerateFailure {
    fn from(failure: Failure) -> Self {
        Self::Load(failure)
    }
}

impl GenerateFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(_)
            | Self::Numerics(_)
            | Self::Flag(_)
            | Self::Refused(SubmitError::Invalid { .. })
            | Self::Broken(GenerateError::Grammar { .. })
            | Self::Unreadable { .. }
            | Self::NotUtf8 { .. } => 2,
            _ => 1,
        }
    }
}

/// What is to be done, checked.
struct Task {
    spec: ModelSpec,
    params: GenerateParams,
    json: bool,
}

/// An answer as it grows.
#[derive(Debug, Default)]
struct Answer {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    finish_reason: &'static str,
    stopped_by: Option<StopCause>,
    logprobs: Vec<TokenLogprobs>,
    first_token: Duration,
    prefill: Duration,
    decode: Duration,
}

/// Runs the subcommand.
pub(crate) fn run(flags: GenerateFlags) -> Result<ExitCode, GenerateFailure> {
    let began = Instant::now();
    let task = task(flags)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut signals = EndSignals::new()?;
        tokio::select! {
            done = answer(task, began) => done.map(|()| ExitCode::SUCCESS),
            _ = signals.received() => Ok(ExitCode::from(INTERRUPTED)),
        }
    });
    // A load that was interrupted sits on a blocking thread and must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        // Whoever read the answer has seen enough.
        Err(GenerateFailure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            Ok(ExitCode::SUCCESS)
        }
        outcome => outcome,
    }
}

fn task(flags: GenerateFlags) -> Result<Task, GenerateFailure> {
    let GenerateFlags {
        model,
        prompt,
        prompt_file,
        max_tokens,
        temperature,
        top_p,
        seed,
        options,
        numerics,
        threads,
        json,
    } = flags;
    let source = Source::from_str(&model).map_err(GenerateFailure::Model)?;
    let name =
        source.path().file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned());
    let mut spec = ModelSpec::new(name, source);
    spec.engine.numerics = numerics_of(&numerics).map_err(GenerateFailure::Numerics)?;
    spec.threads = threads.map(usize::from);
    // One prompt needs room for one sequence.
    spec.engine.max_batch_size = 1;
    spec.engine.max_queue = 1;
    let prompt_flag = if prompt_file.is_some() { "--prompt-file" } else { "--prompt" };
    let prompt = match prompt_file {
        Some(path) => text_of("--prompt-file", &path)?,
        None => prompt.unwrap_or_default(),
    };
    let asked = Asked {
        prompt,
        model: None,
        max_tokens: Some(max_tokens),
        temperature: Some(temperature),
        top_p: Some(top_p),
        seed,
        options: options_of(options)?,
    };
    let checked = asked.check(&HTTP_DEFAULTS).map_err(|error| in_flags(&error.to_string(), prompt_flag))?;
    let params = generate_params(checked);
    params.check().map_err(|error| in_flags(&error.to_string(), prompt_flag))?;
    Ok(Task { spec, params, json })
}

/// An error about a request's field, which begins with the field's name, in the words of the command line.
fn in_flags(error: &str, prompt_flag: &str) -> GenerateFailure {
    let (field, why) = error.split_once(':').unwrap_or((error, ""));
    let flag = match field {
        "prompt" => prompt_flag.to_owned(),
        _ => format!("--{}", field.replace('_', "-")),
    };
    GenerateFailure::Flag(format!("{flag}:{why}"))
}

fn options_of(flags: OptionFlags) -> Result<Options, GenerateFailure> {
    let OptionFlags {
        top_k,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        logprobs,
        stop,
        stop_token_id,
        json_schema,
        json_object,
        regex,
        grammar,
    } = flags;
    // The flags exclude each other.
    let format = match (json_schema, grammar, regex) {
        (Some(path), ..) => Some(Format::JsonSchema(text_of("--json-schema", &path)?)),
        (_, Some(path), _) => Some(Format::Grammar(text_of("--grammar", &path)?)),
        (.., Some(regex)) => Some(Format::Regex(regex)),
        _ => json_object.then_some(Format::JsonObject),
    };
    Ok(Options {
        top_k,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        logprobs,
        stop,
        stop_token_ids: stop_token_id,
        format,
    })
}

/// The file's bytes as they are, a final newline included.
fn text_of(flag: &'static str, path: &Path) -> Result<String, GenerateFailure> {
    let bytes = std::fs::read(path).map_err(|source| GenerateFailure::Unreadable {
        flag,
        path: path.to_owned(),
        source,
    })?;
    String::from_utf8(bytes).map_err(|error| GenerateFailure::NotUtf8 {
        flag,
        path: path.to_owned(),
        at: error.utf8_error().valid_up_to(),
    })
}

async fn answer(task: Task, began: Instant) -> Result<(), GenerateFailure> {
    let Task { spec, params, json } = task;
    let loaded = load(spec).await?;
    let load = began.elapsed();
    let generation = loaded.engine.submit(&params)?;
    let answer = collect(generation, !json).await?;
    if json {
        let object = answer.to_json(load, began.elapsed());
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{object}")?;
        stdout.flush()?;
    }
    loaded.engine.stop().await;
    Ok(())
}

async fn load(spec: ModelSpec) -> Result<Loaded, GenerateFailure> {
    let bar = ProgressBar::new(0);
    bar.set_style(bar_style());
    bar.set_message(spec.name().to_owned());
    let progress: OnProgress = {
        let bar = bar.clone();
        Arc::new(move |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })
    };
    let loader = Loader::new(device::real(), &prometheus::Registry::new()).map_err(StartError::from)?;
    let loading = tokio::task::spawn_blocking(move || loader.load(&spec, &progress));
    let outcome = loading
        .await
        .map_err(|error| Failure::permanent("InternalError", format!("loading broke off: {error}")))?;
    bar.finish_and_clear();
    Ok(outcome?)
}

/// indicatif draws on stderr, and only where that is a terminal.
fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("loading {msg} {wide_bar} {bytes}/{total_bytes} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

async fn collect(mut generation: Generation, print: bool) -> Result<Answer, GenerateFailure> {
    let submitted = Instant::now();
    let mut answer = Answer { prompt_ids: generation.prompt_ids().to_vec(), ..Answer::default() };
    while let Some(event) = generation.next().await {
        match event? {
            GenerationEvent::Token { id, text, logprobs, .. } => {
                if answer.ids.is_empty() {
                    answer.first_token = submitted.elapsed();
                }
                answer.ids.push(id);
                answer.logprobs.extend(logprobs);
                answer.text.push_str(&text);
                if print {
                    let mut stdout = std::io::stdout().lock();
                    stdout.write_all(text.as_bytes())?;
                    stdout.flush()?;
                }
            }
            GenerationEvent::Finished { reason, stop, timings, .. } => {
                answer.finish_reason = reason.as_str();
                answer.stopped_by = stop;
                answer.prefill = timings.prefill;
                answer.decode = timings.decode;
            }
        }
    }
    if print && !answer.text.ends_with('\n') {
        writeln!(std::io::stdout())?;
    }
    Ok(answer)
}

impl Answer {
    fn to_json(&self, load: Duration, total: Duration) -> Value {
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let mut object = json!({
            "prompt_tokens": self.prompt_ids,
            "tokens": self.ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "timings_ms": {
                "load": ms(load),
                "prefill": ms(self.prefill),
                "first_token": ms(self.first_token),
                "decode": ms(self.decode),
                "total": ms(total),
            },
        });
        match &self.stopped_by {
            Some(StopCause::Text(text)) => object["stopped_by"] = json!(text),
            Some(StopCause::Token(id)) => object["stopped_by"] = json!(id),
            None => {}
        }
        if !self.logprobs.is_empty() {
            let logprobs = self.logprobs.iter().cloned();
            let logprobs = logprobs.map(|TokenLogprobs { logprob, top }| Logprobs { logprob, top }.to_json());
            object["logprobs"] = logprobs.collect();
        }
        object
    }
}
