//! Decoders that read whole texts, through the encoder engine: small seeded checkpoints that embed and rank,
//! made here and by the recipe from one seed.

use super::heads::{cosine, encode, start};
use super::tiers;
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use trustformers_engine::Numerics;
use trustformers_engine::encoder::EncodeInput;
use trustformers_model::gguf::GgufValue;
use trustformers_model::seeded::{SeededFamily, SeededModel, SeededReader, SeededReading};
use trustformers_model::{CheckpointFiles, Model, Task};
use trustformers_plan::Pooling;

/// Least cosine of an embedding in exact numerics.
const COSINE: f64 = 0.9999;

/// Largest difference of a logit in exact numerics, where only the order of sums differs; a score moves by a
/// quarter of that at most.
const LOGIT_TOLERANCE: f32 = 1e-3;

/// Longest text of the seeded models.
const LONGEST: usize = 512;

#[derive(Deserialize)]
struct ReaderReference {
    texts: Vec<EmbeddedText>,
    pairs: Vec<RankedPair>,
}

#[derive(Deserialize)]
struct EmbeddedText {
    text: String,
    ids: Vec<u32>,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct RankedPair {
    query: String,
    document: String,
    ids: Vec<u32>,
    /// The share of "yes" in the softmax over "no" and "yes".
    score: f32,
    /// The logit of the model with a projection.
    projected: f32,
}

/// What `e2e/reference/readers.py` wrote.
fn reference() -> ReaderReference {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/readers.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn model(reading: SeededReading, task: Option<Task>) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    SeededReader::new(reading).write(folder.path()).unwrap();
    let files = CheckpointFiles::of_folder(folder.path()).unwrap().asked_for(task);
    Arc::new(Model::load_checkpoint_while(&files, &mut |_| ControlFlow::Continue(())).unwrap())
}

#[test]
fn a_decoder_embeds_as_the_reference() {
    let model = model(SeededReading::Embed, None);
    let facts = model.facts().embedding.clone().unwrap();
    assert_eq!((model.task(), facts.pooling, facts.normalised), (Task::Embed, Pooling::Last, true));
    let texts = reference().texts;
    for one in &texts {
        assert_eq!(model.encode(&one.text).unwrap().ids, one.ids, "{:.40}", one.text);
    }
    let inputs: Vec<EncodeInput> = texts.iter().map(|one| EncodeInput::Text(one.text.clone())).collect();
    for tier in tiers() {
        let encoder = start(&model, tier, Numerics::Exact);
        let together = encode(&encoder, &inputs);
        assert_eq!(together.truncated, [texts.len() - 1], "the last text is longer than {LONGEST} tokens");
        for ((row, input), one) in together.rows().zip(&inputs).zip(&texts) {
            let alone = encode(&encoder, std::slice::from_ref(input));
            assert_eq!(alone.values, row, "{tier:?}: {:.40} alone and batched", one.text);
            let cosine = cosine(row, &one.values);
            assert!(cosine >= COSINE, "{tier:?}: {:.40}: {cosine}", one.text);
        }
    }
}

#[test]
fn a_gguf_file_made_for_embeddings_gives_the_same_vectors() {
    let seeded =
        SeededModel { family: SeededFamily::Qwen3, context_tokens: LONGEST, ..SeededModel::default() };
    let keys = [
        ("qwen3.pooling_type", GgufValue::U32(3)),
        ("tokenizer.ggml.eos_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.add_eos_token", GgufValue::Bool(true)),
    ];
    let file = Arc::new(seeded.gguf_with(&keys));
    let model = Arc::new(Model::from_bytes(Path::new("embedding.gguf"), file).unwrap());
    assert_eq!((model.task(), model.facts().warnings.len()), (Task::Embed, 0));
    assert_eq!(model.encode("x").unwrap().ids.last(), Some(&0), "the end token is put after a text");
    assert_eq!(model.encode(&"x".repeat(2 * LONGEST)).unwrap().ids.len(), LONGEST);
    // The tokenizer of the file merges other pairs, so the ids of the reference are given.
    let texts = reference().texts;
    let inputs: Vec<EncodeInput> = texts.iter().map(|one| EncodeInput::Tokens(one.ids.clone())).collect();
    for tier in tiers() {
        let rows = encode(&start(&model, tier, Numerics::Exact), &inputs);
        for (row, one) in rows.rows().zip(&texts) {
            let cosine = cosine(row, &one.values);
            assert!(cosine >= COSINE, "{tier:?}: {:.40}: {cosine}", one.text);
        }
    }
}

#[test]
fn decoders_rank_as_the_reference() {
    let pairs = reference().pairs;
    let inputs: Vec<EncodeInput> = pairs
        .iter()
        .map(|one| EncodeInput::Pair { first: one.query.as_str().into(), second: one.document.clone() })
        .collect();
    for reading in [SeededReading::Words, SeededReading::Projection] {
        let model = model(reading, Some(Task::Rerank));
        assert_eq!(model.task(), Task::Rerank);
        let activation = model.facts().classification.clone().unwrap().activation;
        for one in &pairs {
            let found = model.encode_pair(&one.query, &one.document, LONGEST).unwrap();
            assert_eq!(found.ids, one.ids, "{:?}", one.query);
        }
        for tier in tiers() {
            let encoder = start(&model, tier, Numerics::Exact);
            let together = encode(&encoder, &inputs);
            assert_eq!(together.truncated, [pairs.len() - 1], "the last document is cut");
            for ((row, input), one) in together.rows().zip(&inputs).zip(&pairs) {
                let alone = encode(&encoder, std::slice::from_ref(input));
                assert_eq!(alone.values, row, "{tier:?}: {:?} alone and batched", one.query);
                let mut values = model.logits(row).unwrap();
                let wanted = if reading == SeededReading::Words {
                    activation.apply(&mut values);
                    one.score
                } else {
                    one.projected
                };
                assert_eq!(values.len(), 1);
                let off = (values[0] - wanted).abs();
                assert!(off <= LOGIT_TOLERANCE, "{reading:?} {tier:?}: {:?}: off by {off}", one.query);
            }
        }
    }
}

#[test]
fn a_gguf_file_that_ranks_gives_the_scores_of_the_reference() {
    let file = Arc::new(SeededReader::new(SeededReading::Words).ranking_gguf(&[]));
    let model = Arc::new(Model::from_bytes(Path::new("reranker.gguf"), file).unwrap());
    assert_eq!((model.task(), model.facts().warnings.len()), (Task::Rerank, 0));
    let activation = model.facts().classification.clone().unwrap().activation;
    // The tokenizer of the file merges other pairs, so the ids of the reference are given.
    let pairs = reference().pairs;
    let inputs: Vec<EncodeInput> = pairs.iter().map(|one| EncodeInput::Tokens(one.ids.clone())).collect();
    for tier in tiers() {
        let rows = encode(&start(&model, tier, Numerics::Exact), &inputs);
        for (row, one) in rows.rows().zip(&pairs) {
            let mut values = model.logits(row).unwrap();
            activation.apply(&mut values);
            let off = (values[0] - one.score).abs();
            assert!(off <= LOGIT_TOLERANCE, "{tier:?}: {:?}: off by {off}", one.query);
        }
    }
}
