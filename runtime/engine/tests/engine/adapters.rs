//! Adapters: what a request chooses decides its answer and nothing else does, while adapters come and go.

use crate::{CompletedAnswer, answer, config, kv_used, model, prompt, start_stepped, tokens, value};
use futures::FutureExt;
use futures::future::join_all;
use prometheus::Registry;
use trustformers_conformance::late::{LateOracle, LateTime};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{
    Adapter, AdapterChangeError, AdapterRoom, Engine, EngineConfig, EngineMetrics, GenerateParams, Numerics,
    SubmitError,
};
use trustformers_model::CheckpointFiles;
use trustformers_model::seeded::{SeededAdapter, SeededModel};
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

/// The room of the tests' engines.
pub(crate) const ROOM: AdapterRoom = AdapterRoom { slots: 2, rank: 4 };

/// An adapter of the tests' model, through the files that PEFT would write.
pub(crate) fn adapter(name: &str, seed: u64) -> Adapter {
    let folder = tempfile::tempdir().unwrap();
    SeededAdapter::of(SeededModel::default(), seed).write(folder.path()).unwrap();
    model().read_adapter(name, &CheckpointFiles::of_folder(folder.path()).unwrap()).unwrap()
}

fn with_room(config: EngineConfig) -> EngineConfig {
    EngineConfig { adapters: ROOM, numerics: Numerics::Exact, ..config }
}

/// An engine with the adapters `a` and `b`.
async fn start_on(backend: Box<dyn Backend>, registry: &Registry) -> Engine {
    let metrics = EngineMetrics::register(registry).unwrap();
    let engine = Engine::start(model(), backend, &with_room(config()), &metrics).unwrap();
    engine.add_adapter(adapter("a", 11)).await.unwrap();
    engine.add_adapter(adapter("b", 12)).await.unwrap();
    engine
}

fn choosing(name: Option<&str>, request: GenerateParams) -> GenerateParams {
    GenerateParams { adapter: name.map(str::to_owned), ..request }
}

async fn alone(backend: Box<dyn Backend>, request: &GenerateParams) -> CompletedAnswer {
    let engine = start_on(backend, &Registry::new()).await;
    let answer = answer(engine.submit(request).unwrap()).await.unwrap();
    engine.stop().await;
    answer
}

