//! The tokenizer of a `tokenizer.json`: WordPiece, with the special tokens that its template puts around a text.

use super::{TokenBytes, Tokenizer};
use crate::error::TokenizerProblem;
use std::collections::HashSet;
use tokenizers::models::ModelWrapper;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{PostProcessor, Tokenizer as Library, TruncationDirection};

const KIND: &str = "model.type";
/// A text is first tokenised up to this many bytes for each token that is wanted: few words give fewer tokens than that.
const BYTES_PER_TOKEN: usize = 16;
/// The shortest piece that is worth tokenising by itself.
const FIRST_PIECE_BYTES: usize = 4096;

/// The ids of a text that was cut to a length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    /// The ids, special tokens included.
    pub ids: Vec<u32>,
    /// Whether the text was longer: its rest is not among the ids.
    pub cut: bool,
}

impl Tokenizer {
    /// Builds the tokenizer that the bytes of a `tokenizer.json` describe. How the file would cut and pad texts is the
    /// business of whoever wrote it for another program, and is dropped.
    pub(crate) fn from_json(file: &[u8]) -> Result<Self, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let mut library = Library::from_bytes(checked(file)?).map_err(failed)?;
        library.with_padding(None).with_truncation(None).map_err(failed)?;
        let ModelWrapper::WordPiece(model) = library.get_model() else {
            let found = kind(library.get_model()).to_owned();
            return Err(TokenizerProblem::Unsupported { key: KIND, found, supported: "WordPiece" });
        };
        if library.token_to_id(&model.unk_token).is_none() {
            let why = format!("the token {:?} for unknown words is not in the vocabulary", model.unk_token);
            return Err(TokenizerProblem::Entry { key: "model.unk_token", why });
        }
        let bytes = word_piece_bytes(&library, model)?;
        Ok(Self { library, bytes, begin: None, eos: Vec::new(), templated: true })
    }

    /// The ids of a text, at most `max_tokens` of them: a longer text loses its end, while the special tokens around
    /// it stay. What lies far behind the cut is not tokenised.
    ///
    /// # Errors
    /// The library's own; none is known for valid UTF-8.
    pub fn encode_up_to(&self, text: &str, max_tokens: usize) -> Result<EncodedText, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let room = max_tokens.saturating_sub(self.special_tokens());
        let mut bytes = max_tokens.saturating_mul(BYTES_PER_TOKEN).max(FIRST_PIECE_BYTES);
        let mut encoding = loop {
            let piece = self.beginning(text, bytes);
            let encoding = self.library.encode_fast(piece, false).map_err(failed)?;
            if encoding.len() > room || piece.len() == text.len() {
                break encoding;
            }
            bytes = bytes.saturating_mul(4);
        };
        let cut = encoding.len() > room;
        encoding.truncate(room, 0, TruncationDirection::Right);
        // The library keeps what was cut off, and would put special tokens around each piece of it.
        encoding.take_overflowing();
        let encoding = self.library.post_process(encoding, None, self.templated).map_err(failed)?;
        let ids = self.begin.into_iter().chain(encoding.get_ids().iter().copied()).collect();
        Ok(EncodedText { ids, cut })
    }

    /// The first words of `text`, `bytes` long or shorter, and all of it where no word ends before that.
    /// WordPiece splits a text into words before it does anything else, so that the words in front of a split
    /// have the tokens that they have in the whole text; other tokenizers may look further.
    fn beginning<'t>(&self, text: &'t str, bytes: usize) -> &'t str {
        let word_piece = matches!(self.library.get_model(), ModelWrapper::WordPiece(_));
        let start = text.get(..text.floor_char_boundary(bytes)).filter(|start| start.len() < text.len());
        let splits = self.word_splits();
        let end = start.filter(|_| word_piece).and_then(|start| start.rfind(|c| splits.at(c)));
        end.map_or(text, |end| &text[..end])
    }

    fn word_splits(&self) -> WordSplits {
        let marks =
            matches!(self.library.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)));
        let ideographs = matches!(
            self.library.get_normalizer(),
            Some(NormalizerWrapper::BertNormalizer(normaliser)) if normaliser.handle_chinese_chars
        );
        let added = self.library.get_added_tokens_decoder();
        let inside_special = added.values().flat_map(|token| token.content.chars()).collect();
        WordSplits { marks, ideographs, inside_special }
    }

    /// How many tokens are put around every text.
    #[must_use]
    pub fn special_tokens(&self) -> usize {
        let template = self.library.get_post_processor().filter(|_| self.templated);
        template.map_or(0, |template| template.added_tokens(false)) + usize::from(self.begin.is_some())
    }
}

