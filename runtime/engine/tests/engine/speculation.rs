//! Draft tokens change when an answer comes, never the answer.

use crate::stepped::{Verdict, stepped};
use crate::{CompletedAnswer, answer, config, kv_used, model, prompt, start, tokens, value};
use prometheus::Registry;
use std::path::Path;
use std::sync::Arc;
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, GenerateError, GenerateParams, Grammar, Speculation, StartError,
};
use trustformers_model::Model;
use trustformers_model::seeded::{SeededEncoder, SeededModel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, SampleInput,
    StepInput, StepOutput,
};

fn seeded(shape: SeededModel) -> Arc<Model> {
    Arc::new(Model::from_bytes(Path::new("draft.gguf"), Arc::new(shape.gguf())).unwrap())
}

/// A model that agrees with the test's model sometimes.
fn other_model() -> Speculation {
    Speculation::Draft(seeded(SeededModel {
        seed: 2,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ..SeededModel::default()
    }))
}

/// The test's model itself, whose greedy drafts are always accepted.
fn same_model() -> Speculation {
    Speculation::Draft(model())
}

fn with(speculation: Speculation) -> EngineConfig {
    EngineConfig { speculation: Some(speculation), ..config() }
}

/// The answers of requests that are submitted together, and the metrics.
async fn answers(config: &EngineConfig, requests: &[GenerateParams]) -> (Vec<CompletedAnswer>, Registry) {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let engine = Engine::start(model(), Box::new(Oracle::new()), config, &metrics).unwrap();
    let generations: Vec<_> = requests.iter().map(|params| engine.submit(params).unwrap()).collect();
    let mut all = Vec::new();
    for generation in generations {
        all.push(answer(generation).await.unwrap());
    }
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
    (all, registry)
}

fn proposed_and_accepted(registry: &Registry) -> (f64, f64) {
    let count = |name| value(registry, name, None);
    (count("trustformers_draft_tokens_total"), count("trustformers_draft_tokens_accepted_total"))
}

/// A prompt that repeats itself, so that n-grams match.
fn repeating(salt: usize) -> Vec<u32> {
    prompt(12, salt).repeat(4)
}

/// Requests of every kind that a draft could disturb: sampling, penalties, stops, a grammar, log
/// probabilities.
fn requests() -> Vec<GenerateParams> {
    let greedy = |salt| GenerateParams { margins: true, ..tokens(&repeating(salt), 40) };
    let sampled = |salt| GenerateParams {
        temperature: 0.6,
        top_p: 0.9,
        top_k: 40,
        seed: Some(salt as u64),
        ..greedy(salt)
    };
    vec![
        greedy(1),
        sampled(2),
        GenerateParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..greedy(3) },
        GenerateParams { logprobs: Some(3), max_tokens: 2, ..sampled(4) },
        GenerateParams { max_tokens: 1, ..greedy(5) },
        GenerateParams { grammar: Some(Grammar::Regex("(ab|cd)+[0-9]{5}".into())), ..greedy(6) },
        GenerateParams { stop: vec!["a".into(), "e".into()], ..sampled(7) },
        // An answer that repeats itself, so that n-grams match whatever the model is.
        GenerateParams { frequency_penalty: -2.0, ..greedy(8) },
    ]
}

