//! `trustformers-serve classify` and `trustformers-serve rerank`: load a model, give scores, end.
//!
//! stdout carries the scores alone (a line for each text or document, or one JSON object), so that it can be
//! piped; progress and logs go to stderr.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use trustformers_api::{
    Aggregation, ApiError, Classified, Entity, EntityBody, LabelScore, RankedIndex, Reranked,
};
use trustformers_engine::encoder::{EncodeError, EncodeInput, EncodeParams, Encoded, Encoder, MAX_TEXTS};
use trustformers_proto::Task;
use trustformers_runtime::entities::TokenLabelling;
use trustformers_runtime::runner::Runner;
use trustformers_runtime::scores::score_rows;
use trustformers_runtime::spec::ModelSpec;

use crate::embed::{Timings, Usage, lines};
use crate::flags::{ClassifyFlags, RerankFlags, ScoreFlags};
use crate::loading::{self, FileError, LoadingError, ModelFlagError};
use crate::one_shot::{self, OneShotError, OutputError};

/// Why there are no scores.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScoreFailure {
    /// The flags about the model are wrong.
    #[error(transparent)]
    Model(#[from] ModelFlagError),
    /// The file that is named cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file has no line.
    #[error("--{0}: it is empty; give one text a line")]
    NoText(&'static str),
    /// A flag whose value asks for nothing.
    #[error("--{0}: 0 asks for nothing; leave it out for all")]
    Zero(&'static str),
    /// The query is empty.
    #[error("--query: it is empty; give what the documents are to answer")]
    NoQuery,
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadingError),
    /// The model is made for something else.
    #[error("--model: its task is {found}, not {wanted}; use trustformers-serve {found}")]
    WrongTask {
        /// What the model does.
        found: Task,
        /// What the command does.
        wanted: Task,
    },
    /// A flag that has no meaning for the model.
    #[error("--{flag}: it is for labels of {wanted}, and this model labels {found}; leave it out")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What it is for.
        wanted: &'static str,
        /// What the model does.
        found: &'static str,
    },
    /// A text cannot be encoded, or the engine failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The model gave no scores.
    #[error(transparent)]
    Scores(#[from] ApiError),
    /// The command could not begin.
    #[error(transparent)]
    OneShot(#[from] OneShotError),
    /// The scores could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl ScoreFailure {
    /// 2 for what the caller typed, 1 for the rest.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Model(_)
            | Self::File(_)
            | Self::NoText(_)
            | Self::Zero(_)
            | Self::NoQuery
            | Self::WrongTask { .. }
            | Self::Flag { .. }
            | Self::Encode(EncodeError::TooLong { .. } | EncodeError::Invalid { .. }) => 2,
            _ => 1,
        }
    }
}

/// What is to be scored, checked.
struct ScoreJob {
    spec: ModelSpec,
    task: Task,
    inputs: Vec<EncodeInput>,
    truncate: bool,
    raw_scores: bool,
    /// How labels of tokens become entities; none: not given.
    aggregation: Option<Aggregation>,
    /// Labels of each text, or documents, that are printed; none: all.
    most: Option<u32>,
    json: bool,
}

/// The scores of all inputs.
#[derive(Debug, Default)]
struct Scored {
    labels: Vec<String>,
    values: Vec<f32>,
    /// Of a model that labels tokens, for each text.
    entities: Option<Vec<Vec<Entity>>>,
    tokens: usize,
    truncated: Vec<usize>,
    load: Duration,
    encode: Duration,
}

/// The JSON object; its numbers are f32 and have no more digits than that.
#[derive(Serialize)]
struct ScoreObject<'a, T> {
    results: Vec<T>,
    usage: Usage,
    #[serde(skip_serializing_if = "<[usize]>::is_empty")]
    truncated: &'a [usize],
    timings_ms: Timings,
}

#[derive(Serialize)]
struct TextScores<'a> {
    scores: Vec<LabelScore<'a>>,
}

#[derive(Serialize)]
struct TextEntities<'a> {
    entities: Vec<EntityBody<'a>>,
}

#[derive(Serialize)]
struct DocumentScore {
    index: usize,
    score: f32,
}

