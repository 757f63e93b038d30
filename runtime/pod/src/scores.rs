//! Translates requests for scores between the API and the encoder engine, whose rows become logits and scores
//! here.

use std::sync::Arc;

use trustformers_api::{ApiError, Classified, ClassifyInput, ClassifyRequest, RerankRequest, Reranked};
use trustformers_engine::ModelFault;
use trustformers_engine::encoder::{EncodeInput, EncodeParams, Encoded};
use trustformers_model::{ClassificationFacts, Model};

use crate::embed::ModelIdentity;
use crate::entities::TokenLabelling;
use crate::params::class;

/// Bytes of all texts; of pairs each text counts as often as it is read.
pub(crate) fn text_bytes(inputs: &[EncodeInput]) -> usize {
    let bytes = |input: &EncodeInput| match input {
        EncodeInput::Text(text) => text.len(),
        EncodeInput::Tokens(_) => 0,
        EncodeInput::Pair { first, second } => first.len() + second.len(),
    };
    inputs.iter().map(bytes).sum()
}

/// The parameters of the encoder engine for texts that get scores.
pub fn classify_params(request: ClassifyRequest) -> EncodeParams {
    let ClassifyRequest { input, truncate, priority, tenant, .. } = request;
    let text = |input| match input {
        ClassifyInput::Text(text) => EncodeInput::Text(text),
        ClassifyInput::Pair { first, second } => EncodeInput::Pair { first: first.into(), second },
    };
    EncodeParams { texts: input.into_iter().map(text).collect(), truncate, priority: class(priority), tenant }
}

/// The parameters of the encoder engine for documents: each is read with the query before it.
pub fn rerank_params(request: RerankRequest) -> EncodeParams {
    let RerankRequest { query, documents, truncate, priority, tenant, .. } = request;
    let query: Arc<str> = query.into();
    let pair = |second| EncodeInput::Pair { first: Arc::clone(&query), second };
    EncodeParams {
        texts: documents.into_iter().map(pair).collect(),
        truncate,
        priority: class(priority),
        tenant,
    }
}

/// The scores of each row, one after the other; the logits themselves where they are asked for.
///
/// # Errors
/// A model without a head, which no loader makes; a score that is no number.
pub fn score_rows(model: &Model, encoded: &Encoded, raw: bool) -> Result<Vec<f32>, ApiError> {
    let facts = facts(model)?;
    let mut scores = Vec::with_capacity(encoded.rows().len() * facts.labels.len());
    for row in encoded.rows() {
        let mut logits = model.logits(row).ok_or_else(no_head)?;
        if !raw {
            facts.activation.apply(&mut logits);
        }
        scores.extend_from_slice(&logits);
    }
    if scores.iter().all(|score| score.is_finite()) {
        return Ok(scores);
    }
    Err(ApiError::Internal { message: ModelFault::NotFinite.to_string() })
}

fn facts(model: &Model) -> Result<&ClassificationFacts, ApiError> {
    model.facts().classification.as_ref().ok_or_else(no_head)
}

