//! Batching, admission, cancellation, failures, stopping.

use crate::stepped::Verdict;
use crate::{answer, config, kv_used, model, prompt, start, start_stepped, tokens, value};
use futures::StreamExt;
use prometheus::Registry;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, FinishReason, GenerateError, GenerateParams, GenerationEvent,
    ModelFault, Priority, StartError, SubmitError,
};
use trustformers_model::Model;
use trustformers_model::gguf::GgufValue;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::oracle::Oracle;

/// Requests of different lengths, half of them sampled.
fn mixed_requests() -> Vec<GenerateParams> {
    (0..8)
        .map(|i| GenerateParams {
            temperature: if i % 2 == 0 { 0.0 } else { 1.5 },
            top_p: 0.95,
            seed: Some(40 + i as u64),
            ..tokens(&prompt(3 + 9 * i, i), 6 + i)
        })
        .collect()
}

#[tokio::test]
async fn a_sequence_gives_the_same_tokens_alone_and_in_a_batch() {
    let alone = start(&EngineConfig { max_batch_size: 1, token_budget: 256, ..config() });
    let mut expected = Vec::new();
    for request in mixed_requests() {
        expected.push(answer(alone.submit(&request).unwrap()).await.unwrap());
    }
    let together = start(&EngineConfig { token_budget: 16, ..config() });
    let running: Vec<_> = mixed_requests().iter().map(|request| together.submit(request).unwrap()).collect();
    let got = futures::future::join_all(running.into_iter().map(answer)).await;
    for (got, expected) in got.into_iter().zip(&expected) {
        assert_eq!(&got.unwrap(), expected);
    }
    let different: std::collections::HashSet<_> = expected.iter().map(|answer| &answer.ids).collect();
    assert!(different.len() >= 6, "the model ignores its prompt: {expected:?}");
}

#[tokio::test]
async fn a_chunked_prompt_gives_the_same_tokens() {
    let request = tokens(&prompt(100, 1), 12);
    let whole = start(&EngineConfig { token_budget: 128, ..config() });
    let expected = answer(whole.submit(&request).unwrap()).await.unwrap();
    assert_eq!((expected.prompt_tokens, expected.completion_tokens), (100, expected.ids.len()));
    for token_budget in [8, 15, 16, 33] {
        let engine = start(&EngineConfig { token_budget, ..config() });
        assert_eq!(answer(engine.submit(&request).unwrap()).await.unwrap(), expected, "{token_budget}");
    }
}

#[test]
fn steps_have_decode_rows_first_and_then_prompt_chunks() {
    let (engine, steps, _registry) = start_stepped(&config());
    let first = engine.submit(&tokens(&prompt(40, 1), 20)).unwrap();
    assert_eq!(steps.run_step(), [40]);
    // The first decodes when the second arrives, which is longer than the budget.
    let step = steps.next_step();
    assert_eq!((step.rows(), step.logits_rows.len()), (1, 1));
    let second = engine.submit(&tokens(&prompt(100, 2), 20)).unwrap();
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.rows_of(0).len(), step.rows_of(1).len(), step.logits_rows.len()), (1, 63, 1));
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.rows_of(1).len(), step.positions[step.rows_of(1).start]), (37, 63));
    assert_eq!(step.logits_rows.len(), 2);
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [1, 1]);
    drop((steps, first, second));
}

#[tokio::test]
async fn cancelling_releases_the_blocks_in_every_phase() {
    let config = EngineConfig { max_batch_size: 1, token_budget: 16, ..config() };
    let (engine, steps, registry) = start_stepped(&config);
    let decoding = engine.submit(&tokens(&prompt(4, 1), 50)).unwrap();
    steps.next_step();
    assert_eq!(kv_used(&registry), 1.0, "blocks are allocated as they are needed");
    let queued = engine.submit(&tokens(&prompt(40, 2), 50)).unwrap();
    let prefilling = engine.submit(&tokens(&prompt(40, 3), 50)).unwrap();
    let last = engine.submit(&tokens(&prompt(4, 4), 1)).unwrap();
    assert_eq!((engine.in_flight(), engine.queued()), (4, 3));
    steps.decide(Verdict::Run);
    // The first decodes now. It and the next one are cancelled.
    steps.next_step();
    drop((decoding, queued));
    steps.decide(Verdict::Run);
    // The third is in the middle of its prompt.
    let step = steps.next_step();
    assert_eq!((step.rows(), step.tokens[0].id(), step.logits_rows.len()), (16, Some(prompt(40, 3)[0]), 0));
    assert_eq!(kv_used(&registry), 1.0);
    drop(prefilling);
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [4]);
    answer(last).await.unwrap();
    drop(steps);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("cancelled")), 3.0);
    for stage in ["queued", "prefill", "decode"] {
        assert_eq!(value(&registry, "trustformers_requests_cancelled_total", Some(stage)), 1.0, "{stage}");
    }
    assert_eq!(value(&registry, "trustformers_requests_running", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 0.0);
}

