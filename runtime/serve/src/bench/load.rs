//! `bench load`: the flags checked, the load driven, the figures printed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Uri;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::client::{Client, Failed};
use super::drive::{Load, MAX_IN_FLIGHT, Pattern, drive};
use super::flags::LoadFlags;
use super::protocol::{Api, BenchRequest};
use super::summary::Summary;
use super::{BenchFailure, print, prompts};

/// Requests of one run: a record of each is kept, and a million take about 150 MB.
const MAX_REQUESTS: usize = 1_000_000;

/// The default number of requests for each client of a closed loop.
const REQUESTS_PER_CLIENT: usize = 5;

/// Where the texts come from.
#[derive(Debug, Clone)]
enum Texts {
    Made { words: usize },
    Given(Vec<String>),
}

/// Everything that makes the body of a request.
#[derive(Debug, Clone)]
struct Bodies {
    api: Api,
    texts: Texts,
    /// Texts in one request.
    batch: usize,
    model: Option<String>,
    max_tokens: u32,
    extra: Map<String, Value>,
}

impl Bodies {
    fn body(&self, index: usize) -> Bytes {
        let numbers = index * self.batch..(index + 1) * self.batch;
        let text = |number: usize| match &self.texts {
            Texts::Made { words } => prompts::text(number, *words),
            Texts::Given(lines) => lines[number % lines.len()].clone(),
        };
        let ask = BenchRequest {
            texts: numbers.map(text).collect(),
            model: self.model.as_deref(),
            max_tokens: self.max_tokens,
            extra: &self.extra,
        };
        Bytes::from(self.api.body(&ask).to_string())
    }
}

/// A load, checked.
#[derive(Debug)]
struct LoadPlan {
    client: Client,
    url: String,
    bodies: Bodies,
    load: Load,
    warm_up: usize,
}

/// Runs the subcommand.
pub(super) async fn run(flags: LoadFlags) -> Result<(), BenchFailure> {
    let json = flags.json;
    let LoadPlan { client, url, bodies, load, warm_up } = plan(flags)?;
    let (api, batch) = (bodies.api, bodies.batch);
    for index in 0..warm_up {
        // Whether it was answered does not matter: what is counted comes after.
        let _ = client.ask(bodies.body(index), batch, Instant::now()).await;
    }
    let bodies = Arc::new(bodies);
    let outcomes = drive(load, move |index, due| {
        let (client, body) = (client.clone(), bodies.body(warm_up + index));
        async move { client.ask(body, batch, due).await }
    });
    let summary = Summary::of(&outcomes.await, batch);
    if summary.answered == 0 {
        return Err(BenchFailure::NoAnswer { asked: summary.requests, errors: summary.errors_text(), url });
    }
    print(&if json { summary.to_json().to_string() } else { summary.to_text(api.streams()) })
}

fn plan(flags: LoadFlags) -> Result<LoadPlan, BenchFailure> {
    let load = load_of(&flags)?;
    let url = format!("{}{}", flags.url.trim_end_matches('/'), flags.api.path());
    let uri: Uri = url.parse().map_err(|error| BenchFailure::flag("url", format!("{url}: {error}")))?;
    if uri.scheme_str() != Some("http") || uri.authority().is_none() {
        let why =
            format!("{:?} is not http://HOST:PORT; for https:// put a local proxy before it", flags.url);
        return Err(BenchFailure::flag("url", why));
    }
    let timeout = seconds("timeout-s", flags.timeout_s)?;
    let extra = match flags.extra.as_deref().map(serde_json::from_str) {
        None => Map::new(),
        Some(Ok(Value::Object(extra))) => extra,
        Some(Ok(_)) => {
            return Err(BenchFailure::flag("extra", "is no JSON object, such as {\"ignore_eos\": true}"));
        }
        Some(Err(error)) => return Err(BenchFailure::flag("extra", format!("is no JSON: {error}"))),
    };
    if flags.batch == 0 || flags.batch > 256 || (flags.api.streams() && flags.batch > 1) {
        return Err(BenchFailure::flag("batch", "is 1 to 256, and 1 unless --api is embeddings"));
    }
    let texts = match &flags.prompt_file {
        None if flags.prompt_words == 0 => return Err(BenchFailure::flag("prompt-words", "is at least 1")),
        None => Texts::Made { words: flags.prompt_words },
        Some(path) => {
            let what = format!("--prompt-file {} cannot be read", path.display());
            let text = std::fs::read_to_string(path).map_err(|cause| BenchFailure::Io { what, cause })?;
            let lines: Vec<String> =
                text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
            if lines.is_empty() {
                return Err(BenchFailure::flag("prompt-file", "has no line with a prompt"));
            }
            Texts::Given(lines)
        }
    };
    let bodies = Bodies {
        api: flags.api,
        texts,
        batch: flags.batch,
        model: flags.model,
        max_tokens: flags.max_tokens,
        extra,
    };
    Ok(LoadPlan {
        client: Client::new(uri, flags.api, timeout, flags.fresh_connections),
        url,
        bodies,
        load,
        warm_up: flags.warm_up,
    })
}

fn load_of(flags: &LoadFlags) -> Result<Load, BenchFailure> {
    let duration = seconds("duration-s", flags.duration_s)?;
    if duration > Duration::from_secs(3600) {
        return Err(BenchFailure::flag("duration-s", format!("{} is more than 3600", flags.duration_s)));
    }
    let (pattern, default) = match flags.rate {
        Some(rate) if rate > 0.0 && rate <= 10_000.0 => {
            (Pattern::Open { rate, spacing: flags.arrivals, seed: flags.seed }, MAX_REQUESTS)
        }
        Some(rate) => {
            return Err(BenchFailure::flag("rate", format!("{rate} is not above 0 and at most 10000")));
        }
        None => {
            let clients = flags.clients.unwrap_or(8);
            if clients == 0 || clients > MAX_IN_FLIGHT {
                let why = format!("{clients} is not between 1 and {MAX_IN_FLIGHT}");
                return Err(BenchFailure::flag("clients", why));
            }
            (Pattern::Closed { clients }, clients * REQUESTS_PER_CLIENT)
        }
    };
    let requests = flags.requests.unwrap_or(default);
    if requests == 0 || requests > MAX_REQUESTS {
        return Err(BenchFailure::flag(
            "requests",
            format!("{requests} is not between 1 and {MAX_REQUESTS}"),
        ));
    }
    Ok(Load { pattern, requests, duration })
}

fn seconds(flag: &'static str, value: f64) -> Result<Duration, BenchFailure> {
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(BenchFailure::flag(flag, format!("{value} is no time above 0 in seconds"))),
    }
}

impl Summary {
    /// How many requests failed, by class.
    fn errors_text(&self) -> String {
        let class = |(failed, count): (&Failed, &usize)| format!("{} {count}", failed.as_str());
        self.errors.iter().map(class).collect::<Vec<_>>().join(", ")
    }
}
