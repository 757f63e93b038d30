//! `trustformers-serve generate`: load a model, answer one prompt, end.
//!
//! stdout carries the answer alone (text as it is made, or one JSON object), so that it can be piped;
//! progress and logs go to stderr.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use trustformers_api::fields::HTTP_DEFAULTS;
use trustformers_api::{Asked, Format, Logprobs, Options};
use trustformers_engine::{
    GenerateError, GenerateParams, Generation, GenerationEvent, StopCause, SubmitError, TokenLogprobs,
};
use trustformers_proto::Task;
use trustformers_runtime::params::generate_params;
use trustformers_runtime::runner::Runner;
use trustformers_runtime::spec::{ModelSpec, SpeculationSpec};
use trustformers_store::{Source, StoreError};

use crate::flags::{GenerateFlags, OptionFlags};
use crate::loading::{self, FileError, LoadingError, ModelFlagError};
use crate::one_shot::{self, OneShotError, OutputError};

/// Why no answer was given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerateFailure {
    /// The flags about the model are wrong.
    #[error(transparent)]
    Model(#[from] ModelFlagError),
    /// `--draft` names nothing that can be read.
    #[error("--draft: {0}")]
    Draft(StoreError),
    /// The value of a flag is wrong. The text begins with the flag.
    #[error("{0}")]
    Flag(String),
    /// A file that a flag names cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadingError),
    /// The model is made for something else.
    #[error("--model: its task is {0} and it generates nothing; use trustformers-serve {0}")]
    WrongTask(Task),
    /// The engine refused the request.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The generation broke off.
    #[error(transparent)]
    Broken(#[from] GenerateError),
    /// The command could not begin.
    #[error(transparent)]
    OneShot(#[from] OneShotError),
    /// The answer could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl GenerateFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(_)
            | Self::Draft(_)
            | Self::Flag(_)
            | Self::Refused(SubmitError::Invalid { .. })
            | Self::Broken(GenerateError::Request(_))
            | Self::WrongTask(_)
            | Self::File(_) => 2,
            _ => 1,
        }
    }
}

/// What is to be done, checked.
struct GenerateJob {
    spec: ModelSpec,
    params: GenerateParams,
    json: bool,
}

/// An answer as it grows.
#[derive(Debug, Default)]
struct GeneratedText {
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
    let job = job(flags)?;
    one_shot::run(answer(job, began), |failure| match failure {
        GenerateFailure::Output(error) => Some(error),
        _ => None,
    })
}

fn job(flags: GenerateFlags) -> Result<GenerateJob, GenerateFailure> {
    let GenerateFlags {
        model,
        prompt,
        prompt_file,
        max_tokens,
        temperature,
        top_p,
        seed,
        options,
        draft,
        ngram,
        device,
        json,
    } = flags;
    let mut spec = loading::spec_of(&model, &device)?;
    spec.speculation = match draft {
        Some(draft) => {
            Some(SpeculationSpec::Draft(Source::from_str(&draft).map_err(GenerateFailure::Draft)?))
        }
        None => ngram.then_some(SpeculationSpec::Ngram),
    };
    // One prompt needs room for one sequence.
    spec.engine.max_batch_size = 1;
    spec.engine.max_queue = 1;
    let prompt_flag = if prompt_file.is_some() { "--prompt-file" } else { "--prompt" };
    let prompt = match prompt_file {
        Some(path) => loading::text_of("--prompt-file", &path)?,
        None => prompt.unwrap_or_default(),
    };
    let asked = Asked {
        prompt: prompt.as_str().into(),
        model: None,
        max_tokens: Some(max_tokens),
        temperature: Some(temperature),
        top_p: Some(top_p),
        seed,
        options: options_of(options)?,
        ..Asked::default()
    };
    let checked = asked.check(&HTTP_DEFAULTS).map_err(|error| in_flags(&error.to_string(), prompt_flag))?;
    let params = generate_params(checked, trustformers_engine::Prompt::Text(prompt));
    params.check().map_err(|error| in_flags(&error.to_string(), prompt_flag))?;
    Ok(GenerateJob { spec, params, json })
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
        (Some(path), ..) => Some(Format::JsonSchema(loading::text_of("--json-schema", &path)?)),
        (_, Some(path), _) => Some(Format::Grammar(loading::text_of("--grammar", &path)?)),
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

async fn answer(job: GenerateJob, began: Instant) -> Result<(), GenerateFailure> {
    let GenerateJob { spec, params, json } = job;
    let loaded = loading::load(spec).await?;
    let load = began.elapsed();
    let Runner::Generate(engine) = &loaded.runner else {
        return Err(GenerateFailure::WrongTask(loaded.runner.task()));
    };
    let generation = engine.submit(&params)?;
    let answer = collect(generation, !json).await?;
    if json {
        let object = answer.to_json(load, began.elapsed());
        one_shot::print(&format!("{object}\n"))?;
    }
    engine.stop().await;
    Ok(())
}

async fn collect(mut generation: Generation, print: bool) -> Result<GeneratedText, GenerateFailure> {
    let submitted = Instant::now();
    let mut answer =
        GeneratedText { prompt_ids: generation.prompt_ids().to_vec(), ..GeneratedText::default() };
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
                    one_shot::print(&text)?;
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
        one_shot::print("\n")?;
    }
    Ok(answer)
}

impl GeneratedText {
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