/// Liveness compares the age of the last step with its bound, so that a prompt that is read for longer than
/// the bound is no stall as long as each of its pieces counts.
#[tokio::test]
async fn each_piece_of_a_long_prompt_counts_as_progress() {
    /// What a step takes here; the bound of a pod is as long as many of them.
    const HELD: Duration = Duration::from_millis(20);
    const PATIENCE: Duration = Duration::from_secs(60);
    let config = EngineConfig { max_batch_size: 1, token_budget: 16, ..config() };
    let (engine, steps, _registry) = start_stepped(&config);
    let running = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
    for _ in 0..2 {
        let step = steps.next_step();
        assert_eq!((step.rows(), step.logits_rows.len()), (16, 0), "a piece that gives no token");
        while engine.heartbeat().last_step_age < HELD {
            std::thread::yield_now();
        }
        let allowed = Instant::now();
        steps.decide(Verdict::Run);
        // Older than that, it would still be the age of the piece before.
        while engine.heartbeat().last_step_age > allowed.elapsed() {
            assert!(allowed.elapsed() < PATIENCE, "the piece was not counted");
            std::thread::yield_now();
        }
    }
    steps.next_step();
    steps.decide(Verdict::Run);
    answer(running).await.unwrap();
    drop(steps);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_has_room_later() {
    let config = EngineConfig { max_batch_size: 1, max_queue: 2, ..config() };
    let (engine, steps, registry) = start_stepped(&config);
    let first = engine.submit(&tokens(&prompt(4, 1), 1)).unwrap();
    steps.next_step();
    assert_eq!((engine.is_full(), engine.refuse(Priority::Normal, "")), (false, None));
    let waiting = [2, 3].map(|salt| engine.submit(&tokens(&prompt(4, salt), 1)).unwrap());
    let refused = engine.submit(&tokens(&prompt(4, 9), 1)).unwrap_err();
    assert_eq!(refused, SubmitError::Overloaded { queue: 2, retry_after: Duration::from_secs(1) });
    assert_eq!((engine.is_full(), engine.refuse(Priority::Normal, "")), (true, Some(refused)));
    assert_eq!(value(&registry, "trustformers_requests_total", Some("overloaded")), 2.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 2.0);
    assert_eq!(value(&registry, "trustformers_requests_running", None), 1.0);
    steps.decide(Verdict::Run);
    answer(first).await.unwrap();
    drop(steps);
    for generation in waiting {
        answer(generation).await.unwrap();
    }
    let again = engine.submit(&tokens(&prompt(4, 9), 1)).unwrap();
    answer(again).await.unwrap();
    engine.drain().await;
    assert_eq!(engine.refuse(Priority::Normal, ""), None, "an engine that ends says so itself");
}

#[test]
fn a_request_waits_for_the_cache_or_is_refused() {
    let block_bytes = 2 * 2 * 2 * 16 * 16 * 4;
    let config =
        EngineConfig { context_tokens: Some(64), kv_memory_bytes: Some(5 * block_bytes), ..config() };
    let (engine, steps, registry) = start_stepped(&config);
    assert_eq!(engine.info().kv_blocks, 5);
    assert_eq!(engine.info().memory.kv_bytes, 4 * block_bytes, "at first it holds one full context");
    assert_eq!(engine.info().kv_limit_bytes, 5 * block_bytes);
    let too_long = engine.submit(&tokens(&prompt(64, 1), 1)).unwrap_err();
    assert_eq!(too_long, SubmitError::PromptTooLong { tokens: 64, limit: 63 });
    let large = engine.submit(&tokens(&prompt(33, 1), 16)).unwrap();
    steps.next_step();
    let waits = engine.submit(&tokens(&prompt(33, 2), 1)).unwrap();
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.sequences(), kv_used(&registry)), (1, 3.0));
    assert_eq!(engine.queued(), 1);
    drop(large);
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [33]);
    drop((steps, waits));
}

#[tokio::test]
async fn a_full_context_ends_an_answer() {
    let engine = start(&EngineConfig { context_tokens: Some(32), ..config() });
    let all = answer(engine.submit(&tokens(&prompt(20, 1), 1000)).unwrap()).await.unwrap();
    assert_eq!((all.reason, all.completion_tokens), (FinishReason::Length, 12));
    let one = answer(engine.submit(&tokens(&prompt(31, 1), 1000)).unwrap()).await.unwrap();
    assert_eq!(one.completion_tokens, 1);
}

