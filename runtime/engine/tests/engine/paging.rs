//! The prefix cache: blocks on demand, shared prefixes, preemption.

use crate::adapters::{ROOM, adapter};
use crate::sharing::SharedDevice;
use crate::stepped::Verdict;
use crate::{CompletedAnswer, answer, config, kv_used, model, prompt, start, start_stepped, tokens, value};
use futures::future::join_all;
use prometheus::Registry;
use std::path::Path;
use std::sync::Arc;
use trustformers_conformance::bucketed::BucketedBackend;
use trustformers_conformance::late::{LateOracle, LateTime};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{
    AdapterRoom, Engine, EngineConfig, EngineMetrics, GenerateParams, Grammar, Numerics, Prompt, Speculation,
};
use trustformers_model::Model;
use trustformers_model::gguf::GgufValue;
use trustformers_model::seeded::{SeededFamily, SeededModel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{Backend, KvLayout};

/// Bytes of a KV block of the seeded model: layers, keys and values, tokens, heads, elements, bytes.
pub(crate) const BLOCK_BYTES: u64 = 2 * 2 * 16 * 2 * 16 * 4;

#[tokio::test]
async fn a_cached_prefix_is_not_computed_again() {
    let (engine, steps, registry) = start_stepped(&config());
    let first = prompt(40, 1);
    let running = engine.submit(&tokens(&first, 3)).unwrap();
    assert_eq!(steps.run_step(), [40]);
    // While the first runs, one with the same prefix reuses two full blocks of it.
    let step = steps.next_step();
    let longer = [&first[..36], &prompt(9, 7)].concat();
    let second = engine.submit(&tokens(&longer, 1)).unwrap();
    steps.decide(Verdict::Run);
    let shared = steps.next_step();
    assert_eq!(shared.blocks_of(1)[..2], step.blocks_of(0)[..2]);
    assert_eq!((shared.rows_of(1).len(), shared.positions[shared.rows_of(1).start]), (45 - 32, 32));
    steps.decide(Verdict::Run);
    drop(steps);
    let (first_answer, second_answer) = (answer(running).await.unwrap(), answer(second).await.unwrap());
    assert_eq!(second_answer.prompt_tokens, 45);
    assert_eq!(value(&registry, "trustformers_prompt_tokens_reused_total", None), 32.0);
    assert_eq!(value(&registry, "trustformers_prompt_tokens_total", None), 40.0 + 13.0);
    // A conversation continues after its first answer has ended: 42 tokens were computed, two blocks are
    // full.
    let next = [first, first_answer.ids, prompt(20, 3)].concat();
    let reusing = answer(engine.submit(&tokens(&next, 5)).unwrap()).await.unwrap();
    assert_eq!(value(&registry, "trustformers_prompt_tokens_reused_total", None), 64.0);
    assert_eq!(reusing, answer(start(&config()).submit(&tokens(&next, 5)).unwrap()).await.unwrap());
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert!(value(&registry, "trustformers_kv_blocks_kept", None) >= 3.0);
}

#[tokio::test]
async fn no_block_is_reused_after_a_failure() {
    let (engine, steps, registry) = start_stepped(&config());
    for verdict in [Verdict::Fail, Verdict::Poison] {
        let good = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
        assert_eq!(steps.run_step(), [40], "no block is left from before");
        answer(good).await.unwrap();
        let bad = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
        assert_eq!(steps.next_step().rows(), 8);
        steps.decide(verdict);
        answer(bad).await.unwrap_err();
    }
    drop(steps);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_kv_blocks_kept", None), 0.0);
}

#[tokio::test]
async fn the_latest_sequence_is_preempted_when_blocks_run_out() {
    let config = EngineConfig {
        context_tokens: Some(64),
        kv_memory_bytes: Some(5 * BLOCK_BYTES),
        max_batch_size: 2,
        ..config()
    };
    // Without end tokens both grow to their limit.
    let endless = |salt| GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(16, salt), 40) };
    let requests = [1, 2].map(endless);
    let roomy = start(&EngineConfig { kv_memory_bytes: None, ..config.clone() });
    let expected = requests.each_ref().map(|request| roomy.submit(request).unwrap());
    let (engine, steps, registry) = start_stepped(&config);
    let running = requests.each_ref().map(|request| engine.submit(request).unwrap());
    let mut rows = Vec::new();
    while rows.len() < 40 {
        rows.push(steps.run_step());
    }
    drop(steps);
    for (generation, expected) in running.into_iter().zip(expected) {
        assert_eq!(answer(generation).await.unwrap(), answer(expected).await.unwrap());
    }
    // At 33 tokens the first needs its third block and gets it; the second does not. It waits until the first
    // has ended, and then finds most of its blocks in the cache.
    assert!(rows.iter().filter(|rows| **rows == [1]).count() > 10, "{rows:?}");
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 1.0);
    assert!(value(&registry, "trustformers_tokens_recomputed_total", None) < 33.0);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_waiting", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_running", None), 0.0);
}

