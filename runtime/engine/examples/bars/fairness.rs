//! One tenant has a hundred long requests queued at all times; another sends a short one now and then and wants its
//! first token about as soon as if it were alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use trustformers_engine::{Engine, EngineConfig, GenerateParams, GenerationEvent};
use trustformers_model::Model;

use crate::counting::{Counting, Work};
use crate::texts::request;
use crate::{AnyError, Form, Report, cpu, metrics};

/// Requests that the first tenant always has there.
const CROWD: usize = 100;
/// The first tenant's requests: prompt and answer.
const LONG_TOKENS: (usize, usize) = (400, 256);
/// The second tenant's: a question with what was said before, and a sentence.
const SHORT_TOKENS: (usize, usize) = (96, 16);
/// How much later than alone the first token may come.
const MOST_TIMES: f64 = 3.0;
/// The step that runs when it comes, and its own.
const MOST_STEPS: usize = 2;

/// What one request of the second tenant met.
#[derive(Debug, Clone, Copy)]
struct Met {
    first_token: Duration,
    steps: usize,
    rows: usize,
}

pub(crate) async fn run(model: &Arc<Model>, form: Form, report: &mut Report) -> Result<(), AnyError> {
    let work = Arc::new(Work::default());
    let (metrics, _registry) = metrics()?;
    let config = EngineConfig { context_tokens: Some(1024), ..EngineConfig::default() };
    let engine = {
        let backend = Box::new(Counting::new(cpu()?, Arc::clone(&work)));
        let (model, config) = (Arc::clone(model), config.clone());
        tokio::task::spawn_blocking(move || Engine::start(model, backend, &config, &metrics)).await??
    };
    engine.warm_up().await?;
    let ends = model.tokenizer().eos_ids().to_vec();
    let alone = visits(&engine, &work, form, 0, &ends).await?;
    let crowd = tokio::spawn(crowd(engine.clone(), ends.clone()));
    // The crowd is there once nothing more fits in the batch.
    while engine.queued() + config.max_batch_size < CROWD {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let beside = visits(&engine, &work, form, form.fairness_requests, &ends).await?;
    crowd.abort();
    engine.stop().await;
    let worst = |all: &[Met], of: fn(&Met) -> usize| all.iter().map(of).max().unwrap_or(0);
    report.bar(
        "fairness steps until the first token",
        worst(&beside, |met| met.steps),
        format!("<= {MOST_STEPS}"),
        worst(&beside, |met| met.steps) <= MOST_STEPS,
    );
    let rows = worst(&beside, |met| met.rows) as f64 / SHORT_TOKENS.0 as f64;
    report.bar(
        "fairness rows until the first token, of own",
        format!("{rows:.2}"),
        format!("<= {MOST_TIMES}"),
        rows <= MOST_TIMES,
    );
    let ms = |all: &[Met], percent| percentile(all, percent).as_secs_f64() * 1e3;
    for percent in [50, 99] {
        report.figure(
            &format!("fairness p{percent} ms to first token alone"),
            format!("{:.1}", ms(&alone, percent)),
        );
        report.figure(
            &format!("fairness p{percent} ms to first token beside"),
            format!("{:.1}", ms(&beside, percent)),
        );
    }
    report.time(
        form,
        "fairness p99 to first token, times alone",
        ms(&beside, 99) / ms(&alone, 99),
        MOST_TIMES,
    );
    Ok(())
}

fn percentile(all: &[Met], percent: usize) -> Duration {
    let mut times: Vec<Duration> = all.iter().map(|met| met.first_token).collect();
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).max(1) - 1;
    times.get(at).copied().unwrap_or_default()
}

/// The second tenant's requests, one after the other.
async fn visits(
    engine: &Engine,
    work: &Work,
    form: Form,
    salt: usize,
    ends: &[u32],
) -> Result<Vec<Met>, AnyError> {
    let mut all = Vec::new();
    for index in 0..form.fairness_requests {
        let params = GenerateParams {
            tenant: "second".to_owned(),
            ..request(SHORT_TOKENS.0, 50_000 + salt + index, SHORT_TOKENS.1, ends)
        };
        let (began, before) = (Instant::now(), work.now());
        let mut generation = engine.submit(&params)?;
        let mut met = None;
        while let Some(event) = generation.next().await {
            if let GenerationEvent::Token { .. } = event? {
                met.get_or_insert_with(|| {
                    let (steps, rows) = work.since(before);
                    Met { first_token: began.elapsed(), steps, rows }
                });
            }
        }
        all.extend(met);
        tokio::time::sleep(form.fairness_gap.saturating_sub(began.elapsed())).await;
    }
    Ok(all)
}

/// Keeps the first tenant's requests there for as long as it is polled.
async fn crowd(engine: Engine, ends: Vec<u32>) -> Result<(), trustformers_engine::SubmitError> {
    let next = |salt: usize| {
        let params = GenerateParams {
            tenant: "first".to_owned(),
            ..request(LONG_TOKENS.0, salt, LONG_TOKENS.1, &ends)
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
