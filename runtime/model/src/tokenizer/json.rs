//! The tokenizer of a `tokenizer.json` as encoders have it: WordPiece, byte-level BPE or Unigram, with
//! the special tokens that its template puts around a text, or around two.

use super::{TokenBytes, Tokenizer, charsmap};
use crate::error::TokenizerProblem;
use serde_json::Value;
use std::collections::HashSet;
use tokenizers::models::ModelWrapper;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{Encoding, Model, PostProcessor, Tokenizer as Library, TruncationDirection};

const KIND: &str = "model.type";
/// Longest word that may be split into pieces, in characters; models have 100. Splitting takes time with its
/// third power: 17 million steps at 256.
const MAX_WORD_CHARS: usize = 256;
/// A text is first tokenised up to this many bytes for each token that is needed: few texts have longer
/// tokens.
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

/// The ids of two texts that a model reads together, cut to a length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPair {
    /// The ids, special tokens included.
    pub ids: Vec<u32>,
    /// The index of the first id whose token type is that of a second text; `None` where the template
    /// gives all tokens one type.
    pub second_segment: Option<usize>,
    /// Whether the texts were longer.
    pub cut: bool,
}

impl Tokenizer {
    /// Builds the tokenizer that the bytes of a `tokenizer.json` describe. The file's own truncation and
    /// padding are dropped: callers set the length of a text.
    pub(crate) fn from_json(file: &[u8]) -> Result<Self, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let content = checked(file)?;
        let mut library =
            Library::from_bytes(serde_json::to_vec(&content).map_err(not_json)?).map_err(failed)?;
        library.with_padding(None).with_truncation(None).map_err(failed)?;
        check_kind(library.get_model())?;
        check_unknown(&content, &library)?;
        check_added_tokens(&content, &library)?;
        let bytes = match library.get_model() {
            ModelWrapper::WordPiece(model) => word_piece_bytes(&library, model)?,
            _ => piece_bytes(&library)?,
        };
        let tokenizer =
            Self { library, bytes, begin: None, eos: Vec::new(), unused: Vec::new(), templated: true };
        check_template_pieces(&tokenizer.library)?;
        tokenizer.check_template()?;
        Ok(tokenizer)
    }

    /// Refuses a template whose special tokens have ids outside the vocabulary.
    pub(super) fn check_template(&self) -> Result<(), TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let around = self.library.post_process(Encoding::default(), None, self.templated).map_err(failed)?;
        let outside =
            around.get_ids().iter().zip(around.get_tokens()).find(|(id, _)| **id as usize >= self.len());
        match outside {
            None => Ok(()),
            Some((id, token)) => {
                let why = format!("{token:?} has the id {id}, outside the vocabulary of {}", self.len());
                Err(TokenizerProblem::Entry { key: "post_processor", why })
            }
        }
    }

    /// The ids of a text, at most `max_tokens` of them: a longer text loses its end, and keeps the special
    /// tokens around it. Text far behind the cut is not tokenised.
    ///
    /// # Errors
    /// The library's own; none is known for valid UTF-8.
    pub fn encode_up_to(&self, text: &str, max_tokens: usize) -> Result<EncodedText, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let room = max_tokens.saturating_sub(self.special_tokens());
        let mut encoding = self.encode_beginning(text, max_tokens, room)?;
        let cut = cut_to(&mut encoding, room);
        let encoding = self.library.post_process(encoding, None, self.templated).map_err(failed)?;
        let ids = self.begin.into_iter().chain(encoding.get_ids().iter().copied()).collect();
        Ok(EncodedText { ids, cut })
    }

    /// The ids of two texts that a model reads together, at most `max_tokens` of them. Of two texts that
    /// are too long the longer one loses its end first, and both the same share where each is longer than
    /// half.
    ///
    /// # Errors
    /// A template without a form for two texts, or one that mixes their token types; else the library's own.
    pub fn encode_pair(
        &self,
        first: &str,
        second: &str,
        max_tokens: usize,
    ) -> Result<EncodedPair, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let template = self.library.get_post_processor().filter(|_| self.templated);
        let special = template.map_or(0, |template| template.added_tokens(true));
        let room = max_tokens.saturating_sub(special);
        let mut first = self.encode_beginning(first, max_tokens, room)?;
        let mut second = self.encode_beginning(second, max_tokens, room)?;
        let rooms = PairRooms::of(first.len(), second.len(), room);
        let cut = [cut_to(&mut first, rooms.first), cut_to(&mut second, rooms.second)].contains(&true);
        let wanted = first.len() + second.len() + special;
        let both = self.library.post_process(first, Some(second), self.templated).map_err(failed)?;
        let types = both.get_type_ids();
        let second_segment = types.iter().position(|kind| *kind != 0);
        let mixed = second_segment.is_some_and(|from| types[from..].iter().any(|kind| *kind != 1));
        if both.len() != wanted || mixed {
            return Err(no_pairs());
        }
        Ok(EncodedPair { ids: both.get_ids().to_vec(), second_segment, cut })
    }

    /// The ids of a text without special tokens around it, at most `room` of them.
    pub(crate) fn encode_plain_up_to(
        &self,
        text: &str,
        room: usize,
    ) -> Result<EncodedText, TokenizerProblem> {
        let mut encoding = self.encode_beginning(text, room, room)?;
        let cut = cut_to(&mut encoding, room);
        Ok(EncodedText { ids: encoding.get_ids().to_vec(), cut })
    }

    /// The tokens of a text without special ones: all of them, or more than `room`.
    fn encode_beginning(
        &self,
        text: &str,
        max_tokens: usize,
        room: usize,
    ) -> Result<Encoding, TokenizerProblem> {
        self.encode_beginning_with(|piece| self.library.encode_fast(piece, false), text, max_tokens, room)
    }

    /// The same by one of the library's functions.
    pub(super) fn encode_beginning_with(
        &self,
        encode: impl Fn(&str) -> tokenizers::Result<Encoding>,
        text: &str,
        max_tokens: usize,
        room: usize,
    ) -> Result<Encoding, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let mut bytes = max_tokens.saturating_mul(BYTES_PER_TOKEN).max(FIRST_PIECE_BYTES);
        loop {
            let piece = self.beginning(text, bytes);
            let encoding = encode(piece).map_err(failed)?;
            if encoding.len() > room || piece.len() == text.len() {
                return Ok(encoding);
            }
            bytes = bytes.saturating_mul(4);
        }
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

