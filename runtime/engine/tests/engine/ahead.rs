//! A device that runs beside the host: the next step is launched before the answer of the last one is there,
//! and no answer depends on it.

use crate::{CompletedAnswer, answer, config, kv_used, model, prompt, start, tokens, value};
use futures::StreamExt;
use futures::future::join_all;
use prometheus::Registry;
use std::sync::Arc;
use trustformers_conformance::late::{LateOracle, LateTime};
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, GenerateError, GenerateParams, Grammar, RequestFault, Speculation,
};
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan, SampleInput,
    StepError, StepInput, StepOutput,
};

/// Microseconds of a step of the device, and of an answer on the host.
const STEP_US: u64 = 5000;
const HOST_US: u64 = 2000;

fn late() -> Box<dyn Backend> {
    Box::new(LateOracle::new(LateTime::new(STEP_US, HOST_US)))
}

fn start_on(backend: Box<dyn Backend>, config: &EngineConfig) -> (Engine, Registry) {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).unwrap();
    (Engine::start(model(), backend, config, &metrics).unwrap(), registry)
}

/// A request that produces exactly `max_tokens` tokens.
fn endless(salt: usize, max_tokens: usize) -> GenerateParams {
    GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(8, salt), max_tokens) }
}

/// Microseconds from the first step to the last answer of eight requests of 200 tokens, for each step.
async fn us_per_step(speculation: Option<Speculation>) -> f64 {
    let time = LateTime::new(STEP_US, HOST_US);
    let config = EngineConfig { speculation, ..config() };
    let (engine, registry) = start_on(Box::new(LateOracle::new(Arc::clone(&time))), &config);
    let running: Vec<_> = (0..8).map(|salt| engine.submit(&endless(salt, 200)).unwrap()).collect();
    for generation in join_all(running.into_iter().map(answer)).await {
        assert_eq!(generation.unwrap().completion_tokens, 200);
    }
    engine.stop().await;
    assert_eq!(kv_used(&registry), 0.0);
    // Each step gives each running sequence a token. A thread that sends the requests slowly adds steps.
    assert!((190..400).contains(&time.steps()), "{} steps", time.steps());
    time.now_us() as f64 / time.steps() as f64
}

#[tokio::test]
async fn the_device_computes_without_a_pause_while_the_host_works() {
    let ahead = us_per_step(None).await;
    assert!(ahead < 1.05 * STEP_US as f64, "{ahead} us per step, the device takes {STEP_US}");
    // A draft begins with the latest token, so with speculation each step waits for the host, also where so
    // many sequences run that none has a draft.
    let waiting = us_per_step(Some(Speculation::Ngram)).await;
    assert!(waiting > 0.99 * (STEP_US + HOST_US) as f64, "{waiting} us per step");
}

/// Requests of every kind that a step ahead could disturb.
fn requests() -> Vec<GenerateParams> {
    let greedy = |salt| GenerateParams { margins: true, ..tokens(&prompt(9 + salt, salt), 40) };
    let sampled =
        |salt| GenerateParams { temperature: 0.9, top_p: 0.9, seed: Some(salt as u64), ..greedy(salt) };
    vec![
        greedy(1),
        sampled(2),
        GenerateParams { repetition_penalty: 1.3, frequency_penalty: 0.4, logprobs: Some(3), ..sampled(3) },
        GenerateParams { max_tokens: 1, ..greedy(4) },
        GenerateParams { max_tokens: 2, ..sampled(5) },
        GenerateParams { grammar: Some(Grammar::Regex("(ab|cd)+[0-9]{5}".into())), ..greedy(6) },
        GenerateParams { stop: vec!["a".into(), "e".into()], ..sampled(7) },
        GenerateParams { stop_token_ids: (3..40).collect(), ..sampled(8) },
        GenerateParams { max_tokens: 1000, ..sampled(9) },
    ]
}

