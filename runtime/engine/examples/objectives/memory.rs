//! Memory: the engine takes no more than it reports at load. In a mixed run of long and short, greedy and
//! sampled requests, with shared prefixes, cancelled requests and failed steps, the process grows by at most
//! the reported arena, and every block of the cache is released.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use trustformers_engine::{
    Engine, EngineConfig, GenerateError, GenerateParams, GenerationEvent, Priority, Prompt,
};
use trustformers_model::Model;

use crate::texts::{TestRequest, prompt};
use crate::{AnyError, Form, ObjectiveReport, Started, start};

/// Requests in flight at once.
const AT_ONCE: usize = 24;
/// Requests after each of which a step fails.
const FAILURE_EVERY: usize = 40;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestEnd {
    Finished,
    /// It was cancelled.
    Cancelled,
    /// A step with it failed.
    Failed,
}

/// The result of a mixed run.
#[derive(Debug, Default)]
struct MixedRun {
    ends: Vec<RequestEnd>,
    took: Duration,
    /// Bytes of the process before the run, at most, and at the end.
    bytes: [u64; 3],
}

pub(crate) async fn run(
    model: &Arc<Model>,
    form: Form,
    report: &mut ObjectiveReport,
) -> Result<(), AnyError> {
    // Blocks for only some of the long requests, so that sequences are preempted.
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
    let [before, highest, last] = run.bytes;
    // The cache grows to its limit while the run needs it.
    let allowed = memory.arena_bytes + on.engine.info().kv_limit_bytes - memory.kv_bytes;
    report.number("memory seconds of the mixed run", run.took.as_secs());
    report.number("memory MiB before it", mib(before));
    report.number("memory MiB after it", mib(last));
    report.number("memory MiB of the cache", mib(memory.kv_bytes));
    let grown = highest.saturating_sub(before);
    report.objective(
        "memory MiB grown in a mixed run",
        mib(grown),
        format!("<= {}", mib(allowed)),
        grown <= allowed,
    );
    for (name, end) in [
        ("finished", RequestEnd::Finished),
        ("were left", RequestEnd::Cancelled),
        ("failed", RequestEnd::Failed),
    ] {
        let count = run.ends.iter().filter(|other| **other == end).count();
        report.objective(&format!("memory requests that {name}"), count, ">= 1", count >= 1);
    }
    for (name, series) in [
        ("memory sequences that gave blocks up", "trustformers_preemptions_total"),
        ("memory prompt tokens that were known", "trustformers_prompt_tokens_reused_total"),
    ] {
        let count = value(&on, series);
        report.objective(name, count, ">= 1", count >= 1.0);
    }
    let used = value(&on, "trustformers_kv_blocks_used");
    report.objective("memory blocks held at the end", used, "0", used == 0.0);
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

async fn mixed(on: &Started, form: Form) -> Result<MixedRun, AnyError> {
    let before = anonymous_bytes()?;
    let mut run = MixedRun { bytes: [before; 3], ..MixedRun::default() };
    let started = Instant::now();
    let mut running = FuturesUnordered::new();
    let mut index = 0;
    while index < form.memory_requests || started.elapsed() < form.memory_time {
        index += 1;
        if index.is_multiple_of(FAILURE_EVERY) {
            on.work.fail_next();
        }
        running.push(mixed_request(&on.engine, index)?);
        if running.len() >= AT_ONCE {
            run.ends.extend(running.next().await.transpose()?);
        }
        run.bytes[1] = run.bytes[1].max(anonymous_bytes()?);
    }
    while let Some(end) = running.next().await {
        run.ends.push(end?);
        run.bytes[1] = run.bytes[1].max(anonymous_bytes()?);
    }
    run.took = started.elapsed();
    run.bytes[2] = anonymous_bytes()?;
    Ok(run)
}

/// One request of the mixed run; some are cancelled in the middle, some before they start.
fn mixed_request(
    engine: &Engine,
    index: usize,
) -> Result<impl Future<Output = Result<RequestEnd, GenerateError>> + use<>, AnyError> {
    let long = index.is_multiple_of(5);
    let (prompt_tokens, answer_tokens) = if long { (500, 300) } else { (40, 30) };
    let request = TestRequest { prompt_tokens, salt: index, answer_tokens };
    let mut params = GenerateParams {
        temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
        top_p: 0.95,
        logprobs: (index.is_multiple_of(3)).then_some(3),
        priority: Priority::ALL[index % 3],
        tenant: format!("tenant {}", index % 4),
        ..request.params(engine)
    };
    if let (true, Prompt::Tokens(own), Prompt::Tokens(shared)) =
        (index % 3 == 1, &mut params.prompt, prompt(64, 1_000_000))
    {
        own.splice(..0, shared);
    }
    let mut generation = engine.submit(&params)?;
    let read_tokens = match index % 14 {
        3 => 0,
        10 => 5,
        _ => usize::MAX,
    };
    Ok(async move {
        let mut tokens = 0;
        while tokens < read_tokens {
            match generation.next().await {
                Some(Ok(GenerationEvent::Token { .. })) => tokens += 1,
                Some(Ok(GenerationEvent::Finished { .. })) | None => return Ok(RequestEnd::Finished),
                Some(Err(GenerateError::Device(_))) => return Ok(RequestEnd::Failed),
                Some(Err(error)) => return Err(error),
            }
        }
        Ok(RequestEnd::Cancelled)
    })
}

/// Anonymous memory of this process in bytes.
fn anonymous_bytes() -> Result<u64, AnyError> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib =
        line.and_then(|line| line.split_whitespace().next()).ok_or("no RssAnon in /proc/self/status")?;
    Ok(kib.parse::<u64>()? * 1024)
}
