//! Memory: what was printed at load is all there is. A mixed run of long and short, greedy and sampled requests, with
//! shared beginnings and callers that leave, lets the process grow by no more than the arena that was printed, and
//! every block of the cache comes back.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use trustformers_engine::{Engine, EngineConfig, GenerateParams, GenerationEvent, Priority, Prompt};
use trustformers_model::Model;

use crate::texts::{prompt, request};
use crate::{AnyError, Form, Report, cpu, metrics};

/// Requests that are there at once.
const AT_ONCE: usize = 24;

pub(crate) async fn run(model: &Arc<Model>, form: Form, report: &mut Report) -> Result<(), AnyError> {
    let (metrics, registry) = metrics()?;
    // Room for some of the long ones at once, so that sequences have to give their blocks up.
    let config = EngineConfig {
        max_batch_size: 16,
        context_tokens: Some(1024),
        kv_memory_bytes: Some(64 << 20),
        ..EngineConfig::default()
    };
    let engine = {
        let (model, backend) = (Arc::clone(model), cpu()?);
        tokio::task::spawn_blocking(move || Engine::start(model, backend, &config, &metrics)).await??
    };
    engine.warm_up().await?;
    let arena = engine.info().memory.arena_bytes;
    let before = own_bytes()?;
    let mut most = before;
    let mut running = FuturesUnordered::new();
    for index in 0..form.memory_requests {
        running.push(one(&engine, index, model.tokenizer().eos_ids())?);
        if running.len() >= AT_ONCE {
            running.next().await;
        }
        most = most.max(own_bytes()?);
    }
    while running.next().await.is_some() {
        most = most.max(own_bytes()?);
    }
    engine.drain().await;
    let grown = most.saturating_sub(before);
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / f64::from(1 << 20));
    report.bar("memory MiB grown in a mixed run", mib(grown), format!("<= {}", mib(arena)), grown <= arena);
    let series = |name: &str| -> f64 {
        let families = registry.gather();
        let found = families.iter().find(|family| family.name() == name);
        let metric = found.and_then(|family| family.get_metric().first());
        metric.map_or(f64::NAN, |one| one.get_gauge().get_value() + one.get_counter().get_value())
    };
    let preempted = series("trustformers_preemptions_total");
    report.bar("memory sequences that gave blocks up", preempted, ">= 1", preempted >= 1.0);
    let reused = series("trustformers_prompt_tokens_reused_total");
    report.bar("memory prompt tokens that were known", reused, ">= 1", reused >= 1.0);
    let used = series("trustformers_kv_blocks_used");
    report.bar("memory blocks held at the end", used, "0", used == 0.0);
    engine.stop().await;
    Ok(())
}

/// One request of the mixed run; some are left in the middle.
fn one(
    engine: &Engine,
    index: usize,
    ends: &[u32],
) -> Result<impl Future<Output = ()> + use<>, trustformers_engine::SubmitError> {
    let long = index.is_multiple_of(5);
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
    let generation = engine.submit(&params)?;
    let most = if index % 7 == 3 { 5 } else { usize::MAX };
    Ok(async move {
        let tokens = generation
            .filter(|event| futures::future::ready(matches!(event, Ok(GenerationEvent::Token { .. }))));
        tokens.take(most).for_each(async |_| {}).await;
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
