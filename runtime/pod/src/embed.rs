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

/// A length of vectors that the model cannot give is refused: cutting a vector keeps its meaning only where
/// the model was trained for that.
pub(crate) fn check_dimensions(request: &EmbedRequest, facts: &EmbeddingFacts) -> Result<(), ApiError> {
    let (width, asked) = (facts.width, request.dimensions.map(|asked| asked as usize));
    let why = match (asked, facts.shortest) {
        (Some(asked), Some(least)) if !(least..=width).contains(&asked) => {
            format!("{asked} is not between {least} and {width}, the lengths that this model gives")
        }
        (Some(asked), None) if asked != width => format!(
            "{asked} is not what this model gives: its vectors have {width} values and were not trained to be cut; leave it out"
        ),
        _ => return Ok(()),
    };
    Err(ApiError::field("dimensions", why))
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

/// The first `width` values of each row, of length one again where the model's rows are.
fn cut_rows(encoded: &mut Encoded, width: usize, normalised: bool) {
    let mut values = Vec::with_capacity(encoded.rows().len() * width);
    for row in encoded.rows() {
        let row = &row[..width];
        let squares: f64 = row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        let length = if normalised { squares.sqrt().max(1e-12) } else { 1.0 };
        values.extend(row.iter().map(|value| (f64::from(*value) / length) as f32));
    }
    (encoded.values, encoded.width) = (values, width);
}

/// The answer as a type of the API, with vectors of `dimensions` values, which were checked.
pub(crate) fn embedded(
    by: ModelIdentity,
    facts: &EmbeddingFacts,
    mut encoded: Encoded,
    dimensions: Option<u32>,
) -> Embedded {
    if let Some(width) = dimensions.map(|asked| asked as usize).filter(|asked| *asked < encoded.width) {
        cut_rows(&mut encoded, width, facts.normalised);
    }
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
            Pooling::Last => PoolingMode::Last,
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
    fn vectors_are_cut_where_the_model_was_trained_for_it() {
        let facts = EmbeddingFacts {
            width: 4,
            max_tokens: 8,
            pooling: Pooling::Last,
            pooling_note: None,
            normalised: true,
            prompt: String::new(),
            shortest: Some(2),
        };
        let check = |dimensions, facts: &EmbeddingFacts| {
            let request = EmbedRequest {
                input: vec![EmbedInput::Text("a".into())],
                model: None,
                revision: None,
                truncate: true,
                dimensions,
                priority: Priority::Normal,
                tenant: String::new(),
            };
            check_dimensions(&request, facts).map_err(|error| error.to_string())
        };
        for dimensions in [None, Some(2), Some(4)] {
            assert_eq!(check(dimensions, &facts), Ok(()));
        }
        let error = check(Some(1), &facts).unwrap_err();
        assert!(error.contains("1 is not between 2 and 4"), "{error}");
        assert!(check(Some(5), &facts).is_err());
        assert!(check(Some(2), &EmbeddingFacts { shortest: None, ..facts.clone() }).is_err());
        let encoded = Encoded {
            values: vec![0.48, 0.36, 0.8, 0.0, 0.0, 0.6, 0.8, 0.0],
            width: 4,
            first_rows: vec![0, 1, 2],
            tokens: 3,
            truncated: Vec::new(),
            timings: trustformers_engine::encoder::EncodeTimings::default(),
        };
        let by = || ModelIdentity { name: "m".into(), digest: String::new(), revision: String::new() };
        let cut = embedded(by(), &facts, encoded.clone(), Some(2));
        assert_eq!((cut.width, cut.values.len(), cut.pooling), (2, 4, PoolingMode::Last));
        for (found, wanted) in cut.values.iter().zip([0.8, 0.6, 0.0, 1.0]) {
            assert!((found - wanted).abs() < 1e-6, "{:?}", cut.values);
        }
        let raw = EmbeddingFacts { normalised: false, ..facts };
        assert_eq!(embedded(by(), &raw, encoded.clone(), Some(2)).values, [0.48, 0.36, 0.0, 0.6]);
        assert_eq!(embedded(by(), &raw, encoded.clone(), None).values, encoded.values);
    }

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
