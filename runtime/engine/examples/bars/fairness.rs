//! One tenant has a hundred long requests there at all times; another sends a short one now and then and wants its first
//! token about as soon as if it were alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;
use trustformers_engine::{
    Engine, EngineConfig, GenerateError, GenerateParams, Generation, GenerationEvent, SubmitError,
};
use trustformers_model::Model;

use crate::texts::{request, token};
use crate::{AnyError, Form, Report, Started, start};

/// Requests that the first tenant always has there.
const CROWD: usize = 100;
/// The first tenant's requests: prompt and answer.
const LONG_TOKENS: (usize, usize) = (400, 256);
/// The second tenant's: a question with what was said before, and a sentence.
const SHORT_TOKENS: (usize, usize) = (96, 16);
/// Steps after which the crowd has as many in the batch as there is room for.
const FILLING_STEPS: usize = 60;
/// Where the salts of the second tenant's requests begin; the first's begin at 1.
const ALONE: usize = 6000;
const BESIDE: usize = 7000;
const COUNTED: usize = 8000;
/// How much later than alone the first token may come.
const MOST_TIMES: f64 = 3.0;
/// The step that runs when it comes, and its own.
const MOST_STEPS: usize = 2;

pub(crate) async fn run(model: &Arc<Model>, form: Form, report: &mut Report) -> Result<(), AnyError> {
    let config = EngineConfig { context_tokens: Some(1024), ..EngineConfig::default() };
    let on = start(model, &config).await?;
    let alone = visits(&on, form.fairness_requests, form.fairness_gap / 2, ALONE).await?;
    let filled = on.work.now().steps + FILLING_STEPS;
    let crowd = tokio::spawn(crowd(on.engine.clone()));
    on.work.begun(filled).await;
    counted(&on, form.fairness_counted, report).await?;
    let beside = visits(&on, form.fairness_requests, form.fairness_gap, BESIDE).await?;
    crowd.abort();
    on.engine.stop().await;
    let ms = |all: &[Duration], percent| percentile(all, percent).as_secs_f64() * 1e3;
    for (name, all) in [("alone", &alone), ("beside", &beside)] {
        for percent in [50, 99] {
            let name = format!("fairness p{percent} ms to first token {name}");
            report.figure(&name, format!("{:.1}", ms(all, percent)));
        }
    }
    let times = ms(&beside, 99) / ms(&alone, 99);
    report.time(form, "fairness p99 to first token, times alone", times, MOST_TIMES);
    Ok(())
}

fn percentile(all: &[Duration], percent: usize) -> Duration {
    let mut times = all.to_vec();
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).max(1) - 1;
    times.get(at).copied().unwrap_or_default()
}

fn visit(engine: &Engine, salt: usize) -> Result<Generation, SubmitError> {
    let ends = engine.model().tokenizer().eos_ids();
    let params =
        GenerateParams { tenant: "second".to_owned(), ..request(SHORT_TOKENS.0, salt, SHORT_TOKENS.1, ends) };
    engine.submit(&params)
}

/// The times until the first tokens of the second tenant's requests, one of which comes with each tick.
async fn visits(on: &Started, count: usize, gap: Duration, salt: usize) -> Result<Vec<Duration>, AnyError> {
    let mut ticks = tokio::time::interval(gap);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut all = Vec::new();
    for index in 0..count {
        ticks.tick().await;
        let began = Instant::now();
        let mut generation = visit(&on.engine, salt + index)?;
        let first = generation.next().await.transpose()?;
        all.extend(first.map(|_| began.elapsed()));
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

/// What the second tenant's requests have to wait for when they come while a step is held: the same on every machine.
async fn counted(on: &Started, count: usize, report: &mut Report) -> Result<(), AnyError> {
    let (mut steps, mut rows) = (0, 0);
    for salt in COUNTED..COUNTED + count {
        let before = on.work.hold();
        on.work.begun(before + 1).await;
        let (held, held_rows) = (on.work.now(), on.work.last_rows());
        on.work.look_out(SHORT_TOKENS.0 - 1, token(SHORT_TOKENS.0 - 1, salt));
        let generation = visit(&on.engine, salt)?;
        on.work.open();
        to_end(generation).await?;
        let found = on.work.found().ok_or("a prompt was never read to its end")?;
        // The step that was held counts as well.
        steps = steps.max(found.steps - held.steps + 1);
        rows = rows.max(found.rows - held.rows + held_rows);
    }
    report.bar(
        "fairness steps until the first token",
        steps,
        format!("<= {MOST_STEPS}"),
        steps <= MOST_STEPS,
    );
    let times = rows as f64 / SHORT_TOKENS.0 as f64;
    report.bar(
        "fairness rows until the first token, of own",
        format!("{times:.2}"),
        format!("<= {MOST_TIMES}"),
        times <= MOST_TIMES,
    );
    Ok(())
}

/// Keeps the first tenant's requests there for as long as it is polled.
async fn crowd(engine: Engine) -> Result<(), SubmitError> {
    let next = |salt: usize| {
        let ends = engine.model().tokenizer().eos_ids();
        let params = GenerateParams {
            tenant: "first".to_owned(),
            ..request(LONG_TOKENS.0, salt, LONG_TOKENS.1, ends)
        };
        engine.submit(&params).map(|generation| generation.for_each(async |_| {}))
    };
    let mut here = FuturesUnordered::new();
    let mut salt = 0;
    loop {
        while here.len() < CROWD {
            salt += 1;
            here.push(next(salt)?);
        }
        here.next().await;
    }
}
