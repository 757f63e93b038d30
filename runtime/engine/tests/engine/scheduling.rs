//! The order of requests and preemption: classes, tenants, a full queue.

use crate::stepped::{StepControl, Verdict};
use crate::{answer, config, kv_used, prompt, start, start_stepped, tokens, value};
use std::time::Duration;
use trustformers_engine::{
    EngineConfig, GenerateError, GenerateParams, GenerationEvent, Priority, SubmitError,
};

/// A request that is recognised by its first token.
fn request_of(class: Priority, tenant: &str, salt: usize, max_tokens: usize) -> GenerateParams {
    GenerateParams {
        priority: class,
        tenant: tenant.to_owned(),
        logit_bias: vec![(2, -100.0)],
        ..tokens(&prompt(4, salt), max_tokens)
    }
}

/// The salts of the prompts that the next `count` steps begin to read.
fn started(steps: &StepControl, count: usize) -> Vec<usize> {
    let mut salts = Vec::new();
    for _ in 0..count {
        let step = steps.next_step();
        for sequence in 0..step.sequences() {
            let rows = step.rows_of(sequence);
            if step.positions[rows.start] == 0 {
                let first = step.tokens[rows.start].id().unwrap();
                salts.extend((0..250).find(|salt| prompt(1, *salt)[0] == first));
            }
        }
        steps.decide(Verdict::Run);
    }
    salts
}

/// An engine with a batch of one, in which a request runs for one more step.
fn batch_of_one() -> (trustformers_engine::Engine, StepControl, trustformers_engine::Generation) {
    let (engine, steps, _registry) = start_stepped(&EngineConfig { max_batch_size: 1, ..config() });
    let first = engine.submit(&request_of(Priority::High, "", 0, 1)).unwrap();
    steps.next_step();
    (engine, steps, first)
}

#[test]
fn a_higher_class_is_next_and_preempts_others() {
    let (engine, steps, registry) = start_stepped(&EngineConfig { max_batch_size: 1, ..config() });
    let low = engine.submit(&request_of(Priority::Low, "", 1, 3)).unwrap();
    steps.next_step();
    let requests = [(Priority::Normal, 2), (Priority::High, 3), (Priority::Low, 4), (Priority::High, 5)];
    let waiting = requests.map(|(class, salt)| engine.submit(&request_of(class, "", salt, 1)).unwrap());
    steps.decide(Verdict::Run);
    // The preempted request is the oldest of its class, so it continues before the other.
    assert_eq!(started(&steps, 6), [3, 5, 2, 1, 4]);
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    drop((steps, low, waiting));
}

#[test]
fn class_low_is_served_within_its_bound() {
    let (engine, steps, first) = batch_of_one();
    let low = engine.submit(&request_of(Priority::Low, "", 1, 4)).unwrap();
    let normal = engine.submit(&request_of(Priority::Normal, "", 2, 1)).unwrap();
    let high: Vec<_> =
        (10..50).map(|salt| engine.submit(&request_of(Priority::High, "", salt, 1)).unwrap()).collect();
    steps.decide(Verdict::Run);
    let order = started(&steps, 25);
    let at = |salt: usize| order.iter().position(|other| *other == salt);
    assert_eq!((at(2), at(1)), (Some(8), Some(16)), "{order:?}");
    // The aged request runs for four steps: it is not preempted again.
    assert_eq!(order.len(), 25 - 3);
    drop((steps, first, low, normal, high));
}

/// Older requests of a higher class run beside it. Without aging their prompts would be read first, again and
/// again.
#[test]
fn an_aged_prompt_is_read_before_earlier_ones() {
    let config = EngineConfig { max_batch_size: 2, token_budget: 4, ..config() };
    let (engine, steps, _registry) = start_stepped(&config);
    let first = engine.submit(&request_of(Priority::High, "", 0, 1)).unwrap();
    steps.next_step();
    let high: Vec<_> =
        (10..50).map(|salt| engine.submit(&request_of(Priority::High, "", salt, 1)).unwrap()).collect();
    let low = engine.submit(&request_of(Priority::Low, "", 1, 1)).unwrap();
    steps.decide(Verdict::Run);
    // A step has room for one prompt.
    let order = started(&steps, 30);
    let at = order.iter().position(|salt| *salt == 1);
    assert!(at.is_some_and(|at| at <= 16), "{order:?}");
    drop((steps, first, high, low));
}