/// Cuts a text to `room` tokens. Whether it was longer.
pub(super) fn cut_to(encoding: &mut Encoding, room: usize) -> bool {
    let cut = encoding.len() > room;
    encoding.truncate(room, 0, TruncationDirection::Right);
    // The library keeps the rest of the text, and would put special tokens around each piece of it.
    encoding.take_overflowing();
    cut
}

fn no_pairs() -> TokenizerProblem {
    let why = "it has no form for two texts, the first with token type 0 and the second with 0 or 1; this model \
         cannot read pairs";
    TokenizerProblem::Entry { key: "post_processor", why: why.to_owned() }
}

/// Tokens that each of two texts may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PairRooms {
    first: usize,
    second: usize,
}

impl PairRooms {
    /// The library's rule `longest_first`: the shorter text stays whole up to half of the room, and the
    /// longer one gets what is left.
    fn of(first: usize, second: usize, room: usize) -> Self {
        let shorter = first.min(second).min(room / 2);
        let longer = first.max(second).min(room - shorter);
        if first > second {
            Self { first: longer, second: shorter }
        } else {
            Self { first: shorter, second: longer }
        }
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

/// Parts of the file whose kind decides the ids, with the supported kinds; `null` where the first is empty.
const KINDS: [(&str, &str, &[&str], &str); 3] = [
    (
        "/normalizer",
        "normalizer.type",
        &["", "BertNormalizer", "Precompiled", "Sequence"],
        "BertNormalizer, Precompiled, a Sequence of Precompiled and Replace",
    ),
    (
        "/pre_tokenizer",
        "pre_tokenizer.type",
        &["BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace", "Sequence"],
        "BertPreTokenizer, Whitespace, WhitespaceSplit, ByteLevel, Metaspace, a Sequence of these",
    ),
    (
        "/post_processor",
        "post_processor.type",
        &["", "TemplateProcessing", "BertProcessing", "RobertaProcessing"],
        "TemplateProcessing, BertProcessing, RobertaProcessing",
    ),
];

#[expect(clippy::needless_pass_by_value, reason = "the signature of map_err")]
fn not_json(error: serde_json::Error) -> TokenizerProblem {
    TokenizerProblem::Library(error.to_string())
}

/// The file without the decoder, which is not used here, and with supported parts only: the library would
/// panic on some damaged parts, and other kinds split texts in other ways.
fn checked(file: &[u8]) -> Result<Value, TokenizerProblem> {
    let mut content: Value = serde_json::from_slice(file).map_err(not_json)?;
    if let Some(parts) = content.as_object_mut() {
        parts.remove("decoder");
    }
    for (place, key, kinds, supported) in KINDS {
        let part = content.pointer(place).filter(|part| !part.is_null());
        let found = part.map_or("", |part| part["type"].as_str().unwrap_or("unknown"));
        if !kinds.contains(&found) {
            let found = if found.is_empty() { "null" } else { found }.to_owned();
            return Err(TokenizerProblem::Unsupported { key, found, supported });
        }
    }
    check_sequences(&content)?;
    charsmap::check(&content["normalizer"])?;
    Ok(content)
}

/// Parts that may stand in a sequence: where the list is, the key for messages, and the kinds.
const SEQUENCES: [(&str, &str, &[&str], &str); 2] = [
    (
        "/normalizer/normalizers",
        "normalizer.type",
        &["Precompiled", "Replace"],
        "a Sequence of Precompiled and Replace",
    ),
    (
        "/pre_tokenizer/pretokenizers",
        "pre_tokenizer.type",
        &["BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace"],
        "a Sequence of BertPreTokenizer, Whitespace, WhitespaceSplit, ByteLevel, Metaspace",
    ),
];

/// Refuses a sequence with a part of another kind.
fn check_sequences(content: &Value) -> Result<(), TokenizerProblem> {
    for (place, key, kinds, supported) in SEQUENCES {
        for part in content.pointer(place).and_then(Value::as_array).into_iter().flatten() {
            let found = part["type"].as_str().unwrap_or("unknown");
            if !kinds.contains(&found) {
                return Err(TokenizerProblem::Unsupported { key, found: found.to_owned(), supported });
            }
        }
    }
    Ok(())
}

/// Refuses kinds of models that no encoder has.
fn check_kind(model: &ModelWrapper) -> Result<(), TokenizerProblem> {
    match model {
        ModelWrapper::WordPiece(model) => check_word_piece(model),
        ModelWrapper::BPE(_) | ModelWrapper::Unigram(_) => Ok(()),
        ModelWrapper::WordLevel(_) => Err(TokenizerProblem::Unsupported {
            key: KIND,
            found: kind(model).to_owned(),
            supported: "WordPiece, BPE, Unigram",
        }),
    }
}

/// Refuses a model of another kind than WordPiece that names a token for unknown pieces which it does not
/// have: texts with such pieces could not be tokenised. Byte-level BPE needs none.
fn check_unknown(content: &Value, library: &Library) -> Result<(), TokenizerProblem> {
    let (model, tokens) = (&content["model"], library.get_vocab_size(false));
    let known = match library.get_model() {
        ModelWrapper::BPE(_) => match model["unk_token"].as_str() {
            Some(unknown) => library.get_model().token_to_id(unknown).is_some(),
            None => true,
        },
        ModelWrapper::Unigram(_) => model["unk_id"].as_u64().is_some_and(|id| id < tokens as u64),
        _ => true,
    };
    if known {
        return Ok(());
    }
    let why = "the token for unknown pieces is not in the vocabulary; download tokenizer.json again";
    Err(TokenizerProblem::Entry { key: "model.unk_token", why: why.to_owned() })
}

/// Refuses a model for which some texts could not be tokenised, or only in a long time.
fn check_word_piece(model: &WordPiece) -> Result<(), TokenizerProblem> {
    // In the vocabulary of the model itself: an added token of that name does not replace unknown words.
    if model.token_to_id(&model.unk_token).is_none() {
        let why = format!(
            "the token {:?} for unknown words is not in the vocabulary; download tokenizer.json again",
            model.unk_token
        );
        return Err(TokenizerProblem::Entry { key: "model.unk_token", why });
    }
    if model.max_input_chars_per_word > MAX_WORD_CHARS {
        let why = format!("{} is more than {MAX_WORD_CHARS}", model.max_input_chars_per_word);
        return Err(TokenizerProblem::Entry { key: "model.max_input_chars_per_word", why });
    }
    Ok(())
}

/// Refuses added tokens that have another id in the library than the file gives them: the model was trained
/// with the file's id.
fn check_added_tokens(content: &Value, library: &Library) -> Result<(), TokenizerProblem> {
    for token in content["added_tokens"].as_array().into_iter().flatten() {
        let (Some(text), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else { continue };
        let known = library.token_to_id(text).map(u64::from);
        if known != Some(id) {
            let known = known.map_or("none".to_owned(), |known| known.to_string());
            let why = format!("{text:?} has the id {id} here and {known} in the vocabulary");
            return Err(TokenizerProblem::Entry { key: "added_tokens", why });
        }
    }
    Ok(())
}

/// Refuses a template with a piece that it does not define: the library would panic at the first text.
fn check_template_pieces(library: &Library) -> Result<(), TokenizerProblem> {
    let Some(PostProcessorWrapper::Template(template)) = library.get_post_processor() else { return Ok(()) };
    let wrong = |why: String| TokenizerProblem::Entry { key: "post_processor", why };
    // The library keeps the pieces to itself, but writes each form of them in one way.
    let written = serde_json::to_value(template).map_err(not_json)?;
    let pieces =
        |form: &'static str| written[form].as_array().into_iter().flatten().map(move |piece| (form, piece));
    for (form, piece) in pieces("single").chain(pieces("pair")) {
        let special = &piece["SpecialToken"]["id"];
        if let Some(name) =
            special.as_str().filter(|name| !template.get_special_tokens().0.contains_key(*name))
        {
            return Err(wrong(format!(
                "{form} has the token {name:?}, which special_tokens does not define"
            )));
        }
        if form == "single" && piece["Sequence"]["id"] == "B" {
            return Err(wrong("single has the sequence B, but it is for one text, A".to_owned()));
        }
    }
    let uneven = template.get_special_tokens().0.iter().find(|(_, token)| {
        let ids = serde_json::to_value(token).ok();
        let count = |key: &str| ids.as_ref().and_then(|token| token[key].as_array().map(Vec::len));
        count("ids") != count("tokens")
    });
    match uneven {
        None => Ok(()),
        Some((name, _)) => Err(wrong(format!("the special token {name:?} has not as many ids as tokens"))),
    }
}

fn kind(model: &ModelWrapper) -> &'static str {
    match model {
        ModelWrapper::BPE(_) => "BPE",
        ModelWrapper::WordPiece(_) => "WordPiece",
        ModelWrapper::WordLevel(_) => "WordLevel",
        ModelWrapper::Unigram(_) => "Unigram",
    }
}

/// WordPiece drops the spaces of a text, so the bytes of a word begin with a space, and those of a continuing
/// piece do not.
fn word_piece_bytes(library: &Library, model: &WordPiece) -> Result<TokenBytes, TokenizerProblem> {
    token_bytes(library, |word, bytes| match word.strip_prefix(&model.continuing_subword_prefix) {
        Some(piece) => bytes.extend_from_slice(piece.as_bytes()),
        None => bytes.extend_from_slice(format!(" {word}").as_bytes()),
    })
}

/// The other vocabularies write a space as a character of their own: byte-level BPE as "\u{120}", Unigram as
/// "\u{2581}". What else byte-level BPE writes otherwise stays as it is: encoders produce no text.
fn piece_bytes(library: &Library) -> Result<TokenBytes, TokenizerProblem> {
    token_bytes(library, |word, bytes| {
        bytes.extend_from_slice(word.replace(['\u{120}', '\u{2581}'], " ").as_bytes());
    })
}

/// The bytes of every token, as `write` gives them. Special tokens have none.
fn token_bytes(
    library: &Library,
    write: impl Fn(&str, &mut Vec<u8>),
) -> Result<TokenBytes, TokenizerProblem> {
    let vocabulary = library.get_vocab(true);
    // An id far beyond the number of tokens would take memory out of proportion to the file.
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
            write(word, &mut bytes.bytes);
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

    fn changed(change: impl Fn(&mut Value)) -> Result<Tokenizer, String> {
        let mut file: Value = serde_json::from_slice(&SeededEncoder::default().tokenizer()).unwrap();
        change(&mut file);
        Tokenizer::from_json(file.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn special_tokens_surround_a_truncated_text() {
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
    fn a_pair_of_texts_has_its_special_tokens_and_types() {
        let tokenizer = seeded();
        let id = |token: &str| tokenizer.library.token_to_id(token).unwrap();
        let (first, sep) = (id("[CLS]"), id("[SEP]"));
        let whole = tokenizer.encode_pair("the cat", "hello", 8).unwrap();
        assert_eq!(whole.ids, [first, id("the"), id("cat"), sep, id("hello"), sep]);
        assert_eq!((whole.second_segment, whole.cut), (Some(4), false));
        let empty = tokenizer.encode_pair("", "", 8).unwrap();
        assert_eq!((empty.ids, empty.second_segment), (vec![first, sep, sep], Some(2)));
        let cut = tokenizer.encode_pair("the cat the cat the", "hello world", 7).unwrap();
        assert_eq!(cut.ids, [first, id("the"), id("cat"), sep, id("hello"), id("world"), sep]);
        assert!(cut.cut);
        let one_type = changed(|file| {
            file["post_processor"] = serde_json::json!({
                "type": "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2], "trim_offsets": true,
                "add_prefix_space": false});
        });
        let pair = one_type.unwrap().encode_pair("the", "cat", 8).unwrap();
        assert_eq!(pair.ids, [first, id("the"), sep, sep, id("cat"), sep]);
        assert_eq!(pair.second_segment, None);
        let single = changed(|file| {
            file["post_processor"]["pair"] = file["post_processor"]["single"].clone();
        });
        // The library refuses a form for pairs without a second text when it reads the file, or we do later.
        assert!(single.map_or(true, |tokenizer| tokenizer.encode_pair("the", "cat", 8).is_err()));
    }

    #[test]
    fn two_long_texts_share_the_room() {
        let cases = [
            (3, 4, 10, PairRooms { first: 3, second: 4 }),
            (3, 40, 10, PairRooms { first: 3, second: 7 }),
            (40, 3, 10, PairRooms { first: 7, second: 3 }),
            (40, 30, 11, PairRooms { first: 6, second: 5 }),
            (40, 40, 11, PairRooms { first: 5, second: 6 }),
            (2, 2, 0, PairRooms { first: 0, second: 0 }),
        ];
        for (first, second, room, wanted) in cases {
            assert_eq!(PairRooms::of(first, second, room), wanted, "{first} {second} {room}");
        }
    }

    #[test]
    fn byte_level_vocabularies_are_read() {
        let bpe = changed(|file| {
            let vocab = serde_json::json!({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4,
                "c": 5, "a": 6, "t": 7, "\u{120}": 8, "ca": 9, "cat": 10, "\u{120}cat": 11});
            file["model"] = serde_json::json!({"type": "BPE", "vocab": vocab, "unk_token": null,
                "merges": [["c", "a"], ["ca", "t"], ["\u{120}", "cat"]]});
            file["normalizer"] = Value::Null;
            file["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true});
        });
        let bpe = bpe.unwrap();
        assert_eq!(bpe.encode("cat cat").unwrap(), [2, 10, 11, 3]);
        assert_eq!(bpe.decode(&[10, 11]), "cat cat");
    }

    #[test]
    fn a_long_text_is_cut_as_if_tokenised_whole() {
        let tokenizer = seeded();
        assert!(tokenizer.beginning(&"'".repeat(1 << 20), 4096).len() <= 4096, "every mark is a word");
        // Many spaces, words longer than a piece, and no space at all.
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
    fn truncation_and_padding_of_the_file_are_dropped() {
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
    fn special_ids_outside_the_vocabulary_are_refused() {
        let template = changed(|file| {
            file["post_processor"]["special_tokens"]["[SEP]"]["ids"] = serde_json::json!([5000]);
        });
        let error = template.unwrap_err();
        assert!(
            error.contains("post_processor: \"[SEP]\" has the id 5000, outside the vocabulary"),
            "{error}"
        );
        let bert = changed(|file| {
            file["post_processor"] =
                serde_json::json!({"type": "BertProcessing", "sep": ["[SEP]", 4000], "cls": ["[CLS]", 2]});
        });
        assert!(bert.unwrap_err().contains("\"[SEP]\" has the id 4000"));
        let added = changed(|file| file["added_tokens"][2]["id"] = 77.into());
        let error = added.unwrap_err();
        assert!(error.contains("added_tokens: \"[CLS]\" has the id 77 here and 2"), "{error}");
    }

    #[test]
    fn a_template_with_an_undefined_piece_is_refused() {
        type Damage = fn(&mut Value);
        let cases: [(Damage, &str); 3] = [
            (
                |template| template["single"][0]["SpecialToken"]["id"] = "[cls]".into(),
                "single has the token \"[cls]\", which special_tokens does not define",
            ),
            (|template| template["single"][1]["Sequence"]["id"] = "B".into(), "single has the sequence B"),
            (
                |template| template["special_tokens"]["[SEP]"]["tokens"] = serde_json::json!([]),
                "the special token \"[SEP]\" has not as many ids as tokens",
            ),
        ];
        for (damage, why) in cases {
            let error = changed(|file| damage(&mut file["post_processor"])).unwrap_err();
            assert!(error.contains(&format!("post_processor: {why}")), "{error}");
        }
    }

    #[test]
    fn a_vocabulary_without_the_unknown_token_is_refused() {
        let unknown = changed(|file| {
            file["model"]["vocab"].as_object_mut().unwrap().remove("[UNK]");
        });
        assert!(unknown.unwrap_err().contains("\"[UNK]\" for unknown words is not in the vocabulary"));
        let long = changed(|file| file["model"]["max_input_chars_per_word"] = 1_000_000.into());
        assert!(long.unwrap_err().contains("max_input_chars_per_word: 1000000 is more than 256"));
    }

    #[test]
    fn unsupported_parts_are_refused_by_name() {
        let other = changed(|file| {
            file["model"] = serde_json::json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        });
        assert!(other.unwrap_err().contains("key model.type is \"WordLevel\", which is not supported"));
        let unknown = changed(|file| file["model"]["unk_token"] = "<unknown>".into());
        assert!(unknown.unwrap_err().contains("\"<unknown>\" for unknown words is not in the vocabulary"));
        let far = changed(|file| file["model"]["vocab"]["far"] = 4_000_000_000_u32.into());
        assert!(far.unwrap_err().contains("\"far\" has the id 4000000000"));
        let lower = changed(|file| file["normalizer"] = serde_json::json!({"type": "Lowercase"}));
        assert!(lower.unwrap_err().contains("key normalizer.type is \"Lowercase\""));
        let nested = changed(|file| {
            let inner = serde_json::json!({"type": "Digits", "individual_digits": true});
            file["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [inner]});
        });
        assert!(nested.unwrap_err().contains("key pre_tokenizer.type is \"Digits\""));
        for (part, found) in [("pre_tokenizer", "null"), ("post_processor", "Sequence")] {
            let kind = if found == "null" { Value::Null } else { serde_json::json!({"type": "Sequence"}) };
            let error = changed(|file| file[part] = kind.clone()).unwrap_err();
            assert!(error.contains(&format!("key {part}.type is {found:?}")), "{error}");
        }
        let error = changed(|file| file["model"] = Value::Null).unwrap_err();
        assert!(error.contains("the tokenizer failed"), "{error}");
    }
}