#[tokio::test]
async fn the_text_of_an_answer_is_that_of_its_ids() {
    let engine = start(&config());
    let generation = engine.submit(&GenerateParams::greedy("<|im_start|>hello 🦀", 40)).unwrap();
    let ids = engine.model().tokenizer().encode("<|im_start|>hello 🦀").unwrap();
    assert_eq!(generation.prompt_ids(), ids);
    let all = answer(generation).await.unwrap();
    assert_eq!(all.text, engine.model().tokenizer().decode(&all.ids));
}

#[tokio::test]
async fn an_end_token_ends_the_answer_and_is_reported() {
    // At a high temperature a model with random weights samples its end token sooner or later.
    let engine = start(&config());
    let mut ended = None;
    for seed in 0..200 {
        let request = GenerateParams { temperature: 50.0, seed: Some(seed), ..tokens(&prompt(4, 1), 200) };
        let all = answer(engine.submit(&request).unwrap()).await.unwrap();
        if all.reason == FinishReason::Stop {
            ended = Some(all);
            break;
        }
    }
    let all = ended.expect("one of 200 answers of up to 200 tokens ends by itself");
    assert_eq!((all.ids.last(), all.completion_tokens), (Some(&2), all.ids.len()));
    assert_eq!(all.ids.iter().filter(|id| **id == 2).count(), 1);
}

#[tokio::test]
async fn margins_are_reported_only_on_request() {
    let engine = start(&config());
    for asked in [false, true] {
        let request = GenerateParams { margins: asked, ..tokens(&prompt(4, 1), 3) };
        let events: Vec<_> = engine.submit(&request).unwrap().collect().await;
        let margins = events.iter().filter_map(|event| match event {
            Ok(GenerationEvent::Token { margin, .. }) => Some(*margin),
            _ => None,
        });
        assert!(margins.into_iter().all(|margin| margin.is_some_and(|m| m >= 0.0) == asked));
    }
}

#[tokio::test]
async fn a_failed_step_ends_its_sequences_and_no_others() {
    let (engine, steps, registry) = start_stepped(&config());
    let first = engine.submit(&tokens(&prompt(4, 1), 5)).unwrap();
    steps.run_step();
    steps.next_step();
    steps.decide(Verdict::Fail);
    let error = answer(first).await.unwrap_err();
    assert!(
        matches!(&error, GenerateError::Device(_)) && error.to_string().contains("pulled the plug"),
        "{error}"
    );
    let second = engine.submit(&tokens(&prompt(4, 1), 1)).unwrap();
    steps.next_step();
    steps.decide(Verdict::Poison);
    assert_eq!(answer(second).await.unwrap_err(), GenerateError::Model(ModelFault::NotFinite));
    let third = engine.submit(&tokens(&prompt(4, 1), 1)).unwrap();
    steps.run_step();
    answer(third).await.unwrap();
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("failed")), 2.0);
}

#[tokio::test]
async fn a_panic_in_the_backend_ends_the_engine_visibly() {
    let (engine, steps, registry) = start_stepped(&config());
    let generation = engine.submit(&tokens(&prompt(4, 1), 5)).unwrap();
    steps.next_step();
    steps.decide(Verdict::Panic);
    assert_eq!(answer(generation).await.unwrap_err(), GenerateError::Stopped);
    // The stream ends while the thread still unwinds; this waits for the end of the thread.
    engine.stop().await;
    assert!(!engine.heartbeat().alive);
    assert_eq!(engine.submit(&tokens(&prompt(4, 1), 5)).unwrap_err(), SubmitError::Stopped);
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(engine.warm_up().await.unwrap_err(), GenerateError::Stopped);
}

#[tokio::test]
async fn draining_finishes_requests_and_stopping_does_not() {
    let (engine, steps, _registry) = start_stepped(&config());
    let generation = engine.submit(&tokens(&prompt(4, 1), 3)).unwrap();
    steps.next_step();
    assert!(engine.heartbeat().work_pending && engine.heartbeat().alive);
    let draining = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain().await }
    });
    while engine.submit(&tokens(&prompt(4, 1), 3)).is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!draining.is_finished());
    steps.decide(Verdict::Run);
    drop(steps);
    answer(generation).await.unwrap();
    draining.await.unwrap();
    assert!(!engine.heartbeat().work_pending);
    engine.stop().await;
    assert!(!engine.heartbeat().alive);

    let (engine, steps, registry) = start_stepped(&config());
    let generation = engine.submit(&tokens(&prompt(4, 1), 50)).unwrap();
    steps.next_step();
    let stopping = tokio::spawn({
        let engine = engine.clone();
        async move { engine.stop().await }
    });
    while engine.submit(&tokens(&prompt(4, 1), 3)).is_ok() {
        tokio::task::yield_now().await;
    }
    steps.decide(Verdict::Run);
    stopping.await.unwrap();
    assert_eq!(answer(generation).await.unwrap_err(), GenerateError::Stopped);
    assert_eq!((kv_used(&registry), engine.in_flight()), (0.0, 0));
    assert_eq!(value(&registry, "trustformers_kv_blocks_total", None), 0.0);
}

