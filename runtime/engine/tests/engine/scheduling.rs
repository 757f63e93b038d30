//! Who is next, and who gives way: classes, tenants, a full queue.

use crate::gate::{Gate, Verdict};
use crate::{answer, config, kv_used, prompt, start, start_gated, tokens, value};
use std::time::Duration;
use trustformers_engine::{
    EngineConfig, GenerateError, GenerateParams, GenerationEvent, Priority, SubmitError,
};

/// A request that can be told from others by its first token.
fn of(class: Priority, tenant: &str, salt: usize, max_tokens: usize) -> GenerateParams {
    GenerateParams {
        priority: class,
        tenant: tenant.to_owned(),
        logit_bias: vec![(2, -100.0)],
        ..tokens(&prompt(4, salt), max_tokens)
    }
}

/// The salts of the prompts that the next `steps` steps begin to read.
fn begun(gate: &Gate, steps: usize) -> Vec<usize> {
    let mut salts = Vec::new();
    for _ in 0..steps {
        let step = gate.begun();
        for sequence in 0..step.sequences() {
            let rows = step.rows_of(sequence);
            if step.positions[rows.start] == 0 {
                let first = step.tokens[rows.start];
                salts.extend((0..250).find(|salt| prompt(1, *salt)[0] == first));
            }
        }
        gate.let_it(Verdict::Run);
    }
    salts
}

/// An engine with one place, which is taken for one more step.
fn one_place() -> (trustformers_engine::Engine, Gate, trustformers_engine::Generation) {
    let (engine, gate, _registry) = start_gated(&EngineConfig { max_batch_size: 1, ..config() });
    let first = engine.submit(&of(Priority::High, "", 0, 1)).unwrap();
    gate.begun();
    (engine, gate, first)
}

#[test]
fn a_higher_class_overtakes_and_takes_the_place_of_what_runs() {
    let (engine, gate, registry) = start_gated(&EngineConfig { max_batch_size: 1, ..config() });
    let low = engine.submit(&of(Priority::Low, "", 1, 3)).unwrap();
    gate.begun();
    let requests = [(Priority::Normal, 2), (Priority::High, 3), (Priority::Low, 4), (Priority::High, 5)];
    let waiting = requests.map(|(class, salt)| engine.submit(&of(class, "", salt, 1)).unwrap());
    gate.let_it(Verdict::Run);
    // The low one that ran is the oldest of its class, so it goes on before the other.
    assert_eq!(begun(&gate, 6), [3, 5, 2, 1, 4]);
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    drop((gate, low, waiting));
}

#[test]
fn low_is_served_within_its_bound_whatever_comes_above_it() {
    let (engine, gate, first) = one_place();
    let low = engine.submit(&of(Priority::Low, "", 1, 4)).unwrap();
    let normal = engine.submit(&of(Priority::Normal, "", 2, 1)).unwrap();
    let high: Vec<_> =
        (10..50).map(|salt| engine.submit(&of(Priority::High, "", salt, 1)).unwrap()).collect();
    gate.let_it(Verdict::Run);
    let order = begun(&gate, 25);
    let at = |salt: usize| order.iter().position(|other| *other == salt);
    assert_eq!((at(2), at(1)), (Some(8), Some(16)), "{order:?}");
    // Four steps were the low one's: what had to wait so long is not put out again.
    assert_eq!(order.len(), 25 - 3);
    drop((gate, first, low, normal, high));
}

/// Older requests of a higher class run beside it and would have their prompts read first, over and over.
#[test]
fn what_is_due_is_read_before_what_came_earlier() {
    let config = EngineConfig { max_batch_size: 2, token_budget: 4, ..config() };
    let (engine, gate, _registry) = start_gated(&config);
    let first = engine.submit(&of(Priority::High, "", 0, 1)).unwrap();
    gate.begun();
    let high: Vec<_> =
        (10..50).map(|salt| engine.submit(&of(Priority::High, "", salt, 1)).unwrap()).collect();
    let low = engine.submit(&of(Priority::Low, "", 1, 1)).unwrap();
    gate.let_it(Verdict::Run);
    // A step has room for one prompt.
    let order = begun(&gate, 30);
    let at = order.iter().position(|salt| *salt == 1);
    assert!(at.is_some_and(|at| at <= 16), "{order:?}");
    drop((gate, first, high, low));
}

#[test]
fn a_newcomer_s_short_prompt_is_read_at_once_beside_a_long_one() {
    let (engine, gate, _registry) = start_gated(&config());
    let many: Vec<_> = (1..4)
        .map(|salt| {
            engine
                .submit(&GenerateParams { tenant: "a".to_owned(), ..tokens(&prompt(150, salt), 1) })
                .unwrap()
        })
        .collect();
    assert_eq!(gate.begun().rows(), 64);
    let other =
        engine.submit(&GenerateParams { tenant: "b".to_owned(), ..tokens(&prompt(40, 9), 1) }).unwrap();
    gate.let_it(Verdict::Run);
    let step = gate.begun();
    assert_eq!((step.rows(), step.tokens[0]), (40, prompt(40, 9)[0]));
    gate.let_it(Verdict::Run);
    drop((gate, many, other));
}

#[test]
fn those_that_are_due_leave_places_to_the_first_class() {
    let (engine, gate, _registry) = start_gated(&EngineConfig { max_batch_size: 4, ..config() });
    let first = engine.submit(&of(Priority::High, "", 0, 1)).unwrap();
    gate.begun();
    let low: Vec<_> = (1..6).map(|salt| engine.submit(&of(Priority::Low, "", salt, 100)).unwrap()).collect();
    let high: Vec<_> =
        (10..90).map(|salt| engine.submit(&of(Priority::High, "", salt, 1)).unwrap()).collect();
    gate.let_it(Verdict::Run);
    let order = begun(&gate, 22);
    assert!(order.len() > 60, "{order:?}");
    assert_eq!(order.iter().filter(|salt| **salt < 10).count(), 1, "a quarter of the places: {order:?}");
    drop((gate, first, low, high));
}

