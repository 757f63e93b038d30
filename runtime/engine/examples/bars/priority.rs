//! Classes: high overtakes, low is served within its bound. Orders only, no times.

use std::sync::Arc;

use futures::StreamExt;
use trustformers_engine::{Engine, EngineConfig, GenerateParams, Generation, GenerationEvent, Priority};
use trustformers_model::Model;

use crate::texts::request;
use crate::{AnyError, Report, cpu, metrics};

/// Places in the batch.
const PLACES: usize = 4;
/// Requests of class high that may end before one of class low: those that may be admitted while it waits, and those
/// that run when it comes. What has ended before it came is counted beside.
const MOST_BEFORE_LOW: usize = 16 + PLACES;

pub(crate) async fn run(model: &Arc<Model>, report: &mut Report) -> Result<(), AnyError> {
    let (metrics, _registry) = metrics()?;
    let config =
        EngineConfig { max_batch_size: PLACES, context_tokens: Some(256), ..EngineConfig::default() };
    let engine = {
        let (model, backend) = (Arc::clone(model), cpu()?);
        tokio::task::spawn_blocking(move || Engine::start(model, backend, &config, &metrics)).await??
    };
    engine.warm_up().await?;
    let ends = model.tokenizer().eos_ids().to_vec();
    let submit = |class: Priority, salt: usize, answer_tokens: usize| -> Result<Generation, AnyError> {
        let params = GenerateParams { priority: class, ..request(24, salt, answer_tokens, &ends) };
        Ok(engine.submit(&params)?)
    };
    // The batch is full of long ones, and as many again wait, when high comes.
    let mut waiting = Vec::new();
    for salt in 0..2 * PLACES {
        waiting.push((Priority::Normal, submit(Priority::Normal, salt, 64)?));
    }
    waiting.push((Priority::High, submit(Priority::High, 100, 1)?));
    let order = order_of_ends(waiting).await?;
    let before = order.iter().position(|class| *class == Priority::High).unwrap_or(order.len());
    report.bar("priority normal ended before high", before, "<= 0", before == 0);

    // All of class high are there before the one of class low, so it certainly has to wait.
    let mut waiting = Vec::new();
    for salt in 300..380 {
        waiting.push((Priority::High, submit(Priority::High, salt, 8)?));
    }
    let already = engine.in_flight();
    waiting.push((Priority::Low, submit(Priority::Low, 200, 1)?));
    let gone = 80_usize.saturating_sub(already);
    let order = order_of_ends(waiting).await?;
    let high = order.iter().position(|class| *class == Priority::Low).unwrap_or(order.len());
    let need = format!("1..={}", MOST_BEFORE_LOW + gone);
    report.bar("priority high ended before low", high, need, (1..=MOST_BEFORE_LOW + gone).contains(&high));
    engine.stop().await;
    Ok(())
}

/// The classes in the order in which their requests ended.
async fn order_of_ends(waiting: Vec<(Priority, Generation)>) -> Result<Vec<Priority>, AnyError> {
    let ends = waiting.into_iter().map(|(class, mut generation)| async move {
        while let Some(event) = generation.next().await {
            if let Ok(GenerationEvent::Finished { .. }) | Err(_) = &event {
                return event.map(|_| class);
            }
        }
        Ok(class)
    });
    let mut ends: futures::stream::FuturesUnordered<_> = ends.collect();
    let mut order = Vec::new();
    while let Some(class) = ends.next().await {
        order.push(class?);
    }
    Ok(order)
}