#[tokio::test]
async fn generations_outlive_the_last_handle() {
    let (engine, steps, _registry) = start_stepped(&config());
    let generation = engine.submit(&tokens(&prompt(4, 1), 3)).unwrap();
    steps.next_step();
    drop(engine);
    steps.decide(Verdict::Run);
    drop(steps);
    assert_eq!(answer(generation).await.unwrap().completion_tokens, 3);
}

#[tokio::test]
async fn a_warm_up_runs_prompt_and_decode_uncounted() {
    let (engine, steps, registry) = start_stepped(&config());
    let warm_up = tokio::spawn({
        let engine = engine.clone();
        async move { engine.warm_up().await }
    });
    let rows = tokio::task::spawn_blocking(move || [steps.run_step(), steps.run_step()]).await.unwrap();
    assert_eq!(rows, [[32], [1]]);
    warm_up.await.unwrap().unwrap();
    engine.drain().await;
    assert_eq!(value(&registry, "trustformers_generated_tokens_total", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("length")), 0.0);
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let engine = Engine::start(model(), Box::new(Oracle::new()), &config(), &metrics).unwrap();
    let all = answer(engine.submit(&tokens(&prompt(10, 1), 4)).unwrap()).await.unwrap();
    assert_eq!(all.reason, FinishReason::Length);
    engine.submit(&tokens(&[], 4)).unwrap_err();
    engine.submit(&tokens(&[271], 4)).unwrap_err();
    engine.submit(&tokens(&prompt(10, 1), 0)).unwrap_err();
    let expected = [
        ("trustformers_requests_total", Some("length"), 1.0),
        ("trustformers_requests_total", Some("invalid"), 3.0),
        ("trustformers_prompt_tokens_total", None, 10.0),
        ("trustformers_generated_tokens_total", None, 4.0),
        ("trustformers_time_to_first_token_seconds", None, 1.0),
        ("trustformers_inter_token_seconds", None, 3.0),
        ("trustformers_queue_wait_seconds", None, 1.0),
    ];
    for (name, outcome, wanted) in expected {
        assert_eq!(value(&registry, name, outcome), wanted, "{name} {outcome:?}");
    }
    assert!(value(&registry, "trustformers_kv_blocks_total", None) > 0.0);
}

#[test]
fn invalid_requests_name_the_field_and_the_limit() {
    let engine = start(&config());
    let message = |ids: &[u32]| engine.submit(&tokens(ids, 1)).unwrap_err().to_string();
    assert_eq!(message(&[]), "prompt: it is empty; at least one token is needed");
    assert_eq!(message(&[3, 271]), "prompt: token id 271 is outside the model's vocabulary of 271");
    assert_eq!(
        message(&prompt(256, 1)),
        "the prompt has 256 tokens; this model is served with room for at most 255"
    );
    assert_eq!(engine.in_flight(), 0);
}

#[test]
fn settings_out_of_range_are_refused_at_start() {
    let metrics = EngineMetrics::register(&Registry::new()).unwrap();
    let refused = |config: EngineConfig| {
        Engine::start(model(), Box::new(Oracle::new()), &config, &metrics).unwrap_err()
    };
    let error = refused(EngineConfig { context_tokens: Some(257), ..config() });
    assert!(error.to_string().contains("the model's own context of 256"), "{error}");
    let error = refused(EngineConfig { kv_memory_bytes: Some(1), ..config() });
    assert!(matches!(error, StartError::KvTooSmall { context_tokens: 256, .. }), "{error}");
}

#[tokio::test]
async fn tokens_marked_as_unused_are_never_produced() {
    let with_types = |types: Vec<i32>| {
        let file =
            SeededModel::default().gguf_with(&[("tokenizer.ggml.token_type", GgufValue::Integers(types))]);
        let model = Arc::new(Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap());
        Engine::start(model, Box::new(Oracle::new()), &config(), &EngineMetrics::unregistered().unwrap())
            .unwrap()
    };
    let mut types: Vec<i32> = (0..271).map(|id| if id < 3 { 3 } else { 1 }).collect();
    let mut engine = with_types(types.clone());
    for _ in 0..3 {
        let ids = answer(engine.submit(&GenerateParams::greedy("hello", 8)).unwrap()).await.unwrap().ids;
        // A control token that ends the answer stays what it is.
        let produced = ids.iter().find(|id| (3..270).contains(*id)).copied().unwrap();
        types[produced as usize] = 5;
        engine = with_types(types.clone());
        let ids = answer(engine.submit(&GenerateParams::greedy("hello", 8)).unwrap()).await.unwrap().ids;
        assert!(!ids.contains(&produced), "{ids:?} with {produced}");
    }
}
