//! Translates requests for scores between the API and the encoder engine, whose rows become logits and scores
//! here.

use std::sync::Arc;

use trustformers_api::{ApiError, Classified, ClassifyInput, ClassifyRequest, RerankRequest, Reranked};
use trustformers_engine::ModelFault;
use trustformers_engine::encoder::{EncodeInput, EncodeParams, Encoded};
use trustformers_model::{ClassificationFacts, Model};

use crate::embed::ModelIdentity;
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
    Ok(Classified {
        id: format!("cls-{}", uuid::Uuid::new_v4().simple()),
        model: by.name,
        model_digest: by.digest,
        revision: by.revision,
        labels: facts(model)?.labels.clone().into(),
        scores: score_rows(model, encoded, raw)?,
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
    use trustformers_api::{Inference, Priority};
    use trustformers_model::Task;
    use trustformers_model::seeded::{SeededCheckpoint, SeededReader, SeededReading};
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