#[test]
fn a_short_prompt_of_a_new_tenant_is_read_at_once() {
    let (engine, steps, _registry) = start_stepped(&config());
    let many: Vec<_> = (1..4)
        .map(|salt| {
            engine
                .submit(&GenerateParams { tenant: "a".to_owned(), ..tokens(&prompt(150, salt), 1) })
                .unwrap()
        })
        .collect();
    assert_eq!(steps.next_step().rows(), 64);
    let other =
        engine.submit(&GenerateParams { tenant: "b".to_owned(), ..tokens(&prompt(40, 9), 1) }).unwrap();
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.rows(), step.tokens[0].id()), (40, Some(prompt(40, 9)[0])));
    steps.decide(Verdict::Run);
    drop((steps, many, other));
}

#[test]
fn aged_requests_take_a_quarter_of_the_batch() {
    let (engine, steps, _registry) = start_stepped(&EngineConfig { max_batch_size: 4, ..config() });
    let first = engine.submit(&request_of(Priority::High, "", 0, 1)).unwrap();
    steps.next_step();
    let low: Vec<_> =
        (1..6).map(|salt| engine.submit(&request_of(Priority::Low, "", salt, 100)).unwrap()).collect();
    let high: Vec<_> =
        (10..90).map(|salt| engine.submit(&request_of(Priority::High, "", salt, 1)).unwrap()).collect();
    steps.decide(Verdict::Run);
    let order = started(&steps, 22);
    assert!(order.len() > 60, "{order:?}");
    assert_eq!(order.iter().filter(|salt| **salt < 10).count(), 1, "a quarter of the batch: {order:?}");
    drop((steps, first, low, high));
}

#[test]
fn a_tenant_with_a_full_batch_is_preempted_for_another() {
    let config = EngineConfig { max_batch_size: 4, ..config() };
    let (engine, steps, registry) = start_stepped(&config);
    let first = engine.submit(&request_of(Priority::Normal, "a", 1, 30)).unwrap();
    // The first step waits until all others are queued, so that these start together in the second.
    steps.next_step();
    let many: Vec<_> =
        (2..20).map(|salt| engine.submit(&request_of(Priority::Normal, "a", salt, 30)).unwrap()).collect();
    steps.decide(Verdict::Run);
    steps.run_step();
    let step = steps.next_step();
    assert_eq!(step.sequences(), 4);
    let other = engine.submit(&request_of(Priority::Normal, "b", 100, 2)).unwrap();
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.sequences(), step.rows()), (1, 4), "its prompt is read at once, and the others pause");
    steps.decide(Verdict::Run);
    assert_eq!(steps.run_step(), [1, 1, 1, 1]);
    // The other has ended. The preempted sequence continues, before those that have not started.
    let step = steps.next_step();
    assert_eq!(step.sequences(), 4);
    assert_eq!(step.rows(), 3 + 4 + 2, "it had its prompt and two tokens");
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    drop((steps, first, many, other));
}

#[test]
fn the_least_served_tenant_is_next() {
    let (engine, steps, first) = batch_of_one();
    // Every request of a takes 4 + 7 tokens, every one of b half as many or slightly more.
    let a: Vec<_> =
        (1..10).map(|salt| engine.submit(&request_of(Priority::Normal, "a", salt, 8)).unwrap()).collect();
    let b: Vec<_> =
        (101..120).map(|salt| engine.submit(&request_of(Priority::Normal, "b", salt, 2)).unwrap()).collect();
    steps.decide(Verdict::Run);
    let mut order = started(&steps, 40);
    // A request that has only started does not count.
    order.pop();
    let of_a = order.iter().filter(|salt| **salt < 100).count();
    let of_b = order.len() - of_a;
    // 11 tokens against 5: two requests of b or slightly more for each of a.
    assert!(of_a >= 3 && (2 * of_a..=3 * of_a).contains(&of_b), "{order:?}");
    drop((steps, first, a, b));
}