fn no_head() -> ApiError {
    ApiError::Internal { message: "the model has no scores to give".to_owned() }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The answer with scores of labels as a type of the API.
pub(crate) fn classified(
    by: ModelIdentity,
    model: &Model,
    encoded: &Encoded,
    raw: bool,
) -> Result<Classified, ApiError> {
    let scores = score_rows(model, encoded, raw)?;
    Ok(Classified { scores, ..without_scores(by, model, encoded)? })
}

/// The answer of a model that labels tokens as a type of the API.
pub(crate) fn labelled(
    by: ModelIdentity,
    model: &Model,
    encoded: &Encoded,
    labelling: &TokenLabelling,
) -> Result<Classified, ApiError> {
    let entities = Some(labelling.entities(model, encoded)?);
    Ok(Classified { entities, ..without_scores(by, model, encoded)? })
}

fn without_scores(by: ModelIdentity, model: &Model, encoded: &Encoded) -> Result<Classified, ApiError> {
    Ok(Classified {
        id: format!("cls-{}", uuid::Uuid::new_v4().simple()),
        model: by.name,
        model_digest: by.digest,
        revision: by.revision,
        labels: facts(model)?.labels.clone().into(),
        scores: Vec::new(),
        entities: None,
        tokens: count(encoded.tokens),
        truncated: encoded.truncated.iter().copied().map(count).collect(),
    })
}

/// The answer with scores of documents as a type of the API.
pub(crate) fn reranked(
    by: ModelIdentity,
    model: &Model,
    encoded: &Encoded,
    raw: bool,
) -> Result<Reranked, ApiError> {
    Ok(Reranked {
        id: format!("rnk-{}", uuid::Uuid::new_v4().simple()),
        model: by.name,
        model_digest: by.digest,
        revision: by.revision,
        scores: score_rows(model, encoded, raw)?,
        tokens: count(encoded.tokens),
        truncated: encoded.truncated.iter().copied().map(count).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::path::Path;
    use trustformers_api::{Aggregation, Inference, Priority};
    use trustformers_model::Task;
    use trustformers_model::seeded::{SeededCheckpoint, SeededEncoder, SeededReader, SeededReading};
    use trustformers_plan::oracle::Oracle;
    use trustformers_store::Source;

    use crate::load::Loader;
    use crate::models::ModelServer;
    use crate::spec::ModelSpec;

    /// A server of one seeded model, ready; the folder must outlive it.
    async fn ready(checkpoint: &SeededCheckpoint) -> (ModelServer, tempfile::TempDir) {
        ready_in(checkpoint, &prometheus::Registry::new()).await
    }

    /// [`ready`], with the metrics of the server.
    async fn ready_in(
        checkpoint: &SeededCheckpoint,
        registry: &prometheus::Registry,
    ) -> (ModelServer, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path()).unwrap();
        let server =
            ModelServer::new(vec![ModelSpec::new("ns/m", Source::from_path(folder.path()))]).unwrap();
        let loader = Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), registry);
        server.start_loading(&Arc::new(loader.unwrap()));
        trustformers_api::Health::readiness(&server).wait_for(|verdict| verdict.ok).await.unwrap();
        (server, folder)
    }

    fn texts(input: Vec<ClassifyInput>) -> ClassifyRequest {
        ClassifyRequest {
            input,
            model: None,
            revision: None,
            truncate: true,
            raw_scores: false,
            aggregation: None,
            priority: Priority::Normal,
            tenant: String::new(),
        }
    }

    fn order(documents: &[&str], raw_scores: bool) -> RerankRequest {
        RerankRequest {
            query: "the cat".into(),
            documents: documents.iter().map(ToString::to_string).collect(),
            model: None,
            revision: None,
            truncate: true,
            raw_scores,
            priority: Priority::Normal,
            tenant: String::new(),
        }
    }

    #[tokio::test]
    async fn a_classifier_gives_each_text_a_score_of_each_label() {
        let (server, _folder) = ready(&SeededCheckpoint::default()).await;
        let text = |text: &str| ClassifyInput::Text(text.into());
        let pair = ClassifyInput::Pair { first: "the cat".into(), second: "hello".into() };
        let all = server.classify(texts(vec![text("hello world"), text(""), pair.clone()])).await.unwrap();
        assert_eq!((all.labels.to_vec(), all.scores.len()), (vec!["HAM".to_owned(), "SPAM".to_owned()], 6));
        assert_eq!((all.model.as_str(), all.model_digest.len()), ("ns/m", 64));
        for scores in all.scores.chunks(2) {
            assert!((scores[0] + scores[1] - 1.0).abs() < 1e-6, "{scores:?}");
        }
        let alone = server.classify(texts(vec![pair])).await.unwrap();
        assert_eq!(alone.scores, all.scores[4..], "alone and beside others");
        let raw =
            server.classify(ClassifyRequest { raw_scores: true, ..texts(vec![text("")]) }).await.unwrap();
        let share = 1.0 / (1.0 + (raw.scores[1] - raw.scores[0]).exp());
        assert!((share - all.scores[2]).abs() < 1e-6);
        let error = server.rerank(order(&["a"], false)).await.unwrap_err();
        assert!(error.to_string().contains("POST /v1/classify"), "{error}");
    }

    #[tokio::test]
    async fn a_model_that_labels_tokens_finds_entities() {
        let labels = ["B-LOC", "B-PER", "I-PER"];
        let keys = json!({
            "architectures": ["BertForTokenClassification"],
            "id2label": {"0": labels[0], "1": labels[1], "2": labels[2]},
        });
        let checkpoint = SeededCheckpoint { labels: 3, keys, ..SeededCheckpoint::default() };
        let (server, _folder) = ready(&checkpoint).await;
        let text = |text: &str| ClassifyInput::Text(text.into());
        let long = "cat ".repeat(500);
        let inputs = vec![text("the cat talking"), text(""), text(&long)];
        let all = server.classify(texts(inputs.clone())).await.unwrap();
        let entities = all.entities.clone().unwrap();
        assert_eq!((entities.len(), all.truncated.clone(), all.scores.len()), (3, vec![2], 0));
        // No label is that of tokens outside of entities: each token but the special ones is one.
        assert_eq!(entities.iter().map(Vec::len).collect::<Vec<_>>(), [7, 0, 62]);
        for (entity, index) in entities[0].iter().zip(1..) {
            assert!(labels.contains(&entity.label.as_str()) && entity.index == Some(index), "{entity:?}");
            assert!(entity.start < entity.end && entity.end <= 15 && entity.score > 1.0 / 3.0, "{entity:?}");
        }
        assert_eq!((entities[0][6].word.as_str(), entities[0][6].start), ("##ing", 12));
        let alone = server.classify(texts(inputs[..1].to_vec())).await.unwrap();
        assert_eq!(alone.entities.unwrap()[0], entities[0], "alone and beside others");
        let grouped =
            ClassifyRequest { aggregation: Some(Aggregation::Simple), ..texts(inputs[..1].to_vec()) };
        let grouped = server.classify(grouped).await.unwrap().entities.unwrap();
        let groups = &grouped[0];
        assert!(groups.iter().all(|one| one.index.is_none() && ["LOC", "PER"].contains(&one.label.as_str())));
        assert_eq!((groups[0].start, groups[groups.len() - 1].end), (0, 15), "{groups:?}");
        let pair = ClassifyInput::Pair { first: "a".into(), second: "b".into() };
        let error = server.classify(texts(vec![pair])).await.unwrap_err().to_string();
        assert!(error.starts_with("input[0]: is a pair of texts"), "{error}");
    }

    /// The part of `heads.json` about models that label tokens.
    #[derive(serde::Deserialize)]
    struct TokenReference {
        seed: u64,
        tokens: Vec<TokenCase>,
    }

    #[derive(serde::Deserialize)]
    struct TokenCase {
        family: String,
        labels: usize,
        keys: Value,
        texts: Vec<TokenText>,
    }

    #[derive(serde::Deserialize)]
    struct TokenText {
        text: String,
        /// By the word of the aggregation; not for an empty text.
        #[serde(default)]
        entities: BTreeMap<String, Vec<Value>>,
    }

    #[tokio::test]
    async fn entities_are_those_of_the_pipeline_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/reference/heads.json");
        let reference: TokenReference = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let case = reference.tokens.iter().find(|case| case.family == "bert").unwrap();
        let shape = SeededEncoder { seed: reference.seed, ..SeededEncoder::default() };
        let (labels, keys) = (case.labels, case.keys.clone());
        let checkpoint = SeededCheckpoint { shape, labels, keys, ..SeededCheckpoint::default() };
        let (server, _folder) = ready(&checkpoint).await;
        let mut compared = 0;
        for (one, (word, wanted)) in
            case.texts.iter().flat_map(|one| one.entities.iter().map(move |own| (one, own)))
        {
            let input = vec![ClassifyInput::Text(one.text.clone())];
            let request = ClassifyRequest { aggregation: Some(word.parse().unwrap()), ..texts(input) };
            let found = server.classify(request).await.unwrap().entities.unwrap().remove(0);
            assert_eq!(found.len(), wanted.len(), "{word}: {:?}: {found:?}", one.text);
            for (found, wanted) in found.iter().zip(wanted) {
                let own = serde_json::to_value(found.body()).unwrap();
                for field in ["entity", "entity_group", "index", "start", "end"] {
                    assert_eq!(own[field], wanted[field], "{word}: {:?}: {own} {wanted}", one.text);
                }
                let off = (f64::from(found.score) - wanted["score"].as_f64().unwrap()).abs();
                assert!(off < 1e-3, "{word}: {:?}: {own} {wanted}", one.text);
                if found.index.is_some() {
                    assert_eq!(own["word"], wanted["word"], "{word}: {:?}", one.text);
                }
                compared += 1;
            }
        }
        assert!(compared > 20, "{compared} entities");
    }

    #[tokio::test]
    async fn an_aggregation_is_refused_where_whole_texts_have_labels() {
        let (server, _folder) = ready(&SeededCheckpoint::default()).await;
        let input = vec![ClassifyInput::Text("a".into())];
        let asked = ClassifyRequest { aggregation: Some(Aggregation::None), ..texts(input) };
        let error = server.classify(asked).await.unwrap_err().to_string();
        assert!(error.starts_with("aggregation_strategy: is for labels of tokens"), "{error}");
    }

    #[tokio::test]
    async fn the_metrics_name_the_task() {
        let registry = prometheus::Registry::new();
        let (_server, _folder) = ready_in(&SeededCheckpoint::reranker(), &registry).await;
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(text.contains("trustformers_model_info{model=\"ns/m\",task=\"rerank\"} 1"), "{text}");
    }

    #[tokio::test]
    async fn a_decoder_ranks_where_the_task_says_so() {
        let folder = tempfile::tempdir().unwrap();
        SeededReader::new(SeededReading::Words).write(folder.path()).unwrap();
        let mut spec = ModelSpec::new("ns/m", Source::from_path(folder.path()));
        spec.task = Some(Task::Rerank);
        let server = ModelServer::new(vec![spec]).unwrap();
        let loader = Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new());
        server.start_loading(&Arc::new(loader.unwrap()));
        trustformers_api::Health::readiness(&server).wait_for(|verdict| verdict.ok).await.unwrap();
        let documents = ["hello world", "the cat"];
        let all = server.rerank(order(&documents, false)).await.unwrap();
        let raw = server.rerank(order(&documents, true)).await.unwrap();
        for (logit, score) in raw.scores.iter().zip(&all.scores) {
            assert!((1.0 / (1.0 + (-logit).exp()) - score).abs() < 1e-6, "{raw:?} {all:?}");
        }
        assert_ne!(raw.scores[0].to_bits(), raw.scores[1].to_bits());
    }

    #[tokio::test]
    async fn a_reranker_reads_the_query_with_each_document() {
        let (server, _folder) = ready(&SeededCheckpoint::reranker()).await;
        let long = "cat ".repeat(500);
        let documents = ["hello world", "the cat", "", &long];
        let all = server.rerank(order(&documents, false)).await.unwrap();
        assert_eq!((all.scores.len(), all.truncated.clone()), (4, vec![3]));
        assert!(all.scores.iter().all(|score| (0.0..=1.0).contains(score)), "{all:?}");
        let raw = server.rerank(order(&documents[..2], true)).await.unwrap();
        for (logit, score) in raw.scores.iter().zip(&all.scores) {
            assert!((1.0 / (1.0 + (-logit).exp()) - score).abs() < 1e-6);
        }
        assert_ne!(raw.scores[0].to_bits(), raw.scores[1].to_bits());
        let strict = RerankRequest { truncate: false, ..order(&documents, false) };
        let error = server.rerank(strict).await.unwrap_err();
        assert!(matches!(error, ApiError::TooLong { .. }), "{error:?}");
    }
}