/// Runs `classify`.
pub(crate) fn classify(flags: ClassifyFlags) -> Result<ExitCode, ScoreFailure> {
    let began = Instant::now();
    let ClassifyFlags { input, input_file, top_k, aggregation_strategy, score } = flags;
    let texts = match input_file {
        Some(path) => lines(&loading::text_of("--input-file", &path)?),
        None => input,
    };
    if texts.is_empty() {
        return Err(ScoreFailure::NoText("input-file"));
    }
    let inputs = texts.into_iter().map(EncodeInput::Text).collect();
    let job = job(score, Task::Classify, inputs, Shown { flag: "top-k", most: top_k })?;
    run(ScoreJob { aggregation: aggregation_strategy, ..job }, began)
}

/// Runs `rerank`.
pub(crate) fn rerank(flags: RerankFlags) -> Result<ExitCode, ScoreFailure> {
    let began = Instant::now();
    let RerankFlags { query, document, documents_file, top_n, score } = flags;
    if query.is_empty() {
        return Err(ScoreFailure::NoQuery);
    }
    let documents = match documents_file {
        Some(path) => lines(&loading::text_of("--documents-file", &path)?),
        None => document,
    };
    if documents.is_empty() {
        return Err(ScoreFailure::NoText("documents-file"));
    }
    let query: Arc<str> = query.into();
    let pair = |second| EncodeInput::Pair { first: Arc::clone(&query), second };
    let inputs = documents.into_iter().map(pair).collect();
    run(job(score, Task::Rerank, inputs, Shown { flag: "top-n", most: top_n })?, began)
}

/// How much of the result is printed, and the flag that says so.
#[derive(Debug, Clone, Copy)]
struct Shown {
    flag: &'static str,
    most: Option<u32>,
}

fn job(
    flags: ScoreFlags,
    task: Task,
    inputs: Vec<EncodeInput>,
    shown: Shown,
) -> Result<ScoreJob, ScoreFailure> {
    if shown.most == Some(0) {
        return Err(ScoreFailure::Zero(shown.flag));
    }
    let ScoreFlags { model, raw_scores, no_truncate, device, json } = flags;
    let mut spec = loading::spec_of(&model, &device)?;
    // Files of a decoder that ranks by its words are those of one that generates.
    spec.preferred_task = Some(task);
    // One request is under way at a time, and all of it waits at once.
    spec.engine.max_queue = MAX_TEXTS;
    let (truncate, aggregation, most) = (!no_truncate, None, shown.most);
    Ok(ScoreJob { spec, task, inputs, truncate, raw_scores, aggregation, most, json })
}

fn run(job: ScoreJob, began: Instant) -> Result<ExitCode, ScoreFailure> {
    one_shot::run(score(job, began), |failure| match failure {
        ScoreFailure::Output(error) => Some(error),
        _ => None,
    })
}

async fn score(job: ScoreJob, began: Instant) -> Result<(), ScoreFailure> {
    let ScoreJob { spec, task, inputs, truncate, raw_scores, aggregation, most, json } = job;
    let loaded = loading::load(spec).await?;
    let encoder = match &loaded.runner {
        Runner::Classify(encoder) if task == Task::Classify => encoder,
        Runner::Rerank(encoder) if task == Task::Rerank => encoder,
        other => return Err(ScoreFailure::WrongTask { found: other.task(), wanted: task }),
    };
    let model = encoder.model();
    let labels_tokens = model.facts().labels_tokens();
    check_flags(labels_tokens, aggregation, most)?;
    let mut all = Scored { load: began.elapsed(), ..Scored::default() };
    all.entities = labels_tokens.then(Vec::new);
    if let Some(facts) = &model.facts().classification {
        all.labels.clone_from(&facts.labels);
    }
    let (started, mut first) = (Instant::now(), 0);
    for texts in inputs.chunks(MAX_TEXTS) {
        let params = EncodeParams { truncate, ..EncodeParams::inputs(texts.to_vec()) };
        let encoded = encode(encoder, &params, first).await?;
        match &mut all.entities {
            Some(entities) => {
                let max_tokens = encoder.info().context_tokens;
                let (texts, aggregation) = (plain_texts(texts), aggregation.unwrap_or_default());
                let labelling = TokenLabelling { texts, aggregation, raw_scores, max_tokens };
                entities.extend(labelling.entities(model, &encoded)?);
            }
            None => all.values.extend(score_rows(model, &encoded, raw_scores)?),
        }
        all.tokens += encoded.tokens;
        all.truncated.extend(encoded.truncated.iter().map(|index| first + index));
        first += texts.len();
    }
    all.encode = started.elapsed();
    let printed =
        if task == Task::Classify { all.print_labels(most, json) } else { all.print_order(most, json) };
    printed.map_err(OutputError::from)?;
    encoder.stop().await;
    Ok(())
}