/// The characters in front of which a text can be split without changing the tokens before them.
struct WordSplits {
    /// Punctuation marks are words of their own.
    marks: bool,
    /// Ideographs are words of their own.
    ideographs: bool,
    /// The characters of special tokens, which are found before any word is.
    inside_special: HashSet<char>,
}

impl WordSplits {
    fn at(&self, c: char) -> bool {
        let splits = match c {
            ' ' | '\n' | '\t' => true,
            '\u{2010}'..='\u{2027}' | '\u{3001}'..='\u{3003}' | '\u{3008}'..='\u{3011}' => self.marks,
            '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' => self.ideographs,
            c => self.marks && c.is_ascii_punctuation(),
        };
        splits && !self.inside_special.contains(&c)
    }
}

/// The file without what the library would panic on when it is damaged: text that is no JSON, a decoder (it is not used
/// here) and normalisers that carry a compiled table.
fn checked(file: &[u8]) -> Result<Vec<u8>, TokenizerProblem> {
    let failed = |error: serde_json::Error| TokenizerProblem::Library(error.to_string());
    let mut content: serde_json::Value = serde_json::from_slice(file).map_err(failed)?;
    if let Some(parts) = content.as_object_mut() {
        parts.remove("decoder");
    }
    let normaliser = content.pointer("/normalizer/type").and_then(|kind| kind.as_str());
    if let Some(found) = normaliser.filter(|kind| *kind != "BertNormalizer") {
        let (key, supported) = ("normalizer.type", "BertNormalizer");
        return Err(TokenizerProblem::Unsupported { key, found: found.to_owned(), supported });
    }
    serde_json::to_vec(&content).map_err(failed)
}

fn kind(model: &ModelWrapper) -> &'static str {
    match model {
        ModelWrapper::BPE(_) => "BPE",
        ModelWrapper::WordPiece(_) => "WordPiece",
        ModelWrapper::WordLevel(_) => "WordLevel",
        ModelWrapper::Unigram(_) => "Unigram",
    }
}

