//! Encoders of every family, with and without a head, through the encoder engine: small seeded
//! checkpoints, made here and by the recipe from one seed, and a real classifier where its folder is
//! given.

use super::{cpu, models, tiers};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use trustformers_cpu::Tier;
use trustformers_engine::encoder::{
    EncodeInput, EncodeParams, Encoded, Encoder, EncoderConfig, EncoderMetrics,
};
use trustformers_engine::{EngineMetrics, Numerics};
use trustformers_model::seeded::{SeededCheckpoint, SeededEncoder, SeededEncoderFamily};
use trustformers_model::{Model, Task};
use trustformers_plan::DType;

/// Names the folder of a spam classifier, which no package has.
const CLASSIFIER: &str = "TRUSTFORMERS_CLASSIFIER";

/// Largest difference of a logit in exact numerics, where only the order of sums differs.
const LOGIT_TOLERANCE: f32 = 1e-3;

/// Least cosine of an embedding in exact numerics.
const COSINE: f64 = 0.9999;

/// Longest text of the real classifier on the scalar tier.
const SCALAR_TOKENS: usize = 32;

/// Largest difference of a score in fast numerics, where weights and activations have eight bits. The
/// logits of this classifier differ by up to 12; eight bits in six layers move that by some 2 %, 0.26. Where
/// the model is sure, the score hardly moves; at a score of 0.65 it moves by 0.65 × 0.35 of that, the 0.06
/// that was measured. The bound is what an even score moves by with half as much again: 0.25 × 0.4.
const FAST_SCORE_TOLERANCE: f32 = 0.1;

#[derive(Deserialize)]
struct HeadReference {
    seed: u64,
    cases: Vec<HeadCase>,
    /// Models that label tokens; values are the logits of each token, one after the other.
    #[serde(default)]
    tokens: Vec<HeadCase>,
}

/// The answers of one checkpoint.
#[derive(Deserialize)]
struct HeadCase {
    family: String,
    labels: usize,
    keys: Value,
    #[serde(default)]
    texts: Vec<TextValues>,
    #[serde(default)]
    pairs: Vec<PairValues>,
}

