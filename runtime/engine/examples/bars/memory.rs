//! Memory: what was printed at load is all there is. A mixed run of long and short, greedy and sampled requests, with
//! shared beginnings, callers that leave and steps that fail, lets the process grow by no more than the arena that was
//! printed, and every block of the cache comes back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use trustformers_engine::{
    Engine, EngineConfig, GenerateError, GenerateParams, GenerationEvent, Priority, Prompt,
};
use trustformers_model::Model;

use crate::texts::{prompt, request};
use crate::{AnyError, Form, Report, Started, start};

/// Requests that are there at once.
const AT_ONCE: usize = 24;
/// Requests after each of which a step fails.
const FAILURE_EVERY: usize = 40;

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finished,
    /// Its caller left.
    Left,
    /// The step that it was part of failed.
    Failed,
}

/// What a run was like.
#[derive(Debug, Default)]
struct Run {
    ends: Vec<End>,
    took: Duration,
    /// Bytes of the process before, at most, and at the end.
    bytes: [u64; 3],
}

pub(crate) async fn run(model: &Arc<Model>, form: Form, report: &mut Report) -> Result<(), AnyError> {
    // Room for some of the long ones at once, so that sequences have to give their blocks up.
    let config = EngineConfig {
        max_batch_size: 16,
        context_tokens: Some(1024),
        kv_memory_bytes: Some(64 << 20),
        ..EngineConfig::default()
    };
    let on = start(model, &config).await?;
    let run = mixed(&on, form).await?;
    on.engine.drain().await;
    let memory = on.engine.info().memory;
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / f64::from(1 << 20));
    let [before, most, last] = run.bytes;
    report.figure("memory seconds of the mixed run", run.took.as_secs());
    report.figure("memory MiB before it", mib(before));
    report.figure("memory MiB after it", mib(last));
    report.figure("memory MiB of the cache", mib(memory.kv_bytes));
    let grown = most.saturating_sub(before);
    report.bar(
        "memory MiB grown in a mixed run",
        mib(grown),
        format!("<= {}", mib(memory.arena_bytes)),
        grown <= memory.arena_bytes,
    );
    for (name, end) in [("finished", End::Finished), ("were left", End::Left), ("failed", End::Failed)] {
        let count = run.ends.iter().filter(|other| **other == end).count();
        report.bar(&format!("memory requests that {name}"), count, ">= 1", count >= 1);
    }
    for (name, series) in [
        ("memory sequences that gave blocks up", "trustformers_preemptions_total"),
        ("memory prompt tokens that were known", "trustformers_prompt_tokens_reused_total"),
    ] {
        let count = value(&on, series);
        report.bar(name, count, ">= 1", count >= 1.0);
    }
    let used = value(&on, "trustformers_kv_blocks_used");
    report.bar("memory blocks held at the end", used, "0", used == 0.0);
    on.engine.stop().await;
    Ok(())
}

/// The value of a counter or gauge.
fn value(on: &Started, name: &str) -> f64 {
    let families = on.registry.gather();
    let found = families.iter().find(|family| family.name() == name);
    let metric = found.and_then(|family| family.get_metric().first());
    metric.map_or(f64::NAN, |one| one.get_gauge().get_value() + one.get_counter().get_value())
}

async fn mixed(on: &Started, form: Form) -> Result<Run, AnyError> {
    let before = own_bytes()?;
    let mut run = Run { bytes: [before; 3], ..Run::default() };
    let began = Instant::now();
    let mut running = FuturesUnordered::new();
    let mut index = 0;
    while index < form.memory_requests || began.elapsed() < form.memory_time {
        index += 1;
        if index.is_multiple_of(FAILURE_EVERY) {
            on.work.fail_next();
        }
        running.push(one(&on.engine, index)?);
        if running.len() >= AT_ONCE {
            run.ends.extend(running.next().await.transpose()?);
        }
        run.bytes[1] = run.bytes[1].max(own_bytes()?);
    }
    while let Some(end) = running.next().await {
        run.ends.push(end?);
        run.bytes[1] = run.bytes[1].max(own_bytes()?);
    }
    run.took = began.elapsed();
    run.bytes[2] = own_bytes()?;
    Ok(run)
}

/// One request of the mixed run; some are left in the middle, some before they begin.
fn one(
    engine: &Engine,
    index: usize,
) -> Result<impl Future<Output = Result<End, GenerateError>> + use<>, AnyError> {
    let long = index.is_multiple_of(5);
    let ends = engine.model().tokenizer().eos_ids();
    let mut params = GenerateParams {
        temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_p: 0.95,
        logprobs: (index.is_multiple_of(3)).then_some(3),
        priority: Priority::ALL[index % 3],
        tenant: format!("tenant {}", index % 4),
        ..request(if long { 500 } else { 40 }, index, if long { 300 } else { 30 }, ends)
    };
    if let (true, Prompt::Tokens(own), Prompt::Tokens(shared)) =
        (index % 3 == 1, &mut params.prompt, prompt(64, 1_000_000))
    {
        own.splice(..0, shared);
    }
    let mut generation = engine.submit(&params)?;
    let most = match index % 14 {
        3 => 0,
        10 => 5,
        _ => usize::MAX,
    };
    Ok(async move {
        let mut tokens = 0;
        while tokens < most {
            match generation.next().await {
                Some(Ok(GenerationEvent::Token { .. })) => tokens += 1,
                Some(Ok(GenerationEvent::Finished { .. })) | None => return Ok(End::Finished),
                Some(Err(GenerateError::Backend { .. })) => return Ok(End::Failed),
                Some(Err(error)) => return Err(error),
            }
        }
        Ok(End::Left)
    })
}

/// Bytes of this process that are nobody else's and no file's.
fn own_bytes() -> Result<u64, AnyError> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib =
        line.and_then(|line| line.split_whitespace().next()).ok_or("no RssAnon in /proc/self/status")?;
    Ok(kib.parse::<u64>()? * 1024)
}