async fn each_answers_as_alone(device: fn() -> Box<dyn Backend>) {
    let registry = Registry::new();
    let engine = start_on(device(), &registry).await;
    // The same prompt for all: nothing else tells the answers apart.
    let requests: Vec<GenerateParams> = [None, Some("a"), Some("b"), Some("a"), None]
        .into_iter()
        .map(|name| GenerateParams { logprobs: Some(2), ..choosing(name, tokens(&prompt(50, 3), 20)) })
        .collect();
    let running: Vec<_> = requests.iter().map(|request| engine.submit(request).unwrap()).collect();
    let together: Vec<CompletedAnswer> =
        join_all(running.into_iter().map(answer)).await.into_iter().map(Result::unwrap).collect();
    for (request, got) in requests.iter().zip(&together) {
        assert_eq!(*got, alone(device(), request).await, "{:?}", request.adapter);
    }
    assert_ne!(together[0].logprobs, together[1].logprobs, "an adapter changes answers");
    assert_ne!(together[1].logprobs, together[2].logprobs, "each in its own way");
    assert_eq!(together[0].logprobs, together[4].logprobs);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn two_adapters_and_the_model_answer_as_alone_on_the_oracle() {
    each_answers_as_alone(|| Box::new(Oracle::new())).await;
}

#[tokio::test]
async fn two_adapters_and_the_model_answer_as_alone_on_the_cpu() {
    each_answers_as_alone(|| Box::new(CpuBackend::new(CpuConfig::default()).unwrap())).await;
}

#[tokio::test]
async fn two_adapters_and_the_model_answer_as_alone_where_steps_run_ahead() {
    each_answers_as_alone(|| Box::new(LateOracle::new(LateTime::new(5000, 100)))).await;
}

#[tokio::test]
async fn a_model_with_room_answers_as_one_without() {
    let request = GenerateParams { logprobs: Some(2), ..tokens(&prompt(40, 5), 10) };
    let config = EngineConfig { numerics: Numerics::Exact, ..config() };
    let without = crate::start(&config);
    let wanted = answer(without.submit(&request).unwrap()).await.unwrap();
    // The oracle claims no fused form, so that both plans have the same ops.
    assert_eq!(alone(Box::new(Oracle::new()), &request).await, wanted);
    let refused = without.add_adapter(adapter("a", 11)).await;
    assert_eq!(refused, Err(AdapterChangeError::Full { slots: 0 }));
}

/// The blocks of a prompt that were reused so far, in tokens.
fn reused(registry: &Registry) -> f64 {
    value(registry, "trustformers_prompt_tokens_reused_total", None)
}

#[tokio::test]
async fn no_prefix_is_shared_between_adapters_or_with_the_model() {
    let registry = Registry::new();
    let engine = start_on(Box::new(Oracle::new()), &registry).await;
    let request = tokens(&prompt(40, 1), 4);
    let on = &engine;
    let ask = |name| {
        let running = on.submit(&choosing(name, request.clone())).unwrap();
        async move { answer(running).await.unwrap() }
    };
    let firsts = [ask(None).await, ask(Some("a")).await, ask(Some("b")).await];
    assert_eq!(reused(&registry), 0.0, "each has computed its own keys and values");
    assert_eq!([ask(None).await, ask(Some("a")).await, ask(Some("b")).await], firsts);
    assert_eq!(reused(&registry), 3.0 * 32.0, "each has reused its own");
    // Another adapter under a name and in a slot that were used before.
    engine.remove_adapter("a").await.unwrap();
    engine.add_adapter(adapter("a", 99)).await.unwrap();
    let other = ask(Some("a")).await;
    assert_eq!(reused(&registry), 3.0 * 32.0, "nothing of the adapter before");
    assert_ne!(other, firsts[1]);
}

#[tokio::test]
async fn adapters_come_and_go_beside_requests_that_run() {
    let endless = |salt| GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(20, salt), 30) };
    let (plain, adapted) = (endless(1), choosing(Some("a"), endless(2)));
    let oracle = || Box::new(Oracle::new());
    let wanted = [alone(oracle(), &plain).await, alone(oracle(), &adapted).await];
    let (engine, steps, registry) = start_stepped(&with_room(config()));
    let adding = |name, seed| {
        let engine = engine.clone();
        tokio::spawn(async move { engine.add_adapter(adapter(name, seed)).await })
    };
    adding("a", 11).await.unwrap().unwrap();
    let running = [engine.submit(&plain).unwrap(), engine.submit(&adapted).unwrap()];
    steps.run_step();
    // One is added between two steps, and takes a request at once.
    let added = adding("b", 12);
    while !added.is_finished() {
        steps.run_step();
        tokio::task::yield_now().await;
    }
    added.await.unwrap().unwrap();
    let third = engine.submit(&choosing(Some("b"), endless(3))).unwrap();
    // The first one is removed while its request runs: new requests are refused, that one goes on.
    let mut removing = Box::pin(engine.remove_adapter("a"));
    assert!((&mut removing).now_or_never().is_none(), "a request holds it");
    let refused = engine.submit(&adapted).unwrap_err();
    assert!(matches!(refused, SubmitError::Invalid { field: "adapter", .. }), "{refused}");
    assert_eq!(engine.adapters(), ["b"]);
    drop(steps);
    let [first, second] = running.map(answer);
    assert_eq!([first.await.unwrap(), second.await.unwrap()], wanted);
    removing.await.unwrap();
    assert_eq!(answer(third).await.unwrap(), alone(oracle(), &choosing(Some("b"), endless(3))).await);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn an_adapter_leaves_only_after_the_last_step_with_its_rows() {
    // On this device a sequence that ends has a row in a step that is not computed yet. Were its slot emptied
    // before, that step would be refused, and other requests would fail.
    let registry = Registry::new();
    let engine = start_on(Box::new(LateOracle::new(LateTime::new(5000, 100))), &registry).await;
    let endless = GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(20, 1), 200) };
    let wanted = alone(Box::new(Oracle::new()), &endless).await;
    let running = engine.submit(&endless).unwrap();
    for round in 0..8 {
        let seed = 11 + round % 2;
        let request = choosing(Some("a"), tokens(&prompt(10, 2), 3));
        answer(engine.submit(&request).unwrap()).await.unwrap();
        engine.remove_adapter("a").await.unwrap();
        engine.add_adapter(adapter("a", seed)).await.unwrap();
    }
    assert_eq!(answer(running).await.unwrap(), wanted);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_changes_nothing() {
    let engine = start_on(Box::new(Oracle::new()), &Registry::new()).await;
    assert_eq!(engine.add_adapter(adapter("c", 13)).await, Err(AdapterChangeError::Full { slots: 2 }));
    let unknown = AdapterChangeError::Unknown { name: "c".to_owned() };
    assert_eq!(engine.remove_adapter("c").await, Err(unknown));
    engine.remove_adapter("b").await.unwrap();
    let mut wide = adapter("c", 13);
    wide.changes.values_mut().for_each(|change| change.rank = 5);
    let refused = engine.add_adapter(wide).await.unwrap_err().to_string();
    assert!(refused.contains("rank 5") && refused.contains("room for rank 4"), "{refused}");
    engine.add_adapter(adapter("c", 13)).await.unwrap();
    assert_eq!(engine.adapters(), ["a", "c"]);
    engine.stop().await;
    assert_eq!(engine.add_adapter(adapter("d", 14)).await, Err(AdapterChangeError::Stopped));
    assert_eq!(engine.remove_adapter("a").await, Err(AdapterChangeError::Stopped));
}

#[test]
fn a_device_without_adapters_refuses_room_for_them() {
    let late = LateOracle::new(LateTime::new(1, 1)).claiming(|caps| caps.adapters = false);
    let metrics = EngineMetrics::unregistered().unwrap();
    let error = Engine::start(model(), Box::new(late), &with_room(config()), &metrics).unwrap_err();
    assert!(error.to_string().starts_with("adapters: late oracle runs no adapters"), "{error}");
}
