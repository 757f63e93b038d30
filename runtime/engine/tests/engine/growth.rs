//! A KV cache that grows with need: no answer depends on it, and an idle engine gives back what others need.

use crate::paging::BLOCK_BYTES;
use crate::{CompletedAnswer, answer, config, kv_used, model, prompt, start, tokens, value};
use futures::future::join_all;
use prometheus::Registry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{
    Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded, MemoryReport, Plan,
};

/// What a test sees of a cache, and decides about it.
#[derive(Default)]
struct CacheControl {
    /// The sizes that the cache had, in blocks.
    sizes: Mutex<Vec<usize>>,
    /// The device refuses more blocks.
    limit: Option<usize>,
    /// Another model needs memory.
    wanted: AtomicBool,
}

/// The oracle with a cache that the test controls.
struct Controlled<T: ?Sized>(Arc<CacheControl>, Box<T>);

impl Backend for Controlled<dyn Backend> {
    fn caps(&self) -> &Caps {
        self.1.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.1.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        self.0.sizes.lock().unwrap().push(spec.kv_blocks);
        Ok(Box::new(Controlled(Arc::clone(&self.0), self.1.load(spec)?)))
    }
}

impl Loaded for Controlled<dyn Loaded> {
    fn memory(&self) -> MemoryReport {
        self.1.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        self.1.compile(plan)
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        if self.0.limit.is_some_and(|limit| blocks > limit) {
            return Err(BackendError::OutOfMemory { what: "the test's cache", needed_bytes: 1 });
        }
        self.1.resize_kv(blocks)?;
        self.0.sizes.lock().unwrap().push(blocks);
        Ok(())
    }

    fn kv_is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::SeqCst)
    }
}

/// At most four sequences of 64 tokens, of four blocks each.
fn four_sequences() -> EngineConfig {
    EngineConfig {
        context_tokens: Some(64),
        max_batch_size: 4,
        kv_memory_bytes: Some(16 * BLOCK_BYTES),
        ..config()
    }
}

fn start_on(control: &Arc<CacheControl>) -> (Engine, Registry) {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).unwrap();
    let oracle: Box<dyn Backend> = Box::new(Oracle::new());
    let backend = Box::new(Controlled(Arc::clone(control), oracle));
    (Engine::start(model(), backend, &four_sequences(), &metrics).unwrap(), registry)
}

/// Four requests that fill their context.
fn requests() -> Vec<GenerateParams> {
    let endless = |salt| GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(33, salt), 31) };
    (0..4).map(endless).collect()
}

async fn answers(engine: &Engine) -> Vec<CompletedAnswer> {
    let running: Vec<_> = requests().iter().map(|request| engine.submit(request).unwrap()).collect();
    join_all(running.into_iter().map(answer)).await.into_iter().map(Result::unwrap).collect()
}

async fn answers_alone() -> Vec<CompletedAnswer> {
    let mut all = Vec::new();
    for request in requests() {
        all.push(answer(start(&four_sequences()).submit(&request).unwrap()).await.unwrap());
    }
    all
}

#[tokio::test]
async fn a_cache_grows_with_need_up_to_its_limit() {
    let control = Arc::new(CacheControl::default());
    let (engine, registry) = start_on(&control);
    assert_eq!(*control.sizes.lock().unwrap(), [4], "at first it holds one full context");
    assert_eq!((engine.info().kv_blocks, engine.info().kv_limit_bytes), (16, 16 * BLOCK_BYTES));
    assert_eq!(answers(&engine).await, answers_alone().await);
    let sizes = control.sizes.lock().unwrap().clone();
    assert!(sizes.is_sorted() && *sizes.last().unwrap() == 16, "{sizes:?}");
    assert_eq!(value(&registry, "trustformers_preemptions_total", None), 0.0, "there was room for all");
}

#[tokio::test]
async fn where_the_device_refuses_sequences_are_preempted() {
    let control = Arc::new(CacheControl { limit: Some(6), ..CacheControl::default() });
    let (engine, registry) = start_on(&control);
    assert_eq!(answers(&engine).await, answers_alone().await);
    let most = control.sizes.lock().unwrap().iter().copied().max();
    assert!(most <= Some(6), "{most:?}");
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn an_idle_engine_gives_back_what_others_need() {
    let control = Arc::new(CacheControl::default());
    let (engine, _) = start_on(&control);
    let wanted = answers(&engine).await;
    control.wanted.store(true, Ordering::SeqCst);
    // It becomes idle after this answer, and looks before it takes the next request.
    answer(engine.submit(&tokens(&prompt(5, 9), 2)).unwrap()).await.unwrap();
    answer(engine.submit(&tokens(&prompt(5, 9), 2)).unwrap()).await.unwrap();
    assert_eq!(control.sizes.lock().unwrap()[..3], [4, 16, 4], "it had what it started with");
    control.wanted.store(false, Ordering::SeqCst);
    assert_eq!(answers(&engine).await, wanted, "and grows again");
    assert_eq!(control.sizes.lock().unwrap().last(), Some(&16));
}
