//! From the labels of tokens to the entities of an answer, by the rules of the token classification of
//! transformers: the label `O` is left out, and of a group the marks `B-` and `I-`.

use trustformers_api::{Aggregation, ApiError, ClassifyInput, ClassifyRequest, Entity};
use trustformers_engine::ModelFault;
use trustformers_engine::encoder::{Encoded, Encoder};
use trustformers_model::{Model, TokenSpan};

/// The label of tokens that are outside of everything.
const OUTSIDE: &str = "O";

/// What is wanted of a model that labels tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLabelling {
    /// The texts, in the order of their rows.
    pub texts: Vec<String>,
    /// How tokens become entities.
    pub aggregation: Aggregation,
    /// Whether scores are the logits.
    pub raw_scores: bool,
    /// Most tokens of a text, special ones included.
    pub max_tokens: usize,
}

/// A token with a score for each label.
#[derive(Debug, Clone, PartialEq)]
struct ScoredToken {
    span: TokenSpan,
    scores: Vec<f32>,
}

/// A label, by its place among all, with its score.
#[derive(Debug, Clone, Copy, PartialEq)]
struct LabelOfToken {
    label: usize,
    score: f32,
}

/// Some characters of a text with one label: a token or a word.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Labelled<'t> {
    of: LabelOfToken,
    first: &'t TokenSpan,
    last: &'t TokenSpan,
}

impl TokenLabelling {
    /// What a request wants; `None` of a model that gives whole texts scores.
    ///
    /// # Errors
    /// A field that has no meaning for the model.
    pub(crate) fn of(request: &ClassifyRequest, encoder: &Encoder) -> Result<Option<Self>, ApiError> {
        if !encoder.model().facts().labels_tokens() {
            let why = "is for labels of tokens, and this model labels whole texts: leave it out";
            let given = request.aggregation.is_some();
            return if given { Err(ApiError::field("aggregation_strategy", why)) } else { Ok(None) };
        }
        let text = |(index, input): (usize, &ClassifyInput)| match input {
            ClassifyInput::Text(text) => Ok(text.clone()),
            ClassifyInput::Pair { .. } => {
                let why = "is a pair of texts, and this model labels the tokens of one: give texts";
                Err(ApiError::field(&format!("input[{index}]"), why))
            }
        };
        Ok(Some(Self {
            texts: request.input.iter().enumerate().map(text).collect::<Result<_, _>>()?,
            aggregation: request.aggregation.unwrap_or_default(),
            raw_scores: request.raw_scores,
            max_tokens: encoder.info().context_tokens,
        }))
    }

    /// The entities of each text, from the rows of its tokens.
    ///
    /// # Errors
    /// Rows of another model; a score that is no number.
    pub fn entities(&self, model: &Model, encoded: &Encoded) -> Result<Vec<Vec<Entity>>, ApiError> {
        let wrong = |message: &str| ApiError::Internal { message: message.to_owned() };
        let facts = model.facts().classification.as_ref();
        let facts = facts.ok_or_else(|| wrong("the model has no labels to give"))?;
        let mut all = Vec::with_capacity(self.texts.len());
        for (text, rows) in self.texts.iter().zip(encoded.rows_of_texts()) {
            let found = model.token_spans(text, self.max_tokens);
            let found = found.map_err(|error| wrong(&error.to_string()))?;
            let rows: Vec<&[f32]> = rows.collect();
            if rows.len() != found.count {
                return Err(wrong("the tokens of a text are not those that the device computed"));
            }
            let mut tokens = Vec::with_capacity(found.spans.len());
            for span in found.spans {
                let row = rows.get(span.index).copied().unwrap_or_default();
                let mut scores = model.logits(row).ok_or_else(|| wrong("the model has no labels to give"))?;
                if !self.raw_scores {
                    facts.activation.apply(&mut scores);
                }
                if !scores.iter().all(|score| score.is_finite()) {
                    return Err(wrong(&ModelFault::NotFinite.to_string()));
                }
                tokens.push(ScoredToken { span, scores });
            }
            all.push(entities(&facts.labels, &tokens, self.aggregation, text));
        }
        Ok(all)
    }
}

