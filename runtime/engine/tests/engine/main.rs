//! The engine with a tiny seeded model: batching, the prefix cache, scheduling, cancellation, failures,
//! stopping.
//!
//! Most tests control every step (see [`stepped`]) and check what the engine does between two of them: no
//! test waits for a clock.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod adapters;
mod ahead;
mod faults;
mod growth;
mod lifecycle;
mod observing;
mod paging;
mod scheduling;
mod sharing;
mod speculation;
#[path = "../stepped/mod.rs"]
mod stepped;
mod windows;

use futures::StreamExt;
use prometheus::Registry;
use std::path::Path;
use std::sync::Arc;
use stepped::{StepControl, stepped};
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, FinishReason, GenerateError, GenerateParams, Generation,
    GenerationEvent, Prompt, SpeculationCosts, TokenLogprobs,
};
use trustformers_model::Model;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::oracle::Oracle;

fn model() -> Arc<Model> {
    let file = SeededModel::default().gguf();
    Arc::new(Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap())
}

fn config() -> EngineConfig {
    EngineConfig {
        model_label: "m".into(),
        max_batch_size: 8,
        token_budget: 64,
        step_target_ms: None,
        speculation_costs: SpeculationCosts::Assumed { row: 0.1, draft_step: 0.25 },
        ..EngineConfig::default()
    }
}

fn start(config: &EngineConfig) -> Engine {
    let metrics = EngineMetrics::register(&Registry::new()).unwrap();
    Engine::start(model(), Box::new(Oracle::new()), config, &metrics).unwrap()
}

fn start_stepped(config: &EngineConfig) -> (Engine, StepControl, Registry) {
    let registry = Registry::new();
    let (backend, steps) = stepped();
    let metrics = EngineMetrics::register(&registry).unwrap();
    (Engine::start(model(), backend, config, &metrics).unwrap(), steps, registry)
}

/// The value of a counter or gauge; with several outcomes, of that one.
fn value(registry: &Registry, name: &str, outcome: Option<&str>) -> f64 {
    let families = registry.gather();
    let family = families.iter().find(|family| family.name() == name).unwrap();
    let metric = family.get_metric().iter().find(|metric| {
        outcome.is_none_or(|wanted| metric.get_label().iter().any(|label| label.value() == wanted))
    });
    let metric = metric.unwrap();
    metric.get_counter().get_value()
        + metric.get_gauge().get_value()
        + metric.get_histogram().get_sample_count() as f64
}

fn kv_used(registry: &Registry) -> f64 {
    value(registry, "trustformers_kv_blocks_used", None)
}

fn tokens(ids: &[u32], max_tokens: usize) -> GenerateParams {
    GenerateParams { prompt: Prompt::Tokens(ids.to_vec()), ..GenerateParams::greedy("", max_tokens) }
}

/// A prompt of ordinary tokens that differs with `salt`.
fn prompt(len: usize, salt: usize) -> Vec<u32> {
    (0..len).map(|i| 3 + ((i * 31 + salt * 17) % 250) as u32).collect()
}

#[derive(Debug, Clone, PartialEq)]
struct CompletedAnswer {
    ids: Vec<u32>,
    text: String,
    logprobs: Vec<TokenLogprobs>,
    reason: FinishReason,
    prompt_tokens: usize,
    completion_tokens: usize,
}

async fn answer(mut generation: Generation) -> Result<CompletedAnswer, GenerateError> {
    let (mut ids, mut all, mut all_logprobs) = (Vec::new(), String::new(), Vec::new());
    while let Some(event) = generation.next().await {
        match event? {
            GenerationEvent::Token { id, text, logprobs, .. } => {
                ids.push(id);
                all_logprobs.extend(logprobs);
                all.push_str(&text);
            }
            GenerationEvent::Finished { reason, prompt_tokens, completion_tokens, .. } => {
                assert!(generation.next().await.is_none(), "nothing follows the last event");
                return Ok(CompletedAnswer {
                    ids,
                    text: all,
                    logprobs: all_logprobs,
                    reason,
                    prompt_tokens,
                    completion_tokens,
                });
            }
        }
    }
    panic!("a stream ended without its last event");
}