async fn answers(engine: &Engine, requests: &[GenerateParams]) -> Vec<CompletedAnswer> {
    let running = requests.iter().map(|params| answer(engine.submit(params).unwrap()));
    join_all(running).await.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn steps_ahead_change_no_answer() {
    let (plain, requests) = (answers(&start(&config()), &requests()).await, requests());
    let counts = [
        "trustformers_generated_tokens_total",
        "trustformers_prompt_tokens_total",
        "trustformers_tokens_recomputed_total",
    ];
    for batch in [1, 3, 8] {
        let config = EngineConfig { max_batch_size: batch, token_budget: 16, ..config() };
        let (engine, registry) = start_on(late(), &config);
        assert_eq!(answers(&engine, &requests).await, plain, "a batch of {batch}");
        engine.drain().await;
        // Rows too many are not counted, and take nothing.
        let counted = counts.map(|name| value(&registry, name, None));
        let produced: usize = plain.iter().map(|answer| answer.completion_tokens).sum();
        let prompts: usize = plain.iter().map(|answer| answer.prompt_tokens).sum();
        assert_eq!(counted, [produced as f64, prompts as f64, 0.0]);
        assert_eq!(kv_used(&registry), 0.0);
    }
}

#[tokio::test]
async fn a_cancelled_request_disturbs_no_other_in_flight() {
    let request = endless(1, 60);
    let plain = answer(start(&config()).submit(&request).unwrap()).await.unwrap();
    let (engine, registry) = start_on(late(), &config());
    let running = engine.submit(&request).unwrap();
    let mut cancelled = engine.submit(&endless(2, 200)).unwrap();
    cancelled.next().await.unwrap().unwrap();
    drop(cancelled);
    // Its blocks may belong to this one at once.
    let next = engine.submit(&endless(3, 20)).unwrap();
    assert_eq!(answer(running).await.unwrap(), plain);
    let other = answer(start(&config()).submit(&endless(3, 20)).unwrap()).await.unwrap();
    assert_eq!(answer(next).await.unwrap(), other);
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

/// What goes wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StepMishap {
    /// The device fails it, which shows in its answer.
    Fails,
    /// The device refuses its first row.
    Refused,
}

/// A late device on which one step goes wrong.
struct Mishap<T: ?Sized> {
    kind: StepMishap,
    step: u64,
    inner: Box<T>,
    submitted: u64,
    awaited: u64,
}

impl<T: ?Sized> Mishap<T> {
    fn new(kind: StepMishap, step: u64, inner: Box<T>) -> Box<Self> {
        Box::new(Self { kind, step, inner, submitted: 0, awaited: 0 })
    }
}

impl Backend for Mishap<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        Ok(Mishap::new(self.kind, self.step, self.inner.load(spec)?))
    }
}

impl Loaded for Mishap<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Mishap::new(self.kind, self.step, self.inner.compile(plan)?))
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        self.inner.resize_kv(blocks)
    }
}

impl Executable for Mishap<dyn Executable> {
    fn submit(&mut self, input: &StepInput) -> Result<(), BackendError> {
        self.submitted += 1;
        if self.kind == StepMishap::Refused && self.submitted == self.step {
            return Err(StepError::Token { row: 0, token: 0, vocab: 0 }.into());
        }
        self.inner.submit(input)
    }

    fn sample(&mut self, input: &SampleInput) -> Result<(), BackendError> {
        self.inner.sample(input)
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), BackendError> {
        self.inner.wait(output)?;
        self.awaited += 1;
        if self.kind == StepMishap::Fails && self.awaited == self.step {
            return Err(BackendError::Device("the test pulled the plug".to_owned()));
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_device_that_fails_with_two_steps_in_flight_ends_their_requests_and_goes_on() {
    // Late enough that all three requests run, however slow this thread is.
    let (engine, registry) = start_on(Mishap::new(StepMishap::Fails, 180, late()), &config());
    let running: Vec<_> = (0..3).map(|salt| engine.submit(&endless(salt, 200)).unwrap()).collect();
    for failed in join_all(running.into_iter().map(answer)).await {
        let error = failed.unwrap_err();
        assert!(matches!(error, GenerateError::Device(_)), "{error}");
    }
    assert_eq!(engine.heartbeat().failed_steps, 1);
    let plain = answers(&start(&config()), &requests()).await;
    assert_eq!(answers(&engine, &requests()).await, plain);
    engine.drain().await;
    assert_eq!((engine.heartbeat().failed_steps, kv_used(&registry)), (0, 0.0));
}

#[tokio::test]
async fn a_step_ahead_that_is_refused_ends_one_request_only() {
    let (engine, registry) = start_on(Mishap::new(StepMishap::Refused, 10, late()), &config());
    let all = [endless(1, 40), endless(2, 40)];
    let [refused, other] = all.each_ref().map(|request| answer(engine.submit(request).unwrap()));
    let (refused, other) = futures::join!(refused, other);
    let error = refused.unwrap_err();
    assert!(matches!(error, GenerateError::Request(RequestFault::RefusedStep { .. })), "{error}");
    let plain = answer(start(&config()).submit(&all[1]).unwrap()).await.unwrap();
    assert_eq!(other.unwrap(), plain);
    engine.drain().await;
    assert_eq!((engine.heartbeat().failed_steps, kv_used(&registry)), (0, 0.0));
}