/// The entities of a text.
fn entities(labels: &[String], tokens: &[ScoredToken], aggregation: Aggregation, text: &str) -> Vec<Entity> {
    let of_tokens = || tokens.iter().map(|token| labelled(std::slice::from_ref(token), aggregation));
    if aggregation == Aggregation::None {
        return of_tokens().flatten().filter_map(|one| of_token(labels, one)).collect();
    }
    let parts: Vec<Labelled<'_>> = match aggregation {
        Aggregation::None | Aggregation::Simple => of_tokens().flatten().collect(),
        Aggregation::First | Aggregation::Average | Aggregation::Max => {
            let words = tokens.chunk_by(|_, next| next.span.continues_word);
            words.filter_map(|word| labelled(word, aggregation)).collect()
        }
    };
    let name = |part: &Labelled<'_>| labels.get(part.of.label).map_or("", String::as_str);
    let groups = parts.chunk_by(|one, next| {
        let (one, next) = (Mark::of(name(one)), Mark::of(name(next)));
        one.name == next.name && !next.begins
    });
    let chars: Vec<char> = text.chars().collect();
    groups.filter_map(|group| of_group(labels, group, &chars)).collect()
}

/// The label of a token or a word; `None` of no token.
fn labelled(tokens: &[ScoredToken], aggregation: Aggregation) -> Option<Labelled<'_>> {
    let (first, last) = (tokens.first()?, tokens.last()?);
    let of = match aggregation {
        Aggregation::None | Aggregation::Simple | Aggregation::First => best(&first.scores)?,
        Aggregation::Max => {
            let each = tokens.iter().filter_map(|token| best(&token.scores));
            each.reduce(|most, one| if one.score > most.score { one } else { most })?
        }
        Aggregation::Average => {
            let mean = |label: usize| {
                let scores = tokens.iter().filter_map(|token| token.scores.get(label));
                (scores.map(|score| f64::from(*score)).sum::<f64>() / tokens.len() as f64) as f32
            };
            best(&(0..first.scores.len()).map(mean).collect::<Vec<f32>>())?
        }
    };
    Some(Labelled { of, first: &first.span, last: &last.span })
}

/// The label with the highest score, and of equal scores the first.
fn best(scores: &[f32]) -> Option<LabelOfToken> {
    let each = scores.iter().enumerate().map(|(label, score)| LabelOfToken { label, score: *score });
    each.reduce(|most, one| if one.score > most.score { one } else { most })
}

/// A label and its mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark<'l> {
    /// Whether a new entity begins.
    begins: bool,
    name: &'l str,
}

impl<'l> Mark<'l> {
    fn of(label: &'l str) -> Self {
        match label.split_once('-') {
            Some(("B", name)) => Self { begins: true, name },
            Some(("I", name)) => Self { begins: false, name },
            _ => Self { begins: false, name: label },
        }
    }
}

fn place(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}

fn of_token(labels: &[String], one: Labelled<'_>) -> Option<Entity> {
    let label = labels.get(one.of.label).filter(|label| *label != OUTSIDE)?;
    Some(Entity {
        label: label.clone(),
        score: one.of.score,
        index: Some(place(one.first.index)),
        word: one.first.word.clone(),
        start: place(one.first.start),
        end: place(one.last.end),
    })
}