#[tokio::test]
async fn a_full_queue_admits_other_tenants_and_higher_classes() {
    let config = EngineConfig { max_batch_size: 1, max_queue: 3, ..config() };
    let (engine, steps, registry) = start_stepped(&config);
    let running = engine.submit(&request_of(Priority::Normal, "a", 1, 20)).unwrap();
    steps.next_step();
    let [second, third, fourth] =
        [2, 3, 4].map(|salt| engine.submit(&request_of(Priority::Normal, "a", salt, 1)).unwrap());
    let refused = engine.submit(&request_of(Priority::Normal, "a", 5, 1)).unwrap_err();
    assert_eq!(refused, SubmitError::Overloaded { queue: 3, retry_after: Duration::from_secs(1) });
    engine.submit(&request_of(Priority::Low, "a", 5, 1)).unwrap_err();
    assert_eq!(engine.refuse(Priority::Normal, "a"), Some(refused));
    for (class, tenant) in [(Priority::Normal, "b"), (Priority::High, "a")] {
        assert_eq!(engine.refuse(class, tenant), None, "{class} {tenant} precedes others");
    }
    let other = engine.submit(&request_of(Priority::Normal, "b", 6, 1)).unwrap();
    let urgent = engine.submit(&request_of(Priority::High, "a", 7, 1)).unwrap();
    steps.decide(Verdict::Run);
    drop(steps);
    for removed in [third, fourth] {
        let error = answer(removed).await.unwrap_err();
        assert!(matches!(error, GenerateError::Overloaded { .. }), "{error}");
    }
    for served in [running, second, other, urgent] {
        answer(served).await.unwrap();
    }
    assert_eq!(value(&registry, "trustformers_requests_total", Some("overloaded")), 5.0);
    engine.drain().await;
    assert_eq!((kv_used(&registry), engine.queued()), (0.0, 0));
}

#[tokio::test]
async fn failed_steps_are_counted_until_one_succeeds() {
    let (engine, steps, registry) = start_stepped(&config());
    for failed in 1..=3 {
        let generation = engine.submit(&tokens(&prompt(4, 1), 5)).unwrap();
        steps.next_step();
        steps.decide(Verdict::Fail);
        answer(generation).await.unwrap_err();
        assert_eq!(engine.heartbeat().failed_steps, failed);
    }
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 3.0);
    let generation = engine.submit(&tokens(&prompt(4, 1), 1)).unwrap();
    drop(steps);
    answer(generation).await.unwrap();
    engine.drain().await;
    assert_eq!(engine.heartbeat().failed_steps, 0);
}

/// Many tenants and classes at once in little memory: every request gets the answer that it gets alone.
#[test]
fn preemption_changes_no_answer() {
    let requests: Vec<GenerateParams> = (0..30)
        .map(|index| {
            let class = Priority::ALL[index % 3];
            GenerateParams {
                temperature: 0.8,
                seed: Some(index as u64),
                ..request_of(class, ["a", "b", "c", "d"][index % 4], index, 3 + index % 20)
            }
        })
        .collect();
    let alone = start(&EngineConfig { max_batch_size: 1, ..config() });
    let crowded = start(&EngineConfig {
        max_batch_size: 3,
        token_budget: 7,
        step_target_ms: Some(1),
        context_tokens: Some(48),
        kv_memory_bytes: Some(4 * crate::paging::BLOCK_BYTES),
        ..config()
    });
    let ids = |mut generation: trustformers_engine::Generation| {
        let mut ids = Vec::new();
        while let GenerationEvent::Token { id, .. } = generation.blocking_next().unwrap().unwrap() {
            ids.push(id);
        }
        ids
    };
    let running: Vec<_> = requests.iter().map(|request| crowded.submit(request).unwrap()).collect();
    for (request, generation) in requests.iter().zip(running) {
        assert_eq!(ids(generation), ids(alone.submit(request).unwrap()));
    }
}

/// Tenants and classes whose sequences do not fit together: a preempted sequence asks for blocks again at
/// once, and still every step computes something.
#[test]
fn tenants_that_compete_for_blocks_make_progress() {
    let requests: Vec<GenerateParams> = (0..40)
        .map(|index| GenerateParams {
            priority: Priority::ALL[index % 3],
            tenant: ["a", "b", "c", "d"][index % 4].to_owned(),
            logit_bias: vec![(2, -100.0)],
            ..tokens(
                &prompt(if index % 5 == 0 { 100 } else { 20 }, index),
                if index % 5 == 0 { 60 } else { 10 },
            )
        })
        .collect();
    let engine = start(&EngineConfig {
        max_batch_size: 8,
        context_tokens: Some(176),
        kv_memory_bytes: Some(14 * crate::paging::BLOCK_BYTES),
        ..config()
    });
    let running: Vec<_> = requests.iter().map(|request| engine.submit(request).unwrap()).collect();
    for (request, mut generation) in requests.iter().zip(running) {
        let mut produced = 0;
        while let GenerationEvent::Token { .. } = generation.blocking_next().unwrap().unwrap() {
            produced += 1;
        }
        assert_eq!(produced, request.max_tokens);
    }
}
