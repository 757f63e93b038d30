//! Fairness: one tenant always has a hundred long requests in flight. Another sends a short one now and then,
//! whose first token must come about as early as on an idle engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;
use trustformers_engine::{
    Engine, EngineConfig, GenerateError, GenerateParams, Generation, GenerationEvent, SubmitError,
};
use trustformers_model::Model;

use crate::texts::{TestRequest, token};
use crate::{AnyError, Form, ObjectiveReport, Started, start};

/// Requests that the first tenant always has in flight.
const LOAD_REQUESTS: usize = 100;
/// The first tenant's requests.
const LONG: TestRequest = TestRequest { prompt_tokens: 400, salt: 0, answer_tokens: 256 };
/// The second tenant's requests: a question with its conversation, and an answer of one sentence.
const SHORT: TestRequest = TestRequest { prompt_tokens: 96, salt: 0, answer_tokens: 16 };
/// Steps after which the batch is full of the first tenant's requests.
const FILLING_STEPS: usize = 60;
/// The first salts of the second tenant's requests; the first tenant's start at 1.
const ALONE: usize = 6000;
const BESIDE: usize = 7000;
const COUNTED: usize = 8000;
/// How much later than on an idle engine the first token may come.
const MAX_RATIO: f64 = 3.0;
/// The step that runs when the request arrives, and its own.
const MAX_STEPS: usize = 2;

pub(crate) async fn run(
    model: &Arc<Model>,
    form: Form,
    report: &mut ObjectiveReport,
) -> Result<(), AnyError> {
    let config = EngineConfig { context_tokens: Some(1024), ..EngineConfig::default() };
    let on = start(model, &config).await?;
    let alone = visits(&on, form.fairness_requests, form.fairness_gap / 2, ALONE).await?;
    let filled = on.work.now().steps + FILLING_STEPS;
    let load = tokio::spawn(keep_loaded(on.engine.clone()));
    on.work.until_started(filled).await;
    counted(&on, form.fairness_counted, report).await?;
    let beside = visits(&on, form.fairness_requests, form.fairness_gap, BESIDE).await?;
    load.abort();
    on.engine.stop().await;
    let ms = |all: &[Duration], percent| percentile(all, percent).as_secs_f64() * 1e3;
    for (name, all) in [("alone", &alone), ("beside", &beside)] {
        for percent in [50, 99] {
            let name = format!("fairness p{percent} ms to first token {name}");
            report.number(&name, format!("{:.1}", ms(all, percent)));
        }
    }
    let times = ms(&beside, 99) / ms(&alone, 99);
    report.time(form, "fairness p99 to first token, times alone", times, MAX_RATIO);
    Ok(())
}

fn percentile(all: &[Duration], percent: usize) -> Duration {
    let mut times = all.to_vec();
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).max(1) - 1;
    times.get(at).copied().unwrap_or_default()
}

fn visit(engine: &Engine, salt: usize) -> Result<Generation, SubmitError> {
    let request = TestRequest { salt, ..SHORT };
    engine.submit(&GenerateParams { tenant: "second".to_owned(), ..request.params(engine) })
}

/// The times until the first tokens of the second tenant's requests, one of which is sent with each tick.
async fn visits(on: &Started, count: usize, gap: Duration, salt: usize) -> Result<Vec<Duration>, AnyError> {
    let mut ticks = tokio::time::interval(gap);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut all = Vec::new();
    for index in 0..count {
        ticks.tick().await;
        let submitted = Instant::now();
        let mut generation = visit(&on.engine, salt + index)?;
        let first = generation.next().await.transpose()?;
        all.extend(first.map(|_| submitted.elapsed()));
        to_end(generation).await?;
    }
    Ok(all)
}

async fn to_end(mut generation: Generation) -> Result<(), GenerateError> {
    while let Some(event) = generation.next().await {
        if let GenerationEvent::Finished { .. } = event? {
            break;
        }
    }
    Ok(())
}

/// The steps and rows that the second tenant's requests wait for when they arrive while a step is blocked:
/// equal on every machine.
async fn counted(on: &Started, count: usize, report: &mut ObjectiveReport) -> Result<(), AnyError> {
    let (mut steps, mut rows) = (0, 0);
    for salt in COUNTED..COUNTED + count {
        let before = on.work.block();
        on.work.until_started(before + 1).await;
        let (blocked, blocked_rows) = (on.work.now(), on.work.last_rows());
        on.work.find_row(SHORT.prompt_tokens - 1, token(SHORT.prompt_tokens - 1, salt));
        let generation = visit(&on.engine, salt)?;
        on.work.unblock();
        to_end(generation).await?;
        let found = on.work.found().ok_or("a prompt was never read to its end")?;
        // The blocked step counts as well.
        steps = steps.max(found.steps - blocked.steps + 1);
        rows = rows.max(found.rows - blocked.rows + blocked_rows);
    }
    report.objective(
        "fairness steps until the first token",
        steps,
        format!("<= {MAX_STEPS}"),
        steps <= MAX_STEPS,
    );
    let times = rows as f64 / SHORT.prompt_tokens as f64;
    report.objective(
        "fairness rows until the first token, of own",
        format!("{times:.2}"),
        format!("<= {MAX_RATIO}"),
        times <= MAX_RATIO,
    );
    Ok(())
}

/// Keeps the first tenant's requests in flight while it is polled.
async fn keep_loaded(engine: Engine) -> Result<(), SubmitError> {
    let next = |salt: usize| {
        let request = TestRequest { salt, ..LONG };
        let params = GenerateParams { tenant: "first".to_owned(), ..request.params(&engine) };
        engine.submit(&params).map(|generation| generation.for_each(async |_| {}))
    };
    let mut running = FuturesUnordered::new();
    let mut salt = 0;
    loop {
        while running.len() < LOAD_REQUESTS {
            salt += 1;
            running.push(next(salt)?);
        }
        running.next().await;
    }
}
