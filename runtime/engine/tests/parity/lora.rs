//! Adapters against PEFT: seeded models and adapters, which the recipe makes a second time.

use crate::{UNDECIDED, cpu, tiers};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use trustformers_engine::{
    AdapterRoom, Engine, EngineConfig, EngineMetrics, GenerateParams, GenerationEvent, Numerics, Prompt,
};
use trustformers_model::seeded::{SeededAdapter, SeededFamily, SeededModel};
use trustformers_model::{CheckpointFiles, Model};
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

/// Largest difference of a margin that float32 arithmetic in another order explains, on logits of about 10.
const MARGIN_TOLERANCE: f32 = 1e-3;

#[derive(Deserialize)]
struct LoraReference {
    models: Vec<ModelReference>,
}

#[derive(Deserialize)]
struct ModelReference {
    family: String,
    plain: Vec<LoraCase>,
    adapters: Vec<AdapterReference>,
}

#[derive(Deserialize)]
struct AdapterReference {
    seed: u64,
    rank: usize,
    alpha: u32,
    stabilised: bool,
    projections: Vec<String>,
    /// The file that PEFT wrote.
    config: serde_json::Value,
    tensors: BTreeMap<String, Vec<usize>>,
    cases: Vec<LoraCase>,
}

#[derive(Deserialize)]
struct LoraCase {
    ids: Vec<u32>,
    greedy: Vec<u32>,
    margins: Vec<f32>,
}

fn seeded(family: &str) -> SeededModel {
    let family = match family {
        "llama" => SeededFamily::Llama,
        "qwen2" => SeededFamily::Qwen2,
        other => panic!("the recipe has no family {other}"),
    };
    SeededModel { family, ..SeededModel::default() }
}

fn load(model: SeededModel) -> Arc<Model> {
    Arc::new(Model::from_bytes(Path::new("seeded.gguf"), Arc::new(model.gguf())).unwrap())
}

/// Writes the adapter with the configuration that PEFT wrote, and checks that its tensors are those of PEFT.
fn write(reference: &AdapterReference, model: SeededModel, folder: &Path) {
    let names = SeededAdapter::PROJECTIONS;
    let is_asked = |name: &&str| reference.projections.iter().any(|asked| asked == name);
    let AdapterReference { seed, rank, alpha, stabilised, .. } = *reference;
    let projections = names.into_iter().filter(is_asked).collect();
    let adapter = SeededAdapter { model, seed, rank, alpha, stabilised, projections };
    adapter.write(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), reference.config.to_string()).unwrap();
    let file = adapter.files().remove("adapter_model.safetensors").unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let shape = |tensor: &serde_json::Value| serde_json::from_value(tensor["shape"].clone()).unwrap();
    let own: BTreeMap<String, Vec<usize>> =
        header.iter().map(|(name, tensor)| (name.clone(), shape(tensor))).collect();
    assert_eq!(own, reference.tensors);
}

/// The greedy tokens of a prompt with their margins.
fn greedy(engine: &Engine, adapter: Option<&str>, case: &LoraCase) -> Vec<(u32, f32)> {
    let request = GenerateParams {
        prompt: Prompt::Tokens(case.ids.clone()),
        adapter: adapter.map(str::to_owned),
        margins: true,
        ..GenerateParams::greedy("", case.greedy.len())
    };
    let mut generation = engine.submit(&request).unwrap();
    let mut tokens = Vec::new();
    while let GenerationEvent::Token { id, margin, .. } = generation.blocking_next().unwrap().unwrap() {
        tokens.push((id, margin.unwrap()));
    }
    tokens
}

fn check(engine: &Engine, adapter: Option<&str>, cases: &[LoraCase], what: &str) {
    for case in cases {
        let decided = case.margins.iter().position(|margin| *margin < UNDECIDED).unwrap_or(case.greedy.len());
        let got = greedy(engine, adapter, case);
        let ids: Vec<u32> = got.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids[..decided], case.greedy[..decided], "{what}, adapter {adapter:?}");
        let off = got.iter().zip(&case.margins).take(decided);
        let off = off.fold(0.0_f32, |off, ((_, margin), wanted)| off.max((margin - wanted).abs()));
        println!("{what}, adapter {adapter:?}: {decided} tokens, largest difference of a margin {off}");
        assert!(off <= MARGIN_TOLERANCE, "{what}, adapter {adapter:?}: a margin is off by {off}");
        assert!(decided > 0, "{what}: a case that decides nothing");
    }
}

fn agrees_with_peft(device: &dyn Fn() -> Box<dyn Backend>, what: &str) {
    let reference: LoraReference = serde_json::from_str(include_str!("../reference/lora.json")).unwrap();
    for ModelReference { family, plain, adapters } in &reference.models {
        let model = load(seeded(family));
        let room = AdapterRoom { slots: adapters.len(), rank: 4 };
        let config = EngineConfig { numerics: Numerics::Exact, adapters: room, ..EngineConfig::default() };
        let metrics = EngineMetrics::unregistered().unwrap();
        let engine = Engine::start(Arc::clone(&model), device(), &config, &metrics).unwrap();
        for (index, adapter) in adapters.iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            write(adapter, seeded(family), folder.path());
            let files = CheckpointFiles::of_folder(folder.path()).unwrap();
            let read = model.read_adapter(&index.to_string(), &files).unwrap();
            engine.add_adapter_blocking(read).unwrap();
        }
        let what = format!("{what}, {family}");
        check(&engine, None, plain, &what);
        for (index, adapter) in adapters.iter().enumerate() {
            check(&engine, Some(&index.to_string()), &adapter.cases, &what);
        }
    }
}

#[test]
fn adapters_answer_as_in_peft_on_the_oracle() {
    agrees_with_peft(&|| Box::new(Oracle::new()), "oracle");
}

#[test]
fn adapters_answer_as_in_peft_on_every_tier_of_the_cpu() {
    for tier in tiers() {
        agrees_with_peft(&|| cpu(tier), &format!("{tier}"));
    }
}
