//! Layers with windows: a long sequence has the blocks that its windows reach and no others, and a prefix is
//! reused as far as it goes.

use crate::paging::gemma;
use crate::stepped::{Verdict, stepped};
use crate::{answer, config, kv_used, prompt, tokens, value};
use prometheus::Registry;
use std::path::Path;
use std::sync::Arc;
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, Numerics, Speculation};
use trustformers_model::Model;
use trustformers_model::seeded::{SeededFamily, SeededModel};
use trustformers_plan::oracle::Oracle;
use trustformers_plan::{ABSENT_BLOCK, KvLayout, LayerClasses};

/// Rows of a step.
const ROWS: usize = 16;

/// Bytes of a block of one layer: keys and values, tokens, heads, elements, bytes.
const LAYER_BLOCK_BYTES: u64 = 2 * 16 * 2 * 16 * 4;

/// The classes of the Gemma's layers: one group without a window, two with one.
fn classes() -> LayerClasses {
    KvLayout::of_windows(&[Some(16), None, Some(16)], 256).classes()
}

fn one_at_a_time() -> EngineConfig {
    EngineConfig { max_batch_size: 1, token_budget: ROWS, numerics: Numerics::Exact, ..config() }
}

fn start_gemma(config: &EngineConfig, registry: &Registry) -> Engine {
    let metrics = EngineMetrics::register(registry).unwrap();
    Engine::start(gemma(), Box::new(Oracle::new()), config, &metrics).unwrap()
}

#[tokio::test]
async fn a_long_sequence_has_the_blocks_that_its_windows_reach() {
    let (registry, (backend, steps)) = (Registry::new(), stepped());
    let metrics = EngineMetrics::register(&registry).unwrap();
    let engine = Engine::start(gemma(), backend, &one_at_a_time(), &metrics).unwrap();
    let classes = classes();
    let most = classes.most_blocks(256, ROWS);
    // 16 blocks of the full layer; a windowed one reaches `17 - 1 + 16` positions, in three blocks at most.
    assert_eq!((classes.groups(), most), (3, 16 + 2 * 3));
    let info = engine.info();
    assert_eq!((info.kv_blocks, info.kv_limit_bytes), (most, most as u64 * LAYER_BLOCK_BYTES));
    assert_eq!(info.memory.kv_bytes, info.kv_limit_bytes, "less than half of what 48 blocks would take");
    let endless = GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(150, 1), 100) };
    let running = engine.submit(&endless).unwrap();
    let mut most_used = 0;
    for step in 0..10 + 90 {
        let input = steps.next_step();
        let held = input.blocks.iter().filter(|block| **block != ABSENT_BLOCK).count();
        let computed = input.context_lens[0] as usize;
        assert!(held <= classes.most_blocks(computed, ROWS), "step {step}: {held} for {computed} tokens");
        assert_eq!(input.blocks.len(), computed.div_ceil(16) * 3, "step {step}");
        assert_eq!(kv_used(&registry), held as f64, "step {step}");
        most_used = most_used.max(held);
        steps.decide(Verdict::Run);
    }
    // At 240 tokens all but one block of the full layer, and two of each windowed one.
    assert!((15 + 2 * 2..=most).contains(&most_used), "{most_used}");
    drop(steps);
    answer(running).await.unwrap();
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn a_reused_prefix_gives_the_bits_of_a_computed_one() {
    let registry = Registry::new();
    // Room for all that the test computes, so that nothing is evicted.
    let config = EngineConfig { max_batch_size: 4, ..one_at_a_time() };
    let engine = start_gemma(&config, &registry);
    let first = prompt(100, 1);
    let of = |ids: &[u32]| GenerateParams { logprobs: Some(3), ..tokens(ids, 12) };
    let beginning = answer(engine.submit(&of(&first)).unwrap()).await.unwrap();
    let mut reused = 0.0;
    // A conversation that goes on, the same prompt again, and one that leaves it in the middle of a block.
    let continued = [first.clone(), beginning.ids.clone(), prompt(30, 2)].concat();
    let other = [&first[..72], &prompt(20, 3)].concat();
    for (ids, cached) in [(continued, 96), (first, 96), (other, 64)] {
        let got = answer(engine.submit(&of(&ids)).unwrap()).await.unwrap();
        let alone = start_gemma(&one_at_a_time(), &Registry::new());
        assert_eq!(got, answer(alone.submit(&of(&ids)).unwrap()).await.unwrap());
        let now = value(&registry, "trustformers_prompt_tokens_reused_total", None);
        assert!(now - reused >= f64::from(cached), "{} of {cached} tokens were reused", now - reused);
        reused = now;
    }
    engine.drain().await;
    assert_eq!(kv_used(&registry), 0.0);
}

#[tokio::test]
async fn with_a_draft_model_all_layers_keep_all_blocks() {
    let shape = SeededModel { family: SeededFamily::Gemma2, layers: 1, ..SeededModel::default() };
    let draft = Model::from_bytes(Path::new("draft.gguf"), Arc::new(shape.gguf())).unwrap();
    let speculation = Some(Speculation::Draft(Arc::new(draft)));
    let registry = Registry::new();
    let engine = start_gemma(&EngineConfig { speculation, ..one_at_a_time() }, &registry);
    assert_eq!(engine.info().kv_blocks, 16);
    let request = tokens(&prompt(60, 1), 30);
    let plain = start_gemma(&one_at_a_time(), &Registry::new());
    let want = answer(plain.submit(&request).unwrap()).await.unwrap();
    assert_eq!(answer(engine.submit(&request).unwrap()).await.unwrap(), want);
}