#[derive(Deserialize)]
struct TextValues {
    text: String,
    ids: Vec<u32>,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct PairValues {
    first: String,
    second: String,
    ids: Vec<u32>,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct ClassifierReference {
    labels: Vec<String>,
    items: Vec<ClassifiedText>,
}

#[derive(Deserialize)]
struct ClassifiedText {
    text: String,
    ids: Vec<u32>,
    logits: Vec<f32>,
    scores: Vec<f32>,
}

pub(super) fn start(model: &Arc<Model>, tier: Tier, numerics: Numerics) -> Encoder {
    let registry = prometheus::Registry::new();
    let engines = EngineMetrics::register(&registry).unwrap();
    let metrics = EncoderMetrics::register(&registry, &engines).unwrap();
    let config = EncoderConfig { numerics, ..EncoderConfig::default() };
    Encoder::start(Arc::clone(model), cpu(tier), &config, &metrics, Box::new(|_| {})).unwrap()
}

/// The rows of all inputs, computed together.
pub(super) fn encode(encoder: &Encoder, inputs: &[EncodeInput]) -> Encoded {
    encoder.submit(&EncodeParams::inputs(inputs.to_vec())).unwrap().blocking_wait().unwrap()
}

impl HeadCase {
    fn checkpoint(&self, seed: u64) -> SeededCheckpoint {
        let family = SeededEncoderFamily::ALL.into_iter().find(|family| family.model_type() == self.family);
        let shape = SeededEncoder { seed, ..SeededEncoder::default() };
        let (family, keys, labels) = (family.unwrap(), self.keys.clone(), self.labels);
        SeededCheckpoint { family, shape, labels, keys }
    }

    fn model(&self, seed: u64) -> Arc<Model> {
        let folder = tempfile::tempdir().unwrap();
        self.checkpoint(seed).write(folder.path()).unwrap();
        Arc::new(Model::load(folder.path(), &mut |_| {}).unwrap())
    }

    fn inputs(&self) -> Vec<EncodeInput> {
        let texts = self.texts.iter().map(|one| EncodeInput::Text(one.text.clone()));
        let pairs = self.pairs.iter().map(|one| {
            let (first, second) = (one.first.as_str().into(), one.second.clone());
            EncodeInput::Pair { first, second }
        });
        texts.chain(pairs).collect()
    }

    fn wanted(&self) -> Vec<&[f32]> {
        let texts = self.texts.iter().map(|one| one.values.as_slice());
        texts.chain(self.pairs.iter().map(|one| one.values.as_slice())).collect()
    }

    fn check_ids(&self, model: &Model) {
        for one in &self.texts {
            assert_eq!(model.encode(&one.text).unwrap().ids, one.ids, "{:?}", one.text);
        }
        for one in &self.pairs {
            let found = model.encode_pair(&one.first, &one.second, 64).unwrap();
            assert_eq!(found.ids, one.ids, "{:?}, {:?}", one.first, one.second);
        }
    }
}

pub(super) fn cosine(found: &[f32], wanted: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(found, wanted) / (dot(found, found) * dot(wanted, wanted)).sqrt()
}

fn best(scores: &[f32]) -> Option<usize> {
    (0..scores.len()).max_by(|&one, &other| scores[one].total_cmp(&scores[other]))
}

fn largest_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    found.iter().zip(wanted).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn every_family_and_head_gives_the_values_of_the_reference() {
    let reference: HeadReference = serde_json::from_str(include_str!("../reference/heads.json")).unwrap();
    assert_eq!(reference.cases.len(), 20);
    assert!(reference.cases.iter().any(|case| case.keys["classifier_pooling"] == "mean"));
    for case in &reference.cases {
        let model = case.model(reference.seed);
        let wanted_task = [Task::Embed, Task::Rerank, Task::Classify][case.labels.min(2)];
        assert_eq!(model.task(), wanted_task);
        case.check_ids(&model);
        let (inputs, wanted) = (case.inputs(), case.wanted());
        for tier in tiers() {
            let encoder = start(&model, tier, Numerics::Exact);
            let together = encode(&encoder, &inputs);
            for ((row, input), wanted) in together.rows().zip(&inputs).zip(&wanted) {
                let alone = encode(&encoder, std::slice::from_ref(input));
                assert_eq!(alone.values, row, "{} {tier:?}: {input:?} alone and batched", case.family);
                let what = format!("{} with {} labels, {tier:?}: {input:?}", case.family, case.labels);
                match model.logits(row) {
                    Some(logits) => {
                        let off = largest_difference(&logits, wanted);
                        assert!(off <= LOGIT_TOLERANCE, "{what}: off by {off}");
                    }
                    None => {
                        let cosine = cosine(row, wanted);
                        assert!(cosine >= COSINE, "{what}: {cosine}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_family_gives_each_token_the_logits_of_the_reference() {
    let reference: HeadReference = serde_json::from_str(include_str!("../reference/heads.json")).unwrap();
    assert_eq!(reference.tokens.len(), 6);
    for case in &reference.tokens {
        let model = case.model(reference.seed);
        assert!(model.facts().labels_tokens(), "{}", case.family);
        case.check_ids(&model);
        let inputs = case.inputs();
        for tier in tiers() {
            let encoder = start(&model, tier, Numerics::Exact);
            let together = encode(&encoder, &inputs);
            for ((rows, input), one) in together.rows_of_texts().zip(&inputs).zip(&case.texts) {
                let rows: Vec<&[f32]> = rows.collect();
                assert_eq!(rows.len(), one.ids.len(), "{:?}", one.text);
                let alone = encode(&encoder, std::slice::from_ref(input));
                assert_eq!(alone.values, rows.concat(), "{} {tier:?}: {input:?} alone", case.family);
                let logits: Vec<f32> = rows.iter().flat_map(|row| model.logits(row).unwrap()).collect();
                let off = largest_difference(&logits, &one.values);
                assert!(off <= LOGIT_TOLERANCE, "{} {tier:?}: {input:?}: off by {off}", case.family);
            }
        }
    }
}

#[test]
fn a_bert_in_a_gguf_file_gives_the_vectors_of_the_reference() {
    let reference: HeadReference = serde_json::from_str(include_str!("../reference/heads.json")).unwrap();
    let case = reference.cases.iter().find(|case| case.family == "bert" && case.labels == 0).unwrap();
    let file = SeededEncoder { seed: reference.seed, ..SeededEncoder::default() }.gguf(DType::F32);
    let model = Arc::new(Model::from_bytes(Path::new("bert.gguf"), Arc::new(file)).unwrap());
    case.check_ids(&model);
    for tier in tiers() {
        let rows = encode(&start(&model, tier, Numerics::Exact), &case.inputs());
        for (row, one) in rows.rows().zip(&case.texts) {
            let cosine = cosine(row, &one.values);
            assert!(cosine >= COSINE, "{tier:?}: {:?}: {cosine}", one.text);
        }
    }
}

#[test]
fn heads_in_gguf_files_give_the_logits_of_the_reference() {
    let reference: HeadReference = serde_json::from_str(include_str!("../reference/heads.json")).unwrap();
    let with_head = |case: &&HeadCase| ["bert", "roberta"].contains(&case.family.as_str()) && case.labels > 0;
    let cases: Vec<&HeadCase> = reference.cases.iter().filter(with_head).collect();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let (family, labels) = (&case.family, case.labels);
        let file = case.checkpoint(reference.seed).gguf_with(&[]);
        let model = Arc::new(Model::from_bytes(Path::new("heads.gguf"), Arc::new(file)).unwrap());
        let wanted_task = if labels == 1 { Task::Rerank } else { Task::Classify };
        assert_eq!(model.task(), wanted_task, "{family}");
        case.check_ids(&model);
        for tier in tiers() {
            let rows = encode(&start(&model, tier, Numerics::Exact), &case.inputs());
            for (row, wanted) in rows.rows().zip(case.wanted()) {
                let off = largest_difference(&model.logits(row).unwrap(), wanted);
                assert!(off <= LOGIT_TOLERANCE, "{family} with {labels} labels, {tier:?}: off by {off}");
            }
        }
    }
}

#[test]
fn published_files_and_gguf_files_of_nomic_bert_give_the_vectors_of_the_reference() {
    let reference: HeadReference = serde_json::from_str(include_str!("../reference/heads.json")).unwrap();
    let case = reference.cases.iter().find(|case| case.family == "nomic_bert").unwrap();
    let checkpoint = case.checkpoint(reference.seed);
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in checkpoint.published_nomic() {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let published = Model::load(folder.path(), &mut |_| {}).unwrap();
    let file = checkpoint.nomic_gguf(DType::F32, &[]);
    let file = Model::from_bytes(Path::new("nomic.gguf"), Arc::new(file)).unwrap();
    for model in [published, file].map(Arc::new) {
        case.check_ids(&model);
        for tier in tiers() {
            let rows = encode(&start(&model, tier, Numerics::Exact), &case.inputs());
            for (row, one) in rows.rows().zip(&case.texts) {
                let cosine = cosine(row, &one.values);
                assert!(cosine >= COSINE, "{tier:?}: {:?}: {cosine}", one.text);
            }
        }
    }
}

/// The real classifier, or `None` with a printed reason.
fn classifier() -> Option<Arc<Model>> {
    let named = std::env::var_os(CLASSIFIER).map(PathBuf::from);
    let folder = named.or_else(|| models().map(|models| models.join("minilm-spam-classifier")))?;
    if !folder.is_dir() {
        println!(
            "skipped: {} is missing: name the folder of the classifier in {CLASSIFIER}",
            folder.display()
        );
        return None;
    }
    Some(Arc::new(Model::load(&folder, &mut |_| {}).unwrap()))
}

#[test]
fn a_real_classifier_gives_the_scores_of_the_reference() {
    let Some(model) = classifier() else { return };
    let reference: ClassifierReference =
        serde_json::from_str(include_str!("../reference/minilm-spam-classifier.json")).unwrap();
    let facts = model.facts().classification.clone().unwrap();
    assert_eq!((model.task(), facts.labels), (Task::Classify, reference.labels));
    for item in &reference.items {
        assert_eq!(model.encode(&item.text).unwrap().ids, item.ids, "{:.40}", item.text);
    }
    for tier in tiers() {
        // The scalar tier is plain loops: a text of 512 tokens takes a minute there.
        let most = if tier == Tier::Scalar { SCALAR_TOKENS } else { usize::MAX };
        let items: Vec<&ClassifiedText> =
            reference.items.iter().filter(|item| item.ids.len() <= most).collect();
        let inputs: Vec<EncodeInput> =
            items.iter().map(|item| EncodeInput::Text(item.text.clone())).collect();
        let exact = encode(&start(&model, tier, Numerics::Exact), &inputs);
        for (row, item) in exact.rows().zip(&items) {
            let off = largest_difference(&model.logits(row).unwrap(), &item.logits);
            println!("{tier:?}: {:.40}: off by {off}", item.text);
            assert!(off <= LOGIT_TOLERANCE, "{tier:?}: {:.40}: off by {off}", item.text);
        }
        let fast = encode(&start(&model, tier, Numerics::Fast), &inputs);
        for (row, item) in fast.rows().zip(&items) {
            let mut scores = model.logits(row).unwrap();
            facts.activation.apply(&mut scores);
            let off = largest_difference(&scores, &item.scores);
            println!("{tier:?} fast: {:.40}: off by {off}", item.text);
            assert!(off <= FAST_SCORE_TOLERANCE, "{tier:?} fast: {:.40}: off by {off}", item.text);
            assert_eq!(best(&scores), best(&item.scores), "{tier:?} fast: {:.40}", item.text);
        }
    }
}