/// Refuses a flag that has no meaning for the model.
fn check_flags(
    labels_tokens: bool,
    aggregation: Option<Aggregation>,
    most: Option<u32>,
) -> Result<(), ScoreFailure> {
    let (tokens, texts) = ("tokens", "whole texts");
    if labels_tokens && most.is_some() {
        return Err(ScoreFailure::Flag { flag: "top-k", wanted: texts, found: tokens });
    }
    if !labels_tokens && aggregation.is_some() {
        return Err(ScoreFailure::Flag { flag: "aggregation-strategy", wanted: tokens, found: texts });
    }
    Ok(())
}

/// The texts among inputs, which have no others where a command classifies.
fn plain_texts(inputs: &[EncodeInput]) -> Vec<String> {
    let text = |input: &EncodeInput| match input {
        EncodeInput::Text(text) => Some(text.clone()),
        EncodeInput::Tokens(_) | EncodeInput::Pair { .. } => None,
    };
    inputs.iter().filter_map(text).collect()
}

/// Encodes some of the texts; errors count from the first text of all, as the caller does.
async fn encode(encoder: &Encoder, params: &EncodeParams, first: usize) -> Result<Encoded, EncodeError> {
    match encoder.submit(params) {
        Err(EncodeError::TooLong { index, limit }) => {
            Err(EncodeError::TooLong { index: first + index, limit })
        }
        submitted => submitted?.await,
    }
}

impl Scored {
    /// A line for each entity: the place of its text, its label, its score, its characters and their place.
    fn print_entities(&self, entities: &[Vec<Entity>], json: bool) -> Result<(), std::io::Error> {
        if json {
            let bodies = entities.iter().map(|own| own.iter().map(Entity::body).collect());
            return self.print_object(bodies.map(|entities| TextEntities { entities }).collect());
        }
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        for (index, of_text) in entities.iter().enumerate() {
            for Entity { label, score, word, start, end, .. } in of_text {
                writeln!(stdout, "{index}\t{label}\t{score}\t{start}..{end}\t{word}")?;
            }
        }
        stdout.flush()
    }

    /// A line for each text: its labels, best first, each with its score.
    fn print_labels(&self, most: Option<u32>, json: bool) -> Result<(), std::io::Error> {
        if let Some(entities) = &self.entities {
            return self.print_entities(entities, json);
        }
        let classified = Classified {
            id: String::new(),
            model: String::new(),
            model_digest: String::new(),
            revision: String::new(),
            labels: self.labels.clone().into(),
            scores: self.values.clone(),
            entities: None,
            tokens: 0,
            truncated: Vec::new(),
        };
        if json {
            return self.print_object(classified.best(most).map(|scores| TextScores { scores }).collect());
        }
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        for scores in classified.best(most) {
            let words: Vec<String> =
                scores.iter().map(|one| format!("{} {}", one.label, one.score)).collect();
            writeln!(stdout, "{}", words.join("\t"))?;
        }
        stdout.flush()
    }

    /// A line for each document, best first: its index and its score.
    fn print_order(&self, most: Option<u32>, json: bool) -> Result<(), std::io::Error> {
        let reranked = Reranked {
            id: String::new(),
            model: String::new(),
            model_digest: String::new(),
            revision: String::new(),
            scores: self.values.clone(),
            tokens: 0,
            truncated: Vec::new(),
        };
        let best = reranked.best(most).into_iter();
        let mut results = best.map(|RankedIndex { index, score }| DocumentScore { index, score });
        if json {
            return self.print_object(results.collect());
        }
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        results.try_for_each(|one| writeln!(stdout, "{}\t{}", one.index, one.score))?;
        stdout.flush()
    }

    fn print_object<T: Serialize>(&self, results: Vec<T>) -> Result<(), std::io::Error> {
        let object = ScoreObject {
            results,
            usage: Usage::of(self.tokens),
            truncated: &self.truncated,
            timings_ms: Timings::of(self.load, self.encode),
        };
        let mut stdout = std::io::BufWriter::new(std::io::stdout().lock());
        serde_json::to_writer(&mut stdout, &object)?;
        writeln!(stdout)?;
        stdout.flush()
    }
}
