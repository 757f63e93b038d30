//! The tokens of a text with their places in it, for models that label tokens.

use super::Tokenizer;
use super::json::cut_to;
use crate::error::TokenizerProblem;
use tokenizers::models::ModelWrapper;

/// How vocabularies of other kinds than WordPiece spell the token for what no piece spells.
const UNKNOWN: &str = "<unk>";

/// A token of a text, and its place in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSpan {
    /// Its place among the tokens of the text, special ones included.
    pub index: usize,
    /// How the vocabulary spells it; of a word that it cannot spell, the word.
    pub word: String,
    /// The place of its first character in the text.
    pub start: usize,
    /// The place behind its last character.
    pub end: usize,
    /// Whether it continues the word of the token before it.
    pub continues_word: bool,
}

/// The tokens of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSpans {
    /// How many there are, with the special ones around the text.
    pub count: usize,
    /// Those that stand for characters of the text, in order.
    pub spans: Vec<TokenSpan>,
}

impl Tokenizer {
    /// The tokens of a text that [`Self::encode_up_to`] gives, with their places. A piece of WordPiece
    /// continues a word where its spelling says so, any other where no space is before it.
    pub(crate) fn spans_up_to(&self, text: &str, max_tokens: usize) -> Result<TokenSpans, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let room = max_tokens.saturating_sub(self.special_tokens());
        let with_places = |piece: &str| self.library.encode_char_offsets(piece, false);
        let mut encoding = self.encode_beginning_with(with_places, text, max_tokens, room)?;
        cut_to(&mut encoding, room);
        let encoding = self.library.post_process(encoding, None, self.templated).map_err(failed)?;
        let chars: Vec<char> = text.chars().collect();
        let part = |start: usize, end: usize| -> String {
            chars.get(start..end).unwrap_or_default().iter().collect()
        };
        let model = self.library.get_model();
        let (prefix, unknown) = match model {
            ModelWrapper::WordPiece(own) => {
                (Some(own.continuing_subword_prefix.as_str()), own.unk_token.as_str())
            }
            _ => (None, UNKNOWN),
        };
        let continues = |token: &str, start: usize| match prefix {
            Some(prefix) => token.starts_with(prefix),
            None => start > 0 && ![chars.get(start - 1), chars.get(start)].contains(&Some(&' ')),
        };
        let before = usize::from(self.begin.is_some());
        let tokens = encoding.get_tokens().iter().zip(encoding.get_offsets());
        let tokens = tokens.zip(encoding.get_special_tokens_mask()).enumerate();
        let spans = tokens.filter(|(_, (_, special))| **special == 0).map(|(index, ((token, place), _))| {
            let (start, end) = *place;
            let index = index + before;
            if token == unknown {
                return TokenSpan { index, word: part(start, end), start, end, continues_word: false };
            }
            TokenSpan { index, word: token.clone(), start, end, continues_word: continues(token, start) }
        });
        Ok(TokenSpans { spans: spans.collect(), count: encoding.len() + before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::SeededEncoder;
    use serde_json::{Value, json};

    fn spans(tokenizer: &Tokenizer, text: &str, most: usize) -> TokenSpans {
        let spans = tokenizer.spans_up_to(text, most).unwrap();
        assert_eq!(spans.count, tokenizer.encode_up_to(text, most).unwrap().ids.len(), "{text:?}");
        spans
    }

    fn words(found: &TokenSpans) -> Vec<(usize, &str, usize, usize, bool)> {
        found
            .spans
            .iter()
            .map(|one| (one.index, one.word.as_str(), one.start, one.end, one.continues_word))
            .collect()
    }

    #[test]
    fn places_are_characters_of_the_text() {
        let tokenizer = Tokenizer::from_json(&SeededEncoder::default().tokenizer()).unwrap();
        // The first word has two characters of three bytes and is unknown; accents and capitals are folded.
        let found = spans(&tokenizer, "日本 Caté, talking", 32);
        assert_eq!(
            words(&found),
            [
                (1, "日", 0, 1, false),
                (2, "本", 1, 2, false),
                (3, "cat", 3, 6, false),
                (4, "##e", 6, 7, true),
                (5, ",", 7, 8, false),
                (6, "t", 9, 10, false),
                (7, "##a", 10, 11, true),
                (8, "##l", 11, 12, true),
                (9, "##k", 12, 13, true),
                (10, "##ing", 13, 16, true),
            ]
        );
        let cut = spans(&tokenizer, "the cat hello", 4);
        assert_eq!(words(&cut), [(1, "the", 0, 3, false), (2, "cat", 4, 7, false)]);
        assert_eq!(spans(&tokenizer, "", 8), TokenSpans { count: 2, spans: Vec::new() });
    }

    #[test]
    fn pieces_of_other_vocabularies_continue_words_without_a_space() {
        let mut file: Value = serde_json::from_slice(&SeededEncoder::default().tokenizer()).unwrap();
        file["normalizer"] = Value::Null;
        let space = "\u{2581}";
        file["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": space, "prepend_scheme": "always", "split": true});
        let vocab = [
            ("[PAD]", 0.0),
            ("<unk>", 0.0),
            ("[CLS]", 0.0),
            ("[SEP]", 0.0),
            ("[MASK]", 0.0),
            ("\u{2581}new", -1.0),
            ("york", -1.0),
        ];
        let vocab: Vec<Value> = vocab.iter().map(|(piece, score)| json!([piece, score])).collect();
        file["model"] = json!({"type": "Unigram", "unk_id": 1, "vocab": vocab, "byte_fallback": false});
        let added = file["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| token["content"] != "[UNK]");
        let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
        let found = spans(&tokenizer, "newyork new", 16);
        let marked: Vec<bool> = found.spans.iter().map(|one| one.continues_word).collect();
        assert_eq!(marked, [false, true, false]);
        assert_eq!((found.spans[1].start, found.spans[1].end), (3, 7));
    }
}