#[tokio::test]
async fn speculation_changes_no_answer() {
    let requests = requests();
    let (plain, registry) = answers(&config(), &requests).await;
    assert_eq!(proposed_and_accepted(&registry), (0.0, 0.0));
    for speculation in [Speculation::Ngram, other_model(), same_model()] {
        let name = format!("{speculation:?}").split('(').next().unwrap().to_owned();
        // All at once, each alone, and with so few blocks that some are preempted.
        let (together, _) = answers(&with(speculation.clone()), &requests).await;
        assert_eq!(together, plain, "{name}");
        let mut proposed = 0.0;
        for (params, plain) in requests.iter().zip(&plain) {
            let (alone, registry) = answers(&with(speculation.clone()), std::slice::from_ref(params)).await;
            assert_eq!(alone, std::slice::from_ref(plain), "{name}");
            proposed += proposed_and_accepted(&registry).0;
        }
        assert!(proposed > 0.0, "{name} proposed no token");
        let kv_block_bytes = (2 * 2 * 16 * 2 * 16 * 4) as u64;
        let draft_block_bytes = match &speculation {
            Speculation::Ngram => 0,
            Speculation::Draft(draft) => {
                let facts = draft.facts();
                (facts.layers * 2 * 16 * facts.kv_heads * facts.head_dim * 4) as u64
            }
        };
        let tight = EngineConfig {
            context_tokens: Some(96),
            // Less than a prompt: the draft model catches up in several steps.
            token_budget: 8,
            max_batch_size: 3,
            kv_memory_bytes: Some(9 * (kv_block_bytes + draft_block_bytes)),
            ..with(speculation)
        };
        let (preempted, registry) = answers(&tight, &requests).await;
        assert_eq!(preempted, plain, "{name}");
        assert!(value(&registry, "trustformers_preemptions_total", None) > 0.0, "{name}");
    }
}

#[tokio::test]
async fn an_accepted_draft_model_drafts_more() {
    let request = tokens(&prompt(20, 1), 60);
    let (_, registry) = answers(&with(same_model()), &[request]).await;
    let (proposed, accepted) = proposed_and_accepted(&registry);
    assert!(accepted >= 40.0, "of 59 tokens after the first, most were drafted: {accepted}");
    assert!((proposed - accepted).abs() < 0.5, "none was rejected: {proposed}");
}

#[tokio::test]
async fn a_cached_prefix_is_valid_for_both_models() {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let engine = Engine::start(model(), Box::new(Oracle::new()), &with(same_model()), &metrics).unwrap();
    let first = answer(engine.submit(&tokens(&prompt(40, 1), 20)).unwrap()).await.unwrap();
    let before = proposed_and_accepted(&registry);
    let longer = [prompt(40, 1), first.ids].concat();
    let second = answer(engine.submit(&tokens(&longer, 20)).unwrap()).await.unwrap();
    let reused = value(&registry, "trustformers_prompt_tokens_reused_total", None);
    assert_eq!(reused, 48.0, "three blocks of sixteen, of 59 tokens that both have computed");
    let after = proposed_and_accepted(&registry);
    assert_eq!(after.0 - before.0, after.1 - before.1, "the draft model reused its own blocks");
    assert!(after.0 - before.0 > 10.0);
    drop(second);
}

#[test]
fn a_step_verifies_at_most_eight_rows() {
    let registry = Registry::new();
    let (backend, steps) = stepped();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let config = EngineConfig { max_batch_size: 8, ..with(Speculation::Ngram) };
    let engine = Engine::start(model(), backend, &config, &metrics).unwrap();
    let mut running = vec![engine.submit(&tokens(&repeating(0), 60)).unwrap()];
    steps.next_step();
    running.extend((1..5).map(|salt| engine.submit(&tokens(&repeating(salt), 60)).unwrap()));
    steps.decide(Verdict::Run);
    for _ in 0..30 {
        let step = steps.next_step();
        let decoding = (0..step.sequences()).filter(|sequence| {
            let rows = step.rows_of(*sequence);
            step.positions[rows.start] >= 48
        });
        let rows: usize = decoding.map(|sequence| step.rows_of(sequence).len()).sum();
        assert!(rows <= 8, "{rows} rows");
        steps.decide(Verdict::Run);
    }
    drop((steps, running));
}

