//! Answers of real models against an independent f32 implementation. Its outputs are stored in
//! `tests/reference`; `e2e/reference` has the recipe.
//!
//! A greedy token is decided only where the best logit is clearly above the second: tokens must agree up to
//! the first margin below [`UNDECIDED`]. The devices of this project in exact numerics must agree on all
//! tokens.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

mod chat;
mod gemma3;
mod heads;
mod lora;
mod minilm;
mod qwen2;
mod readers;
mod smollm2;

use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use trustformers_cpu::{CpuBackend, CpuConfig, Tier};
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, GenerationEvent, Numerics};
use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    Backend, KV_BLOCK_TOKENS, Limits, LoadSpec, LogitsRows, SequenceStep, StepInput, StepOutput,
};

/// In fast numerics the best token must be the reference's wherever its margin is above this...
const CLEAR: f32 = 0.5;

/// ...in this share of the positions.
const FAST_AGREEMENT: f64 = 0.98;

/// Margin below which two correct implementations may choose differently.
const UNDECIDED: f32 = 1e-3;

/// Largest difference of a logit that float32 arithmetic in another order explains, on logits of about 10 to
/// 30.
const LOGIT_TOLERANCE: f32 = 1e-3;

#[derive(Deserialize)]
struct GenerationReference {
    cases: Vec<ReferenceCase>,
}

#[derive(Deserialize)]
struct ReferenceCase {
    prompt: String,
    ids: Vec<u32>,
    top_ids: Vec<usize>,
    top_logits: Vec<f32>,
    greedy: Vec<u32>,
    margins: Vec<f32>,
    text: String,
}

impl ReferenceCase {
    /// How many tokens are decided.
    fn decided(&self) -> usize {
        self.margins.iter().position(|margin| *margin < UNDECIDED).unwrap_or(self.greedy.len())
    }
}

/// The stored outputs of one model.
fn cases(stored: &str) -> Vec<ReferenceCase> {
    let reference: GenerationReference = serde_json::from_str(stored).unwrap();
    assert!(!reference.cases.is_empty());
    reference.cases
}

/// The folder of the test models, as in scripts and other tests.
fn models() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    set("TRUSTFORMERS_MODELS").or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
        Some(cache.join("trustformers").join("models"))
    })
}

/// The real model of that name in the folder, or `None` with a printed reason where it may be missing.
fn model(name: &str) -> Option<Arc<Model>> {
    let found = optional_model(name);
    let required = std::env::var_os("TRUSTFORMERS_REQUIRE_MODELS").is_some_and(|value| value == "1");
    assert!(found.is_some() || !required, "{name} is missing");
    found
}

/// As [`model`], for a model that no stage of the tests fetches.
fn optional_model(name: &str) -> Option<Arc<Model>> {
    let path = models().map(|folder| folder.join(name)).unwrap_or_default();
    if !path.exists() {
        println!(
            "skipped: {} is missing: get it with `make models` (see e2e/models/fetch.sh)",
            path.display()
        );
        return None;
    }
    Some(Arc::new(Model::load(&path, &mut |_| {}).unwrap()))
}

fn cpu(tier: Tier) -> Box<dyn Backend> {
    Box::new(CpuBackend::new(CpuConfig { tier: Some(tier), ..CpuConfig::default() }).unwrap())
}

/// Every tier that this processor has, with its name.
fn tiers() -> Vec<Tier> {
    let available: Vec<Tier> = Tier::ALL.into_iter().filter(|tier| tier.is_available()).collect();
    println!("tiers of this processor: {available:?}");
    available
}

/// Ids and their text.
type GeneratedText = (Vec<u32>, String);

/// Greedy ids and texts of all prompts, computed together in one batch.
fn generate(
    model: &Arc<Model>,
    backend: Box<dyn Backend>,
    requests: &[(&ReferenceCase, usize)],
) -> Vec<GeneratedText> {
    let config = EngineConfig {
        context_tokens: Some(512),
        max_batch_size: 16,
        numerics: Numerics::Exact,
        ..EngineConfig::default()
    };
    let metrics = EngineMetrics::unregistered().unwrap();
    let engine = Engine::start(Arc::clone(model), backend, &config, &metrics).unwrap();
    let running: Vec<_> = requests
        .iter()
        .map(|(case, count)| engine.submit(&GenerateParams::greedy(&case.prompt, *count)).unwrap())
        .collect();
    let mut answers = Vec::new();
    for (mut generation, (case, _)) in running.into_iter().zip(requests) {
        assert_eq!(generation.prompt_ids(), case.ids, "{:?}", case.prompt);
        let (mut ids, mut all) = (Vec::new(), String::new());
        while let GenerationEvent::Token { id, text, .. } = generation.blocking_next().unwrap().unwrap() {
            ids.push(id);
            all.push_str(&text);
        }
        answers.push((ids, all));
    }
    answers
}