/// Requests whose prompts share prefixes of any length, greedy and sampled, with two adapters and without.
fn any_requests(rng: &mut fastrand::Rng) -> Vec<GenerateParams> {
    let count = 3 + rng.usize(..8);
    (0..count)
        .map(|index| {
            let (shared, own) = (rng.usize(..60), 1 + rng.usize(..30));
            let ids = [prompt(shared, rng.usize(..2)), prompt(own, 10 + rng.usize(..3))].concat();
            GenerateParams {
                prompt: Prompt::Tokens(ids),
                temperature: if rng.usize(..2) == 0 { 0.0 } else { 1.2 },
                top_k: 40,
                repetition_penalty: if rng.usize(..3) == 0 { 1.3 } else { 1.0 },
                grammar: (rng.usize(..6) == 0).then(|| Grammar::Regex("(ab|cd)+[0-9]{5}".into())),
                stop: if rng.usize(..4) == 0 { vec!["a".into(), "eb".into()] } else { Vec::new() },
                seed: Some(index as u64),
                logprobs: Some(2),
                adapter: [None, Some("a"), Some("b")][rng.usize(..3)].map(str::to_owned),
                ..tokens(&[], 1 + rng.usize(..40))
            }
        })
        .collect()
}

/// A model of the property: layers of two key and value heads of sixteen elements.
#[derive(Clone, Copy)]
struct PagedModel {
    model: fn() -> Arc<Model>,
    /// The windows of its layers.
    windows: &'static [Option<usize>],
    /// Whether requests choose adapters, which are made for the default model.
    has_adapters: bool,
}

/// The default model.
const FULL: PagedModel = PagedModel { model, windows: &[None; 2], has_adapters: true };

/// A Gemma 2, whose second layer has no window: three groups of layers.
pub(crate) fn gemma() -> Arc<Model> {
    let file = SeededModel { family: SeededFamily::Gemma2, layers: 3, ..SeededModel::default() }.gguf();
    Arc::new(Model::from_bytes(Path::new("gemma.gguf"), Arc::new(file)).unwrap())
}

const SOME_WINDOWED: PagedModel =
    PagedModel { model: gemma, windows: &[Some(16), None, Some(16)], has_adapters: false };

/// A Mistral: the default model with a window in every layer.
fn mistral() -> Arc<Model> {
    let window = ("llama.attention.sliding_window", GgufValue::U32(20));
    let file = SeededModel::default().gguf_with(&[window]);
    Arc::new(Model::from_bytes(Path::new("mistral.gguf"), Arc::new(file)).unwrap())
}

const ALL_WINDOWED: PagedModel = PagedModel { model: mistral, windows: &[Some(20); 2], has_adapters: true };

impl PagedModel {
    async fn start_exact(
        &self,
        config: &EngineConfig,
        backend: Box<dyn Backend>,
        registry: &Registry,
    ) -> Engine {
        let adapters = if self.has_adapters { ROOM } else { AdapterRoom::NONE };
        let config = EngineConfig { numerics: Numerics::Exact, adapters, ..config.clone() };
        let metrics = EngineMetrics::register(registry).unwrap();
        let engine = Engine::start((self.model)(), backend, &config, &metrics).unwrap();
        if self.has_adapters {
            engine.add_adapter(adapter("a", 11)).await.unwrap();
            engine.add_adapter(adapter("b", 12)).await.unwrap();
        }
        engine
    }

    /// Memory for one full context of so many tokens, if at most `rows` of its rows are in flight, and for
    /// `more` blocks of tokens.
    fn kv_bytes(&self, context: usize, rows: usize, more: u64) -> u64 {
        let layout = KvLayout::of_windows(self.windows, context);
        let classes = layout.classes();
        let blocks = classes.most_blocks(context, rows) as u64 + more * classes.groups() as u64;
        blocks * layout.block_layers() as u64 * BLOCK_BYTES / 2
    }
}

/// Another model on the same device, which answers these requests as well.
fn start_second(device: &SharedDevice) -> Engine {
    let file = SeededModel { seed: 2, layers: 1, ..SeededModel::default() }.gguf();
    let model = Arc::new(Model::from_bytes(Path::new("second.gguf"), Arc::new(file)).unwrap());
    let config = EngineConfig { numerics: Numerics::Exact, max_batch_size: 2, ..config() };
    let metrics = EngineMetrics::unregistered().unwrap();
    Engine::start(model, Box::new(device.clone()), &config, &metrics).unwrap()
}