/// WordPiece forgets the blanks of a text, so a word's bytes begin with one, and a continuing piece's do not. Special
/// tokens have none.
fn word_piece_bytes(library: &Library, model: &WordPiece) -> Result<TokenBytes, TokenizerProblem> {
    let vocabulary = library.get_vocab(true);
    // An id far beyond the number of tokens would ask for memory that the file does not pay for.
    let most = vocabulary.len().saturating_mul(2);
    let mut words: Vec<&str> = Vec::new();
    for (word, id) in &vocabulary {
        let id = *id as usize;
        if id >= most {
            let why = format!("{word:?} has the id {id} in a vocabulary of {}", vocabulary.len());
            return Err(TokenizerProblem::Entry { key: "model.vocab", why });
        }
        words.resize(words.len().max(id + 1), "");
        words[id] = word;
    }
    let added = library.get_added_tokens_decoder();
    let special: HashSet<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
    let mut bytes = TokenBytes { bytes: Vec::new(), ends: Vec::with_capacity(words.len()) };
    for (word, id) in words.iter().zip(0..) {
        if !special.contains(&id) && !word.is_empty() {
            match word.strip_prefix(&model.continuing_subword_prefix) {
                Some(piece) => bytes.bytes.extend_from_slice(piece.as_bytes()),
                None => bytes.bytes.extend_from_slice(format!(" {word}").as_bytes()),
            }
        }
        bytes.ends.push(bytes.bytes.len());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::SeededEncoder;

    fn seeded() -> Tokenizer {
        Tokenizer::from_json(&SeededEncoder::default().tokenizer()).unwrap()
    }

    fn changed(change: impl Fn(&mut serde_json::Value)) -> Result<Tokenizer, String> {
        let mut file: serde_json::Value =
            serde_json::from_slice(&SeededEncoder::default().tokenizer()).unwrap();
        change(&mut file);
        Tokenizer::from_json(file.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn special_tokens_stand_around_what_is_left_of_a_text() {
        let tokenizer = seeded();
        let id = |token: &str| tokenizer.library.token_to_id(token).unwrap();
        let (first, last) = (id("[CLS]"), id("[SEP]"));
        let whole = tokenizer.encode_up_to("The cat sat", 8).unwrap();
        assert_eq!(whole.ids, [first, id("the"), id("cat"), id("s"), id("##a"), id("##t"), last]);
        assert!(!whole.cut);
        assert_eq!(tokenizer.encode("The cat sat").unwrap(), whole.ids);
        assert_eq!(tokenizer.encode_up_to("The cat sat", 7).unwrap(), whole);
        let cut = tokenizer.encode_up_to("The cat sat", 4).unwrap();
        assert_eq!((cut.ids, cut.cut), (vec![first, id("the"), id("cat"), last], true));
        for room in [0, 1, 2] {
            assert_eq!(tokenizer.encode_up_to("The cat", room).unwrap().ids, [first, last]);
        }
        assert_eq!(
            tokenizer.encode_up_to("", 8).unwrap(),
            EncodedText { ids: vec![first, last], cut: false }
        );
        assert_eq!(tokenizer.encode("🦀").unwrap(), [first, id("[UNK]"), last]);
        assert_eq!(tokenizer.decode(&whole.ids), " the cat sat");
    }

    #[test]
    fn a_long_text_is_cut_as_if_it_had_been_tokenised_whole() {
        let tokenizer = seeded();
        assert!(tokenizer.beginning(&"'".repeat(1 << 20), 4096).len() <= 4096, "every mark is a word");
        // Blanks in plenty, words longer than a piece, and no blank at all.
        let texts = [
            "the cat sat ".repeat(5000),
            format!("{} {}", "x".repeat(9000), "cat ".repeat(9000)),
            format!("the{}cat", " ".repeat(100_000)),
            "the".repeat(20_000),
            "the, cat; 猫".repeat(3000),
            "'".repeat(20_000),
            "猫".repeat(20_000),
            "[CLS]".repeat(5000),
        ];
        for text in &texts {
            for most in [3, 8, 64] {
                let mut whole = tokenizer.library.encode_fast(text.as_str(), false).unwrap();
                let cut = whole.len() > most - 2;
                whole.truncate(most - 2, 0, TruncationDirection::Right);
                let found = tokenizer.encode_up_to(text, most).unwrap();
                assert_eq!(found.ids[1..found.ids.len() - 1], *whole.get_ids());
                assert_eq!(found.cut, cut);
            }
        }
    }

    #[test]
    fn the_files_own_cutting_and_padding_are_dropped() {
        let padded = changed(|file| {
            file["truncation"] = serde_json::json!(
                {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
            file["padding"] = serde_json::json!(
                {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "[PAD]"});
        });
        let text = "the cat the cat the cat";
        assert_eq!(padded.unwrap().encode(text).unwrap(), seeded().encode(text).unwrap());
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let other = changed(|file| {
            file["model"] = serde_json::json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        });
        assert!(other.unwrap_err().contains("key model.type is \"WordLevel\", which is not supported"));
        let unknown = changed(|file| file["model"]["unk_token"] = "<unknown>".into());
        assert!(unknown.unwrap_err().contains("\"<unknown>\" for unknown words is not in the vocabulary"));
        let far = changed(|file| file["model"]["vocab"]["far"] = 4_000_000_000_u32.into());
        assert!(far.unwrap_err().contains("\"far\" has the id 4000000000"));
        let table = changed(|file| file["normalizer"] = serde_json::json!({"type": "Precompiled"}));
        assert!(table.unwrap_err().contains("key normalizer.type is \"Precompiled\""));
        let error = Tokenizer::from_json(b"{}").err().unwrap().to_string();
        assert!(error.contains("the tokenizer failed"), "{error}");
    }
}
