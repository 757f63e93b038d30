//! all-MiniLM-L6-v2 through the encoder engine: two hundred texts in ragged batches against float32
//! embeddings.

use super::{cpu, tiers};
use serde::Deserialize;
use std::sync::Arc;
use trustformers_cpu::Tier;
use trustformers_engine::encoder::{EncodeParams, Encoder, EncoderConfig, EncoderMetrics};
use trustformers_engine::{EngineMetrics, Numerics};
use trustformers_model::{Model, Task};
use trustformers_plan::Pooling;

const FOLDER: &str = "all-minilm-l6-v2";

/// Least cosine in exact numerics, where only the order of sums differs.
const EXACT: f64 = 0.9999;

/// Least cosine in fast numerics, where weights and activations have eight bits, and least mean of all texts.
const FAST: f64 = 0.97;
const FAST_MEAN: f64 = 0.995;

/// The scalar tier is plain loops: it encodes only one of so many texts.
const SCALAR_STEP: usize = 8;

#[derive(Deserialize)]
struct EmbeddingReference {
    unit: f64,
    items: Vec<ReferenceText>,
}

#[derive(Deserialize)]
struct ReferenceText {
    text: String,
    ids: Vec<u32>,
    embedding: Vec<i32>,
}

fn model() -> Option<Arc<Model>> {
    super::model(FOLDER)
}

fn reference() -> EmbeddingReference {
    let reference: EmbeddingReference =
        serde_json::from_str(include_str!("../reference/all-minilm-l6-v2.json")).unwrap();
    assert_eq!(reference.items.len(), 200);
    reference
}

#[test]
fn texts_give_the_ids_of_the_reference() {
    let Some(model) = model() else { return };
    let facts = model.facts();
    let embedding = facts.embedding.as_ref().unwrap();
    assert_eq!((model.task(), facts.layers, facts.vocabulary), (Task::Embed, 6, 30_522));
    assert_eq!((embedding.width, embedding.max_tokens), (384, 256));
    assert_eq!((embedding.pooling, embedding.normalised), (Pooling::Mean, true));
    assert_eq!(embedding.pooling_note, None);
    let mut cut = 0;
    for item in &reference().items {
        let encoded = model.encode(&item.text).unwrap();
        assert_eq!(encoded.ids, item.ids, "{:?}", item.text);
        cut += usize::from(encoded.cut);
    }
    assert!(cut >= 10, "{cut}");
}

fn embed(model: &Arc<Model>, tier: Tier, numerics: Numerics, texts: &[&str]) -> Vec<Vec<f32>> {
    let registry = prometheus::Registry::new();
    let engines = EngineMetrics::register(&registry).unwrap();
    let metrics = EncoderMetrics::register(&registry, &engines).unwrap();
    let config = EncoderConfig { numerics, ..EncoderConfig::default() };
    let encoder = Encoder::start(Arc::clone(model), cpu(tier), &config, &metrics, Box::new(|_| {})).unwrap();
    let encoded = encoder.submit(&EncodeParams::texts(texts.iter().copied())).unwrap().blocking_wait();
    encoded.unwrap().rows().map(<[f32]>::to_vec).collect()
}

/// The lowest and the mean cosine to the reference.
fn cosines(model: &Arc<Model>, tier: Tier, numerics: Numerics, step: usize) -> (f64, f64) {
    let reference = reference();
    let items: Vec<&ReferenceText> = reference.items.iter().step_by(step).collect();
    let texts: Vec<&str> = items.iter().map(|item| item.text.as_str()).collect();
    let started = std::time::Instant::now();
    let rows = embed(model, tier, numerics, &texts);
    let seconds = started.elapsed().as_secs_f32();
    let (mut least, mut sum) = ((1.0, ""), 0.0);
    for (row, item) in rows.iter().zip(&items) {
        let wanted: Vec<f64> = item.embedding.iter().map(|v| f64::from(*v) * reference.unit).collect();
        let got: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let length = dot(&got, &got).sqrt();
        assert!((length - 1.0).abs() < 1e-4, "{:?} has length {length}", item.text);
        let cosine = dot(&got, &wanted) / (length * dot(&wanted, &wanted).sqrt());
        sum += cosine;
        if cosine < least.0 {
            least = (cosine, &item.text);
        }
    }
    let mean = sum / items.len() as f64;
    let text: String = least.1.chars().take(40).collect();
    let count = items.len();
    println!(
        "{tier:?} {numerics:?}: {count} texts in {seconds:.1} s, lowest cosine {:.7} ({text:?}), mean {mean:.7}",
        least.0
    );
    (least.0, mean)
}

#[test]
fn every_tier_gives_the_vectors_of_the_reference() {
    let Some(model) = model() else { return };
    for tier in tiers() {
        let step = if tier == Tier::Scalar { SCALAR_STEP } else { 1 };
        let (least, _) = cosines(&model, tier, Numerics::Exact, step);
        assert!(least >= EXACT, "{tier:?}: {least}");
    }
}

#[test]
fn fast_numerics_stay_near_the_reference() {
    let Some(model) = model() else { return };
    for tier in tiers().into_iter().filter(|tier| *tier != Tier::Scalar) {
        let (least, mean) = cosines(&model, tier, Numerics::Fast, 1);
        assert!(least >= FAST && mean >= FAST_MEAN, "{tier:?}: {least}, {mean}");
    }
}
