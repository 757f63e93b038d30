//! The paged cache: blocks on demand, beginnings that are shared, and sequences that give their blocks up.

use crate::gate::Verdict;
use crate::{Answer, answer, config, kv_used, model, prompt, start, start_gated, tokens, value};
use futures::future::join_all;
use prometheus::Registry;
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, Numerics, Prompt};
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

/// Bytes of a KV block of the seeded model: layers, keys and values, tokens, heads, elements, bytes.
pub(crate) const BLOCK_BYTES: u64 = 2 * 2 * 16 * 2 * 16 * 4;

#[tokio::test]
async fn a_known_beginning_is_not_computed_again() {
    let (engine, gate, registry) = start_gated(&config());
    let first = prompt(40, 1);
    let running = engine.submit(&tokens(&first, 3)).unwrap();
    assert_eq!(gate.run(), [40]);
    // While the first runs, one that begins like it reads two full blocks of it.
    let step = gate.begun();
    let longer = [&first[..36], &prompt(9, 7)].concat();
    let second = engine.submit(&tokens(&longer, 1)).unwrap();
    gate.let_it(Verdict::Run);
    let shared = gate.begun();
    assert_eq!(shared.blocks_of(1)[..2], step.blocks_of(0)[..2]);
    assert_eq!((shared.rows_of(1).len(), shared.positions[shared.rows_of(1).start]), (45 - 32, 32));
    gate.let_it(Verdict::Run);
    drop(gate);
    let (first_answer, second_answer) = (answer(running).await.unwrap(), answer(second).await.unwrap());
    assert_eq!(second_answer.prompt_tokens, 45);
    assert_eq!(value(&registry, "trustformers_prompt_tokens_reused_total", None), 32.0);
    assert_eq!(value(&registry, "trustformers_prompt_tokens_total", None), 40.0 + 13.0);
    // A conversation goes on after its first answer has ended: 42 tokens were computed, two blocks are full.
    let next = [first, first_answer.ids, prompt(20, 3)].concat();
    let reusing = answer(engine.submit(&tokens(&next, 5)).unwrap()).await.unwrap();
    assert_eq!(value(&registry, "trustformers_prompt_tokens_reused_total", None), 64.0);
    assert_eq!(reusing, answer(start(&config()).submit(&tokens(&next, 5)).unwrap()).await.unwrap());
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert!(value(&registry, "trustformers_kv_blocks_kept", None) >= 3.0);
}

#[tokio::test]
async fn after_a_failure_nothing_is_reused() {
    let (engine, gate, registry) = start_gated(&config());
    for verdict in [Verdict::Fail, Verdict::Poison] {
        let good = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
        assert_eq!(gate.run(), [40], "nothing is left of before");
        answer(good).await.unwrap();
        let bad = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
        assert_eq!(gate.begun().rows(), 8);
        gate.let_it(verdict);
        answer(bad).await.unwrap_err();
    }
    drop(gate);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_kv_blocks_kept", None), 0.0);
}

#[tokio::test]
async fn when_blocks_run_out_the_latest_gives_its_own_up_and_loses_nothing() {
    let config = EngineConfig {
        context_tokens: Some(64),
        kv_memory_bytes: Some(5 * BLOCK_BYTES),
        max_batch_size: 2,
        ..config()
    };
    // No end token, so that both grow to their limit.
    let endless = |salt| GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(16, salt), 40) };
    let requests = [1, 2].map(endless);
    let roomy = start(&EngineConfig { kv_memory_bytes: None, ..config.clone() });
    let expected = requests.each_ref().map(|request| roomy.submit(request).unwrap());
    let (engine, gate, registry) = start_gated(&config);
    let running = requests.each_ref().map(|request| engine.submit(request).unwrap());
    let mut rows = Vec::new();
    while rows.len() < 40 {
        rows.push(gate.run());
    }
    drop(gate);
    for (generation, expected) in running.into_iter().zip(expected) {
        assert_eq!(answer(generation).await.unwrap(), answer(expected).await.unwrap());
    }
    // At 33 tokens the first needs its third block and gets it; the second does not. It waits until the first, which
    // goes on alone, has ended, and then finds what it had computed.
    assert!(rows.iter().filter(|rows| **rows == [1]).count() > 10, "{rows:?}");
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    assert!(value(&registry, "trustformers_tokens_recomputed_total", None) < 33.0);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_running", None), 0.0);
}

