//! Translates requests for vectors between the API and the encoder engine.

use trustformers_api::{ApiError, EmbedInput, EmbedRequest, Embedded, PoolingMode};
use trustformers_engine::encoder::{EncodeError, EncodeInput, EncodeParams, Encoded};
use trustformers_model::{EmbeddingFacts, Model};
use trustformers_plan::Pooling;

use crate::generate::{RETRY_AFTER_S, overloaded};
use crate::params::class;

/// The model's facts about vectors, which every model that embeds has.
///
/// # Errors
/// A model without them, which no loader makes.
pub(crate) fn facts(model: &Model) -> Result<&EmbeddingFacts, ApiError> {
    let facts = model.facts().embedding.as_ref();
    facts.ok_or_else(|| ApiError::Internal { message: "the model has no vectors to give".to_owned() })
}

/// A length of vectors that the model does not give is refused: cutting a vector keeps its meaning only where
/// the model was trained for that.
pub(crate) fn check_dimensions(request: &EmbedRequest, facts: &EmbeddingFacts) -> Result<(), ApiError> {
    let width = facts.width;
    match request.dimensions {
        Some(asked) if asked as usize != width => Err(ApiError::field(
            "dimensions",
            format!(
                "{asked} is not what this model gives: its vectors have {width} values and were not trained to be cut; leave it out"
            ),
        )),
        _ => Ok(()),
    }
}

/// Token ids of another vocabulary are refused with their usual cause.
pub(crate) fn check_ids(request: &EmbedRequest, vocabulary: usize) -> Result<(), ApiError> {
    for (index, input) in request.input.iter().enumerate() {
        let EmbedInput::Tokens(ids) = input else { continue };
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            let why = format!(
                "token id {id} is outside the model's vocabulary of {vocabulary}; send the text itself (LangChain's OpenAIEmbeddings sends ids of OpenAI's vocabulary unless it is made with check_embedding_ctx_length=False)"
            );
            return Err(ApiError::field(&format!("input[{index}]"), why));
        }
    }
    Ok(())
}

/// The parameters of the encoder engine.
pub fn encode_params(request: EmbedRequest) -> EncodeParams {
    let EmbedRequest { input, truncate, priority, tenant, .. } = request;
    let text = |input| match input {
        EmbedInput::Text(text) => EncodeInput::Text(text),
        EmbedInput::Tokens(ids) => EncodeInput::Tokens(ids),
    };
    EncodeParams { texts: input.into_iter().map(text).collect(), truncate, priority: class(priority), tenant }
}

/// The model that answers.
pub(crate) struct ModelIdentity {
    pub(crate) name: String,
    pub(crate) digest: String,
    pub(crate) revision: String,
}

/// The answer as a type of the API.
pub(crate) fn embedded(by: ModelIdentity, facts: &EmbeddingFacts, encoded: Encoded) -> Embedded {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Embedded {
        id: format!("emb-{}", uuid::Uuid::new_v4().simple()),
        model: by.name,
        model_digest: by.digest,
        revision: by.revision,
        values: encoded.values,
        width: encoded.width,
        tokens: count(encoded.tokens),
        truncated: encoded.truncated.into_iter().map(count).collect(),
        pooling: match facts.pooling {
            Pooling::Mean => PoolingMode::Mean,
            Pooling::Cls => PoolingMode::Cls,
            Pooling::Max => PoolingMode::Max,
        },
        pooling_note: facts.pooling_note.clone(),
    }
}

/// The error that the caller gets.
pub(crate) fn failed(error: &EncodeError) -> ApiError {
    let message = error.to_string();
    match error {
        EncodeError::Overloaded { retry_after, .. } => overloaded(message, *retry_after),
        EncodeError::TooLong { .. } => ApiError::TooLong { message },
        EncodeError::Invalid { field, .. } => {
            ApiError::InvalidRequest { field: Some((*field).to_owned()), message }
        }
        EncodeError::Stopped => ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) },
        EncodeError::Request(_) => ApiError::InvalidRequest { field: None, message },
        EncodeError::Model(_) | EncodeError::Device(_) => ApiError::Internal { message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use trustformers_api::Priority;

    #[test]
    fn priority_and_tenant_arrive_and_overload_has_a_retry_time() {
        let request = EmbedRequest {
            input: vec![EmbedInput::Text("a".into()), EmbedInput::Tokens(vec![1])],
            model: None,
            revision: None,
            truncate: false,
            dimensions: None,
            priority: Priority::Low,
            tenant: "team".into(),
        };
        let params = encode_params(request);
        assert_eq!((params.priority, params.tenant.as_str()), (trustformers_engine::Priority::Low, "team"));
        assert_eq!(params.texts, [EncodeInput::Text("a".into()), EncodeInput::Tokens(vec![1])]);
        let full = EncodeError::Overloaded { waiting: 3, retry_after: Duration::from_secs(7) };
        assert!(matches!(failed(&full), ApiError::Overloaded { retry_after_s: 7, .. }));
        assert!(matches!(
            failed(&trustformers_engine::ModelFault::NotFinite.into()),
            ApiError::Internal { .. }
        ));
    }
}