#[tokio::test]
async fn speculation_continues_after_a_failed_step() {
    let registry = Registry::new();
    let (backend, steps) = stepped();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let engine = Engine::start(model(), backend, &with(Speculation::Ngram), &metrics).unwrap();
    let failed = engine.submit(&tokens(&repeating(1), 30)).unwrap();
    steps.run_step();
    steps.next_step();
    steps.decide(Verdict::Fail);
    let error = answer(failed).await.unwrap_err();
    assert!(matches!(error, GenerateError::Device(_)), "{error}");
    let again = engine.submit(&tokens(&repeating(1), 30)).unwrap();
    drop(steps);
    let again = answer(again).await.unwrap();
    let plain = answer(start(&config()).submit(&tokens(&repeating(1), 30)).unwrap()).await.unwrap();
    assert_eq!(again, plain);
    assert_eq!(kv_used(&registry), 0.0);
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let metrics = EngineMetrics::register(&Registry::new()).unwrap();
    let refusal = |draft: Arc<Model>| {
        let config = with(Speculation::Draft(draft));
        let error = Engine::start(model(), Box::new(Oracle::new()), &config, &metrics).unwrap_err();
        assert!(matches!(error, StartError::Draft { .. }), "{error}");
        error.to_string()
    };
    let mut swapped = SeededModel::default().gguf();
    // A string is its length and its bytes; the first of these two are tokens.
    let at = |file: &[u8], token: u8| {
        file.windows(9).position(|window| window == [1, 0, 0, 0, 0, 0, 0, 0, token]).unwrap() + 8
    };
    let (a, b) = (at(&swapped, b'a'), at(&swapped, b'b'));
    swapped.swap(a, b);
    let swapped = Model::from_bytes(Path::new("draft.gguf"), Arc::new(swapped)).unwrap();
    let message = refusal(Arc::new(swapped));
    assert!(message.contains("of its vocabulary differs"), "{message}");
    let message = refusal(seeded(SeededModel { context_tokens: 128, ..SeededModel::default() }));
    assert!(message.contains("its context of 128 tokens is shorter than the 256"), "{message}");
    let folder = tempfile::tempdir().unwrap();
    SeededEncoder::default().write(folder.path()).unwrap();
    let message = refusal(Arc::new(Model::load(folder.path(), &mut |_| {}).unwrap()));
    assert!(message.contains("does not generate"), "{message}");
}

/// A device on which the steps of the second model that it loads fail.
struct BrokenDraft(Oracle, usize);

struct BrokenModel(Box<dyn Loaded>);

struct BrokenSteps;

impl Backend for BrokenDraft {
    fn caps(&self) -> &Caps {
        self.0.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.0.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        self.1 += 1;
        let loaded = self.0.load(spec)?;
        Ok(if self.1 == 2 { Box::new(BrokenModel(loaded)) } else { loaded })
    }
}

impl Loaded for BrokenModel {
    fn memory(&self) -> MemoryReport {
        self.0.memory()
    }

    fn compile(&mut self, _plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(BrokenSteps))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.0.resize_kv(blocks)
    }
}

impl Executable for BrokenSteps {
    fn submit(&mut self, _input: &StepInput) -> Result<(), BackendError> {
        Err(BackendError::Device("the test pulled the plug".to_owned()))
    }

    fn sample(&mut self, _input: &SampleInput) -> Result<(), BackendError> {
        Err(BackendError::Order("nothing was submitted"))
    }

    fn wait(&mut self, _output: &mut StepOutput) -> Result<(), BackendError> {
        Err(BackendError::Order("nothing was submitted"))
    }
}

#[tokio::test]
async fn the_engine_continues_without_a_broken_draft_model() {
    let metrics = EngineMetrics::register(&Registry::new()).unwrap();
    let backend = Box::new(BrokenDraft(Oracle::new(), 0));
    let engine = Engine::start(model(), backend, &with(same_model()), &metrics).unwrap();
    let requests = requests();
    let (plain, _) = answers(&config(), &requests).await;
    let running: Vec<_> = requests.iter().map(|params| engine.submit(params).unwrap()).collect();
    for (generation, plain) in running.into_iter().zip(plain) {
        assert_eq!(answer(generation).await.unwrap(), plain);
    }
    assert_eq!(engine.heartbeat().failed_steps, 0);
}