/// In exact numerics the bits of an answer, log probabilities included, do not depend on the batch, on cached
/// prefixes, on the chunks of the prompt, on preemption, on draft tokens, on adapters that others chose, on
/// another model on the device, or on steps that run ahead where `crowded` is a device that allows it.
async fn scheduling_changes_no_answer(
    paged: PagedModel,
    alone: fn() -> Box<dyn Backend>,
    crowded: fn() -> Box<dyn Backend>,
    cases: u64,
) {
    let devices = (alone, crowded);
    let (mut reused, mut preempted) = (0.0, 0.0);
    for case in 0..cases {
        let mut rng = fastrand::Rng::with_seed(case);
        let mut requests = any_requests(&mut rng);
        if !paged.has_adapters {
            requests.iter_mut().for_each(|request| request.adapter = None);
        }
        let mut expected: Vec<CompletedAnswer> = Vec::new();
        for request in &requests {
            // An engine of its own: nothing is cached, and the prompt is read in one step.
            let config = EngineConfig { max_batch_size: 1, token_budget: 256, ..config() };
            let alone = paged.start_exact(&config, devices.0(), &Registry::new()).await;
            expected.push(answer(alone.submit(request).unwrap()).await.unwrap());
        }
        let max_batch_size = 2 + rng.usize(..7);
        // Windowed layers keep what the rows in flight reach: with few of them, memory is short.
        let more_rows = if paged.windows.iter().any(Option::is_some) { 4 } else { 40 };
        let token_budget = max_batch_size + rng.usize(..more_rows);
        let device = SharedDevice::new(devices.1());
        let rows = token_budget * device.caps().steps_in_flight;
        let crowded = EngineConfig {
            context_tokens: Some(144),
            max_batch_size,
            token_budget,
            kv_memory_bytes: Some(paged.kv_bytes(144, rows, rng.u64(..4))),
            speculation: (rng.usize(..3) == 0).then_some(Speculation::Ngram),
            ..config()
        };
        let registry = Registry::new();
        let engine = paged.start_exact(&crowded, Box::new(device.clone()), &registry).await;
        let second = start_second(&device);
        for round in 0..2 {
            let beside = requests.iter().take(3).map(|request| {
                let plain = GenerateParams { adapter: None, ..request.clone() };
                answer(second.submit(&plain).unwrap())
            });
            let beside: Vec<_> = beside.collect();
            let running = requests.iter().map(|request| answer(engine.submit(request).unwrap()));
            for (got, expected) in join_all(running).await.into_iter().zip(&expected) {
                assert_eq!(&got.unwrap(), expected, "case {case}, round {round}");
            }
            assert!(join_all(beside).await.iter().all(Result::is_ok), "case {case}, the second model");
        }
        engine.drain().await;
        assert_eq!(kv_used(&registry), 0.0, "case {case}");
        reused += value(&registry, "trustformers_prompt_tokens_reused_total", None);
        preempted += value(&registry, "trustformers_preemptions_total", None);
    }
    println!("{reused} prompt tokens were reused, {preempted} sequences were preempted");
    // Windows leave room for more sequences at a time: too little memory is rare, and not in the first cases.
    let least = match (paged.windows.iter().any(Option::is_some), cases) {
        (false, cases) => cases as f64 / 6.0,
        (true, 0..12) => -1.0,
        (true, _) => 0.0,
    };
    assert!(reused > 100.0 && preempted > least, "{reused} {preempted}");
}

fn oracle() -> Box<dyn Backend> {
    Box::new(Oracle::new())
}

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new(CpuConfig::default()).unwrap())
}

#[tokio::test]
async fn scheduling_changes_no_answer_on_the_oracle() {
    scheduling_changes_no_answer(FULL, oracle, oracle, 16).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_of_layers_with_windows() {
    scheduling_changes_no_answer(SOME_WINDOWED, oracle, oracle, 8).await;
    scheduling_changes_no_answer(ALL_WINDOWED, oracle, oracle, 8).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_of_layers_with_windows_on_a_device_that_runs_ahead() {
    let late = || -> Box<dyn Backend> { Box::new(LateOracle::new(LateTime::new(5000, 100))) };
    scheduling_changes_no_answer(SOME_WINDOWED, oracle, late, 12).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_of_layers_with_windows_on_the_cpu() {
    scheduling_changes_no_answer(SOME_WINDOWED, cpu, cpu, 16).await;
    scheduling_changes_no_answer(ALL_WINDOWED, cpu, cpu, 16).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_on_a_device_that_runs_ahead() {
    let late = || -> Box<dyn Backend> { Box::new(LateOracle::new(LateTime::new(5000, 100))) };
    scheduling_changes_no_answer(FULL, oracle, late, 24).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_on_a_device_with_buckets() {
    let bucketed = || -> Box<dyn Backend> {
        let late = Box::new(LateOracle::new(LateTime::new(5000, 100)));
        Box::new(BucketedBackend::new(late))
    };
    scheduling_changes_no_answer(FULL, oracle, bucketed, 16).await;
}

#[tokio::test]
async fn scheduling_changes_no_answer_on_the_cpu() {
    scheduling_changes_no_answer(FULL, cpu, cpu, 40).await;
}