/// A group has the label of its first part, and the mean of the scores of all.
fn of_group(labels: &[String], group: &[Labelled<'_>], text: &[char]) -> Option<Entity> {
    let (first, last) = (group.first()?, group.last()?);
    let label = labels.get(first.of.label)?;
    let label = label.split_once('-').map_or(label.as_str(), |(_, name)| name);
    if label == OUTSIDE {
        return None;
    }
    let sum: f64 = group.iter().map(|part| f64::from(part.of.score)).sum();
    let (start, end) = (first.first.start, last.last.end);
    Some(Entity {
        label: label.to_owned(),
        score: (sum / group.len() as f64) as f32,
        index: None,
        word: text.get(start..end).unwrap_or_default().iter().collect(),
        start: place(start),
        end: place(end),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Anna Müller of New York";

    fn labels() -> Vec<String> {
        ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"].map(str::to_owned).to_vec()
    }

    /// A token with most of its score at one label and the rest at another.
    fn token(index: usize, place: [usize; 2], word: &str, scores: [(usize, f32); 2]) -> ScoredToken {
        let mut all = vec![0.0; 5];
        for (label, score) in scores {
            all[label] = score;
        }
        let continues_word = word.starts_with("##");
        let [start, end] = place;
        let span = TokenSpan { index, word: word.to_owned(), start, end, continues_word };
        ScoredToken { span, scores: all }
    }

    /// A name of three pieces of which one has another label, and a place.
    fn tokens() -> Vec<ScoredToken> {
        vec![
            token(1, [0, 4], "anna", [(1, 0.75), (0, 0.25)]),
            token(2, [5, 7], "mu", [(2, 0.5), (0, 0.25)]),
            token(3, [7, 11], "##ller", [(3, 0.875), (0, 0.125)]),
            token(4, [12, 14], "of", [(0, 1.0), (1, 0.0)]),
            token(5, [15, 18], "new", [(3, 0.5), (4, 0.25)]),
            token(6, [19, 23], "york", [(4, 0.75), (3, 0.25)]),
        ]
    }

    /// Label, score, and characters of each entity.
    fn found(aggregation: Aggregation) -> Vec<(String, f32, String)> {
        let all = entities(&labels(), &tokens(), aggregation, TEXT);
        let part = |one: &Entity| {
            TEXT.chars().skip(one.start as usize).take((one.end - one.start) as usize).collect()
        };
        all.iter().map(|one| (one.label.clone(), one.score, part(one))).collect()
    }

    fn wanted(entities: &[(&str, f32, &str)]) -> Vec<(String, f32, String)> {
        entities
            .iter()
            .map(|(label, score, part)| ((*label).to_owned(), *score, (*part).to_owned()))
            .collect()
    }

    #[test]
    fn each_token_is_an_entity_without_aggregation() {
        let all = entities(&labels(), &tokens(), Aggregation::None, TEXT);
        let short: Vec<(u32, &str, &str)> =
            all.iter().map(|one| (one.index.unwrap(), one.label.as_str(), one.word.as_str())).collect();
        let expected = [
            (1, "B-PER", "anna"),
            (2, "I-PER", "mu"),
            (3, "B-LOC", "##ller"),
            (5, "B-LOC", "new"),
            (6, "I-LOC", "york"),
        ];
        assert_eq!(short, expected);
        assert_eq!((all[1].start, all[1].end, all[1].score), (5, 7, 0.5));
    }

    #[test]
    fn tokens_of_one_label_are_one_entity() {
        let simple = wanted(&[("PER", 0.625, "Anna Mü"), ("LOC", 0.875, "ller"), ("LOC", 0.625, "New York")]);
        assert_eq!(found(Aggregation::Simple), simple);
        let all = entities(&labels(), &tokens(), Aggregation::Simple, TEXT);
        assert_eq!((all[0].word.as_str(), all[0].index), ("Anna Mü", None), "the text's own characters");
    }

    #[test]
    fn a_word_has_one_label() {
        let place = ("LOC", 0.625, "New York");
        let first = wanted(&[("PER", 0.625, "Anna Müller"), place]);
        assert_eq!(found(Aggregation::First), first);
        // Of the word's mean scores that of B-LOC is the highest, 0.4375.
        let average = wanted(&[("PER", 0.75, "Anna"), ("LOC", 0.4375, "Müller"), place]);
        assert_eq!(found(Aggregation::Average), average);
        let max = wanted(&[("PER", 0.75, "Anna"), ("LOC", 0.875, "Müller"), place]);
        assert_eq!(found(Aggregation::Max), max);
    }

    #[test]
    fn a_mark_of_a_beginning_begins_an_entity_and_other_labels_have_no_mark() {
        let labels = ["O", "B-A", "I-A", "A", "E-B"].map(str::to_owned);
        let tokens: Vec<ScoredToken> = [1, 1, 2, 3, 4, 4, 0]
            .into_iter()
            .enumerate()
            .map(|(at, label)| token(at, [2 * at, 2 * at + 1], "x", [(label, 1.0), (label, 1.0)]))
            .collect();
        let all = entities(&labels, &tokens, Aggregation::Simple, "x x x x x x x");
        let short: Vec<(&str, u32, u32)> =
            all.iter().map(|one| (one.label.as_str(), one.start, one.end)).collect();
        assert_eq!(short, [("A", 0, 1), ("A", 2, 7), ("B", 8, 11)]);
        assert!(entities(&labels, &[], Aggregation::Max, "").is_empty());
    }
}
