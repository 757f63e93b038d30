//! Labels of tokens: how tokens become entities, and the entities of an answer, in the shape that
//! transformers gives the answers of its token classification.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use trustformers_proto::v1;

use crate::error::ApiError;

/// The field of requests.
pub(crate) const FIELD: &str = "aggregation_strategy";

/// How the labels of tokens become entities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aggregation {
    /// Each token is one.
    #[default]
    None,
    /// Tokens of one label that follow each other are one.
    Simple,
    /// The same, where a word has the label of its first token.
    First,
    /// The same, where a word has the label whose scores are highest over its tokens.
    Average,
    /// The same, where a word has the label of its token with the highest score.
    Max,
}

impl Aggregation {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::None, Self::Simple, Self::First, Self::Average, Self::Max];

    /// The word in requests.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Simple => "simple",
            Self::First => "first",
            Self::Average => "average",
            Self::Max => "max",
        }
    }

    /// The one that a request names.
    pub(crate) fn of_field(word: &str) -> Result<Self, ApiError> {
        word.parse().map_err(|error: UnknownAggregation| ApiError::field(FIELD, error.to_string()))
    }
}

impl fmt::Display for Aggregation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no way to aggregate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it must be none, simple, first, average or max")]
pub struct UnknownAggregation;

impl FromStr for Aggregation {
    type Err = UnknownAggregation;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|own| own.as_str() == word).ok_or(UnknownAggregation)
    }
}

/// What a model found at a place of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Entity {
    /// The label of a token, or of a group without the mark of its beginning.
    pub label: String,
    /// Its score.
    pub score: f32,
    /// The place of the token among all tokens of the text; none of a group.
    pub index: Option<u32>,
    /// How the vocabulary spells the token; of a group the characters of the text.
    pub word: String,
    /// The place of its first character in the text, counted in Unicode code points.
    pub start: u32,
    /// The place behind its last one.
    pub end: u32,
}

/// An [`Entity`] in an answer over HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EntityBody<'a> {
    /// The label of a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    entity: Option<&'a str>,
    /// The label of a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    entity_group: Option<&'a str>,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    word: &'a str,
    start: u32,
    end: u32,
}

impl Entity {
    /// As JSON writes it.
    #[must_use]
    pub fn body(&self) -> EntityBody<'_> {
        let Self { label, score, index, word, start, end } = self;
        let of_token = index.is_some();
        EntityBody {
            entity: of_token.then_some(label.as_str()),
            entity_group: (!of_token).then_some(label.as_str()),
            score: *score,
            index: *index,
            word,
            start: *start,
            end: *end,
        }
    }

    pub(crate) fn into_proto(self) -> v1::Entity {
        let Self { label, score, index, word, start, end } = self;
        v1::Entity { label, score, index, word, start, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_name_ways_to_aggregate() {
        for own in Aggregation::ALL {
            assert_eq!(own.to_string().parse(), Ok(own));
        }
        let error = Aggregation::of_field("mean").unwrap_err().to_string();
        assert_eq!(error, "aggregation_strategy: it must be none, simple, first, average or max");
    }

    #[test]
    fn tokens_and_groups_have_the_names_of_transformers() {
        let token = Entity {
            label: "B-PER".into(),
            score: 0.5,
            index: Some(3),
            word: "##na".into(),
            start: 2,
            end: 4,
        };
        let group = Entity { label: "PER".into(), index: None, word: "Anna".into(), ..token.clone() };
        assert_eq!(
            serde_json::to_value(token.body()).unwrap(),
            json!({"entity": "B-PER", "score": 0.5, "index": 3, "word": "##na", "start": 2, "end": 4})
        );
        assert_eq!(
            serde_json::to_value(group.body()).unwrap(),
            json!({"entity_group": "PER", "score": 0.5, "word": "Anna", "start": 2, "end": 4})
        );
    }
}