/// Runs lists of tokens directly on a backend, one at a time, and gives the logits of the last `wanted` rows
/// of each.
fn logits(
    model: &Model,
    backend: &mut dyn Backend,
    numerics: Numerics,
    inputs: &[(Vec<u32>, usize)],
) -> Vec<StepOutput> {
    let rows = inputs.iter().map(|(ids, _)| ids.len()).max().unwrap();
    let logits_rows = inputs.iter().map(|(_, wanted)| *wanted).max().unwrap();
    let limits = Limits { rows, sequences: 1, logits_rows };
    let fused = backend.caps().fused;
    let context_tokens = rows.max(512);
    let plan = model.plan(&PlanRequest { context_tokens, limits, fused }).unwrap();
    let blocks: Vec<u32> = (0..rows.div_ceil(KV_BLOCK_TOKENS) as u32).collect();
    let spec = LoadSpec {
        weights: Arc::clone(model.weights()),
        plan: &plan,
        kv_blocks: blocks.len(),
        kv_type: backend.caps().default_kv_type(numerics),
        numerics,
        progress: &mut |_| {},
    };
    let mut loaded = backend.load(spec).unwrap();
    let mut steps = loaded.compile(&plan).unwrap();
    let mut input = StepInput::new();
    let mut run = |(ids, wanted): &(Vec<u32>, usize)| {
        input.clear();
        input.push_sequence(SequenceStep {
            tokens: ids,
            cached_tokens: 0,
            blocks: &blocks,
            logits: LogitsRows::All,
        });
        input.logits_rows.drain(..ids.len() - wanted);
        let mut output = StepOutput::new();
        steps.submit(&input).unwrap();
        steps.wait(&mut output).unwrap();
        output
    };
    inputs.iter().map(&mut run).collect()
}

/// The logits after a prompt in exact numerics.
fn first_logits(model: &Model, backend: &mut dyn Backend, ids: &[u32]) -> Vec<f32> {
    logits(model, backend, Numerics::Exact, &[(ids.to_vec(), 1)])[0].row(0).to_vec()
}

fn check_logits(name: &str, case: &ReferenceCase, logits: &[f32]) {
    let off = case
        .top_ids
        .iter()
        .zip(&case.top_logits)
        .fold(0.0_f32, |off, (id, wanted)| off.max((logits[*id] - wanted).abs()));
    println!("{name}: {:?}: largest difference of the top logits {off}", case.prompt);
    assert!(off <= LOGIT_TOLERANCE, "{name}: {:?}: a logit is off by {off}", case.prompt);
}

/// Checks fast numerics. Each position follows the reference's own tokens, so that one difference does not
/// cause others.
fn check_fast(model: &Model, cases: &[ReferenceCase], tier: Tier) {
    let inputs: Vec<(Vec<u32>, usize)> = cases
        .iter()
        .map(|case| {
            let fed = case.ids.iter().chain(&case.greedy[..case.greedy.len() - 1]);
            (fed.copied().collect(), case.greedy.len())
        })
        .collect();
    let outputs = logits(model, &mut *cpu(tier), Numerics::Fast, &inputs);
    let (mut clear, mut agreed) = (0, 0);
    for (case, output) in cases.iter().zip(&outputs) {
        let margins = case.greedy.iter().zip(&case.margins).enumerate();
        for (row, (wanted, _)) in margins.filter(|(_, (_, margin))| **margin > CLEAR) {
            let best = (0_u32..).zip(output.row(row)).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            clear += 1;
            agreed += usize::from(best == *wanted);
        }
    }
    println!("{tier:?}: {agreed} of {clear} clear positions agree");
    assert!(clear > 100 && agreed as f64 >= clear as f64 * FAST_AGREEMENT, "{tier:?}: {agreed} of {clear}");
}