#[test]
fn a_tenant_with_a_full_batch_makes_place_for_another_at_once() {
    let config = EngineConfig { max_batch_size: 4, ..config() };
    let (engine, gate, registry) = start_gated(&config);
    let first = engine.submit(&of(Priority::Normal, "a", 1, 30)).unwrap();
    // The first step is held until all others wait, so that these begin together in the second.
    gate.begun();
    let many: Vec<_> =
        (2..20).map(|salt| engine.submit(&of(Priority::Normal, "a", salt, 30)).unwrap()).collect();
    gate.let_it(Verdict::Run);
    gate.run();
    let step = gate.begun();
    assert_eq!(step.sequences(), 4);
    let other = engine.submit(&of(Priority::Normal, "b", 100, 2)).unwrap();
    gate.let_it(Verdict::Run);
    let step = gate.begun();
    assert_eq!((step.sequences(), step.rows()), (1, 4), "its prompt is read at once, and the others pause");
    gate.let_it(Verdict::Run);
    assert_eq!(gate.run(), [1, 1, 1, 1]);
    // The other has ended; the one that gave way goes on where it was, before those that have not begun.
    let step = gate.begun();
    assert_eq!(step.sequences(), 4);
    assert_eq!(step.rows(), 3 + 4 + 2, "it had its prompt and two tokens");
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    drop((gate, first, many, other));
}

#[test]
fn turns_go_to_the_tenant_that_was_served_least() {
    let (engine, gate, first) = one_place();
    // Every request of a takes 4 + 7 tokens, every one of b half as many or a little more.
    let a: Vec<_> = (1..10).map(|salt| engine.submit(&of(Priority::Normal, "a", salt, 8)).unwrap()).collect();
    let b: Vec<_> =
        (101..120).map(|salt| engine.submit(&of(Priority::Normal, "b", salt, 2)).unwrap()).collect();
    gate.let_it(Verdict::Run);
    let mut order = begun(&gate, 40);
    // Whatever has only begun does not count.
    order.pop();
    let of_a = order.iter().filter(|salt| **salt < 100).count();
    let of_b = order.len() - of_a;
    // 11 tokens against 5: for one of a there are two of b or a little more.
    assert!(of_a >= 3 && (2 * of_a..=3 * of_a).contains(&of_b), "{order:?}");
    drop((gate, first, a, b));
}

#[tokio::test]
async fn a_full_queue_has_room_for_other_tenants_and_higher_classes() {
    let config = EngineConfig { max_batch_size: 1, max_queue: 3, ..config() };
    let (engine, gate, registry) = start_gated(&config);
    let running = engine.submit(&of(Priority::Normal, "a", 1, 20)).unwrap();
    gate.begun();
    let [second, third, fourth] =
        [2, 3, 4].map(|salt| engine.submit(&of(Priority::Normal, "a", salt, 1)).unwrap());
    let refused = engine.submit(&of(Priority::Normal, "a", 5, 1)).unwrap_err();
    assert_eq!(refused, SubmitError::Overloaded { queue: 3, retry_after: Duration::from_secs(1) });
    engine.submit(&of(Priority::Low, "a", 5, 1)).unwrap_err();
    let other = engine.submit(&of(Priority::Normal, "b", 6, 1)).unwrap();
    let urgent = engine.submit(&of(Priority::High, "a", 7, 1)).unwrap();
    gate.let_it(Verdict::Run);
    drop(gate);
    for put_out in [third, fourth] {
        let error = answer(put_out).await.unwrap_err();
        assert!(matches!(error, GenerateError::Overloaded { .. }), "{error}");
    }
    for served in [running, second, other, urgent] {
        answer(served).await.unwrap();
    }
    assert_eq!(value(&registry, "trustformers_requests_total", Some("overloaded")), 4.0);
    engine.drain().await;
    assert_eq!((kv_used(&registry), engine.queued()), (0.0, 0));
}

#[tokio::test]
async fn failed_steps_show_in_the_heartbeat_until_one_succeeds() {
    let (engine, gate, registry) = start_gated(&config());
    for failed in 1..=3 {
        let generation = engine.submit(&tokens(&prompt(4, 1), 5)).unwrap();
        gate.begun();
        gate.let_it(Verdict::Fail);
        answer(generation).await.unwrap_err();
        assert_eq!(engine.heartbeat().failed_steps, failed);
    }
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 3.0);
    let generation = engine.submit(&tokens(&prompt(4, 1), 1)).unwrap();
    drop(gate);
    answer(generation).await.unwrap();
    engine.drain().await;
    assert_eq!(engine.heartbeat().failed_steps, 0);
}

/// Many tenants and classes at once, with hardly any room: everybody gets what he would have got alone.
#[test]
fn giving_way_changes_no_answer() {
    let requests: Vec<GenerateParams> = (0..30)
        .map(|index| {
            let class = Priority::ALL[index % 3];
            GenerateParams {
                temperature: 0.8,
                seed: Some(index as u64),
                ..of(class, ["a", "b", "c", "d"][index % 4], index, 3 + index % 20)
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

/// Two tenants whose sequences do not fit together, with classes mixed in: whoever gives way is next to ask again, and
/// still every step computes something.
#[test]
fn tenants_that_contend_for_blocks_do_not_stand_still() {
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