/// Numbers without a pattern that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// Requests whose prompts share beginnings of any length, greedy and sampled.
fn any_requests(dice: &mut Dice) -> Vec<GenerateParams> {
    let count = 3 + dice.below(8);
    (0..count)
        .map(|index| {
            let (shared, own) = (dice.below(60), 1 + dice.below(30));
            let ids = [prompt(shared, dice.below(2)), prompt(own, 10 + dice.below(3))].concat();
            GenerateParams {
                prompt: Prompt::Tokens(ids),
                temperature: if dice.below(2) == 0 { 0.0 } else { 1.2 },
                top_k: 40,
                repetition_penalty: if dice.below(3) == 0 { 1.3 } else { 1.0 },
                seed: Some(index as u64),
                logprobs: Some(2),
                ..tokens(&[], 1 + dice.below(40))
            }
        })
        .collect()
}

fn start_exact(config: &EngineConfig, backend: Box<dyn Backend>, registry: &Registry) -> Engine {
    let config = EngineConfig { numerics: Numerics::Exact, ..config.clone() };
    let metrics = EngineMetrics::register(registry).unwrap();
    Engine::start(model(), backend, &config, &metrics).unwrap()
}

/// In exact numerics the bits of an answer, log probabilities included, do not depend on company, on known
/// beginnings, on how the prompt was cut, or on whether the sequence gave its blocks up on the way.
async fn answers_are_the_same_however_they_are_scheduled(backend: fn() -> Box<dyn Backend>, cases: u64) {
    let (mut reused, mut preempted) = (0.0, 0.0);
    for case in 0..cases {
        let mut dice = Dice(case);
        let requests = any_requests(&mut dice);
        let mut expected: Vec<Answer> = Vec::new();
        for request in &requests {
            // An engine of its own: nothing is known, and the prompt is read at once.
            let config = EngineConfig { max_batch_size: 1, token_budget: 256, ..config() };
            let alone = start_exact(&config, backend(), &Registry::new());
            expected.push(answer(alone.submit(request).unwrap()).await.unwrap());
        }
        let max_batch_size = 2 + dice.below(7);
        let crowded = EngineConfig {
            context_tokens: Some(144),
            max_batch_size,
            token_budget: max_batch_size + dice.below(40),
            kv_memory_bytes: Some((9 + dice.below(8) as u64) * BLOCK_BYTES),
            ..config()
        };
        let registry = Registry::new();
        let engine = start_exact(&crowded, backend(), &registry);
        for round in 0..2 {
            let running = requests.iter().map(|request| answer(engine.submit(request).unwrap()));
            for (got, expected) in join_all(running).await.into_iter().zip(&expected) {
                assert_eq!(&got.unwrap(), expected, "case {case}, round {round}");
            }
        }
        engine.drain().await;
        assert_eq!(kv_used(&registry), 0.0, "case {case}");
        reused += value(&registry, "trustformers_prompt_tokens_reused_total", None);
        preempted += value(&registry, "trustformers_preemptions_total", None);
    }
    println!("{reused} prompt tokens were known, {preempted} times a sequence gave its blocks up");
    assert!(reused > 100.0 && preempted > cases as f64 / 4.0, "{reused} {preempted}");
}

#[tokio::test]
async fn answers_are_the_same_however_they_are_scheduled_on_the_oracle() {
    answers_are_the_same_however_they_are_scheduled(|| Box::new(Oracle::new()), 12).await;
}

#[tokio::test]
async fn answers_are_the_same_however_they_are_scheduled_on_the_processor() {
    let cpu = || -> Box<dyn Backend> { Box::new(CpuBackend::new(CpuConfig::default()).unwrap()) };
    answers_are_the_same_however_they_are_scheduled(cpu, 40).await;
}
